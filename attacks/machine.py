"""Random lives of a run, against a plain dict that says what it must hold.

    python -m attacks.machine                      # 10,000 runs of up to 25 operations
    python -m attacks.machine --runs=100 --seed=7

Hypothesis chooses saves, saves with force, rollbacks, deletions, late metrics, damage, strays, killed writers and
reopened managers with other retentions; after each one, the run must list, restore and refuse what the model says. A
failure is shrunk to the shortest life that shows it, and is exit code 1.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from attacks.forked import run_forked
from attacks.history_check import Keep
from attacks.model import Model, Saved
from attacks.states import same, state_of
from ckpt_hooks import BestN, CheckpointManager, EveryNSteps, LatestN
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    MetricNotFoundError,
    NoValidCheckpointError,
    RunLockedError,
    UnsupportedLeafError,
)

__all__ = ["RunMachine", "main"]

STEPS = st.integers(0, 12)
LATE_LOSSES = st.sampled_from([0.05, 0.3, math.nan])
LOSSES = st.sampled_from([0.1, 0.2, 0.5, math.nan, math.inf, None])
KEEPS = st.builds(Keep, st.sampled_from([None, 1, 2, 4]), st.sampled_from([None, 3]), st.sampled_from([None, 1, 2]))
DAMAGES = st.sampled_from(["flip data", "cut data", "no item", "no tree", "flip index"])
TEMPORARY = ".orbax-checkpoint-tmp"
operations: Counter[str] = Counter()
_BATCH_RUNS = 250  # in one process: Hypothesis remembers them all, and each collection looks through its memory


class RunMachine(RuleBasedStateMachine):
    """One run, its manager, and the model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=_shared_memory()))
        self.run = self.folder / "run"
        self.model = Model(Keep(latest=2))
        self.stamp = 0
        self.manager = self.open(Keep(latest=2), False)

    def open(self, keep: Keep, async_save: bool) -> CheckpointManager:
        policies: list[Any] = [LatestN(keep.latest)] if keep.latest else []
        policies += [EveryNSteps(keep.every)] if keep.every else []
        policies += [BestN(keep.best, "loss")] if keep.best else []
        self.model.reopen(keep)
        return CheckpointManager(self.run, keep=policies or None, async_save=async_save)

    def teardown(self) -> None:
        self.manager.close()
        shutil.rmtree(self.folder)

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    # -------------------------------------------------------------- saves

    @rule(gap=st.integers(1, 3), loss=LOSSES)
    def save_next(self, gap: int, loss: float | None) -> None:
        self.save(max(self.model.known(), default=-1) + gap, loss, force=False)

    @rule(step=STEPS, loss=LOSSES, force=st.booleans())
    def save_somewhere(self, step: int, loss: float | None, force: bool) -> None:
        self.save(step, loss, force)

    def save(self, step: int, loss: float | None, force: bool) -> None:
        operations["force" if force else "save"] += 1
        stamp = self.next_stamp()
        expected = self.model.refusal_of_save(step, loss, force)
        if expected is not None:
            self.raises(expected, lambda: self.write(self.manager, step, stamp, loss, force))
            self.model.is_locked = True
            return
        self.write(self.manager, step, stamp, loss, force)
        self.model.save(step, Saved(stamp, loss))
        assert not self.temporaries(), "a committed save leaves no temporary directory"

    def write(self, manager: CheckpointManager, step: int, stamp: int, loss: float | None, force: bool) -> None:
        metrics = None if loss is None else {"loss": loss}
        manager.save(step, _state(stamp), metrics=metrics, force=force)
        manager.wait()

    @rule(step=STEPS)
    def save_what_cannot_be_saved(self, step: int) -> None:
        operations["refused save"] += 1
        before = self.everything()
        state = {"params": {"bad": object()}, "step": 1}
        assert "bad: " in self.raises(UnsupportedLeafError, lambda: self.manager.save(step, state, force=True))
        assert self.everything() == before, "a refused save changes nothing"

    # -------------------------------------------------------------- other changes

    @rule(step=STEPS, kind=st.sampled_from(["rollback", "delete", "record metrics"]), loss=LATE_LOSSES)
    def change(self, step: int, kind: str, loss: float) -> None:
        operations[kind] += 1
        if kind == "rollback":
            if not self.refuses(step, lambda: self.manager.rollback(step)):
                self.model.roll_back(step)
        elif kind == "record metrics":
            if not self.refuses(step, lambda: self.manager.record_metrics(step, {"loss": loss})):
                self.model.record(step, loss)
        elif step in self.model.strays:
            self.manager.delete(step)  # nobody else would
            self.model.is_locked = True
            self.model.strays.discard(step)
        elif not self.refuses(step, lambda: self.manager.delete(step)):
            self.model.delete(step)

    def refuses(self, step: int, change: Callable[[], object]) -> bool:
        """Does the change; whether it was refused, as it must be where there is no such checkpoint."""
        if step in self.model.saved:
            change()
            return False
        self.raises(IncompleteCheckpointError if step in self.model.strays else CheckpointNotFoundError, change)
        return True

    # -------------------------------------------------------------- what others do

    @rule(keep=KEEPS, async_save=st.booleans(), close=st.booleans())
    def reopen(self, keep: Keep, async_save: bool, close: bool) -> None:
        """Another manager; the one before is closed, or dropped as by a program that forgets it."""
        operations["reopen" if close else "drop"] += 1
        if close:
            self.manager.close()
        self.manager = None  # type: ignore[assignment]
        gc.collect()
        self.manager = self.open(keep, async_save)

    @rule(step=STEPS, loss=LOSSES)
    def drop_during_a_save(self, step: int, loss: float | None) -> None:
        """The manager is dropped without a wait; its save commits all the same."""
        operations["drop during a save"] += 1
        keep = self.model.keep
        self.manager.close()
        self.manager = self.open(keep, True)
        stamp = self.next_stamp()
        if self.model.refusal_of_save(step, loss, True) is None:
            metrics = None if loss is None else {"loss": loss}
            self.manager.save(step, _state(stamp), metrics=metrics, force=True)
            self.model.save(step, Saved(stamp, loss))
        self.manager = None  # type: ignore[assignment]
        for thread in threading.enumerate():
            if thread.name.startswith("ckpt_hooks-save-"):
                thread.join()
        gc.collect()
        self.manager = self.open(keep, False)

    @rule(gap=st.integers(-2, 2), calls=st.integers(0, 40), loss=st.sampled_from([0.1, 0.4]), keep=KEEPS)
    def killed_writer(self, gap: int, calls: int, loss: float, keep: Keep) -> None:
        """Another process saves and is killed at one of its renames, syncs or directories."""
        operations["killed writer"] += 1
        self.manager.close()
        step = max(max(self.model.known(fresh=True), default=0) + gap, 0)
        stamp = self.next_stamp()
        pid = os.fork()
        if pid == 0:
            self.save_until_killed(calls, keep, step, Saved(stamp, loss))
        _, status = os.waitpid(pid, 0)
        self.manager = self.open(self.model.keep, False)
        listed = self.manager.steps()
        has_committed = step in listed and self.stamp_of(step) == stamp
        self.model.killed(step, Saved(stamp, loss), keep, listed, has_committed=has_committed)
        assert has_committed or status != 0, "a save that returned is there"
        # A stray in the way of the save was set aside, though the save may not have come to its end.
        self.model.strays = {stray for stray in self.model.strays if (self.run / str(stray)).exists()}

    def save_until_killed(self, calls: int, keep: Keep, step: int, saved: Saved) -> NoReturn:
        """What the child process does. It must never return into the test."""
        try:
            _die_after(calls)
            self.write(self.open(keep, False), step, saved.stamp, saved.loss, True)
            os._exit(0)
        finally:
            os._exit(1)

    def stamp_of(self, step: int) -> int | None:
        """The stamp of a step, all of whose values are those of that stamp; None where it is damaged."""
        try:
            restored = self.manager.restore(step=step)
        except CorruptCheckpointError:
            return None
        stamp = int(restored["step"])
        assert not _differences(restored, stamp)
        return stamp

    @rule(step=STEPS, name=st.sampled_from([TEMPORARY, f".removed{TEMPORARY}", f".removed.1{TEMPORARY}", ""]))
    def litter(self, step: int, name: str) -> None:
        """What a killed writer leaves; it is no checkpoint, and gone once somebody else has become the writer."""
        if not name:
            self.stray(step)
            return
        operations["litter"] += 1
        self.manager.close()
        self.manager = self.open(self.model.keep, False)
        whole = next(iter(self.model.saved), None)
        folder = self.run / f"{step}{name}"
        if folder.exists():
            return
        if whole is None:
            (folder / "params").mkdir(parents=True)
        else:
            shutil.copytree(self.run / str(whole), folder)

    def stray(self, step: int) -> None:
        """An empty directory by the name of a step."""
        operations["stray"] += 1
        if not (self.run / str(step)).exists():
            (self.run / str(step)).mkdir(parents=True)
            self.model.strays.add(step)

    @precondition(lambda self: self.model.saved)
    @rule(data=st.data(), damage=DAMAGES)
    def damage(self, data: st.DataObject, damage: str) -> None:
        operations["damage"] += 1
        step = data.draw(st.sampled_from(sorted(self.model.saved)))
        if step not in self.model.damaged:
            _damage(self.run / str(step), damage)
            self.model.damaged.add(step)

    @precondition(lambda self: self.model.is_locked)
    @rule(step=STEPS)
    def another_writer(self, step: int) -> None:
        operations["another writer"] += 1
        other = CheckpointManager(self.run, async_save=False)
        assert "this process" in self.raises(RunLockedError, lambda: other.save(step, _state(0), force=True))

    # -------------------------------------------------------------- reads

    @rule()
    def restore_newest(self) -> None:
        operations["restore newest"] += 1
        expected = self.model.newest_sound()
        if expected is None:
            error = NoValidCheckpointError if self.model.saved or self.model.rejected else CheckpointNotFoundError
            self.raises(error, self.manager.restore)
            return
        step, restored = self.manager.restore_with_step()
        assert step == expected, f"restored {step}, expected {expected}"
        assert not _differences(restored, self.model.saved[step].stamp)
        self.model.reject_above(step)

    @rule(step=STEPS, fresh=st.booleans())
    def restore_by_number(self, step: int, fresh: bool) -> None:
        operations["restore by number"] += 1
        manager = CheckpointManager(self.run) if fresh else self.manager
        if step in self.model.strays:
            self.raises(IncompleteCheckpointError, lambda: manager.restore(step=step))
        elif step not in self.model.saved:
            self.raises(CheckpointNotFoundError, lambda: manager.restore(step=step))
        elif step in self.model.damaged:
            self.raises(CorruptCheckpointError, lambda: manager.restore(step=step))
            assert manager.verify(step)
        else:
            assert not _differences(manager.restore(step=step), self.model.saved[step].stamp)
            assert manager.verify(step) == []
            self.check_metadata(step)

    @rule()
    def restore_best(self) -> None:
        operations["restore best"] += 1
        visible = self.model.visible()
        if not visible:
            assert self.manager.best_step("loss", "min") is None
            return
        if all(saved.loss is None for saved in visible.values()):
            self.raises(MetricNotFoundError, lambda: self.manager.best_step("loss", "min"))
            return
        best = self.manager.best_step("loss", "min")
        assert best == self.model.best(), f"best is {best}, expected {self.model.best()}"
        if best is None or not self.model.keep.best:
            return
        if best in self.model.damaged:
            self.raises(CorruptCheckpointError, lambda: self.manager.restore(step="best"))
        else:
            assert not _differences(self.manager.restore(step="best"), visible[best].stamp)

    def check_metadata(self, step: int) -> None:
        metadata, saved = self.manager.metadata(step), self.model.saved[step]
        assert metadata.custom_metadata["step"] == step
        loss = metadata.metrics.get("loss") if metadata.metrics else None
        assert _same(loss, saved.loss), f"loss {loss}, expected {saved.loss}"

    def raises(self, kind: type[Exception], call: Callable[[], object]) -> str:
        """The message of the error that the call raises."""
        try:
            found = call()
        except kind as error:
            return str(error)
        raise AssertionError(f"expected {kind.__name__}, and got {found!r}")

    # -------------------------------------------------------------- always

    @invariant()
    def lists_what_there_is(self) -> None:
        expected = sorted(self.model.visible())
        assert self.manager.steps() == expected, f"lists {self.manager.steps()}, expected {expected}"
        assert self.manager.latest_step() == (expected[-1] if expected else None)

    @invariant()
    def a_new_manager_lists_all(self) -> None:
        found = CheckpointManager(self.run).steps()
        assert found == sorted(self.model.saved), f"on the disk are {found}, expected {sorted(self.model.saved)}"

    def temporaries(self) -> list[str]:
        return [path.name for path in self.run.iterdir() if TEMPORARY in path.name]

    def everything(self) -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in self.folder.rglob("*"))


