"""The parallel writer: one data file, large writes, a checksum of every piece on its way out.

A save in the foreground writes the caller's memory as it is. One in the background lets go of it first:
`ArrayWriter.detach` copies what the caller may change, within the bound of `HostMemory`, and writes at once what
does not fit.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ckpt_hooks.storage import commit, ocdbt
from ckpt_hooks.storage.checksums import PIECE, ArrayChecksums, digest
from ckpt_hooks.storage.layout import SMALL_CHUNK_BYTES, Block, DataFile, Layout
from ckpt_hooks.storage.memory import Bytes, aligned_memory, host_bytes
from ckpt_hooks.threads import run_parallel

__all__ = ["ArrayWriter", "HostMemory", "Sources"]

_THREADS = 2
_WORTH_A_THREAD_BYTES = 4 << 20
_PREALLOCATED_BYTES = 1 << 20  # a smaller file is one write, which finds a full disk itself
_FETCHED_BYTES = 256 << 20  # on their way from an accelerator at a time

Content = bytes | memoryview


class Sources(NamedTuple):
    """The bytes of the chunks that a process owns, in the order of the layout.

    Attributes:
      buffers: objects with the buffer protocol, in C order.
      mutable: the numbers of those whose memory the caller may change.
      remote: those that are still on an accelerator: {number: JAX array}.
    """

    buffers: Sequence[Any]
    mutable: Collection[int] = ()
    remote: Mapping[int, Any] = {}


class HostMemory:
    """What background saves may hold of the states that they write.

    Memory that a save has copied into is kept for the next one: making its pages takes longer than filling them.

    Args:
      limit_bytes: how many bytes of states background saves may hold at a time; None for all that there is.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._idle: list[Bytes] = []
        # By the saves themselves, weakly: one that fails half-way and is forgotten holds nothing any more.
        self._held_bytes: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # a save begins in one thread and ends in another

    def claim(self, owner: object, nbytes: int) -> int:
        """How many of `nbytes` a save may hold, until it calls `release`."""
        with self._lock:
            if self.limit_bytes is not None:
                nbytes = min(nbytes, max(0, self.limit_bytes - sum(self._held_bytes.values())))
            self._held_bytes[owner] = nbytes
        return nbytes

    def take(self, nbytes: int) -> Bytes:
        """Memory of at least `nbytes`: the smallest idle one that does, else fresh."""
        with self._lock:
            fitting = [memory for memory in self._idle if memory.nbytes >= nbytes]
            if fitting:
                best = min(fitting, key=len)
                self._idle = [memory for memory in self._idle if memory is not best]
                return best
            self._idle.clear()  # of a structure that is no longer saved: it would never be used again
        return aligned_memory(nbytes)

    def release(self, owner: object, memory: Bytes | None) -> None:
        """The opposite of `claim` and `take`."""
        with self._lock:
            self._held_bytes.pop(owner, None)
            if memory is not None:
                self._idle.append(memory)

    def clear(self) -> None:
        """Gives the idle memory back to the system."""
        with self._lock:
            self._idle.clear()


