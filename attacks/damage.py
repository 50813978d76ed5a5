"""Damage, exhaustively: every bit of every file of a checkpoint flipped, and restored from each time.

    python -m attacks.damage                      # a sample of each kind, some minutes
    python -m attacks.damage --full --orbax 2000  # every bit of every specimen, more than 1,000,000

A specimen is a small checkpoint with an older one beside it. Its bits are flipped one by one, its sectors zeroed, its
files cut off at every length, emptied, removed, renamed, exchanged and copied over one another, within the checkpoint
and between the two. After each damage the checkpoint is verified and restored: by number without a target, by number
with one, and as the newest, with fallback. Of flips and lengths, each case takes its turn at one of the three, so that
every byte meets all of them; with `--every-form`, and for all other damages, each case is restored in all three ways.
What may come of it:

    detected    the restore raises
    harmless    it gives every value as it was saved
    WRONG       it gives anything else: a failure
    UNTOLD      `verify` says that all is well, and a restore raises: a failure
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from attacks.at_once import io_at_once
from attacks.forked import run_forked
from attacks.quiet import quiet
from attacks.states import Position, differences, state_of, step_of
from ckpt_hooks import Checkpointer, CheckpointManager, StandardCheckpointHandler
from ckpt_hooks import args as ckpt_args
from ckpt_hooks.errors import CheckpointError
from ckpt_hooks.metadata import METADATA_FILE
from ckpt_hooks.testing.damage import Damage, copy_over, damages, damages_between

__all__ = ["SPECIMENS", "Specimen", "Tally", "attack", "main"]

OLDER, STEP = 10, 20
_IN_FILES = frozenset({"bit", "sector", "truncate"})
_MANY = frozenset({"bit", "truncate"})
_PAIRS = frozenset({"swap", "copy"})
_KIND_OF_ORBAX = "mixed"
_SAMPLE_STRIDE = 61  # prime, so that every place in a byte is met

Verdict = Literal["detected", "harmless", "WRONG", "UNTOLD"]
Layout = Literal["items", "tree"]
Form = Literal["without target", "with target", "newest"]
FORMS: tuple[Form, ...] = get_args(Form)


# ------------------------------------------------------------------ specimens


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A checkpoint that is struck.

    Attributes:
      kind: of its state (`attacks.states`).
      layout: "items" with metrics and an iterator, or "tree", one pytree as StandardCheckpointer writes it.
      values: of the older and the newer checkpoint (what `state_of` makes of them is saved).
    """

    kind: str
    layout: Layout
    values: tuple[int, int] = (OLDER, STEP)

    def write(self, directory: str) -> None:
        """A run with steps `OLDER` and `STEP`; the second one is struck."""
        states = [
            (step, value, state_of(value, self.kind)) for step, value in zip((OLDER, STEP), self.values, strict=True)
        ]
        if self.layout == "items":
            with CheckpointManager(directory) as manager:
                for step, value, state in states:
                    manager.save(step, state, metrics={"loss": 1 / step}, data=Position(value))
            return
        with Checkpointer(StandardCheckpointHandler()) as checkpointer:
            for step, _, state in states:
                checkpointer.save(os.path.join(directory, str(step)), ckpt_args.StandardSave(state))

    def restore(self, manager: CheckpointManager, form: Form) -> tuple[int | None, str | None]:
        """Restores: (the value that it is of, how it differs from what was saved, None where it does not)."""
        position = Position(-1)
        objects: dict[str, Any] = {"data": position} if self.layout == "items" else {}
        target = state_of(0, self.kind) if form == "with target" else None
        restored = manager.restore(target, step=None if form == "newest" else STEP, **objects)
        value = step_of(restored)
        right = self.values if form == "newest" else self.values[1:]
        if value is None or value not in right:
            return value, f"{form}: restored {value}, instead of {right}"
        problems = differences(restored, value, self.kind)
        if objects and position.value != value:
            problems.append(f"the iterator stands at {position.value}")
        return value, f"{form}: {problems}" if problems else None


def _specimens() -> Iterator[tuple[str, Specimen]]:
    numbers: Sequence[tuple[str, Layout, int]] = (
        ("tiny", "items", 2),
        ("tiny", "tree", 6),
        ("mixed", "items", 1),
        ("mixed", "tree", 4),
        ("many", "tree", 1),
    )
    for kind, layout, copies in numbers:
        for copy in range(copies):
            # The same structure with other values has other bits to flip.
            yield f"{kind}, {layout}{f' {copy + 1}' if copy else ''}", Specimen(kind, layout, (10 + copy, 20 + copy))


SPECIMENS: Mapping[str, Specimen] = dict(_specimens())
_SHORT = ("tiny, items", "tiny, tree", "mixed, items", "mixed, tree", "many, tree")


# ------------------------------------------------------------------ one case


