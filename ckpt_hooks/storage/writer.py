"""The parallel writer: one data file, large vectored writes, a checksum of every piece on its way out."""

from __future__ import annotations

import errno
import functools
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence

import google_crc32c
import numpy as np

from ckpt_hooks.storage import ocdbt
from ckpt_hooks.storage.checksums import ARRAY_FILE, PIECE, ArrayChecksums, Pieces, digest
from ckpt_hooks.storage.commit import run_parallel
from ckpt_hooks.storage.layout import ChunkId, Layout

__all__ = ["write_arrays"]


BLOCK_BYTES = 16 << 20  # one write; also the longest piece with a checksum of its own
_BLOCK_PARTS = 400  # half of IOV_MAX (1024), with a gap between any two parts
_THREADS = 2
_ZEROS = bytes(64)

Part = tuple[int, memoryview]  # (offset in the file, content)


def write_arrays(
    directory: str, layout: Layout, chunks: Mapping[ChunkId, memoryview], process: int
) -> dict[str, bytes]:
    """Writes the data file of one process; returns the small files that go with it, {name: content}.

    Neither is durable before `commit.sync_tree`.
    """
    parts = [(segment.offset, chunks[segment.chunk]) for segment in layout.segments[process]]
    files = {}
    if process == 0:
        for node in layout.index:
            encoded = b"".join([part if isinstance(part, bytes) else chunks[part] for part in node.parts])
            parts.append((node.offset, memoryview(encoded + _crc32c(encoded))))
        manifest = bytearray(layout.manifest)
        manifest[ocdbt.MANIFEST_UUID] = os.urandom(16)
        manifest[ocdbt.MANIFEST_TIME] = time.time_ns().to_bytes(8, "little")
        files[ocdbt.MANIFEST_FILE] = bytes(manifest) + _crc32c(manifest)
    name, nbytes = layout.data_files[process], layout.data_nbytes[process]
    pieces = _write_data_file(os.path.join(directory, name), parts, nbytes)
    files[ARRAY_FILE] = ArrayChecksums({name: (pieces, nbytes)}).encode()
    return files


def _write_data_file(path: str, parts: Sequence[Part], nbytes: int) -> Pieces:
    """Writes `parts`, in the order of their offsets, into a new file of `nbytes`; returns their checksums."""
    blocks = list(_blocks(parts))
    pieces = np.zeros(sum(len(block) for block in blocks), PIECE)
    starts = np.cumsum([0, *(len(block) for block in blocks)])
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _preallocate(descriptor, nbytes)
        tasks = [
            functools.partial(_write_block, descriptor, block, pieces[start : start + len(block)])
            for block, start in zip(blocks, starts, strict=False)
        ]
        run_parallel(tasks, _THREADS if nbytes > BLOCK_BYTES else 1)
    finally:
        os.close(descriptor)
    return pieces


def _crc32c(encoded: bytes | bytearray) -> bytes:
    return struct.pack("<I", google_crc32c.value(bytes(encoded)))


def _blocks(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Groups small parts and cuts large ones, so that each block is one write of about BLOCK_BYTES."""
    block: list[Part] = []
    block_nbytes = 0
    for offset, content in parts:
        for start in range(0, len(content), BLOCK_BYTES):
            piece = content[start : start + BLOCK_BYTES]
            if block and (block_nbytes + len(piece) > BLOCK_BYTES or len(block) == _BLOCK_PARTS):
                yield block
                block, block_nbytes = [], 0
            block.append((offset + start, piece))
            block_nbytes += len(piece)
    if block:
        yield block


def _write_block(descriptor: int, block: list[Part], pieces: Pieces) -> None:
    # The checksum is taken just before the write, from the bytes that are written: whatever happens to them
    # after this line, in memory, on the bus or on the disk, is found when they are read.
    pieces["offset"] = [offset for offset, _ in block]
    pieces["nbytes"] = [len(content) for _, content in block]
    pieces["digest"] = [digest(content) for _, content in block]
    position = block[0][0]
    buffers: list[memoryview | bytes] = []
    end = position
    for offset, content in block:
        if offset > end:
            buffers.append(_ZEROS[: offset - end])
        buffers.append(content)
        end = offset + len(content)
    _write_all(descriptor, buffers, position)


def _write_all(descriptor: int, buffers: list[memoryview | bytes], position: int) -> None:
    """`pwritev` until everything is written: a write may be short where a disk is nearly full."""
    remaining = sum(len(buffer) for buffer in buffers)
    while True:
        written = os.pwritev(descriptor, buffers, position)
        remaining -= written
        position += written
        if remaining == 0:
            return
        while written >= len(buffers[0]):
            written -= len(buffers.pop(0))
        buffers[0] = memoryview(buffers[0])[written:]


def _preallocate(descriptor: int, nbytes: int) -> None:
    """Reserves the space, so that a full disk is found before the writing and the blocks lie together."""
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)
