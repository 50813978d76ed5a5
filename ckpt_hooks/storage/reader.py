"""The verified reader of what `layout` and `writer` wrote: straight into place, in parallel, every piece checked.

What is asked for is a set of byte ranges, so the pieces that cover them are read, and nothing else. Neighbouring
pieces share one slab of memory, and the arrays are views of it. A region that is no chunk gets memory of its own.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and its siblings with NumPy by name)
import numpy as np
import numpy.typing as npt

from ckpt_hooks.errors import CorruptCheckpointError, PartialCheckpointError
from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import ARRAY_FILE, ItemChecksums, PieceTable, check_piece, read_file
from ckpt_hooks.storage.commit import run_parallel
from ckpt_hooks.storage.compression import decompressed
from ckpt_hooks.storage.layout import ALIGNMENT_BYTES, array_key
from ckpt_hooks.storage.lookup import is_file
from ckpt_hooks.storage.memory import Bytes, aligned_memory, fill
from ckpt_hooks.storage.ocdbt import I64
from ckpt_hooks.storage.regions import Overlap, Region, overlaps, shape_of, whole
from ckpt_hooks.storage.slices import Slice, slice_tasks

__all__ = ["ArrayInfo", "Database", "dtype_from_zarr"]

_SLAB_BYTES = 16 << 20  # small neighbours share memory up to here; more would keep dead memory alive for one leaf
_READ_BYTES = 8 << 20
_LARGE_BYTES = 1 << 20  # chunks above it have several pieces, of which a region may not need all
_BATCH_BYTES = 32 << 20  # of smaller chunks that are read to be put together
_THREADS = 2
_WORTH_A_THREAD_BYTES = 4 << 20
_SPARSE = 2  # so many times the bytes that are wanted, nobody should hold for long
_METADATA_KEY = b".zarray"


class ArrayInfo(NamedTuple):
    """An array on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]


class _Stored(NamedTuple):
    """What a ``.zarray`` says; arrays that are alike share one.

    Attributes:
      chunk_nbytes: of a chunk that is not compressed.
      only_suffix: of the key of its only chunk; empty where it has several or none.
    """

    info: ArrayInfo
    chunk_nbytes: int
    is_compressed: bool
    only_suffix: bytes


_Array = tuple[_Stored, int]  # and the number of its only chunk, -1 where it has several or none
_Value = tuple[Any, int]  # memory that holds it, and where in it the value begins
_NOTHING: _Value = (b"", 0)
_NO_ARRAY = np.empty(0)  # until it is read


