"""Arrays in every other layout that Orbax writes, through tensorstore; the only module that imports it.

zarr v2 and v3, compressed or not, one OCDBT database or one per process, or plain directories. tensorstore is
loaded when the first such item is read.

What costs is not the bytes but one more array: to open it, and to read it. So arrays are opened once for each
*kind*, all that have the same metadata, and small ones are read many at once: their chunks are put side by side in
memory, where they are the chunks of one array with one axis more (`zarr.ArrayKind.stacked`). tensorstore decodes
straight into the memory that is handed out; what needs no more than zstd is put there without it (`direct`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.array_info import ArrayInfo
from ckpt_hooks.storage.direct import DirectValue, read_direct
from ckpt_hooks.storage.layout import array_key
from ckpt_hooks.storage.regions import Region, bounding, shape_of, slices_of, whole
from ckpt_hooks.storage.values import DatabaseValues, FileValues
from ckpt_hooks.storage.zarr import ArrayKind

__all__ = ["ForeignArrays"]

_SMALL_BYTES = 256 << 10  # above it, one more copy of the bytes costs more than one more array
_BATCH_BYTES = 8 << 20  # of small arrays
_PIECE_BYTES = 16 << 20  # of memory that arrays share; more would keep dead memory alive for one leaf
_IN_FLIGHT_BYTES = 256 << 20  # of arrays read one by one: until they are done, tensorstore holds their bytes twice more
_MIN_IN_FLIGHT = 2  # arrays, however large
_ALIGNMENT_BYTES = 64  # JAX on CPU takes such memory without a copy

_ERRORS = (ValueError, OSError, NotImplementedError)


class ForeignArrays:
    """The arrays of one item that another library wrote.

    Raises CorruptCheckpointError, with the directory and the array, where one of them cannot be read.
    """

    def __init__(
        self,
        directory: str,
        names: Iterable[str],
        *,
        use_ocdbt: bool,
        use_zarr3: bool,
        fill_missing: bool = False,
    ) -> None:
        import tensorstore as ts

        self._ts = ts
        self._directory = directory
        self._driver, self._metadata_file = ("zarr3", "zarr.json") if use_zarr3 else ("zarr", ".zarray")
        self._fill_missing = fill_missing
        self._context = ts.Context(
            {"file_io_concurrency": {"limit": 32}, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}
        )
        self._files = {"driver": "file", "path": os.path.join(directory, "")}
        self._use_ocdbt = use_ocdbt
        self._known_kinds: dict[bytes, ArrayKind] = {}
        self._kinds = self._read_kinds(list(names))

    def info(self, name: str) -> ArrayInfo:
        """Shape, dtype and chunks of an array."""
        return self._kinds[name].info

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these names; memory is aligned to 64 bytes and shared with no other call."""
        arrays: dict[str, np.ndarray] = {}
        small, large = [], []
        for name in names:
            kind = self._kinds[name]
            if kind.nbytes == 0:
                arrays[name] = np.empty(kind.info.shape, kind.info.dtype)  # no element, so no chunk
            elif _is_small(kind):
                small.append(name)
            else:
                large.append(name)
        memory = _Memory(self._kinds[name] for name in small + large)
        for batch in self._batches(small):
            arrays |= self._read_batch(batch, memory)
        arrays |= self._read_direct(large, memory)
        others = [(name, whole(self._kinds[name].info.shape)) for name in large if name not in arrays]
        return arrays | {name: array for (name, _), array in self._read_each(others, memory).items()}

    def read_regions(self, wanted: Mapping[str, Sequence[Region]]) -> dict[str, list[np.ndarray]]:
        """Regions of arrays; beside them, no more is held than what tensorstore decodes at a time."""
        found: dict[str, list[np.ndarray]] = {}
        for batch in self._batches(name for name in wanted if _is_small(self._kinds[name])):
            arrays = self._read_batch(batch, _Memory(self._kinds[name] for name in batch))
            for name in batch:
                found[name] = [_own_part(arrays[name], region) for region in wanted[name]]
        sources = {name: _sources(wanted[name]) for name in wanted if name not in found}
        entire = [name for name, (first, *_) in sources.items() if first == whole(self._kinds[name].info.shape)]
        read = {(name, whole(array.shape)): array for name, array in self.read(entire).items()}
        cut = [(name, region) for name in sources if name not in entire for region in dict.fromkeys(sources[name])]
        read |= self._read_each(cut, _Memory(()))
        for name, regions in sources.items():
            pairs = zip(regions, wanted[name], strict=True)
            found[name] = [_part(read[name, source], source, region) for source, region in pairs]
        return found

    # -------------------------------------------------------------- metadata

    @functools.cached_property
    def _values(self) -> DatabaseValues | FileValues:
        store = self._ts.KvStore.open(self._files, context=self._context).result()
        if not self._use_ocdbt:
            return FileValues(store)
        try:
            return DatabaseValues(store, lambda node: self._ts.ocdbt.dump(store, node, context=self._context).result())
        except (*_ERRORS, LookupError) as error:
            raise CorruptCheckpointError(
                f"{self._directory}: the index of its arrays cannot be read: {error}"
            ) from error

    def _read_kinds(self, names: Sequence[str]) -> dict[str, ArrayKind]:
        if not names:
            return {}  # where nothing is an array, as in the state of plain SGD, Orbax makes no database
        keys = [array_key(name, self._metadata_file) for name in names]
        try:
            values = self._values.read(keys)
        except _ERRORS as error:
            raise CorruptCheckpointError(f"{self._directory}: its arrays cannot be read: {error}") from error
        return {name: self._kind(name, values.get(key)) for name, key in zip(names, keys, strict=True)}

    def _kind(self, name: str, encoded: bytes | None) -> ArrayKind:
        if encoded is None:
            raise CorruptCheckpointError(
                f"{self._directory}: array {name!r} cannot be read: its {self._metadata_file} is missing"
            )
        kind = self._known_kinds.get(encoded)
        if kind is None:
            values = self._store_of({self._metadata_file: encoded})
            spec = {"driver": self._driver}
            with self._naming(name):
                store: Any = self._ts.open(spec, kvstore=values, read=True, context=self._context).result()
            chunk_shape = store.chunk_layout.read_chunk.shape or ()  # tensorstore has None for no axes
            info = ArrayInfo(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), tuple(chunk_shape))
            kind = self._known_kinds[encoded] = ArrayKind(info, store.spec().to_json()["metadata"])
        return kind

    # -------------------------------------------------------------- many small arrays at once

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Small arrays that lie one after another."""
        batch: list[str] = []
        batch_nbytes = 0
        for name in sorted(names, key=self._place):
            nbytes = self._kinds[name].nbytes
            if batch and batch_nbytes + nbytes > _BATCH_BYTES:
                yield batch
                batch, batch_nbytes = [], 0
            batch.append(name)
            batch_nbytes += nbytes
        if batch:
            yield batch

    def _place(self, name: str) -> tuple[str, int]:
        """What sorts arrays so that they lie one after another."""
        place = self._values.place(array_key(name, self._kinds[name].chunks[0][0]))
        return (name, 0) if place is None else (place.file, place.offset)

    def _read_batch(self, names: Sequence[str], memory: _Memory) -> dict[str, np.ndarray]:
        kinds: dict[ArrayKind, list[str]] = {}
        for name in names:
            kinds.setdefault(self._kinds[name], []).append(name)
        arrays: dict[str, np.ndarray] = {}
        try:
            values = self._values.read(array_key(name, key) for name in names for key, _ in self._kinds[name].chunks)
            for kind, members in kinds.items():
                arrays |= self._read_stack(kind, members, values, memory)
        except _ERRORS:
            each = [(name, whole(self._kinds[name].info.shape)) for name in names]
            return {name: array for (name, _), array in self._read_each(each, memory).items()}  # says which it is
        return arrays

    def _read_stack(
        self, kind: ArrayKind, names: Sequence[str], values: Mapping[bytes, bytes], memory: _Memory
    ) -> dict[str, np.ndarray]:
        chunks = {}
        for number, name in enumerate(names):
            for suffix, position in kind.chunks:
                value = values.get(array_key(name, suffix))
                if value is not None:
                    chunks[f"{number}{position}"] = value
        rows = memory.rows(len(names), kind)
        self._start_read(kind.stacked(len(names)), self._store_of(chunks), rows).result()
        return {name: rows[number, ...] for number, name in enumerate(names)}

    def _store_of(self, values: Mapping[str, bytes]) -> Any:
        """A key-value store of its own, gone with the last array that is read from it."""
        spec = {"driver": "memory", "memory_key_value_store": {}}
        store = self._ts.KvStore.open(spec, context=self._context).result()
        for key, value in values.items():
            store[key] = value
        return store

    # -------------------------------------------------------------- large arrays

    def _read_direct(self, names: Sequence[str], memory: _Memory) -> dict[str, np.ndarray]:
        """Those of the arrays that are in one piece, need no codec but zstd, and are as they should be."""
        values = {}
        for name in names:
            kind = self._kinds[name]
            place = self._values.place(array_key(name, kind.chunks[0][0])) if kind.form else None
            if place is not None and kind.form is not None:
                values[name] = DirectValue(place, memory.rows(1, kind)[0, ...], kind.form)
        good = read_direct(self._directory, values)
        return {name: value.target for name, value in values.items() if name in good}

    def _read_each(self, wanted: Iterable[tuple[str, Region]], memory: _Memory) -> dict[tuple[str, Region], np.ndarray]:
        arrays = {}
        in_flight: collections.deque[tuple[str, int, Any]] = collections.deque()
        in_flight_bytes = 0
        for name, region in wanted:
            kind = self._kinds[name]
            array = arrays[name, region] = memory.region(kind, region)
            while len(in_flight) >= _MIN_IN_FLIGHT and in_flight_bytes + array.nbytes > _IN_FLIGHT_BYTES:
                finished, nbytes, future = in_flight.popleft()
                with self._naming(finished):
                    future.result()
                in_flight_bytes -= nbytes
            with self._naming(name):
                store = self._store + array_key(name, "").decode()
                in_flight.append((name, array.nbytes, self._start_read(kind.metadata, store, array, region)))
            in_flight_bytes += array.nbytes
        for name, _, future in in_flight:
            with self._naming(name):
                future.result()
        return arrays

    @functools.cached_property
    def _store(self) -> Any:
        """The key-value store that has the arrays' keys."""
        spec = {"driver": "ocdbt", "base": self._files, "cache_pool": "cache_pool#ocdbt"}
        return self._ts.KvStore.open(spec if self._use_ocdbt else self._files, context=self._context).result()

    def _start_read(
        self, metadata: Mapping[str, Any], store: Any, target: np.ndarray, region: Region | None = None
    ) -> Any:
        """A future of `target` being filled with the array (or a region of it) whose chunks are in `store`."""
        spec = {
            "driver": self._driver,
            "metadata": metadata,
            "recheck_cached_data": False,
            "fill_missing_data_reads": self._fill_missing,
        }
        # With its metadata known, an open reads nothing.
        array = self._ts.open(spec, kvstore=store, read=True, open=True, assume_metadata=True, context=self._context)
        source = array.result()
        if region:
            source = source[slices_of(region)][self._ts.d[:].translate_to[0]]
        return self._ts.array(target).write(source)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        # tensorstore has no error classes of its own; its texts start with NOT_FOUND:, DATA_LOSS: and so on.
        try:
            yield
        except _ERRORS as error:
            raise CorruptCheckpointError(f"{self._directory}: array {name!r} cannot be read: {error}") from error


