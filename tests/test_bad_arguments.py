"""Arguments that cannot be meant: each is refused by its name, before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from clu import metrics as clu_metrics
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_hooks
from ckpt_hooks import (
    AsyncCheckpointer,
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    FileOptions,
    InitFrom,
    MultiprocessingOptions,
    RunAhead,
    ShuffledIndices,
    StandardCheckpointHandler,
)
from ckpt_hooks.errors import (
    CheckpointError,
    CorruptCheckpointError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotSerializableError,
    UnsupportedLeafError,
)
from ckpt_hooks.testing import assert_same
from tests.stateful import Counter

STATE = {"params": {"w": np.arange(3.0)}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(10, STATE)
        manager.save(20, STATE)
    return tmp_path / "run"


# ------------------------------------------------------------------ of a checkpointer


@pytest.mark.parametrize("timeout_secs", ["10", None, True, 0, -1, float("nan"), float("inf")])
def test_what_bounds_no_wait_is_refused(tmp_path: Path, timeout_secs: Any) -> None:
    """By its name, wherever it can be given."""
    for make in (
        lambda: AsyncCheckpointer(StandardCheckpointHandler(), timeout_secs=timeout_secs),
        lambda: CheckpointManager(tmp_path, timeout_secs=timeout_secs),
        lambda: CheckpointHook(tmp_path, timeout_secs=timeout_secs),
    ):
        with pytest.raises((InvalidArgumentError, InvalidArgumentTypeError), match=r"^timeout_secs is a"):
            make()


@pytest.mark.parametrize("checkpointer", [Checkpointer, AsyncCheckpointer])
@pytest.mark.parametrize("option", ["multiprocessing_options", "file_options"])
def test_options_of_another_kind_are_refused(checkpointer: type[Checkpointer], option: str) -> None:
    """A dict of options, or another library's object, is told which class it has to be."""
    given: dict[str, Any] = {option: {"timeout_secs": 3}}
    with pytest.raises(InvalidArgumentTypeError, match=rf"{option} is a \w+, or None"):
        checkpointer(StandardCheckpointHandler(), **given)


@pytest.mark.parametrize("handler", [StandardCheckpointHandler, None, {}, print], ids=str)
def test_what_is_no_handler_is_refused(handler: Any) -> None:
    """A class that was meant to be called, and what can neither save nor restore, is told what a handler is."""
    for make in (Checkpointer, AsyncCheckpointer):
        with pytest.raises(InvalidArgumentTypeError, match=r"a handler is an object, as \w+\(\) is; got"):
            make(handler)


# ------------------------------------------------------------------ paths


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"run"


@pytest.mark.parametrize("path", [None, 3, ["run"], b"run", BytesPath(), object()], ids=lambda path: repr(path)[:9])
@pytest.mark.parametrize("call", [CheckpointManager, CheckpointHook, ckpt_hooks.restore, InitFrom])
def test_what_is_no_path_is_refused(call: Callable[[Any], Any], path: Any) -> None:
    """By its value, as a TypeError that says what a path is."""
    with pytest.raises(InvalidArgumentTypeError, match=r"path|a run, a checkpoint"):
        call(path)