class _Judge:
    """Restores from a struck checkpoint, and says what came of it."""

    def __init__(self, specimen: Specimen, directory: str) -> None:
        self._specimen = specimen
        self._directory = directory
        self._manager = CheckpointManager(directory)
        self.errors: collections.Counter[str] = collections.Counter()

    def verdict(self, forms: Sequence[Form], *, with_metadata: bool) -> tuple[Verdict, bool, str]:
        """(verdict, whether `verify` told of the damage, what is wrong)."""
        told, raised, wrong = self._told(), False, None
        for form in forms:
            # A manager remembers what it has rejected, so each fallback needs a new one.
            manager = CheckpointManager(self._directory) if form == "newest" else self._manager
            try:
                value, problem = self._specimen.restore(manager, form)
                wrong = wrong or problem
                raised |= value == self._specimen.values[0]  # it was rejected, and the older one restored
            except Exception as error:
                self._count(error)
                raised = True
        if wrong is None and (with_metadata or not raised):
            wrong = self._wrong_metadata()
        if wrong is not None:
            return "WRONG", told, wrong
        if raised and not told:
            return "UNTOLD", told, "verify() said that all is well"
        return ("detected" if raised else "harmless"), told, ""

    def _told(self) -> bool:
        try:
            return bool(self._manager.verify(STEP))
        except CheckpointError as error:  # it is no checkpoint any more, and verify says so
            self._count(error)
            return True

    def _wrong_metadata(self) -> str | None:
        try:
            found = dict(self._manager.metadata(STEP).metrics or {})
        except Exception as error:
            self._count(error)
            return None
        right = {"loss": 1 / STEP} if self._specimen.layout == "items" else {}
        return None if found == right else f"metadata({STEP}) has metrics {found}"

    def _count(self, error: Exception) -> None:
        self.errors[type(error).__name__] += 1


# ------------------------------------------------------------------ the attack


@dataclasses.dataclass
class Tally:
    """What came of the damages of a specimen: {(file, kind): {verdict: how many}}.

    Attributes:
      told: of the harmless ones, those of which `verify` told.
      errors: {class: how often it was raised}.
      failures: each with what was wrong.
      cpu_secs: of all processes.
    """

    verdicts: dict[tuple[str, str], collections.Counter[str]] = dataclasses.field(default_factory=dict)
    told: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    cpu_secs: float = 0.0

    def add(self, other: Tally) -> None:
        for key, verdicts in other.verdicts.items():
            self.verdicts.setdefault(key, collections.Counter()).update(verdicts)
        self.told += other.told
        self.errors += other.errors
        self.failures += other.failures
        self.cpu_secs += other.cpu_secs

    def count(self, kind: str | None = None, verdict: str | None = None) -> int:
        """How many cases, of one kind of damage and with one verdict."""
        return sum(
            number
            for (_, found_kind), verdicts in self.verdicts.items()
            for found, number in verdicts.items()
            if kind in (None, found_kind) and verdict in (None, found)
        )


def attack(
    specimen: Specimen,
    *,
    stride: int = 1,
    pair_stride: int = 1,
    every_form: bool = False,
    processes: int = 1,
    directory: str | None = None,
) -> Tally:
    """Strikes a specimen in every way; of bits and lengths each `stride`-th, of pairs each `pair_stride`-th."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="damage-") as folder:
        tasks = [
            functools.partial(
                _strike, specimen, os.path.join(folder, str(i)), stride, pair_stride, every_form, i, processes
            )
            for i in range(processes)
        ]
        found = run_forked(tasks)
    total = Tally()
    for tally in found:
        total.add(tally)
    return total


def _strike(
    specimen: Specimen, directory: str, stride: int, pair_stride: int, every_form: bool, first: int, step: int
) -> Tally:
    specimen.write(directory)
    start_secs = time.process_time()
    tally, judge = Tally(), _Judge(specimen, directory)
    target = os.path.join(directory, str(STEP))
    every = itertools.chain(
        damages(target, stride=stride),
        damages_between(target, os.path.join(directory, str(OLDER))),
        _duplicated_items(target),
    )
    for number, each in enumerate(itertools.islice(every, first, None, step)):
        if each.kind in _PAIRS and number % pair_stride:
            continue
        in_turn = each.kind in _MANY and not every_form
        forms = (FORMS[number % len(FORMS)],) if in_turn else FORMS
        with each, io_at_once():
            metadata = forms == FORMS or each.path.endswith(METADATA_FILE)
            verdict, told, wrong = judge.verdict(forms, with_metadata=metadata)
        key = (_file_of(each, target), each.kind if each.kind in _IN_FILES else "whole")
        tally.verdicts.setdefault(key, collections.Counter())[verdict] += 1
        tally.told[key] += told and verdict == "harmless"
        if verdict in ("WRONG", "UNTOLD"):
            tally.failures.append(f"{verdict} {each}: {wrong}")
    _require_whole(specimen, directory)
    tally.errors = judge.errors
    tally.cpu_secs = time.process_time() - start_secs
    return tally


def _duplicated_items(target: str) -> Iterator[Damage]:
    """Each item once more under a name of its own."""
    for name in sorted(os.listdir(target)):
        if os.path.isdir(os.path.join(target, name)):
            yield copy_over(os.path.join(target, name), os.path.join(target, f"{name}_again"))


def _require_whole(specimen: Specimen, directory: str) -> None:
    """After all damages were undone, nothing may be left of them: otherwise the later cases were not what they say."""
    manager = CheckpointManager(directory)
    problems = manager.verify(OLDER) + manager.verify(STEP)
    if problems or specimen.restore(manager, "newest") != (specimen.values[1], None):
        raise AssertionError(f"still damaged: {problems}")


def _file_of(each: Damage, target: str) -> str:
    path = os.path.relpath(each.path, target)
    return f"{path}/" if os.path.isdir(each.path) else path


# ------------------------------------------------------------------ Orbax


def attack_orbax(flips: int, directory: str | None = None) -> Mapping[str, collections.Counter[str]]:
    """{file: {verdict: how many}} of flips at random places of a checkpoint by Orbax's StandardCheckpointer."""
    import orbax.checkpoint as ocp

    found: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="damage-orbax-") as folder:
        path = os.path.join(folder, str(STEP))
        with quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state_of(STEP, _KIND_OF_ORBAX))
            checkpointer.wait_until_finished()
            every = list(damages(path, ["bit"]))
            chosen = np.random.default_rng(0).choice(len(every), min(flips, len(every)), replace=False)
            for each in (every[number] for number in chosen):
                with each:
                    verdict = _verdict_of_orbax(checkpointer, path)
                name = os.path.relpath(each.path, path)
                name = "data files" if "d/" in name else name
                found.setdefault(name, collections.Counter())[verdict] += 1
    return found


