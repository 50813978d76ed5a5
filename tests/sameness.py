"""What the tests of sharing with Orbax compare: every leaf of a tree by its bits, and by its type where asked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Bits = dict[str, tuple[Any, ...]]


def bits(tree: Any) -> Bits:
    """{path: dtype, shape and bytes} of each leaf; for what is no array, its type and value.

    Whether a container is a tuple, a list, a named tuple or a dict, and which library an array is of, does not
    count: that is lost without a target.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_has_no_leaf)
    return {"/".join(map(_name, path)): _bits(leaf) for path, leaf in paths if not _has_no_leaf(leaf)}


def typed_bits(tree: Any) -> Any:
    """`bits`, and the structure and the type of every leaf: what a restore into a target must get right."""
    kinds = [jax.Array if isinstance(leaf, jax.Array) else type(leaf) for leaf in jax.tree_util.tree_leaves(tree)]
    return bits(tree), jax.tree_util.tree_structure(tree), kinds


def _has_no_leaf(node: Any) -> bool:
    return not jax.tree_util.tree_leaves(node)


def _name(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def _bits(leaf: Any) -> tuple[Any, ...]:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return type(leaf), leaf
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return (str(jax.random.key_impl(leaf)), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes())
    return np.dtype(dtype), leaf.shape, np.asarray(leaf).tobytes()
