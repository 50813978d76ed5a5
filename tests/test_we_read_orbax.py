"""What Orbax wrote, in each of its layouts, is restored bit for bit, listed, and gone on with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions
from orbax.checkpoint.experimental import v1

import ckpt_hooks
from ckpt_hooks import (
    AsyncCheckpointer,
    BestN,
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    CompositeCheckpointHandler,
    StandardCheckpointHandler,
    args,
)
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidArgumentError,
    ItemNotFoundError,
    NoValidCheckpointError,
    StructureMismatchError,
)
from tests.sameness import bits, typed_bits


def make_tree(seed: int) -> dict[str, Any]:
    """A tree of everything that Orbax can save."""
    params = {"w": jnp.arange(6.0).reshape(2, 3) + seed, "b": jnp.full(3, seed, jnp.bfloat16)}
    optimizer = optax.adam(1.0)
    return {
        "params": params,
        "opt_state": optimizer.update(params, optimizer.init(params), params)[1],
        "big": jnp.arange(3000.0) * seed,
        "numpy": np.arange(4, dtype=np.int16) + seed,
        "zero_d": jnp.int32(seed),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "int": seed,
        "float": seed / 7,
        "bool": True,
        "list": [jnp.ones(2), (np.zeros(1),)],
        "empty": {"none": None, "dict": {}, "list": [], "tuple": ()},
    }


def abstract(tree: Any) -> Any:
    """The tree with its JAX arrays abstract."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return leaf

    return jax.tree_util.tree_map(of, tree)


# ------------------------------------------------------------------ one checkpoint at a path, in every layout

Save = Callable[[Path, Any], None]


