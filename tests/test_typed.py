"""`restore(typed=True)`: without a target, a state comes back in the types that it was saved in."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, given, settings

import ckpt_hooks
from ckpt_hooks import (
    Checkpointer,
    CheckpointManager,
    CompositeCheckpointHandler,
    JsonCheckpointHandler,
    StandardCheckpointHandler,
    args,
    structure,
)
from ckpt_hooks.errors import CheckpointError, ClassNotFoundError, InvalidArgumentError
from ckpt_hooks.testing import assert_same, zoo
from tests.sameness import bits


def on_host(tree: Any) -> Any:
    """The tree with NumPy's arrays in place of JAX's: what a restore without a target gives, keys excepted."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) and not is_key(leaf) else leaf, tree
    )


def is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def saved_and_restored(directory: Path, state: Any, **options: Any) -> Any:
    with CheckpointManager(directory, async_save=False) as manager:
        manager.save(1, state)
        return manager.restore(typed=True, **options)


# What has a function for a static field, and what JAX does not know: they have tests of their own.
SAME = [name for name in zoo.names(flax=True, optax=True) if name not in ("flax train state", "opaque dataclass")]


@pytest.mark.parametrize("name", SAME)
def test_every_state_of_the_zoo_comes_back_as_itself(tmp_path: Path, name: str) -> None:
    """Types, tree, keys, static fields and bits: all but which library the arrays are of."""
    assert_same(on_host(zoo.make(name)), saved_and_restored(tmp_path, zoo.make(name)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=zoo.states(with_jax=False))
def test_states_nested_at_random_come_back_as_themselves(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Whatever tree the strategy builds, no target is needed."""
    assert_same(state, saved_and_restored(tmp_path_factory.mktemp("run"), state))


# ------------------------------------------------------------------ states as a whole


class Experiment(TrainState):
    batch_stats: Any


class Averages(flax.struct.PyTreeNode):
    params: Any
    decay: float = flax.struct.field(pytree_node=False)
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("a",))


def make_experiment() -> Experiment:
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    return Experiment.create(apply_fn=len, params=params, tx=optax.adam(0.1), batch_stats={"mean": jnp.zeros(3)})


def test_a_train_state_comes_back_as_its_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its own `opt_state`; the functions, which no checkpoint holds, are named in the log and can be set."""
    state = make_experiment().apply_gradients(grads={"dense": {"kernel": jnp.ones((2, 3))}})
    with caplog.at_level(logging.WARNING):
        restored = saved_and_restored(tmp_path, state)
    assert "['apply_fn', 'tx']" in caplog.text
    assert type(restored) is Experiment
    assert isinstance(restored.opt_state[0], optax.ScaleByAdamState)
    restored = restored.replace(apply_fn=state.apply_fn, tx=state.tx)
    assert_same(on_host(state), restored)
    grads = {"dense": {"kernel": jnp.ones((2, 3))}}
    assert_same(state.apply_gradients(grads=grads).params, restored.apply_gradients(grads=grads).params)


def test_a_field_that_was_not_recorded_says_so_when_it_is_used(tmp_path: Path) -> None:
    """Not None, whose error would name neither the field nor what to do."""
    restored = saved_and_restored(tmp_path, make_experiment())
    assert repr(restored.tx) == "<Experiment.tx: not recorded>"
    with pytest.raises(AttributeError, match=r"Experiment\.tx is a static field that a checkpoint cannot hold. Set it"):
        restored.apply_gradients(grads=restored.params)
    with pytest.raises(TypeError, match=r"Experiment\.apply_fn.*cannot be called"):
        restored.apply_fn()


def test_static_fields_that_are_literals_are_recorded(tmp_path: Path) -> None:
    """Numbers, strings and tuples of them are as they were, and are no values of a later default."""
    state = {"ema": Averages(params={"w": np.ones(2)}, decay=0.5, names=("x", "y")), "step": 1}
    assert_same(state, saved_and_restored(tmp_path, state))


@pytest.mark.parametrize(
    "state",
    [
        [np.ones(2), {"w": 1}],
        (np.ones(2), (3,)),
        zoo.Moments({"w": np.ones(2)}, 1),
        Averages(params={"w": np.ones(2)}, decay=0.5),
        collections.OrderedDict(b=np.ones(2), a=1),
        {0: np.ones(2), 10: {"w": 1}},
        {"state": [1, 2]},
        {"state": {"w": 1}},
        {},
        5,
    ],
    ids=repr,
)
def test_a_state_of_any_kind_is_itself(tmp_path: Path, state: Any) -> None:
    """A list, a tuple, a named tuple, a dataclass, a dict with a part called `state`, a bare number."""
    assert_same(state, saved_and_restored(tmp_path, state))


def test_a_dataclass_that_jax_does_not_know_may_be_the_state(tmp_path: Path) -> None:
    """As on the way with a target."""
    state = zoo.make("opaque dataclass")
    restored = saved_and_restored(tmp_path, state)
    assert type(restored) is zoo.Opaque
    assert_same(on_host(state.params), restored.params)
    assert restored.step == state.step


def test_a_string_of_numpy_is_a_string(tmp_path: Path) -> None:
    """It derives from Python's, and is saved as one."""
    assert_same({"name": "digits"}, saved_and_restored(tmp_path, {"name": np.str_("digits")}))


def test_items_are_typed_too(tmp_path: Path) -> None:
    """With `items` it is a dict, as always."""
    restored = saved_and_restored(tmp_path, make_experiment(), items=("opt_state",))
    assert restored.keys() == {"opt_state"}
    assert isinstance(restored["opt_state"][0], optax.ScaleByAdamState)


def test_every_optax_state_comes_back_as_itself(tmp_path: Path) -> None:
    """Chains, masks, partitions, injected hyperparameters, accumulation, what skips NaNs, `optax.contrib`."""
    params = {"a": {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}, "c": jnp.ones(3)}
    labels = {"a": "fast", "c": "slow"}
    optimizers: dict[str, Any] = {
        "adamw": optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "lion": optax.lion(1e-3),
        "lbfgs": optax.lbfgs(),
        "chain": optax.chain(optax.clip(1.0), optax.scale_by_rms(), optax.trace(0.9), optax.scale(-0.1)),
        "masked": optax.masked(optax.adam(0.1), {"a": {"w": True, "b": False}, "c": True}),
        "multi_transform": optax.multi_transform({"fast": optax.adam(0.1), "slow": optax.set_to_zero()}, labels),
        "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1.0, 0.0, 9)),
        "multi_steps": optax.MultiSteps(optax.adam(0.1), 3),
        "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5),
        "lookahead_free": optax.contrib.schedule_free_adamw(0.1),
        "prodigy": optax.contrib.prodigy(),
        "muon": optax.contrib.muon(0.1),
        "reduce_on_plateau": optax.contrib.reduce_on_plateau(),
        "ema": optax.ema(0.9),
        "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    }
    states = {name: optimizer.init(params) for name, optimizer in optimizers.items()}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"opt": states})
        assert_same({"opt": states}, manager.restore(zoo.blank({"opt": states})))
        assert_same(on_host({"opt": states}), manager.restore(typed=True))


# ------------------------------------------------------------------ what cannot be


def test_a_class_that_is_gone_is_an_error_that_lists_each(tmp_path: Path) -> None:
    """By path and name, and with what to do; the way without types stays open."""

    class Local(NamedTuple):
        x: Any

    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"params": {"deep": [Local(1), {"er": Local(2)}]}})
        with pytest.raises(ClassNotFoundError) as error:
            manager.restore(typed=True)
        assert "deep.0: tests.test_typed.test_a_class" in str(error.value)
        assert "deep.1.er" in str(error.value)
        assert "typed=True (nested dicts" in str(error.value)
        assert isinstance(error.value, ImportError)
        assert manager.restore()["params"]["deep"][1] == {"er": {"x": 2}}


