"""What this library wrote, Orbax lists, describes and restores, with its own code and without a word from ours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state
from orbax.checkpoint.experimental import v1

from ckpt_hooks import (
    AsyncCheckpointer,
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    CompositeCheckpointHandler,
    StandardCheckpointHandler,
    args,
)
from tests.sameness import bits, typed_bits

REPOSITORY = Path(__file__).resolve().parents[1]


class Model(nn.Module):
    """An MLP with everything that has a state of its own."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any
    dropout_key: Any


PARTS = ("batch_stats", "dropout_key", "opt_state", "params", "step")


def make_state(seed: int) -> TrainState:
    """A state that has seen one update, so that no part of it is all zeros."""
    model = Model()
    variables = model.init(jax.random.key(seed), jnp.ones((2, 3)))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        batch_stats=variables["batch_stats"],
        dropout_key=jax.random.key(seed + 100),
    )
    gradients = jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, 0.1), state.params)
    return state.apply_gradients(grads=gradients)


@pytest.fixture(scope="module")
def states() -> dict[int, TrainState]:
    return {step: make_state(step) for step in (10, 20, 30)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, states: dict[int, TrainState]) -> Path:
    """A run that the hook wrote; step 20 has the lowest loss."""
    directory = tmp_path_factory.mktemp("run")
    losses = {10: 0.5, 20: 0.25, 30: 0.75}
    with CheckpointHook(directory, every_n_steps=10, keep=5) as hook:
        for step, state in states.items():
            assert hook(step, state, metrics={"loss": losses[step]}, metadata={"note": f"at {step}"})
    return directory


@pytest.fixture
def manager(run: Path) -> Iterator[ocp.CheckpointManager]:
    with ocp.CheckpointManager(run) as manager:
        yield manager


def part(state: TrainState, name: str) -> Any:
    return getattr(state, name)


# ------------------------------------------------------------------ a run, by Orbax's CheckpointManager


def test_orbax_lists_the_steps_of_a_run(manager: ocp.CheckpointManager) -> None:
    """Orbax's all_steps and latest_step name every checkpoint of a run, and nothing else."""
    assert sorted(manager.all_steps()) == [10, 20, 30]
    assert manager.latest_step() == 30


@pytest.mark.parametrize(("mode", "best"), [("min", 20), ("max", 30)])
def test_orbax_finds_the_best_step_by_our_metrics(run: Path, mode: str, best: int) -> None:
    """Orbax's best_fn is given the metrics that the hook recorded."""
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode=mode)
    with ocp.CheckpointManager(run, options=options) as manager:
        assert manager.best_step() == best
        assert manager.metrics(20) == {"loss": 0.25}


def test_orbax_describes_a_checkpoint(manager: ocp.CheckpointManager) -> None:
    """Orbax reads step, metrics and the user's own metadata from custom_metadata, with the times and handlers."""
    metadata = manager.metadata(20)
    assert metadata.custom_metadata == {"step": 20, "metrics": {"loss": 0.25}, "note": "at 20"}
    assert metadata.commit_timestamp_nsecs >= metadata.init_timestamp_nsecs > 0
    assert metadata.item_handlers.keys() == {*PARTS, "metrics"}


def test_orbax_describes_the_arrays_of_each_item(run: Path, states: dict[int, TrainState]) -> None:
    """Orbax's item_metadata has shape and dtype of every array of an item that it is given a handler for."""
    handlers = {name: ocp.StandardCheckpointHandler() for name in PARTS}
    with ocp.CheckpointManager(run, item_handlers=handlers) as manager:
        described = manager.item_metadata(20)
    for name in ("params", "opt_state", "batch_stats"):
        found = [(leaf.shape, leaf.dtype) for leaf in jax.tree_util.tree_leaves(described[name].tree)]
        saved = jax.tree_util.tree_leaves(part(states[20], name))
        assert sorted(map(str, found)) == sorted(str((leaf.shape, leaf.dtype)) for leaf in saved)


