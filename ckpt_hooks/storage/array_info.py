"""What is known of an array on disk before it is read; for ours, what its ``.zarray`` (zarr v2) says (no I/O)."""

from __future__ import annotations

import functools
import json
import math
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and its siblings with NumPy by name)
import numpy as np

__all__ = ["ArrayInfo", "Stored"]


class ArrayInfo(NamedTuple):
    """An array on disk, ours or anybody's."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]


class Stored(NamedTuple):
    """An array of ours; arrays that are alike share one of these.

    Attributes:
      info: shape, dtype and chunks.
      chunk_nbytes: of a chunk that is not compressed.
      is_compressed: whether its chunks are.
      only_suffix: of the key of its only chunk; empty where it has several or none.
    """

    info: ArrayInfo
    chunk_nbytes: int
    is_compressed: bool
    only_suffix: bytes

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(encoded: bytes) -> Stored:
        """From a ``.zarray`` as `layout` writes it, whose names of dtypes NumPy knows.

        >>> Stored.parse(b'{"shape": [4, 6], "chunks": [2, 6], "dtype": "<f4", "compressor": null}').chunk_nbytes
        48
        """
        fields = json.loads(encoded)
        info = ArrayInfo(tuple(fields["shape"]), np.dtype(fields["dtype"]), tuple(fields["chunks"]))
        is_whole = info.shape == info.chunk_shape
        suffix = b".".join([b"0"] * max(1, len(info.shape))) if is_whole else b""
        chunk_nbytes = math.prod(info.chunk_shape) * info.dtype.itemsize
        return Stored(info, chunk_nbytes, fields["compressor"] is not None, suffix)
