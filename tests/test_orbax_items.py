"""Each kind of item that Orbax 0.12.8 can save, alone and beside others: its value, or an error that says why not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from google.protobuf import struct_pb2
from orbax.checkpoint.experimental import v1

import ckpt_hooks
from ckpt_hooks import (
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    CompositeCheckpointHandler,
    IteratorCheckpointHandler,
)
from ckpt_hooks.errors import (
    CorruptCheckpointError,
    HandlerNotFoundError,
    InvalidArgumentError,
    ItemNotFoundError,
    StructureMismatchError,
)
from ckpt_hooks.testing import assert_same

TREE = {"w": np.arange(6.0).reshape(2, 3), "b": [np.ones(1), {"n": np.int32(3) + np.zeros(2, np.int32)}]}
PROTO = struct_pb2.Struct()
PROTO.update({"rate": 0.5})

# {kind: (handler, args to save, args to restore, what we give without a target)}
KINDS: dict[str, tuple[Callable[[], Any], Any, Any, Any]] = {
    "standard": (ocp.StandardCheckpointHandler, ocp.args.StandardSave(TREE), ocp.args.StandardRestore(), TREE),
    "pytree": (ocp.PyTreeCheckpointHandler, ocp.args.PyTreeSave(TREE), ocp.args.PyTreeRestore(), TREE),
    "json": (ocp.JsonCheckpointHandler, ocp.args.JsonSave({"a": [1, None]}), ocp.args.JsonRestore(), {"a": [1, None]}),
    "json list": (ocp.JsonCheckpointHandler, ocp.args.JsonSave([1, "b"]), ocp.args.JsonRestore(), [1, "b"]),
    "array": (ocp.ArrayCheckpointHandler, ocp.args.ArraySave(TREE["w"]), ocp.args.ArrayRestore(), TREE["w"]),
    "jax array": (
        ocp.ArrayCheckpointHandler,
        ocp.args.ArraySave(jnp.arange(4, dtype=jnp.bfloat16)),
        ocp.args.ArrayRestore(),
        np.arange(4).astype(jnp.bfloat16),
    ),
    "key": (
        ocp.JaxRandomKeyCheckpointHandler,
        ocp.args.JaxRandomKeySave(jax.random.key(7)),
        ocp.args.JaxRandomKeyRestore(),
        jax.random.key(7),
    ),
    "keys": (
        ocp.JaxRandomKeyCheckpointHandler,
        ocp.args.JaxRandomKeySave(jax.random.split(jax.random.key(7), 3)),
        ocp.args.JaxRandomKeyRestore(),
        jax.random.split(jax.random.key(7), 3),
    ),
    "raw key": (
        ocp.JaxRandomKeyCheckpointHandler,
        ocp.args.JaxRandomKeySave(jax.random.PRNGKey(7)),
        ocp.args.JaxRandomKeyRestore(),
        np.asarray(jax.random.PRNGKey(7)),
    ),
    "numpy state": (
        ocp.NumpyRandomKeyCheckpointHandler,
        ocp.args.NumpyRandomKeySave(np.random.RandomState(5).get_state()),
        ocp.args.NumpyRandomKeyRestore(),
        np.random.RandomState(5).get_state(),
    ),
    "numpy state dict": (
        ocp.NumpyRandomKeyCheckpointHandler,
        ocp.args.NumpyRandomKeySave(np.random.RandomState(5).get_state(legacy=False)),
        ocp.args.NumpyRandomKeyRestore(),
        np.random.RandomState(5).get_state(legacy=False),
    ),
}
TARGETS = {  # of those kinds that have a type to restore into: another value of it
    "standard": jax.tree.map(np.zeros_like, TREE),
    "pytree": jax.tree.map(np.zeros_like, TREE),
    "array": np.zeros((2, 3)),
    "jax array": jnp.zeros(4, jnp.bfloat16),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
    "raw key": jax.random.PRNGKey(0),
    "numpy state": np.random.RandomState(1).get_state(),
    "numpy state dict": np.random.RandomState(1).get_state(legacy=False),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def save_alone(path: Path, kind: str) -> None:
    make_handler, args, _, _ = KINDS[kind]
    with ocp.Checkpointer(make_handler()) as theirs:
        theirs.save(path, args=args)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an item of each kind, and one that nobody but Orbax can read."""
    directory = tmp_path_factory.mktemp("run")
    items = {name.replace(" ", "_"): args for name, (_, args, _, _) in KINDS.items()}
    with ocp.CheckpointManager(directory) as theirs:
        theirs.save(3, args=ocp.args.Composite(**items, proto=ocp.args.ProtoSave(PROTO)))
        theirs.wait_until_finished()
    return directory