@pytest.mark.parametrize("kind", ["named tuple", "dataclass"])
def test_a_class_that_has_changed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fields that were added or renamed since are told; no value is put under another name."""
    new: Any
    state: Any
    if kind == "named tuple":
        state, name, new = zoo.Moments(1, 2), "Moments", collections.namedtuple("Moments", "mean var")
    else:
        state, name = zoo.Registered(1, "x"), "Registered"
        new = dataclasses.make_dataclass("Registered", ["weights", "name", "more"])
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"part": state})
        monkeypatch.setattr(f"ckpt_hooks.testing.zoo_states.{name}", new)
        with pytest.raises(ClassNotFoundError, match="it has the fields"):
            manager.restore(typed=True)


def test_a_registered_class_of_another_kind_is_an_error(tmp_path: Path) -> None:
    """What only its own functions can put together needs a target, and comes back with one."""
    state = {"f": jax.tree_util.Partial(len, np.ones(2))}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        with pytest.raises(ClassNotFoundError, match=r"Partial: it is no named tuple, dataclass or mapping"):
            manager.restore(typed=True)
        assert_same(state, manager.restore({"f": jax.tree_util.Partial(len, np.zeros(2))}))


def test_a_record_is_never_run() -> None:
    """What is no class is not called, and a class's own code does not run to make an instance."""
    custom = {"ckpt_hooks": {"structure": {"type": "os:system"}}}
    with pytest.raises(ClassNotFoundError, match="it is no class"):
        structure.typed_item("item", {"command": "touch proof"}, custom)
    custom = {"ckpt_hooks": {"structure": {"type": "tests.test_typed:Loud"}}}
    assert structure.typed_item("item", {"x": 1}, custom).x == 1


@dataclasses.dataclass
class Loud:
    x: int

    def __post_init__(self) -> None:
        raise AssertionError("the code of a class has run")


