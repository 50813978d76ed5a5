"""What `flax.training.checkpoints` wrote, msgpack files and Orbax directories, is restored and gone on from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState

import ckpt_hooks
from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom
from ckpt_hooks.cli import main
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    InvalidArgumentError,
    ItemNotFoundError,
    NoValidCheckpointError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.testing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Save = Callable[[Path, Any, int], None]


class Net(nn.Module):
    """Dense, batch norm, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(2, param_dtype=jnp.bfloat16)(x)


class NetState(TrainState):
    batch_stats: Any


MODEL = Net()
OPTIMIZER = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(0.01), optax.ema(0.9))


def make_state(seed: int, step: Any = 0) -> NetState:
    """A state that has been trained for a step, so that no part of it is zero."""
    variables = MODEL.init(jax.random.key(seed), jnp.ones((3, 3)))
    state = NetState.create(
        apply_fn=MODEL.apply, params=variables["params"], tx=OPTIMIZER, batch_stats=variables["batch_stats"]
    )
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, seed + 1), state.params)
    return state.apply_gradients(grads=grads).replace(step=step)


@pytest.fixture
def msgpack() -> Iterator[Save]:
    """Saves as Flax did before it saved through Orbax."""
    was = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", False)

    def save(directory: Path, state: Any, step: int) -> None:
        checkpoints.save_checkpoint(directory, state, step, keep=99)

    yield save
    flax.config.update("flax_use_orbax_checkpointing", was)


def save_through_orbax(directory: Path, state: Any, step: int) -> None:
    """Saves as Flax does by default."""
    assert flax.config.flax_use_orbax_checkpointing
    checkpoints.save_checkpoint(directory, state, step, keep=99)


@pytest.fixture(params=["msgpack", "orbax"])
def save(request: pytest.FixtureRequest) -> Save:
    return save_through_orbax if request.param == "orbax" else request.getfixturevalue("msgpack")


# ------------------------------------------------------------------ runs


def test_a_run_of_flax_is_restored_and_gone_on_with(tmp_path: Path, save: Save) -> None:
    """The hook resumes from Flax's newest step to the last bit and saves its own beside it."""
    for step in (90, 100):
        save(tmp_path, make_state(step, step), step)
    with CheckpointHook(tmp_path, every_n_steps=1, keep=2) as hook:
        state = hook.restore(make_state(0))
        assert hook.start_step == 100
        assert_same(make_state(100, 100), state)
        for step in range(101, 105):
            assert hook(step, state.replace(step=step))
        hook.wait()
        assert hook.manager.steps() == [90, 100, 103, 104]  # retention neither counts nor removes Flax's
    with CheckpointHook(tmp_path) as hook:
        assert hook.restore(make_state(0)).step == 104


def test_restore_or_init_resumes_from_flax(tmp_path: Path, save: Save) -> None:
    """Without an initial state being built."""
    save(tmp_path, make_state(1, 7), 7)
    with CheckpointHook(tmp_path) as hook:
        state = hook.restore_or_init(make_state, 0)
        assert hook.start_step == state.step == 7
    assert_same(make_state(1), state.replace(step=0))  # evaluated abstractly, a step is an array


