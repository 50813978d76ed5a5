"""Arrays in every other layout that Orbax writes, through tensorstore; the only module that imports it.

zarr v2 and v3, compressed or not, one OCDBT database or one per process, or plain directories. tensorstore is
loaded when the first such item is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.reader import ArrayInfo

__all__ = ["ForeignArrays"]


class ForeignArrays:
    """The arrays of one item that another library wrote."""

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
        self._driver = "zarr3" if use_zarr3 else "zarr"
        self._use_ocdbt = use_ocdbt
        self._fill_missing = fill_missing
        self._context = ts.Context(
            {"file_io_concurrency": {"limit": 128}, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}
        )
        self._stores = self._open(names)

    def info(self, name: str) -> ArrayInfo:
        """Shape, dtype and chunks of an array."""
        store = self._stores[name]
        chunk_shape = store.chunk_layout.read_chunk.shape or ()  # tensorstore has None for an array without axes
        return ArrayInfo(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), tuple(chunk_shape))

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these names."""
        futures = {name: self._stores[name].read() for name in names}
        return {name: np.asarray(self._result(name, future)) for name, future in futures.items()}

    def _open(self, names: Iterable[str]) -> dict[str, Any]:
        # All at once: each open is a round trip, and tensorstore runs them side by side.
        futures = {name: self._ts.open(self._spec(name), open=True, read=True, context=self._context) for name in names}
        return {name: self._result(name, future) for name, future in futures.items()}

    def _result(self, name: str, future: Any) -> Any:
        # tensorstore has no error classes of its own; its texts start with NOT_FOUND:, DATA_LOSS: and so on.
        try:
            return future.result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise CorruptCheckpointError(f"{self._directory}: array {name!r} cannot be read: {error}") from error

    def _spec(self, name: str) -> dict[str, object]:
        base = {"driver": "file", "path": os.path.join(self._directory, "")}
        if self._use_ocdbt:
            kvstore: dict[str, object] = {
                "driver": "ocdbt",
                "base": base,
                "path": f"{name}/" if name else "",
                "cache_pool": "cache_pool#ocdbt",
            }
        else:
            kvstore = {"driver": "file", "path": os.path.join(self._directory, name, "")}
        return {
            "driver": self._driver,
            "kvstore": kvstore,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": self._fill_missing,
        }
