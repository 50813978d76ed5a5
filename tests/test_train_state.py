"""States of every kind through a checkpoint: how they are split, what comes back, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state as flax_train_state

from ckpt_hooks import CheckpointManager, devices
from ckpt_hooks.errors import (
    CheckpointError,
    InvalidArgumentError,
    NameCollisionError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.train_state import join, split


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(tmp_path / "run", async_save=False, keep=None) as manager:
        yield manager


RoundTrip = Callable[..., Any]


@pytest.fixture
def round_trip(manager: CheckpointManager) -> RoundTrip:
    """Saves a state, and restores it into `like` (by default the state itself)."""

    def save_and_restore(state: Any, like: Any = None, **options: Any) -> Any:
        manager.save(len(manager.steps()), state)
        return manager.restore(state if like is None else like, **options)

    return save_and_restore


def bits(leaf: Any) -> Any:
    """All that there is to a leaf: its type, dtype and bytes."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(leaf)), bits(jax.random.key_data(leaf))
    if isinstance(leaf, jax.Array):
        return "jax", leaf.weak_type, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), str(leaf.dtype), leaf.shape, leaf.tobytes()
    return type(leaf), leaf


def assert_same(restored: Any, state: Any) -> None:
    """The same structure, of the same types, with the same bits."""
    structures: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (restored, state)]
    assert structures[0] == structures[1]
    found = jax.tree_util.tree_leaves_with_path(restored)
    expected = jax.tree_util.tree_leaves_with_path(state)
    assert [(jax.tree_util.keystr(p), bits(x)) for p, x in found] == [
        (jax.tree_util.keystr(p), bits(x)) for p, x in expected
    ]


# ------------------------------------------------------------------ kinds of states


class Model(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(inputs))
        return jnp.asarray(nn.Dense(2)(nn.relu(hidden)))


class BatchNormState(flax_train_state.TrainState):
    batch_stats: Any = None
    dropout_key: Any = None


def linen_state(seed: int = 0) -> Any:
    model = Model()
    variables = model.init(jax.random.key(seed), jnp.ones((1, 3)), train=False)
    return BatchNormState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        dropout_key=jax.random.key(seed + 1),
        tx=optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)),
    )


