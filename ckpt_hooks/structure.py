"""The types of a tree: recorded beside its leaves at the save, and put together again without a target.

    tree --describe--> JSON, in ``_METADATA`` --typed--> nested dicts and lists become named tuples, dataclasses, ...

Of each node that is more than a dict with string keys or a list, the record has the class by its name and what of its
static fields can be written as a Python literal. Classes are imported by that name; no code of theirs is run to make
an instance of a named tuple or dataclass, and nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_hooks import train_state
from ckpt_hooks.errors import ClassNotFoundError, InvalidArgumentError
from ckpt_hooks.storage.lookup import content_of, is_there
from ckpt_hooks.tree import METADATA_FILE, key_text

__all__ = ["Unrecorded", "describe", "describe_state", "metadata_of", "typed_item", "typed_state"]

_KEY = "ckpt_hooks"  # of ours in the field ``custom_metadata`` of ``_METADATA``, which Orbax hands on as it is
_TUPLE = "tuple"
_MAX_LITERAL_CHARS = 10_000
_LEAF_CLASSES = (jax.Array, np.ndarray, bool, int, float, complex, str)

_log = logging.getLogger(__name__)

Record = dict[str, Any]


class Unrecorded:
    """Stands in a restored dataclass for a static field that no record can hold, such as a function.

    >>> field = Unrecorded("TrainState.tx")
    >>> field
    <TrainState.tx: not recorded>
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}: not recorded>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unrecorded) and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and the like look for
            raise AttributeError(name)
        raise AttributeError(f"{self._advice()}; so it has no {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self._advice()}; so it cannot be called")

    def _advice(self) -> str:
        return (
            f"{self._name} is a static field that a checkpoint cannot hold. Set it (`dataclasses.replace`), or restore "
            "into a state of your own (`like`)"
        )


# ------------------------------------------------------------------ recording


def metadata_of(tree: Any, part_of: str | None) -> Record:
    """What stands of a tree in ``custom_metadata``; `part_of` is what `describe_state` says of its state."""
    state = {} if part_of is None else {"state": json.loads(part_of)}
    return {_KEY: {"structure": describe(tree), **state}}


def describe_state(state: Any) -> str | None:
    """The class of a state whose parts are items, as JSON; None for a dict with string keys.

    >>> describe_state({"params": 1}), describe_state([1, 2])
    (None, '{"whole":true}')
    """
    parts = train_state.split(state)
    if parts.keys() == {train_state.WHOLE} and not _has_part(state, train_state.WHOLE):
        record: Record = {"whole": True}
    else:
        record = {**_describe_node(state, tuple(parts)), "parts": list(parts)}
    if record.keys() == {"parts"}:
        return None
    return json.dumps(record, separators=(",", ":"))


def _has_part(state: Any, name: str) -> bool:
    return (isinstance(state, Mapping) and name in state and not isinstance(state, train_state.PureState)) or hasattr(
        state, name
    )


def describe(node: Any) -> Record:
    """What nested dicts and lists lack of a tree; {} where nothing.

    >>> describe({"a": (1, 2), "b": [{"c": 3}]})
    {'children': {'a': {'type': 'tuple'}}}
    """
    if isinstance(node, np.generic) and not isinstance(node, str):
        return {"scalar": True}
    if node is None or isinstance(node, _LEAF_CLASSES):
        return {}
    children = _children(node)
    if children is None:
        return {"function": True} if callable(node) else {}
    record = _describe_node(node, tuple(children))
    inside = {str(key): found for key, child in children.items() if (found := describe(child))}
    return {**record, "children": inside} if inside else record


def _children(node: Any) -> dict[Any, Any] | None:
    """{key: child} of a node, None of a leaf."""
    if isinstance(node, dict):
        return dict(node)
    if type(node) in (list, tuple):
        return dict(enumerate(node))
    paths, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
    if len(paths) == 1 and paths[0][0] == ():
        return None
    return {".".join(map(key_text, path)): child for path, child in paths}


