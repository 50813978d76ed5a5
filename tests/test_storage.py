"""The storage layer by itself: index, layout, writer, reader, checksums, commit."""

from __future__ import annotations

import errno
import itertools
import linecache
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_hooks import threads
from ckpt_hooks.errors import CorruptCheckpointError, DiskFullError, RunLockedError
from ckpt_hooks.storage import checksums, commit, layout, lookup, ocdbt, varints, writer
from ckpt_hooks.storage.foreign import ForeignArrays
from ckpt_hooks.storage.memory import host_bytes
from ckpt_hooks.storage.reader import Database
from ckpt_hooks.temporary_paths import require_free_bytes
from ckpt_hooks.threads import run_parallel
from tests.faulty import fail

Arrays = dict[str, np.ndarray]


def write_item(directory: Path, arrays: Arrays) -> None:
    """An item with these arrays, each in one chunk."""
    (directory / "d").mkdir(parents=True)
    specs = [layout.ArraySpec.whole(name, array.shape, array.dtype) for name, array in arrays.items()]
    sources = writer.Sources([host_bytes(array) for array in arrays.values() if array.size])
    files = writer.ArrayWriter(layout.Layout(specs), 0, sources).write(str(directory))
    for name, content in files.items():
        (directory / name).write_bytes(content)


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------ integers and keys


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_a_column_of_integers_is_that_of_each_integer(values: list[int]) -> None:
    """A column is encoded as its integers are one by one, and decoded to what it was."""
    encoded = varints.encode_varints(values)
    assert encoded == b"".join(map(varints.varint, values))
    assert varints.decode_integers(b"\x80" + encoded + b"\x01", 1, len(values)) == (values, 1 + len(encoded))


@pytest.mark.parametrize("num", [2, 3, 100])
@pytest.mark.parametrize(
    ("last", "told"),
    [
        (b"", "in the middle of"),
        (b"\x80", "in the middle of"),
        (b"\xff" * 10 + b"\1", "than 64 bits"),
        (b"\xff" * 9 + b"\2", "than 64 bits"),
    ],
)
def test_integers_that_end_nowhere_are_an_error(num: int, last: bytes, told: str) -> None:
    """Of few, which are read one by one, and of many, which are read together."""
    encoded = varints.encode_varints(range(num - 1)) + last
    with pytest.raises(CorruptCheckpointError, match=told):
        varints.decode_integers(encoded, 0, num)


@given(st.lists(st.binary(max_size=6).filter(lambda key: b"\0" not in key), unique=True).map(sorted))
def test_shared_prefixes_are_counted(keys: list[bytes]) -> None:
    """The common prefix of neighbouring keys is counted to the byte."""
    expected = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for one, other in itertools.pairwise(keys)
    ]
    assert ocdbt.shared_prefix_lengths(keys) == expected


# ------------------------------------------------------------------ items

DTYPES = [np.dtype(name) for name in ("bool", "int8", "uint16", "int64", "float16", "float32", "complex128", ">f4")] + [
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn),
    np.dtype(ml_dtypes.int4),
]


@st.composite
def array_sets(draw: st.DrawFn) -> Arrays:
    names = draw(st.lists(st.text("ab./é", min_size=1, max_size=5), unique=True, max_size=6))
    arrays = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 3, 40]), max_size=3)))
        count = int(np.prod(shape))
        values = np.arange(count) % (7 if dtype.name == "int4" else 100)
        arrays[name] = np.asarray(values.astype(dtype)).reshape(shape)
    return arrays


@settings(max_examples=40, deadline=None)
@given(arrays=array_sets())
def test_arrays_come_back(tmp_path_factory: pytest.TempPathFactory, arrays: Arrays) -> None:
    """Arrays of any name, dtype and shape come back bit-equal, through our reader and through tensorstore."""
    directory = tmp_path_factory.mktemp("item")
    write_item(directory / "i", arrays)
    assert_equal(Database(str(directory / "i")).read(arrays), arrays)
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    assert_equal(ForeignArrays(str(directory / "i"), arrays, use_ocdbt=True, use_zarr3=False).read(arrays), native)


