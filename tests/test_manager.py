"""The checkpoints of a run: which there are, which stay, which one restores, and who may write."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import BestN, CheckpointManager, EveryNSteps, FileOptions, LatestN
from ckpt_hooks.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    MetricNotFoundError,
    NotSerializableError,
    NoValidCheckpointError,
    RunLockedError,
    SaveFailedError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.storage import commit
from tests.faulty import fail
from tests.stateful import Counter

Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes managers of one run, which are closed at the end."""
    managers: list[CheckpointManager] = []

    def make_manager(**options: Any) -> CheckpointManager:
        managers.append(CheckpointManager(tmp_path / "run", **{"async_save": False, "keep": None, **options}))
        return managers[-1]

    yield make_manager
    for manager in managers:
        manager.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state_at(step: int) -> dict[str, Any]:
    # Larger than what the index holds inline, so that there is a data file with it.
    return {"params": {"w": np.arange(500.0) + step, "b": np.float32(step)}, "step": step}


def assert_is_state_at(step: int, restored: Any) -> None:
    np.testing.assert_array_equal(restored["params"]["w"], np.arange(500.0) + step)
    assert restored["params"]["b"] == step
    assert restored["step"] == step


def save_steps(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        manager.save(step, state_at(step), **options)


def damage(step_directory: Path) -> None:
    """Changes one byte of the params."""
    (data,) = (path for path in (step_directory / "params" / "d").iterdir() if path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def everything_in(directory: Path) -> dict[str, tuple[bytes, int]]:
    """{path: (content, time of change)} of all that there is below a directory."""
    return {
        str(path.relative_to(directory)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# ------------------------------------------------------------------ steps


def test_an_empty_run_has_no_steps_and_no_latest_or_best(make: Make, run: Path) -> None:
    """A run without checkpoints has no steps, and None as its latest and best one."""
    assert make().best_step() is None
    manager = make(keep=BestN(1, "loss"))
    assert manager.steps() == []
    assert manager.latest_step() is None
    assert manager.best_step() is None
    assert manager.best_step("anything", "max") is None
    assert not run.exists()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_is_a_step_that_restores(make: Make, async_save: bool) -> None:
    """What was saved is in `steps`, is the latest, and restores as it was."""
    manager = make(async_save=async_save)
    save_steps(manager, 5, 10)
    manager.wait()
    assert manager.steps() == [5, 10]
    assert manager.latest_step() == 10
    assert_is_state_at(10, manager.restore(state_at(0)))
    assert_is_state_at(5, manager.restore(state_at(0), step=5))


def test_step_zero_is_a_step(make: Make) -> None:
    """A state that has seen no update can be saved and restored as step 0."""
    manager = make()
    save_steps(manager, 0)
    assert manager.latest_step() == 0
    assert_is_state_at(0, manager.restore(state_at(7)))


def test_steps_are_sorted_as_numbers(make: Make) -> None:
    """Steps are in the order of numbers and not of names."""
    manager = make()
    save_steps(manager, 2, 9, 10, 100)
    assert manager.steps() == [2, 9, 10, 100]
    assert manager.latest_step() == 100


def test_only_a_steps_integer_is_a_checkpoints_name(make: Make, run: Path) -> None:
    """Directories with other names than the step's integer are no checkpoints, whatever they hold."""
    manager = make()
    save_steps(manager, 10)
    for name in ("010", "+20", "20.damaged", "ckpt-20", "2_0", " 20", "20.orbax-checkpoint-tmp", "٢٠"):
        shutil.copytree(run / "10", run / name)
    assert manager.steps() == [10]


def test_steps_sees_what_other_processes_commit(make: Make) -> None:
    """A reader that was there before sees each new checkpoint."""
    reader = make()
    writer = make()
    save_steps(writer, 1)
    assert reader.steps() == [1]
    save_steps(writer, 2)
    assert reader.latest_step() == 2
    assert_is_state_at(2, reader.restore())


@pytest.mark.parametrize("number", [np.int64, np.array, jnp.array], ids=["np.int64", "np.array", "jnp.array"])
def test_a_step_may_be_an_array_of_one_integer(make: Make, number: Callable[[int], Any]) -> None:
    """As `state.step` is: whatever asks for a step takes it, and means the same one."""
    manager = make(keep=None)
    for step in (1, 2, 3):
        manager.save(number(step), state_at(step))
    manager.wait()
    manager.record_metrics(number(2), {"loss": 0.5})
    assert manager.metadata(number(1)).metrics == {} and manager.metadata(number(2)).metrics == {"loss": 0.5}
    assert manager.verify(number(2)) == []
    manager.rollback(number(2))
    manager.delete(number(2))
    assert manager.steps() == [1]


@pytest.mark.parametrize("step", [-1, True, 1.0, "3", None])
@pytest.mark.parametrize("method", ["save", "delete", "rollback", "verify", "metadata", "record_metrics"])
def test_a_step_that_is_no_count_is_refused(make: Make, run: Path, method: str, step: Any) -> None:
    """Every method refuses a negative step as a ValueError, and what is no int as a TypeError."""
    arguments = {"save": (state_at(1),), "record_metrics": ({"loss": 1.0},)}.get(method, ())
    with pytest.raises(ValueError if step == -1 else TypeError, match="step"):
        getattr(make(), method)(step, *arguments)
    assert not run.exists()


# ------------------------------------------------------------------ save at or below the newest, and force


@pytest.mark.parametrize("step", [4, 5])
def test_saving_at_or_below_the_newest_is_an_error(make: Make, step: int) -> None:
    """Without force, a step at or below the newest is refused with both numbers and what to do."""
    manager = make()
    save_steps(manager, 5)
    with pytest.raises(InvalidArgumentError, match=rf"step {step}.*step 5 already.*force=True"):
        save_steps(manager, step)
    assert manager.steps() == [5]


def test_force_at_the_same_step_replaces_it(make: Make, run: Path) -> None:
    """A forced save at the newest step's number takes its place, and leaves nothing else behind."""
    manager = make()
    manager.save(5, {"params": {"w": np.zeros(3)}}, metrics={"loss": 1.0})
    manager.save(5, {"params": {"w": np.ones(3)}}, force=True, metrics={"loss": 2.0})
    assert manager.steps() == [5]
    np.testing.assert_array_equal(manager.restore()["params"]["w"], np.ones(3))
    assert manager.metadata(5).metrics == {"loss": 2.0}
    assert manager.best_step("loss") == 5
    assert [path.name for path in run.iterdir()] == ["5"]


@pytest.mark.parametrize("async_save", [False, True])
def test_force_below_the_newest_sets_newer_ones_aside(make: Make, run: Path, async_save: bool) -> None:
    """A forced save below the newest becomes the newest; newer ones are set aside, and none is deleted."""
    manager = make(async_save=async_save)
    save_steps(manager, 5, 10, 15)
    manager.save(7, state_at(7), force=True)
    manager.wait()
    assert manager.steps() == [5, 7]
    assert manager.latest_step() == 7
    assert sorted(path.name for path in run.iterdir()) == ["10.rolled_back", "15.rolled_back", "5", "7"]
    os.rename(run / "15.rolled_back", run / "15")
    assert_is_state_at(15, manager.restore(state_at(0)))


def test_force_that_fails_leaves_the_run_as_it_was(make: Make, run: Path) -> None:
    """A forced save that is refused replaces nothing and sets nothing aside."""
    manager = make()
    save_steps(manager, 5, 10)
    with pytest.raises(UnsupportedLeafError):
        manager.save(5, {"params": object()}, force=True)
    assert manager.steps() == [5, 10]
    assert_is_state_at(5, manager.restore(step=5))
    assert sorted(path.name for path in run.iterdir()) == ["10", "5"]


def test_force_of_a_new_newest_step_is_a_plain_save(make: Make) -> None:
    """force=True is no reason to touch the checkpoints before."""
    manager = make()
    save_steps(manager, 5)
    save_steps(manager, 6, force=True)
    assert manager.steps() == [5, 6]


def test_a_set_aside_step_never_overwrites_another(make: Make, run: Path) -> None:
    """Setting the same step aside twice keeps both."""
    manager = make()
    for _ in range(2):
        save_steps(manager, 5, 10)
        manager.save(1, state_at(1), force=True)
        manager.delete(1)
    assert sorted(path.name for path in run.iterdir()) == [
        "10.rolled_back",
        "10.rolled_back.1",
        "5.rolled_back",
        "5.rolled_back.1",
    ]


# ------------------------------------------------------------------ rollback, delete


def test_rollback_makes_a_step_the_newest(make: Make, run: Path) -> None:
    """rollback(step) sets newer checkpoints aside under a name that says so, and deletes none."""
    manager = make()
    save_steps(manager, 5, 10, 15)
    manager.rollback(5)
    assert manager.steps() == [5]
    assert (run / "10.rolled_back" / "params").is_dir()
    assert (run / "15.rolled_back" / "params").is_dir()
    save_steps(manager, 10)  # goes on from there
    assert manager.steps() == [5, 10]


def test_rollback_to_the_newest_changes_nothing(make: Make) -> None:
    """Rolling back to the newest step leaves all of them."""
    manager = make()
    save_steps(manager, 5, 10)
    manager.rollback(10)
    assert manager.steps() == [5, 10]


@pytest.mark.parametrize("method", ["rollback", "delete", "verify", "metadata"])
def test_a_step_that_is_not_there_is_named_with_those_that_are(make: Make, method: str) -> None:
    """Asking for a step that is not there is a FileNotFoundError that lists the steps there are."""
    manager = make()
    save_steps(manager, 5, 10)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; there are \[5, 10\]"):
        getattr(manager, method)(7)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 7; there are \[5, 10\]"):
        manager.restore(step=7)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 7"):
        manager.record_metrics(7, {"loss": 1.0})


@pytest.mark.parametrize("method", ["rollback", "delete"])
def test_asking_an_absent_run_to_change_makes_no_directory(make: Make, run: Path, method: str) -> None:
    """A change to a run that does not exist is refused without making it."""
    with pytest.raises(CheckpointNotFoundError):
        getattr(make(), method)(7)
    assert not run.exists()


def test_delete_removes_one_step(make: Make, run: Path) -> None:
    """delete(step) removes that checkpoint, also the newest one, and no other."""
    manager = make()
    save_steps(manager, 5, 10, 15)
    manager.delete(10)
    assert manager.steps() == [5, 15]
    manager.delete(15)
    assert manager.steps() == [5]
    assert [path.name for path in run.iterdir()] == ["5"]


def test_delete_forgets_the_metrics(make: Make) -> None:
    """A deleted checkpoint is not the best one, and one saved anew at its step has its own metrics."""
    manager = make(keep=[BestN(1, "loss"), LatestN(9)])
    manager.save(5, state_at(5), metrics={"loss": 0.1})
    assert manager.best_step() == 5
    manager.delete(5)
    manager.save(5, state_at(5), metrics={"loss": 0.9})
    manager.save(6, state_at(6), metrics={"loss": 0.5})
    assert manager.best_step() == 6


# ------------------------------------------------------------------ keep


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (2, [5, 6]),
        (LatestN(3), [4, 5, 6]),
        (EveryNSteps(3), [3, 6]),
        (EveryNSteps(4), [4, 6]),
        (BestN(2, "loss"), [2, 3, 6]),
        (BestN(1, "loss", mode="max"), [1, 6]),
        ([LatestN(2), BestN(1, "loss"), EveryNSteps(4)], [3, 4, 5, 6]),
        (None, [1, 2, 3, 4, 5, 6]),
    ],
)
@pytest.mark.parametrize("async_save", [False, True])
def test_keep_in_all_its_forms(make: Make, keep: Any, expected: list[int], async_save: bool) -> None:
    """keep is an int, a policy, a list of policies of which each may keep a step, or None; the newest stays."""
    losses = {1: 0.9, 2: 0.2, 3: 0.1, 4: 0.5, 5: 0.6, 6: 0.7}
    manager = make(keep=keep, async_save=async_save)
    for step, loss in losses.items():
        save_steps(manager, step, metrics={"loss": loss})
    manager.wait()
    assert manager.steps() == expected


def test_keep_is_three_by_default(tmp_path: Path) -> None:
    """Without keep, the three newest checkpoints stay."""
    with CheckpointManager(tmp_path) as manager:
        save_steps(manager, 1, 2, 3, 4)
        manager.wait()
        assert manager.steps() == [2, 3, 4]


def test_a_nan_never_is_the_best_and_costs_nothing(make: Make) -> None:
    """A NaN or infinite metric never ranks as best, and does not make the best one go."""
    manager = make(keep=BestN(1, "loss"))
    for step, loss in enumerate([0.5, 0.1, float("nan"), -float("inf"), 0.3]):
        save_steps(manager, step, metrics={"loss": loss})
    assert manager.best_step() == 1
    assert manager.best_step(mode="max") == 4
    assert manager.steps() == [1, 4]


def test_a_best_policy_outlives_the_process(make: Make) -> None:
    """Which checkpoint is the best is known to the next process too."""
    first = make(keep=BestN(1, "loss"))
    save_steps(first, 1, metrics={"loss": 0.1})
    save_steps(first, 2, metrics={"loss": 0.5})
    first.close()
    second = make(keep=BestN(1, "loss"))
    save_steps(second, 3, metrics={"loss": 0.3})
    assert second.steps() == [1, 3]


def test_choosing_by_a_metric_nobody_recorded_is_refused_before_writing(make: Make, run: Path) -> None:
    """BestN by a metric that nobody recorded is refused before anything is written, naming what is recorded."""
    manager = make(keep=BestN(1, "accuracy"))
    save_steps(manager, 1, 2, metrics={"loss": 0.5})
    before = everything_in(run)
    with pytest.raises(MetricNotFoundError, match=r"'accuracy'.*recorded are \['loss'\].*record_metrics"):
        save_steps(manager, 3, metrics={"loss": 0.4})
    assert everything_in(run) == before
    manager.record_metrics(1, {"accuracy": 0.5})
    save_steps(manager, 3)
    assert manager.steps() == [1, 3]


def test_best_step_of_a_metric_nobody_recorded(make: Make) -> None:
    """best_step by an unknown metric is a KeyError naming what is recorded; without metric and policy, a ValueError."""
    manager = make()
    save_steps(manager, 1, metrics={"loss": 0.5})
    with pytest.raises(KeyError, match=r"'accuracy'.*\['loss'\]"):
        manager.best_step("accuracy")
    with pytest.raises(InvalidArgumentError, match="best_step"):
        manager.best_step()
    with pytest.raises(InvalidArgumentError, match="'min' or 'max'"):
        manager.best_step("loss", "lowest")  # type: ignore[arg-type]


def test_best_step_by_argument_and_by_policy(make: Make) -> None:
    """best_step takes metric and mode from its arguments, or from the BestN in keep."""
    manager = make(keep=[LatestN(5), BestN(1, "accuracy", mode="max")])
    for step, (loss, accuracy) in enumerate([(3.0, 0.3), (1.0, 0.2), (2.0, 0.9)]):
        save_steps(manager, step, metrics={"loss": loss, "accuracy": accuracy})
    assert manager.best_step() == 2
    assert manager.best_step("accuracy") == 2
    assert manager.best_step("accuracy", "min") == 1
    assert manager.best_step("loss") == 1
    assert manager.best_step("loss", "max") == 0


def test_a_bad_keep_is_refused_at_once(tmp_path: Path) -> None:
    """A keep that means nothing is refused when the manager is made."""
    for keep in list[Any]((0, -1, [], "3", 2.5)):
        with pytest.raises(CheckpointError, match=r"keep|LatestN"):
            CheckpointManager(tmp_path / "run", keep=keep)


# ------------------------------------------------------------------ metadata and metrics


def test_metadata_has_step_metrics_and_the_users_own(make: Make) -> None:
    """custom_metadata is exactly step, metrics, and what the user gave; item metadata has shapes and dtypes."""
    manager = make()
    manager.save(5, state_at(5), metrics={"loss": np.float32(0.5)}, metadata={"commit": "abc", "lr": [0.1, 0.2]})
    metadata = manager.metadata(5)
    assert metadata.custom_metadata == {"step": 5, "metrics": {"loss": 0.5}, "commit": "abc", "lr": [0.1, 0.2]}
    assert metadata.metrics == {"loss": 0.5}
    assert metadata.item_metadata.params["w"].shape == (500,)
    assert metadata.item_metadata.params["b"].dtype == np.float32
    assert metadata.init_timestamp_nsecs is not None
    assert metadata.commit_timestamp_nsecs is not None
    assert metadata.init_timestamp_nsecs < metadata.commit_timestamp_nsecs


@pytest.mark.parametrize("key", ["step", "metrics"])
def test_metadata_cannot_take_the_librarys_keys(make: Make, run: Path, key: str) -> None:
    """The user's metadata cannot overwrite step or metrics."""
    with pytest.raises(InvalidArgumentError, match=key):
        make().save(1, state_at(1), metadata={key: 3})
    assert not run.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"metadata": {"a": np.ones(3)}},
        {"metadata": {"a": {"b": [object()]}}},
        {"metadata": {"a": {1: 2}}},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": np.ones(2)}},
        {"metrics": {"loss": 1j}},
        {"metrics": {"loss": None}},
    ],
)
def test_metadata_and_metrics_that_are_not_json_are_refused(make: Make, run: Path, options: Any) -> None:
    """What JSON would refuse or change is a TypeError before anything is written."""
    with pytest.raises(NotSerializableError) as error:
        make().save(1, state_at(1), **options)
    assert isinstance(error.value, TypeError)
    assert not run.exists()