@jax.jit
def train_step(state: Any, inputs: jax.Array) -> Any:
    def loss(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updates = state.apply_fn(variables, inputs, train=True, mutable=["batch_stats"])
        noise = jax.random.normal(jax.random.fold_in(state.dropout_key, state.step), outputs.shape)
        return jnp.mean((outputs - noise) ** 2), updates

    gradients, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"])


def trained_state(num_steps: int = 3) -> Any:
    state = linen_state()
    for step in range(num_steps):
        state = train_step(state, jnp.ones((4, 3)) * step)
    return state


class Color(enum.IntEnum):
    RED = 1
    BLUE = 2


class Rate(float, enum.Enum):
    LOW = 0.5
    HIGH = 1.5


class Split(enum.StrEnum):
    TRAIN = "train"
    TEST = "test"


class Celsius(float):
    pass


class Clipped(float):
    def __new__(cls, value: float) -> Any:
        return super().__new__(cls, min(value, 1.0))


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Bare:
    pass


@dataclasses.dataclass
class Plain:
    params: Any
    step: int


@flax.struct.dataclass
class Struct:
    params: Any
    name: str = flax.struct.field(pytree_node=False)
    step: int = 0


make_struct: Any = Struct


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    params: Any
    step: Any


class WithMetrics(flax_train_state.TrainState):
    metrics: Any = None


PARAMS = {"w": np.arange(4.0), "b": np.float32(2)}


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ({"params": PARAMS, "step": 3}, ["params", "step"]),
        (collections.OrderedDict(z=PARAMS, a=1), ["z", "a"]),
        (collections.defaultdict(int, a=1), ["a"]),
        (flax.core.freeze({"params": PARAMS, "batch_stats": {}}), ["batch_stats", "params"]),
        (Point(PARAMS, 3), ["x", "y"]),
        (Plain(PARAMS, 3), ["params", "step"]),
        (make_struct(PARAMS, "static", 3), ["params", "step"]),
        (Registered(PARAMS, 3), ["params", "step"]),
        ({0: PARAMS, 1: PARAMS}, ["0", "1"]),
        ({"params": PARAMS, "ema": None, "batch_stats": {}}, ["batch_stats", "ema", "params"]),
        ([PARAMS, 3], ["state"]),
        ((PARAMS, 3), ["state"]),
        (np.arange(3), ["state"]),
        (7, ["state"]),
        ({}, ["state"]),
        ((), ["state"]),
        (optax.adam(0.1).init(PARAMS), ["state"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_state_is_split_one_level_down_and_comes_back(
    manager: CheckpointManager, round_trip: RoundTrip, state: Any, parts: list[str]
) -> None:
    """Each part is an item of its own, anything without named parts the item `state`; the type comes back whole."""
    assert sorted(split(state)) == sorted(parts)
    restored = round_trip(state)
    assert sorted(manager.metadata(0).item_handlers or ()) == sorted(parts)
    assert type(restored) is type(state)
    if isinstance(state, Plain):
        restored, state = vars(restored), vars(state)
    assert_same(restored, state)
    assert sorted(manager.restore()) == sorted(parts)


def test_join_is_the_inverse_of_split() -> None:
    """join(like, split(state)) is the state, in the type of like."""
    for state in (
        {"a": 1},
        Point(1, 2),
        make_struct(1, "s", 2),
        Plain(1, 2),
        [1, 2],
        flax.core.freeze({"a": {"b": 1}}),
    ):
        assert join(state, split(state)) == state


def test_a_train_state_is_one_item_per_field(manager: CheckpointManager) -> None:
    """A linen TrainState, with the fields of a subclass, is saved without its static apply_fn and tx."""
    manager.save(1, trained_state())
    expected = ["batch_stats", "dropout_key", "opt_state", "params", "step"]
    assert sorted(manager.metadata(1).item_handlers or ()) == expected


def test_static_fields_come_from_like(round_trip: RoundTrip) -> None:
    """What is no pytree field is not saved: it is what `like` has."""
    restored = round_trip(make_struct(PARAMS, "saved", 3), make_struct(PARAMS, "like", 0))
    assert restored.name == "like"
    assert restored.step == 3


def test_a_plain_dataclass_with_fields_that_its_constructor_does_not_take(round_trip: RoundTrip) -> None:
    """A dataclass is filled field by field: neither __init__ nor __post_init__ runs again."""

    @dataclasses.dataclass
    class Derived:
        params: Any
        total: Any = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.total = np.float64(-1)

    state = Derived(PARAMS)
    state.total = np.float64(17)
    restored = round_trip(state, Derived(PARAMS))
    assert restored.total == 17
    assert_same(restored.params, PARAMS)


# ------------------------------------------------------------------ real states


def test_a_trained_state_is_bit_equal_and_trains_on_bit_equal(round_trip: RoundTrip) -> None:
    """A linen and optax state comes back to the last bit, and so does the step that follows."""
    state = trained_state()
    restored = round_trip(state)
    assert_same(restored, state)
    inputs = jnp.full((4, 3), 0.5)
    assert_same(train_step(restored, inputs), train_step(state, inputs))


def test_a_fresh_state_is_filled(round_trip: RoundTrip) -> None:
    """A freshly initialised state, whose step is a Python int, takes over the trained one."""
    state = trained_state()
    restored = round_trip(state, linen_state(seed=5))
    assert restored.step == 3
    assert type(restored.step) is int
    assert_same(restored.replace(step=state.step, apply_fn=state.apply_fn, tx=state.tx), state)


def test_an_abstract_state_is_filled(round_trip: RoundTrip) -> None:
    """A state of shapes only, from jax.eval_shape, becomes one of JAX arrays in the same type."""
    state = trained_state()
    abstract = jax.eval_shape(lambda: trained_state())
    restored = round_trip(state, abstract)
    assert type(restored) is BatchNormState
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(restored))
    assert_same(restored.replace(apply_fn=state.apply_fn, tx=state.tx), state)


def test_a_field_named_metrics_is_a_part_of_the_state(manager: CheckpointManager) -> None:
    """A TrainState with a field `metrics` comes back whole, beside the metrics of the checkpoint."""
    state = WithMetrics.create(
        apply_fn=None, params=PARAMS, tx=optax.sgd(0.1), metrics={"loss": jnp.float32(3), "n": jnp.int32(2)}
    )
    manager.save(1, state, metrics={"loss": 0.5})
    assert_same(manager.restore(state), state)
    assert manager.restore()["metrics"] == {"loss": 3, "n": 2}
    assert manager.metadata(1).metrics == {"loss": 0.5}
    manager.record_metrics(1, {"accuracy": 0.9})
    assert manager.metadata(1).metrics == {"loss": 0.5, "accuracy": 0.9}
    assert_same(manager.restore(state), state)
    assert manager.verify(1) == []


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adam_bfloat16": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "adamw_schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
    "adafactor": optax.adafactor(0.1),
    "lamb": optax.lamb(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "novograd": optax.novograd(0.1),
    "sm3": optax.sm3(0.1),
    "noisy_sgd": optax.noisy_sgd(0.1, key=0),
    "lbfgs": optax.scale_by_lbfgs(),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.adam(0.1)),
    "named_chain": optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "partition": optax.partition({"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), every_k_schedule=4),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "lookahead": optax.lookahead(optax.adam(0.1), 5, 0.5),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "reduce_on_plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "empty": optax.identity(),
    "freeze": optax.set_to_zero(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "trace": optax.trace(0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optax_state_comes_back(round_trip: RoundTrip, name: str) -> None:
    """The state of every kind of optimiser comes back in its types and to the last bit, from arrays and from shapes."""
    params: Any = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.zeros(3)}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    optimizer = OPTIMIZERS[name]
    state = {"opt_state": optimizer.init(params)}
    restored = round_trip(state)
    assert_same(restored, state)
    abstract = jax.eval_shape(lambda: {"opt_state": optimizer.init(params)})
    from_shapes = round_trip(state, abstract)
    assert_same(from_shapes, jax.tree_util.tree_map(jnp.asarray, state))


# ------------------------------------------------------------------ leaves


LEAVES: dict[str, Any] = {
    "bfloat16": jnp.arange(4, dtype=jnp.bfloat16),
    "float8": jnp.arange(4, dtype=jnp.float8_e4m3fn),
    "int4": jnp.arange(4, dtype=jnp.int4),
    "uint64_numpy": np.array([2**63, 1], np.uint64),
    "bool": jnp.array([True, False]),
    "complex": jnp.array([1 + 2j, -3j]),
    "zero_size": jnp.zeros((0, 3)),
    "zero_size_numpy": np.zeros((3, 0), np.int16),
    "scalar_array": jnp.float32(3.5),
    "numpy_0d": np.array(3.5),
    "numpy_scalar": np.float16(3.5),
    "numpy_bool": np.True_,
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(12.0)[::3],
    "big_endian": np.arange(3, dtype=">f8"),
    "nan_payload": np.array([0x7FF8000000000123, 0x8000000000000000], np.uint64).view(np.float64),
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(3), 4),
    "rbg_key": jax.random.key(3, impl="rbg"),
    "old_key": jax.random.PRNGKey(3),
    "int": 7,
    "big_int": 2**62,
    "negative_int": -7,
    "float": 0.1,
    "python_bool": True,
    "python_complex": 1 + 2j,
    "string": "digits \N{GREEK SMALL LETTER ALPHA}",
    "none": None,
    "empty_dict": {},
    "empty_list": [],
    "empty_tuple": (),
    "empty_named_tuple": optax.EmptyState(),
    "nested_empty": {"a": {}, "b": [(), None, {"c": []}]},
    "weak": jnp.asarray(1.5),
}


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_comes_back(round_trip: RoundTrip, name: str) -> None:
    """Each kind of leaf comes back as the same type, dtype, shape and bits, inside a part and as a part of its own."""
    state = {"part": {"leaf": LEAVES[name], "other": np.ones(2)}, "alone": LEAVES[name]}
    restored = round_trip(state)
    if name == "big_endian":  # the values; the byte order is the machine's own
        np.testing.assert_array_equal(restored["part"]["leaf"], LEAVES[name])
        return
    assert_same(restored, state)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (object(), "part.a.leaf.*builtins.object"),
        (np.array(["a", "b"]), "part.a.leaf.*dtype <U1"),
        (np.array([object()]), "part.a.leaf.*dtype object"),
        (np.zeros(2, [("x", "f8")]), "part.a.leaf.*dtype"),
        (np.array(["2026-01-01"], "datetime64[D]"), "part.a.leaf.*datetime64"),
        (b"bytes", "part.a.leaf.*bytes"),
        ({1, 2}, "part.a.leaf.*set"),
        (len, "part.a.leaf.*function"),
        (jax.ShapeDtypeStruct((2,), np.float32), "part.a.leaf.*abstract"),
        (2**70, "part.a.leaf.*64 bits"),
        (np.ones((1, 2)).view(np.matrix), "part.a.leaf.*numpy.matrix would come back as a plain array"),
        (np.arange(3).view(np.recarray), "part.a.leaf.*recarray would come back as a plain array"),
        (collections.ChainMap({"w": 1.0}), r"part.a.leaf.*ChainMap.*pass `dict\(state\)`"),
        (collections.UserDict(w=1.0), r"part.a.leaf.*UserDict.*pass `dict\(state\)`"),
        (types.MappingProxyType({"w": 1.0}), r"part.a.leaf.*mappingproxy.*pass `dict\(state\)`"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_leaf_that_cannot_be_saved_is_refused_by_path(manager: CheckpointManager, leaf: Any, message: str) -> None:
    """A leaf that no checkpoint can hold is named by its path and kind, and nothing is written."""
    with pytest.raises(UnsupportedLeafError, match=message.replace("part.a.leaf", r"item 'part': a\.leaf")):
        manager.save(1, {"part": {"a": {"leaf": leaf, "fine": np.ones(2)}}})
    assert not manager.directory.exists()


def test_a_deleted_array_is_refused_by_path(manager: CheckpointManager) -> None:
    """An array that was donated is named, with the reason, also where the structure was saved before."""
    for step in (1, 2):
        manager.save(step, {"part": {"w": jnp.ones(3)}})
        gone = jnp.ones(3)
        gone.delete()
        with pytest.raises(UnsupportedLeafError, match=r"w: this array has been deleted.*donate"):
            manager.save(9, {"part": {"w": gone}})
    assert manager.steps() == [1, 2]


@pytest.mark.parametrize(
    "part",
    [{"a": {"b": 1.0}, "a.b": 2.0}, {"a": [1.0], "a.0": 2.0}, {"x.y": {"z": 1.0}, "x": {"y.z": 2.0}}],
)
def test_names_that_collide_are_refused(manager: CheckpointManager, part: Any) -> None:
    """Two leaves that would share a name on disk are refused, naming both places, before anything is written."""
    with pytest.raises(NameCollisionError, match=r"is the name of .* and of ") as error:
        manager.save(1, {"part": part})
    assert isinstance(error.value, ValueError)
    assert not manager.directory.exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a.orbax-checkpoint-tmp", "__a", "_CHECKPOINT_METADATA"])
def test_a_part_whose_name_is_no_directorys_is_refused(manager: CheckpointManager, name: str) -> None:
    """A part's name has to be one that a directory of a checkpoint can have."""
    with pytest.raises(InvalidArgumentError, match=re.escape(repr(name))):
        manager.save(1, {name: np.ones(2), "fine": 1})
    assert manager.steps() == []


def test_unusual_names_of_parts_and_leaves_come_back(round_trip: RoundTrip) -> None:
    """Dots, spaces, slashes inside a part, unicode, and words that mean something to the library are only names."""
    inner = {"a.b": 1.0, "a b": 2.0, "a/b": 3.0, "\N{GREEK SMALL LETTER ALPHA}": 4.0, "": 5.0, "0": 6.0}
    state = {"a.b": inner, "self": 1, "item": 2, "handler_registry": 3, "composite_options": 4, "default": 5, "d": 6}
    assert_same(round_trip(state), state)


def test_a_dataclass_without_fields_is_an_empty_state(round_trip: RoundTrip) -> None:
    """It is saved as {} is, and comes back as itself."""
    assert round_trip(Bare()) == Bare()
    assert round_trip({}, Bare()) == Bare()


def test_a_mapped_file_is_an_array(round_trip: RoundTrip, tmp_path: Path) -> None:
    """Its numbers are saved as those of any other array, and come back as one in memory."""
    mapped = np.memmap(tmp_path / "numbers", np.float32, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    assert_same(round_trip({"w": mapped}), {"w": np.array([1, 2, 3], np.float32)})


def test_mixed_keys_are_refused(manager: CheckpointManager) -> None:
    """A dict that JAX cannot sort is refused as such, at the top and inside a part."""
    for state in ({"a": 1, 2: 3}, {"part": {"a": 1, 2: 3}}):
        with pytest.raises(CheckpointError, match=r"JAX"):
            manager.save(1, state)
    assert manager.steps() == []


# ------------------------------------------------------------------ into what


def test_the_kind_of_array_is_that_of_like(round_trip: RoundTrip) -> None:
    """What is a NumPy array, a JAX array or a Python number in like comes back as one, whatever was saved."""
    saved = {"a": np.float32(3), "b": jnp.arange(3.0), "c": np.arange(3, dtype=np.float32), "d": jnp.int32(4), "e": 5}
    like = {"a": 0.0, "b": np.zeros(3, np.float32), "c": jnp.zeros(3), "d": 0, "e": jnp.int32(0)}
    restored = round_trip(saved, like)
    assert (type(restored["a"]), restored["a"]) == (float, 3.0)
    assert isinstance(restored["b"], np.ndarray)
    assert isinstance(restored["c"], jax.Array)
    assert (type(restored["d"]), restored["d"]) == (int, 4)
    assert isinstance(restored["e"], jax.Array)
    assert restored["e"] == 5


def test_restored_numpy_arrays_are_the_callers_own(round_trip: RoundTrip) -> None:
    """NumPy arrays may be written to, and share no memory with each other."""
    state = {"p": {"a": np.zeros(3), "b": np.zeros(3), "c": np.zeros(2000), "d": np.zeros(2000)}}
    restored = round_trip(state)["p"]
    for name in restored:
        restored[name] += 1
    assert all((array == 1).all() for array in restored.values())


@pytest.mark.parametrize("is_abstract", [False, True])
def test_arrays_stay_where_like_has_them(round_trip: RoundTrip, is_abstract: bool) -> None:
    """Shardings are those of like; an array that is free to move stays free, one bound to its device stays bound."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    saved = {"free": jnp.arange(4.0), "bound": jnp.arange(4.0), "sharded": jnp.arange(4.0)}
    like: Any = {
        "free": jnp.zeros(4),
        "bound": jax.device_put(jnp.zeros(4), jax.devices()[0]),
        "sharded": jax.device_put(jnp.zeros(4), sharding),
    }
    if is_abstract:
        like = {
            name: jax.ShapeDtypeStruct((4,), np.float32, sharding=None if name == "free" else array.sharding)
            for name, array in like.items()
        }
    restored = round_trip(saved, like)
    assert not restored["free"].committed
    assert restored["bound"].committed
    assert restored["sharded"].sharding == sharding
    assert all(jnp.array_equal(array, jnp.arange(4.0)) for array in restored.values())


@pytest.mark.parametrize("is_bound", [False, True])
def test_weak_types_stay_weak(round_trip: RoundTrip, is_bound: bool) -> None:
    """A weakly typed scalar comes back weak, or a resumed run would promote other dtypes than the first one."""
    weak = jnp.asarray(1.5)
    if is_bound:
        weak = jax.device_put(weak, jax.devices()[0])
    assert weak.weak_type
    assert weak.committed is is_bound
    restored = round_trip({"scale": weak, "strong": jnp.float32(1.5)})
    assert restored["scale"].weak_type
    assert restored["scale"].committed is is_bound
    assert (restored["scale"] * jnp.bfloat16(1)).dtype == jnp.bfloat16
    assert not restored["strong"].weak_type


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("dtype", [float, int, complex])
@pytest.mark.parametrize("is_fast", [False, True])
def test_weak_arrays_stay_weak(
    round_trip: RoundTrip, dtype: type, axis_type: Any, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do arrays of any shape, as `jnp.full(shape, 0.5)` makes them, wherever they are; to the last bit.

    Also where JAX has not the private function that needs no copy for it.
    """
    monkeypatch.setattr("ckpt_hooks.devices._is_fast", lambda arrays, weak: is_fast)
    some = [[-7, 1], [2, 3]] if dtype is int else [[-0.0, jnp.nan], [1e-40, jnp.inf]]
    weak = jnp.full((4, 2), dtype(3)).at[1:3].set(jnp.asarray(some, dtype))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(axis_type,))
    spread = jax.device_put(weak, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    bound = jax.device_put(weak, jax.devices()[0])
    state = {"free": weak, "bound": bound, "spread": spread, "empty": weak[:0]}
    assert all(array.weak_type for array in state.values())
    restored = round_trip(state, jax.tree.map(lambda array: array - array, state))
    assert_same(state, restored)
    for name, array in state.items():
        assert restored[name].sharding.is_equivalent_to(array.sharding, 2)
        assert restored[name].committed == array.committed
    assert_same(restored["free"] * jnp.bfloat16(1), weak * jnp.bfloat16(1))


@pytest.mark.parametrize("x64", [False, True])
def test_many_arrays_are_placed_without_a_copy(x64: bool) -> None:
    """The quick transfer passes its test with either width of numbers, and gives weak types of that width."""
    with jax.enable_x64(x64):
        devices._fast_put_works.cache_clear()
        assert devices._fast_put_works()
        numbers = np.arange(3, dtype=jax.dtypes.canonicalize_dtype(float))
        weak, strong = devices.put_free([numbers, numbers], [True, False])
        assert (weak.weak_type, strong.weak_type) == (True, False)
        assert weak.dtype == strong.dtype == numbers.dtype


def test_cast_converts_dtypes(round_trip: RoundTrip) -> None:
    """cast=True converts a dtype that differs; without it, that is an error which names the option."""
    saved = {"w": jnp.arange(4.0), "n": np.int64(3), "x": 1.5}
    like = {"w": jnp.zeros(4, jnp.bfloat16), "n": np.float32(0), "x": np.float16(0)}
    with pytest.raises(StructureMismatchError, match=r"float32\[4\].*bfloat16\[4\][\s\S]*cast=True"):
        round_trip(saved, like)
    restored = round_trip(saved, like, cast=True)
    assert restored["w"].dtype == jnp.bfloat16
    assert jnp.array_equal(restored["w"], jnp.arange(4.0))
    assert (restored["n"].dtype, restored["n"]) == (np.float32, 3)
    assert (restored["x"].dtype, restored["x"]) == (np.float16, 1.5)


@pytest.mark.parametrize(
    ("saved", "like"), [(1.5, 0), (3, 0.0), (True, 0), (np.arange(3), 0), (np.float32(1), 0), ("a", 0), (3, "b")]
)
def test_a_python_scalar_takes_only_its_own_kind(round_trip: RoundTrip, saved: Any, like: Any) -> None:
    """A Python number in like accepts a saved number or 0-d array of the same kind, and nothing else."""
    with pytest.raises(StructureMismatchError, match="saved as"):
        round_trip({"x": saved}, {"x": like})


@pytest.mark.parametrize(
    ("value", "like"),
    [
        (Color.RED, Color.BLUE),
        (Rate.HIGH, Rate.LOW),
        (Split.TRAIN, Split.TEST),
        (Celsius(20.5), Celsius(0)),
        (np.str_("text"), np.str_("")),
    ],
    ids=repr,
)
def test_members_of_enums_and_derived_numbers_come_back_as_themselves(
    round_trip: RoundTrip, value: Any, like: Any
) -> None:
    """What derives from a Python number or string comes back in the class that like has, and as a plain one too."""
    assert_same(round_trip({"x": value}, {"x": like}), {"x": value})
    plain = str(value) if isinstance(value, str) else (int if isinstance(value, int) else float)(value)
    assert_same(round_trip({"x": value}, {"x": type(plain)()}), {"x": plain})
    assert type(round_trip({"x": plain}, {"x": like})["x"]) is type(value)


@pytest.mark.parametrize(
    ("saved", "like", "text"),
    [
        (7, Color.RED, r"x: saved as 7, which is no .*\.Color: 7 is not a valid Color"),
        ("dev", Split.TEST, r"x: saved as 'dev', which is no .*\.Split: 'dev' is not a valid Split"),
        (20.5, Clipped(0), r"x: saved as 20\.5, of which .*\.Clipped makes 1\.0"),
    ],
    ids=["enum", "enum of strings", "changed"],
)
def test_a_value_that_the_class_of_like_refuses_is_an_error(
    round_trip: RoundTrip, saved: Any, like: Any, text: str
) -> None:
    """It is told by the leaf, the value and the class, and so is one that the class would change."""
    with pytest.raises(StructureMismatchError, match=text):
        round_trip({"part": {"x": saved}}, {"part": {"x": like}})


def test_a_number_that_no_cast_converts_is_an_error(round_trip: RoundTrip) -> None:
    """cast=True makes no integer of a NaN, and no real number of a complex one."""
    for saved, like in ((float("nan"), 0), (1j, 0.0)):
        with pytest.raises(StructureMismatchError, match=f"saved as {saved!r}, which is no (int|float): "):
            round_trip({"x": saved}, {"x": like}, cast=True)


def test_python_numbers_that_do_not_fit_the_dtype_are_an_error(round_trip: RoundTrip) -> None:
    """No saved Python number is silently cut to the narrower dtype of like; the error lists each, and its item."""
    saved, like = {"n": 2**40, "x": 0.1, "y": 0.5}, {"n": np.int32(0), "x": np.float32(0), "y": np.float32(0)}
    with pytest.raises(StructureMismatchError) as error:
        round_trip({"config": saved}, {"config": like})
    assert str(error.value).startswith("config: the checkpoint does not fit the structure to restore into (2 leaves)")
    assert "n: the saved Python number 1099511627776 has no exact int32" in str(error.value)
    assert "x: the saved Python number 0.1 has no exact float32" in str(error.value)
    assert "cast=True" in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), complex(float("nan"), 1)])
def test_a_python_nan_fits_every_width(round_trip: RoundTrip, number: Any) -> None:
    """NaN is a number that each floating dtype has."""
    dtype = np.complex64 if isinstance(number, complex) else np.float32
    restored = round_trip({"x": number}, {"x": dtype(0)})
    assert np.array_equal(restored["x"], dtype(number), equal_nan=True)
    assert restored["x"].dtype == dtype


def test_a_nan_of_a_derived_class_comes_back(round_trip: RoundTrip) -> None:
    """Though it is not equal to itself, no class has changed it."""
    restored = round_trip({"x": Celsius("nan")}, {"x": Celsius(0)})
    assert type(restored["x"]) is Celsius
    assert restored["x"] != restored["x"]


def test_jax_arrays_that_would_be_cut_are_listed(round_trip: RoundTrip) -> None:
    """Without jax_enable_x64 JAX has no 64 bits: the error has each leaf, their item, and what keeps the bits."""
    like = {name: jax.ShapeDtypeStruct((3,), np.float64) for name in "ab"}
    with pytest.raises(StructureMismatchError) as error:
        round_trip({"params": {"a": np.ones(3), "b": np.ones(3)}}, {"params": like})
    assert str(error.value).startswith("params: the checkpoint does not fit")
    for name in "ab":
        assert f"{name}: `like` wants a JAX array of float64, which JAX would cut to float32" in str(error.value)
    assert "jax_enable_x64" in str(error.value)


@pytest.mark.parametrize(("saved", "like"), [("<f4", ">f4"), (">f4", "<f4"), (">c16", "<c16"), (">i8", ">i8")])
def test_the_order_of_bytes_is_no_other_dtype(round_trip: RoundTrip, saved: str, like: str) -> None:
    """Numbers come back in the order of bytes that like has, whichever was saved."""
    numbers = np.arange(5).astype(saved)
    assert_same(round_trip({"w": numbers}, {"w": np.zeros(5, like)}), {"w": numbers.astype(like)})
    if numbers.dtype.itemsize == 4:
        for target in (jnp.zeros(5), jax.ShapeDtypeStruct((5,), like), jax.ShapeDtypeStruct((5,), saved)):
            assert_same(round_trip({"w": numbers}, {"w": target}), {"w": jnp.arange(5.0)})


def test_mismatches_are_listed_leaf_by_leaf_with_the_nearest_name(manager: CheckpointManager) -> None:
    """Every missing, unexpected, reshaped and retyped leaf stands in the message, with the name that was meant."""
    layers = {f"Dense_{i}": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)} for i in range(3)}
    manager.save(1, {"params": layers})
    like = {
        "Dense_0": {"kernel": np.zeros((2, 4)), "bias": np.zeros(3, np.float32)},
        "Dense_1": {"kernel": np.zeros((2, 3)), "biass": np.zeros(3)},
        "Dense_2": {"kernel": jax.random.key(0), "bias": "text"},
    }
    with pytest.raises(StructureMismatchError) as error:
        manager.restore({"params": like})
    rows = [re.sub(" +", " ", row.strip()) for row in str(error.value).splitlines()]
    for beginning in (
        "reshaped Dense_0.kernel: saved as float64[2, 3], `like` wants float64[2, 4]",
        "retyped Dense_0.bias: saved as float64[3], `like` wants float32[3]",
        "missing Dense_1.biass: `like` wants float64[3], not saved (the checkpoint has 'Dense_1.bias')",
        "unexpected Dense_1.bias: saved as float64[3], not in `like`",
        "retyped Dense_2.kernel: saved as float64[2, 3], `like` wants key<fry>[]",
        "retyped Dense_2.bias: saved as float64[3], `like` wants a Python str",
    ):
        assert beginning in rows
    assert not [row for row in rows if "Dense_1.kernel" in row]
    assert "(6 leaves)" in rows[0]


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (PARAMS, None),
        (None, PARAMS),
        (PARAMS, {}),
        ({}, PARAMS),
        (np.ones(3), None),
        (jax.random.key(0), jax.random.key(0, impl="rbg")),
        (jax.random.key(0), jax.random.PRNGKey(0)),
        (jax.random.split(jax.random.key(0), 2), jax.random.key(0)),
        ([1.0, 2.0], [1.0]),
    ],
)
def test_a_part_of_another_structure_is_a_mismatch(round_trip: RoundTrip, saved: Any, like: Any) -> None:
    """A part that was there and is not any more, or the other way round, is a mismatch and never ignored."""
    with pytest.raises(StructureMismatchError):
        round_trip({"part": saved, "step": 1}, {"part": like, "step": 1})


