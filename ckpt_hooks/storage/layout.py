"""Where every chunk of a structure goes: offsets, zarr metadata and index nodes, made once and reused.

A layout depends only on names, shapes, dtypes and shardings. It is the same in every process, so that each
writes its own data file and process 0 writes one index over all of them without asking anybody.

The data file of process p is ``d/<p as 32 hex digits>``: the chunks that p owns, each at a multiple of 64 bytes
(JAX on CPU takes such memory without a copy), and in process 0 the nodes of the index after them. A chunk of at
most `ocdbt.MAX_INLINE_VALUE_BYTES` that process 0 owns stands in the index itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import DATA_FOLDER

__all__ = ["ArraySpec", "ChunkId", "IndexNode", "Layout", "Segment", "array_key", "data_file_name", "zarr_dtype"]

ALIGNMENT_BYTES = 64
_NODE_ENTRIES = 1 << 16  # keys in one leaf node of the index

ChunkId = tuple[int, int]  # (number of the array, number of its chunk)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array as zarr sees it: a grid of equal chunks, each owned by one process."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    grid: tuple[tuple[int, ...], ...]  # the position of each chunk
    owners: tuple[int, ...]  # the process that writes it

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], dtype: np.dtype) -> ArraySpec:
        """An array in one chunk, written by process 0; an empty one has no chunk at all."""
        grid = ((0,) * len(shape),) if 0 not in shape else ()
        return cls(name, shape, dtype, tuple(max(1, n) for n in shape), grid, (0,) * len(grid))

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def key(self, suffix: str) -> bytes:
        """A key of this array in the database."""
        return array_key(self.name, suffix)

    def metadata(self) -> bytes:
        """The array's ``.zarray`` (zarr v2)."""
        fields = {
            "chunks": list(self.chunk_shape),
            "compressor": None,
            "dimension_separator": ".",
            "dtype": zarr_dtype(self.dtype),
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(self.shape),
            "zarr_format": 2,
        }
        return json.dumps(fields, separators=(",", ":")).encode()


def zarr_dtype(dtype: np.dtype) -> str:
    """How zarr v2, with tensorstore's extensions, writes a dtype.

    >>> zarr_dtype(np.dtype("float32")), zarr_dtype(np.dtype("bool"))
    ('<f4', '|b1')
    """
    return dtype.name if dtype.isbuiltin == 2 else dtype.str  # 2: registered by ml_dtypes


def array_key(name: str, suffix: str) -> bytes:
    """A key of an array in the database; that of a bare leaf, which has no name, is the suffix alone."""
    return (f"{name}/{suffix}" if name else suffix).encode()


def data_file_name(process: int) -> str:
    """The data file of a process, relative to the item."""
    return f"{DATA_FOLDER}/{process:032x}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A chunk in a data file."""

    chunk: ChunkId
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class IndexNode:
    """A node of the index: bytes that never change, and between them the chunks that stand inline.

    Its CRC-32C is still to come.
    """

    offset: int
    parts: tuple[bytes | ChunkId, ...]


