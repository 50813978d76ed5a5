"""Power loss, simulated: every state that a file system may be in afterwards, restored from.

    python -m attacks.power_loss                 # some thousand states, about a minute
    python -m attacks.power_loss --full          # more than 100,000 distinct states

Each story is a run's life: saves, replacements, retention, late metrics, rollback, fallback. Its operations are
recorded once (`ckpt_hooks.testing.record`), and after each of them the power goes, in every way that
`ckpt_hooks.testing.crash_states` knows. In every state, a fresh manager has to

- restore the newest checkpoint that was acknowledged, or the newer one that was being written, whole;
- restore each step that it lists, to what was saved as that step;
- save and restore once more (in every tenth state).

At the end come the controls: the same without the fsync of files, of directories in a checkpoint, of the run's own
directory. Each has to fail, or the simulator is blind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import xxhash

from attacks.at_once import io_at_once
from attacks.forked import run_forked
from attacks.states import Position, differences, state_of, step_of
from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import CheckpointNotFoundError
from ckpt_hooks.testing import CrashState, Recording, Scratch, crash_states, damage, record

__all__ = ["CONTROLS", "STORIES", "Outcome", "Stage", "Story", "attack", "main", "skipped_syncs"]

RUN = "runs/a"  # below the recorded directory, so that its own directories are made during the recording
_ALWAYS_TAKEN = 10_000_000  # a step above all others
_SAVE_AGAIN_EVERY = 10
_PER_CUT = {"short": 12, "usual": 40, "full": 200}


# ------------------------------------------------------------------ stories


@dataclasses.dataclass(frozen=True)
class Stage:
    """One thing that a run does, and what may be restored during and after it.

    Attributes:
      name: in the log and the report.
      act: what is done; it has been acknowledged when this returns.
      value: of the newest checkpoint after it (a value is the ``step`` leaf of the state, see `state_of`).
      passing: values of the newest checkpoint that are right too while it is at work.
      saves: {step: value} that it may leave.
      metrics: {name: number} that the newest checkpoint has after it.
    """

    name: str
    act: Callable[[CheckpointManager], object]
    value: int
    passing: tuple[int, ...] = ()
    saves: Mapping[int, int] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Story:
    """Stages, one after another, and what was there before.

    Attributes:
      stages: what is recorded.
      prepare: makes the directory in which it begins.
      value: of the newest checkpoint at the beginning; None where there is none.
      holds: {step: value} at the beginning.
      damaged: steps that were damaged before the recording began, so that an error is right.
      with_iterator: whether there is an iterator item, and is restored.
    """

    stages: Sequence[Stage]
    prepare: Callable[[str], object] = lambda directory: None
    value: int | None = None
    holds: Mapping[int, int] = dataclasses.field(default_factory=dict)
    damaged: frozenset[int] = frozenset()
    with_iterator: bool = False

    def record(self, directory: str, skip: str | None = None) -> Recording:
        """Tells the story in `directory`, optionally without the syncs of a control."""
        run = os.path.join(directory, RUN)
        self.prepare(run)
        with record(directory) as log:
            skipping = skipped_syncs(skip, run) if skip else contextlib.nullcontext()
            with skipping, CheckpointManager(run, keep=2) as manager:
                for stage in self.stages:
                    stage.act(manager)
                    manager.wait()
                    log.mark(stage.name)
        return log

    def right_values(self, finished: int) -> set[int | None]:
        """What the newest checkpoint may be when so many stages were acknowledged."""
        values = {self.stages[finished - 1].value if finished else self.value}
        if finished < len(self.stages):
            values |= {self.stages[finished].value, *self.stages[finished].passing}
        return values

    def values_of(self, step: int, finished: int) -> set[int]:
        """What has ever been saved as a step, the stage at work included."""
        sources = [self.holds, *(stage.saves for stage in self.stages[: finished + 1])]
        return {source[step] for source in sources if step in source}


def _save(step: int, value: int, *, iterator: bool = False, **options: Any) -> Stage:
    def act(manager: CheckpointManager) -> None:
        items: dict[str, Any] = {"data": Position(value)} if iterator else {}
        manager.save(step, state_of(value), **options, **items)

    metrics = options.get("metrics", {})
    return Stage(f"save {step}", act, value, saves={step: value}, metrics=metrics)


def _fall_back_and_save(manager: CheckpointManager) -> None:
    restored = manager.restore()
    if step_of(restored) != 10:
        raise AssertionError(f"restored step {step_of(restored)}, and 20 is damaged")
    manager.save(20, state_of(21))


def _two_steps_one_damaged(directory: str) -> None:
    with CheckpointManager(directory) as manager:
        for step in (10, 20):
            manager.save(step, state_of(step))
    for each in damage.damages(os.path.join(directory, "20"), kinds=("bit",), paths=("params/d/*",)):
        each.strike()
        return
    raise AssertionError("a checkpoint without array data")


STORIES: Mapping[str, Story] = {
    "saves, retention": Story([_save(10, 10), _save(20, 20), _save(30, 30), _save(40, 40)]),
    "iterator, metrics": Story(
        [
            _save(10, 10, iterator=True, metrics={"loss": 0.5}),
            _save(20, 20, iterator=True, metrics={"loss": 0.25}),
        ],
        with_iterator=True,
    ),
    "late metrics": Story(
        [
            _save(10, 10),
            Stage("record_metrics", lambda m: m.record_metrics(10, {"loss": 0.5}), 10, metrics={"loss": 0.5}),
            Stage("and again", lambda m: m.record_metrics(10, {"loss": 0.25}), 10, metrics={"loss": 0.25}),
        ]
    ),
    "force": Story(
        [
            _save(10, 10),
            _save(20, 20),
            dataclasses.replace(_save(20, 21, force=True), name="replace the newest"),
            dataclasses.replace(_save(10, 11, force=True), name="replace an older one"),
        ]
    ),
    "rollback, delete": Story(
        [
            _save(10, 10),
            _save(20, 20),
            Stage("rollback", lambda m: m.rollback(10), 10),
            dataclasses.replace(_save(20, 21), name="save 20 again"),
            Stage("delete", lambda m: m.delete(20), 10),
        ]
    ),
    "fallback, save": Story(
        [Stage("restore 10, save 20", _fall_back_and_save, 21, saves={20: 21})],
        prepare=_two_steps_one_damaged,
        value=10,
        holds={10: 10},
        damaged=frozenset({20}),
    ),
}


# ------------------------------------------------------------------ looking at a state


class Judge:
    """Says what is wrong with what a fresh manager makes of a state."""

    def __init__(self, story: Story, scratch: Scratch) -> None:
        self._story = story
        self._scratch = scratch
        self._values: dict[int, int | str] = {}  # {digest of a checkpoint: its value, or why there is none}

    def problem(self, state: CrashState, *, save_again: bool) -> str | None:
        """None where all is well."""
        self._scratch.show(state.tree)
        path = os.path.join(self._scratch.path, RUN)
        finished = len(state.marks)
        try:
            problem = self._newest(path, finished) or self._every_step(path, state, finished)
            if problem is None and save_again:
                self._scratch.changed()
                problem = self._another_save(path)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return problem

    def _newest(self, path: str, finished: int) -> str | None:
        right = self._story.right_values(finished)
        manager, position = CheckpointManager(path), Position(-1)
        objects: dict[str, Any] = {"data": position} if self._story.with_iterator else {}
        try:
            restored = manager.restore(**objects)
        except CheckpointNotFoundError:
            return None if None in right else f"no checkpoint, instead of {right}"
        value = step_of(restored)
        if value is None or value not in right:
            return f"restored {value}, instead of {right}"
        if self._story.with_iterator and position.value != value:
            return f"the iterator of {value} stands at {position.value}"
        return _differences(restored, value) or self._metrics(manager, value, finished)

    def _metrics(self, manager: CheckpointManager, value: int, finished: int) -> str | None:
        done = self._story.stages[:finished]
        at_work = self._story.stages[finished : finished + 1]
        if not done or value != done[-1].value:
            return None
        step = manager.latest_step()
        found = {} if step is None else dict(manager.metadata(step).metrics or {})
        right = [dict(stage.metrics) for stage in (done[-1], *at_work) if stage.metrics or stage is done[-1]]
        return None if found in right else f"metrics {found}, instead of {right}"

    def _every_step(self, path: str, state: CrashState, finished: int) -> str | None:
        manager = CheckpointManager(path)
        for step in manager.steps():
            digest = _digest_below(state, f"{RUN}/{step}/")
            if digest not in self._values:
                self._values[digest] = _value_at(manager, step)
            found = self._values[digest]
            if found in self._story.values_of(step, finished):
                continue
            if step in self._story.damaged and isinstance(found, str) and finished == 0:
                continue
            return f"step {step} is listed, and gives {found}"
        return None

    def _another_save(self, path: str) -> str | None:
        with CheckpointManager(path) as manager:
            with contextlib.suppress(CheckpointNotFoundError):
                manager.restore()
            manager.save(_ALWAYS_TAKEN, state_of(_ALWAYS_TAKEN))
        with CheckpointManager(path) as manager:
            problem = _differences(manager.restore(), _ALWAYS_TAKEN)
        left = [name for name in os.listdir(path) if ".orbax-checkpoint-tmp" in name]
        return problem or (f"left after the next save: {left}" if left else None)


def _value_at(manager: CheckpointManager, step: int) -> int | str:
    try:
        restored = manager.restore(step=step)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    value = step_of(restored)
    return value if value is not None and not _differences(restored, value) else "a mixture"


def _differences(restored: Mapping[str, Any], value: int) -> str | None:
    problems = differences({name: part for name, part in restored.items() if name != "data"}, value)
    return f"not what was saved as {value}: {problems}" if problems else None


def _digest_below(state: CrashState, prefix: str) -> int:
    digest = xxhash.xxh3_64()
    for path, content in sorted(state.tree.items()):
        if path.startswith(prefix):
            digest.update(f"{path} {content is None}\0".encode())
            digest.update(content or b"")
    return digest.intdigest()


# ------------------------------------------------------------------ the attack


@dataclasses.dataclass
class Outcome:
    """What came of the states of one story.

    Attributes:
      states: how many were restored from.
      distinct: the digests of their trees.
      visible: the digests of what of them is not temporary by its name.
      models: how many of each model.
      saved_again: in how many the next save was made.
      cpu_secs: of all processes.
      failures: each with what was wrong.
    """

    operations: int = 0
    states: int = 0
    saved_again: int = 0
    cpu_secs: float = 0.0
    distinct: set[int] = dataclasses.field(default_factory=set)
    visible: set[int] = dataclasses.field(default_factory=set)
    models: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.states += other.states
        self.saved_again += other.saved_again
        self.cpu_secs += other.cpu_secs
        self.distinct |= other.distinct
        self.visible |= other.visible
        self.models += other.models
        self.failures += other.failures


def attack(
    story: Story,
    *,
    per_cut: int,
    seed: int = 0,
    processes: int = 1,
    directory: str | None = None,
    skip: str | None = None,
    until_failure: bool = False,
) -> Outcome:
    """Records a story, optionally without some syncs (`CONTROLS`), and restores from what a power loss may leave.

    With `until_failure`, the first failure is enough.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix="power-loss-") as folder:
        recorded = os.path.join(folder, "recorded")
        os.mkdir(recorded)
        log = story.record(recorded, skip)
        every = range(len(log.operations) + 1)
        tasks = [
            functools.partial(
                _strike, story, log, per_cut, seed, os.path.join(folder, str(i)), every[i::processes], until_failure
            )
            for i in range(processes)
        ]
        found = run_forked(tasks)
    total = Outcome(operations=len(log.operations))
    for outcome in found:
        total.add(outcome)
    return total