def test_one_alone(tmp_path: Path, kind: str) -> None:
    """A checkpoint that is one such item and nothing else is that item's value."""
    save_alone(tmp_path / "5", kind)
    expected = KINDS[kind][3]
    assert_same(expected, ckpt_hooks.restore(tmp_path / "5"))
    with CheckpointManager(tmp_path) as ours:
        assert_same(expected, ours.restore())
        assert ours.verify(5) == []
        assert ours.metadata(5).commit_timestamp_nsecs is not None
    with CheckpointHook(tmp_path) as hook:
        if kind in TARGETS:
            assert type(hook.restore(TARGETS[kind])) is type(TARGETS[kind])
            assert hook.start_step == 5


def test_one_of_many(run: Path, kind: str) -> None:
    """By its name, as Orbax itself gives it."""
    name = kind.replace(" ", "_")
    with CheckpointManager(run) as ours:
        assert_same({name: KINDS[kind][3]}, ours.restore(items=[name]))
    with ocp.CheckpointManager(run) as theirs:
        restored = theirs.restore(3, args=ocp.args.Composite(**{name: KINDS[kind][2]}))[name]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(plain, (a, b))), restored, KINDS[kind][3])


def plain(value: Any) -> Any:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value


@pytest.mark.parametrize("kind", TARGETS)
def test_into_a_target(tmp_path: Path, run: Path, kind: str) -> None:
    """In the types of the target, alone and as a part of a state."""
    save_alone(tmp_path / "alone", kind)
    name, target = kind.replace(" ", "_"), TARGETS[kind]
    expected = jax.tree.map(lambda leaf, like: jnp.asarray(leaf) if isinstance(like, jax.Array) else leaf, *both(kind))
    assert_same(expected, ckpt_hooks.restore(tmp_path / "alone", target))
    assert_same({name: expected}, CheckpointManager(run).restore({name: target}, unexpected="ignore"))


def both(kind: str) -> tuple[Any, Any]:
    return KINDS[kind][3], TARGETS[kind]


@pytest.mark.parametrize(
    ("kind", "target", "text"),
    [
        ("array", np.zeros(3), "reshaped"),
        ("array", np.zeros((2, 3), np.int32), "retyped"),
        ("key", jax.random.key(0, impl="rbg"), "retyped"),
        ("key", np.zeros(2, np.uint32), "retyped"),
        ("raw key", jax.random.key(0), "retyped"),
        ("numpy state", np.zeros(2), "unexpected"),
        ("json", {"a": 1}, "no pytree: it was saved with JsonCheckpointHandler"),
    ],
)
def test_a_target_that_does_not_fit_is_an_error(tmp_path: Path, kind: str, target: Any, text: str) -> None:
    """Never taken for what was saved."""
    save_alone(tmp_path / "alone", kind)
    with pytest.raises(StructureMismatchError, match=text):
        ckpt_hooks.restore(tmp_path / "alone", target)


def test_what_only_orbax_can_read_is_left_out_and_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others are restored; asked for by name it is an error."""
    with CheckpointManager(run) as ours, caplog.at_level(logging.WARNING):
        restored = ours.restore()
        assert restored.keys() == {name.replace(" ", "_") for name in KINDS}
        assert "items ['proto'] are of kinds that only Orbax can read, and are left out" in caplog.text
        with pytest.raises(InvalidArgumentError, match=r'"proto".*ProtoCheckpointHandler'):
            ours.restore(items=["proto"])
        with pytest.raises(ItemNotFoundError, match="'typo'"):
            ours.restore(items=["typo"])


@pytest.mark.parametrize("alone", [True, False])
def test_where_only_orbax_can_read_anything_it_is_an_error(tmp_path: Path, alone: bool) -> None:
    """And not an empty state."""
    if alone:
        with ocp.Checkpointer(ocp.ProtoCheckpointHandler("proto.txt")) as theirs:
            theirs.save(tmp_path / "1", args=ocp.args.ProtoSave(PROTO))
    else:
        with ocp.CheckpointManager(tmp_path) as theirs:
            theirs.save(1, args=ocp.args.Composite(proto=ocp.args.ProtoSave(PROTO)))
    with pytest.raises((HandlerNotFoundError, InvalidArgumentError), match="proto"):
        CheckpointManager(tmp_path).restore()
    with CheckpointHook(tmp_path) as hook, pytest.raises((KeyError, ValueError)):
        hook.restore(TREE)


def test_a_single_item_is_no_composite(tmp_path: Path) -> None:
    """A composite handler does not take it for one that has no items."""
    save_alone(tmp_path / "config", "json")
    with Checkpointer(CompositeCheckpointHandler()) as ours:
        with pytest.raises(InvalidArgumentError, match=r"no composite: it was saved with .*JsonCheckpointHandler"):
            ours.restore(tmp_path / "config")
        with pytest.raises(InvalidArgumentError, match="no composite"):
            ours.metadata(tmp_path / "config")


def test_other_names_of_files(tmp_path: Path) -> None:
    """A JSON file, and a key's directory, under names that were chosen."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler("config.json")) as theirs:
        theirs.save(tmp_path / "config", args=ocp.args.JsonSave({"a": 1}))
    with ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler("dropout")) as theirs:
        theirs.save(tmp_path / "key", args=ocp.args.JaxRandomKeySave(jax.random.key(1)))
    assert ckpt_hooks.restore(tmp_path / "config") == {"a": 1}
    assert_same(jax.random.key(1), ckpt_hooks.restore(tmp_path / "key"))


