"""The verified reader of what `layout` and `writer` wrote: straight into place, in parallel, every piece checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ml_dtypes  # noqa: F401  (registers bfloat16 and its siblings with NumPy by name)
import numpy as np
import numpy.typing as npt

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import ARRAY_FILE, ArrayChecksums, check_piece
from ckpt_hooks.storage.commit import run_parallel
from ckpt_hooks.storage.layout import array_key

__all__ = ["ArrayInfo", "Database", "dtype_from_zarr"]

_SLAB_BYTES = 16 << 20  # small neighbours are read together; more would keep dead memory alive for one leaf
_READ_BYTES = 16 << 20
_THREADS = 2
_HUGE_PAGE_BYTES = 2 << 20

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """An array on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]


class Database:
    """The arrays of one item that this library wrote.

    Raises CorruptCheckpointError where anything that is read is not what was saved.
    """

    def __init__(self, directory: str, *, verify: bool = True) -> None:
        self._directory = directory
        self._verify = verify
        table = os.path.join(directory, ARRAY_FILE)
        checksums = ArrayChecksums.decode(_read_file(table), table)
        self._checksums = checksums
        self._pieces = {name: checksums.of(name) for name in checksums.files}
        self._entries = self._read_index()

    @staticmethod
    def is_ours(directory: str) -> bool:
        """Whether the item was written by this library."""
        return os.path.isfile(os.path.join(directory, ARRAY_FILE))

    def info(self, name: str) -> ArrayInfo:
        """Shape, dtype and chunks of an array."""
        entry = self._entries.get(array_key(name, ".zarray"))
        if entry is None or entry.inline is None:
            raise CorruptCheckpointError(f"{self._directory}: the index has no array {name!r}")
        return _parse_zarray(bytes(entry.inline))

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these names; memory is aligned to 64 bytes and shared with no other call."""
        infos = {name: self.info(name) for name in names}
        chunks = [
            (name, position, entry) for name, info in infos.items() for position, entry in self._chunks(name, info)
        ]
        contents = self._read_chunks([entry for _, _, entry in chunks])
        arrays: dict[str, np.ndarray] = {}
        for (name, position, _), content in zip(chunks, contents, strict=True):
            _assemble(arrays, name, infos[name], position, content)
        for name in infos.keys() - arrays.keys():
            arrays[name] = np.empty(infos[name].shape, infos[name].dtype)  # no element, so no chunk
        return arrays

    # -------------------------------------------------------------- the index

    def _read_index(self) -> dict[bytes, ocdbt.Entry]:
        root = ocdbt.decode_manifest(_read_file(os.path.join(self._directory, ocdbt.MANIFEST_FILE)))
        entries: dict[bytes, ocdbt.Entry] = {}
        pending = [] if root.child is None else [root.child]
        while pending:
            child = pending.pop()
            (encoded,) = self._read_chunks([ocdbt.Entry(child.nbytes, None, child.file, child.offset)])
            node = ocdbt.decode_node(encoded.data)
            entries.update(node.entries)
            pending += node.children
        return entries

    def _chunks(self, name: str, info: ArrayInfo) -> Iterator[tuple[tuple[int, ...], ocdbt.Entry]]:
        if 0 in info.shape:
            return
        expected_nbytes = math.prod(info.chunk_shape) * info.dtype.itemsize
        for position, suffix in _grid(info.shape, info.chunk_shape):
            entry = self._entries.get(array_key(name, suffix))
            if entry is None or entry.nbytes != expected_nbytes:
                raise CorruptCheckpointError(f"{self._directory}: array {name!r} lacks chunk {suffix}")
            yield position, entry

    # -------------------------------------------------------------- bytes

    def _read_chunks(self, entries: Sequence[ocdbt.Entry]) -> list[Bytes]:
        """The content of each entry, in the order given."""
        contents: list[Bytes | None] = [None] * len(entries)
        outside: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            if entry.inline is not None:
                # Checked with the node that it stands in; copied, since the caller may write to it.
                contents[number] = np.frombuffer(entry.inline, np.uint8).copy()
            else:
                outside.setdefault(entry.file, []).append(number)
        tasks: list[Callable[[], None]] = []
        descriptors = {name: self._open(name) for name in outside}
        try:
            for name, numbers in outside.items():
                numbers.sort(key=lambda number: entries[number].offset)
                for group in _neighbours(numbers, entries):
                    tasks += self._read_group(name, descriptors[name], group, entries, contents)
            run_parallel(tasks, _THREADS)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return [content for content in contents if content is not None]

    def _read_group(
        self,
        name: str,
        descriptor: int,
        group: Sequence[int],
        entries: Sequence[ocdbt.Entry],
        contents: list[Bytes | None],
    ) -> Iterator[Callable[[], None]]:
        """Places neighbouring entries in one slab of memory; yields the reads that fill it."""
        start = entries[group[0]].offset
        last = entries[group[-1]]
        slab = _aligned_memory(last.offset + last.nbytes - start)
        pieces: list[tuple[int, int, int]] = []
        for number in group:
            entry = entries[number]
            contents[number] = slab[entry.offset - start : entry.offset - start + entry.nbytes]
            pieces += self._pieces_of(name, entry)
        for block in _grouped_pieces(pieces):
            yield functools.partial(self._read_block, name, descriptor, slab, start, block)

    def _pieces_of(self, name: str, entry: ocdbt.Entry) -> Iterator[tuple[int, int, int]]:
        known = self._pieces.get(name, {})
        offset, end = entry.offset, entry.offset + entry.nbytes
        while offset < end:
            nbytes, saved = known.get(offset, (0, 0))
            if nbytes == 0 or offset + nbytes > end:
                raise CorruptCheckpointError(
                    f"{self._directory}/{name}: no checksum covers the bytes from {offset} to {end}"
                )
            yield offset, nbytes, saved
            offset += nbytes

    def _read_block(
        self, name: str, descriptor: int, slab: Bytes, start: int, block: Sequence[tuple[int, int, int]]
    ) -> None:
        first, end = block[0][0], block[-1][0] + block[-1][1]
        target = slab[first - start : end - start]
        _read_exactly(descriptor, target, first, f"{self._directory}/{name}")
        if self._verify:
            for offset, nbytes, saved in block:
                where = f"{self._directory}/{name}: bytes {offset} to {offset + nbytes} are not what was saved"
                check_piece(slab[offset - start : offset - start + nbytes].data, saved, where)

    def _open(self, name: str) -> int:
        path = os.path.join(self._directory, name)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{path} is missing") from None


# ------------------------------------------------------------------ grouping


def _neighbours(numbers: Sequence[int], entries: Sequence[ocdbt.Entry]) -> Iterator[list[int]]:
    """Runs of entries that lie one after another, each run at most a slab long (or one entry)."""
    group: list[int] = []
    for number in numbers:
        entry = entries[number]
        if group:
            first, last = entries[group[0]], entries[group[-1]]
            gap = entry.offset - (last.offset + last.nbytes)
            if not 0 <= gap < 64 or entry.offset + entry.nbytes - first.offset > _SLAB_BYTES:
                yield group
                group = []
        group.append(number)
    if group:
        yield group


def _grouped_pieces(pieces: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces that one read fetches."""
    block: list[tuple[int, int, int]] = []
    for piece in pieces:
        if block and piece[0] + piece[1] - block[0][0] > _READ_BYTES:
            yield block
            block = []
        block.append(piece)
    if block:
        yield block