def test_mistakes_are_told(tmp_path: Path) -> None:
    """`typed` with a target, and of a checkpoint that has no record; neither is taken for damage."""
    with ocp.CheckpointManager(tmp_path) as theirs:
        theirs.save(3, args=ocp.args.StandardSave({"w": np.ones(2)}))
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(InvalidArgumentError, match="no record of its types: Orbax"):
            manager.restore(typed=True)
        with pytest.raises(InvalidArgumentError, match="leave one out"):
            manager.restore({"default": {"w": np.zeros(2)}}, typed=True)
        with pytest.raises(InvalidArgumentError, match="whole items"):
            manager.restore(items=("default/w",), typed=True)
        assert issubclass(ClassNotFoundError, CheckpointError)


# ------------------------------------------------------------------ the record


def test_orbax_restores_what_has_a_record(tmp_path: Path) -> None:
    """With and without a target; it hands the record on as custom metadata."""
    state = {
        "opt_state": optax.adam(0.1).init({"w": jnp.ones(3)}),
        "ema": Averages(params={"w": jnp.ones(2)}, decay=0.5),
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
    with ocp.StandardCheckpointer() as theirs:
        for name, part in state.items():
            assert bits(theirs.restore(tmp_path / "1" / name, part)) == bits(part)
            assert bits(theirs.restore(tmp_path / "1" / name)) == bits(part)


def test_a_repeated_save_describes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is a part of the plan of a structure."""
    state = {"opt_state": optax.adam(0.1).init({"w": jnp.ones((3, 7))})}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        monkeypatch.setattr(structure, "describe", None)
        manager.save(2, state)
        assert isinstance(manager.restore(typed=True)["opt_state"][0], optax.ScaleByAdamState)


def test_the_record_is_small(tmp_path: Path) -> None:
    """A thousand plain leaves add nothing to it."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, zoo.make("wide"))
    custom = json.loads((tmp_path / "1" / "params" / "_METADATA").read_text())["custom_metadata"]
    assert custom == {"ckpt_hooks": {"structure": {}}}


def test_a_process_that_has_imported_nothing_gets_the_types(tmp_path: Path) -> None:
    """The modules are imported by the restore, and no device is needed."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"opt_state": optax.adam(0.1).init({"w": jnp.ones(3)}), "step": 1})
    code = (
        "import sys; from ckpt_hooks import CheckpointManager\n"
        "assert 'optax' not in sys.modules\n"
        "print(type(CheckpointManager(sys.argv[1]).restore(typed=True)['opt_state'][0]).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert output.strip() == "ScaleByAdamState"


def test_a_checkpointer_gives_types_back_too(tmp_path: Path) -> None:
    """By typed=True of the args, alone and for the items of a composite; together with a target it is an error."""
    state = zoo.Moments(np.ones(2), (1, 2))
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", state)
        assert_same(state, checkpointer.restore(tmp_path / "1", typed=True))
        assert_same(state, checkpointer.restore(tmp_path / "1", args=args.StandardRestore(typed=True)))
        assert_same(state, ckpt_hooks.restore(tmp_path / "1", typed=True))
        with pytest.raises(InvalidArgumentError, match="without a target"):
            checkpointer.restore(tmp_path / "1", state, typed=True)
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "2", args=args.Composite(a=args.StandardSave(state)))
        wanted = args.Composite(a=args.StandardRestore(typed=True))
        assert_same(state, checkpointer.restore(tmp_path / "2", args=wanted)["a"])


def test_json_has_types_of_its_own(tmp_path: Path) -> None:
    """What is no tree comes back as it is."""
    with Checkpointer(JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", {"a": [1, None]})
    assert ckpt_hooks.restore(tmp_path / "1", typed=True) == {"a": [1, None]}


@pytest.mark.parametrize("kind", ["a file of Flax's", "a tree of Orbax's", "a key of Orbax's"])
def test_where_no_types_were_recorded_it_says_so(tmp_path: Path, kind: str) -> None:
    """Whoever wrote it."""
    path = tmp_path / "checkpoint"
    if kind == "a file of Flax's":
        path.write_bytes(flax.serialization.to_bytes({"w": np.ones(2)}))
    else:
        is_key = kind == "a key of Orbax's"
        handler = ocp.JaxRandomKeyCheckpointHandler() if is_key else ocp.StandardCheckpointHandler()
        key = ocp.args.JaxRandomKeySave(jax.random.key(0))
        saved = key if is_key else ocp.args.StandardSave({"w": np.ones(2)})
        with ocp.Checkpointer(handler) as theirs:
            theirs.save(path, args=saved)
    with pytest.raises(InvalidArgumentError, match="no record of its types"):
        ckpt_hooks.restore(path, typed=True)


def test_one_tree_of_a_checkpointer_has_a_record_too(tmp_path: Path) -> None:
    """A checkpoint that is one pytree without items."""
    path = tmp_path / "run" / "1"
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, zoo.Moments(np.ones(2), (1, 2)))
    with CheckpointManager(tmp_path / "run") as manager:
        assert_same(zoo.Moments(np.ones(2), (1, 2)), manager.restore(typed=True))
        with pytest.raises(InvalidArgumentError, match="which typed=True gives whole; leave items= out"):
            manager.restore(items=("mean",), typed=True)
