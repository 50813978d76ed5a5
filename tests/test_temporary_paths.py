"""Temporary paths: where a checkpoint is while it is not one, and what makes it one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_hooks import (
    AtomicRenameTemporaryPath,
    CommitFileTemporaryPath,
    FileOptions,
    MetadataStore,
    StepMetadata,
    errors,
    metadata_store,
)
from ckpt_hooks.committed import is_committed, is_temporary
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FileChecksums
from tests.faulty import delay, fail

MARKER = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
SUFFIX = ".orbax-checkpoint-tmp"
KINDS = [AtomicRenameTemporaryPath, CommitFileTemporaryPath]


def temporary_of(path: Path, kind: Any = AtomicRenameTemporaryPath, **options: Any) -> Any:
    store = metadata_store(enable_write=True, blocking_write=True)
    return kind.from_final(path, checkpoint_metadata_store=store, **options)


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataStore]:
    """One that writes in the background, after a while."""
    delay(monkeypatch, commit, "replace_file", secs=0.3)
    with contextlib.closing(metadata_store(enable_write=True)) as store:
        yield store


def test_others_are_told_what_they_will_find(tmp_path: Path, slow_store: MetadataStore) -> None:
    """The token is that of the written metadata, also where a store writes them in the background."""
    path = AtomicRenameTemporaryPath.from_final(tmp_path / "c", checkpoint_metadata_store=slow_store)
    path.create()
    told = path.token()
    assert told
    slow_store.wait_until_finished()
    assert told == path.token()


def test_nothing_is_written_into_what_is_discarded(tmp_path: Path, slow_store: MetadataStore) -> None:
    """A store that writes in the background is done before the directory goes: it neither fails nor makes it anew."""
    path = AtomicRenameTemporaryPath.from_final(tmp_path / "c", checkpoint_metadata_store=slow_store)
    path.create()
    path.discard()
    slow_store.wait_until_finished()
    assert os.listdir(tmp_path) == []


def commit_text(path: Path, text: str, kind: Any = AtomicRenameTemporaryPath, *, replaces: bool = False) -> None:
    temporary = temporary_of(path, kind)
    temporary.replaces = replaces
    (temporary.create() / "text").write_text(text)
    temporary.finalize()


def crash(temporary: Any) -> None:
    """What the death of the writer does: its lock is gone, its files stay."""
    temporary._lock.release()


# ------------------------------------------------------------------ both classes


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_made_before_create(tmp_path: Path, kind: Any) -> None:
    """A temporary path is only a name: `get` before `create` is a ValueError, `get_final` is known at once."""
    temporary = temporary_of(tmp_path / "7", kind)
    assert os.fspath(temporary.get_final()) == os.fspath(tmp_path / "7")
    with pytest.raises(ValueError, match="create"):
        temporary.get()
    with pytest.raises(ValueError, match="create"):
        temporary.finalize()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["7", "runs/7"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_relative_path_is_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, path: str
) -> None:
    """A path class by itself takes a relative path, makes its parents, and stays there when the directory changes."""
    monkeypatch.chdir(tmp_path)
    temporary = temporary_of(Path(path), kind)
    (temporary.create() / "text").write_text("a")
    monkeypatch.chdir("/")
    temporary.finalize()
    assert (tmp_path / path / "text").read_text() == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_an_address_is_no_temporary_path(kind: Any) -> None:
    """A path class by itself refuses what is not on a file system, before it makes a directory of that name."""
    with pytest.raises(ValueError, match=r"gs://bucket/7.*: only local and mounted"):
        kind.from_final("gs://bucket/7")


@pytest.mark.parametrize("kind", KINDS)
def test_finalize_makes_the_checkpoint(tmp_path: Path, kind: Any) -> None:
    """After `finalize` the final path is a checkpoint with marker, times and checksums, and nothing else is there."""
    commit_text(tmp_path / "7", "a", kind)
    assert os.listdir(tmp_path) == ["7"]
    assert (tmp_path / "7" / "text").read_text() == "a"
    assert (tmp_path / "7" / MARKER).read_text() == f"Checkpoint commit was successful to {tmp_path / '7'}"
    content = json.loads((tmp_path / "7" / METADATA).read_text())
    assert content["init_timestamp_nsecs"] <= content["commit_timestamp_nsecs"]
    checksums = FileChecksums.read(os.fspath(tmp_path / "7"))
    assert checksums is not None and checksums.files.keys() == {"text", METADATA}
    assert kind.is_finalized(tmp_path / "7") and is_committed(tmp_path / "7")


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_begin_with_the_time(tmp_path: Path, kind: Any) -> None:
    """`create` writes the time of the beginning, and no time of a commit."""
    path = temporary_of(tmp_path / "7", kind).create()
    metadata = StepMetadata.from_json(json.loads((path / METADATA).read_text()))
    assert metadata.init_timestamp_nsecs is not None
    assert metadata.commit_timestamp_nsecs is None


@pytest.mark.parametrize("kind", KINDS)
def test_discard_leaves_nothing(tmp_path: Path, kind: Any) -> None:
    """`discard` removes what was written, gives the lock back, and may come twice or before `create`."""
    temporary = temporary_of(tmp_path / "7", kind)
    temporary.discard()
    (temporary.create() / "text").write_text("a")
    temporary.discard()
    temporary.discard()
    assert os.listdir(tmp_path) == []
    commit_text(tmp_path / "7", "b", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_discard_after_the_commit_is_harmless(tmp_path: Path, kind: Any) -> None:
    """`discard` does nothing to what has been finalized."""
    temporary = temporary_of(tmp_path / "7", kind)
    (temporary.create() / "text").write_text("a")
    temporary.finalize()
    temporary.discard()
    assert is_committed(tmp_path / "7")


@pytest.mark.parametrize("kind", KINDS)
def test_create_that_fails_half_way_leaves_nothing(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the directory is made but its metadata cannot be written, `discard` removes it."""
    temporary = temporary_of(tmp_path / "7", kind)
    with monkeypatch.context() as full:
        fail(full, commit, "write_file", errno.ENOSPC)
        with pytest.raises(OSError, match=r"full|space"):
            temporary.create()
    temporary.discard()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770])
