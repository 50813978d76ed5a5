"""Regions of an array, and what each takes of which chunk (no I/O)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Overlap", "Region", "bounding", "overlaps", "shape_of", "slices_of", "whole"]

Region = tuple[tuple[int, int], ...]  # (start, stop) along each axis
Slices = tuple[slice, ...]


class Overlap(NamedTuple):
    """What a region and a chunk have in common.

    Attributes:
      suffix: of the chunk's key, its position in the grid.
      in_chunk: where it is in the chunk.
      in_region: where it is in the region.
    """

    suffix: str
    in_chunk: Slices
    in_region: Slices


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of an array.

    >>> whole((3, 2))
    ((0, 3), (0, 2))
    """
    return tuple((0, n) for n in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    """The shape of a region.

    >>> shape_of(((2, 6), (0, 3)))
    (4, 3)
    """
    return tuple([stop - start for start, stop in region])


def slices_of(region: Region, within: Region | None = None) -> Slices:
    """What takes a region out of its array, or out of another region of it.

    >>> slices_of(((2, 6),), within=((2, 8),))
    (slice(0, 4, None),)
    """
    origins = [0] * len(region) if within is None else [start for start, _ in within]
    return tuple([slice(start - o, stop - o) for (start, stop), o in zip(region, origins, strict=True)])


def bounding(regions: Sequence[Region]) -> Region:
    """The smallest region that has all of these in it.

    >>> bounding([((0, 2), (4, 8)), ((2, 4), (4, 8))])
    ((0, 4), (4, 8))
    """
    return tuple([(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*regions, strict=True)])


@functools.lru_cache(maxsize=4096)
def overlaps(region: Region, chunk_shape: tuple[int, ...]) -> list[Overlap]:
    """The chunks that a region needs, and what of each; most arrays of a state share a few shapes.

    >>> for overlap in overlaps(((3, 9),), (4,)):
    ...     print(overlap.suffix, overlap.in_chunk, overlap.in_region)
    0 (slice(3, 4, None),) (slice(0, 1, None),)
    1 (slice(0, 4, None),) (slice(1, 5, None),)
    2 (slice(0, 1, None),) (slice(5, 6, None),)
    """
    axes = [_axis_overlaps(start, stop, size) for (start, stop), size in zip(region, chunk_shape, strict=True)]
    return [
        Overlap(
            ".".join([str(n) for n, _, _ in cut]) or "0", tuple([c for _, c, _ in cut]), tuple([r for _, _, r in cut])
        )
        for cut in itertools.product(*axes)
    ]


def _axis_overlaps(start: int, stop: int, size: int) -> list[tuple[int, slice, slice]]:
    found = []
    for number in range(start // size, -(-stop // size) if stop > start else start // size):
        begin, end = max(start, number * size), min(stop, (number + 1) * size)
        found.append((number, slice(begin - number * size, end - number * size), slice(begin - start, end - start)))
    return found
