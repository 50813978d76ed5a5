"""Values that are the bytes of one array, as they are or in zstd, from their data files straight into place.

It is what tensorstore is not asked to decode: each of its copies costs as much as the read, and nearly as much as
taking a checkpoint's float noise out of zstd. What is not exactly as it should be is left to tensorstore, which knows
or says why.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.compression import decompress_into
from ckpt_hooks.storage.lookup import open_to_read
from ckpt_hooks.storage.memory import Bytes, aligned_memory, fill, host_bytes
from ckpt_hooks.storage.values import Place
from ckpt_hooks.threads import run_parallel

__all__ = ["DirectValue", "Form", "read_direct"]

# The bytes alone; with the index of a zarr v3 shard that has one chunk behind them; a zstd frame.
Form = Literal["bytes", "shard", "zstd"]

_READ_BYTES = 16 << 20
_THREADS = 2
_SHARD_INDEX = struct.Struct("<QQI")  # offset and length of the only chunk, CRC-32C of both


class DirectValue(NamedTuple):
    """A value that is to be read.

    Attributes:
      place: where it stands.
      target: an array in one piece, to be filled.
      form: what the value is beside the array's bytes.
    """

    place: Place
    target: np.ndarray
    form: Form

    @property
    def fits(self) -> bool:
        """Whether it is as long as it has to be, as far as that is known."""
        known = {"bytes": self.target.nbytes, "shard": self.target.nbytes + _SHARD_INDEX.size}
        return self.place.nbytes == known.get(self.form, self.place.nbytes)


def read_direct(directory: str, values: Mapping[str, DirectValue]) -> set[str]:
    """Fills the targets; the names of those that are as they should be."""
    files: dict[str, dict[str, DirectValue]] = {}
    for name, value in values.items():
        if value.fits:
            files.setdefault(value.place.file, {})[name] = value
    return {name for file, some in files.items() for name in _read_file(os.path.join(directory, file), some)}


def _read_file(path: str, values: Mapping[str, DirectValue]) -> Iterator[str]:
    try:
        descriptor = open_to_read(path)
    except OSError:
        return
    bad: set[str] = set()
    names = sorted(values, key=lambda name: -values[name].place.nbytes)  # no thread is left with the largest alone
    scratch = _Scratch(values[names[0]].place.nbytes)

    def read(name: str, task: Callable[[int], bool]) -> None:
        if not task(descriptor):
            bad.add(name)

    try:
        run_parallel(
            (functools.partial(read, name, task) for name in names for task in _tasks(values[name], scratch)), _THREADS
        )
        yield from (name for name, value in values.items() if name not in bad and _ends_well(descriptor, value))
    finally:
        os.close(descriptor)


class _Scratch:
    """Memory that holds any frame, and is used again: fresh pages would cost as much as reading into them."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[Bytes] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[Bytes]:
        try:
            memory = self._free.pop()
        except IndexError:  # each thread gets here once
            memory = aligned_memory(self._nbytes)
        yield memory
        self._free.append(memory)


def _tasks(value: DirectValue, scratch: _Scratch) -> Iterator[Callable[[int], bool]]:
    """What fills the target from an open file, in parts where it can be; each says whether it went well."""
    target = host_bytes(value.target)
    if value.form == "zstd":
        yield functools.partial(_decompress, value.place, target, scratch)
        return
    for start in range(0, target.nbytes, _READ_BYTES):
        yield functools.partial(_fills, value.place.offset + start, target[start : start + _READ_BYTES].data)


def _decompress(place: Place, target: Bytes, scratch: _Scratch, descriptor: int) -> bool:
    with scratch.lent() as memory:
        frame = memory[: place.nbytes].data
        if not _fills(place.offset, frame, descriptor):
            return False
        try:
            decompress_into(target, frame, place.file)
        except CorruptCheckpointError:
            return False
    return True


def _fills(offset: int, target: memoryview, descriptor: int) -> bool:
    """Whether the file has as many bytes there as `target`, which has them then."""
    try:
        return fill(descriptor, target, offset) == len(target)
    except OSError:
        return False


def _ends_well(descriptor: int, value: DirectValue) -> bool:
    if value.form != "shard":
        return True
    index = bytearray(_SHARD_INDEX.size)
    nbytes = value.target.nbytes
    if not _fills(value.place.offset + nbytes, memoryview(index), descriptor):
        return False
    return _SHARD_INDEX.unpack(index) == (0, nbytes, google_crc32c.value(bytes(index[:-4])))
