"""A training state as named items and back. Pure, and without a registry of types.

A state is split one level down: a mapping by its keys, a dataclass, `flax.struct` or named tuple by its pytree
fields. Anything else is the single item ``state``, and so is a module of NNX or Equinox.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ckpt_hooks.equinox_modules import is_module
from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, ItemNotFoundError
from ckpt_hooks.tree import is_it

__all__ = ["WHOLE", "PureState", "join", "no_state", "parts_of", "split"]

WHOLE = "state"  # the item of a state that has no named parts


class PureState(dict[Any, Any]):
    """The values of an NNX graph object: nested dicts that are one item, and which object of its call they are of."""

    def __init__(self, values: Mapping[Any, Any], number: int) -> None:
        super().__init__(values)
        self.number = number


def _flatten_with_keys(state: PureState) -> tuple[list[tuple[Any, Any]], tuple[int, tuple[Any, ...]]]:
    names = tuple(sorted(state))
    return [(jax.tree_util.DictKey(name), state[name]) for name in names], (state.number, names)


def _unflatten(data: tuple[int, tuple[Any, ...]], values: Iterable[Any]) -> PureState:
    number, names = data
    return PureState(dict(zip(names, values, strict=True)), number)


jax.tree_util.register_pytree_with_keys(PureState, _flatten_with_keys, _unflatten)


def no_state(call: str) -> InvalidArgumentTypeError:
    """The error for None, which is no state; what a state holds may be None."""
    return InvalidArgumentTypeError(
        f"{call}: the state is None. Does the function that makes it end without `return`? An empty state is {{}}."
    )


def split(state: Any) -> dict[str, Any]:
    """{item: its part of the state}.

    >>> split({"params": {"w": 1.0}, "step": 7})
    {'params': {'w': 1.0}, 'step': 7}
    >>> split([1, 2])
    {'state': [1, 2]}
    """
    parts = _named_parts(state)
    if parts is None:
        return {WHOLE: state}
    return parts or {WHOLE: {}}  # a dataclass without fields, which JAX does not know


def parts_of(state: Any, names: Sequence[str]) -> dict[str, Any]:
    """{item: its part} of those with these names. Raises ItemNotFoundError where there are none.

    >>> parts_of({"params": {"w": 1.0}, "step": 7}, ["step"])
    {'step': 7}
    """
    parts = split(state)
    absent = [name for name in names if name not in parts]
    if absent:
        meant = is_it(absent[0], parts)
        raise ItemNotFoundError(f"`like` has no part {absent}; it has {sorted(parts)}{meant}")
    return {name: parts[name] for name in names}


def join(like: Any, parts: Mapping[str, Any]) -> Any:
    """The state in the type of `like`, with its parts replaced: the inverse of `split`.

    >>> join({"params": None, "step": None}, {"params": {"w": 1.0}, "step": 7})
    {'params': {'w': 1.0}, 'step': 7}
    >>> join({"step": 0, "params": 0}, {"step": 7, "params": 1.0})  # whatever the order of its keys
    {'params': 1.0, 'step': 7}
    """
    named = _named_parts(like)
    if named is None:
        return parts[WHOLE]
    values = [parts[name] for name in named]
    if _is_plain_dataclass(like):
        state = copy.copy(like)  # and not replace(), which takes no init=False field and runs __post_init__ again
        for name, value in zip(named, values, strict=True):
            object.__setattr__(state, name, value)
        return state
    structure = jax.tree_util.tree_structure(like, is_leaf=lambda node: node is not like)
    return jax.tree_util.tree_unflatten(structure, values)


def _named_parts(state: Any) -> dict[str, Any] | None:
    if type(state) is dict and state and all(type(name) is str for name in state):
        return {name: state[name] for name in sorted(state)}  # what follows gives the same, more slowly
    if _is_plain_dataclass(state):
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if isinstance(state, PureState) or is_module(state) or (isinstance(state, Mapping) and not state):
        return None
    try:
        children, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: node is not state)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"JAX cannot flatten a state of type {type(state).__qualname__}: {error}") from error
    names = [_name(path) for path, _ in children]
    if not names or None in names:
        return None
    parts = {str(name): child for name, (_, child) in zip(names, children, strict=True)}
    if len(parts) < len(names):
        raise InvalidArgumentError(f"two parts of the state would be the same item: {names}")
    return parts


def _name(path: tuple[Any, ...]) -> str | None:
    match path:
        case (jax.tree_util.DictKey(key=name),) | (jax.tree_util.GetAttrKey(name=name),):
            return str(name)
    return None


def _is_plain_dataclass(state: Any) -> bool:
    """A dataclass that JAX does not know as a pytree."""
    if not dataclasses.is_dataclass(state) or isinstance(state, type):
        return False
    return jax.tree_util.all_leaves([state])