def _with_standard_checkpointer(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(path, tree, custom_metadata={"epoch": 3})


def _with_pytree_handler(**options: Any) -> Save:
    def save(path: Path, tree: Any) -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as theirs:
            theirs.save(path, tree, custom_metadata={"epoch": 3})

    return save


def _with_chunks(path: Path, tree: Any) -> None:
    """Each array in chunks of at most 64 bytes."""
    chunked = jax.tree_util.tree_map(lambda leaf: ocp.SaveArgs(chunk_byte_size=64), tree)
    with ocp.PyTreeCheckpointer() as theirs:
        theirs.save(path, tree, save_args=chunked, custom_metadata={"epoch": 3})


LAYOUTS: dict[str, Save] = {
    "StandardCheckpointer": _with_standard_checkpointer,
    "PyTreeCheckpointer": _with_pytree_handler(),
    "uncompressed": _with_pytree_handler(use_compression=False),
    "zarr3": _with_pytree_handler(use_zarr3=True),
    "zarr3, uncompressed": _with_pytree_handler(use_zarr3=True, use_compression=False),
    "files": _with_pytree_handler(use_ocdbt=False),
    "files, uncompressed": _with_pytree_handler(use_ocdbt=False, use_compression=False),
    "files, zarr3": _with_pytree_handler(use_ocdbt=False, use_zarr3=True),
    "chunks": _with_chunks,
}


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("layout") / "checkpoint"
    LAYOUTS[request.param](path, make_tree(3))
    return path


def test_every_layout_is_restored_without_a_target(checkpoint: Path) -> None:
    """zarr v2 and v3, compressed or not, in a database or in files: the values are those that Orbax saved."""
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert bits(ours.restore(checkpoint)) == bits(make_tree(3))


def test_every_layout_is_restored_into_a_target(checkpoint: Path) -> None:
    """With a target, also an abstract one, values come in its containers, types and shardings."""
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert typed_bits(ours.restore(checkpoint, make_tree(0))) == typed_bits(make_tree(3))
        assert typed_bits(ours.restore(checkpoint, abstract(make_tree(0)))) == typed_bits(make_tree(3))


def test_every_layout_is_described(checkpoint: Path) -> None:
    """Metadata gives Orbax's custom metadata, and shape and dtype of every array, without reading one."""
    with Checkpointer(StandardCheckpointHandler()) as ours:
        metadata = ours.metadata(checkpoint)
    assert metadata.custom_metadata == {"epoch": 3}
    assert metadata.item_metadata["params"]["b"] == jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    assert metadata.item_metadata["zero_d"] == jax.ShapeDtypeStruct((), jnp.int32)


def test_a_target_that_does_not_fit_is_an_error(checkpoint: Path) -> None:
    """A leaf of another dtype is named, also where Orbax wrote it, and converted only if asked."""
    target = {**make_tree(0), "zero_d": jnp.float32(0)}
    with Checkpointer(StandardCheckpointHandler()) as ours:
        with pytest.raises(StructureMismatchError, match="zero_d"):
            ours.restore(checkpoint, target)
        cast = ours.restore(checkpoint, args=args.StandardRestore(target, cast=True))
    assert bits(cast["zero_d"]) == bits(jnp.float32(3))


def test_a_database_for_each_process_is_restored(tmp_path: Path) -> None:
    """The databases of single processes are read through the one that Orbax merged, which points into them."""
    _with_standard_checkpointer(tmp_path / "merged", make_tree(3))
    assert (tmp_path / "merged" / "ocdbt.process_0").is_dir()
    with AsyncCheckpointer(StandardCheckpointHandler()) as ours:
        assert bits(ours.restore(tmp_path / "merged")) == bits(make_tree(3))
        shutil.rmtree(tmp_path / "merged" / "ocdbt.process_0")
        with pytest.raises(CorruptCheckpointError):
            ours.restore(tmp_path / "merged")


@pytest.mark.parametrize("layout", ["PyTreeCheckpointer", "zarr3", "files"])
@pytest.mark.parametrize("tree", [{"a": None, "b": {}, "c": [], "d": ()}, {"text": "x", "none": None}])
def test_a_tree_without_arrays_is_restored(tmp_path: Path, tree: Any, layout: str) -> None:
    """Orbax makes no database where there is nothing to put into it."""
    LAYOUTS[layout](tmp_path / "c", tree)
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert ours.restore(tmp_path / "c") == tree
        assert ours.restore(tmp_path / "c", {**tree, "text": ""} if "text" in tree else tree) == tree
        assert ours.metadata(tmp_path / "c").item_metadata is not None


def test_the_state_of_plain_sgd_is_an_item(tmp_path: Path) -> None:
    """It holds no array, so Orbax leaves no database in its directory."""
    params = {"w": jnp.ones(2)}
    empty = optax.sgd(0.1).init(params)
    with ocp.CheckpointManager(tmp_path / "run") as theirs:
        items = {"params": ocp.args.StandardSave(params), "opt_state": ocp.args.StandardSave(empty)}
        theirs.save(1, args=ocp.args.Composite(**items))
        theirs.wait_until_finished()
    state = {"params": params, "opt_state": empty}
    with CheckpointManager(tmp_path / "run") as ours:
        assert ours.verify(1) == []
        assert typed_bits(ours.restore(jax.tree.map(jnp.zeros_like, state))) == typed_bits(state)


def test_rich_types_are_restored(tmp_path: Path) -> None:
    """With Orbax's `support_rich_types` an empty named tuple, as most states of optax have, is of a type of its own."""
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))
    tree = {"opt_state": optimizer.init({"w": jnp.ones(2)}), "empty": {}}
    rich = PyTreeMetadataOptions(support_rich_types=True)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(pytree_metadata_options=rich)) as theirs:
        theirs.save(tmp_path / "rich", args=ocp.args.StandardSave(tree))
    assert '"NamedTuple"' in (tmp_path / "rich" / "_METADATA").read_text()
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert typed_bits(ours.restore(tmp_path / "rich", tree)) == typed_bits(tree)
        plain = {"opt_state": [None, [{"trace": {"w": np.zeros(2, np.float32)}}, None]], "empty": {}}
        assert bits(ours.restore(tmp_path / "rich")) == bits(plain)


def test_strings_are_restored(tmp_path: Path) -> None:
    """String leaves, which Orbax keeps in a file of their own, come back as strings."""
    tree = {"name": "größe", "nested": {"empty": ""}, "w": jnp.ones(2)}
    with ocp.PyTreeCheckpointer() as theirs:
        theirs.save(tmp_path / "text", tree)
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert bits(ours.restore(tmp_path / "text")) == bits(tree)
        target = {"name": "", "nested": {"empty": ""}, "w": jnp.zeros(2)}
        assert typed_bits(ours.restore(tmp_path / "text", target)) == typed_bits(tree)


