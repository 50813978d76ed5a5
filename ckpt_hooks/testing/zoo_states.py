"""The states of the zoo, each made anew by a function: `zoo.make` calls it by its name."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers its dtypes with NumPy by name)
import numpy as np

__all__ = ["FLAX", "NARROW_DTYPES", "OPTAX", "PLAIN", "PLAIN_DTYPES", "Moments", "Nothing", "Opaque", "Registered"]

NARROW_DTYPES = (
    *("bfloat16", "int4", "int2", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
PLAIN_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_UNICODE = ("\u00e4\u03c9\u4e2d\U0001f600", "e\u0301", "\u00e9")  # the last two look the same
_NO_JAX_WITHOUT_X64 = frozenset({"int64", "uint64", "float64", "complex128"})


class Moments(NamedTuple):
    """A named tuple, as Optax's states are."""

    mean: Any
    variance: Any


class Nothing(NamedTuple):
    """A named tuple without fields, as `optax.EmptyState`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    """A dataclass that JAX knows, with a static field."""

    weights: Any
    name: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class Opaque:
    """A dataclass that JAX does not know; a state may be one, a part of a state may not."""

    params: Any
    step: int


# ------------------------------------------------------------------ leaves


def _bytes_of(nbytes: int) -> bytes:
    """Bytes that look like noise and are the same everywhere: among them NaNs with payloads, -0.0, denormals."""
    numbers = np.arange(nbytes, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)
    return (numbers >> np.uint64(37)).astype(np.uint8).tobytes()


def _array(dtype: str, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """An array of a dtype with any bits that its elements can have."""
    kind = np.dtype(dtype)
    noise = np.frombuffer(_bytes_of(math.prod(shape) * kind.itemsize), np.uint8)
    if kind == np.bool_:
        return np.equal(noise % 2, 1).reshape(shape)
    if dtype in ("int4", "int2", "float4_e2m1fn"):
        values = noise.astype(np.float32) % 4 / 2 if dtype == "float4_e2m1fn" else noise.astype(np.int8) % 2 - 1
        return values.astype(kind).reshape(shape)
    array: np.ndarray = noise.view(kind).reshape(shape)
    return array


def _special_floats() -> np.ndarray:
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFC12345], np.uint32).view(np.float32)
    tiny = np.finfo(np.float32).smallest_subnormal
    return np.concatenate([nans, np.array([np.inf, -np.inf, 0.0, -0.0, tiny, -tiny], np.float32)])


def _numpy_dtypes() -> Any:
    return {"params": {dtype: _array(dtype) for dtype in (*PLAIN_DTYPES, *NARROW_DTYPES)}}


def _jax_dtypes() -> Any:
    dtypes = [
        dtype
        for dtype in (*PLAIN_DTYPES, *NARROW_DTYPES)
        if jax.dtypes.canonicalize_dtype(np.int64) == np.int64 or dtype not in _NO_JAX_WITHOUT_X64
    ]
    return {"params": {dtype: jnp.asarray(_array(dtype)) for dtype in dtypes}}


def _zero_size() -> Any:
    shapes: list[tuple[int, ...]] = [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)]
    return {
        "numpy": [np.zeros(shape, np.float64) for shape in shapes],
        "jax": [jnp.zeros(shape, jnp.bfloat16) for shape in shapes],
    }


def _zero_dimensional() -> Any:
    dtypes = ("bool", "int8", "int64", "float16", "float64", "complex64", "bfloat16", "float8_e4m3fn", "int4")
    return {
        "arrays": {dtype: _array(dtype, ()) for dtype in dtypes},
        "scalars": {dtype: _array(dtype, ())[()] for dtype in dtypes},
        "jax": {dtype: jnp.asarray(_array(dtype, ())) for dtype in dtypes if dtype not in _NO_JAX_WITHOUT_X64},
    }


def _python_scalars() -> Any:
    return {
        "bools": [True, False],
        "ints": [0, -1, 2**31, 2**63 - 1, -(2**63)],
        "floats": [0.0, -0.0, 0.1, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")],
        "complex": [1j, complex(0.0, -0.0), complex(float("nan"), float("inf"))],
        "step": 7,
    }


def _strings() -> Any:
    return {
        "params": {"w": np.arange(3.0)},
        "notes": ["", "plain", "quotes \"' and \\ and \x00", "line\nbreak", "\u00e4\u03c9\u4e2d\U0001f600", "e\u0301"],
    }


def _prng_keys() -> Any:
    implementations = ("threefry2x32", "rbg", "unsafe_rbg")
    return {
        "typed": {name: jax.random.key(7, impl=name) for name in implementations},
        "split": {name: jax.random.split(jax.random.key(8, impl=name), (2, 3)) for name in implementations},
        "none": jax.random.split(jax.random.key(9), 2)[:0],
        "raw": jax.random.PRNGKey(10),
    }


def _weak_types() -> Any:
    return {
        "params": {
            "weak": {"int": jnp.asarray(3), "float": jnp.asarray(0.5), "bool": jnp.asarray(True)},
            "weak arrays": {
                "floats": jnp.full((2, 3), 0.5).at[1].set(jnp.arange(3.0) / 7),
                "ints": jnp.full(3, 7),
                "complex": jnp.full((1, 2), 1j),
                "empty": jnp.full((0, 2), 0.5),
            },
            "strong": {"int": jnp.asarray(3, jnp.int32), "float": jnp.asarray(0.5, jnp.float32)},
        }
    }


def _memory_orders() -> Any:
    numbers = np.arange(60.0).reshape(3, 4, 5)
    read_only = np.arange(6)
    read_only.flags.writeable = False
    return {
        "fortran": np.asfortranarray(numbers),
        "transposed": numbers.T,
        "strided": numbers[::2, 1::2, ::-1],
        "broadcast": np.broadcast_to(np.arange(4.0), (3, 4)),
        "one column": np.arange(12.0).reshape(3, 4)[:, 1],
        "unaligned": np.frombuffer(b"\0" + _bytes_of(32), np.uint8)[1:].view(np.uint32),
        "read_only": read_only,
    }


def _big_endian() -> Any:
    dtypes = (">i2", ">i4", ">i8", ">u4", ">f2", ">f4", ">f8", ">c8", ">c16")
    return {"params": {dtype: np.arange(7).astype(dtype) for dtype in dtypes}}


# ------------------------------------------------------------------ trees


def _empty_containers() -> Any:
    return {
        "none": None,
        "dict": {},
        "list": [],
        "tuple": (),
        "named_tuple": Nothing(),
        "inside": {"none": None, "dict": {}, "list": [], "tuple": (), "deep": [({}, [None, ()])]},
        "between": [None, np.arange(2.0), {}, np.arange(3.0), ()],
        "step": 3,
    }


def _containers() -> Any:
    leaf = iter(np.arange(100.0, dtype=np.float32))
    return {
        "named_tuples": (Moments(next(leaf), Moments(next(leaf), [next(leaf)])), Nothing()),
        "ordered": collections.OrderedDict(b=next(leaf), a=next(leaf)),
        "default": collections.defaultdict(list, {"x": [next(leaf)]}),
        "registered": Registered({"w": next(leaf)}, "kept by the structure"),
        "lists": [[[next(leaf)], [next(leaf), next(leaf)]], (next(leaf),)],
        "eleven": [next(leaf) for _ in range(11)],  # more than one digit: an order by name would be another one
    }


def _keys() -> Any:
    texts = ("a.b", "a/b", "a", "..", ".", "/", " ", "with space", "\u00e4\u03c9\u4e2d\U0001f600", "e\u0301", "\u00e9")
    more = (
        "0",
        "-1",
        "d",
        "_METADATA",
        "manifest.ocdbt",
        "x.orbax-checkpoint-tmp",
        "'quoted\"",
        "%2F",
        "\\",
        "*",
        "\n",
    )
    long = "k" * 300
    return {
        "params": {text: np.full(2, number) for number, text in enumerate((*texts, *more, long))},
        "ints": {0: np.zeros(1), 1: np.ones(1), 10: np.full(1, 10.0), -3: np.full(1, -3.0)},
        "below": {"x": {"y.z": np.zeros(2)}, "x.y": {"w": np.ones(2)}},
    }


def _item_names() -> Any:
    return {
        "a.b": np.arange(2),
        "\u00e4\u03c9\u4e2d": np.arange(3),
        "with space": np.arange(4),
        "0": 1,
        "*": 2,
        "-x": 3,
    }


def _deep() -> Any:
    node: Any = {"w": np.arange(2.0)}
    for level in range(60):
        node = {"k": node} if level % 2 else [node]
    return {"params": node}


def _wide() -> Any:
    return {"params": {f"layer_{number}": np.full(3, number, np.float32) for number in range(1000)}}


def _large_leaf() -> Any:
    return {"params": {"small": np.arange(3), "large": _array("uint8", (5 << 20,)), "last": np.arange(5.0)}}


def _bare_list() -> Any:
    return [np.arange(3.0), {"w": jnp.arange(4)}]


def _bare_array() -> Any:
    return jnp.arange(6.0).reshape(2, 3)


def _opaque_dataclass() -> Any:
    return Opaque({"w": np.arange(3.0), "b": jnp.ones(2)}, 5)


def _named_tuple() -> Any:
    return Moments({"w": np.arange(3.0)}, np.float32(2))


def _shared() -> Any:
    array = np.arange(1000.0)
    return {"params": {"tied": array, "too": array, "view": array[10:20]}, "ema": {"tied": array}}


# ------------------------------------------------------------------ what users bring


def _optax_state() -> Any:
    import optax

    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4, jnp.bfloat16)}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(optax.cosine_decay_schedule(0.1, 10)), {"dense": {"kernel": True, "bias": False}}),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        optax.contrib.schedule_free_sgd(0.1),
    )
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), params)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    return {"params": params, "opt_state": opt_state, "step": 1}


def _flax_train_state() -> Any:
    from flax.training import train_state

    params = {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    state = train_state.TrainState.create(apply_fn=_apply, params=params, tx=_adam())
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


def _flax_frozen_dict() -> Any:
    from flax.core import freeze

    return {"params": freeze({"Dense_0": {"kernel": jnp.ones((3, 4)), "empty": {}}}), "step": 1}


def _apply(*args: Any) -> Any:
    """Static in a TrainState, so it must be the same object in each."""
    raise NotImplementedError("the states of the zoo are not trained")


@functools.cache
def _adam() -> Any:
    import optax

    return optax.adam(1e-3)


PLAIN: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
    {
        "numpy dtypes": _numpy_dtypes,
        "jax dtypes": _jax_dtypes,
        "special floats": lambda: {"params": {"w": _special_floats(), "jax": jnp.asarray(_special_floats())}},
        "zero size": _zero_size,
        "zero dimensional": _zero_dimensional,
        "python scalars": _python_scalars,
        "strings": _strings,
        "prng keys": _prng_keys,
        "weak types": _weak_types,
        "memory orders": _memory_orders,
        "big endian": _big_endian,
        "empty containers": _empty_containers,
        "containers": _containers,
        "keys": _keys,
        "item names": _item_names,
        "deep": _deep,
        "wide": _wide,
        "large leaf": _large_leaf,
        "shared memory": _shared,
        "bare list": _bare_list,
        "bare array": _bare_array,
        "named tuple": _named_tuple,
        "opaque dataclass": _opaque_dataclass,
    }
)
FLAX: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
    {"flax train state": _flax_train_state, "flax frozen dict": _flax_frozen_dict}
)
OPTAX: Mapping[str, Callable[[], Any]] = types.MappingProxyType({"optax state": _optax_state})