def test_orbax_restores_everything_without_being_told_how(
    manager: ocp.CheckpointManager, states: dict[int, TrainState]
) -> None:
    """A restore without arguments gives every item, bit for bit, and the metrics."""
    restored = manager.restore(20)
    assert restored.keys() == {*PARTS, "metrics"}
    for name in PARTS:
        assert bits(restored[name]) == bits(part(states[20], name)), name
    assert restored["metrics"] == {"loss": 0.25}


def test_orbax_restores_the_newest_where_no_step_is_named(
    manager: ocp.CheckpointManager, states: dict[int, TrainState]
) -> None:
    """Orbax's restore(None) gives our newest checkpoint."""
    assert bits(manager.restore(None)["params"]) == bits(states[30].params)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("restore", [ocp.args.StandardRestore, ocp.args.PyTreeRestore])
def test_orbax_restores_one_item_alone(run: Path, states: dict[int, TrainState], name: str, restore: Any) -> None:
    """Each part of a train state is an item that StandardRestore and PyTreeRestore read without the others."""
    with ocp.CheckpointManager(run) as manager:
        restored = manager.restore(10, args=ocp.args.Composite(**{name: restore()}))
    assert bits(restored[name]) == bits(part(states[10], name))


@pytest.mark.parametrize("name", PARTS)
def test_orbax_restores_one_item_into_a_target(run: Path, states: dict[int, TrainState], name: str) -> None:
    """With a target, StandardRestore gives the target's own containers and types: named tuples, typed keys, ints."""
    target = part(make_state(0), name)
    with ocp.CheckpointManager(run) as manager:
        restored = manager.restore(10, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target)}))
    assert typed_bits(restored[name]) == typed_bits(part(states[10], name))


def test_orbax_restores_items_of_several_kinds_at_once(run: Path, states: dict[int, TrainState]) -> None:
    """JsonRestore reads our metrics beside a pytree that has a target."""
    wanted = ocp.args.Composite(metrics=ocp.args.JsonRestore(), params=ocp.args.StandardRestore(make_state(0).params))
    with ocp.CheckpointManager(run) as manager:
        restored = manager.restore(20, args=wanted)
    assert restored["metrics"] == {"loss": 0.25}
    assert typed_bits(restored["params"]) == typed_bits(states[20].params)


def test_orbax_goes_on_in_a_run_of_ours(tmp_path: Path) -> None:
    """Orbax's manager saves into a directory that ours wrote, and both then read both."""
    with CheckpointManager(tmp_path) as ours:
        ours.save(1, {"params": jnp.ones(3)}, metrics={"loss": 1.0})
    with ocp.CheckpointManager(tmp_path) as theirs:
        theirs.save(2, args=ocp.args.Composite(params=ocp.args.StandardSave({"w": jnp.zeros(3)})))
        theirs.wait_until_finished()
        assert bits(theirs.restore(1)["params"]) == bits(jnp.ones(3))
    with CheckpointManager(tmp_path) as ours:
        assert ours.steps() == [1, 2]
        assert bits(ours.restore()) == bits({"params": {"w": jnp.zeros(3)}})


def test_orbax_overlooks_what_was_rolled_back(tmp_path: Path) -> None:
    """Checkpoints that a rollback set aside are no steps for Orbax either."""
    with CheckpointManager(tmp_path) as ours:
        for step in (1, 2, 3):
            ours.save(step, {"w": jnp.full(2, step)})
        ours.rollback(1)
    assert len(os.listdir(tmp_path)) == 3
    with ocp.CheckpointManager(tmp_path) as theirs:
        assert theirs.all_steps() == [1]


