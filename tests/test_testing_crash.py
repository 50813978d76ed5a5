"""`ckpt_hooks.testing`: what is recorded, and which states a power loss may leave."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from os import rename as renamed_by_name
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import Checkpointer, CommitFileTemporaryPath, StandardCheckpointHandler, args
from ckpt_hooks.errors import CheckpointError
from ckpt_hooks.testing import IncompleteRecordingError, Recording, Scratch, crash_states, record
from ckpt_hooks.testing.operations import Create, Rename, Resize, Sync, Write


def write(path: Path, data: bytes, *, sync: bool = False) -> None:
    with open(path, "wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def final_trees(recording: Recording, **options: Any) -> list[dict[str, bytes | None]]:
    """The trees after the last operation."""
    options = {"per_cut": 100, **options}
    end = len(recording.operations)
    return [dict(state.tree) for state in crash_states(recording, cuts=range(end, end + 1), **options)]


# ------------------------------------------------------------------ recording


def _plain_files(folder: Path) -> None:
    (folder / "text").write_text("a\nb")
    with open(folder / "text", "a") as text:
        text.write("c")
    with open(folder / "text", "r+b") as binary:
        binary.seek(1)
        binary.write(b"X")
        binary.truncate(3)
    with open(folder / "json", "w") as file:
        json.dump({"x": [1, 2]}, file)


def _arrays(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(3000))
    np.savez(folder / "a.npz", x=np.arange(5), y=np.zeros(2))


def _trees(folder: Path) -> None:
    os.makedirs(folder / "a/b/c")
    write(folder / "a/b/c/x", b"1")
    shutil.copytree(folder / "a", folder / "copy")
    shutil.rmtree(folder / "a")
    (folder / "copy").rename(folder / "moved")
    shutil.copyfile(folder / "moved/b/c/x", folder / "y")
    os.link(folder / "y", folder / "z")
    os.remove(folder / "y")


def _descriptors(folder: Path) -> None:
    descriptor = os.open(folder / "x", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, 5000)
    os.pwritev(descriptor, [b"ab", np.arange(4).data], 100)
    os.pwrite(descriptor, b"c", 3)
    os.write(descriptor, b"d")
    copy = os.dup(descriptor)
    os.writev(copy, [b"e", b"f"])
    os.ftruncate(copy, 4000)
    os.close(copy)
    os.close(descriptor)


def _names(folder: Path) -> None:
    for name in "abc":
        write(folder / name, name.encode())
    renamed_by_name(folder / "a", folder / "d")
    os.replace(folder / "b", folder / "c")
    library = ctypes.CDLL(None, use_errno=True)
    paths = [os.fsencode(folder / name) for name in "cd"]
    assert library.renameat2(-100, paths[0], -100, paths[1], 2) == 0
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(b"t")


def _over_the_edge(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    (outside / "tree/deep").mkdir(parents=True)
    write(outside / "tree/deep/x", b"1")
    write(outside / "file", b"2")
    os.rename(outside / "tree", folder / "tree")
    os.replace(outside / "file", folder / "before")
    os.rename(folder / "before", outside / "gone")


@pytest.mark.parametrize("action", [_plain_files, _arrays, _trees, _descriptors, _names, _over_the_edge])
def test_what_python_does_to_files_is_recorded(action: Callable[[Path], None], tmp_path: Path) -> None:
    """Replaying a recording gives the very tree, in whatever way Python wrote it."""
    write(tmp_path / "before", b"0")
    with record(tmp_path) as log:  # which checks it
        action(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert log.replay().tree().keys() == found
    assert len(found) > 1


def test_what_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    """A file that native code wrote by itself ends the recording with an error that names it."""
    with pytest.raises(IncompleteRecordingError, match=r"\['native'\]"), record(tmp_path):
        np.arange(3).tofile(tmp_path / "native")


def test_functions_are_as_they_were_after_a_recording(tmp_path: Path) -> None:
    """Nothing stays replaced, whether the recording ends well or not."""
    before = (open, os.open, os.rename, os.fsync, ctypes.CDLL.__getattr__)
    with contextlib.suppress(ZeroDivisionError), record(tmp_path):
        assert os.rename is not before[2]
        raise ZeroDivisionError
    assert (open, os.open, os.rename, os.fsync, ctypes.CDLL.__getattr__) == before


def test_other_directories_are_not_recorded(tmp_path: Path) -> None:
    """What happens beside the watched directory is not in the log."""
    (tmp_path / "watched").mkdir()
    with record(tmp_path / "watched") as log:
        write(tmp_path / "elsewhere", b"1")
    assert log.operations == []


def test_a_log_says_what_was_done(tmp_path: Path) -> None:
    """The operations of the usual way to replace a file, in their order, with marks between them."""
    with record(tmp_path) as log:
        write(tmp_path / "a.tmp", b"new", sync=True)
        os.rename(tmp_path / "a.tmp", tmp_path / "a")
        sync_directory(tmp_path)
        log.mark("replaced")
    expected = [Create(0, "a.tmp", 1, False), Write(1, 0, b"new"), Sync(1), Rename(0, "a.tmp", 0, "a"), Sync(0)]
    assert log.operations[:-1] == expected
    assert [state.marks for state in crash_states(log)][-1] == ("replaced",)


# ------------------------------------------------------------------ states


def test_what_was_synced_is_there(tmp_path: Path) -> None:
    """After the sync of a file and of its directory there is one state only."""
    with record(tmp_path) as log:
        write(tmp_path / "a", b"1", sync=True)
        sync_directory(tmp_path)
    assert final_trees(log) == [{"a": b"1"}]


def test_a_name_needs_a_sync_of_its_directory(tmp_path: Path) -> None:
    """A file that was synced, in a directory that was not, may not be there; its content is never in question."""
    with record(tmp_path) as log:
        write(tmp_path / "a", b"1", sync=True)
    assert final_trees(log, models=("posix",)) == [{"a": b"1"}, {}]


def test_content_needs_a_sync_of_its_file(tmp_path: Path) -> None:
    """A name may be durable before the content: empty, of the right size with zeros, cut off, torn."""
    data = bytes(range(1, 201)) * 6  # three sectors
    with record(tmp_path) as log:
        write(tmp_path / "a", data)
        sync_directory(tmp_path)
    contents = {tree["a"] for tree in final_trees(log, models=("posix",))}
    torn = data[:512] + bytes(512) + data[1024:]
    assert {b"", data, bytes(len(data)), data[:512], data[:1024], torn} <= contents


def test_a_rename_is_whole(tmp_path: Path) -> None:
    """A rename onto a file leaves the old one or the new one, never none and never both."""
    write(tmp_path / "a", b"old")
    with record(tmp_path) as log:
        write(tmp_path / "b", b"new", sync=True)
        sync_directory(tmp_path)
        os.rename(tmp_path / "b", tmp_path / "a")
    assert final_trees(log) == [{"a": b"new"}, {"a": b"old", "b": b"new"}]


def test_names_are_kept_and_lost_in_any_order(tmp_path: Path) -> None:
    """POSIX may keep a later name and lose an earlier one; a journal keeps their order."""
    with record(tmp_path) as log:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
    assert {"b": None} in final_trees(log, models=("posix",))
    assert final_trees(log, models=("journal",)) == [{"a": None, "b": None}, {"a": None}, {}]


def test_a_sync_makes_a_journal_durable(tmp_path: Path) -> None:
    """In an ordered journal, the sync of a file takes the names before it along; POSIX does not promise that."""
    with record(tmp_path) as log:
        (tmp_path / "a").mkdir()
        write(tmp_path / "b", b"1", sync=True)
    assert final_trees(log, models=("journal",)) == [{"a": None, "b": b"1"}]
    assert {} in final_trees(log, models=("posix",))


def test_reserved_space_is_zeros(tmp_path: Path) -> None:
    """Space that was reserved has its size before it has its content."""
    with record(tmp_path) as log:
        descriptor = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, 4)
        os.pwrite(descriptor, b"data", 0)
        os.close(descriptor)
        sync_directory(tmp_path)
    assert [type(operation) for operation in log.operations] == [Create, Resize, Write, Sync]
    assert {tree["a"] for tree in final_trees(log)} == {b"", b"data", bytes(4)}


def test_states_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """The same seed gives the same states, another one others."""
    with record(tmp_path) as log:
        for name in range(12):
            write(tmp_path / str(name), bytes([name + 1]) * 3000)
    first, again, other = ([state.digest for state in crash_states(log, per_cut=10, seed=seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_scratch_directory_shows_each_state(tmp_path: Path) -> None:
    """The directory is what the state says, whatever it was before, also after somebody has written to it."""
    with record(tmp_path) as log:
        _trees(tmp_path)
    scratch = Scratch(str(tmp_path.parent / "scratch"))
    for number, state in enumerate(crash_states(log, per_cut=3)):
        scratch.show(state.tree)
        shown = {
            path.relative_to(scratch.path).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in Path(scratch.path).rglob("*")
        }
        assert shown == state.tree
        if number % 10 == 0:
            (Path(scratch.path) / "stray").mkdir()
            scratch.changed()


# ------------------------------------------------------------------ of use


def test_a_save_in_place_survives_a_power_loss(tmp_path: Path) -> None:
    """`CommitFileTemporaryPath`: what has no marker is refused, and what has one is whole, in every state."""
    runs = tmp_path / "runs"
    runs.mkdir()
    with (
        record(runs) as log,
        Checkpointer(StandardCheckpointHandler(), temporary_path_class=CommitFileTemporaryPath) as saver,
    ):
        saver.save(runs / "a", args.StandardSave({"w": np.arange(40.0)}))
        log.mark("saved")
    scratch = Scratch(str(tmp_path / "scratch"))
    reader = Checkpointer(StandardCheckpointHandler(), temporary_path_class=CommitFileTemporaryPath)
    outcomes = set()
    for state in crash_states(log, per_cut=4):
        scratch.show(state.tree)
        try:
            restored = reader.restore(os.path.join(scratch.path, "a"))
        except CheckpointError:
            outcomes.add("refused")
            assert not state.marks
        else:
            outcomes.add("restored")
            np.testing.assert_array_equal(restored["w"], np.arange(40.0))
    assert outcomes == {"refused", "restored"}
