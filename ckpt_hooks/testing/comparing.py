"""Two states, compared to the last bit: types, tree, dtypes, shapes, bits, weak types, kinds of PRNG keys."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["assert_same", "differences"]

_SHOWN = 20


def assert_same(expected: Any, found: Any) -> None:
    """Raises AssertionError that lists every leaf and node in which two states differ.

    >>> import numpy as np
    >>> assert_same({"w": np.float32(1)}, {"w": np.float32(1)})
    """
    lines = differences(expected, found)
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise AssertionError(f"the states differ in {len(lines)} places:\n  " + "\n  ".join([*lines[:_SHOWN], *more]))


def differences(expected: Any, found: Any) -> list[str]:
    """A line for each place in which two states differ; [] where they are the same to the last bit.

    A NaN is the same as itself, by its bits, and 0.0 is not -0.0; an array of JAX is not one of NumPy, and a weakly
    typed one is not the same as one that is not. Where an array lies (device, sharding, order in memory) does not
    count.

    >>> import numpy as np
    >>> differences({"w": np.float32(1), "step": 7}, {"w": np.float32(2), "step": 7.0})
    ["['step']: int 7, found float 7.0", "['w']: bits differ in 1 of 1 elements"]
    """
    if _is_opaque_dataclass(expected):
        if type(found) is not type(expected):
            return [_retyped("", expected, found)]
        names = [field.name for field in dataclasses.fields(expected)]
        lines = ((name, differences(getattr(expected, name), getattr(found, name))) for name in names)
        return [f".{name}{line}" for name, inside in lines for line in inside]
    return _differences("", expected, found)


def _differences(path: str, expected: Any, found: Any) -> list[str]:
    children = _children(expected)
    if children is None:
        return _leaf_differences(path, expected, found)
    if type(found) is not type(expected):
        return [_retyped(path, expected, found)]
    others = dict(_children(found) or ())
    lines = [f"{path}{key}: missing" for key, _ in children if key not in others]
    lines += [f"{path}{key}: unexpected" for key in others if key not in dict(children)]
    for key, child in children:
        if key in others:
            lines += _differences(path + key, child, others[key])
    if not lines and _own_data(expected) != _own_data(found):
        lines.append(f"{path or 'the state'}: the static fields of {type(expected).__name__} differ")
    return lines


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """(key, child) of each child of a node; None of a leaf."""
    if _is_leaf(node):
        return None
    paths, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
    return [(jax.tree_util.keystr(path), child) for path, child in paths]


def _is_leaf(node: Any) -> bool:
    return node is None or jax.tree_util.all_leaves([node])


def _own_data(node: Any) -> Any:
    """The structure of a node without its children: keys, static fields."""
    return jax.tree_util.tree_structure(node, is_leaf=lambda inner: inner is not node)


def _is_opaque_dataclass(state: Any) -> bool:
    """A plain dataclass at the top, which the library splits by its fields and JAX does not know."""
    return dataclasses.is_dataclass(state) and not isinstance(state, type) and jax.tree_util.all_leaves([state])


def _retyped(path: str, expected: Any, found: Any) -> str:
    return f"{path or 'the state'}: {_show(expected)}, found {_show(found)}"


def _leaf_differences(path: str, expected: Any, found: Any) -> list[str]:
    place = path or "the state"
    if _kind(expected) is not _kind(found):
        return [_retyped(path, expected, found)]
    if not hasattr(expected, "dtype"):
        return [] if _scalar_bits(expected) == _scalar_bits(found) else [_retyped(path, expected, found)]
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return [_retyped(path, expected, found)]
    if getattr(expected, "weak_type", False) != getattr(found, "weak_type", False):
        return [f"{place}: weakly typed is {expected.weak_type}, found {found.weak_type}"]
    differ = int(np.any(_bits(expected) != _bits(found), axis=-1).sum())
    return [f"{place}: bits differ in {differ} of {len(_bits(expected))} elements"] if differ else []


def _kind(leaf: Any) -> type:
    return jax.Array if isinstance(leaf, jax.Array) else type(leaf)


def _scalar_bits(value: Any) -> Any:
    """Python's numbers by their bits, so that a NaN is the same as itself."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, complex):
        return struct.pack("<dd", value.real, value.imag)
    return value


def _bits(array: Any) -> np.ndarray:
    """The bytes of each element, in one more dimension."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    if host.dtype.name in _HALF_BYTES:
        # NumPy keeps these in a whole byte each, and what is in the other half means nothing.
        used = np.uint8((1 << _HALF_BYTES[host.dtype.name]) - 1)
        return np.ascontiguousarray(host).reshape(-1, 1).view(np.uint8) & used
    if not host.size:
        return np.empty((0, 1), np.uint8)
    return np.frombuffer(host.tobytes(), np.uint8).reshape(host.size, host.itemsize)


_HALF_BYTES = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}  # dtype: bits


def _show(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        library = "jax" if isinstance(value, jax.Array) else "numpy"
        return f"{library} {value.dtype}{list(value.shape)}"
    if _is_leaf(value):
        return f"{type(value).__name__} {value!r}"
    return f"a {type(value).__name__}"