def _verdict_of_orbax(checkpointer: Any, path: str) -> Verdict:
    try:
        restored = checkpointer.restore(path, state_of(0, _KIND_OF_ORBAX))
    except Exception:  # whatever it raises, it has noticed
        return "detected"
    return "WRONG" if differences(restored, STEP, _KIND_OF_ORBAX) else "harmless"


# ------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every bit and every length")
    parser.add_argument("--stride", type=int, default=_SAMPLE_STRIDE, help="otherwise each n-th (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="at work at once")
    parser.add_argument("--specimens", nargs="+", choices=SPECIMENS, help=f"default: all with --full, else {_SHORT}")
    parser.add_argument("--every-form", action="store_true", help="restore after each flip in all three ways")
    parser.add_argument("--orbax", type=int, default=0, metavar="N", help="also N flips of a checkpoint by Orbax")
    parser.add_argument("--directory", default=_fast_directory(), help="on a fast file system (default: %(default)s)")
    options = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)  # rejected checkpoints are what this is about

    total = Tally()
    for name in options.specimens or (SPECIMENS if options.full else _SHORT):
        tally = attack(
            SPECIMENS[name],
            stride=1 if options.full else options.stride,
            every_form=options.every_form,
            processes=options.processes,
            directory=options.directory,
        )
        _print_tally(name, tally)
        total.add(tally)
    print(f"\n{total.count():,} cases, of them {total.count('bit'):,} flips; {len(total.failures)} failures")
    print(f"{total.count() / total.cpu_secs:.0f} cases per second of CPU; raised: {dict(total.errors.most_common())}")
    for failure in total.failures[:40]:
        print(f"FAILED {failure}")
    if options.orbax:
        _print_orbax(attack_orbax(options.orbax, options.directory))
    return 1 if total.failures else 0


def _print_tally(name: str, tally: Tally) -> None:
    columns = f"{'damage':>10}{'cases':>9}{'detected':>10}{'harmless':>10}{'verify told':>13}{'WRONG':>7}"
    print(f"\n{name + ': file':52}{columns}")
    for (file, kind), verdicts in sorted(tally.verdicts.items()):
        wrong = verdicts["WRONG"] + verdicts["UNTOLD"]
        print(
            f"{file:52}{kind:>10}{verdicts.total():9,}{verdicts['detected']:10,}{verdicts['harmless']:10,}"
            f"{tally.told[file, kind]:13,}{wrong:7,}",
            flush=True,
        )


def _print_orbax(found: Mapping[str, collections.Counter[str]]) -> None:
    print(f"\n{'Orbax: file':52}{'flips':>9}{'detected':>10}{'harmless':>10}{'WRONG':>7}")
    for file, verdicts in sorted(found.items()):
        print(
            f"{file:52}{verdicts.total():9,}{verdicts['detected']:10,}{verdicts['harmless']:10,}{verdicts['WRONG']:7,}"
        )


def _fast_directory() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


if __name__ == "__main__":
    sys.exit(main())