def test_big_endian_arrays_are_restored(tmp_path: Path) -> None:
    """Orbax saves them in this machine's order of bytes; the target has its own again."""
    tree = {"w": np.arange(3, dtype=">f4")}
    with ocp.PyTreeCheckpointer() as theirs:
        theirs.save(tmp_path / "c", tree)
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert typed_bits(ours.restore(tmp_path / "c", {"w": np.zeros(3, ">f4")})) == typed_bits(tree)


@pytest.mark.parametrize("content", [None, "{}", '{"nested": "x"}', '["name", "nested.empty"]'])
def test_a_string_that_was_lost_is_damage(tmp_path: Path, content: str | None) -> None:
    """Where the file of the strings is gone, or lacks one, the error names it; no leaf is left out."""
    with ocp.PyTreeCheckpointer() as theirs:
        theirs.save(tmp_path / "text", {"name": "x", "nested": {"empty": ""}, "w": jnp.ones(2)})
    strings = tmp_path / "text" / "_strings.json"
    strings.unlink() if content is None else strings.write_text(content)
    with (
        Checkpointer(StandardCheckpointHandler()) as ours,
        pytest.raises(CorruptCheckpointError, match=r"_strings\.json"),
    ):
        ours.restore(tmp_path / "text")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_another_kind_are_an_error(tmp_path: Path, impl: str) -> None:
    """A typed PRNG key comes back in its own implementation, and never in place of another one."""
    _with_standard_checkpointer(tmp_path / "key", {"key": jax.random.key(5, impl=impl)})
    other = "rbg" if impl != "rbg" else "threefry2x32"
    with Checkpointer(StandardCheckpointHandler()) as ours:
        assert bits(ours.restore(tmp_path / "key")) == bits({"key": jax.random.key(5, impl=impl)})
        with pytest.raises(StructureMismatchError, match="key"):
            ours.restore(tmp_path / "key", {"key": jax.random.key(5, impl=other)})


# ------------------------------------------------------------------ runs of Orbax's CheckpointManager


def _options(**options: Any) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min", **options)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3, each the single item `default` with metrics; step 2 has the lowest loss."""
    directory = tmp_path_factory.mktemp("run")
    with ocp.CheckpointManager(directory, options=_options()) as theirs:
        for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
            saving = ocp.args.StandardSave(make_tree(step))
            theirs.save(step, args=saving, metrics={"loss": loss}, custom_metadata={"note": f"at {step}"})
        theirs.wait_until_finished()
    return directory


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    """A run of Orbax's that the test may change."""
    directory: Path = tmp_path / "run"
    shutil.copytree(saved_run, directory)
    return directory


def test_steps_of_a_run_are_listed(saved_run: Path) -> None:
    """steps and latest_step name what Orbax's manager saved."""
    with CheckpointManager(saved_run) as ours:
        assert ours.steps() == [1, 2, 3]
        assert ours.latest_step() == 3


def test_the_best_step_is_found_by_orbax_metrics(saved_run: Path) -> None:
    """best_step and step="best" rank by the metrics that Orbax's manager saved."""
    with CheckpointManager(saved_run, keep=BestN(1, "loss")) as ours:
        assert ours.best_step() == 2
        assert ours.best_step("loss", "max") == 3
        assert bits(ours.restore(step="best")["default"]) == bits(make_tree(2))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_metrics_that_are_no_file_rank_nowhere(run: Path, make: Callable[[Path], None]) -> None:
    """A directory or a pipe in the place of a step's metrics: nobody waits for a writer, and the other steps rank."""
    metrics = run / "2" / "metrics" / "metrics"
    metrics.unlink()
    make(metrics)
    with CheckpointManager(run, keep=BestN(1, "loss")) as ours:
        assert ours.best_step() == 1


