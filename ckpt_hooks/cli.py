"""``ckpt-hooks``: looks at the checkpoints of a run, from a shell, without a device and without a lock.

ckpt-hooks ls RUN                 every step: size, when, metrics
ckpt-hooks show RUN [STEP]        one step (the newest): items, leaves, metadata
ckpt-hooks verify RUN [STEP ...]  reads every byte; exit code 1 where one is not as it was saved
ckpt-hooks diff RUN STEP STEP     which leaves differ, and by how much
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_hooks import tree
from ckpt_hooks.errors import CheckpointError, CheckpointNotFoundError
from ckpt_hooks.handlers.composite import CompositeArgs
from ckpt_hooks.manager import CheckpointManager
from ckpt_hooks.run import RunDirectory

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 1 for damage or a difference, 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a metric's name that the terminal has no letters for
    try:
        code = _run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `ckpt-hooks show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end would fail as well
        return 0
    except (CheckpointError, OSError) as error:
        print(f"ckpt-hooks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ckpt-hooks", description="Looks at the checkpoints of a run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, text in ((_ls, "lists"), (_show, "describes"), (_verify, "checks"), (_diff, "compares")):
        command = commands.add_parser(function.__name__[1:], help=f"{text} checkpoints")
        command.add_argument("run", metavar="RUN", help="the directory of a run")
        command.set_defaults(command=function)
        if function is _show:
            command.add_argument("step", metavar="STEP", type=int, nargs="?", help="the newest where not given")
        elif function is _verify:
            command.add_argument("steps", metavar="STEP", type=int, nargs="*", help="all where none is given")
        elif function is _diff:
            command.add_argument("steps", metavar="STEP", type=int, nargs=2)
    return parser


def _run(options: argparse.Namespace) -> int:
    if not os.path.isdir(options.run):
        raise CheckpointNotFoundError(f"{options.run} is no directory")
    command: Callable[[CheckpointManager, argparse.Namespace], int] = options.command
    return command(CheckpointManager(options.run), options)


# ------------------------------------------------------------------ commands


def _ls(manager: CheckpointManager, options: argparse.Namespace) -> int:
    run = RunDirectory(options.run)
    run.take_stock()
    rows: list[tuple[str, ...]] = [("step", "size", "committed", "metrics")]
    damaged = False
    row: tuple[str, ...]
    for step in manager.steps():
        try:
            metadata = manager.metadata(step)
            metrics = ", ".join(f"{name}={_number(value)}" for name, value in metadata.metrics.items())
            row = _size(_tree_nbytes(run.find(step))), _time(metadata.commit_timestamp_nsecs), metrics
        except (CheckpointNotFoundError, FileNotFoundError):  # removed since they were listed
            continue
        except CheckpointError as error:
            damaged, row = True, ("-", "-", f"DAMAGED: {error}")
        rows.append((str(step), *row))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip())
    return int(damaged)


def _show(manager: CheckpointManager, options: argparse.Namespace) -> int:
    step = manager.latest_step() if options.step is None else options.step
    if step is None:
        raise CheckpointNotFoundError(f"{manager.directory} has no checkpoint")
    metadata = manager.metadata(step)
    print(f"step {step}, committed {_time(metadata.commit_timestamp_nsecs)}")
    print(json.dumps(dict(metadata.custom_metadata), indent=2))
    items = metadata.item_metadata
    for name, item in items.items() if isinstance(items, CompositeArgs) else [("", items)]:
        if item is None:
            continue  # JSON and iterators describe nothing, and the metrics stand above
        print(f"\n{name or 'the state'}:")
        for leaf_name, leaf in tree.named_leaves(item).items():
            print(f"  {leaf_name or '(the item itself)'}  {_describe(leaf)}")
    return 0


def _verify(manager: CheckpointManager, options: argparse.Namespace) -> int:
    damaged = False
    steps = options.steps or manager.steps()
    if not steps:
        raise CheckpointNotFoundError(f"{manager.directory} has no checkpoint")
    for step in steps:
        try:
            problems = manager.verify(step)
        except CheckpointNotFoundError:
            if options.steps:
                raise
            continue  # removed since they were listed
        damaged |= bool(problems)
        print(f"step {step}: {'ok' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
    return int(damaged)


def _diff(manager: CheckpointManager, options: argparse.Namespace) -> int:
    one, other = (tree.named_leaves(manager.restore(step=step)) for step in options.steps)
    differs = False
    for name in sorted(one.keys() | other.keys()):
        line = _difference(one, other, name)
        if line:
            differs = True
            print(f"{name}: {line}")
    return int(differs)


def _difference(one: dict[str, Any], other: dict[str, Any], name: str) -> str:
    if name not in one or name not in other:
        return "only in the second" if name not in one else "only in the first"
    a, b = (_plain(values[name]) for values in (one, other))
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    if a.tobytes() == b.tobytes():
        return ""
    if a.dtype.kind not in "biufc" and a.dtype.kind != "V":
        return f"{a} and {b}"
    differ = (a != b) & ~((a != a) & (b != b))  # two NaNs are one value
    if not differ.any():
        return "the same numbers in other bits, such as those of -0.0"
    if a.dtype.kind in "iu":  # as Python's, of which none is too large
        largest = max(abs(int(x) - int(y)) for x, y in zip(a[differ], b[differ], strict=True))
    else:
        with np.errstate(invalid="ignore"):  # of two infinities
            largest = np.max(np.abs(a[differ].astype(np.complex128) - b[differ].astype(np.complex128)))
    return f"{np.count_nonzero(differ)} of {a.size} values differ, by at most {_number(largest)}"


# ------------------------------------------------------------------ texts


def _plain(value: Any) -> np.ndarray:
    keys = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if keys else value)


def _describe(leaf: Any) -> str:
    return "a string" if leaf is str else f"{leaf.dtype}{list(leaf.shape)}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _time(nsecs: int | None) -> str:
    if nsecs is None:
        return "-"
    return datetime.datetime.fromtimestamp(nsecs / 1e9).isoformat(sep=" ", timespec="seconds")


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _tree_nbytes(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


if __name__ == "__main__":
    sys.exit(main())