def test_orbax_reads_metrics_that_were_recorded_later(tmp_path: Path) -> None:
    """record_metrics changes what Orbax's best_fn, metadata and restore see, and spoils nothing."""
    with CheckpointManager(tmp_path, keep=None) as ours:
        for step in (1, 2, 3):
            ours.save(step, {"w": jnp.full(2, step)}, metrics={"loss": 0.5} if step < 3 else None)
        ours.record_metrics(2, {"accuracy": 0.9})
        ours.record_metrics(3, {"accuracy": 0.8})  # the first metrics of this step
        ours.record_metrics(1, {"accuracy": 0.7})
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["accuracy"])
    with ocp.CheckpointManager(tmp_path, options=options) as theirs:
        assert theirs.best_step() == 2
        assert theirs.metadata(2).custom_metadata["metrics"] == {"loss": 0.5, "accuracy": 0.9}
        restored = theirs.restore(3)
    assert restored["metrics"] == {"accuracy": 0.8}
    assert bits(restored["w"]) == bits(jnp.full(2, 3))


def test_a_metric_that_is_not_finite_does_not_stop_orbax(tmp_path: Path) -> None:
    """Orbax's best_fn gets NaN and infinities as numbers, of saves and of metrics that were recorded later."""
    with CheckpointManager(tmp_path, keep=None) as ours:
        for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.25)):
            ours.save(step, {"w": jnp.ones(2)}, metrics={"loss": loss})
        ours.record_metrics(3, {"margin": float("-inf")})
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(tmp_path, options=options) as theirs:
        assert theirs.best_step() in (1, 2, 3)  # which one is up to how Orbax sorts a NaN
        assert math.isnan(theirs.metrics(2)["loss"])
        assert theirs.metrics(3) == {"loss": 0.25, "margin": -math.inf}


def test_orbax_restores_a_checkpoint_with_an_iterator(tmp_path: Path) -> None:
    """An iterator among the items, which Orbax does not know, keeps it from nothing: not from a bare restore."""

    class Batches:
        def get_state(self) -> dict[str, int]:
            return {"position": 7}

        def set_state(self, state: dict[str, int]) -> None:
            del state

    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        hook(5, {"params": {"w": jnp.arange(3.0)}}, data=Batches())
    with ocp.CheckpointManager(tmp_path) as theirs:
        restored = theirs.restore(5)
        assert bits(restored["params"]) == bits({"w": jnp.arange(3.0)})
        assert restored.keys() == {"params", "data"}
    assert bits(v1.load(tmp_path / "5", checkpointable_name="params")) == bits({"w": jnp.arange(3.0)})


def test_orbax_restores_a_state_with_empty_parts(tmp_path: Path) -> None:
    """Parts without a leaf, such as the statistics of a model that has none, do not stop a bare restore."""
    with CheckpointManager(tmp_path) as ours:
        empty: dict[str, Any] = {"batch_stats": {}, "opt_state": (), "inner": {"ema": None}, "ema": None}
        ours.save(1, {"params": {"w": jnp.ones(2)}, "optimizer": optax.EmptyState(), **empty})
    with ocp.CheckpointManager(tmp_path) as theirs:
        restored = theirs.restore(1)
    assert {name: restored[name] for name in empty} == empty
    assert restored["optimizer"] is None  # an empty named tuple
    assert bits(restored["params"]) == bits({"w": jnp.ones(2)})


def test_orbax_restores_an_index_of_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax finds every array through an index that is a tree of three levels."""
    monkeypatch.setattr("ckpt_hooks.storage.layout._NODE_ENTRIES", 4)
    state = {f"layer_{i:02}": {"w": jnp.full((i + 1, 90), i, jnp.float32), "b": jnp.full(3, i)} for i in range(12)}
    path = tmp_path / "wide"
    with Checkpointer(StandardCheckpointHandler()) as ours:
        ours.save(path, state)
        assert bits(ours.restore(path)) == bits(state)
    with ocp.StandardCheckpointer() as theirs:
        assert bits(theirs.restore(path)) == bits(state)
        assert typed_bits(theirs.restore(path, state)) == typed_bits(state)
    assert bits(v1.load(path)) == bits(state)


# ------------------------------------------------------------------ one checkpoint at a path


TREE: dict[str, Any] = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "big": np.arange(3000, dtype=np.float64),
    "nested": [jnp.ones(2, jnp.bfloat16), (np.int16(3), {"none": None})],
    "key": jax.random.key(7),
    "count": 3,
    "rate": 0.1,
}


@pytest.fixture(scope="module", params=[Checkpointer, AsyncCheckpointer])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("single") / "checkpoint"
    with request.param(StandardCheckpointHandler()) as ours:
        ours.save(path, TREE, custom_metadata={"epoch": 3})
    return path


def test_standard_checkpointer_restores_ours(checkpoint: Path) -> None:
    """Orbax's StandardCheckpointer restores what our checkpointers wrote, and reads its custom metadata."""
    with ocp.StandardCheckpointer() as theirs:
        assert bits(theirs.restore(checkpoint)) == bits(TREE)
        metadata = theirs.metadata(checkpoint)
    assert metadata.custom_metadata == {"epoch": 3}
    assert metadata.item_metadata.tree["w"].shape == (2, 3)