def _shared_memory() -> str | None:
    """Where syncs cost nothing: what is tested here is not what a power cut leaves."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _state(stamp: int) -> dict[str, Any]:
    """Each leaf tells its stamp; one is too large to stand in the index, so that damage can hit it."""
    state = state_of(stamp)
    return {**state, "params": {**state["params"], "large": np.full(5000, stamp, np.uint32)}}


def _differences(restored: Any, stamp: int) -> list[str]:
    return same(restored, _state(stamp))


def _same(one: Any, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return float(one) == other or (math.isnan(float(one)) and math.isnan(other))


def _damage(checkpoint: Path, damage: str) -> None:
    item = checkpoint / "params"
    (data,) = (path for path in (item / "d").iterdir() if path.stat().st_size)
    if damage == "no item":
        shutil.rmtree(item)
    elif damage == "no tree":
        (item / "_METADATA").unlink()
    elif damage == "cut data":
        os.truncate(data, data.stat().st_size // 2)
    else:
        target = data if damage == "flip data" else item / "manifest.ocdbt"
        content = bytearray(target.read_bytes())
        content[len(content) // 3] ^= 1
        target.write_bytes(content)


def _die_after(calls: int) -> None:
    """From now on, this process is killed before the given number of renames, syncs and new directories."""
    left = [calls]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **options)

        return counted

    for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="lives to try (default: 10,000)")
    parser.add_argument("--steps", type=int, default=25, help="operations of a life, at most (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of Hypothesis, for the first lives (default: 0)")
    parser.add_argument("--no-shrink", action="store_true", help="show the first life that fails, however long it is")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a processor")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    begin_secs = time.monotonic()
    tasks = [
        functools.partial(
            _live, min(_BATCH_RUNS, args.runs - begun), args.steps, args.seed + number, not args.no_shrink
        )
        for number, begun in enumerate(range(0, args.runs, _BATCH_RUNS))
    ]
    failed, counts = False, Counter[str]()
    while tasks and not failed:
        for has_failed, counted in run_forked(tasks[: args.processes]):
            failed |= has_failed
            counts.update(counted)
        tasks = tasks[args.processes :]
    taken_secs = time.monotonic() - begin_secs
    told = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    print(f"{args.runs:,} runs, {counts.total():,} operations in {taken_secs:.0f} s: {told}")
    print("differs from the model: see above" if failed else "all as the model says")
    return int(failed)


def _live(runs: int, steps: int, seed: int, shrinks: bool) -> tuple[bool, Counter[str]]:
    """Whether one of so many lives differs from the model, and the operations of all of them."""
    operations.clear()
    gc.freeze()  # what was imported is not looked through by each collection
    settings = hypothesis.settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        phases=[phase for phase in hypothesis.Phase if shrinks or phase.name not in ("shrink", "explain")],
    )
    machine: Any = hypothesis.seed(seed)(RunMachine)
    try:
        run_state_machine_as_test(machine, settings=settings)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return True, operations
    return False, operations


if __name__ == "__main__":
    sys.exit(main())