@pytest.mark.parametrize("entries", [2, 3, 7])
def test_an_index_of_several_levels_is_read_by_us_and_by_tensorstore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """An index that does not fit into one node becomes a tree, for both readers."""
    monkeypatch.setattr(layout, "_NODE_ENTRIES", entries)
    arrays = {f"layer{i}": np.full((20, 20), i, np.float32) for i in range(12)} | {"small": np.arange(3)}
    write_item(tmp_path / "i", arrays)
    assert_equal(Database(str(tmp_path / "i")).read(arrays), arrays)
    assert_equal(ForeignArrays(str(tmp_path / "i"), arrays, use_ocdbt=True, use_zarr3=False).read(arrays), arrays)


def test_large_arrays_are_cut_into_blocks_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array larger than a block is written and checked in parts and comes back whole."""
    monkeypatch.setattr(layout, "SMALL_CHUNK_BYTES", 500)
    monkeypatch.setattr(layout, "PIECE_BYTES", 1000)
    monkeypatch.setattr(layout, "BLOCK_BYTES", 3000)
    arrays = {"big": np.arange(5000, dtype=np.int32), "next": np.arange(600, dtype=np.int32)}
    write_item(tmp_path / "i", arrays)
    table = checksums.ArrayChecksums.decode((tmp_path / "i" / checksums.ARRAY_FILE).read_bytes())
    ((pieces, _),) = table.files.values()
    assert len(pieces) >= 20
    assert_equal(Database(str(tmp_path / "i")).read(arrays), arrays)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Damage in an array that is not asked for does not matter to those that are."""
    arrays = {"a": np.arange(10_000), "b": np.arange(1000)}
    write_item(tmp_path / "i", arrays)
    data = tmp_path / "i" / layout.data_file_name(0)
    content = bytearray(data.read_bytes())
    content[10] ^= 1  # the first chunk is that of `a`
    data.write_bytes(content)
    assert_equal(Database(str(tmp_path / "i")).read(["b"]), {"b": arrays["b"]})
    with pytest.raises(CorruptCheckpointError, match="bytes 0 to 80000 are not what was saved"):
        Database(str(tmp_path / "i")).read(["a"])


def test_an_array_that_the_index_lacks_is_damage(tmp_path: Path) -> None:
    """So that a restore falls back to an older checkpoint, which it does for no other kind of error."""
    write_item(tmp_path / "i", {"a": np.arange(10_000)})
    with pytest.raises(CorruptCheckpointError, match="no array 'b'"):
        Database(str(tmp_path / "i")).info("b")


def sealed(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))


def node(body: bytes, compression: int = 0) -> bytes:
    header = bytearray(ocdbt.node_header(len(body)))
    header[-1] = compression
    return sealed(bytes(header) + body)


def test_an_index_that_verifies_and_is_not_ours_is_refused() -> None:
    """Whoever wrote it: a node that is compressed, or ends in the middle of its keys, has no values that we know."""
    body = ocdbt.node_prefix([b"a/.zarray", b"a/0"], [5, 0], [], [False, False], []) + b"value"
    assert ocdbt.decode_node(node(body)).values == {b"a/.zarray": b"value", b"a/0": b""}
    with pytest.raises(CorruptCheckpointError, match="node is compressed"):
        ocdbt.decode_node(node(body, compression=1))
    keys = body.index(b"a/.zarray")
    with pytest.raises(CorruptCheckpointError, match="node is cut off"):
        ocdbt.decode_node(node(body[: keys + 5]))


def test_a_manifest_of_several_versions_is_not_ours() -> None:
    """We write one version of a database; which of two would be the saved one, nobody could tell."""
    child = ocdbt.Child(b"", "d/0", 10, 100, 2, 0, 0)
    manifest = ocdbt.manifest_template(ocdbt.Root(child, 0))
    assert ocdbt.decode_manifest(sealed(manifest)) == ocdbt.Root(child, 0)
    behind = 1 + 1 + 1 + 5 + 1 + 8  # generation, height, file, the child's numbers, no older versions, commit time
    at = len(manifest) - behind - 1
    assert manifest[at] == 1
    with pytest.raises(CorruptCheckpointError, match="2 versions"):
        ocdbt.decode_manifest(sealed(manifest[:at] + b"\2" + manifest[at + 1 :]))


