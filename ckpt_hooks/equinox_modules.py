"""Equinox modules, in which a function such as an activation may be a leaf: it is structure, not data.

At the save it counts as None, as in ``eqx.filter(model, eqx.is_array)``; on restore it stays as `like` has it. So a
whole module and a filtered one restore each other. Elsewhere a function is refused. Equinox is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax

from ckpt_hooks.tree import key_text

__all__ = ["functions_among", "functions_in_modules", "is_module"]

_EQUINOX = "equinox"


def is_module(node: Any) -> bool:
    """Whether something is an Equinox module; False where Equinox is not loaded."""
    equinox = sys.modules.get(_EQUINOX)
    return isinstance(node, getattr(equinox, "Module", ()))


def functions_in_modules(tree: Any) -> frozenset[str]:
    """The names of the leaves of Equinox modules that are functions."""
    if _EQUINOX not in sys.modules:
        return frozenset()
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_module)
    modules = [(path, node) for path, node in nodes if is_module(node)]
    return frozenset(
        ".".join(map(key_text, (*path, *inner)))
        for path, module in modules
        for inner, leaf in jax.tree_util.tree_flatten_with_path(module)[0]
        if callable(leaf)
    )


def functions_among(leaves: Mapping[str, Any]) -> frozenset[str]:
    """The names of the leaves that are functions.

    >>> sorted(functions_among({"activation": abs, "weight": 1}))
    ['activation']
    """
    # By their classes first: among a thousand arrays there is nothing to look at one by one.
    if not any(_is_callable_class(kind) for kind in set(map(type, leaves.values()))):
        return frozenset()
    return frozenset(name for name, leaf in leaves.items() if callable(leaf))


def _is_callable_class(kind: type) -> bool:
    return hasattr(kind, "__call__")  # noqa: B004  (whether its instances are callable, not it itself)