def test_standard_checkpointer_restores_ours_into_a_target(checkpoint: Path) -> None:
    """With a target, Orbax's StandardCheckpointer gives the types of the target."""
    # Orbax takes no NumPy scalar in a target.
    saved = {**TREE, "nested": [TREE["nested"][0], (np.asarray(3, np.int16), {"none": None})]}
    target = jax.tree_util.tree_map(lambda leaf: leaf, saved)
    with ocp.StandardCheckpointer() as theirs:
        assert typed_bits(theirs.restore(checkpoint, target)) == typed_bits(saved)


def test_pytree_checkpointer_restores_ours(checkpoint: Path) -> None:
    """Orbax's PyTreeCheckpointer restores what our checkpointers wrote."""
    with ocp.PyTreeCheckpointer() as theirs:
        assert bits(theirs.restore(checkpoint)) == bits(TREE)


def test_v1_load_restores_ours(checkpoint: Path) -> None:
    """Orbax's v1 load restores and describes what our checkpointers wrote."""
    assert bits(v1.load(checkpoint)) == bits(TREE)
    assert v1.metadata(checkpoint).custom_metadata == {"epoch": 3}


def test_v1_load_restores_an_item_into_a_target(run: Path, states: dict[int, TrainState]) -> None:
    """Orbax's v1 load gives one item of a hook's checkpoint in the types of a target."""
    target = make_state(0).opt_state
    loaded = v1.load(run / "20", target, checkpointable_name="opt_state")
    assert typed_bits(loaded) == typed_bits(states[20].opt_state)


def test_v1_load_checkpointables_restores_all_items(run: Path, states: dict[int, TrainState]) -> None:
    """Orbax's v1 load_checkpointables gives every item of a hook's checkpoint, or those asked for."""
    loaded = v1.load_checkpointables(run / "20")
    for name in PARTS:
        assert bits(loaded[name]) == bits(part(states[20], name)), name
    target = make_state(0).params
    chosen = v1.load_checkpointables(run / "20", {"params": target})
    assert typed_bits(chosen["params"]) == typed_bits(states[20].params)


def test_v1_training_checkpointer_reads_a_run(run: Path, states: dict[int, TrainState]) -> None:
    """Orbax's v1 training.Checkpointer lists a run of ours with its metrics, describes and loads it."""
    with v1.training.Checkpointer(run) as theirs:
        assert {found.step: found.metrics for found in theirs.checkpoints} == {
            10: {"loss": 0.5},
            20: {"loss": 0.25},
            30: {"loss": 0.75},
        }
        assert theirs.latest.step == 30
        assert theirs.metadata(20).custom_metadata == {"step": 20, "metrics": {"loss": 0.25}, "note": "at 20"}
        assert bits(theirs.load(20, checkpointable_name="params")) == bits(states[20].params)
        loaded = theirs.load_checkpointables(10)
    for name in PARTS:
        assert bits(loaded[name]) == bits(part(states[10], name)), name


def test_v1_loads_a_state_without_parts(tmp_path: Path) -> None:
    """A state that is the one item `state` is what v1 loads when no item is named."""
    state = [jnp.ones(2), {"a": jnp.zeros(3)}]
    with CheckpointManager(tmp_path) as ours:
        ours.save(4, state)
    with v1.training.Checkpointer(tmp_path) as theirs:
        assert bits(theirs.load(4)) == bits(state)