def test_a_pipe_in_the_place_of_a_tree_is_not_waited_for(run: Path) -> None:
    """Where nothing but a pipe named `checkpoint` is left of a step, there is none."""
    shutil.rmtree(run / "3")
    (run / "3").mkdir()
    os.mkfifo(run / "3" / "checkpoint")
    with CheckpointManager(run) as ours:
        assert ours.latest_step() == 2


def test_a_step_is_described(saved_run: Path) -> None:
    """metadata has Orbax's custom metadata, metrics and times, and shapes and dtypes of its arrays."""
    with CheckpointManager(saved_run) as ours:
        metadata = ours.metadata(2)
        assert ours.verify(2) == []
    assert metadata.custom_metadata == {"note": "at 2"}
    assert metadata.metrics == {"loss": 0.25}
    assert metadata.commit_timestamp_nsecs is not None
    assert metadata.item_metadata["default"]["params"]["w"] == jax.ShapeDtypeStruct((2, 3), jnp.float32)


def test_the_single_item_is_restored_without_a_target(saved_run: Path) -> None:
    """Without a target, Orbax's single item has its name, and the metrics are no item."""
    with CheckpointManager(saved_run) as ours:
        restored = ours.restore()
    assert restored.keys() == {"default"}
    assert bits(restored["default"]) == bits(make_tree(3))


def test_the_single_item_is_restored_into_a_state(saved_run: Path) -> None:
    """Orbax's single item is reached by a state as it is, and by {"default": state}."""
    with CheckpointManager(saved_run) as ours:
        assert typed_bits(ours.restore(make_tree(0))) == typed_bits(make_tree(3))
        assert typed_bits(ours.restore(make_tree(0), step=1)) == typed_bits(make_tree(1))
        named = ours.restore({"default": make_tree(0)})
        assert typed_bits(named) == typed_bits({"default": make_tree(3)})


@pytest.mark.parametrize("begin", ["", "default/"])
def test_leaves_of_the_single_item_are_renamed(saved_run: Path, begin: str) -> None:
    """A path in rename= may begin with the single item or leave it out; one that renames nothing is an error."""
    manager, saved = CheckpointManager(saved_run), make_tree(3)
    like = {**saved, "params": {"kernel": saved["params"]["w"] * 0, "b": saved["params"]["b"]}}
    rename = {f"{begin}params/w": f"{begin}params/kernel"}
    named = manager.restore({"default": like}, rename=rename)
    for restored in (manager.restore(like, rename=rename), named["default"]):
        np.testing.assert_array_equal(restored["params"]["kernel"], saved["params"]["w"])
    moved = {"new" if name == "params" else name: part for name, part in saved.items()}
    restored = manager.restore(moved, rename={f"{begin}params": f"{begin}new"})
    np.testing.assert_array_equal(restored["new"]["w"], saved["params"]["w"])
    with pytest.raises(InvalidArgumentError, match="nothing is saved at 'default/params/v'"):
        manager.restore(like, rename={f"{begin}params/v": f"{begin}params/kernel"})


def test_a_hook_resumes_from_a_run(run: Path) -> None:
    """A hook on a directory of Orbax's goes on at its newest step, and its saves are the next ones."""
    with CheckpointHook(run, every_n_steps=1, keep=None) as hook:
        state = hook.restore(make_tree(0))
        assert hook.start_step == 3
        assert typed_bits(state) == typed_bits(make_tree(3))
        assert hook(4, make_tree(4), metrics={"loss": 0.1})
    with CheckpointManager(run) as ours:
        assert ours.steps() == [1, 2, 3, 4]
        assert typed_bits(ours.restore(make_tree(0))) == typed_bits(make_tree(4))
        assert typed_bits(ours.restore(make_tree(0), step=3)) == typed_bits(make_tree(3))


def test_retention_and_best_span_both_writers(run: Path) -> None:
    """Policies rank Orbax's checkpoints beside ours, by the metrics that each recorded."""
    with CheckpointManager(run, keep=[BestN(1, "loss")]) as ours:
        ours.save(4, {"default": make_tree(4)}, metrics={"loss": 0.3})
        ours.wait()
        assert ours.steps() == [2, 4]
    with ocp.CheckpointManager(run, options=_options()) as theirs:
        assert sorted(theirs.all_steps()) == [2, 4]
        assert theirs.best_step() == 2
        assert bits(theirs.restore(4, args=ocp.args.StandardRestore())) == bits(make_tree(4))


