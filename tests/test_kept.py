"""A run with many checkpoints costs what one with few costs, and what is not looked at is not got wrong."""

from __future__ import annotations

import collections
import errno
import functools
import gc
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ckpt_hooks
from ckpt_hooks import BestN, CheckpointManager, EveryNSteps, LatestN, listing
from ckpt_hooks.errors import InvalidArgumentError, MetricNotFoundError
from ckpt_hooks.metadata import METADATA_FILE
from ckpt_hooks.retention import steps_to_keep
from ckpt_hooks.storage.commit import COMMIT_MARKER
from tests.profiled import run_profiled

PACKAGE = os.path.dirname(ckpt_hooks.__file__)
FEW, MANY = 10, 300


def manager_of(run: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager(run, **{"async_save": False, "keep": None, **options})


def state_at(step: int) -> dict[str, Any]:
    return {"step": step}


def save_steps(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        manager.save(step, state_at(step), **options)


def add_steps(run: Path, *steps: int) -> None:
    """Adds committed steps, with nothing in them."""
    for step in steps:
        (run / str(step)).mkdir(parents=True)
        (run / str(step) / COMMIT_MARKER).touch()


def add_strays(run: Path, *steps: int) -> None:
    """Adds directories that have the name of a step, and are somebody's."""
    for step in steps:
        (run / str(step)).mkdir(parents=True)
        (run / str(step) / "notes").write_text("mine")


def damage(run: Path, step: int) -> None:
    (run / str(step) / "step" / "manifest.ocdbt").unlink()


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# ------------------------------------------------------------------ what it costs


def calls_in(action: Callable[[], object]) -> collections.Counter[str]:
    """{function: how often it was called} of the operating system's and of the library's functions."""
    calls: collections.Counter[str] = collections.Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__module__ in ("posix", "io", "_io"):
            calls[argument.__qualname__] += 1
        elif event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_qualname] += 1

    gc.collect()  # so that nobody else's files are closed meanwhile
    run_profiled(action, note)
    return calls


def run_of(number: int, directory: Path) -> Path:
    """A run of `number` checkpoints, none of which was changed within this tick of the clock."""
    run = directory / str(number)
    add_steps(run, *range(1, number))
    with manager_of(run) as manager:
        save_steps(manager, number, metrics={"loss": 1.0})
    while not listing._is_over(run.stat().st_ctime_ns):
        time.sleep(0.001)
    return run


def ask_twice(run: Path, number: int) -> None:
    manager = manager_of(run)
    assert (manager.latest_step(), manager.latest_step()) == (number, number)


def restore(run: Path, number: int) -> None:
    assert manager_of(run).restore(state_at(0))["step"] == number


def first_save(run: Path, number: int) -> None:
    with manager_of(run) as manager:
        save_steps(manager, number + 1)


def start_up(run: Path, number: int) -> None:
    with manager_of(run, keep=[LatestN(2), EveryNSteps(1)]) as manager:
        assert manager.restore(state_at(0))["step"] == number
        save_steps(manager, number + 1, metrics={"loss": 0.5})


def roll_back(run: Path, number: int) -> None:
    with manager_of(run) as manager:
        manager.rollback(number - 1)


def delete(run: Path, number: int) -> None:
    with manager_of(run) as manager:
        manager.delete(number)


@pytest.mark.parametrize("action", [ask_twice, restore, first_save, roll_back, delete])
def test_what_a_new_process_does_costs_the_same_however_many_are_kept(
    tmp_path: Path, action: Callable[[Path, int], None]
) -> None:
    """With 300 checkpoints no function is called oftener, and no file looked at more, than with 10."""
    action(run_of(3, tmp_path), 3)  # what is made once in a process is made
    few, many = (calls_in(functools.partial(action, run_of(number, tmp_path), number)) for number in (FEW, MANY))
    assert many == few
    assert few["listdir"] >= 1


def test_retention_looks_at_the_disk_no_oftener_however_many_are_kept(tmp_path: Path) -> None:
    """What counting policies keep of 300 checkpoints is kept without looking at each."""
    start_up(run_of(3, tmp_path), 3)
    few, many = (calls_in(functools.partial(start_up, run_of(number, tmp_path), number)) for number in (FEW, MANY))
    for name in ("stat", "lstat", "open", "scandir", "listdir", "rename", "RunDirectory.is_checkpoint"):
        assert many[name] == few[name], name


@pytest.mark.parametrize("keep", [None, [LatestN(2), EveryNSteps(1)], [LatestN(2), EveryNSteps(20)]])
def test_a_later_save_looks_at_none_of_the_others(tmp_path: Path, keep: Any) -> None:
    """A save after the first calls the same functions as often, whether 10 checkpoints are kept or 300."""

    def calls(number: int) -> collections.Counter[str]:
        with manager_of(run_of(number, tmp_path), keep=keep) as manager:
            save_steps(manager, *range(number + 1, number + 5))
            return calls_in(lambda: save_steps(manager, number + 5))

    few, many = calls(FEW), calls(MANY)
    assert many == few
    assert few["listdir"] == 0


def test_a_later_save_reads_no_metrics_again(tmp_path: Path) -> None:
    """With BestN the others' metrics are read once in a process, and then no file is looked at for them."""

    def calls(number: int) -> collections.Counter[str]:
        run = run_of(number, tmp_path)
        with manager_of(run, keep=[BestN(1, "loss"), EveryNSteps(1)]) as manager:
            save_steps(manager, number + 1, number + 2, metrics={"loss": 0.5})
            return calls_in(lambda: save_steps(manager, number + 3, metrics={"loss": 0.7}))

    few, many = calls(FEW), calls(MANY)
    for name in ("stat", "lstat", "open", "scandir", "listdir", "RunDirectory.is_checkpoint"):
        assert many[name] == few[name], name


# ------------------------------------------------------------------ what is the newest


def test_strays_among_the_newest_are_neither_the_newest_nor_kept_nor_removed(tmp_path: Path) -> None:
    """Directories with the names of steps above, between and below the checkpoints count for nothing and stay."""
    add_strays(tmp_path, 2, 6, 8, 98, 99)
    with manager_of(tmp_path) as manager:
        save_steps(manager, 1, 3, 5, 7)
    with manager_of(tmp_path, keep=2) as manager:
        assert manager.latest_step() == 7
        assert manager.restore()["step"] == 7
        save_steps(manager, 9)
        assert manager.steps() == [7, 9]
        save_steps(manager, 10)
        assert manager.steps() == [9, 10]
    for step in (2, 6, 8, 98, 99):
        assert (tmp_path / str(step) / "notes").read_text() == "mine"


def test_a_step_that_was_never_committed_is_not_the_newest(tmp_path: Path) -> None:
    """A step whose save was cut off in place is no bar to a save below it, and stays."""
    with manager_of(tmp_path) as manager:
        save_steps(manager, 1, 2)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / METADATA_FILE).write_text(json.dumps({"init_timestamp_nsecs": 1}))
    with manager_of(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 2
        save_steps(manager, 3)
        assert manager.steps() == [3]
    assert names_in(tmp_path) == ["3", "9"]


def test_a_damaged_newest_step_is_not_the_newest_for_the_next_save(tmp_path: Path) -> None:
    """After a fallback, the next save may be at the damaged step or below it, also with the run locked before."""
    with manager_of(tmp_path, keep=2) as manager:
        save_steps(manager, 4, 8)
        damage(tmp_path, 8)
        assert manager.restore()["step"] == 4
        assert manager.latest_step() == 4
        save_steps(manager, 6)
        assert manager.steps() == [4, 6]
        save_steps(manager, 8)
        assert manager.steps() == [6, 8]
    assert names_in(tmp_path) == ["6", "8", "8.damaged"]


def test_a_step_that_was_mended_by_hand_stays_where_it_is(tmp_path: Path) -> None:
    """Where a whole checkpoint has taken the place of the damaged one, the next save sets nothing aside."""
    with manager_of(tmp_path, keep=None) as manager:
        save_steps(manager, 4, 8)
        shutil.copytree(tmp_path / "8", tmp_path / "copy")
        damage(tmp_path, 8)
        assert manager.restore()["step"] == 4
        shutil.rmtree(tmp_path / "8")
        (tmp_path / "copy").rename(tmp_path / "8")
        save_steps(manager, 12)
    assert names_in(tmp_path) == ["12", "4", "8"]


def test_every_change_is_seen_by_a_reader_that_was_there_before(tmp_path: Path) -> None:
    """Saves, deletions and rollbacks of another manager are seen by the next call, without a pause."""
    reader = manager_of(tmp_path)
    with manager_of(tmp_path) as writer:
        for step in range(5, 50, 5):
            save_steps(writer, step)
            assert reader.latest_step() == step
        writer.delete(45)
        assert reader.latest_step() == 40
        writer.rollback(10)
        assert (reader.latest_step(), reader.steps()) == (10, [5, 10])
        save_steps(writer, 7, force=True)
        assert (reader.latest_step(), reader.steps()) == (7, [5, 7])


def test_a_step_that_is_committed_in_place_is_seen(tmp_path: Path) -> None:
    """A step whose directory was there before its commit is a checkpoint from then on."""
    add_steps(tmp_path, 1)
    (tmp_path / "2").mkdir()
    reader = manager_of(tmp_path)
    assert reader.latest_step() == 1
    (tmp_path / "2" / COMMIT_MARKER).touch()
    assert reader.latest_step() == 2


def test_a_step_that_somebody_is_removing_is_not_the_newest(tmp_path: Path) -> None:
    """A step that loses its files while its directory is still there is no checkpoint any more."""
    add_steps(tmp_path, 1, 2)
    reader = manager_of(tmp_path)
    assert reader.latest_step() == 2
    (tmp_path / "2" / COMMIT_MARKER).unlink()
    assert reader.latest_step() == 1


def refuse(directory: bytes) -> list[bytes]:
    raise PermissionError(errno.EACCES, "Permission denied", directory)


def test_a_run_that_could_not_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first save that could not list the run, the next one still refuses a step below the newest."""
    add_steps(tmp_path, 5)
    with manager_of(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", refuse)
            with pytest.raises(PermissionError) as refused:
                save_steps(manager, 3)
        with pytest.raises(InvalidArgumentError, match="has step 5 already"):
            save_steps(manager, 3)
        assert manager.steps() == [5]
    assert refused.tb is not None  # kept until now, as a debugger does: the lock must not wait for it to go


# ------------------------------------------------------------------ which stay


def test_the_first_save_applies_the_policies_to_all_there_are(tmp_path: Path) -> None:
    """Of 300 checkpoints, the first save with LatestN and EveryNSteps leaves exactly those that these keep."""
    add_steps(tmp_path, *(step for step in range(1, MANY) if step not in (7, 20, 295)))
    add_strays(tmp_path, 7, 20, 295)
    with manager_of(tmp_path, keep=[LatestN(3), EveryNSteps(50)]) as manager:
        save_steps(manager, 300)
        assert manager.steps() == [50, 100, 150, 200, 250, 298, 299, 300]
        save_steps(manager, 301, 302, 303, 304)
        assert manager.steps() == [50, 100, 150, 200, 250, 300, 302, 303, 304]
    assert all((tmp_path / name / "notes").exists() for name in ("7", "20", "295"))


KEEPS: list[Any] = [
    1,
    LatestN(3),
    EveryNSteps(4),
    [LatestN(2), EveryNSteps(3)],
    [LatestN(1), EveryNSteps(3), EveryNSteps(5)],
    [BestN(2, "loss"), EveryNSteps(5)],
    None,
]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_any_history_leaves_what_the_policies_say_of_all_checkpoints(tmp_path: Path, keep: Any, seed: int) -> None:
    """Whatever was saved, forced, deleted, rolled back or removed by hand: what stays is what the policies keep."""
    chance = random.Random(seed)
    manager = manager_of(tmp_path, keep=keep)
    policies = manager._retention.policies
    losses: dict[int, dict[str, float]] = {}
    for _ in range(20):
        newest = max(losses, default=0)
        action = chance.choice(["save"] * 6 + ["force", "delete", "roll back", "remove", "restart"])
        if action in ("save", "force"):
            step = newest + chance.randint(1, 3) if action == "save" else chance.randint(0, newest + 1)
            loss = {"loss": chance.random()}
            save_steps(manager, step, metrics=loss, force=action == "force")
            losses = {s: recorded for s, recorded in losses.items() if s < step} | {step: loss}
            losses = {s: losses[s] for s in steps_to_keep(policies, losses)}
        elif action == "delete" and losses:
            manager.delete(gone := chance.choice(sorted(losses)))
            del losses[gone]
        elif action == "roll back" and losses:
            manager.rollback(target := chance.choice(sorted(losses)))
            losses = {s: recorded for s, recorded in losses.items() if s <= target}
        elif action == "remove" and losses:
            shutil.rmtree(tmp_path / str(gone := chance.choice(sorted(losses))))
            del losses[gone]
        elif action == "restart":
            manager.close()
            manager = manager_of(tmp_path, keep=keep)
        assert manager.steps() == sorted(losses), action
        assert manager.latest_step() == max(losses, default=None)
    manager.close()


class KeepOdd:
    def keep(self, metrics: Mapping[int, Mapping[str, object]]) -> set[int]:
        return {step for step in metrics if step % 2}


class KeepTwoOldest(LatestN):
    """A policy of one's own, made out of ours."""

    def keep(self, metrics: Mapping[int, Mapping[str, object]]) -> set[int]:
        return set(sorted(metrics)[:2])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(KeepOdd(), [1, 3, 5, 6]), (KeepTwoOldest(9), [1, 2, 6]), ([KeepOdd(), EveryNSteps(4)], [1, 3, 4, 5, 6])],
)
def test_a_policy_of_ones_own_is_asked_about_all(tmp_path: Path, keep: Any, expected: list[int]) -> None:
    """A policy that the library does not know, also one derived from its own, has every checkpoint to choose from."""
    with manager_of(tmp_path) as manager:
        save_steps(manager, 1, 2, 3)
    with manager_of(tmp_path, keep=keep) as manager:
        save_steps(manager, 4, 5, 6)
        assert manager.steps() == expected


