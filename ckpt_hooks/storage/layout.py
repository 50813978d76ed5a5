"""Where every chunk of a structure goes: offsets, blocks, zarr metadata and index nodes, made once and reused.

A layout depends only on names, shapes, dtypes and shardings. Its places are the same in every process, so that each
writes its own data file and process 0 writes one index over all of them without asking anybody.

The data file of process p is ``d/<p as 32 hex digits>``: the chunks that p owns, each at a multiple of 64 bytes
(JAX on CPU takes such memory without a copy), and in process 0 the nodes of the index after them. A chunk of at
most `ocdbt.MAX_INLINE_VALUE_BYTES` that process 0 owns stands in the index itself.

What a process writes are its sources, the bytes of the chunks that it owns in the order of their places, and
constants. A block says which of them, by their numbers, make one write.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.per_process import DATA_FOLDER, array_file

__all__ = [
    "ArraySpec",
    "Block",
    "DataFile",
    "Layout",
    "Place",
    "add_index",
    "array_key",
    "data_file_name",
    "zarr_dtype",
]

ALIGNMENT_BYTES = 64
SMALL_CHUNK_BYTES = 64 << 10  # up to here, neighbours are joined: into one write, and into one piece of this size
JOINED_BYTES = 4 << 20  # of small chunks in one write: fits into the processor's cache
PIECE_BYTES = 1 << 20  # the longest piece with a checksum of its own: what a partial read has to read at least
BLOCK_BYTES = 16 << 20  # the longest write
_NODE_ENTRIES = 1 << 16  # keys in one leaf node of the index


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

    def chunk_keys(self) -> list[bytes]:
        """The keys of its chunks."""
        stem = self.key("")
        return [stem + suffix for suffix in _suffixes(self.grid)]

    def metadata(self, compressor: dict[str, Any] | None = None) -> bytes:
        """The array's ``.zarray`` (zarr v2)."""
        return _zarray(self.shape, self.chunk_shape, self.dtype, json.dumps(compressor, separators=(",", ":")))


# Most arrays of a state are like many others, and what they have in common is made once.


@functools.lru_cache(maxsize=4096)
def _suffixes(grid: tuple[tuple[int, ...], ...]) -> list[bytes]:
    return [(".".join(map(str, position)) or "0").encode() for position in grid]


