"""The one object of a training loop: when it saves, how it resumes, what it costs, and how it fails."""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_hooks import CheckpointHook, CheckpointManager, errors
from ckpt_hooks.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    NoValidCheckpointError,
    SaveFailedError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.storage import commit
from tests.stateful import Counter

MakeHook = Callable[..., CheckpointHook]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeHook]:
    """Makes hooks of one run that leave the signals alone, and closes them at the end."""
    hooks: list[CheckpointHook] = []

    def make_hook(**options: Any) -> CheckpointHook:
        defaults = {"keep": None, "async_save": False, "save_on_preemption": False}
        hooks.append(CheckpointHook(tmp_path / "run", **{**defaults, **options}))
        return hooks[-1]

    yield make_hook
    for hook in hooks:
        hook.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state_at(step: int) -> dict[str, Any]:
    return {"w": np.full(3, step, np.float32), "step": np.int32(step % 1000)}


def saves(hook: CheckpointHook, steps: Sequence[int]) -> list[int]:
    """The steps at which the hook said that it saved."""
    return [step for step in steps if hook(step, state_at(step))]


def damage(step_directory: Path) -> None:
    (step_directory / "w" / "manifest.ocdbt").write_bytes(b"")


# ------------------------------------------------------------------ triggers


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"every_n_steps": 10}, range(1, 36), [10, 20, 30]),
        ({"every_n_steps": 1}, range(1, 5), [1, 2, 3, 4]),
        ({"on_steps": (3, 17, 4)}, range(1, 36), [3, 4, 17]),
        ({"every_n_steps": 10, "on_steps": [7, 20]}, range(1, 36), [7, 10, 20, 30]),
        ({"every_n_steps": 10}, range(0, 100, 7), [0, 14, 21, 35, 42, 56, 63, 70, 84, 91]),
        ({"every_n_steps": 10}, [95, 96, 99, 100, 350, 351], [95, 100, 350]),
        ({"on_steps": [5, 6, 7]}, [4, 8, 9], [8]),
        ({}, range(200, 2400, 200), [1000, 2000]),
    ],
)
def test_true_exactly_where_a_save_was_started(make: MakeHook, options: Any, steps: Any, expected: list[int]) -> None:
    """The hook says True at the steps that reach or jump over a mark, and there are checkpoints of just these."""
    hook = make(**options)
    assert saves(hook, steps) == expected
    assert hook.manager.steps() == expected


