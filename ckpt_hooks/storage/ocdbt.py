"""The OCDBT index: bytes to entries and back, with no I/O.

OCDBT is tensorstore's open format (its page "ocdbt Key-Value Store driver" defines every field): a manifest
names one version, the version names a B+tree, and a leaf of the tree maps a key to a value, which stands
either in the node itself or at (file, offset, length). Orbax keeps a zarr array as the keys ``<name>/.zarray``
and ``<name>/<chunk>``.

We write one version, nodes that are not compressed, and data files of our own naming; we read only what we
write. Everybody else's databases are tensorstore's business (`storage.foreign`).

An encoded node, all integers little-endian unless noted, "v" a LEB128 varint, columns stored one after another::

    uint32be 0x0cdb20de | uint64 length | v version=0 | v compression=0 | uint8 height | file table | v entries
    v key_prefix_length[1:] | v key_suffix_length[] | (height>0: v subtree_prefix_length[]) | key_suffix[]
    height=0: v value_length[] | v value_kind[] | v file[] | v offset[] (kind 1 only) | value[] (kind 0 only)
    height>0: v file[] | v offset[] | v length[] | v keys[] | v tree_bytes[] | v indirect_bytes[]
    uint32 crc32c of all before
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.varints import decode_integers, encode_varints, varint

__all__ = [
    "Child",
    "Location",
    "Node",
    "Root",
    "decode_manifest",
    "decode_node",
    "manifest_template",
    "node_prefix",
]

_NODE_MAGIC = 0x0CDB20DE
_MANIFEST_MAGIC = 0x0CDB3A2A
_OUTER_HEADER = struct.Struct("<4sQBB")  # magic (big-endian on disk), length, version, compression
_CRC_NBYTES = 4
MANIFEST_FILE = "manifest.ocdbt"
_OUTSIDE = 1  # the kind of a value that stands in a data file
MAX_INLINE_VALUE_BYTES = 1024  # Orbax's setting, recorded in the manifest
_MAX_DECODED_NODE_BYTES = 100_000_000  # likewise

_UUID_NBYTES = 16
MANIFEST_UUID = slice(_OUTER_HEADER.size, _OUTER_HEADER.size + _UUID_NBYTES)
MANIFEST_TIME = slice(-9, -1)

Location = tuple[str, int, int]  # of a value: its data file, offset and length


@dataclasses.dataclass(frozen=True)
class Child:
    """A node below an interior node, or the root below the manifest."""

    first_key: bytes
    file: str
    offset: int
    nbytes: int
    num_keys: int
    tree_nbytes: int
    indirect_nbytes: int


@dataclasses.dataclass(frozen=True)
class Root:
    """What the manifest says of its one version; a database without keys has no root node."""

    child: Child | None
    height: int


_CONFIG = b"".join(
    (
        varint(0),  # one manifest file
        varint(MAX_INLINE_VALUE_BYTES),
        varint(_MAX_DECODED_NODE_BYTES),
        bytes([4]),  # version_tree_arity_log2
        varint(1),  # nodes added later may be zstd; ours say of themselves that they are not
        struct.pack("<i", 0),
    )
)
_NOWHERE = 2**64 - 1
_MISSING = Child(b"", "", _NOWHERE, _NOWHERE, 0, 0, 0)  # how tensorstore writes that there is no root


class Node(NamedTuple):
    """A decoded node: the values of a leaf by their keys, or the children of an interior node.

    A value is bytes where it stands in the node itself.
    """

    values: dict[bytes, bytes | Location]
    children: tuple[Child, ...] = ()


# ------------------------------------------------------------------ keys and files


def shared_prefix_lengths(keys: Sequence[bytes]) -> list[int]:
    """How many leading bytes each key (from the second) shares with the one before it.

    >>> shared_prefix_lengths([b"a/.zarray", b"a/0", b"b"])
    [2, 0]
    """
    if len(keys) < 2:
        return []
    lengths = np.array([len(key) for key in keys])
    table = np.array(keys, dtype=f"S{max(1, lengths.max())}")
    rows = table.view(np.uint8).reshape(len(keys), -1)
    differ = rows[1:] != rows[:-1]
    first = np.where(differ.any(axis=1), differ.argmax(axis=1), rows.shape[1])
    return [int(n) for n in np.minimum(first, np.minimum(lengths[1:], lengths[:-1]))]


def _file_table(files: Sequence[str]) -> bytes:
    # Base paths stay empty: every file is named relative to the database itself.
    paths = [file.encode() for file in files]
    shared = [0, *shared_prefix_lengths(paths)] if paths else []
    suffixes = [path[n:] for path, n in zip(paths, shared, strict=True)]
    return b"".join(
        (
            varint(len(paths)),
            encode_varints(shared[1:]),
            encode_varints([len(s) for s in suffixes]),
            bytes(len(paths)),
            *suffixes,
        )
    )


def _keys_columns(keys: Sequence[bytes], *, interior: bool) -> bytes:
    shared = [0, *shared_prefix_lengths(keys)] if keys else []
    suffixes = [key[n:] for key, n in zip(keys, shared, strict=True)]
    subtree = bytes(len(keys)) if interior else b""  # no prefix is cut from the keys below
    return b"".join((encode_varints(shared[1:]), encode_varints([len(s) for s in suffixes]), subtree, *suffixes))


# ------------------------------------------------------------------ encoding


def node_prefix(
    keys: Sequence[bytes],
    value_nbytes: Sequence[int],
    files: Sequence[str],
    are_outside: Sequence[bool],
    outside: Sequence[tuple[int, int]],
) -> bytes:
    """A leaf node without the inline values that follow and without its length and checksum.

    `outside` has (file number, offset) for each value out of line, in the order of the keys.
    All of it depends only on the structure of a state, so it is made once (`storage.layout`).
    """
    return b"".join(
        (
            b"\0",  # height
            _file_table(files),
            varint(len(keys)),
            _keys_columns(keys, interior=False),
            encode_varints(value_nbytes),
            bytes(are_outside),
            encode_varints([file for file, _ in outside]),
            encode_varints([offset for _, offset in outside]),
        )
    )


def interior_prefix(height: int, children: Sequence[Child]) -> bytes:
    """An interior node over `children`, without its length and checksum."""
    files = sorted({child.file for child in children})
    return b"".join(
        (
            bytes([height]),
            _file_table(files),
            varint(len(children)),
            _keys_columns([child.first_key for child in children], interior=True),
            encode_varints([files.index(child.file) for child in children]),
            encode_varints([child.offset for child in children]),
            encode_varints([child.nbytes for child in children]),
            encode_varints([child.num_keys for child in children]),
            encode_varints([child.tree_nbytes for child in children]),
            encode_varints([child.indirect_nbytes for child in children]),
        )
    )


def node_nbytes(body_nbytes: int) -> int:
    """The size of an encoded node whose body has `body_nbytes`."""
    return _OUTER_HEADER.size + body_nbytes + _CRC_NBYTES


def node_header(body_nbytes: int) -> bytes:
    """What stands before the body of a node, of which the CRC-32C of header and body comes last."""
    return _OUTER_HEADER.pack(_NODE_MAGIC.to_bytes(4, "big"), node_nbytes(body_nbytes), 0, 0)


def manifest_template(root: Root) -> bytes:
    """The manifest of a database with one version, but for its uuid, its commit time and its checksum.

    The uuid belongs at MANIFEST_UUID, the commit time, a uint64le in nanoseconds, at MANIFEST_TIME, and the
    CRC-32C behind it all; everything else depends only on the structure.
    """
    child = root.child or _MISSING
    version = b"".join(
        (
            varint(1),  # versions
            varint(1),  # generation
            bytes([root.height]),
            varint(0),  # file number
            varint(child.offset),
            varint(child.nbytes),
            varint(child.num_keys),
            varint(child.tree_nbytes),
            varint(child.indirect_nbytes),
            bytes(8),  # commit time
            varint(0),  # no older versions
        )
    )
    return _with_header(_MANIFEST_MAGIC, (bytes(_UUID_NBYTES), _CONFIG, _file_table([child.file]), version))


def _with_header(magic: int, body: Sequence[bytes]) -> bytes:
    length = _OUTER_HEADER.size + sum(len(part) for part in body) + _CRC_NBYTES
    return b"".join((_OUTER_HEADER.pack(magic.to_bytes(4, "big"), length, 0, 0), *body))


# ------------------------------------------------------------------ decoding


def decode_manifest(encoded: bytes) -> Root:
    """The root of the newest version. Raises CorruptCheckpointError on anything we did not write."""
    body = _open(_MANIFEST_MAGIC, encoded, "manifest")
    reader = _Reader(body)
    reader.skip(_UUID_NBYTES)
    if reader.skip(len(_CONFIG)) != _CONFIG:
        raise CorruptCheckpointError("manifest has a configuration that ours never have")
    files = reader.file_table()
    num_versions, _ = reader.column(2)
    if num_versions != 1:
        raise CorruptCheckpointError(f"manifest has {num_versions} versions, expected 1")
    height = reader.byte()
    file, offset, *rest = reader.column(6)
    return Root(None if offset == _NOWHERE else Child(b"", files[file], offset, *rest), height)


def decode_node(encoded: bytes | memoryview) -> Node:
    """The values or the children of a node. Raises CorruptCheckpointError when it does not verify."""
    reader = _Reader(_open(_NODE_MAGIC, encoded, "node"))
    height = reader.byte()
    files = reader.file_table()
    (num,) = reader.column(1)
    keys = reader.keys(num, interior=height > 0)
    if height == 0:
        return Node(dict(zip(keys, reader.values(num, files), strict=True)))
    columns = [reader.column(num) for _ in range(6)]
    rows = zip(keys, *columns, strict=True)
    return Node({}, tuple(Child(key, files[file], *rest) for key, file, *rest in rows))


def _open(magic: int, encoded: bytes | memoryview, what: str) -> bytes:
    view = memoryview(encoded)
    if len(view) < _OUTER_HEADER.size + _CRC_NBYTES:
        raise CorruptCheckpointError(f"index {what} is cut off at {len(view)} bytes")
    found_magic, length, version, compression = _OUTER_HEADER.unpack_from(view)
    if int.from_bytes(found_magic, "big") != magic or length != len(view) or version != 0:
        raise CorruptCheckpointError(f"index {what} has a damaged header")
    (crc,) = struct.unpack_from("<I", view, length - _CRC_NBYTES)
    covered = bytes(view[:-_CRC_NBYTES])
    if google_crc32c.value(covered) != crc:
        raise CorruptCheckpointError(f"index {what} fails its CRC-32C")
    if compression != 0:
        raise CorruptCheckpointError(f"index {what} is compressed; ours never are")
    return covered[_OUTER_HEADER.size :]


class _Reader:
    """A position in the body of a node."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def skip(self, nbytes: int) -> bytes:
        part = self._body[self._at : self._at + nbytes]
        if len(part) < nbytes:
            raise CorruptCheckpointError("index node is cut off")
        self._at += nbytes
        return part

    def byte(self) -> int:
        return self.skip(1)[0]

    def column(self, num: int) -> list[int]:
        values, self._at = decode_integers(self._body, self._at, num)
        return values

    def file_table(self) -> list[str]:
        (num,) = self.column(1)
        shared, lengths = self._key_lengths(num)
        self.column(num)  # base path lengths: where a path is split does not change it
        return [path.decode() for path in self._unshare(shared, lengths)]

    def keys(self, num: int, *, interior: bool) -> list[bytes]:
        shared, lengths = self._key_lengths(num)
        if interior and any(self.column(num)):
            raise CorruptCheckpointError("index cuts prefixes from keys; ours never do")
        return self._unshare(shared, lengths)

    def _key_lengths(self, num: int) -> tuple[list[int], list[int]]:
        """(how much each key shares with the one before it, how long the rest of each is)."""
        both = [0, *self.column(2 * num - 1)] if num else []
        return both[:num], both[num:]

    def _unshare(self, shared: list[int], lengths: list[int]) -> list[bytes]:
        suffixes, at = self.skip(sum(lengths)), 0
        keys = []
        key = b""
        for keep, length in zip(shared, lengths, strict=True):
            key = key[:keep] + suffixes[at : at + length]
            at += length
            keys.append(key)
        return keys

    def values(self, num: int, files: list[str]) -> list[bytes | Location]:
        lengths, kinds = self.column(num), self.column(num)
        outside = [place for place, kind in enumerate(kinds) if kind == _OUTSIDE]
        numbers, offsets = self.column(len(outside)), self.column(len(outside))
        inside = [0 if kind == _OUTSIDE else length for kind, length in zip(kinds, lengths, strict=True)]
        content = self.skip(sum(inside))
        ends = itertools.accumulate(inside, initial=0)
        values: list[bytes | Location] = [content[start:end] for start, end in itertools.pairwise(ends)]
        for place, number, offset in zip(outside, numbers, offsets, strict=True):
            values[place] = files[number], offset, lengths[place]
        return values