@pytest.mark.parametrize("keep", [LatestN(2), BestN(2, "loss", mode="max")], ids=str)
def test_what_somebody_else_removed_does_not_count_as_kept(tmp_path: Path, keep: Any) -> None:
    """A checkpoint that was removed by hand does not stand for one that is there, which would go in its stead."""
    with manager_of(tmp_path, keep=keep) as manager:
        save_steps(manager, 1, metrics={"loss": 1.0})
        save_steps(manager, 2, metrics={"loss": 2.0})
        shutil.rmtree(tmp_path / "2")
        save_steps(manager, 3, metrics={"loss": 3.0})
        assert manager.steps() == [1, 3]


def test_a_save_at_a_step_that_somebody_else_removed(tmp_path: Path) -> None:
    """Steps that were removed by hand are no bar to a save, and an error names the newest one that is there."""
    with manager_of(tmp_path) as manager:
        save_steps(manager, 1, 2, 3, 4)
        for step in ("3", "4"):
            shutil.rmtree(tmp_path / step)
        with pytest.raises(InvalidArgumentError, match=r"save at step 2, .* has step 2 already"):
            save_steps(manager, 2)
        save_steps(manager, 3)
        assert manager.steps() == [1, 2, 3]


def test_a_save_below_what_was_not_looked_at_is_refused(tmp_path: Path) -> None:
    """Once the newest ones are deleted, the next older one is the newest, also where retention had done with it."""
    with manager_of(tmp_path, keep=[LatestN(1), EveryNSteps(10)]) as manager:
        save_steps(manager, 10, 20, 21, 22)
        assert manager.steps() == [10, 20, 22]
        manager.delete(22)
        with pytest.raises(InvalidArgumentError, match="has step 20 already"):
            save_steps(manager, 15)
        save_steps(manager, 21)
        assert manager.steps() == [10, 20, 21]