class ArrayWriter:
    """The data file of one process on its way from memory to the disk."""

    def __init__(self, layout: Layout, process: int, sources: Sources) -> None:
        self._file: DataFile = layout.files[process]
        self._num_processes, self._part_of_process = len(layout.files), layout.part_of_process
        self._blocks = self._file.blocks  # of the caller's memory
        self._manifest_template = layout.manifest if process == 0 else None
        self._mutable, self._remote = sources.mutable, dict(sources.remote)
        self._pool = [*sources.buffers, *self._file.constants]
        self._encoded_places = b""  # what process 0 has to be told to write the index
        self._num_written = 0  # blocks
        self._digests: dict[int, Sequence[int]] = {}  # of the pieces of each block, by its offset
        self._held: list[Content | None] = [None] * len(self._blocks)  # what `detach` has taken
        self._memory: HostMemory | None = None
        self._region: Bytes | None = None

    # -------------------------------------------------------------- letting go of the caller's memory

    def detach(self, directory: str, memory: HostMemory, *, copies: bool) -> None:
        """After it, the caller may change, donate or delete what it gave.

        Args:
          directory: of the item; what `memory` has no room for is written there at once.
          copies: whether JAX arrays are copied too. A view of an array on CPU is as safe: JAX keeps the buffer of an
            array that is donated or deleted while a view of it lives. But then the next donated step has to find
            fresh memory for all of it.
        """
        if memory.limit_bytes is not None:
            self._memory = memory
            nbytes, first = sum([block.nbytes for block in self._blocks]), 0
            excess_bytes = nbytes - memory.claim(self, nbytes)
            while excess_bytes > 0 and first < len(self._blocks):
                excess_bytes -= self._blocks[first].nbytes
                first += 1
            if first:
                self._write_blocks(directory, first)
        self._hold(range(self._num_written, len(self._blocks)), memory, copies=copies)
        self._pool = []

    def _hold(self, numbers: range, memory: HostMemory, *, copies: bool) -> None:
        if self._remote:
            self._fetch(numbers)
        blocks, joined, viewed = self._blocks, [], []
        for number in numbers:
            block = blocks[number]
            if block.start is not None and (copies or block.parts[0] in self._mutable):
                viewed.append(number)
            elif block.start is None and block.nbytes > SMALL_CHUNK_BYTES:
                joined.append(number)
            else:
                self._held[number] = self._content(block)
        if not joined and not viewed:
            return
        copied = [*joined, *viewed]
        ends = list(itertools.accumulate([blocks[number].nbytes for number in copied]))
        region = memory.take(ends[-1])
        self._memory, self._region = memory, region
        tasks = [
            functools.partial(self._copy, number, region[end - blocks[number].nbytes : end])
            for number, end in zip(copied, ends, strict=True)
        ]
        # What is joined on its way is joined in one thread, in memory that its allocator finds warm each time.
        run_parallel(tasks[: len(joined)], 1)
        run_parallel(tasks[len(joined) :], _THREADS if ends[-1] > _WORTH_A_THREAD_BYTES else 1)

    def _copy(self, number: int, place: Bytes) -> None:
        np.copyto(place, np.frombuffer(self._content(self._blocks[number]), np.uint8))
        self._held[number] = place.data

    def _fetch(self, numbers: range) -> set[int]:
        """Brings what these blocks need from the accelerators, all transfers side by side; returns the parts."""
        remote = self._remote
        parts = {part for number in numbers for part in self._blocks[number].parts if part in remote}
        arrays = {part: _with_own_copy(remote.pop(part)) for part in parts}
        for array in arrays.values():
            array.copy_to_host_async()
        for part, array in arrays.items():
            self._pool[part] = host_bytes(array)
        return parts

    # -------------------------------------------------------------- writing

    def write(self, directory: str) -> dict[str, bytes]:
        """Writes what is not written yet; returns the small files that go with it, {name: content}.

        Nothing is durable before `commit.sync_tree`.
        """
        try:
            self._write_blocks(directory, len(self._blocks))
        finally:
            self._held = []
            if self._memory is not None:
                self._memory.release(self, self._region)
                self._memory = self._region = None
        return self._small_files()

    def _small_files(self) -> dict[str, bytes]:
        """The table of checksums, and the manifest with an identity and a time of its own."""
        blocks = self._file.blocks
        places = [(block.offset + start, stop - start) for block in blocks for start, stop in block.pieces]
        pieces = np.zeros(len(places), PIECE)
        pieces["offset"], pieces["nbytes"] = np.array(places, np.uint64).reshape(-1, 2).T
        pieces["digest"] = [found for block in blocks for found in self._digests[block.offset]]
        data_files = {self._file.name: (pieces, self._file.nbytes)}
        table = ArrayChecksums(data_files, self._num_processes, self._part_of_process, self._encoded_places)
        files = {self._file.table_name: table.encode()}
        if self._manifest_template is not None:
            manifest = bytearray(self._manifest_template)
            manifest[ocdbt.MANIFEST_UUID] = os.urandom(16)
            manifest[ocdbt.MANIFEST_TIME] = time.time_ns().to_bytes(8, "little")
            files[ocdbt.MANIFEST_FILE] = bytes(manifest) + google_crc32c.value(bytes(manifest)).to_bytes(4, "little")
        return files

    def _write_blocks(self, directory: str, end: int) -> None:
        """Writes the blocks up to `end` that are not written yet."""
        descriptor = self._open(directory)

        def write(number: int) -> None:
            block = self._blocks[number]
            content, self._held[number] = self._held[number] or self._content(block), None
            self._write_block(descriptor, block, memoryview(content))

        try:
            begin, self._num_written = self._num_written, end
            for numbers in self._windows(begin, end) if self._remote else [range(begin, end)]:
                nbytes = sum([self._blocks[number].nbytes for number in numbers])
                tasks = [functools.partial(write, number) for number in numbers]
                run_parallel(tasks, _THREADS if nbytes > _WORTH_A_THREAD_BYTES else 1)
        finally:
            os.close(descriptor)

    def _open(self, directory: str) -> int:
        path = os.path.join(directory, self._file.name)
        if self._num_written:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o666)
        if self._file.nbytes >= _PREALLOCATED_BYTES:
            _preallocate(descriptor, self._file.nbytes)
        return descriptor

    def _windows(self, begin: int, end: int) -> Iterator[range]:
        """Blocks that an accelerator has, brought some at a time: the host need not hold all of them.

        A large chunk, which is brought, and may be compressed, as a whole, is not divided.
        """
        blocks, window_bytes = self._blocks, 0
        for number in range(begin, end):
            window_bytes += blocks[number].nbytes
            following = blocks[number + 1].parts if number + 1 < len(blocks) else []
            if number == end - 1 or (window_bytes > _FETCHED_BYTES and following != blocks[number].parts):
                brought = self._fetch(range(begin, number + 1))
                yield range(begin, number + 1)
                for part in brought.difference(following):  # they are written
                    self._pool[part] = b""
                begin, window_bytes = number + 1, 0

    def _write_block(self, descriptor: int, block: Block, content: memoryview) -> None:
        # The checksum is taken just before the write, from the bytes that are written: whatever happens to them
        # after this line, in memory, on the bus or on the disk, is found when they are read.
        self._digests[block.offset] = [digest(content[start:stop]) for start, stop in block.pieces]
        commit.write_all(descriptor, content, block.offset)

    def _content(self, block: Block) -> Content:
        """The bytes of a block: a view of a part of a large chunk, or small ones and constants in one piece."""
        parts = [self._pool[part] for part in block.parts]
        try:
            if block.start is not None:
                return memoryview(parts[0]).cast("B")[block.start : block.start + block.nbytes]
            joined = b"".join(parts)
        except (TypeError, BufferError):  # an array whose layout in memory is not that of C order
            parts = [part if isinstance(part, bytes) else host_bytes(part) for part in parts]
            if block.start is not None:
                return memoryview(parts[0])[block.start : block.start + block.nbytes]
            joined = b"".join(parts)
        return joined + google_crc32c.value(joined).to_bytes(4, "little") if block.is_node else joined


def _with_own_copy(array: Any) -> Any:
    """Another JAX array of the same memory: each keeps what is copied to the host for as long as it lives."""
    return array.addressable_data(0) if array.is_fully_replicated else array


# ------------------------------------------------------------------ system calls


def _preallocate(descriptor: int, nbytes: int) -> None:
    """Reserves the space, so that a full disk is found before the writing and the blocks lie together."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