class _Memory:
    """Memory for arrays, each at a multiple of 64 bytes.

    It is cut from pieces that are large enough for huge pages, since page faults on small ones cost as much as reading.
    """

    def __init__(self, kinds: Iterable[ArrayKind]) -> None:
        self._expected_nbytes = sum(_row_nbytes(kind) for kind in kinds)
        self._free = np.empty(0, np.uint8)

    def rows(self, num: int, kind: ArrayKind) -> np.ndarray:
        """Memory of `num` arrays along a first axis, which need not lie one right after another."""
        nbytes = num * _row_nbytes(kind)
        if nbytes > len(self._free):
            self._free = _aligned(max(nbytes, min(_PIECE_BYTES, self._expected_nbytes)))
        part, self._free = self._free[:nbytes], self._free[nbytes:]
        self._expected_nbytes -= nbytes
        rows = part.reshape(num, -1)[:, : kind.nbytes]
        return rows.view(kind.info.dtype).reshape(num, *kind.info.shape)

    def region(self, kind: ArrayKind, region: Region) -> np.ndarray:
        """Memory of a region of one array; a part has its own, so that it can be given back alone."""
        if region == whole(kind.info.shape):
            return self.rows(1, kind)[0, ...]
        shape, dtype = shape_of(region), kind.info.dtype
        return _aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _is_small(kind: ArrayKind) -> bool:
    return 0 < kind.nbytes <= _SMALL_BYTES and kind.can_be_stacked


def _sources(regions: Sequence[Region]) -> list[Region]:
    """For each region, the one that is read for it: their common box where they fill it, so that no chunk is decoded
    several times."""
    box = bounding(regions)
    fills = math.prod(shape_of(box)) <= sum(math.prod(shape_of(region)) for region in regions)
    return [box] * len(regions) if fills else list(regions)


def _part(array: np.ndarray, source: Region, region: Region) -> np.ndarray:
    """A region of what was read of `source`."""
    index: Any = (*slices_of(region, within=source), ...)
    part: np.ndarray = array[index]
    return part


def _own_part(array: np.ndarray, region: Region) -> np.ndarray:
    """A region of an array; where that is not all of it, in memory of its own."""
    everything = whole(array.shape)
    return array if region == everything else _part(array, everything, region).copy()


def _row_nbytes(kind: ArrayKind) -> int:
    return -(-kind.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + _ALIGNMENT_BYTES, np.uint8)  # NumPy asks for huge pages
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + nbytes]
