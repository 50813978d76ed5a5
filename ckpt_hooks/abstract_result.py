"""What a function that makes a state would return, without making it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ckpt_hooks.graph_objects import NNX, ends_here

__all__ = ["abstract_result"]


def abstract_result(function: Callable[..., Any], *args: Any) -> Any:
    """The structure of ``function(*args)``, with a `jax.ShapeDtypeStruct` in place of each JAX array.

    What is no JAX array stays what it is: numbers, strings, functions, and NumPy arrays, which tracing would make
    anyway. What graph objects share stays shared. Arguments that are not arrays reach the function untouched.

    >>> abstract_result(lambda size, name: {"w": jax.numpy.zeros(size), "name": name}, 3, "digits")
    {'name': 'digits', 'w': ShapeDtypeStruct(shape=(3,), dtype=float32)}
    """
    own = getattr(function, "eval_shape", None)
    if own is not None:
        return own(*args)  # a jitted function knows itself which of its arguments are static, and its shardings
    traced = [number for number, arg in enumerate(args) if _is_all_arrays(arg)]

    def of_arrays(*arrays: Any) -> Any:
        mixed = list(args)
        for number, array in zip(traced, arrays, strict=True):
            mixed[number] = array
        return function(*mixed)

    return _eval_shape(of_arrays, *(args[number] for number in traced))


def _is_all_arrays(arg: Any) -> bool:
    leaves = jax.tree_util.tree_leaves(arg)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves)


def _eval_shape(function: Callable[..., Any], *args: Any) -> Any:
    """`jax.eval_shape`, also of a function whose result JAX cannot trace as it is."""
    untraced: list[Any] = []
    structure: Any = None

    def traceable(*args: Any) -> list[Any]:
        nonlocal structure
        is_leaf = ends_here if NNX in sys.modules else None
        leaves, structure = jax.tree_util.tree_flatten(function(*args), is_leaf=is_leaf)
        leaves = [_without_values(leaf) if _is_placed(leaf) else leaf for leaf in leaves]
        untraced[:] = (None if _is_traceable(leaf) else leaf for leaf in leaves)
        return [leaf for leaf in leaves if _is_traceable(leaf)]

    trace = sys.modules[NNX].eval_shape if NNX in sys.modules else jax.eval_shape
    traced = iter(trace(traceable, *args))
    return jax.tree_util.tree_unflatten(structure, [next(traced) if leaf is None else leaf for leaf in untraced])


def _is_placed(leaf: Any) -> bool:
    """Whether it is an array that is there, as `jax.make_array_from_callback` makes it, on devices that were named."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed


def _without_values(array: jax.Array) -> Any:
    is_weak = getattr(array, "weak_type", False)  # random keys have none
    struct: Any = jax.ShapeDtypeStruct
    return struct(array.shape, array.dtype, sharding=array.sharding, weak_type=is_weak)


def _is_traceable(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is None  # which tracing would drop
    return isinstance(leaf, jax.Array) or (NNX in sys.modules and ends_here(leaf))