def test_a_manager_asks_a_run_of_flax(tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    """steps, metadata, verify, by number, a part, and on the command line."""
    for step in (5, 10):
        save(tmp_path, make_state(step, step), step)
    manager = CheckpointManager(tmp_path)
    assert manager.steps() == [5, 10]
    assert manager.latest_step() == 10
    assert_same(make_state(5, 5), manager.restore(make_state(0), step=5))
    assert_same({"params": make_state(5).params}, manager.restore(make_state(0), step=5, items=["params"]))
    assert manager.metadata(5).item_metadata["params"]["Dense_0"]["kernel"].shape == (3, 4)
    assert manager.verify(5) == []
    assert main(["ls", str(tmp_path)]) == 0
    assert main(["show", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "params.Dense_1.kernel  bfloat16[4, 2]" in out
    assert "step 10: ok" in out
    with pytest.raises(CheckpointNotFoundError, match=r"step 6; there are \[5, 10\]"):
        manager.restore(step=6)


def test_without_a_target_there_are_nested_dicts_of_numpy_arrays(tmp_path: Path, msgpack: Save) -> None:
    """As Flax gives them; arrays may be written to."""
    msgpack(tmp_path, make_state(3, 3), 3)
    plain = CheckpointManager(tmp_path).restore()
    theirs = checkpoints.restore_checkpoint(tmp_path, None)
    assert_same(theirs, plain)
    plain["params"]["Dense_0"]["kernel"][0, 0] = 5
    assert isinstance(plain["opt_state"]["1"]["hyperparams"]["learning_rate"], np.ndarray)


def test_a_damaged_file_is_passed_over_and_set_aside(tmp_path: Path, msgpack: Save) -> None:
    """Half a file is damage: the older one is restored, and the next save moves it out of Flax's sight."""
    for step in (10, 20):
        msgpack(tmp_path, make_state(step, step), step)
    with open(tmp_path / "checkpoint_20", "r+b") as file:
        file.truncate(1000)
    assert "CorruptCheckpointError" in str(CheckpointManager(tmp_path).verify(20))
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        assert hook.restore(make_state(0)).step == 10
        hook(11, make_state(11, 11))
        hook.wait()
        assert hook.manager.steps() == [10, 11]
    assert sorted(os.listdir(tmp_path)) == ["11", "20.damaged", "checkpoint_10"]


def test_where_no_file_can_be_read_nothing_starts_afresh(tmp_path: Path) -> None:
    """An empty file, and one that is no msgpack."""
    (tmp_path / "checkpoint_1").write_bytes(b"")
    (tmp_path / "checkpoint_2").write_bytes(b"PK\x03\x04 something else")
    with CheckpointHook(tmp_path) as hook, pytest.raises(NoValidCheckpointError, match="checkpoint_1 is not a msgpack"):
        hook.restore(make_state(0))


# ------------------------------------------------------------------ both kinds of steps in one run


def test_steps_of_both_are_told_apart(tmp_path: Path, save: Save) -> None:
    """They are one row of steps by their numbers; where both have one, ours counts."""
    save(tmp_path, make_state(1, 100), 100)
    save(tmp_path, make_state(2, 300), 300)
    with CheckpointManager(tmp_path, keep=None) as manager:
        with pytest.raises(InvalidArgumentError, match="has step 300 already"):
            manager.save(200, make_state(3, 200))
        manager.save(400, make_state(4, 400))
        manager.wait()
        assert manager.steps() == [100, 300, 400]
        assert manager.restore(make_state(0)).step == 400
    save(tmp_path, make_state(5, 500), 500)
    with CheckpointManager(tmp_path, keep=None) as manager:
        assert manager.restore(make_state(0)).step == 500
    (tmp_path / "checkpoint_tmp").write_bytes(b"half")  # what Flax leaves when it dies
    (tmp_path / "checkpoint_0.5").write_bytes(b"")
    (tmp_path / "checkpoint_007").write_bytes(b"")
    assert CheckpointManager(tmp_path).steps() == [100, 300, 400, 500]


def test_going_back_sets_flax_steps_aside(tmp_path: Path, save: Save) -> None:
    """rollback and force=True; what is set aside is no checkpoint to Flax either, and nothing is lost."""
    for step in (1, 2, 3):
        save(tmp_path, make_state(step, step), step)
    with CheckpointManager(tmp_path) as manager:
        manager.rollback(2)
        assert manager.steps() == [1, 2]
        assert manager.restore(make_state(0)).step == 2
        manager.save(2, make_state(9, 2), force=True)
        manager.wait()
        assert manager.steps() == [1, 2]
        assert_same(make_state(9, 2), manager.restore(make_state(0)))
        manager.delete(2)
        assert manager.steps() == [1]  # the one that was replaced does not come back
    assert sorted(os.listdir(tmp_path)) == ["2.rolled_back", "3.rolled_back", "checkpoint_1"]
    assert checkpoints.latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_1")


def test_flax_steps_are_only_read(tmp_path: Path, save: Save) -> None:
    """Neither deleted nor given metrics: both say so, and change nothing."""
    save(tmp_path, make_state(1, 1), 1)
    before = sorted(tmp_path.rglob("*"))
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(InvalidArgumentError, match="Flax's checkpoint_1, which is only read"):
            manager.delete(1)
        with pytest.raises(InvalidArgumentError, match="Flax's checkpoint_1, which is only read"):
            manager.record_metrics(1, {"loss": 1.0})
    assert sorted(tmp_path.rglob("*")) == before
    assert CheckpointManager(tmp_path).restore(make_state(0)).step == 1


def test_a_run_without_steps_names_checkpoints_with_other_names_and_nothing_else(tmp_path: Path) -> None:
    """A folder of logs whose name ends with a number is no checkpoint that one could rename to its step."""
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, make_state(1, 7))
    (tmp_path / "run" / "7").rename(tmp_path / "best_7")
    (tmp_path / "logs_8").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"but \['best_7'\]\. They"):
        CheckpointManager(tmp_path).restore(make_state(0))


# ------------------------------------------------------------------ one checkpoint


def test_one_file_is_restored_by_its_path(tmp_path: Path, save: Save) -> None:
    """Whatever its name; a run is no checkpoint, and says what to do."""
    checkpoints.save_checkpoint(tmp_path / "run", make_state(1, 7), 7, prefix="best_")
    path = tmp_path / "run" / "best_7"
    assert_same(make_state(1, 7), ckpt_hooks.restore(path, make_state(0)))
    like = {"params": make_state(0).params}
    assert_same({"params": make_state(1).params}, ckpt_hooks.restore(path, like, items=["params"]))
    save(tmp_path / "run", make_state(1, 8), 8)
    with pytest.raises(InvalidArgumentError, match="is a run"):
        ckpt_hooks.restore(tmp_path / "run")
    with pytest.raises(CheckpointNotFoundError):
        ckpt_hooks.restore(tmp_path / "run" / "9")
    (tmp_path / "run" / "9").mkdir()
    with pytest.raises(IncompleteCheckpointError):
        ckpt_hooks.restore(tmp_path / "run" / "9")


def test_a_run_begins_with_parameters_that_flax_saved(tmp_path: Path, save: Save) -> None:
    """init_from= takes a run of Flax's, or one checkpoint of it."""
    for step in (1, 2):
        save(tmp_path / "base", make_state(step, step), step)
    for origin, seed in (("base", 2), ("base/checkpoint_1", 1)):
        with CheckpointHook(tmp_path / f"tuned_{seed}", init_from=tmp_path / origin) as hook:
            state = hook.restore(make_state(0))
            assert hook.start_step == 0
        assert_same(make_state(seed).params, state.params)
        assert_same(make_state(0).opt_state, state.opt_state)
    with pytest.raises(InvalidArgumentError, match="is a checkpoint, so step=3"):
        InitFrom(tmp_path / "base" / "checkpoint_1", step=3).fill(make_state(0))


def test_a_target_that_does_not_fit_is_told_leaf_by_leaf(tmp_path: Path, save: Save) -> None:
    """With our errors and our ways out of them."""
    save(tmp_path, make_state(1, 7), 7)
    manager = CheckpointManager(tmp_path)
    good = make_state(0)
    params = dict(good.params)
    params["Dense_2"] = params.pop("Dense_1")
    like = good.replace(params=params, step=0.5)
    with pytest.raises(StructureMismatchError) as caught:
        manager.restore(like)
    text = str(caught.value)
    assert "missing     params.Dense_2.kernel: `like` wants bfloat16[4, 2], not saved" in text
    assert "unexpected  params.Dense_1.kernel: saved as bfloat16[4, 2]" in text
    assert "retyped     step" in text
    restored = manager.restore(
        good.replace(params=params), rename={"params/Dense_1": "params/Dense_2"}, cast=jnp.float32
    )
    assert_same(make_state(1).params["Dense_1"]["kernel"].astype(np.float32), restored.params["Dense_2"]["kernel"])
    with pytest.raises(ItemNotFoundError, match="nothing is saved at 'ema'"):
        manager.restore(items=["ema"])
    with pytest.raises(ItemNotFoundError, match="`like` has no part"):
        manager.restore({"step": 0}, items=["params"])


def test_arrays_that_flax_cuts_into_chunks_are_whole(
    tmp_path: Path, msgpack: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a gibibyte, which is lowered here; also an array that is the whole tree."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    tree = {"big": jnp.arange(1000.0).reshape(10, 10, 10), "half": jnp.arange(99, dtype=jnp.bfloat16), "x": jnp.ones(2)}
    msgpack(tmp_path, tree, 1)
    assert "__msgpack_chunked_array__" in str((tmp_path / "checkpoint_1").read_bytes())
    assert_same(tree, CheckpointManager(tmp_path).restore(jax.tree.map(jnp.zeros_like, tree)))
    (tmp_path / "bare").write_bytes(serialization.msgpack_serialize(np.arange(1000.0)))
    assert_same(np.arange(1000.0), ckpt_hooks.restore(tmp_path / "bare"))


ZOO: dict[str, Any] = {
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j, -0.0j], np.complex64),
    "bfloat16": jnp.array([1.5, -2], jnp.bfloat16),
    "float8": jnp.array([1.5, -2], jnp.float8_e4m3fn),
    "int4": jnp.array([1, -2], jnp.int4),
    "zero_d": jnp.int32(3),
    "empty": np.zeros((0, 3), np.int16),
    "numpy": np.float64(0.1),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "python": {"int": -5, "large": 2**40, "float": 0.1, "complex": 1 - 2j, "bool": True, "text": "größe"},
    "containers": {"none": None, "dict": {}, "list": [np.ones(1), (np.zeros(2),)]},
    "dotted.key": {"a/b": np.ones(1)},
}


