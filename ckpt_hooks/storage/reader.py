"""The verified reader of what `layout` and `writer` wrote: straight into place, in parallel, every piece checked.

What is asked for is a set of byte ranges, so the pieces that cover them are read, and nothing else. Neighbouring
pieces share one slab of memory, and the arrays are views of it. A region that is no chunk gets memory of its own.
"""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError, PartialCheckpointError
from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.array_info import ArrayInfo, Stored
from ckpt_hooks.storage.checksums import ARRAY_FILE, ItemChecksums, PieceTable, check_piece
from ckpt_hooks.storage.compression import decompressed
from ckpt_hooks.storage.layout import ALIGNMENT_BYTES, array_key
from ckpt_hooks.storage.lookup import is_file, open_to_read, read_file
from ckpt_hooks.storage.memory import Bytes, aligned_memory, fill
from ckpt_hooks.storage.regions import Overlap, Region, overlaps, shape_of, whole
from ckpt_hooks.storage.slices import Slice, slice_tasks
from ckpt_hooks.threads import run_parallel

__all__ = ["Database"]

_SMALL_FILE_BYTES = 64 << 10  # of a data file that is read whole, with the index in it
_SLAB_BYTES = 16 << 20  # small neighbours share memory up to here; more would keep dead memory alive for one leaf
_READ_BYTES = 8 << 20
_LARGE_BYTES = 1 << 20  # chunks above it have several pieces, of which a region may not need all
_BATCH_BYTES = 32 << 20  # of smaller chunks that are read to be put together
_THREADS = 2
_WORTH_A_THREAD_BYTES = 4 << 20
_NO_FILE_ERRNOS = frozenset({errno.EISDIR, errno.ESPIPE})
_SPARSE = 2  # so many times the bytes that are wanted, nobody should hold for long
_METADATA_KEY = b".zarray"
_STEM, _END = slice(None, -len(_METADATA_KEY)), slice(-len(_METADATA_KEY), None)


_Value = bytes | ocdbt.Location  # of the index
_Array = tuple[Stored, _Value | None]  # and its only chunk, None where it has several or none
_Chunk = tuple[Any, int]  # memory that holds it, and where in it the chunk begins
_Range = tuple[int, int, int]  # of a data file: its offset and length, and the place of what is in it
_Slab = tuple[range, list[_Range]]  # neighbouring pieces, and what is wanted of them
_NOTHING: _Chunk = (b"", 0)
_NO_ARRAY = np.empty(0)  # until it is read


class _Part(NamedTuple):
    """What a region takes of a chunk, which the key is of, and where it goes."""

    stored: Stored
    key: bytes
    in_chunk: tuple[slice, ...]
    target: np.ndarray