def test_a_key_that_has_lost_a_file_is_damage(tmp_path: Path) -> None:
    """Not a raw key, and not none."""
    save_alone(tmp_path / "key", "key")
    (tmp_path / "key" / "jax_random_key_metadata" / "metadata").unlink()
    with pytest.raises(CorruptCheckpointError, match="metadata"):
        ckpt_hooks.restore(tmp_path / "key")


def test_an_iterator_of_ours_alone_is_its_state(tmp_path: Path) -> None:
    """Recorded for Orbax as JSON, it is known by its files."""

    class Numbers:
        def get_state(self) -> dict[str, int]:
            return {"position": 4}

        def set_state(self, state: Any) -> None:
            raise AssertionError("nothing was given to be set")

    with Checkpointer(IteratorCheckpointHandler()) as ours:
        ours.save(tmp_path / "data", Numbers())
    assert ckpt_hooks.restore(tmp_path / "data") == {"position": 4}


# ------------------------------------------------------------------ Orbax's first layout

EARLY = {"params": {"w": np.arange(4.0), "b": np.ones(2, np.int16)}, "opt": [{"m": np.full(2, 3.0)}, {}], "step": 3}


def save_as_at_first(path: Path, *, use_ocdbt: bool) -> None:
    """A tree as the versions of 2022 and 2023 left it: its structure and small values in a file, no metadata at all."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as theirs:
        theirs.save(path, args=ocp.args.PyTreeSave(EARLY))
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"):
        (path / name).unlink()
    params = {"w": "PLACEHOLDER://params.w", "b": "PLACEHOLDER://params.b"}
    structure = {"params": params, "opt": {"0": {"m": np.full(2, 3.0)}, "1": {}}, "step": 3}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(structure))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as theirs:  # that this is what it reads
        restored = theirs.restore(path, args=ocp.args.PyTreeRestore(EARLY))
    jax.tree.map(np.testing.assert_array_equal, restored, EARLY)


@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_a_tree_of_orbax_in_its_first_versions(tmp_path: Path, use_ocdbt: bool) -> None:
    """Alone, as an item of a run, and as Flax's checkpoint of that time."""
    target = jax.tree.map(np.zeros_like, EARLY) | {"step": 0}
    plain = {**EARLY, "opt": {"0": {"m": np.full(2, 3.0)}, "1": {}}}
    for place in ("alone", "run/7/default", "flax/checkpoint_7"):
        save_as_at_first(tmp_path / place, use_ocdbt=use_ocdbt)
    for path in (tmp_path / "alone", tmp_path / "run" / "7", tmp_path / "flax" / "checkpoint_7"):
        assert_same(EARLY, ckpt_hooks.restore(path, target))
    assert_same(plain, ckpt_hooks.restore(tmp_path / "alone"))
    assert_same({"params": EARLY["params"]}, ckpt_hooks.restore(tmp_path / "alone", items=["params"]))
    with CheckpointManager(tmp_path / "run") as ours:
        assert ours.steps() == [7]
        assert_same({"default": plain}, ours.restore())
        assert ours.metadata(7).item_metadata["default"]["params"]["w"] == jax.ShapeDtypeStruct((4,), np.float64)
        assert ours.verify(7) == []
    with CheckpointHook(tmp_path / "flax") as hook:
        assert_same(EARLY, hook.restore(target))
        assert hook.start_step == 7


LATER_PARAMS = {"w": np.arange(4.0), "b": np.full(2, 7, np.int16)}
LATER = {**EARLY, "params": LATER_PARAMS, "step": 5}