def test_a_new_empty_part_needs_nothing_saved(round_trip: RoundTrip) -> None:
    """A like with a part that holds no leaf restores a checkpoint that lacks the part, and keeps like's."""
    restored = round_trip({"params": PARAMS}, {"params": PARAMS, "batch_stats": {}, "ema": None})
    assert restored["batch_stats"] == {}
    assert restored["ema"] is None
    assert_same(restored["params"], PARAMS)


def test_a_state_may_be_a_single_item_under_any_likes_name(manager: CheckpointManager) -> None:
    """A state that is a list is the item `state`, and like={"state": ...} reaches it too."""
    manager.save(1, [np.arange(3), 5])
    assert_same(manager.restore({"state": [np.zeros(3, int), 0]}), {"state": [np.arange(3), 5]})
    assert_same(manager.restore([np.zeros(3, int), 0]), [np.arange(3), 5])


def test_the_state_is_taken_at_the_save(tmp_path: Path) -> None:
    """NumPy arrays that change and JAX arrays that are donated right after a save are saved as they were."""
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    with CheckpointManager(tmp_path, keep=None) as manager:
        host, device = np.zeros(100_000), jnp.zeros(100_000)
        for step in range(1, 6):
            host += 1
            device = double(device + 1) / 2
            manager.save(step, {"host": host, "device": device})
            host += 1000
            device = double(device)
            host -= 1000
            device = device / 2
        manager.wait()
        for step in range(1, 6):
            restored = manager.restore(step=step)
            assert (restored["host"] == step).all()
            assert (restored["device"] == step).all()