# ------------------------------------------------------------------ memory and files


def _aligned_memory(nbytes: int) -> Bytes:
    """Fresh memory at a multiple of 64 bytes, in huge pages where it is large: page faults cost more than reads."""
    if nbytes < mmap.PAGESIZE:
        memory = np.empty(nbytes + 64, np.uint8)
        skip = -memory.ctypes.data % 64
        return memory[skip : skip + nbytes]
    pages = mmap.mmap(-1, nbytes)
    if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
    return np.frombuffer(pages, np.uint8)


def _read_exactly(descriptor: int, target: Bytes, offset: int, path: str) -> None:
    view = target.data
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise CorruptCheckpointError(f"{path} is cut off at byte {offset}")
        view, offset = view[got:], offset + got


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None


# ------------------------------------------------------------------ zarr


@functools.lru_cache(maxsize=4096)
def _grid(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(position, key suffix) of every chunk; most arrays of a state share a few shapes."""
    counts = [-(-n // c) for n, c in zip(shape, chunk_shape, strict=True)]
    return [(position, ".".join(map(str, position)) or "0") for position in np.ndindex(*counts)]


@functools.lru_cache(maxsize=4096)
def _parse_zarray(encoded: bytes) -> ArrayInfo:
    fields: Mapping[str, object] = json.loads(encoded)
    shape, chunks, dtype = fields["shape"], fields["chunks"], fields["dtype"]
    assert isinstance(shape, list) and isinstance(chunks, list) and isinstance(dtype, str)
    return ArrayInfo(tuple(shape), dtype_from_zarr(dtype), tuple(chunks))


def dtype_from_zarr(text: str) -> np.dtype:
    """The inverse of `layout.zarr_dtype`."""
    return np.dtype(text)


def _assemble(
    arrays: dict[str, np.ndarray], name: str, info: ArrayInfo, position: tuple[int, ...], content: Bytes
) -> None:
    chunk = content.view(info.dtype).reshape(info.chunk_shape)
    if info.chunk_shape == info.shape:
        arrays[name] = chunk  # the memory that was read is the array
        return
    if name not in arrays:
        nbytes = math.prod(info.shape) * info.dtype.itemsize
        arrays[name] = _aligned_memory(nbytes).view(info.dtype).reshape(info.shape)
    starts = [p * c for p, c in zip(position, info.chunk_shape, strict=True)]
    region = tuple(
        slice(start, min(start + c, n)) for start, c, n in zip(starts, info.chunk_shape, info.shape, strict=True)
    )
    arrays[name][region] = chunk[tuple(slice(0, r.stop - r.start) for r in region)]