def test_metrics_can_be_added_to_a_run(run: Path) -> None:
    """record_metrics on a checkpoint of Orbax's keeps what was there, for both readers."""
    with CheckpointManager(run, keep=None) as ours:
        ours.record_metrics(1, {"accuracy": 0.9})
        assert ours.best_step("accuracy", "max") == 1
        assert ours.best_step("loss") == 2
    with ocp.CheckpointManager(run, options=_options()) as theirs:
        assert theirs.metrics(1) == {"loss": 0.5, "accuracy": 0.9}
        assert bits(theirs.restore(1, args=ocp.args.StandardRestore())) == bits(make_tree(1))


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    """A run of Orbax's manager without best_fn restores; its steps have no metrics."""
    with ocp.CheckpointManager(tmp_path) as theirs:
        theirs.save(7, args=ocp.args.StandardSave(make_tree(7)))
        theirs.wait_until_finished()
    with CheckpointManager(tmp_path) as ours:
        assert typed_bits(ours.restore(make_tree(0))) == typed_bits(make_tree(7))
        assert ours.metadata(7).metrics == {}


@pytest.fixture(scope="module")
def composite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("composite")
    tree = make_tree(5)
    with ocp.CheckpointManager(directory) as theirs:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(tree["params"]),
            opt_state=ocp.args.PyTreeSave(tree["opt_state"]),
            config=ocp.args.JsonSave({"layers": [4, 2]}),
        )
        theirs.save(5, args=items)
        theirs.wait_until_finished()
    return directory


def test_items_of_a_composite_are_restored(composite_run: Path) -> None:
    """Every item of a composite comes back without being told how: pytrees and JSON."""
    with CheckpointManager(composite_run) as ours:
        restored = ours.restore()
    assert restored.keys() == {"params", "opt_state", "config"}
    assert restored["config"] == {"layers": [4, 2]}
    for name in ("params", "opt_state"):
        assert bits(restored[name]) == bits(make_tree(5)[name])


def test_an_item_that_was_never_finished_is_none(composite_run: Path, tmp_path: Path) -> None:
    """A temporary directory that Orbax left within a checkpoint is neither described nor restored."""
    run = tmp_path / "run"
    shutil.copytree(composite_run, run)
    shutil.copytree(run / "5" / "params", run / "5" / "ema.orbax-checkpoint-tmp")
    with CheckpointManager(run) as ours:
        assert ours.metadata(5).item_metadata.keys() == {"params", "opt_state", "config"}
        assert ours.restore().keys() == {"params", "opt_state", "config"}


def test_items_of_a_composite_are_restored_into_a_state(composite_run: Path) -> None:
    """Items of a composite are the parts of a state, all of them or those asked for."""
    tree, target = make_tree(5), make_tree(0)
    names = ("params", "opt_state")
    with CheckpointManager(composite_run) as ours:
        state = ours.restore({name: target[name] for name in names})
        assert typed_bits(state) == typed_bits({name: tree[name] for name in names})
        chosen = ours.restore(target, items=["params"])
        assert typed_bits(chosen) == typed_bits({"params": tree["params"]})
        assert ours.restore(items=["config"]) == {"config": {"layers": [4, 2]}}
        with pytest.raises(ItemNotFoundError, match=r"ema.*there are"):
            ours.restore(items=["ema"])


def test_our_composite_handler_restores_a_step(composite_run: Path) -> None:
    """CompositeCheckpointHandler reads Orbax's step by its recorded handlers, or by the args it is given."""
    with Checkpointer(CompositeCheckpointHandler()) as ours:
        assert ours.restore(composite_run / "5")["config"] == {"layers": [4, 2]}
    wanted = args.Composite(params=args.StandardRestore(make_tree(0)["params"]), config=args.JsonRestore())
    with Checkpointer(CompositeCheckpointHandler()) as ours:
        restored = ours.restore(composite_run / "5", args=wanted)
    assert typed_bits(restored["params"]) == typed_bits(make_tree(5)["params"])
    assert restored["config"] == {"layers": [4, 2]}