def test_metrics_are_not_returned_by_restore(make: Make) -> None:
    """Metrics are metadata: restore without like returns the parts of the state only."""
    manager = make()
    manager.save(1, state_at(1), metrics={"loss": 0.5})
    assert sorted(manager.restore()) == ["params", "step"]


def test_metrics_are_written_where_orbax_looks(make: Make, run: Path) -> None:
    """Metrics are also the JSON item `metrics`, as Orbax's manager writes it."""
    manager = make()
    manager.save(1, state_at(1), metrics={"loss": 0.5})
    assert json.loads((run / "1" / "metrics" / "metrics").read_text()) == {"loss": 0.5}


def test_record_metrics_adds_to_what_was_recorded(make: Make) -> None:
    """record_metrics adds and replaces values, for this manager and for the next; the checkpoint still verifies."""
    manager = make()
    manager.save(1, state_at(1), metrics={"loss": 0.5, "top5": 0.1})
    manager.save(2, state_at(2))
    manager.record_metrics(1, {"accuracy": jnp.float32(0.25), "loss": float("nan")})
    manager.record_metrics(2, {"accuracy": 0.75})
    for reader in (manager, make()):
        assert reader.metadata(1).metrics == {"loss": "NaN", "top5": 0.1, "accuracy": 0.25}
        assert reader.metadata(1).custom_metadata["metrics"] == {"loss": "NaN", "top5": 0.1, "accuracy": 0.25}
        assert reader.metadata(1).custom_metadata["step"] == 1
        assert reader.best_step("accuracy", "max") == 2
        assert reader.verify(1) == []
        assert reader.verify(2) == []
        assert_is_state_at(2, reader.restore(state_at(0)))