class _Part(NamedTuple):
    """What a region takes of a chunk, and where it goes; the number is that of the chunk's value."""

    stored: _Stored
    number: int
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
        self._numbers: dict[bytes, int] = {}  # of the values, by their keys
        self._nbytes, self._files, self._offsets = (np.zeros(0, np.int64) for _ in range(3))
        self._file_names: list[str] = []
        self._bodies: list[memoryview] = []  # of the nodes; where `_files` is -1 - n, the value stands in body n
        self._arrays: dict[str, _Array] = {}
        for node in self._read_index():
            self._add_node(node)
        self._find_arrays()

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
        wanted = {name: self._arrays[name] for name in names}
        in_one = {name: stored for name, (stored, chunk) in wanted.items() if chunk >= 0}
        numbers = [chunk for _, chunk in wanted.values() if chunk >= 0]
        values = self._read_chunks(list(in_one.values()), np.array(numbers, np.int64))
        arrays = {
            name: np.ndarray(stored.info.shape, stored.info.dtype, memory, offset)  # what was read is the array
            for (name, stored), (memory, offset) in zip(in_one.items(), values, strict=True)
        }
        cut = {name: [whole(stored.info.shape)] for name, (stored, chunk) in wanted.items() if chunk < 0}
        return arrays | {name: array for name, (array,) in self.read_regions(cut).items()} if cut else arrays

    # -------------------------------------------------------------- regions

    def read_regions(self, wanted: Mapping[str, Sequence[Region]]) -> dict[str, list[np.ndarray]]:
        """Regions of arrays, each in memory of its own; beside it, no more is held than a bounded number of bytes."""
        found: dict[str, list[np.ndarray]] = {}
        parts: list[_Part] = []
        chunks: list[tuple[str, int, _Stored, int]] = []  # of the regions that are a chunk each
        for name, regions in wanted.items():
            stored, arrays = self._arrays[name][0], found.setdefault(name, [])
            for region in regions:
                cut = overlaps(region, stored.info.chunk_shape)
                if len(cut) == 1 and shape_of(region) == stored.info.chunk_shape:
                    chunks.append((name, len(arrays), stored, self._chunk(name, cut[0])))
                    arrays.append(_NO_ARRAY)
                    continue
                array = _empty(shape_of(region), stored.info.dtype)
                arrays.append(array)
                for overlap in cut:
                    index: Any = (*overlap.in_region, ...)  # with them it is a view, also of an array without axes
                    parts.append(_Part(stored, self._chunk(name, overlap), overlap.in_chunk, array[index]))
        numbers = np.array([number for *_, number in chunks], np.int64)
        values = self._read_chunks([stored for _, _, stored, _ in chunks], numbers)
        for (name, place, stored, _), (memory, offset) in zip(chunks, values, strict=True):
            found[name][place] = np.ndarray(stored.info.chunk_shape, stored.info.dtype, memory, offset)
        self._fill(parts)
        return found

    def _chunk(self, name: str, overlap: Overlap) -> int:
        """The number of a chunk's value."""
        number = self._numbers.get(array_key(name, overlap.suffix))
        if number is None:
            lacking = f"{self._directory}: array {name!r} lacks chunk {overlap.suffix}"
            owner = self._checksums.part_of_process
            raise CorruptCheckpointError(lacking) if owner is None else PartialCheckpointError.of(owner, lacking)
        return number

    def _fill(self, parts: Sequence[_Part]) -> None:
        sliced: dict[int, list[_Part]] = {}
        batch: dict[int, list[_Part]] = {}
        batch_nbytes = 0
        for part in parts:
            file = int(self._files[part.number])
            if file >= 0 and part.stored.chunk_nbytes > _LARGE_BYTES and not part.stored.is_compressed:
                sliced.setdefault(file, []).append(part)
                continue
            if part.number not in batch:
                if batch and batch_nbytes + part.stored.chunk_nbytes > _BATCH_BYTES:
                    self._fill_from_chunks(batch)
                    batch, batch_nbytes = {}, 0
                batch_nbytes += part.stored.chunk_nbytes
            batch.setdefault(part.number, []).append(part)
        self._fill_from_chunks(batch)
        for file, some in sliced.items():
            self._fill_sliced(self._file_names[file], some)

    def _fill_from_chunks(self, batch: Mapping[int, Sequence[_Part]]) -> None:
        values = self._read_chunks([parts[0].stored for parts in batch.values()], np.array(list(batch), np.int64))
        for parts, (memory, offset) in zip(batch.values(), values, strict=True):
            info = parts[0].stored.info
            chunk = np.ndarray(info.chunk_shape, info.dtype, memory, offset)
            for part in parts:
                part.target[...] = chunk[part.in_chunk]

    def _fill_sliced(self, name: str, parts: Sequence[_Part]) -> None:
        """Parts of large chunks in one data file."""
        path, pieces = f"{self._directory}/{name}", self._pieces_of(name)
        slices = []
        for part in parts:
            self._check_lengths([part.stored], np.array([part.number], np.int64))
            offset = int(self._offsets[part.number])
            slices.append(Slice.of_chunk(offset, part.stored.info.chunk_shape, part.in_chunk, part.target))
        descriptor = _open(path)
        try:
            read = functools.partial(self._read_block, path, descriptor, pieces)
            run_parallel(slice_tasks(slices, pieces, read, path), _THREADS)
        finally:
            os.close(descriptor)

    # -------------------------------------------------------------- the index

    def _read_index(self) -> list[ocdbt.Node]:
        root = ocdbt.decode_manifest(read_file(os.path.join(self._directory, ocdbt.MANIFEST_FILE)))
        pending = [] if root.child is None else [root.child]
        nodes = []
        while pending:
            child = pending.pop()
            ((memory, at),) = self._read_ranges(child.file, np.array([child.offset]), np.array([child.nbytes]))
            node = ocdbt.decode_node(memory.data[at : at + child.nbytes])
            pending += node.children
            nodes.append(node)
        return nodes

    def _add_node(self, node: ocdbt.Node) -> None:
        known = len(self._nbytes)
        self._numbers.update(zip(node.keys, range(known, known + len(node.keys)), strict=True))
        files = np.where(node.files < 0, -1 - len(self._bodies), node.files + len(self._file_names))
        self._bodies.append(node.body)
        self._file_names += node.file_table
        self._nbytes = np.concatenate((self._nbytes, node.nbytes))
        self._files = np.concatenate((self._files, files))
        self._offsets = np.concatenate((self._offsets, node.offsets))

    def _find_arrays(self) -> None:
        """One pass over the keys: asking for the parts of every array by name would take several times as long."""
        files, offsets, nbytes = self._files.tolist(), self._offsets.tolist(), self._nbytes.tolist()
        for key, number in self._numbers.items():
            if not key.endswith(_METADATA_KEY) or files[number] >= 0:
                continue
            encoded = self._bodies[-1 - files[number]][offsets[number] : offsets[number] + nbytes[number]]
            stored = _parse_zarray(bytes(encoded))
            stem, suffix = key[: -len(_METADATA_KEY)], stored.only_suffix
            self._arrays[stem[:-1].decode()] = stored, self._numbers.get(stem + suffix, -1) if suffix else -1

    # -------------------------------------------------------------- bytes

    def _read_chunks(self, owners: Sequence[_Stored], numbers: I64) -> list[_Value]:
        """The chunks with these numbers, of these arrays."""
        is_compressed, expected = self._check_lengths(owners, numbers)
        values = self._read_values(numbers)
        decompress = functools.partial(self._decompress, values, self._nbytes[numbers].tolist(), expected.tolist())
        places = np.flatnonzero(is_compressed).tolist()
        run_parallel([functools.partial(decompress, place) for place in places], _THREADS if places else 1)
        return values

    def _check_lengths(self, owners: Sequence[_Stored], numbers: I64) -> tuple[npt.NDArray[np.bool_], I64]:
        """Whether each chunk is compressed, and how many bytes it has when it is not."""
        is_compressed = np.array([owner.is_compressed for owner in owners], np.bool_)
        expected = np.array([owner.chunk_nbytes for owner in owners], np.int64)
        if (self._nbytes[numbers] != expected)[~is_compressed].any():
            raise CorruptCheckpointError(
                f"{self._directory}: the index has chunks of a length that is not their array's"
            )
        return is_compressed, expected

    def _decompress(
        self, values: list[_Value], nbytes: Sequence[int], expected_nbytes: Sequence[int], place: int
    ) -> None:
        memory, offset = values[place]
        content = memoryview(memory)[offset : offset + nbytes[place]]
        values[place] = decompressed(content, expected_nbytes[place], self._directory), 0

    def _read_values(self, numbers: I64) -> list[_Value]:
        values: list[_Value] = [_NOTHING] * len(numbers)
        files = self._files[numbers]
        for place in np.flatnonzero(files < 0).tolist():
            number = int(numbers[place])
            body, offset = self._bodies[-1 - self._files[number]], int(self._offsets[number])
            # Checked with the node that it stands in; copied, since the caller may write to it.
            values[place] = bytearray(body[offset : offset + int(self._nbytes[number])]), 0
        for file in np.unique(files[files >= 0]).tolist():
            places = np.flatnonzero(files == file)
            asked = numbers[places]
            found = self._read_ranges(self._file_names[file], self._offsets[asked], self._nbytes[asked])
            for place, value in zip(places.tolist(), found, strict=True):
                values[place] = value
        return values

    def _read_ranges(self, name: str, offsets: I64, nbytes: I64) -> list[_Value]:
        """Ranges of a data file."""
        path, pieces = f"{self._directory}/{name}", self._pieces_of(name)
        first, stop = pieces.covering(offsets, offsets + nbytes, path)
        order = np.argsort(offsets, kind="stable")
        values: list[_Value] = [_NOTHING] * len(offsets)
        tasks: list[Callable[[], None]] = []
        descriptor = _open(path)
        try:
            for begin, end in _slabs(pieces, first[order].tolist(), stop[order].tolist()):
                group = order[begin:end]
                needed = range(int(first[group[0]]), int(stop[group].max()))
                start = int(pieces.starts[needed.start])
                if pieces.nbytes(needed) > _SPARSE * int(_aligned(nbytes[group]).sum()):
                    columns = group.tolist(), (offsets[group] - start).tolist(), nbytes[group].tolist()
                    wanted = list(zip(*columns, strict=True))
                    read = functools.partial(self._read_block, path, descriptor, pieces)
                    tasks.append(functools.partial(_read_sparse, values, wanted, pieces, needed, read))
                    continue
                slab = aligned_memory(pieces.nbytes(needed))
                for place, offset in zip(group.tolist(), (offsets[group] - start).tolist(), strict=True):
                    values[place] = slab, offset
                read = functools.partial(self._read_block, path, descriptor, pieces, slab, start)
                tasks += [functools.partial(read, block) for block in pieces.runs(needed, _READ_BYTES)]
            run_parallel(tasks, _THREADS if int(nbytes.sum()) > _WORTH_A_THREAD_BYTES else 1)
        finally:
            os.close(descriptor)
        return values

    def _read_block(
        self, path: str, descriptor: int, pieces: PieceTable, slab: Bytes, start: int, block: range
    ) -> None:
        """Reads neighbouring pieces into their slab, which begins at `start` of the file, and checks them."""
        bounds = [(pieces.starts[number] - start, pieces.ends[number] - start) for number in block]
        _read_exactly(descriptor, slab[bounds[0][0] : bounds[-1][1]], start + int(bounds[0][0]), path)
        if self._verify:
            for number, (begin, end) in zip(block, bounds, strict=True):
                where = f"{path}: bytes {start + begin} to {start + end} are not what was saved"
                check_piece(slab[begin:end].data, pieces.digests[number], where)

    def _pieces_of(self, name: str) -> PieceTable:
        if name not in self._pieces:
            self._pieces[name] = self._checksums.pieces(name)
        return self._pieces[name]


