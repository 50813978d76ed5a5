"""Values that are nothing but the bytes of an array, from their data files straight into place.

It is the one thing that tensorstore is not asked to decode: where nothing is compressed, each of its copies costs as
much as the read. What is not exactly as it should be is left to tensorstore, which knows or says why.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import google_crc32c
import numpy as np

from ckpt_hooks.storage.commit import run_parallel
from ckpt_hooks.storage.values import Place

__all__ = ["RawValue", "read_raw"]

_READ_BYTES = 16 << 20
_THREADS = 2
_SHARD_INDEX = struct.Struct("<QQI")  # offset and length of the only chunk, CRC-32C of both


class RawValue(NamedTuple):
    """A value that is to be read.

    Attributes:
      place: where it stands.
      target: an array in one piece, to be filled.
      is_shard: whether the index of a zarr v3 shard with one chunk follows on the bytes.
    """

    place: Place
    target: np.ndarray
    is_shard: bool

    @property
    def nbytes(self) -> int:
        return self.target.nbytes + (_SHARD_INDEX.size if self.is_shard else 0)


def read_raw(directory: str, values: Mapping[str, RawValue]) -> set[str]:
    """Fills the targets; the names of those that are as they should be."""
    files: dict[str, dict[str, RawValue]] = {}
    for name, value in values.items():
        if value.place.nbytes == value.nbytes:
            files.setdefault(value.place.file, {})[name] = value
    return {name for file, some in files.items() for name in _read_file(os.path.join(directory, file), some)}


def _read_file(path: str, values: Mapping[str, RawValue]) -> Iterator[str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    bad: set[str] = set()

    def read(name: str, offset: int, target: memoryview) -> None:
        if not _fill(descriptor, offset, target):
            bad.add(name)

    try:
        run_parallel(
            (functools.partial(read, name, *part) for name in values for part in _parts(values[name])), _THREADS
        )
        yield from (name for name, value in values.items() if name not in bad and _ends_well(descriptor, value))
    finally:
        os.close(descriptor)


def _parts(value: RawValue) -> Iterator[tuple[int, memoryview]]:
    target = value.target.reshape(-1).view(np.uint8).data
    for start in range(0, len(target), _READ_BYTES):
        yield value.place.offset + start, target[start : start + _READ_BYTES]


def _fill(descriptor: int, offset: int, target: memoryview) -> bool:
    """Whether there were as many bytes as `target` has."""
    while target:
        try:
            got = os.preadv(descriptor, [target], offset)
        except OSError:
            return False
        if got == 0:
            return False
        target, offset = target[got:], offset + got
    return True


def _ends_well(descriptor: int, value: RawValue) -> bool:
    if not value.is_shard:
        return True
    index = bytearray(_SHARD_INDEX.size)
    nbytes = value.target.nbytes
    if not _fill(descriptor, value.place.offset + nbytes, memoryview(index)):
        return False
    return _SHARD_INDEX.unpack(index) == (0, nbytes, google_crc32c.value(bytes(index[:-4])))