class Layout:
    """The files of one item.

    Attributes:
      data_files: per process, the name of its data file.
      segments: per process, its chunks in its data file, in the order of their offsets.
      data_nbytes: per process, the size of its data file.
      index: the nodes of the index, which are in the data file of process 0, in the order of their offsets.
      manifest: the template of the manifest (`ocdbt.manifest_template`).
    """

    def __init__(self, arrays: Sequence[ArraySpec], num_processes: int = 1) -> None:
        self.segments: list[list[Segment]] = [[] for _ in range(num_processes)]
        self.data_nbytes = [0] * num_processes
        self.data_files = [data_file_name(process) for process in range(num_processes)]
        values: list[tuple[bytes, int, bytes | ChunkId | tuple[int, int]]] = []
        for number, array in enumerate(arrays):
            metadata = array.metadata()
            values.append((array.key(".zarray"), len(metadata), metadata))
            values += self._place(number, array)
        values.sort(key=lambda value: value[0])
        self.index: list[IndexNode] = []
        self.manifest = ocdbt.manifest_template(self._build_index(values))

    def _place(self, number: int, array: ArraySpec) -> Iterator[tuple[bytes, int, bytes | ChunkId | tuple[int, int]]]:
        nbytes = array.chunk_nbytes
        for chunk, (position, owner) in enumerate(zip(array.grid, array.owners, strict=True)):
            key = array.key(".".join(map(str, position)) or "0")
            if owner == 0 and nbytes <= ocdbt.MAX_INLINE_VALUE_BYTES:
                yield key, nbytes, (number, chunk)
                continue
            offset = _align(self.data_nbytes[owner])
            self.data_nbytes[owner] = offset + nbytes
            self.segments[owner].append(Segment((number, chunk), offset, nbytes))
            yield key, nbytes, _Outside((owner, offset))

    def _build_index(self, values: Sequence[tuple[bytes, int, object]]) -> ocdbt.Root:
        if not values:
            return ocdbt.Root(None, 0)
        starts = range(0, len(values), _NODE_ENTRIES)
        children, height = [self._leaf(values[start : start + _NODE_ENTRIES]) for start in starts], 0
        while len(children) > 1:
            height += 1
            groups = [children[i : i + _NODE_ENTRIES] for i in range(0, len(children), _NODE_ENTRIES)]
            children = [self._interior_node(height, group) for group in groups]
        return ocdbt.Root(children[0], height)

    def _leaf(self, values: Sequence[tuple[bytes, int, object]]) -> ocdbt.Child:
        owners = sorted({value[0] for _, _, value in values if isinstance(value, _Outside)})
        prefix = ocdbt.node_prefix(
            [key for key, _, _ in values],
            [nbytes for _, nbytes, _ in values],
            [data_file_name(owner) for owner in owners],
            [(owners.index(value[0]), value[1]) if isinstance(value, _Outside) else None for _, _, value in values],
        )
        inline_nbytes = sum(nbytes for _, nbytes, value in values if not isinstance(value, _Outside))
        parts: list[bytes | ChunkId] = []
        constant = [ocdbt.node_header(len(prefix) + inline_nbytes), prefix]
        for _, _, value in values:
            if isinstance(value, bytes):
                constant.append(value)
            elif isinstance(value, tuple) and not isinstance(value, _Outside):
                parts += [b"".join(constant), value]  # bytes that never change are joined once, here
                constant = []
        parts.append(b"".join(constant))
        nbytes = ocdbt.node_nbytes(len(prefix) + inline_nbytes)
        outside_nbytes = sum(nbytes for _, nbytes, value in values if isinstance(value, _Outside))
        offset = self._append_node(nbytes, parts)
        return ocdbt.Child(values[0][0], data_file_name(0), offset, nbytes, len(values), nbytes, outside_nbytes)

    def _interior_node(self, height: int, children: Sequence[ocdbt.Child]) -> ocdbt.Child:
        body = ocdbt.interior_prefix(height, children)
        nbytes = ocdbt.node_nbytes(len(body))
        return ocdbt.Child(
            children[0].first_key,
            data_file_name(0),
            self._append_node(nbytes, [ocdbt.node_header(len(body)) + body]),
            nbytes,
            sum(child.num_keys for child in children),
            nbytes + sum(child.tree_nbytes for child in children),
            sum(child.indirect_nbytes for child in children),
        )

    def _append_node(self, nbytes: int, parts: Sequence[bytes | ChunkId]) -> int:
        offset = _align(self.data_nbytes[0])
        self.data_nbytes[0] = offset + nbytes
        self.index.append(IndexNode(offset, tuple(parts)))
        return offset


class _Outside(tuple[int, int]):
    """(owner, offset) of a chunk in a data file; a type of its own, to tell it from a ChunkId."""

    __slots__ = ()


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