class Database:
    """The arrays of one item that this library wrote.

    Raises CorruptCheckpointError where anything that is read is not what was saved.
    """

    def __init__(self, directory: str, *, verify: bool = True) -> None:
        self._directory = directory
        self._verify = verify
        self._checksums = ItemChecksums(directory)
        self._pieces: dict[str, PieceTable] = {}
        self._whole: dict[str, Bytes] = {}  # small data files, until somebody gets their chunks
        self._values: dict[bytes, _Value] = {}
        for node in self._read_index():
            self._values.update(node.values)
        self._arrays = dict(self._find_arrays())

    @staticmethod
    def is_ours(directory: str) -> bool:
        """Whether the item was written by this library."""
        return is_file(os.path.join(directory, ARRAY_FILE))

    def info(self, name: str) -> ArrayInfo:
        """Shape, dtype and chunks of an array."""
        if name not in self._arrays:
            raise CorruptCheckpointError(f"{self._directory}: the index has no array {name!r}")
        return self._arrays[name][0].info

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these names; memory is aligned to 64 bytes and shared with no other call."""
        in_one: dict[str, Stored] = {}
        values: list[_Value] = []
        cut: dict[str, list[Region]] = {}
        for name in names:
            stored, value = self._arrays[name]
            if value is None:
                cut[name] = [whole(stored.info.shape)]
            else:
                in_one[name] = stored
                values.append(value)
        chunks = self._read_chunks(list(in_one.values()), values)
        arrays = {
            name: np.ndarray(stored.info.shape, stored.info.dtype, memory, offset)  # what was read is the array
            for (name, stored), (memory, offset) in zip(in_one.items(), chunks, strict=True)
        }
        return arrays | {name: array for name, (array,) in self.read_regions(cut).items()} if cut else arrays

    # -------------------------------------------------------------- regions

    def read_regions(self, wanted: Mapping[str, Sequence[Region]]) -> dict[str, list[np.ndarray]]:
        """Regions of arrays, each in memory of its own; beside it, no more is held than a bounded number of bytes."""
        found: dict[str, list[np.ndarray]] = {}
        parts: list[_Part] = []
        chunks: list[tuple[str, int, Stored, _Value]] = []  # of the regions that are a chunk each
        for name, regions in wanted.items():
            stored, arrays = self._arrays[name][0], found.setdefault(name, [])
            for region in regions:
                cut = overlaps(region, stored.info.chunk_shape)
                if len(cut) == 1 and shape_of(region) == stored.info.chunk_shape:
                    chunks.append((name, len(arrays), stored, self._values[self._key(name, cut[0])]))
                    arrays.append(_NO_ARRAY)
                    continue
                array = _empty(shape_of(region), stored.info.dtype)
                arrays.append(array)
                for overlap in cut:
                    index: Any = (*overlap.in_region, ...)  # with them it is a view, also of an array without axes
                    parts.append(_Part(stored, self._key(name, overlap), overlap.in_chunk, array[index]))
        read = self._read_chunks([stored for _, _, stored, _ in chunks], [value for *_, value in chunks])
        for (name, place, stored, _), (memory, offset) in zip(chunks, read, strict=True):
            found[name][place] = np.ndarray(stored.info.chunk_shape, stored.info.dtype, memory, offset)
        self._fill(parts)
        return found

    def _key(self, name: str, overlap: Overlap) -> bytes:
        """The key of a chunk that there is."""
        key = array_key(name, overlap.suffix)
        if key not in self._values:
            lacking = f"{self._directory}: array {name!r} lacks chunk {overlap.suffix}"
            owner = self._checksums.part_of_process
            raise CorruptCheckpointError(lacking) if owner is None else PartialCheckpointError.of(owner, lacking)
        return key

    def _fill(self, parts: Sequence[_Part]) -> None:
        sliced: dict[str, list[_Part]] = {}
        batch: dict[bytes, list[_Part]] = {}
        batch_nbytes = 0
        for part in parts:
            value = self._values[part.key]
            is_large = part.stored.chunk_nbytes > _LARGE_BYTES and not part.stored.is_compressed
            if is_large and not isinstance(value, bytes):
                sliced.setdefault(value[0], []).append(part)
                continue
            if part.key not in batch:
                if batch and batch_nbytes + part.stored.chunk_nbytes > _BATCH_BYTES:
                    self._fill_from_chunks(batch)
                    batch, batch_nbytes = {}, 0
                batch_nbytes += part.stored.chunk_nbytes
            batch.setdefault(part.key, []).append(part)
        self._fill_from_chunks(batch)
        for file, some in sliced.items():
            self._fill_sliced(file, some)

    def _fill_from_chunks(self, batch: Mapping[bytes, Sequence[_Part]]) -> None:
        chunks = self._read_chunks([parts[0].stored for parts in batch.values()], [self._values[key] for key in batch])
        for parts, (memory, offset) in zip(batch.values(), chunks, strict=True):
            info = parts[0].stored.info
            chunk = np.ndarray(info.chunk_shape, info.dtype, memory, offset)
            for part in parts:
                part.target[...] = chunk[part.in_chunk]

    def _fill_sliced(self, name: str, parts: Sequence[_Part]) -> None:
        """Parts of large chunks in one data file."""
        path, pieces = f"{self._directory}/{name}", self._pieces_of(name)
        slices = []
        for part in parts:
            _, offset, nbytes = self._values[part.key]
            if nbytes != part.stored.chunk_nbytes:
                raise self._wrong_length()
            slices.append(Slice.of_chunk(int(offset), part.stored.info.chunk_shape, part.in_chunk, part.target))
        descriptor = _open(path)
        try:
            read = functools.partial(self._read_block, path, descriptor, pieces)
            run_parallel(slice_tasks(slices, pieces, read, path), _THREADS)
        finally:
            os.close(descriptor)

    # -------------------------------------------------------------- the index

    def _read_index(self) -> Iterator[ocdbt.Node]:
        root = ocdbt.decode_manifest(read_file(f"{self._directory}/{ocdbt.MANIFEST_FILE}"))
        pending = [] if root.child is None else [root.child]
        while pending:
            child = pending.pop()
            chunks = [_NOTHING]
            self._read_if_small(child.file)
            self._read_ranges(child.file, [(child.offset, child.nbytes, 0)], chunks)
            memory, at = chunks[0]
            node = ocdbt.decode_node(memory.data[at : at + child.nbytes])
            pending += node.children
            yield node

    def _read_if_small(self, name: str) -> None:
        """All of a small data file at once, as the chunks will be wanted after the index."""
        pieces = self._pieces_of(name)
        if name in self._whole or pieces.end > _SMALL_FILE_BYTES:
            return
        path, slab = f"{self._directory}/{name}", aligned_memory(pieces.end)
        descriptor = _open(path)
        try:
            _read_exactly(descriptor, slab, 0, path)
        finally:
            os.close(descriptor)
        self._whole[name] = slab

    def _find_arrays(self) -> Iterator[tuple[str, _Array]]:
        """One pass over the keys: asking for the parts of every array by name would take several times as long."""
        for key, value in self._values.items():
            if key[_END] == _METADATA_KEY and type(value) is bytes:
                stored, stem = Stored.parse(value), key[_STEM]
                chunk = self._values.get(stem + stored.only_suffix) if stored.only_suffix else None
                yield stem[:-1].decode(), (stored, chunk)

    # -------------------------------------------------------------- bytes

    def _read_chunks(self, owners: Sequence[Stored], values: Sequence[_Value]) -> list[_Chunk]:
        """The chunks of these arrays that the index has at these places."""
        chunks: list[_Chunk] = [_NOTHING] * len(values)
        outside: dict[str, list[_Range]] = {}
        compressed = []
        last_file, ranges = "", list[_Range]()
        for place, (owner, value) in enumerate(zip(owners, values, strict=True)):
            if isinstance(value, bytes):
                nbytes = len(value)
                # Checked with the node that it stands in; copied, since the caller may write to it.
                chunks[place] = bytearray(value), 0
            else:
                file, offset, nbytes = value
                if file != last_file:  # most are in one
                    last_file, ranges = file, outside.setdefault(file, [])
                ranges.append((offset, nbytes, place))
            if owner.is_compressed:
                compressed.append((place, nbytes, owner.chunk_nbytes))
            elif nbytes != owner.chunk_nbytes:
                raise self._wrong_length()
        for file, ranges in outside.items():
            self._read_ranges(file, ranges, chunks)
        self._whole.clear()  # the caller may write to it
        if compressed:
            decompress = functools.partial(self._decompress, chunks)
            run_parallel([functools.partial(decompress, *chunk) for chunk in compressed], _THREADS)
        return chunks

    def _wrong_length(self) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._directory}: the index has chunks of a length that is not their array's")

    def _decompress(self, chunks: list[_Chunk], place: int, nbytes: int, expected_nbytes: int) -> None:
        memory, offset = chunks[place]
        content = memoryview(memory)[offset : offset + nbytes]
        chunks[place] = decompressed(content, expected_nbytes, self._directory), 0

    def _read_ranges(self, name: str, ranges: list[_Range], chunks: list[_Chunk]) -> None:
        """Ranges of a data file, each into its place."""
        path, pieces = f"{self._directory}/{name}", self._pieces_of(name)
        slabs = list(_slabs(pieces, sorted(ranges), path))
        if name in self._whole:
            for needed, wanted in slabs:
                self._check_pieces(path, pieces, self._whole[name], 0, needed)
                for offset, _, place in wanted:
                    chunks[place] = self._whole[name], offset
            return
        tasks: list[Callable[[], None]] = []
        descriptor = _open(path)
        try:
            read = functools.partial(self._read_block, path, descriptor, pieces)
            for needed, wanted in slabs:
                if pieces.nbytes(needed) > _SPARSE * sum([_aligned(nbytes) for _, nbytes, _ in wanted]):
                    tasks.append(functools.partial(_read_sparse, chunks, wanted, pieces, needed, read))
                    continue
                start, slab = pieces.starts[needed.start], aligned_memory(pieces.nbytes(needed))
                for offset, _, place in wanted:
                    chunks[place] = slab, offset - start
                blocks = pieces.runs(needed, _READ_BYTES)
                tasks += [functools.partial(read, slab, start, block) for block in blocks]
            if sum([pieces.nbytes(needed) for needed, _ in slabs]) > _WORTH_A_THREAD_BYTES:
                run_parallel(tasks, _THREADS)
            else:
                for task in tasks:
                    task()
        finally:
            os.close(descriptor)

    def _read_block(
        self, path: str, descriptor: int, pieces: PieceTable, slab: Bytes, start: int, block: range
    ) -> None:
        """Reads neighbouring pieces into their slab, which begins at `start` of the file, and checks them."""
        begin, end = pieces.starts[block.start], pieces.ends[block.stop - 1]
        _read_exactly(descriptor, slab[begin - start : end - start], begin, path)
        self._check_pieces(path, pieces, slab, start, block)

    def _check_pieces(self, path: str, pieces: PieceTable, slab: Bytes, start: int, block: range) -> None:
        if self._verify:
            for number in block:
                begin, end = pieces.starts[number], pieces.ends[number]
                check_piece(path, begin, slab[begin - start : end - start].data, pieces.digests[number])

    def _pieces_of(self, name: str) -> PieceTable:
        if name not in self._pieces:
            self._pieces[name] = self._checksums.pieces(name)
        return self._pieces[name]


# ------------------------------------------------------------------ grouping


def _slabs(pieces: PieceTable, ranges: Sequence[_Range], path: str) -> Iterator[_Slab]:
    """Ranges, sorted by offset, that share one memory: neighbours, up to a slab, and all that share a piece."""
    needed, wanted, slab_end = range(0), list[_Range](), 0
    for asked in ranges:
        offset, nbytes, _ = asked
        if needed and offset >= pieces.starts[needed.stop - 1] and offset + nbytes <= pieces.ends[needed.stop - 1]:
            wanted.append(asked)  # as most small ones are, in the piece of the one before
            continue
        found = pieces.covering(offset, offset + nbytes, path)
        is_neighbour = found.start == needed.stop and pieces.ends[found.stop - 1] <= slab_end
        if wanted and (found.start < needed.stop or is_neighbour):
            needed = range(needed.start, max(needed.stop, found.stop))
        else:
            if wanted:
                yield needed, wanted
            needed, wanted, slab_end = found, [], pieces.starts[found.start] + _SLAB_BYTES
        wanted.append(asked)
    if wanted:
        yield needed, wanted


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _read_sparse(chunks: list[_Chunk], wanted: Sequence[_Range], pieces: PieceTable, needed: range, read: Any) -> None:
    """Ranges of which there is little in their pieces: they get memory of their own."""
    start, slab = pieces.starts[needed.start], aligned_memory(pieces.nbytes(needed))
    for block in pieces.runs(needed, _READ_BYTES):
        read(slab, start, block)
    own, at = aligned_memory(sum([_aligned(nbytes) for _, nbytes, _ in wanted])), 0
    for offset, nbytes, place in wanted:
        own[at : at + nbytes] = slab[offset - start : offset - start + nbytes]
        chunks[place] = own, at
        at += _aligned(nbytes)


# ------------------------------------------------------------------ files


def _open(path: str) -> int:
    try:
        return open_to_read(path)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None


def _read_exactly(descriptor: int, target: Bytes, offset: int, path: str) -> None:
    try:
        got = fill(descriptor, target.data, offset)
    except OSError as error:
        if error.errno in _NO_FILE_ERRNOS:
            raise CorruptCheckpointError(f"{path} is a directory or a pipe, and was saved as a file") from None
        error.filename = path
        raise
    if got < target.nbytes:
        raise CorruptCheckpointError(f"{path} is cut off at byte {offset + got}")


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return aligned_memory(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