def test_every_secs(make: MakeHook, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is due when the seconds have passed since the last save, whichever trigger that had."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    hook = make(every_secs=60, on_steps=[4])
    times = {1: 159.0, 2: 160.0, 3: 219.0, 4: 219.5, 5: 279.0, 6: 280.0}
    due = []
    for step, secs in times.items():
        now = secs
        if hook(step, state_at(step)):
            due.append(step)
    assert due == [2, 4, 6]


def test_a_restore_counts_as_a_save_for_time(make: MakeHook, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore the period starts anew."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    hook = make(every_secs=60)
    hook.save(1, state_at(1))
    now = 150.0
    hook.restore(state_at(0))
    now = 170.0
    assert not hook(2, state_at(2))
    now = 211.0
    assert hook(3, state_at(3))


def test_a_loop_that_goes_back_saves_where_it_is_due(make: MakeHook) -> None:
    """After a rollback, a loop that goes on from an earlier step is due at that step's next mark."""
    hook = make(every_n_steps=10)
    assert saves(hook, range(1, 36)) == [10, 20, 30]
    hook.manager.rollback(10)
    assert saves(hook, range(11, 36)) == [20, 30]


def test_the_same_step_is_saved_once(make: MakeHook) -> None:
    """Calling again at the step that was just saved, or just restored, starts no second save."""
    hook = make(every_n_steps=10)
    assert saves(hook, [10, 10, 11]) == [10]
    hook.close()
    hook = make(every_n_steps=10)
    hook.restore(state_at(0))
    assert saves(hook, [10, 11, 20]) == [20]


def test_an_explicit_save_resets_the_triggers(make: MakeHook) -> None:
    """save() saves whatever the triggers say, and the next mark counts from there."""
    hook = make(every_n_steps=10)
    hook.save(13, state_at(13), metrics={"loss": 1.0}, metadata={"why": "asked"})
    assert hook.manager.metadata(13).custom_metadata == {"step": 13, "metrics": {"loss": 1.0}, "why": "asked"}
    assert saves(hook, [14, 20]) == [20]
    hook.save(5, state_at(5), force=True)
    assert hook.manager.steps() == [5]


def test_a_jump_over_very_many_marks(make: MakeHook) -> None:
    """A loop that starts far on, or jumps far, is due there once, and finds its next mark at once."""
    hook = make(every_n_steps=1, on_steps=[10**12 + 5])
    assert saves(hook, [10**12, 10**12, 10**12 + 1, 10**15]) == [10**12, 10**12 + 1, 10**15]


@pytest.mark.parametrize("step", [np.int64(10), jnp.int32(10), np.array(10)])
def test_integers_of_numpy_and_jax_are_steps(make: MakeHook, step: Any) -> None:
    """A step that NumPy or JAX counted is taken, and recorded as a Python int."""
    hook = make(every_n_steps=10)
    assert hook(step, state_at(10)) is True
    assert hook.manager.steps() == [10]
    assert hook.manager.metadata(10).custom_metadata["step"] == 10


# ------------------------------------------------------------------ nothing due


def calls_during(action: Callable[[], object]) -> list[str]:
    """The names of all functions, Python's and C's, that are called."""
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)
        elif event == "c_call" and argument is not sys.setprofile:
            called.append(getattr(argument, "__qualname__", repr(argument)))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return called


class Untouchable:
    """Anything done with it fails."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"touched: {name}")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_call_with_nothing_due_does_next_to_nothing(make: MakeHook, async_save: bool) -> None:
    """Where nothing is due, the hook calls at most 3 functions, and touches neither state nor metrics."""
    hook = make(every_n_steps=1000, async_save=async_save, save_on_preemption=True)
    hook(1, state_at(1))
    touchy = Untouchable()
    called = calls_during(lambda: hook(2, touchy, metrics=touchy, metadata=touchy, data=touchy))
    assert len(called) <= 1 + 1 + 3, called  # the lambda, the hook itself, and what it calls


def test_a_call_with_nothing_due_stays_cheap_after_a_save(make: MakeHook, run: Path) -> None:
    """Neither a save nor a restore makes the calls after it dearer, and nothing is written."""
    hook = make(every_n_steps=10, async_save=True)
    hook(10, state_at(10))
    hook.wait()
    hook.restore(state_at(0))
    before = sorted(run.rglob("*"))
    for step in range(11, 20):
        assert len(calls_during(lambda step=step: hook(step, Untouchable()))) <= 5  # type: ignore[misc]
    assert sorted(run.rglob("*")) == before


def test_a_hook_that_never_saves_makes_no_directory(make: MakeHook, run: Path) -> None:
    """Restoring in an empty run and calls with nothing due leave no directory behind."""
    hook = make(every_n_steps=10)
    hook.restore(state_at(0))
    hook(1, state_at(1))
    hook.close()
    assert not run.exists()


# ------------------------------------------------------------------ resuming


def test_an_empty_run_restores_the_state_itself(make: MakeHook) -> None:
    """In an empty run, restore returns the very object, and the loop starts at 0."""
    hook = make()
    state = state_at(0)
    assert hook.restore(state) is state
    assert hook.start_step == 0


def test_resume_goes_on_where_the_run_stopped(make: MakeHook) -> None:
    """start_step is the restored step, the state is that step's, and the next mark is the one after it."""
    hook = make(every_n_steps=10)
    saves(hook, range(1, 28))
    hook.close()
    hook = make(every_n_steps=10)
    assert hook.start_step == 0
    restored = hook.restore(state_at(0))
    assert hook.start_step == 20
    np.testing.assert_array_equal(restored["w"], np.full(3, 20.0))
    assert saves(hook, range(hook.start_step + 1, 45)) == [30, 40]


def test_objects_are_resumed_with_the_state(make: MakeHook) -> None:
    """Stateful objects passed to the call are saved, and set in place by restore."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1), data=Counter(17))
    data = Counter()
    hook.restore(state_at(0), data=data)
    assert data.position == 17
    other = Counter()
    hook.restore_or_init(lambda: state_at(0), data=other)
    assert other.position == 17


def test_a_fallback_starts_at_the_step_that_was_restored(make: MakeHook, run: Path) -> None:
    """After a fallback, start_step and the triggers go by the older checkpoint, and its successor is saved anew."""
    hook = make(every_n_steps=10)
    saves(hook, range(1, 21))
    damage(run / "20")
    hook.restore(state_at(0))
    assert hook.start_step == 10
    assert saves(hook, range(11, 31)) == [20, 30]
    assert hook.manager.steps() == [10, 20, 30]
    assert (run / "20.damaged").is_dir()


def test_restore_never_starts_afresh_where_all_fail(make: MakeHook, run: Path) -> None:
    """Where there are checkpoints and none verifies, restore and restore_or_init raise, each time."""
    hook = make(every_n_steps=10)
    saves(hook, range(1, 21))
    damage(run / "10")
    damage(run / "20")
    for _ in range(2):
        with pytest.raises(NoValidCheckpointError):
            hook.restore(state_at(0))
        with pytest.raises(NoValidCheckpointError):
            hook.restore_or_init(lambda: state_at(0))
    assert hook.start_step == 0


def test_restore_of_a_state_that_does_not_fit_raises(make: MakeHook) -> None:
    """A state of another structure is a StructureMismatchError, and no fresh start."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1))
    with pytest.raises(StructureMismatchError):
        hook.restore({"w": np.zeros(4, np.float32), "step": np.int32(0)})


def test_a_restore_waits_for_the_save_in_flight(make: MakeHook) -> None:
    """Restoring right after an asynchronous save gives what was just saved."""
    hook = make(every_n_steps=1, async_save=True)
    hook(1, state_at(1))
    np.testing.assert_array_equal(hook.restore(state_at(0))["w"], np.full(3, 1.0))


# ------------------------------------------------------------------ restore_or_init


class Recorder:
    """An init function that records how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, key: Any, sizes: Any, name: str) -> dict[str, Any]:
        self.calls.append((key, sizes, name))
        assert isinstance(sizes, tuple)
        assert type(name) is str
        return {"w": jax.random.normal(key, sizes), "b": jnp.zeros(len(name))}


def test_an_empty_run_is_initialised(make: MakeHook) -> None:
    """In an empty run, restore_or_init returns what init_fn returns for these arguments."""
    init = Recorder()
    key = jax.random.key(0)
    state = make().restore_or_init(init, key, (3, 2), "abc")
    assert state["w"].shape == (3, 2)
    assert not isinstance(state["w"], jax.core.Tracer)
    assert init.calls == [(key, (3, 2), "abc")]


def test_a_run_that_is_emptied_before_it_is_read_is_initialised(make: MakeHook, run: Path) -> None:
    """Where its only checkpoint has gone when it is to be read, restore_or_init builds the first state all the same."""
    hook = make()
    hook.save(7, {"w": jnp.ones(3)})
    hook.wait()

    def init() -> dict[str, Any]:
        shutil.rmtree(run / "7", ignore_errors=True)  # by somebody else, once the hook knows that it is there
        return {"w": jnp.zeros(3)}

    state = hook.restore_or_init(init)
    np.testing.assert_array_equal(state["w"], np.zeros(3))
    assert hook.start_step == 0


def test_a_run_is_restored_without_building_an_initial_state(make: MakeHook) -> None:
    """Where there is a checkpoint, init_fn sees only tracers: no initial array is built."""
    hook = make()
    saved = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(3)}
    hook.save(7, saved)
    init = Recorder()
    state = hook.restore_or_init(init, jax.random.key(0), (3, 2), "abc")
    ((key, sizes, name),) = init.calls
    assert isinstance(key, jax.core.Tracer)
    assert (sizes, name) == ((3, 2), "abc")
    assert isinstance(state["w"], jax.Array)
    np.testing.assert_array_equal(state["w"], saved["w"])
    assert hook.start_step == 7


def test_a_jitted_init_is_not_run_and_keeps_its_shardings(make: MakeHook) -> None:
    """A jitted init_fn is only evaluated abstractly, with its static arguments, and its out_shardings are kept."""
    hook = make()
    hook.save(7, {"w": jnp.arange(4.0)})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    ran = []

    def init(size: int) -> dict[str, jax.Array]:
        jax.debug.callback(lambda: ran.append(size))
        return {"w": jnp.zeros(size)}

    state = hook.restore_or_init(jax.jit(init, static_argnums=0, out_shardings=sharding), 4)
    jax.effects_barrier()
    assert ran == []
    assert state["w"].sharding == sharding
    np.testing.assert_array_equal(state["w"], np.arange(4.0))


@pytest.mark.parametrize("is_jitted", [False, True])
def test_explicit_axes_are_kept(make: MakeHook, is_jitted: bool) -> None:
    """What init_fn makes on explicit axes, as jax.make_mesh makes them, is restored onto the mesh of jax.set_mesh."""
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("x")

    def init() -> dict[str, Any]:
        return {"w": jax.sharding.reshard(jnp.zeros(4), spec), "key": jax.random.key(0)}

    with jax.set_mesh(mesh):
        hook = make()
        hook.save(7, {"w": jnp.arange(4.0), "key": jax.random.key(1)})
        state = hook.restore_or_init(jax.jit(init) if is_jitted else init)
    assert hook.start_step == 7
    assert state["w"].sharding == jax.sharding.NamedSharding(mesh, spec)
    np.testing.assert_array_equal(state["w"], np.arange(4.0))
    assert state["key"] == jax.random.key(1)


def test_what_init_places_itself_keeps_its_sharding(make: MakeHook) -> None:
    """Arrays that are made on named devices, as by make_array_from_callback, go there also when they are restored."""
    hook = make()
    key = jax.random.key(1)
    hook.save(7, {"w": jnp.arange(4.0), "key": key, "abstract": jnp.ones(2)})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(jax.random.key(0), sharding)

    def init() -> dict[str, Any]:
        zeros = np.zeros(4, np.float32)
        return {
            "w": jax.make_array_from_callback((4,), sharding, lambda index: zeros[index]),
            "key": placed,
            "abstract": jax.ShapeDtypeStruct((2,), np.float32, sharding=sharding),
        }

    state = hook.restore_or_init(init)
    assert [array.sharding for array in state.values()] == [sharding] * 3
    np.testing.assert_array_equal(state["w"], np.arange(4.0))
    assert state["key"] == key


def test_arguments_of_init_may_be_anything(make: MakeHook) -> None:
    """Models, optimisers, None and numbers reach init_fn as they are, dicts of arrays as tracers."""
    hook = make()
    hook.save(7, {"w": jnp.arange(4.0)})
    model = object()

    def init(given_model: object, size: int, nothing: None, batch: dict[str, Any]) -> dict[str, jax.Array]:
        assert given_model is model
        assert nothing is None
        assert batch["x"].shape == (2,)
        return {"w": jnp.zeros(size)}

    state = hook.restore_or_init(init, model, 4, None, {"x": np.ones(2)})
    np.testing.assert_array_equal(state["w"], np.arange(4.0))


# ------------------------------------------------------------------ metrics and metadata


def collection() -> Any:
    kinds = {"loss": clu.metrics.Average.from_output("loss"), "accuracy": clu.metrics.Accuracy}
    return clu.metrics.Collection.create(**kinds).single_from_model_output(
        loss=jnp.array([0.25, 0.75]), logits=jnp.eye(2), labels=jnp.array([0, 1])
    )


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"loss": 0.5, "n": 3}, {"loss": 0.5, "n": 3}),
        ({"loss": np.float32(0.5), "n": np.int64(3)}, {"loss": 0.5, "n": 3}),
        ({"loss": jnp.float32(0.5), "n": jnp.array([3])}, {"loss": 0.5, "n": 3}),
        ({"loss": jnp.bfloat16(0.5), "ok": np.True_}, {"loss": 0.5, "ok": True}),
        ({"a": float("nan"), "b": jnp.inf, "c": np.float32(-np.inf)}, {"a": "NaN", "b": "Infinity", "c": "-Infinity"}),
        (collection, {"loss": 0.5, "accuracy": 1.0}),
        (lambda: collection().compute(), {"loss": 0.5, "accuracy": 1.0}),
    ],
    ids=["none", "empty", "python", "numpy", "jax", "odd", "not_finite", "collection", "computed"],
)
def test_metrics_become_finite_json_numbers(make: MakeHook, metrics: Any, expected: dict[str, Any]) -> None:
    """Metrics may be Python, NumPy or JAX scalars or a clu Collection; NaN and infinities become named strings."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1), metrics=metrics() if callable(metrics) else metrics)
    metadata = hook.manager.metadata(1)
    assert metadata.custom_metadata == {"step": 1, "metrics": expected}
    assert metadata.metrics == expected
    assert {k: type(v) for k, v in metadata.metrics.items()} == {k: type(v) for k, v in expected.items()}


def test_metadata_stands_beside_step_and_metrics(make: MakeHook) -> None:
    """custom_metadata is exactly step, metrics, and the user's own keys."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1), metrics={"loss": 0.5}, metadata={"lr": 0.1, "notes": ["a", {"b": None}]})
    expected = {"step": 1, "metrics": {"loss": 0.5}, "lr": 0.1, "notes": ["a", {"b": None}]}
    assert hook.manager.metadata(1).custom_metadata == expected


def test_metrics_may_come_after_the_save(make: MakeHook) -> None:
    """record_metrics adds what an evaluation found later."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1), metrics={"loss": 0.5})
    hook.record_metrics(1, {"accuracy": 0.75})
    assert hook.manager.metadata(1).metrics == {"loss": 0.5, "accuracy": 0.75}


# ------------------------------------------------------------------ failures


class FullDisk:
    """While it is broken, no checkpoint can be committed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_broken = False
        publish = commit.publish

        def break_or_publish(*arguments: Any, **options: Any) -> None:
            if self.is_broken:
                raise OSError(5, "Input/output error")
            publish(*arguments, **options)

        monkeypatch.setattr(commit, "publish", break_or_publish)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def let_saves_end() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("ckpt_hooks"):
            thread.join()


def test_a_background_failure_is_raised_once_and_then_it_goes_on(make: MakeHook, disk: FullDisk) -> None:
    """A failed background save is raised at the very next call, due or not, once; the next mark is saved again."""
    hook = make(every_n_steps=10, async_save=True)
    disk.is_broken = True
    assert hook(10, state_at(10))
    let_saves_end()
    disk.is_broken = False
    with pytest.raises(SaveFailedError, match=r"run/10 failed.*Input/output") as error:
        hook(11, state_at(11))
    assert isinstance(error.value.__cause__, OSError)
    assert saves(hook, range(12, 31)) == [20, 30]
    hook.wait()
    assert hook.manager.steps() == [20, 30]


@pytest.mark.parametrize("async_save", [False, True])
def test_on_save_error_warn_logs_and_tries_again(
    make: MakeHook, disk: FullDisk, caplog: pytest.LogCaptureFixture, async_save: bool
) -> None:
    """With on_save_error="warn", training goes on, the log says why, and the next mark is tried again."""
    hook = make(every_n_steps=10, async_save=async_save, on_save_error="warn")
    disk.is_broken = True
    with caplog.at_level(logging.ERROR, "ckpt_hooks.hook"):
        assert hook(10, state_at(10)) is async_save  # a save in this thread is known to have failed
        let_saves_end()
        disk.is_broken = False
        assert not hook(11, state_at(11))
    (record,) = (r for r in caplog.records if r.name == "ckpt_hooks.hook")
    assert "Input/output error" in record.getMessage()
    assert "10" in record.getMessage()
    assert saves(hook, range(12, 21)) == [20]
    hook.wait()
    assert hook.manager.steps() == [20]


def test_on_save_error_raise_raises_in_this_thread(make: MakeHook, disk: FullDisk) -> None:
    """A save that fails in this thread raises there, and is not tried again before the next mark."""
    hook = make(every_n_steps=10)
    disk.is_broken = True
    with pytest.raises(OSError, match="Input/output error"):
        hook(10, state_at(10))
    disk.is_broken = False
    assert saves(hook, range(11, 21)) == [20]


@pytest.mark.parametrize("bad", [{"metrics": {"loss": "low"}}, {"metadata": {"a": object()}}, {"data": np.ones(2)}])
def test_a_programmers_mistake_raises_also_with_warn(make: MakeHook, bad: Any) -> None:
    """on_save_error="warn" does not hide arguments that can never be saved."""
    hook = make(every_n_steps=1, on_save_error="warn")
    with pytest.raises(TypeError):
        hook(1, state_at(1), **bad)


def test_an_unsupported_leaf_raises_also_with_warn(make: MakeHook) -> None:
    """A state that can never be saved raises at its first save, whatever on_save_error says."""
    hook = make(every_n_steps=1, on_save_error="warn")
    with pytest.raises(UnsupportedLeafError):
        hook(1, {"w": object()})


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_steps": -1}, "every_n_steps"),
        ({"every_n_steps": 1.5}, "every_n_steps"),
        ({"every_n_steps": True}, "every_n_steps"),
        ({"every_secs": 0}, "every_secs"),
        ({"every_secs": float("nan")}, "every_secs"),
        ({"every_secs": "1"}, "every_secs"),
        ({"on_steps": [-1]}, "on_steps"),
        ({"on_steps": [1.5]}, "on_steps"),
        ({"on_save_error": "ignore"}, "on_save_error"),
        ({"keep": 0}, "keep"),
        ({"keep": "all"}, "keep"),
        ({"async_save": True, "timeout_secs": 0}, "timeout_secs"),
        ({"preemption_signals": (999,), "save_on_preemption": True}, "preemption_signals"),
        ({"preemption_signals": (signal.SIGKILL,), "save_on_preemption": True}, "preemption_signals"),
        ({"preemption_signals": signal.SIGTERM, "save_on_preemption": True}, "preemption_signals"),
        ({"preemption_signals": None, "save_on_preemption": True}, r"\(signal.SIGTERM,\), or \(\) for none; got None"),
    ],
)
def test_options_without_sense_are_refused_when_the_hook_is_made(
    make: MakeHook, run: Path, options: Any, message: str
) -> None:
    """An option that cannot be meant is a ValueError or TypeError that names it, and nothing is created."""
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make(**options)
    assert isinstance(error.value, CheckpointError)
    assert not run.exists()


@pytest.mark.parametrize("step", [-1, True, 3.0, 2.5, "3", None, np.float32(3), np.True_, np.array([1, 2])], ids=repr)
@pytest.mark.parametrize("method", ["__call__", "save", "record_metrics"])
def test_a_step_that_is_no_count_is_refused(make: MakeHook, run: Path, method: str, step: Any) -> None:
    """A step that is negative or no int is refused at the first call, also where nothing is due."""
    hook = make(every_n_steps=1000)
    with pytest.raises(ValueError if type(step) is int else TypeError, match="step"):
        getattr(hook, method)(step, {"loss": 0.5})
    assert not run.exists()


def test_a_directory_that_is_a_file_is_refused_when_the_hook_is_made(tmp_path: Path) -> None:
    """A directory that is a file is an OSError that says so and what to do."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file is a file; .*Choose another path"):
        CheckpointHook(tmp_path / "file")
    with CheckpointHook(tmp_path / "file" / "run", every_n_steps=1, save_on_preemption=False) as hook:
        assert hook.manager.steps() == []
        with pytest.raises(OSError, match=r"cannot make directory .*file/run.*Choose"):
            hook(1, state_at(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    """A run at a link to nothing is an OSError that says so: nobody knows where it should be made."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"link is a link to nothing; .*Choose another path"):
        CheckpointHook(tmp_path / "link")


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    """A misspelt option is a TypeError."""
    with pytest.raises(TypeError, match="every_steps"):
        CheckpointHook(tmp_path, every_steps=3)  # type: ignore[call-arg]


# ------------------------------------------------------------------ context manager


def train_one_step(run: Path, error: BaseException | None, **options: Any) -> None:
    """A loop that saves its first step and then ends, or fails with `error`."""
    with CheckpointHook(run, every_n_steps=1, **options) as hook:
        hook(1, state_at(1))
        if error is not None:
            raise error


def test_leaving_the_context_commits(run: Path) -> None:
    """At the end of the with block the last asynchronous save is committed and the run's lock given back."""
    with CheckpointHook(run, every_n_steps=1) as hook:
        hook(1, state_at(1))
    assert CheckpointManager(run).steps() == [1]
    with CheckpointHook(run, every_n_steps=1) as hook:
        assert hook(2, state_at(2))


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_leaving_by_an_exception_commits_and_lets_it_pass(run: Path, error: BaseException) -> None:
    """An exception in the loop is not swallowed or replaced, and the save in flight is committed all the same."""
    with pytest.raises(type(error)) as raised:
        train_one_step(run, error)
    assert raised.value is error
    assert CheckpointManager(run).steps() == [1]


def test_a_failed_save_does_not_hide_the_error_of_the_loop(run: Path, disk: FullDisk) -> None:
    """Where the loop and the last save both failed, the loop's error is raised, and a note tells of the save."""
    disk.is_broken = True
    with pytest.raises(RuntimeError, match="crash") as raised:
        train_one_step(run, RuntimeError("crash"))
    assert type(raised.value) is RuntimeError
    assert any("Input/output error" in note for note in raised.value.__notes__)


def test_a_failed_save_at_the_end_is_raised_by_the_context(run: Path, disk: FullDisk) -> None:
    """A last save that failed is raised at the end of the with block, also with on_save_error="warn"."""
    disk.is_broken = True
    for option in ("raise", "warn"):
        with pytest.raises(SaveFailedError):
            train_one_step(run, None, on_save_error=option)


def test_close_twice_and_read_after(make: MakeHook) -> None:
    """close() may be called twice, and the manager still reads afterwards."""
    hook = make(every_n_steps=1)
    hook(1, state_at(1))
    hook.close()
    hook.close()
    assert hook.manager.latest_step() == 1


def test_errors_are_checkpoint_errors_and_builtins() -> None:
    """What the hook's users catch: each error is a CheckpointError and the builtin that they know."""
    assert issubclass(SaveFailedError, RuntimeError)
    assert issubclass(CheckpointNotFoundError, FileNotFoundError)
    assert issubclass(InvalidArgumentError, ValueError)
    assert all(issubclass(e, CheckpointError) for e in (SaveFailedError, CheckpointNotFoundError, InvalidArgumentError))


@pytest.mark.parametrize("name", sorted({*errors.__all__} - {"Preempted"}))
def test_every_error_is_made_of_its_text(name: str) -> None:
    """As one that has come from another process is."""
    assert str(getattr(errors, name)("a text")) == "a text"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_can_be_sent_to_another_process(name: str) -> None:
    """A pool of processes pickles what was raised: its class, text, notes, number and step come back."""
    kind = getattr(errors, name)
    arguments = {"StorageError": (errno.EIO, "a text"), "Preempted": (1200,)}.get(name, ("a text",))
    error = kind(*arguments)
    error.add_note("a note")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert (str(copied), vars(copied)) == (str(error), vars(error))
    for attribute in ("errno", "code"):
        assert getattr(copied, attribute, None) == getattr(error, attribute, None)