def test_record_metrics_makes_retention_look_again(make: Make) -> None:
    """Metrics that arrive after the save decide what stays."""
    manager = make(keep=BestN(1, "accuracy", mode="max"))
    save_steps(manager, 1, 2)
    assert manager.steps() == [1, 2]  # nobody has recorded the metric yet
    manager.record_metrics(2, {"accuracy": 0.1})
    assert manager.steps() == [2]


def test_record_metrics_that_are_no_numbers_changes_nothing(make: Make, run: Path) -> None:
    """Metrics that are no numbers are refused before the checkpoint is touched."""
    manager = make()
    save_steps(manager, 1)
    before = everything_in(run)
    with pytest.raises(NotSerializableError, match="accuracy"):
        manager.record_metrics(1, {"accuracy": [1, 2]})
    assert everything_in(run) == before


# ------------------------------------------------------------------ restore


def test_restore_of_an_empty_run_is_not_found(make: Make, run: Path) -> None:
    """Restoring from a run without checkpoints is a FileNotFoundError that names it."""
    for options in ({}, {"step": 3}, {"step": "latest"}):
        with pytest.raises(FileNotFoundError, match=str(run)):
            make().restore(**options)


def test_restore_without_like_is_dicts_and_lists_of_numpy(make: Make) -> None:
    """Without like, named tuples are dicts, tuples are lists, keys are strings, and arrays are NumPy's."""
    manager = make()
    key = jax.random.key(3)
    state = {
        "params": {"l": (1, [jnp.zeros(1), "s"]), "numbered": {7: jnp.ones(2)}},
        "key": key,
        "none": None,
        "empty": {},
    }
    manager.save(1, state)
    restored = manager.restore()
    assert sorted(restored) == ["empty", "key", "none", "params"]
    assert isinstance(restored["params"]["numbered"]["7"], np.ndarray)
    assert isinstance(restored["params"]["l"], list)
    assert restored["params"]["l"][1][1] == "s"
    assert restored["none"] is None
    assert restored["empty"] == {}
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(key))