def _describe_node(node: Any, keys: tuple[Any, ...]) -> Record:
    kind = type(node)
    if kind is list:
        return {}
    if kind is tuple:
        return {"type": _TUPLE}
    record: Record = {} if kind in (dict, train_state.PureState) else {"type": _reference(kind)}
    if isinstance(node, Mapping):
        record |= _describe_keys(node)
        if isinstance(node, collections.defaultdict) and node.default_factory is not None:
            record["factory"] = _reference(node.default_factory)
    elif dataclasses.is_dataclass(node):
        record |= _describe_static(node, keys)
    elif not _is_named_tuple(kind):
        record["lost"] = "it is no named tuple, dataclass or mapping"
    return record


def _describe_keys(node: Mapping[Any, Any]) -> Record:
    """Which keys are no strings, whose text is what the checkpoint's tree has."""
    others = [key for key in node if type(key) is not str]
    if not others:
        return {}
    if not all(_is_literal(key, str(key)) for key in others):
        return {"lost": "its keys are not all strings, numbers or tuples of them"}
    return {"keys": True if len(others) == len(node) else [str(key) for key in others]}


def _describe_static(node: Any, keys: tuple[Any, ...]) -> Record:
    names = [field.name for field in dataclasses.fields(node)]
    if not set(keys) <= set(names):
        return {"lost": "its children are not its fields"}
    static = {name: getattr(node, name, None) for name in names if name not in keys}
    literal = {name: repr(value) for name, value in static.items() if _is_literal(value, repr(value))}
    record: Record = {"static": literal} if literal else {}
    unrecorded = [name for name in static if name not in literal]
    return {**record, "unrecorded": unrecorded} if unrecorded else record