def test_orbax_restores_a_composite_of_ours(tmp_path: Path) -> None:
    """Items that CompositeCheckpointHandler wrote are read by Orbax's, pytrees and JSON alike."""
    path = tmp_path / "composite"
    with Checkpointer(CompositeCheckpointHandler()) as ours:
        items = {"weights": args.StandardSave(TREE), "config": args.JsonSave({"layers": [4, 2]})}
        ours.save(path, args=args.Composite(**items))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as theirs:
        restored = theirs.restore(path)
    assert bits(restored["weights"]) == bits(TREE)
    assert restored["config"] == {"layers": [4, 2]}


# ------------------------------------------------------------------ a zoo of leaves


def _values(dtype: Any) -> np.ndarray:
    return (np.arange(4) % 2).astype(dtype)


INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
PLAIN = (*INTEGERS, "float16", "float32", "float64", "complex64", "complex128")
EIGHT_BITS = ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
EXTENDED = ("bfloat16", "int2", "int4", "float4_e2m1fn", *(f"float8_{name}" for name in EIGHT_BITS))
KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


def _arrays() -> dict[str, Any]:
    zoo: dict[str, Any] = {f"numpy_{name}": _values(name) for name in PLAIN}
    zoo |= {f"numpy_{name}": _values(getattr(ml_dtypes, name)) for name in EXTENDED}
    needs_x64 = {"int64", "uint64", "float64", "complex128"}
    zoo |= {f"jax_{name}": jnp.asarray(_values(name)) for name in PLAIN if name not in needs_x64}
    zoo |= {f"jax_{name}": jnp.asarray(_values(getattr(ml_dtypes, name))) for name in EXTENDED}
    return zoo


def _shapes() -> dict[str, Any]:
    return {
        "jax_0d": jnp.float32(2.5),
        "numpy_0d": np.array(2.5),
        "jax_empty": jnp.zeros((0, 3)),
        "numpy_empty": np.zeros((2, 0), np.int8),
        "of_one": jnp.ones((1, 1, 1)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(20)[::3],
        "outside_the_index": jnp.arange(1000.0),
        "special": jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0]),
    }


def _others() -> dict[str, Any]:
    zoo: dict[str, Any] = {f"key_{impl}": jax.random.key(3, impl=impl) for impl in KEY_IMPLS}
    zoo |= {f"keys_{impl}": jax.random.split(jax.random.key(3, impl=impl), (2, 3)) for impl in KEY_IMPLS}
    scalars = {"true": True, "int": 2**40, "negative": -1, "float": 0.1}
    empty: dict[str, Any] = {"none": None, "dict": {}, "list": [], "tuple": (), "deep": {"a": [None, ({},)]}}
    return zoo | scalars | empty


@pytest.fixture(scope="module")
def zoo() -> dict[str, Any]:
    return {"arrays": _arrays(), "shapes": _shapes(), "others": _others(), "odd/name": {"a b": jnp.ones(2)}}