def save_as_a_little_later(path: Path, *, use_ocdbt: bool) -> None:
    """A tree as those of the middle of 2023 left it: with metadata, and small values in the file all the same."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as theirs:
        theirs.save(path, args=ocp.args.PyTreeSave(EARLY))
    params = {"w": "PLACEHOLDER://params.w", "b": np.full(2, 7, np.int16)}
    structure = {"params": params, "opt": [{"m": "PLACEHOLDER://opt.0.m"}, {}], "step": 5}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(structure))
    for name in () if use_ocdbt else ("params.b", "step"):
        shutil.rmtree(path / name)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as theirs:  # that this is what it reads
        restored = theirs.restore(path, args=ocp.args.PyTreeRestore(EARLY))
    jax.tree.map(np.testing.assert_array_equal, restored, LATER)


@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_a_tree_of_orbax_with_metadata_and_values_in_the_file(tmp_path: Path, use_ocdbt: bool) -> None:
    """What stands in the msgpack file goes before what stands beside it, as it does for Orbax."""
    target = jax.tree.map(np.zeros_like, EARLY) | {"step": 0}
    for place in ("alone", "run/7/default"):
        save_as_a_little_later(tmp_path / place, use_ocdbt=use_ocdbt)
    assert_same(LATER, ckpt_hooks.restore(tmp_path / "alone", target))
    assert_same(LATER, ckpt_hooks.restore(tmp_path / "alone"))
    assert_same(LATER, CheckpointManager(tmp_path / "run").restore(target))
    part = ckpt_hooks.restore(tmp_path / "alone", items=["params/b"])
    assert_same({"params": {"b": LATER_PARAMS["b"]}}, part)


def test_a_file_put_into_an_item_of_ours_changes_nothing(tmp_path: Path) -> None:
    """What was saved is what its checksums are of, whatever lies beside it."""
    with CheckpointManager(tmp_path) as ours:
        ours.save(7, {"params": EARLY["params"]})
        ours.wait()
        content = serialization.msgpack_serialize({"w": np.zeros(4), "b": np.zeros(2, np.int16)})
        (tmp_path / "7" / "params" / "checkpoint").write_bytes(content)
        assert_same({"params": EARLY["params"]}, ours.restore())


def test_a_file_of_the_same_name_is_no_checkpoint(tmp_path: Path) -> None:
    """TensorFlow has a text file `checkpoint` in its directories."""
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "checkpoint").write_text('model_checkpoint_path: "model-9"\n')
    assert CheckpointManager(tmp_path).steps() == []


# ------------------------------------------------------------------ Orbax's managers and its newer interface


@pytest.mark.parametrize("name", ["default", "items"])
def test_a_part_of_a_run_without_items(tmp_path: Path, name: str) -> None:
    """items= and init_from= reach into the one tree that Orbax's manager saved, and into its items."""
    state = {"params": TREE, "step": 4}
    with ocp.CheckpointManager(tmp_path / "base") as theirs:
        parts = {"params": ocp.args.StandardSave(TREE), "rest": ocp.args.StandardSave({"step": 4})}
        args = ocp.args.StandardSave(state) if name == "default" else ocp.args.Composite(**parts)
        theirs.save(4, args=args)
        theirs.wait_until_finished()
    like = jax.tree.map(np.zeros_like, {"params": TREE}) | {"step": 0}
    ours = CheckpointManager(tmp_path / "base")
    assert_same({"params": TREE}, ours.restore(items=["params"]))
    assert_same({"params": TREE}, ours.restore(like, items=["params"]))
    assert_same({"params": {"w": TREE["w"]}}, ours.restore(items=["params/w"]))
    with CheckpointHook(tmp_path / "tuned", init_from=tmp_path / "base") as hook:
        assert_same({"params": TREE, "step": 0}, hook.restore(like))


@pytest.mark.filterwarnings("ignore:Use `(save|load)` instead")
def test_the_newer_interface(tmp_path: Path) -> None:
    """save_pytree, save_checkpointables, and a training checkpointer with each."""
    v1.save_pytree(tmp_path / "pytree", TREE)
    v1.save_checkpointables(tmp_path / "several", {"tree": TREE, "config": {"x": np.ones(1)}})
    with v1.training.Checkpointer(tmp_path / "run") as theirs:
        theirs.save_pytree(3, TREE)
    with v1.training.Checkpointer(tmp_path / "items") as theirs:
        theirs.save_checkpointables(3, {"tree": TREE, "config": {"x": np.ones(1)}}, metrics={"loss": 0.5})
    target = jax.tree.map(np.zeros_like, TREE)
    assert_same({"state": TREE}, ckpt_hooks.restore(tmp_path / "pytree"))
    assert_same(TREE, ckpt_hooks.restore(tmp_path / "pytree", target))
    assert_same(TREE, CheckpointManager(tmp_path / "run").restore(target))
    assert_same({"tree": TREE, "config": {"x": np.ones(1)}}, ckpt_hooks.restore(tmp_path / "several"))
    ours = CheckpointManager(tmp_path / "items")
    assert_same({"tree": TREE}, ours.restore({"tree": target}, items=["tree"]))
    assert ours.best_step("loss") == 3