def _strike(
    story: Story, log: Recording, per_cut: int, seed: int, path: str, cuts: range, until_failure: bool
) -> Outcome:
    start_secs = time.process_time()
    outcome = Outcome()
    judge = Judge(story, Scratch(path))
    for state in crash_states(log, per_cut=per_cut, seed=seed, cuts=cuts):
        outcome.states += 1
        outcome.models[state.model] += 1
        outcome.distinct.add(state.digest)
        outcome.visible.add(_digest_of_visible(state))
        save_again = outcome.states % _SAVE_AGAIN_EVERY == 0
        outcome.saved_again += save_again
        with io_at_once():
            problem = judge.problem(state, save_again=save_again)
        if problem is not None:
            outcome.failures.append(_describe(log, state, problem))
            if until_failure:
                break
    outcome.cpu_secs = time.process_time() - start_secs
    return outcome


def _digest_of_visible(state: CrashState) -> int:
    digest = xxhash.xxh3_64()
    for path, content in sorted(state.tree.items()):
        if ".orbax-checkpoint-tmp" not in path:
            digest.update(f"{path} {content is None}\0".encode())
            digest.update(content or b"")
    return digest.intdigest()


def _describe(log: Recording, state: CrashState, problem: str) -> str:
    last = repr(log.operations[state.cut - 1])[:120] if state.cut else "nothing"
    return f"{problem}\n    after {last} ({state.cut} operations, acknowledged {state.marks}), {state.model} model"