def test_a_key_is_restored_beside_a_state(tmp_path: Path) -> None:
    """An item of Orbax's own kind, such as a random key, comes with the others, by its name, or is left alone."""
    with ocp.CheckpointManager(tmp_path) as theirs:
        items = {"state": ocp.args.StandardSave(make_tree(1)), "rng": ocp.args.JaxRandomKeySave(jax.random.key(1))}
        theirs.save(1, args=ocp.args.Composite(**items))
        theirs.wait_until_finished()
    with CheckpointManager(tmp_path) as ours:
        assert bits(ours.restore()) == bits({"state": make_tree(1), "rng": jax.random.key(1)})
        assert bits(ours.restore(items=["state"])) == bits({"state": make_tree(1)})
        assert typed_bits(ours.restore(make_tree(0))) == typed_bits(make_tree(1))


# ------------------------------------------------------------------ Orbax v1


def test_v1_save_is_restored(tmp_path: Path) -> None:
    """What v1's free function saved, zarr v3 in one item, is read as the composite that it is."""
    v1.save(tmp_path / "free", make_tree(3), custom_metadata={"epoch": 3})
    with Checkpointer(CompositeCheckpointHandler()) as ours:
        (item,) = ours.restore(tmp_path / "free").values()
        assert bits(item) == bits(make_tree(3))
        assert ours.metadata(tmp_path / "free").custom_metadata == {"epoch": 3}


def test_v1_save_into_a_run_is_a_step(tmp_path: Path) -> None:
    """What v1's free function saved under a step's number is that step."""
    v1.save(tmp_path / "12", make_tree(3))
    with CheckpointManager(tmp_path) as ours:
        assert ours.steps() == [12]
        assert typed_bits(ours.restore(make_tree(0))) == typed_bits(make_tree(3))


def test_v1_training_checkpointer_is_restored(tmp_path: Path) -> None:
    """A run of v1's training.Checkpointer is listed, ranked, described and restored, by item and as a state."""
    tree = make_tree(7)
    with v1.training.Checkpointer(tmp_path) as theirs:
        theirs.save(5, make_tree(5), metrics={"loss": 1.5}, custom_metadata={"note": "five"})
        items = {name: tree[name] for name in ("params", "opt_state")}
        theirs.save_checkpointables(7, dict(items), metrics={"loss": 0.5})
    with CheckpointManager(tmp_path, keep=BestN(1, "loss", "max")) as ours:
        assert ours.steps() == [5, 7]
        assert ours.best_step() == 5
        assert ours.metadata(5).custom_metadata == {"note": "five"}
        assert typed_bits(ours.restore(make_tree(0), step="best")) == typed_bits(make_tree(5))
        assert bits(ours.restore()) == bits(items)
        target = {name: make_tree(0)[name] for name in items}
        assert typed_bits(ours.restore(target)) == typed_bits(items)


# ------------------------------------------------------------------ damage


def _newest_item(run: Path) -> Path:
    return run / "3" / "default"


def _remove_manifest(item: Path) -> None:
    (item / "manifest.ocdbt").unlink()


def _remove_tree_metadata(item: Path) -> None:
    (item / "_METADATA").unlink()