@functools.lru_cache(maxsize=4096)
def _zarray(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype, compressor: str) -> bytes:
    fields = {
        "chunks": list(chunk_shape),
        "compressor": json.loads(compressor),
        "dimension_separator": ".",
        "dtype": zarr_dtype(dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
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


# ------------------------------------------------------------------ one data file


@dataclasses.dataclass(slots=True)
class Block:
    """What one write puts into a data file.

    Attributes:
      offset, nbytes: where.
      parts: what is joined, by number: a source, or a constant, counted down from -1.
      start: where the block begins in its only part, a large chunk; None where it is all of its parts.
      is_node: whether the CRC-32C of the parts follows them.
      pieces: (start, stop) within the block of each piece that has a checksum of its own; together they are all of it.
    """

    offset: int
    nbytes: int
    parts: list[int]
    start: int | None = None
    is_node: bool = False
    pieces: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class DataFile:
    """A data file in the making: each `add` gives the next value its place.

    Attributes:
      name: of the file, relative to the item.
      table_name: of the file with its checksums.
      nbytes: the size of the file up to now.
      blocks: what is written, in the order of the offsets; the last one may still grow.
      constants: what blocks refer to as -1, -2, ...; in reverse, so that they can stand behind the sources in one list.
    """

    def __init__(self, process: int) -> None:
        self.name = data_file_name(process)
        self.table_name = array_file(process)
        self.nbytes = 0
        self.blocks: list[Block] = []
        # -1 to -63: the gaps between two chunks, which are zero.
        self.constants: list[bytes] = [bytes(number) for number in reversed(range(1, ALIGNMENT_BYTES))]
        self._joined: Block | None = None

    def add(self, source: int, nbytes: int) -> int:
        """The place of a source, the next one or a later one."""
        offset = self.reserve(nbytes)
        if nbytes <= SMALL_CHUNK_BYTES:
            self._join(source, offset, nbytes)
            return offset
        self._joined = None
        for start in range(0, nbytes, BLOCK_BYTES):
            self._append(Block(offset + start, min(BLOCK_BYTES, nbytes - start), [source], start))
        return offset

    def add_node(self, nbytes: int, parts: Iterable[bytes | int]) -> int:
        """The place of a node of the index: constants, and the sources that stand in it."""
        offset = self.reserve(nbytes)
        self._joined = None
        numbers = []
        for part in parts:
            if isinstance(part, bytes):
                self.constants.insert(0, part)
            numbers.append(-len(self.constants) if isinstance(part, bytes) else part)
        self._append(Block(offset, nbytes, numbers, is_node=True))
        return offset

    def end_block(self) -> None:
        """What is added from here on stands in other blocks."""
        self._joined = None

    def reserve(self, nbytes: int) -> int:
        """A place of this size, whose writing is not laid out here."""
        offset = -(-self.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.nbytes = offset + nbytes
        return offset

    def _join(self, source: int, offset: int, nbytes: int) -> None:
        block = self._joined
        if block is None or offset + nbytes - block.offset > JOINED_BYTES:
            self._joined = Block(offset, nbytes, [source], pieces=[(0, nbytes)])
            self.blocks.append(self._joined)
            return
        gap = offset - (block.offset + block.nbytes)
        block.parts += (-gap, source) if gap else (source,)
        block.nbytes = offset + nbytes - block.offset
        start, stop = block.pieces.pop()
        if block.nbytes - start <= SMALL_CHUNK_BYTES:
            block.pieces.append((start, block.nbytes))
        else:
            # The gap belongs to the piece before, so that the pieces of a block have no hole.
            block.pieces += ((start, stop + gap), (stop + gap, block.nbytes))

    def _append(self, block: Block) -> None:
        starts = range(0, block.nbytes, PIECE_BYTES)
        block.pieces = [(start, min(start + PIECE_BYTES, block.nbytes)) for start in starts]
        self.blocks.append(block)


# ------------------------------------------------------------------ a structure


class Place(NamedTuple):
    """Where a value of the index is: in a data file, or, where `offset` is None, inline, as a source."""

    nbytes: int
    owner: int
    source: int
    offset: int | None


class Layout:
    """The files of one item.

    Args:
      inlines: whether small chunks stand in the index; they cannot where their bytes, compressed, are not known yet.
      part_of_process: whose part of a state this is, where each process stores its own; None for a whole state.
      only: the process whose writes are laid out, the index among those of process 0; of the others only the places are
        found, which that index needs. None for all.

    Attributes:
      arrays: what is stored.
      files: per process, its data file.
      chunk_nbytes: per process, the size of each chunk that it owns; they are its sources, array by array.
      manifest: the template of the manifest (`ocdbt.manifest_template`).
    """

    def __init__(
        self,
        arrays: Sequence[ArraySpec],
        num_processes: int = 1,
        *,
        inlines: bool = True,
        part_of_process: int | None = None,
        only: int | None = None,
    ) -> None:
        self.arrays = arrays
        self.part_of_process = part_of_process
        self.files = [DataFile(process) for process in range(num_processes)]
        self.chunk_nbytes: list[list[int]] = [[] for _ in range(num_processes)]
        self._only = only
        self._inline_nbytes = ocdbt.MAX_INLINE_VALUE_BYTES if inlines else 0
        places = []
        for array in arrays:
            nbytes = array.chunk_nbytes
            places += [self._place(owner, nbytes) for owner in array.owners]
        self.manifest = add_index(self.files[0], arrays, places) if inlines and not only else b""

    def _place(self, owner: int, nbytes: int) -> Place:
        source = len(self.chunk_nbytes[owner])
        self.chunk_nbytes[owner].append(nbytes)
        if owner == 0 and nbytes <= self._inline_nbytes:
            return Place(nbytes, owner, source, None)
        file = self.files[owner]
        is_laid_out = self._only is None or self._only == owner
        return Place(nbytes, owner, source, file.add(source, nbytes) if is_laid_out else file.reserve(nbytes))


# ------------------------------------------------------------------ the index

_Value = tuple[bytes, bytes | Place]  # (key, what stands there: bytes that never change, or a chunk)


def add_index(
    file: DataFile, arrays: Sequence[ArraySpec], places: Sequence[Place], compressor: dict[str, Any] | None = None
) -> bytes:
    """Adds the nodes of the index over `arrays`, whose chunks are at `places`; returns the manifest's template."""
    remaining = iter(places)
    values: list[_Value] = []
    for array in arrays:
        values.append((array.key(".zarray"), array.metadata(compressor)))
        values += zip(array.chunk_keys(), remaining, strict=False)
    values.sort(key=operator.itemgetter(0))
    return ocdbt.manifest_template(_add_tree(file, values))


def _add_tree(file: DataFile, values: Sequence[_Value]) -> ocdbt.Root:
    if not values:
        return ocdbt.Root(None, 0)
    children, height = [_add_leaf(file, group) for group in _groups(values)], 0
    while len(children) > 1:
        height += 1
        children = [_add_interior(file, height, group) for group in _groups(children)]
    return ocdbt.Root(children[0], height)


def _groups(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + _NODE_ENTRIES] for start in range(0, len(values), _NODE_ENTRIES))


def _add_leaf(file: DataFile, values: Sequence[_Value]) -> ocdbt.Child:
    outside = [
        (value.owner, value.offset) for _, value in values if isinstance(value, Place) and value.offset is not None
    ]
    numbers = {owner: number for number, owner in enumerate(sorted({owner for owner, _ in outside}))}
    sizes = [len(value) if isinstance(value, bytes) else value.nbytes for _, value in values]
    are_outside = [isinstance(value, Place) and value.offset is not None for _, value in values]
    prefix = ocdbt.node_prefix(
        [key for key, _ in values],
        sizes,
        list(map(data_file_name, numbers)),
        are_outside,
        [(numbers[owner], offset) for owner, offset in outside],
    )
    outside_nbytes = sum(nbytes for nbytes, is_outside in zip(sizes, are_outside, strict=True) if is_outside)
    body_nbytes = len(prefix) + sum(sizes) - outside_nbytes
    inline = [value for (_, value), is_outside in zip(values, are_outside, strict=True) if not is_outside]
    parts = _merged([ocdbt.node_header(body_nbytes), prefix, *inline])
    nbytes = ocdbt.node_nbytes(body_nbytes)
    offset = file.add_node(nbytes, parts)
    return ocdbt.Child(values[0][0], data_file_name(0), offset, nbytes, len(values), nbytes, outside_nbytes)


def _merged(parts: Sequence[bytes | Place]) -> Iterator[bytes | int]:
    """Bytes that never change are joined once, here; between them stand the sources."""
    constant: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            constant.append(part)
            continue
        if constant:
            yield b"".join(constant)
            constant = []
        yield part.source
    if constant:
        yield b"".join(constant)


def _add_interior(file: DataFile, height: int, children: Sequence[ocdbt.Child]) -> ocdbt.Child:
    body = ocdbt.interior_prefix(height, children)
    nbytes = ocdbt.node_nbytes(len(body))
    return ocdbt.Child(
        children[0].first_key,
        data_file_name(0),
        file.add_node(nbytes, [ocdbt.node_header(len(body)) + body]),
        nbytes,
        sum(child.num_keys for child in children),
        nbytes + sum(child.tree_nbytes for child in children),
        sum(child.indirect_nbytes for child in children),
    )