def test_late_metrics_apply_the_policies_in_a_new_process(tmp_path: Path) -> None:
    """record_metrics lets go what need not stay, and no more, although this process has not saved yet."""
    with manager_of(tmp_path) as manager:
        save_steps(manager, 1, 2, 3, 4)
    with manager_of(tmp_path) as manager:
        manager.record_metrics(4, {"loss": 2.0})
        assert manager.steps() == [1, 2, 3, 4]
    with manager_of(tmp_path, keep=[LatestN(2), EveryNSteps(3)]) as manager:
        manager.record_metrics(4, {"loss": 1.0})
        assert manager.steps() == [3, 4]
        save_steps(manager, 5)
        assert manager.steps() == [3, 4, 5]


def test_a_rejected_checkpoint_has_no_part_in_choosing_the_best(tmp_path: Path) -> None:
    """A metric that only a damaged checkpoint recorded has been recorded by none."""
    with manager_of(tmp_path, keep=[BestN(1, "accuracy"), LatestN(9)]) as manager:
        save_steps(manager, 1, 2, metrics={"loss": 1.0})
        save_steps(manager, 3, metrics={"accuracy": 0.5})
        damage(tmp_path, 3)
        assert manager.restore()["step"] == 2
        with pytest.raises(MetricNotFoundError, match="'accuracy'"):
            save_steps(manager, 4, metrics={"loss": 1.0})
        save_steps(manager, 4, metrics={"accuracy": 0.4})
        assert (manager.steps(), manager.best_step()) == ([1, 2, 4], 4)