@pytest.mark.parametrize(("saved", "shape"), [(2000, 1000), (2000, 3000), (2 << 20, 1500000), (2 << 20, 3000000)])
def test_a_chunk_that_is_not_as_long_as_its_array_is_refused(tmp_path: Path, saved: int, shape: int) -> None:
    """An index may verify and contradict itself: the array, or a part of a large one, would not be what was saved."""
    write_item(tmp_path / "i", {"w": np.zeros(saved, np.uint8)})
    data = tmp_path / "i" / layout.data_file_name(0)
    content = data.read_bytes().replace(b"[%d]" % saved, b"[%d]" % shape)
    start = content.rindex(ocdbt.node_header(0)[:4])
    (nbytes,) = struct.unpack_from("<Q", content, start + 4)
    data.write_bytes(content[:start] + sealed(content[start : start + nbytes - 4]) + content[start + nbytes :])
    database = Database(str(tmp_path / "i"), verify=False)
    assert database.info("w").shape == (shape,)
    for read in (lambda: database.read(["w"]), lambda: database.read_regions({"w": [((100, 200),)]})):
        with pytest.raises(CorruptCheckpointError, match="a length that is not their array's"):
            read()


def test_every_flipped_bit_of_an_item_is_found_or_harmless(tmp_path: Path) -> None:
    """Whatever single bit flips in any file of an item, no wrong value comes back."""
    arrays: Arrays = {"w": np.arange(300, dtype=np.float32), "s": np.array(2.5, np.float32)}
    write_item(tmp_path / "i", arrays)
    detected = harmless = 0
    for path in sorted(p for p in (tmp_path / "i").rglob("*") if p.is_file()):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 5):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = Database(str(tmp_path / "i")).read(arrays)
            except CorruptCheckpointError:
                detected += 1
            else:
                assert_equal(found, arrays)
                harmless += 1
        path.write_bytes(content)
    assert detected > 1000
    assert harmless < detected / 2, "padding, the uuid and the commit time are all that may flip"


