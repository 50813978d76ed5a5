"""``ckpt-hooks``: looks at the checkpoints of a run, from a shell, without a device and without a lock.

ckpt-hooks ls RUN                 every step: size, when, metrics
ckpt-hooks show RUN [STEP]        one step (the newest): items, leaves, metadata
ckpt-hooks verify RUN [STEP ...]  reads every byte; exit code 1 where one is not as it was saved
ckpt-hooks diff RUN STEP STEP     which leaves differ, and by how much
"""

from __future__ import annotations

import argparse
import datetime
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
    try:
        return _run(options)
    except (CheckpointError, OSError) as error:
        print(f"ckpt-hooks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `ckpt-hooks show ... | head`
        sys.stderr.close()
        return 0


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
    rows = [("step", "size", "committed", "metrics")]
    for step in manager.steps():
        metadata = manager.metadata(step)
        metrics = ", ".join(f"{name}={_number(value)}" for name, value in metadata.metrics.items())
        size = _size(_tree_nbytes(run.find(step)))
        rows.append((str(step), size, _time(metadata.commit_timestamp_nsecs), metrics))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip())
    return 0


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
    for step in options.steps or manager.steps():
        problems = manager.verify(step)
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
    largest = np.max(np.abs(a.astype(np.complex128) - b.astype(np.complex128)))
    return f"{np.count_nonzero(a != b)} of {a.size} values differ, by at most {largest:.6g}"


# ------------------------------------------------------------------ texts


def _plain(value: Any) -> np.ndarray:
    keys = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if keys else value)


def _describe(leaf: Any) -> str:
    return "a string" if leaf is str else f"{leaf.dtype}{list(leaf.shape)}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