def test_leaves_of_every_kind(tmp_path: Path, msgpack: Save) -> None:
    """In their types with a target; without one as Flax itself gives them back."""
    msgpack(tmp_path, ZOO, 1)
    manager = CheckpointManager(tmp_path)
    like = jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else leaf - leaf, {**ZOO, "bool": 0})
    like["python"]["bool"] = False
    like["bool"] = ~ZOO["bool"]
    assert_same(ZOO, manager.restore(like))
    theirs = checkpoints.restore_checkpoint(tmp_path, None)
    theirs["numpy"] = np.asarray(theirs["numpy"])  # no checkpoint of ours tells it from an array without axes
    assert_same(theirs, manager.restore())


def test_named_tuples_of_early_versions(tmp_path: Path, msgpack: Save) -> None:
    """Until 2021 Flax wrote their names and values apart."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.update({"w": jnp.ones(2)}, optimizer.init({"w": jnp.ones(2)}))[1]
    old = {"name": "TraceState", "fields": {"0": "trace"}, "values": {"0": {"w": np.asarray(state[0].trace["w"])}}}
    path = tmp_path / "old"
    path.write_bytes(serialization.msgpack_serialize({"0": old, "1": {}}))
    theirs = serialization.from_bytes(optimizer.init({"w": jnp.ones(2)}), path.read_bytes())
    ours = ckpt_hooks.restore(path, optimizer.init({"w": jnp.ones(2)}))
    assert type(ours) is type(theirs)
    assert_same(np.asarray(theirs[0].trace["w"]), np.asarray(ours[0].trace["w"]))


def test_what_no_tree_can_hold_is_named(tmp_path: Path) -> None:
    """Bytes in a file of somebody's own making."""
    path = tmp_path / "odd"
    path.write_bytes(serialization.msgpack_serialize({"a": {"b": b"\x00"}}))
    with pytest.raises(UnsupportedLeafError, match=r"a\.b is of type bytes"):
        ckpt_hooks.restore(path)