@pytest.mark.parametrize("name", [layout.data_file_name(0), "manifest.ocdbt", checksums.ARRAY_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_files_of_an_item_are_named(tmp_path: Path, name: str, damage: str) -> None:
    """A file that is missing, empty or cut off is an error, never a wrong value."""
    arrays = {"w": np.arange(3000)}
    write_item(tmp_path / "i", arrays)
    path = tmp_path / "i" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(CorruptCheckpointError):
        Database(str(tmp_path / "i")).read(arrays)


def test_without_verification_nothing_is_checked(tmp_path: Path) -> None:
    """The switch that turns checking off really does, and only in the array bytes."""
    write_item(tmp_path / "i", {"w": np.zeros(2000, np.uint8)})
    data = tmp_path / "i" / layout.data_file_name(0)
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    data.write_bytes(content)
    assert Database(str(tmp_path / "i"), verify=False).read(["w"])["w"].sum() == 1


@pytest.mark.parametrize("verify", [True, False])
def test_what_a_file_lacks_is_not_made_up(tmp_path: Path, verify: bool) -> None:
    """A file that was cut after its index was read is an error that says where, also where nothing is verified."""
    write_item(tmp_path / "i", {"w": np.ones(200_000, np.uint8)})
    database = Database(str(tmp_path / "i"), verify=verify)
    os.truncate(tmp_path / "i" / layout.data_file_name(0), 150_000)
    with pytest.raises(CorruptCheckpointError, match="is cut off at byte 150000"):
        database.read(["w"])


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("num", [2000, 200_000])
def test_a_data_file_that_is_no_file_is_named(tmp_path: Path, num: int, make: Callable[[Path], None]) -> None:
    """What took the place of a data file is damage of the checkpoint, which says where, and waits for nobody."""
    write_item(tmp_path / "i", {"w": np.ones(num, np.uint8)})
    path = tmp_path / "i" / layout.data_file_name(0)
    path.unlink()
    make(path)
    with pytest.raises(CorruptCheckpointError, match=f"{path} is a directory or a pipe"):
        Database(str(tmp_path / "i")).read(["w"])


_LEASE = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
signal.sigwait({signal.SIGIO})  # somebody opens the file, and waits
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""


def test_a_file_that_a_file_server_has_leased_is_waited_for(tmp_path: Path) -> None:
    """Whoever serves the files of a checkpoint to other machines gets the time to give one back."""
    path = tmp_path / "leased"
    path.write_bytes(b"content")
    with subprocess.Popen([sys.executable, "-c", _LEASE, str(path)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline() == b"leased\n"
        assert lookup.read_file(str(path)) == b"content"
    assert server.returncode == 0


def test_a_disk_that_fails_under_a_data_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a read has the path of its file."""
    write_item(tmp_path / "i", {"w": np.ones(2000, np.uint8)})
    fail(monkeypatch, os, "preadv", errno.EIO)
    with pytest.raises(OSError, match=layout.data_file_name(0)):
        Database(str(tmp_path / "i"))


def test_a_small_file_serves_each_read_with_memory_of_its_own(tmp_path: Path) -> None:
    """What was read with the index goes to the first who asks; a second read of the array does not see what he did."""
    write_item(tmp_path / "i", {"w": np.ones(2000, np.uint8)})
    database = Database(str(tmp_path / "i"))
    database.read(["w"])["w"][:] = 7
    assert_equal(database.read(["w"]), {"w": np.ones(2000, np.uint8)})


def test_damaged_arrays_do_not_hide_the_index_of_a_small_file(tmp_path: Path) -> None:
    """A small file is read whole, and what there is can be told even so; the arrays themselves are an error."""
    write_item(tmp_path / "i", {"w": np.ones(2000, np.uint8)})
    path = tmp_path / "i" / layout.data_file_name(0)
    content = bytearray(path.read_bytes())
    content[content.index(bytes([1] * 2000)) + 1000] = 7
    path.write_bytes(content)
    database = Database(str(tmp_path / "i"))
    assert database.info("w").shape == (2000,)
    with pytest.raises(CorruptCheckpointError, match="not what was saved"):
        database.read(["w"])


def test_memory_of_restored_arrays_is_aligned(tmp_path: Path) -> None:
    """Arrays are at multiples of 64 bytes, where JAX on CPU takes them without a copy."""
    arrays = {f"w{i}": np.arange(100 + i * 37, dtype=np.float32) for i in range(20)} | {"s": np.arange(2)}
    write_item(tmp_path / "i", arrays)
    found = Database(str(tmp_path / "i")).read([name for name in arrays if name != "s"])
    assert all(array.ctypes.data % 64 == 0 for array in found.values() if array.nbytes > 1024)


# ------------------------------------------------------------------ the writer under bad conditions


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that writes less than it was given is followed by another for the rest."""
    real = os.pwrite

    def short(descriptor: int, content: memoryview, offset: int) -> int:
        return real(descriptor, content[: max(1, len(content) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", short)
    arrays = {"a": np.arange(700), "b": np.arange(900)}
    write_item(tmp_path / "i", arrays)
    monkeypatch.undo()
    assert_equal(Database(str(tmp_path / "i")).read(arrays), arrays)


def test_a_file_system_without_preallocation_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `posix_fallocate` is refused, the file is written without it."""
    fail(monkeypatch, os, "posix_fallocate", errno.EOPNOTSUPP)
    arrays = {"a": np.arange(700_000)}
    write_item(tmp_path / "i", arrays)
    assert_equal(Database(str(tmp_path / "i")).read(["a"]), arrays)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_without_the_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Where `posix_fallocate` says that the file will not fit, or that the disk fails, not a byte is written."""

    def write(descriptor: int, content: memoryview, offset: int) -> int:
        written.append((descriptor, offset))
        return len(content)

    written: list[tuple[int, int]] = []
    fail(monkeypatch, os, "posix_fallocate", code)
    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_item(tmp_path / "i", {"a": np.arange(700_000)})
    assert written == []


@pytest.mark.parametrize(
    "write", [lambda path: write_item(path, {"a": np.arange(700)}), lambda path: commit.write_file(str(path), "text")]
)
def test_a_write_that_takes_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """A file system that neither writes nor fails is not asked for ever."""
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="takes no more bytes"):
        write(tmp_path / "i")


def test_a_failing_write_is_raised_and_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in one of the writing threads comes out of the call, after all threads have stopped."""
    fail(monkeypatch, os, "pwrite", errno.EIO)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        write_item(tmp_path / "i", {"a": np.arange(700)})
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "ckpt_hooks-io"]


# ------------------------------------------------------------------ running in parallel


def test_tasks_all_run_and_the_first_error_is_raised() -> None:
    """Every task runs once; with an error, no task begins after it, and it is raised."""
    done: list[int] = []
    run_parallel([lambda i=i: done.append(i) for i in range(50)], 4)  # type: ignore[misc]
    assert sorted(done) == list(range(50))

    def fail() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_parallel([fail, *([lambda: time.sleep(0.001)] * 5)], 2)


def test_without_new_threads_this_one_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter no thread starts; the work is done all the same."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    run_parallel([lambda i=i: done.append(i) for i in range(5)], 4)  # type: ignore[misc]
    assert done == list(range(5))


def test_an_error_in_making_a_task_is_raised() -> None:
    """Also where it is another thread that asked for the task, for whose end nobody waits in vain."""

    def tasks() -> Iterator[Callable[[], None]]:
        while threading.current_thread().name != "ckpt_hooks-io":
            yield lambda: time.sleep(0.01)
        raise MemoryError("no room for a task")

    raised: list[BaseException] = []

    def run() -> None:
        try:
            run_parallel(tasks(), 2)
        except MemoryError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)  # so that a test that fails ends
    thread.start()
    thread.join(20)
    assert [str(error) for error in raised] == ["no room for a task"]


def test_ctrl_c_leaves_no_task_running() -> None:
    """At whichever line of the call it strikes, what the tasks write to may be closed when the call has ended."""
    running: list[None] = []

    def task() -> None:
        running.append(None)
        time.sleep(0.005)
        running.pop()

    for at in itertools.count(1):
        lines = itertools.count(1)

        def strike(frame: FrameType, event: str, _: Any, at: int = at, lines: Iterator[int] = lines) -> Any:
            if frame.f_code.co_filename != threads.__file__:
                return None
            # Python looks for no signal between the end of a `with` and the lock's release.
            is_with = linecache.getline(threads.__file__, frame.f_lineno).strip().startswith("with ")
            if event == "line" and not is_with and next(lines) == at:
                raise KeyboardInterrupt
            return strike

        before = sys.gettrace()
        sys.settrace(strike)
        try:
            run_parallel([task] * 4, 3)
        except KeyboardInterrupt:
            assert running == [], f"at line {at} of those that it passes"
        else:
            assert at > 20
            return
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("begins", [True, False])
def test_ctrl_c_while_a_thread_starts(monkeypatch: pytest.MonkeyPatch, begins: bool) -> None:
    """A thread that has begun is waited for; one that has not is not, and finds nothing to do when it does begin."""
    started: list[threading.Thread] = []
    done: list[int] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        started.append(thread)
        if begins:
            start(thread)
        raise KeyboardInterrupt

    def task() -> None:
        time.sleep(0.05)
        done.append(1)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_parallel([task] * 4, 2)
    assert len(done) == begins
    if not begins:
        started[0].run()
    time.sleep(0.1)
    assert len(done) == begins


# ------------------------------------------------------------------ file checksums


def checkpoint(directory: Path) -> Path:
    """A directory with an array item, a JSON item and a plain file, sealed."""
    write_item(directory / "params", {"w": np.arange(1000)})
    (directory / "config").mkdir()
    (directory / "config" / "metadata").write_text("{}")
    (directory / "notes").write_text("by hand")
    (directory / "commit_success.txt").write_text("not covered")
    sums = checksums.FileChecksums.of_directory(str(directory))
    (directory / checksums.FILE).write_bytes(sums.encode())
    return directory


def read_checksums(directory: Path) -> checksums.FileChecksums:
    found = checksums.FileChecksums.read(str(directory))
    assert found is not None
    return found


def test_checksums_cover_every_file_but_array_data_and_markers(tmp_path: Path) -> None:
    """All that a restore trusts is covered, either here or by the array table."""
    covered = set(read_checksums(checkpoint(tmp_path / "c")).files)
    assert covered == {"config/metadata", "notes", "params/_ARRAY_CHECKSUMS", "params/manifest.ocdbt"}


def test_an_unchanged_checkpoint_has_no_problem(tmp_path: Path) -> None:
    """What was written verifies."""
    directory = checkpoint(tmp_path / "c")
    assert list(read_checksums(directory).problems(str(directory))) == []
    assert list(checksums.array_problems(str(directory))) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "longer"])
def test_a_changed_file_is_named(tmp_path: Path, damage: str) -> None:
    """A covered file that is not what it was is named in the problems."""
    directory = checkpoint(tmp_path / "c")
    path = directory / "notes"
    new = {"changed": "by hanD", "cut": "by", "longer": "by hand."}
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(new[damage])
    (problem,) = read_checksums(directory).problems(str(directory))
    assert str(path) in problem


def test_problems_can_be_limited_to_an_item(tmp_path: Path) -> None:
    """Damage in one item is no reason not to read another."""
    directory = checkpoint(tmp_path / "c")
    (directory / "config" / "metadata").write_text("[]")
    sums = read_checksums(directory)
    sums.check(str(directory), below="params")
    sums.check(str(directory), below="")
    with pytest.raises(CorruptCheckpointError, match="config"):
        sums.check(str(directory), below="config")


def test_the_checksum_file_checks_itself(tmp_path: Path) -> None:
    """Any change of the checksum file itself is found."""
    encoded = read_checksums(checkpoint(tmp_path / "c")).encode()
    for position in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[position] ^= 4
        with pytest.raises(CorruptCheckpointError):
            checksums.FileChecksums.decode(bytes(damaged))


def test_a_file_about_to_change_is_accepted_old_and_new(tmp_path: Path) -> None:
    """Between the two halves of a late change, either content verifies, and a third does not."""
    directory = checkpoint(tmp_path / "c")
    sums = read_checksums(directory).accepting({"notes": b"new"})
    sums = checksums.FileChecksums.decode(sums.encode())
    for text, problems in (("by hand", 0), ("new", 0), ("neither", 1)):
        (directory / "notes").write_text(text)
        assert len(list(sums.problems(str(directory)))) == problems
    replaced = sums.replacing({"notes": b"new"})
    (directory / "notes").write_text("by hand")
    assert len(list(replaced.problems(str(directory)))) == 1


def test_a_lost_checksum_file_is_damage_and_not_somebody_elses_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of ours without its checksum file is not taken for one that never had any."""
    directory = checkpoint(tmp_path / "c")
    (directory / checksums.FILE).unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        checksums.FileChecksums.of_checkpoint(str(directory), "_CHECKPOINT_METADATA")


def test_damage_in_array_data_is_named_by_its_place(tmp_path: Path) -> None:
    """The offline check names file and bytes."""
    directory = checkpoint(tmp_path / "c")
    data = directory / "params" / layout.data_file_name(0)
    content = bytearray(data.read_bytes())
    content[4000] ^= 1
    data.write_bytes(content)
    (problem,) = checksums.array_problems(str(directory))
    assert problem == f"{data}: bytes 0 to 8000 are not what was saved"


# ------------------------------------------------------------------ the commit


def traced(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> list[tuple[str, str]]:
    """(call, base name of its path) of every call of these functions of `os`, in order."""
    calls: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real_open = os.open

    def open_(path: str, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        opened[descriptor] = str(path)
        return descriptor

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            path = opened.get(first, "?") if isinstance(first, int) else os.fspath(first)
            calls.append((name, os.path.basename(path)))
            return real(first, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "open", open_)
    for name in names:
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and directory of a checkpoint is durable before its name is, and its name before it is announced."""
    temporary = tmp_path / "run" / "7.tmp"
    (temporary / "item").mkdir(parents=True)
    (temporary / "item" / "a").write_text("a")
    (temporary / "b").write_text("b")
    calls = traced(monkeypatch, ["fsync", "rename"])
    commit.sync_tree(str(temporary))
    commit.publish(str(temporary), str(tmp_path / "run" / "7"))
    rename = calls.index(("rename", "7.tmp"))
    assert set(calls[:rename]) == {("fsync", name) for name in ("7.tmp", "item", "a", "b")}
    assert calls[rename + 1 :] == [("fsync", "run")]


def test_a_failed_fsync_fails_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports lost pages once; asking again would hear that all is well."""
    (tmp_path / "a").write_text("a")
    failed = fail(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        commit.sync_file(str(tmp_path / "a"))
    assert len(failed) == 1


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replaced_checkpoint_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Replacing takes one step where the system can, and two that can be mended where it cannot."""
    if not exchange:
        monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    old, new = tmp_path / "7", tmp_path / f"7{commit.TMP_SUFFIX}"
    for path, text in ((old, "old"), (new, "new")):
        path.mkdir()
        (path / "a").write_text(text)
    commit.publish(str(new), str(old), replace=True)
    assert (old / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["7"]


def test_a_writer_that_died_between_two_renames_is_mended(tmp_path: Path) -> None:
    """The old checkpoint goes back to its place when the new one never took it."""
    old = tmp_path / "7"
    old.mkdir()
    commit.move_to_replaced(str(old))
    commit.remove_dead_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == ["7"]


def test_removal_renames_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint loses its name before it loses its first file, so a reader sees all of it or nothing."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "a").write_text("a")
    calls = traced(monkeypatch, ["rename", "unlink", "rmdir", "fsync"])
    commit.remove_tree(str(tmp_path / "7"))
    assert calls[:2] == [("rename", "7"), ("fsync", tmp_path.name)]
    assert os.listdir(tmp_path) == []


def test_what_is_set_aside_never_overwrites(tmp_path: Path) -> None:
    """The second thing that is set aside under a name gets another."""
    for _ in range(3):
        (tmp_path / "7").mkdir()
        commit.move_aside(str(tmp_path / "7"), "damaged")
    assert sorted(os.listdir(tmp_path)) == ["7.damaged", "7.damaged.1", "7.damaged.2"]


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    """One holder at a time, and the error says who it is."""
    lock = commit.DirectoryLock(str(tmp_path))
    with pytest.raises(RunLockedError, match="this process"):
        commit.DirectoryLock(str(tmp_path))
    lock.release()
    lock.release()
    commit.DirectoryLock(str(tmp_path)).release()


def test_a_dropped_lock_is_released(tmp_path: Path) -> None:
    """A lock that nobody can reach any more does not keep the directory locked."""
    lock = commit.DirectoryLock(str(tmp_path))
    del lock
    commit.DirectoryLock(str(tmp_path)).release()


@pytest.mark.filterwarnings("ignore:.*fork.*")  # what JAX and Python think of it
def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A data-loading worker that outlives the writer leaves the run free."""
    lock = commit.DirectoryLock(str(tmp_path))
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)  # until the parent has looked
        os._exit(0)
    os.close(read_end)
    try:
        time.sleep(0.1)  # the child closes its copy right after the fork
        lock.release()
        commit.DirectoryLock(str(tmp_path)).release()
    finally:
        os.close(write_end)
        os.waitpid(child, 0)


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    """The free space is looked at first, also where the directory is yet to be made."""
    with pytest.raises(DiskFullError, match="needs 1,000,000,000,000,000 bytes"):
        require_free_bytes(str(tmp_path / "run" / "7"), {0: 10**15})
    assert os.listdir(tmp_path) == []


def test_replacing_a_file_leaves_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is replaced is the old one or the new one, and no temporary stays."""
    path = tmp_path / "file"
    path.write_text("old")
    fail(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(DiskFullError):
        commit.replace_file(str(path), "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