def _is_literal(value: Any, text: str) -> bool:
    """Whether a value can be read from its text again, with the types of all that is in it."""
    if len(text) > _MAX_LITERAL_CHARS:
        return False
    try:
        return repr(ast.literal_eval(text)) == repr(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


def _reference(kind: Any) -> str:
    return f"{getattr(kind, '__module__', None)}:{getattr(kind, '__qualname__', repr(kind))}"


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


# ------------------------------------------------------------------ putting together


def typed_item(directory: str, plain: Any, custom_metadata: Any) -> Any:
    """An item that was restored without a target, in the types that it was saved in.

    `custom_metadata` is that of its ``_METADATA``, which who restored it has read. Raises ClassNotFoundError that lists
    every class that cannot be imported or has changed, and InvalidArgumentError where no types were recorded.
    """
    record = _record_in(custom_metadata, directory)["structure"]
    builder = _Builder(os.path.basename(directory))
    built = builder.build(plain, record, "")
    builder.finish()
    return built


def typed_state(directories: Iterable[str], parts: dict[str, Any]) -> Any:
    """The state of these parts, in the type that it was saved in; `directories` are those of its trees."""
    smallest = min(directories, key=_metadata_nbytes, default=None)  # all of them have it
    record = None if smallest is None else _recorded(smallest).get("state")
    if record is None:
        return parts
    if "whole" in record:
        return parts[train_state.WHOLE]
    builder = _Builder("the state")
    state = builder.put_together({name: parts[name] for name in record["parts"] if name in parts}, record, "")
    builder.finish()
    return state


def _recorded(directory: str) -> Record:
    try:
        custom = json.loads(content_of(os.path.join(directory, METADATA_FILE))).get("custom_metadata")
    except (FileNotFoundError, NotADirectoryError):  # a file of Flax's, a key of Orbax's
        custom = None
    return _record_in(custom, directory)


def _metadata_nbytes(directory: str) -> int:
    path = os.path.join(directory, METADATA_FILE)
    return os.stat(path).st_size if is_there(path) else 0


def _record_in(custom: Any, directory: str) -> Record:
    record = custom.get(_KEY) if isinstance(custom, Mapping) else None
    if not isinstance(record, dict):
        raise InvalidArgumentError(
            f"{directory} has no record of its types: Orbax, Flax or an early version wrote it. Restore without "
            "typed=True, or into a state of your own (`like`)."
        )
    return record


class _Builder:
    """Puts a tree together, and notes what cannot be."""

    def __init__(self, item: str) -> None:
        self._item = item
        self._problems: list[str] = []
        self._unrecorded: list[str] = []

    def finish(self) -> None:
        if self._problems:
            raise ClassNotFoundError(
                f"{self._item}: these types cannot be given back:\n  "
                + "\n  ".join(self._problems)
                + "\nImport or install what defines them, restore without typed=True (nested dicts and lists), or "
                "into a state of your own (`like`)."
            )
        if self._unrecorded:
            _log.warning("%s: a checkpoint cannot hold %s: set them yourself", self._item, self._unrecorded)

    def build(self, plain: Any, record: Record, place: str) -> Any:
        for key, inside in record.get("children", {}).items():
            where = f"{place}.{key}" if place else key
            if isinstance(plain, dict) and key in plain:
                plain[key] = self.build(plain[key], inside, where)
            elif isinstance(plain, list) and key.isdecimal() and int(key) < len(plain):
                plain[int(key)] = self.build(plain[int(key)], inside, where)
        return self.put_together(plain, record, place)

    def put_together(self, plain: Any, record: Record, place: str) -> Any:
        if "scalar" in record:
            return plain[()]
        if "function" in record:
            self._unrecorded.append(place)  # what stands there is None, which `eqx.combine` replaces
            return plain
        if record.get("type") == _TUPLE:
            return tuple(plain)
        name = record.get("type", "builtins:dict")
        lost = record.get("lost")
        if lost is None and isinstance(plain, dict) and "keys" in record:
            plain = {ast.literal_eval(key) if _is_evaluated(key, record) else key: plain[key] for key in plain}
        if lost is not None or "type" not in record:
            return self._fail(place, name, lost) if lost is not None else plain
        try:
            return self._instance(_imported(name), {} if plain is None else plain, record, place)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return self._fail(place, name, str(error))

    def _instance(self, kind: type, plain: Any, record: Record, place: str) -> Any:
        if _is_named_tuple(kind):
            _require_fields(kind._fields, plain)  # type: ignore[attr-defined]
            return tuple.__new__(kind, [plain[name] for name in kind._fields])  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, plain, record, place)
        if issubclass(kind, collections.defaultdict):
            factory: Callable[[], Any] | None = _imported(record["factory"]) if "factory" in record else None
            return kind(factory, plain)
        if issubclass(kind, Mapping):
            return kind(plain)  # type: ignore[call-arg]
        raise TypeError("it is no named tuple, dataclass or mapping")

    def _dataclass(self, kind: type, plain: Mapping[str, Any], record: Record, place: str) -> Any:
        static = {name: ast.literal_eval(text) for name, text in record.get("static", {}).items()}
        unrecorded = {name: Unrecorded(f"{kind.__qualname__}.{name}") for name in record.get("unrecorded", ())}
        values = {**plain, **static, **unrecorded}
        _require_fields([field.name for field in dataclasses.fields(kind)], values)
        instance: Any = object.__new__(kind)
        for name, value in values.items():
            object.__setattr__(instance, name, value)  # as JAX does it, also where the class is frozen
        self._unrecorded += [f"{place}.{name}" if place else name for name in unrecorded]
        return instance

    def _fail(self, place: str, name: str, reason: str | None) -> None:
        self._problems.append(f"{place or '(the item itself)'}: {name.replace(':', '.')}: {reason}")


def _is_evaluated(key: str, record: Record) -> bool:
    return record["keys"] is True or key in record["keys"]


def _require_fields(names: Iterable[str], values: Mapping[str, Any]) -> None:
    if set(names) != values.keys():
        raise ValueError(f"it has the fields {sorted(names)} now, and was saved with {sorted(values)}")


def _imported(reference: str) -> type:
    """A class by its module and qualified name; whatever else has that name is not taken."""
    module, _, path = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    if not isinstance(found, type):
        raise TypeError("it is no class")
    return found
