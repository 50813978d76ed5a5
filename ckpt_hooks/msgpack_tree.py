"""A tree in a msgpack file, as Flax wrote it and as Orbax did in its first versions. It is only read.

    checkpoint_100                          Flax: the tree with its arrays; those of several processes in <name>_gda/
    default/checkpoint, default/params.w/   Orbax: the tree, and most of its arrays beside it
    the same and default/_METADATA          Orbax, a little later: what is a leaf of which kind stands there

The file is one msgpack map, which is read whole and has no checksums. Its extensions are::

    1: (shape, dtype name, bytes) of an array    2: (real, imaginary) of a Python complex    3: as 1, of a NumPy scalar

msgpack is not imported before the first such file is read, and Flax never.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_hooks import tree
from ckpt_hooks.committed import has_early_tree
from ckpt_hooks.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedLeafError
from ckpt_hooks.loading import SavedTree
from ckpt_hooks.storage.array_info import ArrayInfo
from ckpt_hooks.storage.lookup import is_directory, is_file, is_there
from ckpt_hooks.storage.reader import Database
from ckpt_hooks.storage.regions import Region, slices_of

__all__ = ["MsgpackTree", "open_tree"]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"  # an array above Flax's bound, as {this: True, "shape": {}, "chunks": {}}
_BESIDE_FLAX = "//GDAPlaceholder:"  # before the place of an array that is not in the file
_BESIDE_ORBAX = "PLACEHOLDER://"
_OLD_NAMED_TUPLE = {"name", "fields", "values"}


def open_tree(path: str, *, verify: bool = True) -> SavedTree:
    """The tree at a path, in whichever form. Raises CheckpointNotFoundError where there is none."""
    try:
        # What somebody has put into an item of ours is no part of it.
        is_described = not Database.is_ours(path) and has_early_tree(path)
        return _DescribedTree(path) if is_described else SavedTree(path, verify=verify)
    except CheckpointNotFoundError:
        if not MsgpackTree.is_at(path):
            raise
        return MsgpackTree(path)


class MsgpackTree(SavedTree):
    """Dicts with string keys, in which lists and tuples have the keys "0", "1", ...

    Raises CorruptCheckpointError for what is no such file, or not all of it, and UnsupportedLeafError for a leaf that
    no tree of ours can hold.
    """

    def __init__(self, path: str) -> None:
        self._directory = path
        is_orbax = is_directory(path)
        beside, prefix = (path, _BESIDE_ORBAX) if is_orbax else (f"{path}_gda", _BESIDE_FLAX)
        named = tree.flatten(_unpacked(os.path.join(path, tree.STRUCTURE_FILE) if is_orbax else path))
        values = _values(named)
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        elsewhere = {name: text[len(prefix) :] for name, text in texts.items() if text.startswith(prefix)}
        self._strings = {name: text for name, text in texts.items() if name not in elsewhere}
        arrays = {name: _array(path, name, value) for name, value in values.items() if name not in texts}
        self._records = [_record(leaf, is_array=leaf.name in elsewhere) for leaf in named]
        self._arrays = _Arrays(arrays, elsewhere, lambda inner: _arrays_beside(beside, inner))
        self.leaves = dict(self._describe([record for record in self._records if not record.is_empty], {}))

    @classmethod
    def is_at(cls, path: str) -> bool:
        """Whether a path is such a file, or a directory with one."""
        return is_file(path) or has_early_tree(path)


class _DescribedTree(SavedTree):
    """Orbax's tree that has its metadata and the msgpack file too, which holds the values that were small.

    What the file has no value of, but only the place of, is an array beside it.
    """

    def _read_strings(self) -> dict[str, str]:
        # Read first: what it holds decides which arrays are opened.
        named = _values(tree.flatten(_unpacked(os.path.join(self._directory, tree.STRUCTURE_FILE))))
        leaves = {record.name for record in self._records if not record.is_empty}
        inside = {
            name: value
            for name, value in named.items()
            if name in leaves and not (isinstance(value, str) and value.startswith(_BESIDE_ORBAX))
        }
        texts = {name: value for name, value in inside.items() if isinstance(value, str)}
        self._inside = {
            name: _array(self._directory, name, value) for name, value in inside.items() if name not in texts
        }
        return texts

    def _open(self, metadata: dict[str, Any], names: Sequence[str], verify: bool) -> Any:
        elsewhere = {name: name for name in names if name not in self._inside}
        opened = super()._open
        return _Arrays(self._inside, elsewhere, lambda inner: opened(metadata, list(inner), verify))


def _values(named: Iterable[tree.Leaf]) -> dict[str, Any]:
    return {leaf.name: leaf.value for leaf in named if not leaf.is_empty}


def _arrays_beside(directory: str, names: Iterable[str]) -> Any:
    from ckpt_hooks.storage.foreign import ForeignArrays

    use_ocdbt = is_there(os.path.join(directory, tree.MANIFEST_FILE))
    return ForeignArrays(directory, names, use_ocdbt=use_ocdbt, use_zarr3=False)


class _Arrays:
    """Those of the file, in memory, and those beside it, which are opened where there are any."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        elsewhere: Mapping[str, str],
        open_others: Callable[[Iterable[str]], Any],
    ) -> None:
        self._arrays, self._elsewhere = arrays, elsewhere
        self._infos = {name: ArrayInfo(array.shape, array.dtype, array.shape) for name, array in arrays.items()}
        if elsewhere:
            self._spread = open_others(elsewhere.values())
            self._infos |= {name: self._spread.info(inner) for name, inner in elsewhere.items()}

    def info(self, name: str) -> ArrayInfo:
        return self._infos[name]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Copies, since what msgpack hands out cannot be written to."""
        names = list(names)
        found = {name: self._arrays[name].copy() for name in names if name in self._arrays}
        spread = {name: self._elsewhere[name] for name in names if name in self._elsewhere}
        if spread:
            read = self._spread.read(spread.values())
            found |= {name: read[inner] for name, inner in spread.items()}
        return found

    def read_regions(self, wanted: Mapping[str, Sequence[Region]]) -> dict[str, list[np.ndarray]]:
        """Regions of arrays, copied too."""
        found: dict[str, list[np.ndarray]] = {}
        for name in wanted.keys() & self._arrays.keys():
            indices: list[Any] = [(*slices_of(region), ...) for region in wanted[name]]
            found[name] = [self._arrays[name][index].copy() for index in indices]
        spread = {name: self._elsewhere[name] for name in wanted if name in self._elsewhere}
        if spread:
            read = self._spread.read_regions({inner: wanted[name] for name, inner in spread.items()})
            found |= {name: read[inner] for name, inner in spread.items()}
        return found


def _record(leaf: tree.Leaf, *, is_array: bool) -> tree.LeafRecord:
    keys = [{"key": key, "key_type": key_type} for key, key_type in leaf.keys]
    return tree.LeafRecord(leaf.name, keys, "jax.Array" if is_array else _value_type(leaf))


def _value_type(leaf: tree.Leaf) -> str:
    if leaf.is_empty:
        return tree.empty_type(leaf.value)
    if isinstance(leaf.value, str):
        return "string"
    return "np.ndarray" if isinstance(leaf.value, np.ndarray | np.generic) else "scalar"


def _array(path: str, name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if isinstance(value, bytes) or array.dtype.kind == "O":
        raise UnsupportedLeafError(
            f"{path}: {name or 'the state'} is of type {type(value).__qualname__}, which no tree can hold; read this "
            "file with flax.serialization.msgpack_restore."
        )
    return array


# ------------------------------------------------------------------ the file


def _unpacked(path: str) -> Any:
    import msgpack

    with open(path, "rb") as file:
        content = file.read()
    try:
        unpacked = msgpack.unpackb(content, ext_hook=_extension, raw=False, strict_map_key=False)
        if not isinstance(unpacked, dict | list | np.ndarray):  # as most files of one byte are a number in msgpack
            raise ValueError(f"it is one {type(unpacked).__name__} and no tree")
        return _rebuilt(unpacked)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise CorruptCheckpointError(
            f"{path} is not a msgpack file as Flax or Orbax writes it, or not all of it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code == _COMPLEX:
        return complex(*msgpack.unpackb(data))
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it has an extension of type {code}")
    shape, dtype, values = msgpack.unpackb(data, raw=True)
    array = np.frombuffer(values, np.dtype(dtype.decode())).reshape(shape)
    return array[()] if code == _SCALAR else array


def _rebuilt(node: Any) -> Any:
    """The tree with its large arrays in one piece, and what early versions made of named tuples as their fields."""
    if isinstance(node, list):
        return [_rebuilt(child) for child in node]
    if not isinstance(node, dict):
        return node
    if _CHUNKED in node:
        chunks, shape = node["chunks"], node["shape"]
        pieces = [chunks[str(number)] for number in range(len(chunks))]
        return np.concatenate(pieces).reshape([shape[str(axis)] for axis in range(len(shape))])
    children = {str(key): _rebuilt(child) for key, child in node.items()}
    if children.keys() == _OLD_NAMED_TUPLE and isinstance(children["name"], str):
        fields, values = children["fields"], children["values"]
        return {fields[number]: values[number] for number in fields}
    return children
