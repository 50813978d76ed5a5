"""The values of a key-value store that another library wrote, many at once: a database (OCDBT), or a file each.

Both are given an opened tensorstore `KvStore` over the item's directory. A read of many values is a few large reads
where the values lie side by side, and it is tensorstore's threads that run them. Its errors are raised as they are.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["DatabaseValues", "FileValues", "Place"]

_GAP_BYTES = 4 << 10  # between two values that one read fetches
_READ_BYTES = 16 << 20

Dump = Callable[[str | None], Any]  # the manifest, or the node at a location, as tensorstore describes it


class Place(NamedTuple):
    """Where a value stands in a data file."""

    file: str
    offset: int
    nbytes: int

    @classmethod
    def parse(cls, location: str) -> Place:
        """
        >>> Place.parse("value:ocdbt.process_0/:d/0d4a:1000:24")
        Place(file='ocdbt.process_0/d/0d4a', offset=1000, nbytes=24)
        """
        _, base, path, offset, nbytes = location.split(":")
        return cls(_unquote(base) + _unquote(path), int(offset), int(nbytes))


@functools.lru_cache(maxsize=4096)
def _unquote(text: str) -> str:
    return urllib.parse.unquote(text)


class DatabaseValues:
    """The values of an OCDBT database, its index read once and whole.

    The index is what `tensorstore.ocdbt.dump` says of it, which has checked the CRC-32C of each node: one call for
    thousands of keys, where a read of a key costs 20 microseconds.
    """

    def __init__(self, files: Any, dump: Dump) -> None:
        self._files = files
        self._index: dict[bytes, bytes | str | Place] = {}  # a value, its location, or that once it has been parsed
        root = dump(None)["versions"][-1]["root"]
        pending = [(b"", root["location"])] if "location" in root else []  # an empty database has no root
        while pending:
            prefix, location = pending.pop()
            for entry in dump(location)["entries"]:
                key = prefix + entry["key"]
                if "location" in entry:
                    pending.append((prefix + entry["subtree_common_prefix"], entry["location"]))
                else:
                    self._index[key] = entry["inline_value"] if "inline_value" in entry else entry["indirect_value"]

    def place(self, key: bytes) -> Place | None:
        """Where a value stands; None where it is in the index itself, or there is none."""
        value = self._find(key)
        return value if isinstance(value, Place) else None

    def read(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """{key: value} of those keys that there are."""
        values: dict[bytes, bytes] = {}
        outside: list[tuple[Place, bytes]] = []
        for key in keys:
            value = self._find(key)
            if isinstance(value, Place):
                outside.append((value, key))
            elif value is not None:
                values[key] = value
        outside.sort()
        reads = [(group, self._start_read(group)) for group in _neighbours(outside)]
        for group, future in reads:
            start, content = group[0][0].offset, _value_of(future)
            if content is None:
                raise ValueError(f"NOT_FOUND: {group[0][0].file} is missing")
            for place, key in group:
                values[key] = content[place.offset - start : place.offset - start + place.nbytes]
        return values

    def _find(self, key: bytes) -> bytes | Place | None:
        value = self._index.get(key)
        if isinstance(value, str):
            value = self._index[key] = Place.parse(value)
        return value

    def _start_read(self, group: Sequence[tuple[Place, bytes]]) -> Any:
        first, last = group[0][0], group[-1][0]
        return self._files.read(first.file, byte_range=slice(first.offset, last.offset + last.nbytes))


class FileValues:
    """Values that are a file each."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def place(self, key: bytes) -> None:
        """Each is a file."""

    def read(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """{key: value} of those keys that there are."""
        futures = {key: self._files.read(key) for key in keys}
        values = ((key, _value_of(future)) for key, future in futures.items())
        return {key: value for key, value in values if value is not None}


def _neighbours(values: Sequence[tuple[Place, bytes]]) -> Iterator[list[tuple[Place, bytes]]]:
    """Runs of values that one read fetches."""
    group: list[tuple[Place, bytes]] = []
    for place, key in values:
        if group:
            first, last = group[0][0], group[-1][0]
            gap = place.offset - (last.offset + last.nbytes)
            is_near = place.file == first.file and 0 <= gap <= _GAP_BYTES
            if not is_near or place.offset + place.nbytes - first.offset > _READ_BYTES:
                yield group
                group = []
        group.append((place, key))
    if group:
        yield group


def _value_of(future: Any) -> bytes | None:
    result = future.result()
    return None if result.state == "missing" else result.value