# ------------------------------------------------------------------ controls

_IsSkipped = Callable[[str, int, str], bool]  # (path, mode, the run's directory)

CONTROLS: Mapping[str, _IsSkipped] = {
    "fsync of files": lambda path, mode, run: stat.S_ISREG(mode),
    "fsync of directories in a checkpoint": lambda path, mode, run: stat.S_ISDIR(mode) and path.startswith(f"{run}/"),
    "fsync of the run's directory": lambda path, mode, run: path == run,
    "fsync of the run's parents": lambda path, mode, run: stat.S_ISDIR(mode) and run.startswith(f"{path}/"),
}


@contextlib.contextmanager
def skipped_syncs(control: str, run: str) -> Iterator[None]:
    """Makes the fsyncs of a control do nothing. Inside a recording, which does not see them then."""
    is_skipped, real = CONTROLS[control], os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not is_skipped(path, os.fstat(descriptor).st_mode, run):
            real(descriptor)

    with mock.patch("os.fsync", fsync):
        yield


# ------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"--per-cut {_PER_CUT['full']}")
    parser.add_argument("--per-cut", type=int, help=f"states of each model at each place; {_PER_CUT['usual']}")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among the states")
    parser.add_argument("--processes", type=int, default=1, help="at work at once")
    parser.add_argument("--stories", nargs="+", choices=STORIES, default=list(STORIES))
    parser.add_argument("--directory", default=_fast_directory(), help="on a fast file system (default: %(default)s)")
    options = parser.parse_args(argv)
    per_cut = options.per_cut or _PER_CUT["full" if options.full else "usual"]
    logging.disable(logging.CRITICAL)  # rejected and ignored checkpoints are what this is about

    print(f"{'story':24}{'operations':>11}{'states':>9}{'distinct':>10}{'visible':>9}{'saved again':>13}{'failed':>8}")
    total = Outcome()
    for name in options.stories:
        outcome = attack(
            STORIES[name],
            per_cut=per_cut,
            seed=options.seed,
            processes=options.processes,
            directory=options.directory,
        )
        _print_row(name, outcome)
        total.add(outcome)
        total.operations += outcome.operations
    _print_row("all", total)
    print(f"{total.states / total.cpu_secs:.0f} states per second of CPU; {dict(total.models)}")
    for failure in total.failures[:20]:
        print(f"FAILED {failure}")
    blind = _controls(options.directory, options.seed)
    return 1 if total.failures or blind else 0


def _controls(directory: str, seed: int) -> list[str]:
    """Prints what each control does; the ones that went unnoticed."""
    blind = []
    print("\ncontrol: without             states   failed")
    for control in CONTROLS:
        outcome = attack(STORIES["late metrics"], per_cut=20, seed=seed, directory=directory, skip=control)
        print(f"{control:37}{outcome.states:8}{len(outcome.failures):9}")
        if not outcome.failures:
            blind.append(control)
    if blind:
        print(f"BLIND: the simulator does not see what is wrong without the {blind}")
    return blind


def _print_row(name: str, outcome: Outcome) -> None:
    columns = (outcome.operations, outcome.states, len(outcome.distinct), len(outcome.visible), outcome.saved_again)
    widths = (11, 9, 10, 9, 13)
    numbers = "".join(f"{column:{width},}" for column, width in zip(columns, widths, strict=True))
    print(f"{name:24}{numbers}{len(outcome.failures):8,}", flush=True)


def _fast_directory() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


if __name__ == "__main__":
    sys.exit(main())