def test_restore_by_number_never_gives_another(make: Make, run: Path) -> None:
    """A step asked for by number raises where it is damaged, though there are others."""
    manager = make()
    save_steps(manager, 5, 10)
    damage(run / "10")
    with pytest.raises(CorruptCheckpointError, match="10/params"):
        manager.restore(step=10)
    assert_is_state_at(5, manager.restore(step=5))
    assert manager.steps() == [5, 10]


def test_restore_best(make: Make) -> None:
    """step="best" is the best by the BestN in keep."""
    manager = make(keep=BestN(1, "loss"))
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.7)]:
        save_steps(manager, step, metrics={"loss": loss})
    assert_is_state_at(2, manager.restore(step="best"))


def test_restore_best_never_gives_another(make: Make, run: Path) -> None:
    """A damaged best checkpoint raises rather than giving another one."""
    manager = make(keep=BestN(2, "loss"))
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.7)]:
        save_steps(manager, step, metrics={"loss": loss})
    damage(run / "2")
    with pytest.raises(CorruptCheckpointError):
        manager.restore(step="best")


def test_restore_best_without_a_best(make: Make) -> None:
    """step="best" raises where nothing can be the best, and where nobody said best of what."""
    manager = make(keep=BestN(1, "loss"))
    with pytest.raises(CheckpointNotFoundError, match="best"):
        manager.restore(step="best")
    save_steps(manager, 1, metrics={"loss": float("nan")})
    with pytest.raises(CheckpointNotFoundError, match="finite"):
        manager.restore(step="best")
    with pytest.raises(InvalidArgumentError, match="BestN"):
        make().restore(step="best")


def test_restore_latest_is_restore(make: Make, run: Path) -> None:
    """step="latest" is the newest, and falls back like no step at all."""
    manager = make()
    save_steps(manager, 5, 10)
    assert_is_state_at(10, manager.restore(step="latest"))
    damage(run / "10")
    assert_is_state_at(5, manager.restore(step="latest"))


@pytest.mark.parametrize("step", ["newest", -1, 1.5, True])
def test_restore_of_a_step_without_sense(make: Make, step: Any) -> None:
    """A step that is no count and no known word is refused."""
    manager = make()
    save_steps(manager, 1)
    with pytest.raises((TypeError, ValueError), match="step"):
        manager.restore(step=step)


def test_items_restores_only_these(make: Make, run: Path) -> None:
    """items= returns {item: value} with or without like, and reads nothing else."""
    manager = make()
    save_steps(manager, 5)
    shutil.rmtree(run / "5" / "step")
    for like in (None, {"params": state_at(0)["params"]}, state_at(0)):
        restored = manager.restore(like, items=("params",))
        assert list(restored) == ["params"]
        np.testing.assert_array_equal(restored["params"]["w"], np.arange(500.0) + 5)


def test_items_of_a_state_with_more_parts_than_were_saved(make: Make) -> None:
    """items= makes it possible to restore the parts there are into a state that has grown others."""
    manager = make()
    save_steps(manager, 5)
    restored = manager.restore({**state_at(0), "ema": np.zeros(4)}, items=["params", "step"])
    assert sorted(restored) == ["params", "step"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"items": ("weights",)},
        {"items": ("weights",), "like": {"weights": np.ones(2)}},
        {"like": {**state_at(0), "weights": np.ones(2)}},
        {"weights": Counter()},
    ],
)
def test_a_missing_item_is_named_with_those_there_are(make: Make, arguments: Any) -> None:
    """An item that was not saved is a KeyError and CheckpointError that names it and those there are."""
    manager = make()
    save_steps(manager, 5, 10)
    with pytest.raises(ItemNotFoundError, match=r"'weights'.*'params', 'step'") as error:
        manager.restore(**arguments)
    assert isinstance(error.value, KeyError)
    assert isinstance(error.value, CheckpointError)
    assert "\\n" not in str(error.value)


def test_an_item_that_like_lacks_is_a_mismatch(make: Make) -> None:
    """A like without a part that was saved is refused, naming the part and the way out."""
    manager = make()
    save_steps(manager, 5)
    with pytest.raises(StructureMismatchError, match=r"'params'.*`like` lacks.*items="):
        manager.restore({"step": 0})