def _cut_tree_metadata(item: Path) -> None:
    text = (item / "_METADATA").read_text()
    (item / "_METADATA").write_text(text[: len(text) // 2])


def _empty_tree_metadata(item: Path) -> None:
    (item / "_METADATA").write_text("{}")


def _remove_item(item: Path) -> None:
    shutil.rmtree(item)


def _remove_data(item: Path) -> None:
    shutil.rmtree(item / "ocdbt.process_0" / "d")


def _cut_data(item: Path) -> None:
    for path in (item / "ocdbt.process_0" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_index(item: Path) -> None:
    for path in (item / "d").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def _damage_step_metadata(item: Path) -> None:
    (item.parent / "_CHECKPOINT_METADATA").write_text('{"item_handlers": ')


DAMAGE: list[Callable[[Path], None]] = [
    _remove_manifest,
    _remove_tree_metadata,
    _cut_tree_metadata,
    _empty_tree_metadata,
    _remove_item,
    _remove_data,
    _cut_data,
    _flip_index,
    _damage_step_metadata,
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("with_target", [True, False])
def test_damage_makes_restore_fall_back(
    run: Path, damage: Callable[[Path], None], with_target: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where Orbax's newest checkpoint is damaged, the one before it is restored, and the log names the damaged one."""
    damage(_newest_item(run))
    with CheckpointManager(run) as ours:
        restored = ours.restore(make_tree(0) if with_target else None)
        assert bits(restored if with_target else restored["default"]) == bits(make_tree(2))
    assert any("step 3" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("content", ["{}", "[]", '"tree_metadata"'])
def test_tree_metadata_of_another_form_is_called_damaged(run: Path, content: str) -> None:
    """JSON that does not describe a tree is an error that names the file, not a KeyError from within."""
    (_newest_item(run) / "_METADATA").write_text(content)
    with CheckpointManager(run) as ours, pytest.raises(CorruptCheckpointError, match="_METADATA is damaged: it has no"):
        ours.restore(make_tree(0), step=3)


def test_a_lost_chunk_is_damage(tmp_path: Path) -> None:
    """A missing file of an array that Orbax kept in files is an error, not zeros."""
    _with_pytree_handler(use_ocdbt=False)(tmp_path / "files", make_tree(3))
    (tmp_path / "files" / "big" / "0").unlink()
    with Checkpointer(StandardCheckpointHandler()) as ours, pytest.raises(CorruptCheckpointError, match="big"):
        ours.restore(tmp_path / "files")


def test_a_damaged_step_that_was_asked_for_is_an_error(run: Path) -> None:
    """A step asked for by number is never replaced by another one."""
    _remove_manifest(_newest_item(run))
    with CheckpointManager(run) as ours:
        with pytest.raises(CorruptCheckpointError):
            ours.restore(make_tree(0), step=3)
        assert ours.verify(3) != []
        assert ours.verify(2) == []


def test_a_run_that_is_damaged_throughout_is_an_error(run: Path) -> None:
    """Where no checkpoint of Orbax's can be read, the error names each one; nothing starts afresh."""
    for step in (1, 2, 3):
        _remove_manifest(run / str(step) / "default")
    with CheckpointHook(run) as hook, pytest.raises(NoValidCheckpointError, match=r"(?s)step 3.*step 2.*step 1"):
        hook.restore(make_tree(0))


def test_what_orbax_never_committed_is_no_step(run: Path) -> None:
    """A temporary directory that Orbax left, and an empty one, are no checkpoints."""
    shutil.copytree(run / "3", run / "4.orbax-checkpoint-tmp")
    (run / "5").mkdir()
    with CheckpointManager(run) as ours:
        assert ours.latest_step() == 3
        with pytest.raises((CheckpointNotFoundError, ValueError)):
            ours.restore(step=5)


# ------------------------------------------------------------------ steps under other names


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"step_prefix": "ckpt"}, "ckpt_7"),
        ({"step_format_fixed_length": 8}, "00000007"),
        ({"step_prefix": "m", "step_format_fixed_length": 4}, "m_0007"),
    ],
)
def test_a_run_with_other_names_for_its_steps_is_not_taken_for_an_empty_one(
    tmp_path: Path, options: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error and the log name the newest and the two ways to it; and both work."""
    tree = make_tree(7)
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step in (5, 7):
            manager.save(step, args=ocp.args.StandardSave(make_tree(step)))
        manager.wait_until_finished()
    with pytest.raises(CheckpointNotFoundError, match=rf"'{name}'\].*ckpt_hooks.restore\('.*/{name}'\).*rename it"):
        CheckpointManager(tmp_path).restore(make_tree(0))
    with CheckpointHook(tmp_path) as hook:
        hook.restore(make_tree(0))
    assert hook.start_step == 0
    assert f"/{name}'" in caplog.text
    assert typed_bits(ckpt_hooks.restore(tmp_path / name, make_tree(0))) == typed_bits(tree)
    (tmp_path / name).rename(tmp_path / "7")
    with CheckpointHook(tmp_path) as hook:
        assert typed_bits(hook.restore(make_tree(0))) == typed_bits(tree)
        assert hook.start_step == 7
