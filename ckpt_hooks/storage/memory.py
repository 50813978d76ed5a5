"""Host memory: aligned, in huge pages where it is large, and filled from files or written to them."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "aligned_memory", "fill", "host_bytes", "seek_and_write"]

_OWN_PAGES_BYTES = 64 << 10  # below it, what the allocator has at hand costs less than new pages
_HUGE_PAGE_BYTES = 2 << 20

Bytes = npt.NDArray[np.uint8]


def aligned_memory(nbytes: int) -> Bytes:
    """Fresh memory at a multiple of 64 bytes, in huge pages where it is large: page faults cost more than reads.

    >>> memory = aligned_memory(100)
    >>> memory.nbytes, memory.ctypes.data % 64
    (100, 0)
    """
    if nbytes < _OWN_PAGES_BYTES:
        memory = np.empty(nbytes + 64, np.uint8)
        skip = -memory.__array_interface__["data"][0] % 64  # `ctypes.data` makes an object for it
        return memory[skip : skip + nbytes]
    # Private, since Python's default is shared memory, which Linux does not put into huge pages.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
    return np.frombuffer(pages, np.uint8)


def host_bytes(array: Any) -> Bytes:
    """The bytes of an array in C order: its own memory where that is on the host and contiguous.

    NumPy has no buffer protocol for the extended dtypes, and JAX none for other layouts; bytes they all have.
    """
    return np.asarray(array, order="C").reshape(-1).view(np.uint8)


def fill(descriptor: int, target: memoryview, offset: int) -> int:
    """Reads a file from `offset` on; how many bytes came, fewer than `target` has where the file ends before."""
    count = 0
    while count < len(target):
        got = _read_at(descriptor, target[count:], offset + count)
        if got == 0:
            break
        count += got
    return count


def seek_and_write(descriptor: int, content: memoryview, position: int) -> int:
    """`os.pwrite`, where the platform has none."""
    with _seek_lock:  # the threads share the descriptor, and so its position
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, content)


_seek_lock = threading.Lock()


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    with _seek_lock:  # the threads share the descriptor, and so its position
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.readv(descriptor, [target])