def test_what_has_gone_is_not_asked_for_its_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a deletion, a fallback and a rollback, nobody looks for the metrics of the steps that have gone."""
    with manager_of(tmp_path, keep=[BestN(1, "loss"), LatestN(9)]) as manager:
        save_steps(manager, 1, 2, 3, 4, metrics={"loss": 1.0})
        manager.delete(2)
        save_steps(manager, 5, metrics={"loss": 1.0})
        damage(tmp_path, 5)
        assert manager.restore()["step"] == 4
        save_steps(manager, 6, 7, metrics={"loss": 1.0})
        manager.rollback(6)
        save_steps(manager, 7, metrics={"loss": 1.0})
        assert manager.steps() == [1, 3, 4, 6, 7]
    assert "cannot be read" not in caplog.text


def test_a_checkpoint_that_a_dead_writer_was_replacing_is_the_newest_again(tmp_path: Path) -> None:
    """What the first save puts back in its place, it also takes for the newest."""
    with manager_of(tmp_path) as manager:
        save_steps(manager, 4, 5)
    os.rename(tmp_path / "5", tmp_path / "5.replaced.orbax-checkpoint-tmp")
    with manager_of(tmp_path) as manager:
        assert manager.latest_step() == 4
        with pytest.raises(InvalidArgumentError, match="has step 5 already"):
            save_steps(manager, 5)
        assert manager.steps() == [4, 5]


@pytest.mark.parametrize("keep", [2, [LatestN(1), EveryNSteps(2)], [LatestN(1), BestN(1, "loss")]])
def test_a_step_that_could_not_be_removed_is_removed_after_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    """A disk that fails once, as a step is to go, does not keep that step for as long as the program lives."""
    rename = os.rename

    def failing(source: Any, destination: Any) -> None:
        if ".removed." in os.fspath(destination):
            raise OSError(errno.EIO, os.strerror(errno.EIO), source)
        rename(source, destination)

    with manager_of(tmp_path, keep=keep) as manager, manager_of(tmp_path / "well", keep=keep) as other:
        for step in range(1, 8):
            with monkeypatch.context() as patch:
                if step == 4:
                    patch.setattr(os, "rename", failing)
                manager.save(step, state_at(step), metrics={"loss": step})
            other.save(step, state_at(step), metrics={"loss": step})
            assert (manager.steps() == other.steps()) == (step != 4)
