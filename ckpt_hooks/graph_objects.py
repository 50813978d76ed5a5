"""Flax NNX's graph objects (modules, optimizers, Rngs, variables) as plain trees, and their update in place.

    like, objects --unpack--> the same with a `PureState` in place of each object --restore--> --update--> the objects

A module is saved as what `nnx.split` takes out of it: nested dicts of the values of its variables, which Orbax and
`nnx.replace_by_pure_dict` read too. All objects of one call are taken apart together, so that a variable that several
of them share is saved once. NNX is never imported here: who has an object of it has loaded it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from ckpt_hooks import train_state
from ckpt_hooks.errors import InvalidArgumentError
from ckpt_hooks.train_state import PureState

__all__ = ["NNX", "GraphObjects", "ends_here", "is_graph_object", "split"]

NNX = "flax.nnx"  # loaded where there can be graph objects at all
_VALUE = "value"  # of an object that is a variable itself


def is_graph_object(value: Any) -> bool:
    """Whether a value is one of NNX's graph objects, such as a module."""
    return NNX in sys.modules and _is_object(value)


def split(state: Any) -> dict[str, Any]:
    """`train_state.split`, for which a graph object, though JAX may know it as a pytree, is one part."""
    return {train_state.WHOLE: state} if is_graph_object(state) else train_state.split(state)


class GraphObjects:
    """A state and the keyword items beside it, with the graph objects in them taken apart.

    Args:
      state: what is saved, or what is restored into (then also with `jax.ShapeDtypeStruct` in its variables).
      items: {item: graph object, or anything else}.

    Attributes:
      state, items: the same, with a `PureState` in place of each graph object.

    Raises InvalidArgumentError for an item that has the name of a part of the state.
    """

    def __init__(self, state: Any, items: Mapping[str, Any]) -> None:
        self.state, self.items = state, dict(items)
        self._objects: list[Any] = []
        self._values: list[dict[Any, Any]] = []
        if NNX not in sys.modules or not (_holds_objects(state) or _holds_objects(self.items)):
            return
        parts = split(state)
        clash = sorted(parts.keys() & items.keys())
        if clash:
            raise InvalidArgumentError(f"items {clash} are parts of the state already; rename the keywords")
        trees = self._take_apart({**parts, **items})
        self.items = {name: trees[name] for name in items}
        if _is_object(state):
            self.state = trees[train_state.WHOLE]
        elif _holds_objects(state):
            self.state = train_state.join(state, {name: trees[name] for name in parts})

    def _take_apart(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        nodes, structure = jax.tree_util.tree_flatten(dict(parts), is_leaf=ends_here)
        self._objects = [node for node in nodes if _is_object(node)]
        self._values = _values_of(self._objects)
        pure = (PureState(values, number) for number, values in enumerate(self._values))
        taken = [next(pure) if _is_object(node) else node for node in nodes]
        trees: dict[str, Any] = jax.tree_util.tree_unflatten(structure, taken)
        return trees

    @property
    def others(self) -> dict[str, Any]:
        """The items that are no graph objects."""
        return {name: item for name, item in self.items.items() if not _is_pure(item)}

    def check(self) -> None:
        """Raises InvalidArgumentError for an object whose values cannot be set in place, before anything is read."""
        for number, (target, values) in enumerate(zip(self._objects, self._values, strict=True)):
            try:
                if values:
                    _set_values(target, values)  # to what they are
            except ValueError as error:
                raise InvalidArgumentError(
                    f"graph object {number} ({type(target).__qualname__}) cannot be restored in place: {error}. Put "
                    "the array into an nnx.Variable."
                ) from error

    def update(self, *restored: Any) -> Any:
        """Sets the values of every `PureState` in what was restored; returns it with the objects themselves.

        To be called when nothing can fail any more.
        """
        if not self._objects:
            return restored[0]
        for tree in jax.tree_util.tree_leaves(restored, is_leaf=_is_pure):
            if isinstance(tree, PureState) and tree:
                _set_values(self._objects[tree.number], tree)
        return jax.tree_util.tree_map(self._object_of, restored[0], is_leaf=_is_pure)

    def _object_of(self, node: Any) -> Any:
        return self._objects[node.number] if isinstance(node, PureState) else node


def _is_pure(node: Any) -> bool:
    return isinstance(node, PureState)


# ------------------------------------------------------------------ looking into objects


def _is_object(node: Any) -> bool:
    return _is_object_class(node.__class__)


@functools.lru_cache(maxsize=4096)
def _is_object_class(kind: type) -> bool:
    nnx = sys.modules[NNX]
    bases = [getattr(nnx, name, None) for name in ("Pytree", "Object", "Variable")]  # the first one since Flax 0.12
    return issubclass(kind, tuple(base for base in bases if isinstance(base, type)))


def ends_here(node: Any) -> bool:
    """Where the search for objects ends: an `nnx.State` is a pytree of its own, whose variables are its leaves."""
    return _is_object(node) or isinstance(node, sys.modules[NNX].State)


def _holds_objects(node: Any) -> bool:
    """Whether there is a graph object in a tree of containers; looks at classes, not at each leaf of a wide dict."""
    if _is_object(node):
        return True
    children: Iterable[Any] = ()
    if isinstance(node, dict):
        children = node.values()
    elif isinstance(node, list | tuple):
        children = node
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        children = [getattr(node, field.name, None) for field in dataclasses.fields(node)]
    return any(_holds_objects(child) for child in _one_of_each_leaf_class(children))


_CONTAINERS = (dict, list, tuple)


def _one_of_each_leaf_class(children: Iterable[Any]) -> Iterator[Any]:
    seen: set[type] = set()
    for child in children:
        kind = type(child)
        if kind not in seen:
            if not issubclass(kind, _CONTAINERS) and not dataclasses.is_dataclass(kind):
                seen.add(kind)
            yield child


def _values_of(objects: list[Any]) -> list[dict[Any, Any]]:
    """Nested dicts of the values of each object's variables; what an earlier object holds already is not repeated."""
    nnx = sys.modules[NNX]
    state = nnx.state(objects)
    values: list[dict[Any, Any]] = [{} for _ in objects]
    for (number, *path), variable in nnx.to_flat_state(state):
        value = _raw_value(variable)
        *above, name = path or [_VALUE]  # without a path the object is a variable itself
        inner = values[number]
        for key in above:
            inner = inner.setdefault(key, {})
        inner[name] = value
    return values


def _set_values(target: Any, values: Mapping[Any, Any]) -> None:
    nnx = sys.modules[NNX]
    nnx.update(target, values[_VALUE] if isinstance(target, nnx.Variable) else dict(values))


def _raw_value(variable: Any) -> Any:
    """What a variable holds, untouched by the functions that it may have for reading."""
    if not isinstance(variable, sys.modules[NNX].Variable):
        return variable
    value = variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value
    return value[...] if "Ref" in type(value).__name__ else value
