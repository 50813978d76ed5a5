"""A pytree as named leaves and back: the tree half of Orbax's ``_METADATA``. Pure, no I/O.

A leaf's name is its keys joined by dots (``params.Dense_0.kernel``); a bare leaf's name is empty. The file
``_METADATA`` records each leaf's keys, so names are only an index; but two leaves of one name would be one array
on disk, so they are refused.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError, NameCollisionError, UnsupportedLeafError

__all__ = [
    "Leaf",
    "LeafRecord",
    "flatten",
    "key_text",
    "named_leaves",
    "nearest",
    "nest",
    "record_to_json",
    "records_from_json",
]

# Orbax's files of a pytree item
METADATA_FILE = "_METADATA"
SHARDING_FILE = "_sharding"
STRINGS_FILE = "_strings.json"
MANIFEST_FILE = "manifest.ocdbt"  # where the arrays are in a database
STRUCTURE_FILE = "checkpoint"  # of its first versions, which had none of the others
ARRAY_METADATA_FOLDER = "array_metadatas"
OWN_ARRAY_METADATA = f"{ARRAY_METADATA_FOLDER}/process_0"  # the one file in it that we write

_SEQUENCE_KEY, _DICT_KEY = 1, 2  # Orbax's key types; attributes and named-tuple fields count as dict keys

EMPTY_TYPES = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})  # the last only with Orbax's "rich types"

Keys = tuple[tuple[str, int], ...]


class Leaf(NamedTuple):
    """A leaf of a tree, or a node without children, which is recorded like one."""

    name: str
    keys: Keys
    value: Any
    is_empty: bool


class LeafRecord(NamedTuple):
    """What ``_METADATA`` says of a leaf."""

    name: str
    key_metadata: list[dict[str, Any]]
    value_type: str  # jax.Array, np.ndarray, scalar, string, or one of `EMPTY_TYPES`, of an empty node

    @property
    def keys(self) -> Keys:
        return tuple((str(key["key"]), int(key["key_type"])) for key in self.key_metadata)

    @property
    def is_empty(self) -> bool:
        return self.value_type in EMPTY_TYPES

    def empty_value(self) -> Any:
        """What stands for the node where there is no target: None for a named tuple, whose class nobody knows."""
        return {"Dict": {}, "List": [], "Tuple": ()}.get(self.value_type)


# ------------------------------------------------------------------ flattening


def flatten(tree: Any) -> list[Leaf]:
    """The leaves and the empty nodes of a tree, in JAX's order.

    Raises NameCollisionError where two of them would share a name.

    >>> [leaf.name for leaf in flatten({"a": {"b": 1}, "c": [2, None]})]
    ['a.b', 'c.0', 'c.1']
    """
    try:
        paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty_node)
    except (ValueError, TypeError) as error:
        raise UnsupportedLeafError(f"the tree cannot be flattened by JAX: {error}") from error
    leaves = []
    for path, value in paths:
        keys = tuple(map(_key, path))
        leaves.append(Leaf(".".join([key for key, _ in keys]), keys, value, _is_empty_node(value)))
    counts = Counter([leaf.name for leaf in leaves])
    if len(counts) < len(leaves):
        raise NameCollisionError(_describe_collision(leaves, counts))
    return leaves


def named_leaves(tree: Any) -> dict[str, Any]:
    """{name: value} of each leaf that is not an empty node, in JAX's order; raises as `flatten` does.

    >>> named_leaves({"a": {"b": 1}, "c": [2, None]})
    {'a.b': 1, 'c.0': 2}
    """
    try:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        known = structure, str(structure)  # to Python, keys 1, 1.0 and True are one, and "a" and a string enum of it
        names = _names_of.get(known)
    except Exception:  # what JAX cannot flatten, or metadata that cannot be hashed, compared or shown
        return {leaf.name: leaf.value for leaf in flatten(tree) if not leaf.is_empty}
    if names is None:
        names = [leaf.name for leaf in flatten(tree) if not leaf.is_empty]
        if len(_names_of) >= _CACHED_STRUCTURES:
            _names_of.clear()
        _names_of[known] = names
    return dict(zip(names, leaves, strict=True))


_CACHED_STRUCTURES = 64
_names_of: dict[Any, list[str]] = {}  # naming a leaf takes ten times as long as finding it


def _is_empty_node(value: Any) -> bool:
    """None, {}, [], () and every registered node without children, such as `optax.EmptyState()`."""
    if value is None:
        return True
    if isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, str)):
        return False
    structure: Any = jax.tree_util.tree_structure(value)
    return bool(structure.num_leaves == 0 and structure.num_nodes == 1)


def key_text(key: Any) -> str:
    """The text of one of JAX's keys, as it stands in a leaf's name."""
    return _key(key)[0]


def _key(key: Any) -> tuple[str, int]:
    if type(key) is jax.tree_util.DictKey and type(key.key) is not str:
        return str(key.key), _DICT_KEY  # not from the cache, to which 1, 1.0 and True are one key
    return _cached_key(key)


@functools.lru_cache(maxsize=4096)
def _cached_key(key: Any) -> tuple[str, int]:
    match key:
        case jax.tree_util.SequenceKey(idx=index):
            return str(index), _SEQUENCE_KEY
        case jax.tree_util.DictKey(key=name):
            return str(name), _DICT_KEY
        case jax.tree_util.GetAttrKey(name=name):
            return str(name), _DICT_KEY
        case jax.tree_util.FlattenedIndexKey(key=index):
            return str(index), _SEQUENCE_KEY
    return str(key), _DICT_KEY


def _describe_collision(leaves: Sequence[Leaf], counts: Mapping[str, int]) -> str:
    lines = []
    for name in [name for name, count in counts.items() if count > 1]:
        places = ["".join(f"[{key!r}]" for key, _ in leaf.keys) for leaf in leaves if leaf.name == name]
        lines.append(f"  {name!r} is the name of {' and of '.join(places)}")
    return "these leaves would share one name on disk, so one would be lost; rename a key:\n" + "\n".join(lines)


# ------------------------------------------------------------------ records


def empty_type(value: Any) -> str:
    """How Orbax calls an empty node: an empty named tuple counts as None."""
    match value:
        case Mapping():
            return "Dict"
        case list():
            return "List"
        case tuple() if not hasattr(value, "_fields"):
            return "Tuple"
    return "None"


def record_to_json(keys: Keys, value_type: str, write_shape: tuple[int, ...] | None = None) -> tuple[str, Any]:
    """One entry of the field ``tree_metadata``."""
    value: dict[str, Any] = {"value_type": value_type, "skip_deserialize": value_type in EMPTY_TYPES}
    if write_shape is not None:
        value["write_shape"] = list(write_shape)
    key_metadata = [{"key": key, "key_type": key_type} for key, key_type in keys]
    return str(tuple([key for key, _ in keys])), {"key_metadata": key_metadata, "value_metadata": value}


def records_from_json(tree_metadata: Any) -> list[LeafRecord]:
    """Reads the field ``tree_metadata``; raises CorruptCheckpointError where it is not one."""
    records = []
    try:
        for entry in tree_metadata.values():
            keys = entry["key_metadata"]
            name = ".".join([key["key"] for key in keys])
            records.append(LeafRecord(name, keys, entry["value_metadata"]["value_type"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"the tree metadata is damaged: {error!r}") from error
    return records


# ------------------------------------------------------------------ building


def nest(values: Iterable[tuple[Keys, Any]]) -> Any:
    """Nested dicts and lists: what a restore without a target returns.

    >>> nest([((("a", 2), ("0", 1)), 5), ((("a", 2), ("1", 1)), 6)])
    {'a': [5, 6]}
    """
    root = _Branch()
    for keys, value in values:
        if not keys:
            return value  # a bare leaf is the whole tree
        node = root
        for key in keys[:-1]:
            node = node.setdefault(key, _Branch())
        node[keys[-1]] = value
    return _listed(root)


def _listed(node: Any) -> Any:
    """Dicts whose keys are list positions become lists."""
    if not isinstance(node, _Branch):
        return node
    children = {key: _listed(child) for (key, _), child in node.items()}
    if node and all(key_type == _SEQUENCE_KEY for _, key_type in node):
        return [children[key] for key in sorted(children, key=int)]
    return children


class _Branch(dict[tuple[str, int], Any]):
    """A dict under construction, told apart from a dict that is a value."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that somebody who wrote `name` may have meant.

    >>> nearest("kernal", ["bias", "kernel"]), nearest("w", ["b", "encoder.w"]), nearest("w", ["a.w", "b.w"])
    ('kernel', 'encoder.w', None)
    """
    known = list(candidates)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    deeper = [other for other in known if other.startswith(f"{name}.") or other.endswith(f".{name}")]
    return deeper[0] if len(deeper) == 1 else None


def is_it(name: str, candidates: Iterable[str]) -> str:
    """The nearest candidate as the end of a sentence, or nothing.

    >>> is_it("parms", ["params", "step"]), is_it("x", ["params"])
    ("; is it 'params'?", '')
    """
    meant = nearest(name, candidates)
    return f"; is it {meant!r}?" if meant else ""