def test_items_as_one_string_is_refused(make: Make) -> None:
    """items="params" is refused rather than read letter by letter."""
    manager = make()
    save_steps(manager, 5)
    with pytest.raises(InvalidArgumentError, match=r'items=\("params",\)'):
        manager.restore(items="params")


def test_items_that_like_lacks(make: Make) -> None:
    """An item asked for that like has no part for is named, with the parts that it has."""
    manager = make()
    save_steps(manager, 5)
    with pytest.raises(ItemNotFoundError, match=r"'params'.*\['step'\]"):
        manager.restore({"step": 0}, items=("params",))


# ------------------------------------------------------------------ fallback


def remove_item(step_directory: Path) -> None:
    shutil.rmtree(step_directory / "params")


def remove_small_item(step_directory: Path) -> None:
    shutil.rmtree(step_directory / "step")


def swap_item(step_directory: Path) -> None:
    """Puts in the whole, in itself undamaged, item of the step before."""
    shutil.rmtree(step_directory / "params")
    shutil.copytree(step_directory.parent / "5" / "params", step_directory / "params")


def swap_small_item(step_directory: Path) -> None:
    shutil.rmtree(step_directory / "step")
    shutil.copytree(step_directory.parent / "5" / "step", step_directory / "step")


def cut_manifest(step_directory: Path) -> None:
    os.truncate(step_directory / "params" / "manifest.ocdbt", 10)


def spoil_metadata(step_directory: Path) -> None:
    (step_directory / "_CHECKPOINT_METADATA").write_text("{")


def become_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def metadata_becomes_a_directory(step_directory: Path) -> None:
    become_a_directory(step_directory / "_CHECKPOINT_METADATA")


def checksums_become_a_directory(step_directory: Path) -> None:
    become_a_directory(step_directory / "_CHECKSUMS")


def array_table_becomes_a_directory(step_directory: Path) -> None:
    become_a_directory(step_directory / "params" / "_ARRAY_CHECKSUMS")


def item_becomes_a_file(step_directory: Path) -> None:
    shutil.rmtree(step_directory / "params")
    (step_directory / "params").write_text("")


def change_metadata(step_directory: Path) -> None:
    path = step_directory / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"step": 10', '"step": 99'))


def remove_checksums(step_directory: Path) -> None:
    (step_directory / "_CHECKSUMS").unlink()


DAMAGES = [
    damage,
    remove_item,
    remove_small_item,
    swap_item,
    swap_small_item,
    cut_manifest,
    spoil_metadata,
    change_metadata,
    remove_checksums,
    metadata_becomes_a_directory,
    checksums_become_a_directory,
    array_table_becomes_a_directory,
    item_becomes_a_file,
]


@pytest.mark.parametrize("spoil", DAMAGES)
@pytest.mark.parametrize("like", [None, state_at(0)], ids=["plain", "like"])
def test_what_does_not_verify_falls_back(
    make: Make, run: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], like: Any
) -> None:
    """A newest checkpoint that does not verify, in whatever way, is logged with its reason and passed over."""
    manager = make()
    save_steps(manager, 5, 10)
    spoil(run / "10")
    with caplog.at_level(logging.WARNING, "ckpt_hooks"):
        assert_is_state_at(5, manager.restore(like))
    (reason,) = messages(caplog, logging.ERROR)
    assert "step 10" in reason
    assert "rejected" in reason
    assert any("step 5" in m and "instead of [10]" in m for m in messages(caplog, logging.WARNING))
    assert manager.steps() == [5]


@pytest.mark.parametrize("spoil", DAMAGES)
@pytest.mark.parametrize("like", [None, state_at(0)], ids=["plain", "like"])
def test_what_does_not_verify_is_an_error_by_number(
    make: Make, run: Path, spoil: Callable[[Path], None], like: Any
) -> None:
    """A step asked for by number that does not verify is a CorruptCheckpointError that names its path."""
    manager = make()
    save_steps(manager, 5, 10)
    spoil(run / "10")
    with pytest.raises(CorruptCheckpointError, match=str(run / "10")):
        manager.restore(like, step=10)
    assert_is_state_at(5, manager.restore(like, step=5))


@pytest.mark.parametrize("spoil", DAMAGES)
def test_verify_names_the_damage(make: Make, run: Path, spoil: Callable[[Path], None]) -> None:
    """verify(step) is empty where all is well, and names the damaged step's path where it is not."""
    manager = make()
    save_steps(manager, 5, 10)
    assert manager.verify(10) == []
    spoil(run / "10")
    problems = manager.verify(10)
    assert problems
    assert all(str(run / "10") in problem for problem in problems)
    assert manager.verify(5) == []