# ------------------------------------------------------------------ grouping


def _slabs(pieces: PieceTable, first: Sequence[int], stop: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges, sorted by offset, that share one memory: neighbours, up to a slab, and all that share a piece."""
    begin = 0
    for number in range(1, len(first)):
        shares_a_piece = first[number] < stop[number - 1]
        is_neighbour = first[number] == stop[number - 1]
        if shares_a_piece or (
            is_neighbour and pieces.ends[stop[number] - 1] - pieces.starts[first[begin]] <= _SLAB_BYTES
        ):
            continue
        yield begin, number
        begin = number
    if first:
        yield begin, len(first)


def _aligned(nbytes: I64) -> I64:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _read_sparse(
    values: list[_Value], wanted: Sequence[tuple[int, int, int]], pieces: PieceTable, needed: range, read: Any
) -> None:
    """Values, by (place, offset, length), of which there is little in their pieces: they get memory of their own."""
    slab = aligned_memory(pieces.nbytes(needed))
    for block in pieces.runs(needed, _READ_BYTES):
        read(slab, int(pieces.starts[needed.start]), block)
    ends = np.cumsum(_aligned(np.array([nbytes for _, _, nbytes in wanted]))).tolist()
    own = aligned_memory(ends[-1])
    for (place, offset, nbytes), start in zip(wanted, [0, *ends[:-1]], strict=True):
        own[start : start + nbytes] = slab[offset : offset + nbytes]
        values[place] = own, start


# ------------------------------------------------------------------ files


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None


def _read_exactly(descriptor: int, target: Bytes, offset: int, path: str) -> None:
    got = fill(descriptor, target.data, offset)
    if got < target.nbytes:
        raise CorruptCheckpointError(f"{path} is cut off at byte {offset + got}")


# ------------------------------------------------------------------ zarr


@functools.lru_cache(maxsize=4096)
def _parse_zarray(encoded: bytes) -> _Stored:
    fields = json.loads(encoded)
    info = ArrayInfo(tuple(fields["shape"]), dtype_from_zarr(fields["dtype"]), tuple(fields["chunks"]))
    is_whole = info.shape == info.chunk_shape
    suffix = b".".join([b"0"] * max(1, len(info.shape))) if is_whole else b""
    chunk_nbytes = math.prod(info.chunk_shape) * info.dtype.itemsize
    return _Stored(info, chunk_nbytes, fields["compressor"] is not None, suffix)


def dtype_from_zarr(text: str) -> np.dtype:
    """The inverse of `layout.zarr_dtype`."""
    return np.dtype(text)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return aligned_memory(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
