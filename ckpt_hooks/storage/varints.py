"""LEB128 integers, as OCDBT stores its columns: seven bits a byte, the lowest first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckpt_hooks.errors import CorruptCheckpointError

__all__ = ["decode_integers", "encode_varints", "varint"]

U64 = npt.NDArray[np.uint64]

_FEW = 32  # integers, for which a dozen operations on arrays take longer than a Python step for each of them


def varint(value: int) -> bytes:
    """LEB128.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_varints(values: Sequence[int] | U64) -> bytes:
    """A column of LEB128 integers, without a Python step per integer.

    >>> encode_varints([1, 300]).hex()
    '01ac02'
    """
    column = np.asarray(values, dtype=np.uint64)
    if column.size == 0:
        return b""
    # groups[i, k] is the k-th 7-bit group of value i; ten groups hold 64 bits.
    shifts = np.arange(0, 70, 7, dtype=np.uint64)
    groups = np.where(shifts < 64, column[:, None] >> np.minimum(shifts, 63), 0).astype(np.uint8) & 0x7F
    groups[:, 9] = (column >> np.uint64(63)).astype(np.uint8)
    used = np.maximum(1, 10 - np.argmax(groups[:, ::-1] != 0, axis=1))
    used[~groups.any(axis=1)] = 1
    position = np.arange(10)
    groups[position < used[:, None] - 1] |= 0x80
    return bytes(groups[position < used[:, None]].tobytes())


def decode_integers(buffer: bytes, start: int, num: int) -> tuple[list[int], int]:
    """`num` LEB128 integers from `start`, and the position after them.

    >>> decode_integers(bytes.fromhex("01ac02"), 0, 2)
    ([1, 300], 3)
    """
    head = buffer[start : start + num]
    if head.isascii() and len(head) == num:  # each is a byte, as those of most columns are
        return list(head), start + num
    return _decode_few(buffer, start, num) if num <= _FEW else _decode_many(buffer, start, num)


def _decode_few(buffer: bytes, start: int, num: int) -> tuple[list[int], int]:
    values: list[int] = []
    value = shift = 0
    for end, byte in enumerate(buffer[start : start + 10 * num], start + 1):
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >> 64:
                raise CorruptCheckpointError(_TOO_LONG)
            values.append(value)
            if len(values) == num:
                return values, end
            value = shift = 0
    raise CorruptCheckpointError(_CUT_OFF)


def _decode_many(buffer: bytes, start: int, num: int) -> tuple[list[int], int]:
    window = np.frombuffer(buffer, np.uint8)[start : start + 10 * num]
    ends = np.flatnonzero(window < 0x80)[:num]
    if len(ends) < num:
        raise CorruptCheckpointError(_CUT_OFF)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(np.max(lengths))
    if longest > 10 or (window[ends[lengths == 10]] > 1).any():  # nine groups hold 63 bits
        raise CorruptCheckpointError(_TOO_LONG)
    values = np.zeros(num, np.uint64)
    for k in range(longest):
        has = lengths > k
        group = (window[starts[has] + k] & 0x7F).astype(np.uint64)
        values[has] |= group << np.uint64(7 * k)
    return values.tolist(), start + int(ends[-1]) + 1


_CUT_OFF = "index node ends in the middle of an integer"
_TOO_LONG = "index node holds an integer of more than 64 bits"