@pytest.mark.parametrize("place", [1, 10, 100, -1])
def test_half_a_file_is_damage(tmp_path: Path, place: int) -> None:
    """Wherever it ends."""
    content = serialization.to_bytes(make_state(0))
    (tmp_path / "half").write_bytes(content[:place])
    with pytest.raises(CorruptCheckpointError, match="not a msgpack file as Flax or Orbax writes it"):
        ckpt_hooks.restore(tmp_path / "half", make_state(0))


def test_arrays_of_several_processes_are_read_from_their_directory(
    tmp_path: Path, msgpack: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flax puts them beside the file; here it takes every array for one that is spread over processes."""
    monkeypatch.setattr(checkpoints, "_is_multiprocess_array", lambda value: isinstance(value, jax.Array))
    manager = checkpoints.GlobalAsyncCheckpointManager()
    state = make_state(1, 7)
    checkpoints.save_checkpoint_multiprocess(tmp_path, state, 7, gda_manager=manager)
    manager.wait_until_finished()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_7", "checkpoint_7_gda"]
    ours = CheckpointManager(tmp_path)
    assert ours.steps() == [7]
    assert_same(state, ours.restore(make_state(0)))
    assert ours.restore(items=["params"])["params"]["Dense_0"]["kernel"].shape == (3, 4)


def test_msgpack_is_loaded_only_when_needed(tmp_path: Path, msgpack: Save) -> None:
    """Neither it nor Flax, for a run that is not Flax's; and Flax never."""
    with CheckpointManager(tmp_path / "ours") as manager:
        manager.save(1, {"w": np.ones(2)})
    msgpack(tmp_path / "theirs", {"w": np.ones(2)}, 1)
    code = """if True:
        import sys
        from ckpt_hooks import CheckpointManager
        print(CheckpointManager(sys.argv[1] + "/ours").restore(), {"flax", "msgpack"} & sys.modules.keys())
        print(CheckpointManager(sys.argv[1] + "/theirs").restore(), {"flax", "msgpack"} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["{'w': array([1., 1.])} set()", "{'w': array([1., 1.])} {'msgpack'}"]
