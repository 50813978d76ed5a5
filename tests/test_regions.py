"""Regions of arrays that are stored in chunks, by one process or several: what is read of them, and what it is."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import checksums, layout, reader, slices, writer
from ckpt_hooks.storage.checksums import ArrayChecksums, PieceTable
from ckpt_hooks.storage.memory import aligned_memory, host_bytes
from ckpt_hooks.storage.reader import Database
from ckpt_hooks.storage.regions import Region, shape_of, slices_of, whole
from ckpt_hooks.testing import damage

MIB = 1 << 20


def write_chunked(
    directory: Path,
    arrays: Mapping[str, tuple[np.ndarray, tuple[int, ...]]],
    processes: int = 1,
    forgotten: tuple[int, ...] | None = None,
) -> str:
    """An item with these arrays, in chunks of these shapes that the processes own in turn; one chunk may be lacking."""
    specs, sources = [], [list[Any]() for _ in range(processes)]
    for name, (array, chunk_shape) in arrays.items():
        counts = [-(-n // c) for n, c in zip(array.shape, chunk_shape, strict=True)]
        grid = tuple(place for place in itertools.product(*map(range, counts)) if place != forgotten)
        owners = tuple(number * processes // len(grid) for number in range(len(grid)))
        specs.append(layout.ArraySpec(name, array.shape, array.dtype, chunk_shape, grid, owners))
        for position, owner in zip(grid, owners, strict=True):
            chunk = np.zeros(chunk_shape, array.dtype)
            cut = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, chunk_shape, strict=True))
            part = array[cut]
            chunk[tuple(slice(n) for n in part.shape)] = part
            sources[owner].append(host_bytes(chunk))
    (directory / "d").mkdir(parents=True)
    for process in range(processes):
        plan = layout.Layout(specs, processes, only=process)  # as each process makes it, by itself
        files = writer.ArrayWriter(plan, process, writer.Sources(sources[process])).write(str(directory))
        for name, content in files.items():
            (directory / name).write_bytes(content)
    return str(directory)


class Reads:
    """What was read of data files: how many bytes, and from which files."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.files: set[str] = set()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    counted, preadv = Reads(), os.preadv

    def counting(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        counted.files.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        got = preadv(descriptor, buffers, offset)
        counted.nbytes += got
        return got

    monkeypatch.setattr(os, "preadv", counting)
    return counted


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(np.arange(math.prod(shape)) % 251, dtype).reshape(shape)


# ------------------------------------------------------------------ what comes back


@st.composite
def cut_arrays(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], list[Region]]:
    """An array, the shape of its chunks, and regions of it."""
    dtypes = [np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.complex128), np.dtype(ml_dtypes.bfloat16)]
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    chunk_shape = tuple(draw(st.integers(1, n)) for n in shape)
    if math.prod(-(-n // c) for n, c in zip(shape, chunk_shape, strict=True)) > 300:
        chunk_shape = shape
    regions = []
    for _ in range(draw(st.integers(1, 4))):
        ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        regions.append(tuple((start, stop) for start, stop in ends))
    return numbers(shape, draw(st.sampled_from(dtypes))), chunk_shape, regions


@settings(max_examples=150, deadline=None)
@given(cut=cut_arrays(), processes=st.integers(1, 3), is_large=st.booleans(), data=st.data())
def test_every_region_is_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, cut: Any, processes: int, is_large: bool, data: st.DataObject
) -> None:
    """Any regions of an array in any chunks, small or of many pieces, come back bit-equal, as does all of it."""
    array, chunk_shape, regions = cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SMALL_CHUNK_BYTES", 200)
        patch.setattr(layout, "PIECE_BYTES", 256)
        patch.setattr(slices, "_GAP_BYTES", 256)
        patch.setattr(slices, "WINDOW_BYTES", data.draw(st.sampled_from([100, 700, 5000])))
        if is_large:
            patch.setattr("ckpt_hooks.storage.reader._LARGE_BYTES", 0)
            patch.setattr("ckpt_hooks.storage.ocdbt.MAX_INLINE_VALUE_BYTES", 0)
        directory = write_chunked(tmp_path_factory.mktemp("item") / "i", {"a": (array, chunk_shape)}, processes)
        database = Database(directory)
        (found,) = database.read_regions({"a": regions}).values()
        for region, part in zip(regions, found, strict=True):
            assert part.tobytes() == np.ascontiguousarray(array[slices_of(region)]).tobytes()
            assert (part.shape, part.dtype) == (shape_of(region), array.dtype)
        assert database.read(["a"])["a"].tobytes() == array.tobytes()


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("axis", [0, 1])
def test_a_region_of_one_process_is_read_from_its_file_alone(tmp_path: Path, reads: Reads, axis: int) -> None:
    """Of what four processes wrote, a process that needs what one of them had reads its file and its table only."""
    array = numbers((2048, 2048))
    chunk_shape = (512, 2048) if axis == 0 else (2048, 512)
    directory = write_chunked(tmp_path / "i", {"a": (array, chunk_shape)}, 4)
    for process in (1, 3):
        (tmp_path / "i" / f"_ARRAY_CHECKSUMS.{process}").unlink()  # nobody needs it
    region = tuple((2 * n, 3 * n) if axis == number else (0, 2048) for number, n in enumerate((512, 512)))
    database = Database(directory)
    reads.nbytes, reads.files = 0, set()
    ((part,),) = database.read_regions({"a": [region]}).values()
    np.testing.assert_array_equal(part, array[slices_of(region)])
    assert reads.nbytes == array.nbytes / 4
    assert reads.files == {f"{2:032x}"}
    with pytest.raises(CorruptCheckpointError, match=r"_ARRAY_CHECKSUMS\.1 is missing"):
        database.read_regions({"a": [whole((2048, 2048))]})


def test_rows_of_a_large_chunk_are_read_without_the_others(tmp_path: Path, reads: Reads) -> None:
    """Of a chunk of 16 MiB, a process that needs an eighth reads that and no more than two pieces of 1 MiB."""
    array = numbers((1000, 4200))
    database = Database(write_chunked(tmp_path / "i", {"a": (array, (1000, 4200))}))
    reads.nbytes = 0
    region = ((125, 250), (0, 4200))
    ((part,),) = database.read_regions({"a": [region]}).values()
    np.testing.assert_array_equal(part, array[slices_of(region)])
    assert array.nbytes / 8 <= reads.nbytes <= array.nbytes / 8 + 2 * MIB


def test_what_lies_in_gaps_is_not_read(tmp_path: Path, reads: Reads) -> None:
    """Columns that are megabytes apart are read one by one."""
    array = numbers((3, 4 * MIB // 4))
    database = Database(write_chunked(tmp_path / "i", {"a": (array, array.shape)}))
    reads.nbytes = 0
    region = ((0, 3), (0, MIB // 4))
    ((part,),) = database.read_regions({"a": [region]}).values()
    np.testing.assert_array_equal(part, array[slices_of(region)])
    assert reads.nbytes == 3 * MIB


def test_what_two_regions_share_is_read_once(tmp_path: Path, reads: Reads) -> None:
    """The columns of several devices of one process come out of the same pieces, each read once (or one twice)."""
    array = numbers((4096, 2048))
    database = Database(write_chunked(tmp_path / "i", {"a": (array, array.shape)}))
    reads.nbytes = 0
    regions = [((0, 4096), (512 * n, 512 * (n + 1))) for n in range(4)]
    (parts,) = database.read_regions({"a": regions}).values()
    for region, part in zip(regions, parts, strict=True):
        np.testing.assert_array_equal(part, array[slices_of(region)])
    assert array.nbytes <= reads.nbytes <= array.nbytes + MIB  # at the seam of the two threads


def test_a_chunk_that_the_index_forgot_is_named(tmp_path: Path) -> None:
    """An array that is not all there is damage, and never zeros in its place."""
    directory = write_chunked(tmp_path / "i", {"a": (numbers((64, 64)), (32, 64))}, forgotten=(1, 0))
    database = Database(directory)
    ((part,),) = database.read_regions({"a": [((0, 32), (0, 64))]}).values()
    np.testing.assert_array_equal(part, numbers((64, 64))[:32])
    with pytest.raises(CorruptCheckpointError, match="array 'a' lacks chunk"):
        database.read(["a"])


def test_a_data_file_that_no_table_covers_is_not_read(tmp_path: Path) -> None:
    """An index of two processes beside the table of one: what cannot be checked is damage."""
    directory = write_chunked(tmp_path / "i", {"a": (numbers((64, 64)), (32, 64))}, 2)
    table = tmp_path / "i" / "_ARRAY_CHECKSUMS"
    alone = dataclasses.replace(ArrayChecksums.decode(table.read_bytes()), num_tables=1)
    table.write_bytes(alone.encode())
    with pytest.raises(CorruptCheckpointError, match="which no table knows"):
        Database(directory).read(["a"])


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    """Damage in rows that are not asked for does not matter; in one that is, it is found."""
    array = numbers((1024, 4096))
    directory = write_chunked(tmp_path / "i", {"a": (array, array.shape)})
    with damage.flip_bit(tmp_path / "i" / layout.data_file_name(0), 8 * (9 * MIB)):
        database = Database(directory)
        database.read_regions({"a": [((0, 512), (0, 4096))]})
        for region in (((512, 1024), (0, 4096)), ((0, 1024), (0, 100))):
            with pytest.raises(CorruptCheckpointError, match="are not what was saved"):
                database.read_regions({"a": [region]})


def test_the_files_of_a_process_from_another_step_are_noticed(tmp_path: Path) -> None:
    """A data file that was swapped in with its own table verifies by itself, and is not what this checkpoint names."""
    for step in (1, 2):
        directory = tmp_path / str(step) / "params"
        write_chunked(directory, {"a": (numbers((512, 512)) + np.float32(step), (256, 512))}, 2)
        (directory.parent / checksums.FILE).write_bytes(
            checksums.FileChecksums.of_directory(str(directory.parent)).encode()
        )
    theirs, ours = tmp_path / "1" / "params", tmp_path / "2" / "params"
    for name in (layout.data_file_name(1), "_ARRAY_CHECKSUMS.1"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(CorruptCheckpointError, match=r"_ARRAY_CHECKSUMS\.1: checksum"):
        Database(str(ours)).read(["a"])
    Database(str(ours)).read_regions({"a": [((0, 256), (0, 512))]})  # which is all in the first process's file


@pytest.mark.parametrize(("start", "end"), [(0, 5), (5, 25), (15, 18), (10, 20), (20, 41), (45, 50)])
def test_bytes_without_a_checksum_are_an_error(start: int, end: int) -> None:
    """Before, between and behind the pieces that were summed; what they cover whole is found."""
    table = PieceTable(np.array([(5, 10, 1), (20, 10, 2), (30, 10, 3)], checksums.PIECE))
    assert (table.covering(5, 15, "data"), table.covering(21, 40, "data")) == (range(1), range(1, 3))
    with pytest.raises(CorruptCheckpointError, match=f"data: no checksum covers the bytes from {start} to {end}"):
        table.covering(start, end, "data")


@pytest.mark.parametrize("chunk_shape", [(4096, 4096), (512, 4096), (64, 4096), (4096, 4)])
def test_memory_is_bounded(tmp_path: Path, chunk_shape: tuple[int, int]) -> None:
    """Beside the region itself, no more is held than the bound, however the array is cut."""
    array = numbers((4096, 4096))
    database = Database(write_chunked(tmp_path / "i", {"a": (array, chunk_shape)}))
    del array
    held: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def counting(nbytes: int) -> Any:
            held.append(nbytes)
            return aligned_memory(nbytes)

        patch.setattr(slices, "aligned_memory", counting)
        patch.setattr(reader, "aligned_memory", counting)
        region = ((0, 4096), (0, 1024))
        ((part,),) = database.read_regions({"a": [region]}).values()
    assert part.nbytes == 16 * MIB
    assert max(held) <= 34 * MIB