@pytest.fixture(scope="module")
def saved_zoo(tmp_path_factory: pytest.TempPathFactory, zoo: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo"
    with Checkpointer(StandardCheckpointHandler()) as ours:
        ours.save(path, zoo)
    return path


def without_types(tree: Any) -> Any:
    """The tree as a restore without a target gives it: tuples as lists."""
    if isinstance(tree, dict):
        return {key: without_types(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and tree:
        return [without_types(value) for value in tree]
    return tree if not jax.tree_util.tree_leaves(tree) else "a leaf"


READERS = {
    "StandardCheckpointer": lambda path: ocp.StandardCheckpointer().restore(path),
    "PyTreeCheckpointer": lambda path: ocp.PyTreeCheckpointer().restore(path),
    "v1.load": lambda path: v1.load(path),
}


@pytest.mark.parametrize("reader", READERS)
def test_orbax_restores_every_kind_of_leaf(reader: str, saved_zoo: Path, zoo: dict[str, Any]) -> None:
    """Every dtype, shape, PRNG key, scalar and empty container comes back from Orbax as it was saved."""
    restored = READERS[reader](saved_zoo)
    assert bits(restored) == bits(zoo)
    assert without_types(restored) == without_types(zoo)


def test_orbax_restores_every_kind_of_leaf_into_a_target(saved_zoo: Path, zoo: dict[str, Any]) -> None:
    """With a target, Orbax gives each leaf the target's type: JAX, NumPy or Python."""
    with ocp.StandardCheckpointer() as theirs:
        assert typed_bits(theirs.restore(saved_zoo, zoo)) == typed_bits(zoo)


def test_v1_restores_every_kind_of_leaf_into_a_target(saved_zoo: Path, zoo: dict[str, Any]) -> None:
    """With a target, v1 load gives each leaf the target's type."""
    assert typed_bits(v1.load(saved_zoo, zoo)) == typed_bits(zoo)


def test_pytree_checkpointer_restores_strings(tmp_path: Path) -> None:
    """String leaves, which only Orbax's PyTree handlers know, are read by those."""
    state = {"name": "größe", "nested": {"empty": ""}, "w": jnp.ones(2)}
    with Checkpointer(StandardCheckpointHandler()) as ours:
        ours.save(tmp_path / "text", state)
    with ocp.PyTreeCheckpointer() as theirs:
        assert bits(theirs.restore(tmp_path / "text")) == bits(state)


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3.0), np.arange(3), 5, jax.random.key(1)],
    ids=["jax", "numpy", "int", "key"],
)
def test_orbax_restores_a_bare_leaf(tmp_path: Path, leaf: Any) -> None:
    """A state that is one array without a name, which Orbax cannot write itself, is read by it."""
    with Checkpointer(StandardCheckpointHandler()) as ours:
        ours.save(tmp_path / "bare", leaf)
    for read in READERS.values():
        assert bits(read(tmp_path / "bare")) == bits(leaf)


# ------------------------------------------------------------------ sharded arrays, on eight devices

SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint.experimental import v1
from ckpt_hooks import CheckpointManager
from tests.sameness import typed_bits

mesh = jax.make_mesh((4, 2), ("x", "y"))
place = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
matrix = jnp.arange(6400.0).reshape(80, 80)
state = {
    "rows": place(matrix, "x"),
    "columns": place(matrix, None, "y"),
    "blocks": place(matrix.astype(jnp.bfloat16), "x", "y"),
    "both": place(matrix, ("x", "y")),
    "everywhere": place(matrix),
    "small": place(jnp.arange(8), ("x", "y")),
    "empty": place(jnp.zeros((0, 4)), None, "y"),
    "keys": place(jax.random.split(jax.random.key(1), 8), "x"),
    "one": jax.device_put(jnp.ones(5), jax.devices()[3]),
    "free": jnp.ones(3),
}
with CheckpointManager(sys.argv[1]) as ours:
    ours.save(1, {"params": state})
path = sys.argv[1] + "/1/params"
shardings = lambda tree: [leaf.sharding for leaf in jax.tree_util.tree_leaves(tree)]
with ocp.StandardCheckpointer() as theirs:
    untold = theirs.restore(path)
    told = theirs.restore(path, state)
    elsewhere = {**state, "rows": place(matrix, "y", "x")}
    resharded = theirs.restore(path, elsewhere)
loaded = v1.load(sys.argv[1] + "/1", state, checkpointable_name="params")
for name, found in {"untold": untold, "told": told, "v1": loaded}.items():
    assert typed_bits(found) == typed_bits(state), name
    assert shardings(found) == shardings(state), name
assert typed_bits(resharded) == typed_bits(state)
assert shardings(resharded) == shardings(elsewhere)
print("all equal")
"""


def test_orbax_restores_sharded_arrays(tmp_path: Path) -> None:
    """Arrays sharded over eight devices come back from Orbax bit for bit, in their sharding or another one."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all equal" in done.stdout
