"""zarr metadata, v2 and v3: which keys the chunks of an array have, and many equal arrays as one (no I/O)."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_hooks.storage.array_info import ArrayInfo
from ckpt_hooks.storage.direct import Form

__all__ = ["ArrayKind"]

# Their configuration says nothing of the number of axes, so that it holds for a stack too.
_CODECS_OF_BYTES = frozenset({"bytes", "blosc", "crc32c", "gzip", "zstd"})


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayKind:
    """All that arrays with the same metadata have in common.

    Attributes:
      info: shape, dtype and chunks.
      metadata: as tensorstore writes it, in full.
    """

    info: ArrayInfo
    metadata: Mapping[str, Any]

    @functools.cached_property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * self.info.dtype.itemsize

    @functools.cached_property
    def chunks(self) -> list[tuple[str, str]]:
        """(key, key behind the number of the array in a stack) of every chunk.

        >>> fields = {"zarr_format": 2, "shape": [3, 1], "chunks": [2, 1], "dimension_separator": "/"}
        >>> ArrayKind(ArrayInfo((3, 1), np.dtype("f4"), (2, 1)), fields).chunks
        [('0/0', '.0.0'), ('1/0', '.1.0')]
        """
        shape, chunk_shape = self.metadata["shape"], self._chunk_shape
        counts = [-(-n // c) for n, c in zip(shape, chunk_shape, strict=True)]
        return [(self._key(position), "".join(f".{n}" for n in position)) for position in np.ndindex(*counts)]

    def _key(self, position: tuple[int, ...]) -> str:
        if self._is_v2:
            return str(self.metadata["dimension_separator"]).join(map(str, position)) or "0"
        encoding = self.metadata["chunk_key_encoding"]
        is_default = encoding["name"] == "default"
        separator = encoding.get("configuration", {}).get("separator", "/" if is_default else ".")
        return str(separator).join(["c"] * is_default + [str(n) for n in position]) or "0"

    @property
    def _is_v2(self) -> bool:
        return bool(self.metadata["zarr_format"] == 2)

    @property
    def _chunk_shape(self) -> list[int]:
        if self._is_v2:
            return list(self.metadata["chunks"])
        return list(self.metadata["chunk_grid"]["configuration"]["chunk_shape"])

    # -------------------------------------------------------------- one chunk, as it is in memory

    @functools.cached_property
    def form(self) -> Form | None:
        """How its one chunk holds the array's bytes as they are in memory; None where it takes tensorstore to say."""
        dtype, fields = self.info.dtype, self.metadata
        known = dtype.isnative and (dtype.kind in "iufc" or dtype.name == "bfloat16")  # no dtype of less than a byte
        if not (known and self.can_be_stacked) or self._chunk_shape != fields["shape"] or sys.byteorder != "little":
            return None
        if self._is_v2:
            is_plain = fields["order"] == "C" and fields["dtype"][0] != ">"
            return _form_v2(fields["compressor"]) if is_plain else None
        codecs = fields["codecs"]
        if codecs[0]["name"] != "sharding_indexed":
            return _form_v3(codecs)
        sharding = codecs[0]["configuration"]
        is_whole = len(codecs) == 1 and sharding["chunk_shape"] == fields["shape"]
        is_indexed = sharding.get("index_location", "end") == "end" and _are_bytes(sharding["index_codecs"], "crc32c")
        return "shard" if is_whole and is_indexed and _are_bytes(sharding["codecs"]) else None

    # -------------------------------------------------------------- stacks

    @functools.cached_property
    def can_be_stacked(self) -> bool:
        """Whether `stacked` knows all that the metadata says."""
        if self._is_v2:
            return isinstance(self.metadata["dtype"], str) and self.metadata["filters"] is None
        if self.metadata["chunk_grid"]["name"] != "regular":
            return False
        codecs = self.metadata["codecs"]
        if codecs[0]["name"] == "sharding_indexed":
            sharding, codecs = codecs[0]["configuration"], codecs[1:]
            codecs = [*codecs, *sharding["codecs"], *sharding["index_codecs"]]
        return all(codec["name"] in _CODECS_OF_BYTES for codec in codecs)

    def stacked(self, num: int) -> dict[str, Any]:
        """The metadata of `num` such arrays along a new first axis, with chunk keys ``<number>.<position>``.

        A chunk of it, one long on that axis, has the bytes that it has in its own array.
        """
        shape, chunk_shape = [num, *self.metadata["shape"]], [1, *self._chunk_shape]
        if self._is_v2:
            return {**self.metadata, "shape": shape, "chunks": chunk_shape, "dimension_separator": "."}
        fields = {name: value for name, value in self.metadata.items() if name not in ("attributes", "dimension_names")}
        first, *others = self.metadata["codecs"]
        if first["name"] == "sharding_indexed":
            sharding = first["configuration"]
            first = {**first, "configuration": {**sharding, "chunk_shape": [1, *sharding["chunk_shape"]]}}
        return {
            **fields,
            "shape": shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "codecs": [first, *others],
        }


def _form_v2(compressor: Mapping[str, Any] | None) -> Form | None:
    if compressor is None:
        return "bytes"
    return "zstd" if compressor["id"] == "zstd" else None


def _form_v3(codecs: Sequence[Mapping[str, Any]]) -> Form | None:
    if _are_bytes(codecs):
        return "bytes"
    return "zstd" if _are_bytes(codecs, "zstd") else None


def _are_bytes(codecs: Sequence[Mapping[str, Any]], *others: str) -> bool:
    """Whether the codecs are little-endian bytes and, on them, `others`."""
    is_little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
    return [codec["name"] for codec in codecs] == ["bytes", *others] and is_little