@pytest.mark.parametrize("call", [CheckpointManager, CheckpointHook, ckpt_hooks.restore, InitFrom])
def test_an_empty_path_is_not_the_working_directory(
    call: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that nobody has set does not make checkpoints wherever the program was started; "." still does."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r'is "", which names no directory'):
        call("")
    with CheckpointManager(".") as manager:
        assert manager.directory == tmp_path


@pytest.mark.parametrize("part", ["20", "20/params"])
@pytest.mark.parametrize("kind", [CheckpointManager, CheckpointHook])
def test_a_checkpoint_given_for_a_run_is_refused_and_the_run_named(run: Path, part: str, kind: Any) -> None:
    """Not an empty run, in which training would begin afresh and save into the checkpoint."""
    before = sorted(path for path in run.rglob("*"))
    with pytest.raises(InvalidArgumentError, match=f"{run / part} is one checkpoint.* The run is {run};"):
        kind(run / part)
    assert sorted(path for path in run.rglob("*")) == before
    os.rename(run / "20", run.parent / "copied")
    with pytest.raises(InvalidArgumentError, match=r"copied is one checkpoint.* Give the directory of a run"):
        kind(run.parent / "copied")


def test_a_run_beside_other_checkpoints_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    """A directory in which somebody else's checkpoint lies, under a name that is no step, may become a run."""
    os.makedirs(tmp_path / "new")
    os.rename(run / "20" / "params", tmp_path / "new" / "pretrained")
    with CheckpointManager(tmp_path / "new") as manager:
        manager.save(1, STATE)
        manager.wait()
        assert manager.steps() == [1]


# ------------------------------------------------------------------ states


def _with_hook(run: Path) -> None:
    with CheckpointHook(run, every_n_steps=1) as hook:
        hook(30, None)


def _with_bound(run: Path) -> None:
    with CheckpointHook(run, every_n_steps=1) as hook:
        hook.bind(lambda: None)(30)


def _with_manager(run: Path) -> None:
    with CheckpointManager(run) as manager:
        manager.save(30, None)


def _restored(run: Path) -> None:
    with CheckpointHook(run) as hook:
        hook.restore(None)


def _made(run: Path) -> None:
    with CheckpointHook(run) as hook:
        hook.restore_or_init(lambda: None)


@pytest.mark.parametrize("call", [_with_hook, _with_bound, _with_manager, _restored, _made])
@pytest.mark.parametrize("is_empty", [False, True])
def test_none_is_no_state(run: Path, tmp_path: Path, call: Callable[[Path], None], is_empty: bool) -> None:
    """The result of a function that forgot to return is neither saved nor restored into; a `None` within a state is."""
    with pytest.raises(InvalidArgumentTypeError, match=r"the state is None\..*return"):
        call(tmp_path / "empty" if is_empty else run)
    assert CheckpointManager(run).steps() == [10, 20]
    assert not (tmp_path / "empty").exists()
    state = {"ema": None, "params": [None, np.ones(2)]}
    with CheckpointHook(tmp_path / "empty", every_n_steps=1) as hook:
        hook(1, state)
        hook.wait()
        assert_same(state, hook.restore({"ema": None, "params": [None, np.zeros(2)]}))


@pytest.mark.parametrize("init", [STATE, None, 3])
def test_what_makes_no_state_is_told_before_the_run_is_read(tmp_path: Path, init: Any) -> None:
    """A state where its function belongs names both calls."""
    with (
        CheckpointHook(tmp_path) as hook,
        pytest.raises(InvalidArgumentTypeError, match=r"restore_or_init\(\) takes a function.* goes to restore\(state"),
    ):
        hook.restore_or_init(init)


@pytest.mark.parametrize("items", [3, 1.5, True])
def test_items_that_are_none_reject_no_checkpoint(run: Path, items: Any) -> None:
    """The mistake is the caller's: no checkpoint is taken for damaged, and none is read."""
    manager = CheckpointManager(run)
    for like in (None, STATE):
        with pytest.raises(InvalidArgumentTypeError, match="items= is a list of names"):
            manager.restore(like, items=items)
    assert manager.steps() == [10, 20]


def test_names_from_a_generator_hold_for_the_older_checkpoint_too(run: Path) -> None:
    """Where the newest is damaged, its fallback is asked for the same items."""
    (run / "20" / "params" / "manifest.ocdbt").write_bytes(b"")
    assert_same(STATE, CheckpointManager(run).restore(items=(name for name in ["params"])))


# ------------------------------------------------------------------ numbers and options


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ShuffledIndices("10", 2), "num_examples is an int; got '10'"),  # type: ignore[arg-type]
        (lambda: ShuffledIndices(10, 2.0), r"batch_size is an int; got 2\.0"),  # type: ignore[arg-type]
        (lambda: ShuffledIndices(10, 2, seed="a"), "seed is an int"),  # type: ignore[arg-type]
        (lambda: ShuffledIndices(10, 2, process_count="1"), "process_count is an int"),  # type: ignore[arg-type]
        (lambda: RunAhead(Counter(), num_ahead=1.5), r"num_ahead is an int; got 1\.5"),  # type: ignore[arg-type]
        (lambda: RunAhead(Counter(), num_ahead=True), "num_ahead is an int; got True"),
        (lambda: RunAhead(Counter(), put=3), "put is a function"),  # type: ignore[arg-type]
        (lambda: MultiprocessingOptions(barrier_timeout_secs="x"), "barrier_timeout_secs is a number of seconds"),  # type: ignore[arg-type]
        (lambda: MultiprocessingOptions(barrier_timeout_secs=True), "barrier_timeout_secs is a number of seconds"),
        (lambda: MultiprocessingOptions(primary_host="0"), "primary_host is an int"),  # type: ignore[arg-type]
        (lambda: MultiprocessingOptions(active_processes=3), "active_processes is a set"),  # type: ignore[arg-type]
        (lambda: MultiprocessingOptions(active_processes={0, "1"}), "each of active_processes is an int"),  # type: ignore[arg-type]
        (lambda: MultiprocessingOptions(barrier_sync_key_prefix=3), "barrier_sync_key_prefix is a string"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_told_by_the_argument(make: Callable[[], Any], text: str) -> None:
    """As a TypeError, when the object is made and not when it is used."""
    with pytest.raises(InvalidArgumentTypeError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RunAhead(Counter(), num_ahead=-1), "num_ahead is at least 0; got -1"),
        (lambda: ShuffledIndices(10, 2, seed=-1), "seed is at least 0"),
        (lambda: MultiprocessingOptions(barrier_timeout_secs=float("inf")), "positive number of seconds; got inf"),
        (lambda: MultiprocessingOptions(primary_host=-1), "primary_host is at least 0"),
        (lambda: MultiprocessingOptions(active_processes=set(), primary_host=None), "active_processes is empty"),
        (lambda: FileOptions(path_permission_mode="750"), "path_permission_mode is a mode such as 0o750"),  # type: ignore[arg-type]
        (lambda: FileOptions(path_permission_mode=-1), "path_permission_mode is a mode such as 0o750"),
    ],
)
def test_wrong_values_are_told_by_the_argument(make: Callable[[], Any], text: str) -> None:
    """As a ValueError, when the object is made and not when it is used."""
    with pytest.raises(InvalidArgumentError, match=text):
        make()


