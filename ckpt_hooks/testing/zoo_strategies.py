"""States nested at random, for Hypothesis: the only module that imports it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from ckpt_hooks.errors import NameCollisionError
from ckpt_hooks.testing.zoo_states import NARROW_DTYPES, PLAIN_DTYPES, Moments, Nothing, Registered
from ckpt_hooks.tree import flatten

__all__ = ["states"]

_EDGES = (0, 1, 2, 3, 17)
_AWKWARD = ("a.b", "a/b", "..", "/", " ", "\u00e9", "e\u0301", "0", "1", "d", "_METADATA", "x.orbax-checkpoint-tmp")


def states(
    *, max_leaves: int = 12, with_jax: bool = True, others: Sequence[st.SearchStrategy[Any]] = ()
) -> st.SearchStrategy[dict[str, Any]]:
    """States of one to three parts, each a tree of arrays, PRNG keys, scalars, strings and empty containers.

    Args:
      max_leaves: about how many leaves a part has.
      with_jax: whether some arrays are JAX's, and some are of keys; all are NumPy's otherwise.
      others: what else stands among the leaves, such as states of an optimizer.
    """
    of_jax = [_jax_arrays(), _keys()] if with_jax else []
    leaves = st.one_of(_arrays(), _scalars(), st.none(), *of_jax, *others)
    parts = st.recursive(leaves, _containers, max_leaves=max_leaves)
    names = st.sampled_from(["params", "opt_state", "step", "batch.stats", "\u03b1", "with space"])
    return st.dictionaries(names, parts, min_size=1, max_size=3).filter(_has_distinct_names)


def _has_distinct_names(state: dict[str, Any]) -> bool:
    try:
        for part in state.values():
            flatten(part)
    except NameCollisionError:
        return False
    return True


def _arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = st.lists(st.sampled_from(_EDGES), max_size=3).map(tuple)
    return st.builds(_random_array, st.sampled_from(PLAIN_DTYPES + NARROW_DTYPES), shapes, st.integers(0, 2**32 - 1))


def _random_array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    kind = np.dtype(dtype)
    generator = np.random.default_rng(seed)
    if kind == np.bool_ or dtype in ("int4", "int2", "float4_e2m1fn"):
        array = generator.integers(0, 2, shape).astype(kind)
    else:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(generator.bytes(count * kind.itemsize), kind).reshape(shape)
    orders = (np.ascontiguousarray, np.asfortranarray, lambda ordered: ordered[..., ::-1] if ordered.ndim else ordered)
    return orders[seed % len(orders)](array.copy())


def _jax_arrays() -> st.SearchStrategy[Any]:
    # int64 and its siblings would be cut to 32 bits, which the strategy leaves to the caller's own choice.
    return _arrays().filter(lambda array: array.dtype.name in _JAX_DTYPES).map(jnp.asarray)


_JAX_DTYPES = frozenset(PLAIN_DTYPES + NARROW_DTYPES) - {"int64", "uint64", "float64", "complex128"}


def _keys() -> st.SearchStrategy[Any]:
    shapes = st.sampled_from([(), (1,), (2, 3)])
    return st.builds(_random_key, st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]), shapes, st.integers(0, 9))


def _random_key(impl: str, shape: tuple[int, ...], seed: int) -> Any:
    key = jax.random.key(seed, impl=impl)
    return jax.random.split(key, shape) if shape else key


def _scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.complex_numbers(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    )


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    texts = st.one_of(st.sampled_from(_AWKWARD), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
    return st.one_of(
        st.dictionaries(texts, children, max_size=4),
        st.dictionaries(st.integers(-3, 12), children, max_size=3),
        st.lists(children, max_size=4),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(texts, children, max_size=3).map(collections.OrderedDict),
        st.builds(Moments, children, children),
        st.builds(Registered, children, texts),
        st.just(Nothing()),
    )
