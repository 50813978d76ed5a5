"""The verified reader of what `layout` and `writer` wrote: straight into place, in parallel, every piece checked.

What is asked for is a set of byte ranges, so the pieces that cover them are read, and nothing else. Neighbouring
pieces share one slab of memory, and the arrays are views of it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and its siblings with NumPy by name)
import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import ARRAY_FILE, ArrayChecksums, PieceTable, check_piece, read_file
from ckpt_hooks.storage.commit import run_parallel
from ckpt_hooks.storage.compression import decompressed
from ckpt_hooks.storage.layout import array_key
from ckpt_hooks.storage.memory import Bytes, aligned_memory
from ckpt_hooks.storage.ocdbt import I64

__all__ = ["ArrayInfo", "Database", "dtype_from_zarr"]

_SLAB_BYTES = 16 << 20  # small neighbours share memory up to here; more would keep dead memory alive for one leaf
_READ_BYTES = 8 << 20
_THREADS = 2
_WORTH_A_THREAD_BYTES = 4 << 20
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


class Database:
    """The arrays of one item that this library wrote.

    Raises CorruptCheckpointError where anything that is read is not what was saved.
    """

    def __init__(self, directory: str, *, verify: bool = True) -> None:
        self._directory = directory
        self._verify = verify
        self._checksums = ArrayChecksums.read(directory)
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
        return os.path.isfile(os.path.join(directory, ARRAY_FILE))

    def info(self, name: str) -> ArrayInfo:
        """Shape, dtype and chunks of an array."""
        if name not in self._arrays:
            raise CorruptCheckpointError(f"{self._directory}: the index has no array {name!r}")
        return self._arrays[name][0].info

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these names; memory is aligned to 64 bytes and shared with no other call."""
        wanted = {name: self._arrays[name] for name in names}
        whole = {name: stored for name, (stored, chunk) in wanted.items() if chunk >= 0}
        cut = {name: self._chunks(name, stored) for name, (stored, chunk) in wanted.items() if chunk < 0}
        numbers = [chunk for _, chunk in wanted.values() if chunk >= 0]
        numbers += [number for chunks in cut.values() for _, number in chunks]
        owners = [*whole.values(), *(wanted[name][0] for name, chunks in cut.items() for _ in chunks)]
        values = iter(self._read_chunks(owners, np.array(numbers, np.int64)))
        arrays = {
            name: np.ndarray(stored.info.shape, stored.info.dtype, memory, offset)  # what was read is the array
            for (name, stored), (memory, offset) in zip(whole.items(), values)  # noqa: B905 (the rest is below)
        }
        for name, chunks in cut.items():
            arrays[name] = _assembled(wanted[name][0].info, [position for position, _ in chunks], values)
        return arrays

    def _chunks(self, name: str, stored: _Stored) -> list[tuple[tuple[int, ...], int]]:
        """(position, number of its value) of every chunk."""
        chunks = []
        for position, suffix in _grid(stored.info.shape, stored.info.chunk_shape):
            number = self._numbers.get(array_key(name, suffix))
            if number is None:
                raise CorruptCheckpointError(f"{self._directory}: array {name!r} lacks chunk {suffix}")
            chunks.append((position, number))
        return chunks

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
        is_compressed = np.array([owner.is_compressed for owner in owners], np.bool_)
        expected = np.array([owner.chunk_nbytes for owner in owners], np.int64)
        if (self._nbytes[numbers] != expected)[~is_compressed].any():
            raise CorruptCheckpointError(
                f"{self._directory}: the index has chunks of a length that is not their array's"
            )
        values = self._read_values(numbers)
        decompress = functools.partial(self._decompress, values, self._nbytes[numbers].tolist(), expected.tolist())
        places = np.flatnonzero(is_compressed).tolist()
        run_parallel([functools.partial(decompress, place) for place in places], _THREADS if places else 1)
        return values

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
                first_piece, stop_piece = int(first[group[0]]), int(stop[group].max())
                start = int(pieces.starts[first_piece])
                slab = aligned_memory(int(pieces.ends[stop_piece - 1]) - start)
                for place, offset in zip(group.tolist(), (offsets[group] - start).tolist(), strict=True):
                    values[place] = slab, offset
                read = functools.partial(self._read_block, path, descriptor, slab, start, pieces)
                tasks += [functools.partial(read, block) for block in _blocks(pieces, first_piece, stop_piece)]
            run_parallel(tasks, _THREADS if int(nbytes.sum()) > _WORTH_A_THREAD_BYTES else 1)
        finally:
            os.close(descriptor)
        return values

    def _read_block(
        self, path: str, descriptor: int, slab: Bytes, start: int, pieces: PieceTable, block: range
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
            self._pieces[name] = self._checksums.table(name)
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


def _blocks(pieces: PieceTable, first: int, stop: int) -> Iterator[range]:
    """The pieces of a slab, as many at a time as one read fetches."""
    begin = first
    for number in range(first, stop):
        if pieces.ends[number] - pieces.starts[begin] > _READ_BYTES and number > begin:
            yield range(begin, number)
            begin = number
    yield range(begin, stop)


# ------------------------------------------------------------------ files


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None


def _read_exactly(descriptor: int, target: Bytes, offset: int, path: str) -> None:
    view = target.data
    while view:
        got = _read_at(descriptor, view, offset)
        if got == 0:
            raise CorruptCheckpointError(f"{path} is cut off at byte {offset}")
        view, offset = view[got:], offset + got


_seek_lock = threading.Lock()


def _read_at(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _seek_lock:  # the threads share the descriptor, and so its position
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.readv(descriptor, [view])


# ------------------------------------------------------------------ zarr


@functools.lru_cache(maxsize=4096)
def _grid(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(position, key suffix) of every chunk; most arrays of a state share a few shapes."""
    counts = [-(-n // c) for n, c in zip(shape, chunk_shape, strict=True)]
    return [(position, ".".join(map(str, position)) or "0") for position in np.ndindex(*counts)]


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


def _assembled(info: ArrayInfo, positions: Sequence[tuple[int, ...]], values: Iterator[_Value]) -> np.ndarray:
    """An array of several chunks, or of none, which are the next of `values`."""
    nbytes = math.prod(info.shape) * info.dtype.itemsize
    array = aligned_memory(nbytes).view(info.dtype).reshape(info.shape)
    for position, (memory, offset) in zip(positions, values):  # noqa: B905 (the rest is other arrays')
        _fill(array, position, np.ndarray(info.chunk_shape, info.dtype, memory, offset))
    return array


def _fill(array: np.ndarray, position: tuple[int, ...], chunk: np.ndarray) -> None:
    """Puts a chunk, which may reach over the end of the array, into its place."""
    starts = [p * c for p, c in zip(position, chunk.shape, strict=True)]
    region = tuple(slice(s, min(s + c, n)) for s, c, n in zip(starts, chunk.shape, array.shape, strict=True))
    array[region] = chunk[tuple(slice(0, part.stop - part.start) for part in region)]