@pytest.mark.parametrize(("times", "found"), [(1, 10), (2, 5)])
def test_a_single_fault_of_the_file_system_costs_no_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int, found: int
) -> None:
    """The newest checkpoint is read once more after an EIO, and passed over only when that fails as well."""
    manager = make()
    save_steps(manager, 5, 10)
    fail(monkeypatch, os, "preadv", errno.EIO, times)
    with caplog.at_level(logging.WARNING, "ckpt_hooks"):
        assert_is_state_at(found, manager.restore(state_at(0)))
    assert "step 10" in messages(caplog, logging.WARNING)[0]
    assert manager.steps() == [5, 10][: found // 5]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_the_user_can_mend_is_neither_a_fault_nor_damage(
    make: Make, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Too many open files, or a file that one may not read, is told at once; nothing is read again or passed over."""
    manager = make()
    save_steps(manager, 5, 10)
    fail(monkeypatch, os, "preadv", code, times=1)
    with pytest.raises(OSError, match=os.strerror(code)):
        manager.restore(state_at(0))
    assert_is_state_at(10, manager.restore(state_at(0)))


def test_when_none_verifies_the_error_has_every_reason(make: Make, run: Path) -> None:
    """Where no checkpoint verifies, the error lists each one's reason, and nothing is removed."""
    manager = make()
    save_steps(manager, 5, 10, 15)
    damage(run / "5")
    remove_item(run / "10")
    cut_manifest(run / "15")
    with pytest.raises(NoValidCheckpointError) as error:
        manager.restore(state_at(0))
    assert isinstance(error.value, CorruptCheckpointError)
    rows = str(error.value).splitlines()
    assert [row.split(":")[0].strip() for row in rows if row.startswith("  step")] == ["step 15", "step 10", "step 5"]
    assert "missing" in str(error.value)
    assert manager.steps() == [5, 10, 15]
    with pytest.raises(NoValidCheckpointError):
        manager.restore(state_at(0))  # and again, rather than an empty run


def test_a_mismatch_of_the_newest_raises_rather_than_falls_back(make: Make) -> None:
    """A newest checkpoint that is well, but does not fit, raises: an older one would not be what was asked."""
    manager = make()
    manager.save(5, {"params": {"w": np.zeros(3)}})
    manager.save(10, {"params": {"w": np.zeros(4)}})
    with pytest.raises(StructureMismatchError, match=r"float64\[4\].*float64\[3\]"):
        manager.restore({"params": {"w": np.zeros(3)}})
    assert manager.steps() == [5, 10]


def test_a_damaged_checkpoint_is_set_aside_at_the_next_save(make: Make, run: Path) -> None:
    """What was rejected stays until the next save, which renames it out of the way and never deletes it."""
    manager = make(keep=1)
    save_steps(manager, 5)
    manager.close()
    writer = make(keep=9)
    save_steps(writer, 10)
    damage(run / "10")
    content = everything_in(run / "10")
    assert_is_state_at(5, writer.restore())
    assert (run / "10").is_dir()
    for step in (10, 11, 12):
        save_steps(writer, step)
    assert writer.steps() == [5, 10, 11, 12]
    assert_is_state_at(10, writer.restore(step=10))
    assert {k: v[0] for k, v in everything_in(run / "10.damaged").items()} == {k: v[0] for k, v in content.items()}


def test_a_step_that_was_mended_by_hand_is_the_newest_again(make: Make, run: Path, tmp_path: Path) -> None:
    """A save below it is an error, also of the writer that rejected it, and it counts for retention."""
    writer = make(keep=2)
    save_steps(writer, 5, 10)
    shutil.copytree(run / "10", tmp_path / "whole")
    damage(run / "10")
    assert_is_state_at(5, writer.restore())
    shutil.rmtree(run / "10")
    (tmp_path / "whole").rename(run / "10")
    with pytest.raises(InvalidArgumentError, match="has step 10 already"):
        save_steps(writer, 7)
    save_steps(writer, 11)
    assert writer.steps() == [10, 11]


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), ImportError("no module")])
def test_what_this_process_lacks_is_no_damage(make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It is raised as it is by a restore and by `verify`, and the newest one stays the newest."""
    manager = make()
    save_steps(manager, 1, 2)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_hooks.loading.place_on_devices", fails)
        with pytest.raises(type(error), match=str(error)):
            manager.restore(state_at(0))
        patch.setattr("ckpt_hooks.loading.SavedTree._read", fails)
        with pytest.raises(type(error), match=str(error)):
            manager.verify(2)
    assert manager.latest_step() == 2
    assert_is_state_at(2, manager.restore(state_at(0)))


_WITHOUT_A_DEVICE = """
import sys, jax, numpy as np
from ckpt_hooks import CheckpointManager, errors
if sys.argv[2] == "silent":
    def no_backend(*arguments, **options): raise AssertionError  # as JAX may, of JAX_PLATFORMS=cuda without a GPU
    jax.local_devices = jax.device_put = no_backend
manager = CheckpointManager(sys.argv[1])
try:
    manager.restore({"w": jax.ShapeDtypeStruct((3,), np.float32)})
except errors.NoDeviceError as error:
    print(error)
print(manager.steps(), manager.restore({"w": np.zeros(3, np.float32)}))
"""


@pytest.mark.parametrize(("jax_says", "told"), [("why", "Backend 'none' is not in the list"), ("silent", "be started")])
def test_without_a_device_no_step_is_rejected(make: Make, run: Path, jax_says: str, told: str) -> None:
    """Where JAX has no device, a restore says so; into NumPy arrays it needs none."""
    manager = make()
    manager.save(10, {"w": np.ones(3, np.float32)})
    manager.close()
    command = [sys.executable, "-c", _WITHOUT_A_DEVICE, str(run), jax_says]
    environment = {**os.environ, "JAX_PLATFORMS": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert "JAX has none, with JAX_PLATFORMS='none'" in done.stdout and told in done.stdout
    assert "[10] {'w': array([1., 1., 1.], dtype=float32)}" in done.stdout


def test_a_damaged_step_does_not_count_for_retention(make: Make, run: Path) -> None:
    """keep=1 does not delete the good checkpoint in favour of a newer one that was rejected."""
    manager = make(keep=2)
    save_steps(manager, 5, 10)
    damage(run / "10")
    assert_is_state_at(5, manager.restore())
    save_steps(manager, 7)
    assert manager.steps() == [5, 7]


# ------------------------------------------------------------------ what is in the way


def test_a_stray_empty_directory_is_ignored_with_one_warning(
    make: Make, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty directory with a step's name is no checkpoint, which is said exactly once."""
    manager = make()
    save_steps(manager, 5)
    (run / "20").mkdir()
    with caplog.at_level(logging.WARNING, "ckpt_hooks"):
        for _ in range(3):
            assert manager.steps() == [5]
            assert manager.latest_step() == 5
            assert_is_state_at(5, manager.restore())
    (warning,) = messages(caplog, logging.WARNING)
    assert str(run / "20") in warning
    assert "ignored" in warning
    with pytest.raises(IncompleteCheckpointError, match=r"never committed; there are \[5\]"):
        manager.restore(step=20)


def test_a_stray_directory_in_the_way_is_moved_and_not_deleted(make: Make, run: Path) -> None:
    """What is no checkpoint and stands where one has to go is renamed."""
    (run / "5").mkdir(parents=True)
    (run / "5" / "notes").write_text("mine")
    manager = make()
    save_steps(manager, 5)
    assert manager.steps() == [5]
    assert (run / "5.stray" / "notes").read_text() == "mine"


def test_other_peoples_files_stay(make: Make, run: Path) -> None:
    """Whatever else is in the run's directory is left alone."""
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "plots").mkdir()
    manager = make(keep=1)
    save_steps(manager, 1, 2, 3)
    assert sorted(path.name for path in run.iterdir()) == ["3", "config.json", "plots"]


# ------------------------------------------------------------------ reading


