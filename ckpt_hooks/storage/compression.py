"""Compression of chunks, as zarr's compressor `zstd`, so that Orbax reads them too.

How long a compressed chunk is, is known only once it is compressed. So nothing but the way to the writer is planned:
chunks are compressed side by side, each goes to the end of the data file, and the index is made when all are there.
Of several processes, each leaves the places of its chunks in its table of checksums, and the first one makes the index
of all of them when all have written.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import ArrayChecksums
from ckpt_hooks.storage.layout import DataFile, Layout, Place, add_index
from ckpt_hooks.storage.memory import Bytes, aligned_memory
from ckpt_hooks.storage.writer import ArrayWriter, Sources
from ckpt_hooks.threads import run_parallel

__all__ = ["ZSTD", "CompressingWriter", "decompress_into", "decompressed"]

ZSTD: dict[str, Any] = {"id": "zstd", "level": 1}  # Orbax's level: a higher one costs more than it gains on weights
_THREADS = 2
_PLACE = np.dtype([("nbytes", "<u8"), ("offset", "<u8")])
_NOWHERE = Place(0, 0, 0, None)  # until it is written


class CompressingWriter(ArrayWriter):
    """An `ArrayWriter`, of a layout that inlines nothing, that compresses each chunk on its way."""

    def __init__(self, layout: Layout, process: int, sources: Sources) -> None:
        super().__init__(layout, process, sources)
        self._arrays, self._nbytes = layout.arrays, layout.chunk_nbytes[process]
        self._file = DataFile(process)
        self._process = process
        self._places: list[Place] = [_NOWHERE] * len(self._nbytes)
        self._inline: dict[int, bytes] = {}
        self._end_lock = threading.Lock()  # of the file's end, where one chunk is appended at a time

    def _write_blocks(self, directory: str, end: int) -> None:
        blocks, begin = self._blocks, self._num_written
        while 0 < end < len(blocks) and blocks[end].parts == blocks[end - 1].parts:
            end += 1  # a large chunk is compressed as a whole
        descriptor = self._open(directory)
        try:
            self._num_written = end
            for numbers in self._windows(begin, end) if self._remote else [range(begin, end)]:
                groups = itertools.groupby(numbers, key=lambda number: blocks[number].parts)
                tasks = [functools.partial(self._compress, descriptor, list(group)) for _, group in groups]
                run_parallel(tasks, _THREADS)
            if end == len(blocks) and self._num_processes == 1 and not self._manifest_template:
                self._write_index(descriptor, self._places)
        finally:
            os.close(descriptor)

    def _compress(self, descriptor: int, numbers: Sequence[int]) -> None:
        """One large chunk, in several blocks, or the small chunks of one block."""
        contents = []
        for number in numbers:
            contents.append(self._held[number] or self._content(self._blocks[number]))
            self._held[number] = None
        block = self._blocks[numbers[0]]
        if block.start is not None:
            self._append(descriptor, {block.parts[0]: _compressed(contents, self._nbytes[block.parts[0]])})
            return
        chunks, start, view = {}, 0, memoryview(contents[0])
        for part in block.parts:
            stop = start + (self._nbytes[part] if part >= 0 else -part)
            if part >= 0:
                chunks[part] = _compressed([view[start:stop]], stop - start)
            start = stop
        self._append(descriptor, chunks)

    def _append(self, descriptor: int, chunks: dict[int, bytes]) -> None:
        with self._end_lock:
            first = len(self._file.blocks)
            self._file.end_block()
            for source, content in chunks.items():
                is_inline = self._process == 0 and len(content) <= ocdbt.MAX_INLINE_VALUE_BYTES
                offset = None if is_inline else self._file.add(source, len(content))
                self._places[source] = Place(len(content), self._process, source, offset)
                if is_inline:
                    self._inline[source] = content
            self._file.end_block()
            blocks = self._file.blocks[first:]
        for block in blocks:
            parts = [chunks[part] if part >= 0 else bytes(-part) for part in block.parts]
            joined = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
            start = block.start or 0
            self._write_block(descriptor, block, joined[start : start + block.nbytes])

    def _small_files(self) -> dict[str, bytes]:
        if self._process > 0:
            places = [(place.nbytes, place.offset) for place in self._places]
            self._encoded_places = np.array(places, _PLACE).tobytes()
        elif not self._manifest_template:  # until `finish`, which needs nothing more of the caller's memory
            self._pool = []
            return {}
        return super()._small_files()

    def finish(self, directory: str) -> dict[str, bytes]:
        """Writes the index over the chunks of all processes, in the first one; returns the small files left to write.

        Raises CorruptCheckpointError where another process's table is not there, or not what it wrote.
        """
        others = [_places_of(directory, process) for process in range(1, self._num_processes)]
        remaining = [iter(self._places), *others]
        places = [next(remaining[owner]) for array in self._arrays for owner in array.owners]
        descriptor = os.open(os.path.join(directory, self._file.name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._write_index(descriptor, places)
        finally:
            os.close(descriptor)
        return self._small_files()

    def _write_index(self, descriptor: int, places: Sequence[Place]) -> None:
        first = len(self._file.blocks)
        self._manifest_template = add_index(self._file, self._arrays, places, ZSTD)
        sources = [self._inline.get(source, b"") for source in range(len(self._places))]
        self._pool = [*sources, *self._file.constants]
        for block in self._file.blocks[first:]:
            self._write_block(descriptor, block, memoryview(self._content(block)))


def _places_of(directory: str, process: int) -> Iterator[Place]:
    """Those of the chunks of another process, in their order."""
    table = np.frombuffer(ArrayChecksums.read(directory, process).places, _PLACE)
    for source, (nbytes, offset) in enumerate(table.tolist()):
        yield Place(nbytes, process, source, offset)


def _compressed(contents: Sequence[Any], nbytes: int) -> bytes:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=ZSTD["level"])
    if len(contents) == 1:
        whole: bytes = compressor.compress(contents[0])
        return whole
    stream = compressor.compressobj(size=nbytes)
    return b"".join([*map(stream.compress, contents), stream.flush()])


def decompressed(content: memoryview, nbytes: int, where: str) -> Bytes:
    """A chunk of `nbytes`; raises CorruptCheckpointError, naming `where`, if it is not one."""
    chunk = aligned_memory(nbytes)
    decompress_into(chunk, content, where)
    return chunk


def decompress_into(chunk: Bytes, content: memoryview, where: str) -> None:
    """Fills a chunk; raises CorruptCheckpointError, naming `where`, if `content` is not as many bytes."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as stream:
            found = sum(_filled(stream, chunk))
            is_longer = bool(stream.read(1))
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from error
    if found != chunk.nbytes or is_longer:
        raise CorruptCheckpointError(f"{where}: a chunk is not the {chunk.nbytes} bytes that its array needs")


def _filled(stream: Any, chunk: Bytes) -> Iterator[int]:
    at = 0
    while at < chunk.nbytes and (got := stream.readinto(chunk[at:].data)):
        at += got
        yield got
