"""Parts of large chunks from a data file: no more pieces than hold them, and no more memory than a few pieces.

A part that lies in one run of bytes is read straight into place, but for the two pieces at its ends, of which others
have the rest. Everything else goes through a window of the file that moves on from piece to piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ckpt_hooks.storage.checksums import PieceTable
from ckpt_hooks.storage.memory import Bytes, aligned_memory

__all__ = ["WINDOW_BYTES", "Slice", "slice_tasks"]

WINDOW_BYTES = 8 << 20  # and up to a piece more at each end; each thread has one
_GAP_BYTES = 1 << 20  # between two runs: from here on there may be pieces in it that nobody needs
_THREADS = 2

Task = Callable[[], None]
ReadPieces = Callable[[Bytes, int, range], None]  # into memory that begins at this byte of the file, checked


class Slice(NamedTuple):
    """Elements at regular distances in a data file.

    Attributes:
      start: where the first one begins, in bytes.
      strides: from one to the next along each axis, in bytes; never negative, and smaller from axis to axis.
      target: the memory that they go to, of the same shape; its dtype says nothing but the size of an element.
    """

    start: int
    strides: tuple[int, ...]
    target: np.ndarray

    @property
    def stop(self) -> int:
        """Where the last one ends."""
        steps = zip(self.target.shape, self.strides, strict=True)
        span: int = sum([(n - 1) * stride for n, stride in steps])
        return self.start + span + int(self.target.itemsize)

    @classmethod
    def of_chunk(cls, start: int, chunk_shape: Sequence[int], part: Sequence[slice], target: np.ndarray) -> Slice:
        """A part of a chunk that begins at `start`, in C order."""
        strides, stride = [], target.itemsize
        for n in reversed(chunk_shape):
            strides.append(stride)
            stride *= n
        strides.reverse()
        first = start + sum([cut.start * step for cut, step in zip(part, strides, strict=True)])
        # NumPy copies the extended dtypes one by one, and none of them that is not aligned.
        size = target.itemsize
        plain = target.view(f"u{size}") if size in (1, 2, 4, 8) else target
        return cls(first, tuple(strides), plain)

    @property
    def is_one_run(self) -> bool:
        """Whether it lies without a gap in the file and in memory."""
        return self.stop - self.start == self.target.nbytes and self.target.flags.c_contiguous

    def copy_from(self, memory: Bytes, begin: int) -> None:
        """From memory that holds the file from `begin` on."""
        target = self.target
        target[...] = np.ndarray(target.shape, target.dtype, memory.data, self.start - begin, self.strides)

    def split(self) -> Iterator[Slice]:
        """Parts of it that fit into a window, without gaps that are worth not to be read; single runs as they are."""
        shape = self.target.shape
        axis = next((axis for axis, n in enumerate(shape) if n > 1), None)
        if axis is None or self.is_one_run:
            yield self
            return
        inner = Slice(0, self.strides[axis + 1 :], self.target[(0,) * (axis + 1) + (...,)])
        has_gaps = self.strides[axis] - inner.stop >= _GAP_BYTES  # those inside are smaller
        if self.stop - self.start <= WINDOW_BYTES and not has_gaps:
            yield self
            return
        unit = 1 if has_gaps else max(1, WINDOW_BYTES // self.strides[axis])
        for begin in range(0, shape[axis], unit):
            part = self.target[(slice(None),) * axis + (slice(begin, begin + unit),)]
            yield from Slice(self.start + begin * self.strides[axis], self.strides, part).split()


class _Box(NamedTuple):
    part: Slice
    pieces: range  # which have something of it


class _Window(NamedTuple):
    pieces: range
    boxes: list[_Box]


def slice_tasks(slices: Sequence[Slice], pieces: PieceTable, read: ReadPieces, path: str) -> list[Task]:
    """What fills the targets from the data file at `path`, for `run_parallel`; no two tasks write to one place.

    Raises CorruptCheckpointError where the pieces leave a hole.
    """
    tasks: list[Task] = []
    boxes: list[_Box] = []
    for part in [part for whole in slices for part in whole.split()]:
        box = _Box(part, pieces.covering(part.start, part.stop, path))
        inner = _inner_pieces(box, pieces) if box.part.is_one_run else range(0)
        if not inner:
            boxes.append(box)
            continue
        begin, end = pieces.starts[inner.start], pieces.ends[inner.stop - 1]
        head, middle, tail = _cut(box.part, begin, end)
        memory = middle.target.view(np.uint8)
        tasks += [functools.partial(read, memory, begin, block) for block in pieces.runs(inner, WINDOW_BYTES)]
        ends = [
            _Box(head, range(box.pieces.start, inner.start)),
            _Box(tail, range(inner.stop, box.pieces.stop)),
        ]
        boxes += [end for end in ends if end.part.target.size]
    windows = _windows(boxes, pieces)
    each = max(1, -(-len(windows) // _THREADS))
    groups = [windows[begin : begin + each] for begin in range(0, len(windows), each)]
    return [functools.partial(_move_windows, group, pieces, read) for group in groups] + tasks


def _inner_pieces(box: _Box, pieces: PieceTable) -> range:
    """Those that have nothing but what is wanted."""
    first, stop = box.pieces.start, box.pieces.stop
    return range(
        first if pieces.starts[first] >= box.part.start else first + 1,
        stop if pieces.ends[stop - 1] <= box.part.stop else stop - 1,
    )


def _cut(run: Slice, begin: int, end: int) -> Iterator[Slice]:
    """What is before, between and behind two places of the file."""
    memory = run.target.reshape(-1).view(np.uint8)
    for start, stop in ((run.start, begin), (begin, end), (end, run.stop)):
        yield Slice(start, (1,), memory[start - run.start : stop - run.start])


def _windows(boxes: Sequence[_Box], pieces: PieceTable) -> list[_Window]:
    """Runs of pieces in the order of the file, each with what is wanted of them."""
    windows: list[_Window] = []
    for box in sorted(boxes, key=lambda box: box.part.start):
        if windows:
            first, stop = windows[-1].pieces.start, max(windows[-1].pieces.stop, box.pieces.stop)
            is_near = box.pieces.start <= windows[-1].pieces.stop
            if is_near and pieces.ends[stop - 1] - pieces.starts[first] <= WINDOW_BYTES:
                windows[-1] = _Window(range(first, stop), [*windows[-1].boxes, box])
                continue
        windows.append(_Window(box.pieces, [box]))
    return windows


def _move_windows(windows: Sequence[_Window], pieces: PieceTable, read: ReadPieces) -> None:
    """Fills what is wanted of each window; what two share is read once."""
    memory = aligned_memory(max(pieces.nbytes(window.pieces) for window in windows))
    held, held_begin = range(0), 0
    for needed, boxes in windows:
        begin = pieces.starts[needed.start]
        kept = range(needed.start, min(held.stop, needed.stop))
        if kept:
            nbytes, at = pieces.nbytes(kept), begin - held_begin
            memory[:nbytes] = memory[at : at + nbytes]
        for block in pieces.runs(range(max(needed.start, held.stop), needed.stop), WINDOW_BYTES):
            read(memory, begin, block)
        for box in boxes:
            box.part.copy_from(memory, begin)
        held, held_begin = needed, begin