def test_reading_creates_and_changes_nothing(make: Make, run: Path) -> None:
    """A manager that only reads makes no directory, writes no file, and takes no lock."""
    writer = make()
    manager = make()
    with pytest.raises(CheckpointNotFoundError):
        manager.restore()
    assert manager.steps() == []
    assert not run.exists()
    save_steps(writer, 5, metrics={"loss": 0.5})
    (run / "7.orbax-checkpoint-tmp").mkdir()
    before = everything_in(run)
    read_everything(manager)
    assert everything_in(run) == before
    save_steps(writer, 10)  # the reader has not taken the lock


def read_everything(manager: CheckpointManager) -> None:
    assert manager.steps() == [5]
    assert manager.best_step("loss") == 5
    assert manager.metadata(5).custom_metadata["step"] == 5
    assert manager.verify(5) == []
    assert_is_state_at(5, manager.restore())
    assert_is_state_at(5, manager.restore(state_at(0), step=5))


def test_reading_works_on_a_read_only_mount(make: Make, run: Path, tmp_path: Path) -> None:
    """Everything that only reads works where nothing can be written."""
    save_steps(make(), 5, metrics={"loss": 0.5})
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if subprocess.run(["mount", "--bind", run, mounted], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
        with CheckpointManager(mounted) as manager:
            read_everything(manager)
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def test_relative_directories_and_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative directory is resolved when the manager is made, and stays there."""
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("run") as manager:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        save_steps(manager, 1)
        manager.wait()
        assert os.fspath(manager.directory) == str(tmp_path / "run")
    assert (tmp_path / "run" / "1").is_dir()


def test_file_options_hold_for_items_too(run: Path) -> None:
    """A group that shares a run may remove what is in it."""
    with CheckpointManager(run, file_options=FileOptions(path_permission_mode=0o770)) as manager:
        save_steps(manager, 1, metrics={"loss": 0.5})
    folders = [path for path in (run / "1", *(run / "1").iterdir()) if path.is_dir()]
    assert len(folders) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o770}


# ------------------------------------------------------------------ writers


def test_a_second_writer_in_this_process_is_refused(make: Make) -> None:
    """While one manager writes, another one's save, delete, rollback and record_metrics raise RunLockedError."""
    first, second = make(), make()
    save_steps(first, 1)
    for change in (
        lambda: save_steps(second, 2),
        lambda: second.delete(1),
        lambda: second.rollback(1),
        lambda: second.record_metrics(1, {"loss": 1.0}),
    ):
        with pytest.raises(RunLockedError, match="this process") as error:
            change()
        assert isinstance(error.value, BlockingIOError)
    assert second.steps() == [1]
    first.close()
    save_steps(second, 2)
    assert second.steps() == [1, 2]


def test_a_dropped_manager_gives_the_lock_back(tmp_path: Path) -> None:
    """A manager that is collected without close does not keep the run locked."""
    manager = CheckpointManager(tmp_path, async_save=False)
    save_steps(manager, 1)
    del manager
    gc.collect()
    with CheckpointManager(tmp_path, async_save=False) as other:
        save_steps(other, 2)
        assert other.steps() == [1, 2]


WRITER = """
import sys, numpy as np
from ckpt_hooks import CheckpointManager
manager = CheckpointManager(sys.argv[1], async_save=False)
manager.save(1, {"params": {"w": np.arange(500.0) + 1, "b": np.float32(1)}, "step": 1})
print("saved", flush=True)
sys.stdin.read()
"""


def start_writer(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(ckpt_hooks.__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    return process


def test_a_second_writing_process_is_refused_until_the_first_dies(make: Make, run: Path) -> None:
    """A live writer in another process is named in the RunLockedError; a killed one does not hold the run."""
    with start_writer(run) as process:
        manager = make()
        assert_is_state_at(1, manager.restore())
        with pytest.raises(RunLockedError, match=f"process {process.pid} is writing"):
            save_steps(manager, 2)
        process.kill()
        process.wait()
    save_steps(manager, 2)
    assert manager.steps() == [1, 2]


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("saved", flush=True)
sys.stdin.read()
"""


def test_temporaries_of_dead_writers_go_and_a_live_ones_stay(
    make: Make, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save removes what dead writers left, and nothing of a writer that still lives."""
    dead, live = run / "3.orbax-checkpoint-tmp", run / "4.orbax-checkpoint-tmp"
    for temporary in (dead, live):
        (temporary / "params").mkdir(parents=True)
    monkeypatch.setitem(globals(), "WRITER", HOLDER)
    with start_writer(live) as process:
        manager = make()
        save_steps(manager, 5)
        assert not dead.exists()
        assert (live / "params").is_dir()
        process.kill()
        process.wait()
    manager.close()
    save_steps(make(), 6)
    assert not live.exists()


# ------------------------------------------------------------------ stateful objects


def test_objects_are_saved_and_set_in_place(make: Make) -> None:
    """Keyword objects are items of their own, whose state is set in place on restore."""
    manager = make()
    manager.save(1, state_at(1), data=Counter(17))
    data = Counter()
    assert_is_state_at(1, manager.restore(state_at(0), data=data))
    assert data.position == 17
    assert manager.restore()["data"] == {"position": 17}
    assert sorted(manager.restore(state_at(0))) == ["params", "step"]  # also without the object


def test_an_objects_state_is_taken_at_the_save(make: Make) -> None:
    """An iterator may run ahead while the save is written in the background."""
    manager = make(async_save=True)
    data = Counter(17)
    manager.save(1, state_at(1), data=data)
    data.position = 99
    manager.wait()
    manager.restore(data=data)
    assert data.position == 17


def test_objects_are_set_only_after_all_else_was_read(make: Make, run: Path) -> None:
    """A restore that fails has not touched the objects."""
    manager = make()
    manager.save(1, state_at(1), a=Counter(1), b=Counter(2))
    a, b = Counter(), Counter()
    with pytest.raises(StructureMismatchError):
        manager.restore({"params": {"w": np.zeros(3), "b": np.float32(0)}, "step": 0}, a=a, b=b)
    damage(run / "1")
    with pytest.raises(NoValidCheckpointError):
        manager.restore(a=a, b=b)
    assert (a.position, b.position) == (0, 0)


def test_objects_come_from_the_checkpoint_that_is_restored(make: Make, run: Path) -> None:
    """After a fallback, the objects have the state of the same checkpoint as the rest."""
    manager = make()
    manager.save(1, state_at(1), data=Counter(1))
    manager.save(2, state_at(2), data=Counter(2))
    damage(run / "2")
    data = Counter()
    assert_is_state_at(1, manager.restore(data=data))
    assert data.position == 1


class Stubborn(Counter):
    def set_state(self, state: dict[str, int]) -> None:
        raise ValueError("this iterator cannot go back")


def test_an_object_that_refuses_its_state_is_no_damage(make: Make) -> None:
    """What an object's set_state raises is raised, and costs no checkpoint."""
    manager = make()
    for step in (1, 2):
        manager.save(step, state_at(step), data=Counter(step))
    for number in (None, 2):
        with pytest.raises(ValueError, match=r"^this iterator cannot go back$"):
            manager.restore(step=number, data=Stubborn())
    assert manager.steps() == [1, 2]


@pytest.mark.parametrize("value", [{"w": np.ones(2)}, np.ones(2), 3, [1, 2], None], ids=str)
def test_a_pytree_as_a_keyword_is_a_type_error_that_says_so(make: Make, run: Path, value: Any) -> None:
    """Pytrees belong into the state: as keyword items they are refused with the way to write it."""
    manager = make()
    with pytest.raises(InvalidArgumentTypeError, match=r'ema=.*get_state.*pytree belongs into the state.*"ema"'):
        manager.save(1, state_at(1), ema=value)
    assert not run.exists()
    save_steps(manager, 1)
    with pytest.raises(InvalidArgumentTypeError, match="pytree belongs into the state"):
        manager.restore(state_at(0), ema=value)


def test_a_keyword_with_the_name_of_a_part_is_refused(make: Make, run: Path) -> None:
    """A keyword item cannot have the name of a part of the state."""
    with pytest.raises(InvalidArgumentError, match=r"'params'.*rename the keyword"):
        make().save(1, state_at(1), params=Counter())
    assert not run.exists()


# ------------------------------------------------------------------ failures in the background


class Exploding(Counter):
    """Fails when its state is taken."""

    def get_state(self) -> dict[str, int]:
        raise OSError("no state today")


def fail_in_the_background(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Starts a save whose write fails, and waits until it has failed."""
    with monkeypatch.context() as patch:
        fail(patch, commit, "publish", errno.EIO)
        save_steps(manager, step)
        for thread in threading.enumerate():
            if thread.name.startswith("ckpt_hooks"):
                thread.join()


@pytest.mark.parametrize("call", ["steps", "latest_step", "save", "restore", "wait"])
def test_a_background_failure_is_raised_once_and_the_run_goes_on(
    make: Make, run: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A failed background save is raised once, by the next call whatever it is, with its cause; then all goes on."""
    manager = make(async_save=True)
    save_steps(manager, 1)
    manager.wait()
    fail_in_the_background(manager, monkeypatch, 2)
    with pytest.raises(SaveFailedError, match=r"run/2 failed: .*Input/output error") as error:
        getattr(manager, call)(*((2, state_at(2)) if call == "save" else ()))
    assert isinstance(error.value.__cause__, OSError)
    assert manager.steps() == [1]
    assert [path.name for path in run.iterdir()] == ["1"]
    save_steps(manager, 2)
    manager.wait()
    assert manager.steps() == [1, 2]


@pytest.fixture
def in_flight(make: Make, monkeypatch: pytest.MonkeyPatch) -> CheckpointManager:
    """A manager whose save of step 5 is being written, for a while yet."""
    manager, fsync, may_end = make(async_save=True), os.fsync, threading.Event()

    def waiting(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():  # which makes the directory
            may_end.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", waiting)
    save_steps(manager, 5)
    threading.Timer(0.3, may_end.set).start()
    return manager


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_in_flight_counts(in_flight: CheckpointManager, step: int) -> None:
    """A save that is not above the one in flight is refused, and does not take the run back."""
    with pytest.raises(InvalidArgumentError, match="has step 5 already"):
        save_steps(in_flight, step)
    assert in_flight.steps() == [5]


def test_a_step_in_flight_can_be_deleted(in_flight: CheckpointManager) -> None:
    """It is waited for, and then removed, rather than not found and committed afterwards."""
    in_flight.delete(5)
    assert in_flight.steps() == []


def test_close_raises_a_failure_and_unlocks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() raises the failure of the last save, and gives the lock back all the same."""
    manager = make(async_save=True)
    fail_in_the_background(manager, monkeypatch, 1)
    with pytest.raises(SaveFailedError):
        manager.close()
    save_steps(make(), 1)


def test_close_commits_what_is_in_flight(make: Make) -> None:
    """close() waits for the save in flight; afterwards the manager still reads."""
    manager = make(async_save=True)
    save_steps(manager, 1)
    manager.close()
    manager.close()
    assert manager.steps() == [1]
    assert_is_state_at(1, manager.restore())


def test_an_object_that_fails_to_give_its_state_stops_the_save(make: Make, run: Path) -> None:
    """What get_state raises comes out of save, with the item's name, and nothing is left of the save."""
    manager = make()
    with pytest.raises(OSError, match="no state today") as error:
        manager.save(1, state_at(1), data=Exploding())
    assert any("'data'" in note for note in error.value.__notes__)
    assert manager.steps() == []
    assert not run.exists()
    save_steps(manager, 1)


def test_a_refused_state_leaves_nothing_and_moves_nothing(tmp_path: Path) -> None:
    """A leaf that cannot be saved is refused before the run's directory is made or a damaged step set aside."""
    with CheckpointManager(tmp_path / "run") as manager, pytest.raises(ValueError, match="f: a function"):
        manager.save(1, {"params": {"f": print}})
    assert not (tmp_path / "run").exists()


def test_a_run_with_only_rejected_steps_left_is_not_empty(tmp_path: Path) -> None:
    """After the step that was restored instead is deleted, a damaged one that is left still forbids a fresh start."""
    with CheckpointManager(tmp_path, keep=None) as manager:
        for step in (1, 2):
            manager.save(step, {"params": {"w": np.arange(1000) + step}})
        manager.wait()
        (tmp_path / "2" / "params" / "manifest.ocdbt").unlink()
        assert manager.restore()["params"]["w"][0] == 1
        manager.delete(1)
        with pytest.raises(NoValidCheckpointError, match=r"step 2: .*manifest"):
            manager.restore()


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason that lies with this process is raised, and no older checkpoint is taken for the newest."""
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"params": {"w": np.arange(1000) + step}})
        manager.wait()
        fail(monkeypatch, os, "open", errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            manager.restore()
        monkeypatch.undo()
        assert manager.restore()["params"]["w"][0] == 2