def test_permission_mode(tmp_path: Path, kind: Any, mode: int) -> None:
    """The directory has the mode asked for, whatever the umask; its parents and files follow the umask."""
    old = os.umask(0o027)
    try:
        temporary = temporary_of(tmp_path / "run" / "7", kind, file_options=FileOptions(path_permission_mode=mode))
        (temporary.create() / "text").write_text("a")
        temporary.finalize()
    finally:
        os.umask(old)
    assert (tmp_path / "run" / "7").stat().st_mode & 0o777 == mode
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "run" / "7" / "text").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_durable_before_the_commit(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory is synced before what makes it a checkpoint, and the parent after it."""
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.relpath(path, tmp_path), kind.is_finalized(tmp_path / "7")))
        fsync(descriptor)

    temporary = temporary_of(tmp_path / "7", kind)
    (temporary.create() / "folder").mkdir()
    (temporary.get() / "folder" / "text").write_text("a")
    monkeypatch.setattr(os, "fsync", record)
    temporary.finalize()
    name = temporary._temporary.name
    before = {path for path, finalized in synced if not finalized}
    written = ("", "/folder", "/folder/text", f"/{METADATA}", "/_CHECKSUMS")
    assert before >= {name + inside for inside in written}
    assert synced[-1] == (".", True)
    if kind is AtomicRenameTemporaryPath:
        assert f"{name}/{MARKER}" in before
    else:
        assert f"{name}/{MARKER}" in {path for path, finalized in synced if finalized}


# ------------------------------------------------------------------ the rename


def test_name_of_the_temporary_directory(tmp_path: Path) -> None:
    """The rename's temporary directory is Orbax's: the final name with its suffix, beside the final path."""
    path = temporary_of(tmp_path / "7").create()
    assert os.fspath(path) == f"{tmp_path / '7'}{SUFFIX}"
    assert is_temporary(path) and not is_temporary(tmp_path / "7")


def test_rename_is_the_last_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at the rename leaves no checkpoint: until then there is only the temporary directory."""

    def die(*paths: str, **options: Any) -> None:
        raise SystemExit("dead")

    monkeypatch.setattr(commit, "publish", die)
    temporary = temporary_of(tmp_path / "7")
    temporary.create()
    with pytest.raises(SystemExit):
        temporary.finalize()
    assert os.listdir(tmp_path) == [f"7{SUFFIX}"]
    assert not is_committed(tmp_path / f"7{SUFFIX}")


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """With `replaces`, the new checkpoint takes the old one's place, also where names cannot be swapped at once."""
    if not exchange:
        monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    commit_text(tmp_path / "7", "old")
    commit_text(tmp_path / "7", "new", replaces=True)
    assert (tmp_path / "7" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["7"]


def test_without_replaces_nothing_is_replaced(tmp_path: Path) -> None:
    """Without `replaces`, a checkpoint that has appeared at the final path meanwhile stays."""
    temporary = temporary_of(tmp_path / "7")
    temporary.create()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "text").write_text("old")
    with pytest.raises(OSError, match="7"):
        temporary.finalize()
    temporary.discard()
    assert (tmp_path / "7" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["7"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_commit_that_cannot_be_made_durable_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, replaces: bool
) -> None:
    """Where the parent cannot be synced after the rename, all is as before: the old checkpoint, or none."""
    if replaces:
        commit_text(tmp_path / "7", "old")
    temporary = temporary_of(tmp_path / "7")
    temporary.replaces = replaces
    (temporary.create() / "text").write_text("new")
    with monkeypatch.context() as broken:
        fail(broken, commit, "sync_directory", errno.EIO)
        if not exchange:
            broken.setattr(commit, "_exchange", lambda one, other: False)
        with pytest.raises(OSError, match="Input/output error"):
            temporary.finalize()
    assert (temporary.get() / "text").read_text() == "new"
    temporary.discard()
    assert os.listdir(tmp_path) == (["7"] if replaces else [])
    if replaces:
        assert (tmp_path / "7" / "text").read_text() == "old"


def test_old_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the new checkpoint is durable, a failure to remove the old one is only logged."""
    commit_text(tmp_path / "7", "old")
    fail(monkeypatch, commit, "remove_tree", errno.EACCES)
    commit_text(tmp_path / "7", "new", replaces=True)
    assert (tmp_path / "7" / "text").read_text() == "new"
    assert "Permission denied" in caplog.text


# ------------------------------------------------------------------ the marker


def test_in_place_is_the_final_path(tmp_path: Path) -> None:
    """A commit by marker writes into the final directory itself."""
    path = temporary_of(tmp_path / "7", CommitFileTemporaryPath).create()
    assert os.fspath(path) == os.fspath(tmp_path / "7")


def test_crash_before_the_marker_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A writer that dies before the marker leaves a directory that is no checkpoint, which the next one clears."""
    temporary = temporary_of(tmp_path / "7", CommitFileTemporaryPath)
    (temporary.create() / "garbage").write_text("half")
    crash(temporary)
    assert not CommitFileTemporaryPath.is_finalized(tmp_path / "7")
    assert not AtomicRenameTemporaryPath.is_finalized(tmp_path / "7")
    assert not is_committed(tmp_path / "7")
    commit_text(tmp_path / "7", "a", CommitFileTemporaryPath)
    assert not (tmp_path / "7" / "garbage").exists()
    assert is_committed(tmp_path / "7")


def test_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while everything is being synced comes before the marker, so there is no checkpoint."""

    def die(*arguments: Any) -> None:
        raise SystemExit("dead")

    monkeypatch.setattr(commit, "sync_tree", die)
    temporary = temporary_of(tmp_path / "7", CommitFileTemporaryPath)
    temporary.create()
    with pytest.raises(SystemExit):
        temporary.finalize()
    assert not (tmp_path / "7" / MARKER).exists()
    assert not CommitFileTemporaryPath.is_finalized(tmp_path / "7")


def test_in_place_replacing_keeps_the_old_one_aside(tmp_path: Path) -> None:
    """A forced save in place moves the old checkpoint aside, and `discard` brings it back."""
    commit_text(tmp_path / "7", "old", CommitFileTemporaryPath)
    temporary = temporary_of(tmp_path / "7", CommitFileTemporaryPath)
    temporary.replaces = True
    temporary.create()
    aside = tmp_path / f"7.replaced{SUFFIX}"
    assert (aside / "text").read_text() == "old"
    temporary.discard()
    assert os.listdir(tmp_path) == ["7"]
    assert (tmp_path / "7" / "text").read_text() == "old"


# ------------------------------------------------------------------ live and dead writers


@pytest.mark.parametrize("kind", KINDS)
def test_live_writer_is_not_disturbed(tmp_path: Path, kind: Any) -> None:
    """While a writer lives, a second one at the same checkpoint is a RunLockedError, and nothing is removed."""
    first = temporary_of(tmp_path / "7", kind)
    (first.create() / "text").write_text("a")
    with pytest.raises(errors.RunLockedError, match="this process"):
        temporary_of(tmp_path / "7", kind).create()
    if kind is AtomicRenameTemporaryPath:  # what is in place has no temporary name
        assert commit.remove_dead_temporaries(os.fspath(tmp_path)) == []
    first.finalize()
    assert (tmp_path / "7" / "text").read_text() == "a"


def test_what_another_writer_has_taken_meanwhile_is_his(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loses the directory between making and locking it is refused, and does not remove it when he clears up."""
    make_directory, held = commit.make_directory, []

    def taken_at_once(path: str, mode: int | None = None) -> None:
        make_directory(path, mode)
        held.append(commit.DirectoryLock(path))

    temporary = temporary_of(tmp_path / "7")
    with monkeypatch.context() as patch:
        patch.setattr(commit, "make_directory", taken_at_once)
        with pytest.raises(errors.RunLockedError):
            temporary.create()
    temporary.discard()
    assert os.listdir(tmp_path) == [f"7{SUFFIX}"]


def test_what_another_writer_is_about_to_take_is_his(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loses the directory before it is locked does not remove the one that another has put there since."""
    make_directory = commit.make_directory

    def removed_at_once(path: str, mode: int | None = None) -> None:
        make_directory(path, mode)
        os.rmdir(path)

    temporary = temporary_of(tmp_path / "7")
    with monkeypatch.context() as patch:
        patch.setattr(commit, "make_directory", removed_at_once)
        with pytest.raises(FileNotFoundError):
            temporary.create()
    temporary_of(tmp_path / "7").create()
    temporary.discard()
    assert os.listdir(tmp_path) == [f"7{SUFFIX}"]


def test_what_a_dead_writer_left_is_locked_until_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a writer that begins anew meanwhile would lose what he has just made."""
    (tmp_path / f"7{SUFFIX}").mkdir()
    remove_tree, others = commit.remove_tree, []

    def begun_meanwhile(path: str) -> None:
        with pytest.raises(errors.RunLockedError) as refused:
            commit.DirectoryLock(path)
        others.append(refused)
        remove_tree(path)

    monkeypatch.setattr(commit, "remove_tree", begun_meanwhile)
    temporary_of(tmp_path / "7").create()
    assert len(others) == 1


def test_dead_writers_temporary_is_removed(tmp_path: Path) -> None:
    """What a dead writer left is removed, by its successor and by the run's clearing up; all else stays."""
    crash_at = temporary_of(tmp_path / "7")
    (crash_at.create() / "garbage").write_text("half")
    crash(crash_at)
    commit_text(tmp_path / "7", "a")
    assert not (tmp_path / "7" / "garbage").exists()
    crash_at = temporary_of(tmp_path / "8")
    crash_at.create()
    crash(crash_at)
    (tmp_path / "mine").mkdir()
    assert commit.remove_dead_temporaries(os.fspath(tmp_path)) == [f"8{SUFFIX}"]
    assert sorted(os.listdir(tmp_path)) == ["7", "mine"]


WRITER = """
import fcntl, os, sys, time
path = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(path, fcntl.LOCK_EX)  # as a writer does
print("locked", flush=True)
time.sleep(60)
"""


def test_writer_that_is_killed_loses_its_lock(tmp_path: Path) -> None:
    """Another process that writes keeps its temporary directory until it is killed; then it can be removed."""
    path = tmp_path / f"7{SUFFIX}"
    path.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        assert commit.remove_dead_temporaries(os.fspath(tmp_path)) == []
        with pytest.raises(errors.RunLockedError, match=f"process {writer.pid}"):
            temporary_of(tmp_path / "7").create()
        assert path.is_dir()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
    assert commit.remove_dead_temporaries(os.fspath(tmp_path)) == [path.name]
    assert os.listdir(tmp_path) == []


def test_replaced_checkpoint_comes_back_after_a_crash(tmp_path: Path) -> None:
    """Where a writer died after it had moved the old checkpoint aside, clearing up puts it back."""
    commit_text(tmp_path / "7", "old")
    commit.move_to_replaced(os.fspath(tmp_path / "7"))
    assert not (tmp_path / "7").exists()
    commit.remove_dead_temporaries(os.fspath(tmp_path))
    assert (tmp_path / "7" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["7"]


def test_lock_excludes_and_is_given_back(tmp_path: Path) -> None:
    """A directory has one lock, which can be taken again once it was released, twice if need be."""
    lock = commit.DirectoryLock(os.fspath(tmp_path))
    with pytest.raises(errors.RunLockedError, match=r"this process is writing.*Reading needs no lock"):
        commit.DirectoryLock(os.fspath(tmp_path))
    lock.release()
    lock.release()
    commit.DirectoryLock(os.fspath(tmp_path)).release()


# ------------------------------------------------------------------ what is a checkpoint


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"notes.txt": ""}, False),
        ({"folder/notes.txt": ""}, False),
        ({MARKER: ""}, True),
        ({"_METADATA": "{}"}, True),
        ({"params/_METADATA": "{}"}, True),
        ({METADATA: json.dumps(StepMetadata(init_timestamp_nsecs=1).to_json())}, False),
        ({METADATA: json.dumps(StepMetadata(init_timestamp_nsecs=1).to_json()), "_METADATA": "{}"}, False),
        ({METADATA: json.dumps(StepMetadata(init_timestamp_nsecs=1).to_json()), MARKER: ""}, True),
        ({METADATA: json.dumps(StepMetadata(commit_timestamp_nsecs=2).to_json())}, True),
        ({METADATA: "damaged"}, True),
    ],
)
def test_what_is_committed(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    """A checkpoint has a marker, or a commit time, or an older Orbax's files; damage is told by whoever reads it."""
    path = tmp_path / "7"
    path.mkdir()
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    assert is_committed(path) is expected


def test_what_is_never_committed(tmp_path: Path) -> None:
    """Something temporary, a file, and nothing at all are no checkpoints."""
    (tmp_path / f"7{SUFFIX}").mkdir()
    (tmp_path / f"7{SUFFIX}" / MARKER).write_text("")
    (tmp_path / "file").write_text("")
    for name in (f"7{SUFFIX}", "file", "missing"):
        assert not is_committed(tmp_path / name)
        assert not AtomicRenameTemporaryPath.is_finalized(tmp_path / name)
        assert not CommitFileTemporaryPath.is_finalized(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "expected"), [("7", False), (f"7{SUFFIX}", True), (f"7{SUFFIX}-123", True), ("7.tmp", False)]
)
def test_what_is_temporary(name: str, expected: bool) -> None:
    """The suffix anywhere in the last part of the path makes it temporary, as it does to Orbax."""
    assert is_temporary(f"/runs{SUFFIX}/{name}") is expected