def test_integers_of_numpy_are_integers() -> None:
    """A batch size that comes out of an array will do."""
    batches = RunAhead(ShuffledIndices(np.int64(6), np.int32(2)), num_ahead=np.int64(1))  # type: ignore[arg-type]
    assert len(next(batches)) == 2


@pytest.mark.parametrize("kind", [CheckpointManager, CheckpointHook])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"multiprocessing_options": 3}, "multiprocessing_options is a MultiprocessingOptions, or None; got 3"),
        ({"file_options": {"path_permission_mode": 0o750}}, "file_options is a FileOptions, or None"),
        ({"timeout_secs": "x"}, "^timeout_secs is a number of seconds; got 'x'"),
        ({"timeout_secs": None}, "^timeout_secs is a number of seconds; got None"),
        ({"timeout_secs": 0}, "^timeout_secs is a positive number of seconds; got 0"),
    ],
)
def test_wrong_options_of_a_run_are_told(tmp_path: Path, kind: Any, options: dict[str, Any], text: str) -> None:
    """By their names in the call that has them."""
    with pytest.raises(CheckpointError, match=text) as error:
        kind(tmp_path, **options)
    assert isinstance(error.value, TypeError | ValueError)


def test_a_step_by_another_word_is_told_which_there_are(run: Path) -> None:
    """Beside numbers, a restore knows two words."""
    with pytest.raises(InvalidArgumentTypeError, match=r'"latest" and "best" apart, is an int; got .worst.'):
        CheckpointManager(run).restore(step="worst")  # type: ignore[arg-type]


class Losses(clu_metrics.Collection):
    loss: Any = None


@pytest.mark.parametrize(
    ("metrics", "text"),
    [(Losses, "got the class Losses itself"), (clu_metrics.Average(jnp.float32(1), jnp.float32(1)), "got Average")],
)
def test_metrics_that_are_no_collection_are_told(run: Path, metrics: Any, text: str) -> None:
    """The class of a collection has computed nothing, and one metric alone has no name."""
    with CheckpointManager(run) as manager, pytest.raises(InvalidArgumentTypeError, match=text):
        manager.save(30, STATE, metrics=metrics)


def test_metadata_that_hold_themselves_are_told(run: Path) -> None:
    """As what JSON cannot hold, before anything is written."""
    metadata: dict[str, Any] = {"lr": 0.1}
    metadata["all"] = [metadata]
    with CheckpointManager(run) as manager, pytest.raises(NotSerializableError, match="custom_metadata holds itself"):
        manager.save(30, STATE, metadata=metadata)
    assert CheckpointManager(run).steps() == [10, 20]


def test_steps_that_are_no_row_of_steps(tmp_path: Path) -> None:
    """on_steps=30 says how it is written."""
    with pytest.raises(InvalidArgumentTypeError, match=r"on_steps are steps, as in \(30,\); got 30"):
        CheckpointHook(tmp_path, on_steps=30)  # type: ignore[arg-type]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("content", [5, "text", None, 1.5, True])
def test_a_file_that_msgpack_takes_for_one_value_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    """A file of a few bytes is, as often as not, valid msgpack; only a tree or an array is what Flax wrote."""
    path = tmp_path / "checkpoint_5"
    path.write_bytes(msgpack.packb(content))
    with pytest.raises(CorruptCheckpointError, match=f"{path} is not a msgpack file as Flax .* no tree"):
        ckpt_hooks.restore(path)


@pytest.mark.parametrize("state", [{"w": np.ones(2)}, np.arange(3.0), [np.ones(2), {}]])
def test_trees_and_arrays_of_flax_are_checkpoints(tmp_path: Path, state: Any) -> None:
    """Whatever Flax serializes of arrays comes back, also a bare one."""
    from flax import serialization

    path = tmp_path / "weights.msgpack"
    path.write_bytes(serialization.to_bytes(state))
    like = {"w": np.zeros(2)} if isinstance(state, dict) else state
    assert_same(state, ckpt_hooks.restore(path, like))


# ------------------------------------------------------------------ mistakes of the caller are no damage


def _fails(path: str) -> str:
    raise RuntimeError(f"no name for {path}")


def _sharded(*spec: str | None, num_devices: int = 1) -> jax.ShapeDtypeStruct:
    mesh = jax.sharding.AbstractMesh((num_devices,), ("x",))
    return jax.ShapeDtypeStruct((3,), np.float64, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"like": STATE, "rename": _fails}, "rename=: the function fails for 'params/w': RuntimeError: no name"),
        ({"like": {"params": {"w": _sharded("x", num_devices=2)}}}, "`like`: params/w cannot be sharded so"),
        (
            {"like": {"params": {"w": jax.ShapeDtypeStruct((3,), np.float64, sharding=PartitionSpec("x"))}}},
            "`like`: params/w cannot be sharded so: .*mesh",
        ),
    ],
)
def test_a_mistake_of_the_caller_rejects_no_checkpoint(
    run: Path, options: dict[str, Any], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told as one, by the leaf; the checkpoints are as good as before, and say so."""
    manager = CheckpointManager(run)
    with pytest.raises(InvalidArgumentError, match=text):
        manager.restore(**options)
    assert not caplog.records
    assert manager.steps() == [10, 20]


# ------------------------------------------------------------------ what has no values


def test_a_hook_inside_of_a_traced_function_is_told_by_the_leaf(tmp_path: Path) -> None:
    """There are no values yet, whichever leaves are traced; nothing is written."""
    with CheckpointHook(tmp_path / "run", every_n_steps=1) as hook:

        @jax.jit
        def step(w: jax.Array) -> jax.Array:
            hook(1, {"params": {"w": w, "b": np.ones(2)}})
            return w

        with pytest.raises(UnsupportedLeafError, match=r"w: in a function that JAX traces.*save what"):
            step(jnp.ones(3))
    assert not (tmp_path / "run").exists()


def test_an_abstract_mesh_in_a_target_is_told_by_the_leaf(tmp_path: Path) -> None:
    """It has no devices to go to, which is no fault of the checkpoint."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"params": {"w": np.ones(4, np.float32)}})
        manager.wait()
        mesh = jax.sharding.AbstractMesh((1,), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        like = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)}}
        with pytest.raises(InvalidArgumentError, match="params/w cannot be sharded so"):
            manager.restore(like)
