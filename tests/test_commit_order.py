"""The order of the system calls, watched from outside: nothing gets its name before it is durable, nothing is
announced before its name is, and nothing loses a file before it has durably lost its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import Checkpointer, CheckpointHook, CheckpointManager, StandardCheckpointHandler
from ckpt_hooks.temporary_paths import CommitFileTemporaryPath

TEMPORARY = ".orbax-checkpoint-tmp"
Stamp = tuple[int, int, int]


class Watch:
    """Follows what is synced, and judges each change of a name at the moment at which it happens."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.synced: dict[int, Stamp] = {}  # {inode: its state at its last sync}
        self.unsynced_names: set[str] = set()  # directories in which a name has changed since their last sync
        self.known = self.checkpoints()
        self.problems: list[str] = []
        self.commits = 0
        for name, judge in (
            ("fsync", None),
            ("rename", self.judge_rename),
            ("mkdir", self.judge_mkdir),
            ("unlink", self.judge_removal),
            ("rmdir", self.judge_removal),
        ):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name), judge))

    def watched(self, name: str, call: Callable[..., Any], judge: Callable[..., None] | None) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.look_for_commits()
            if judge is not None:
                judge(*args, **options)
            result = call(*args, **options)
            if name == "fsync":
                self.note_sync(args[0])
            elif name == "rename":
                source, target = args[:2]
                self.unsynced_names.add(os.path.dirname(target))
                if not (os.path.isfile(target) and TEMPORARY in os.path.basename(source)):
                    # A temporary file whose name comes back is removed by the next writer.
                    self.unsynced_names.add(os.path.dirname(source))
            self.look_for_commits()
            return result

        return watched

    def note_sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = stamp_of(status)
        self.unsynced_names.discard(os.readlink(f"/proc/self/fd/{descriptor}"))

    # -------------------------------------------------------------- judging

    def judge_rename(self, source: str, target: str) -> None:
        if TEMPORARY not in os.path.dirname(target) and os.path.isfile(source):
            self.require_synced(source, f"renamed to {target}")

    def judge_mkdir(self, path: str, *_: Any, **options: Any) -> None:
        if TEMPORARY not in str(path) and options.get("dir_fd") is None:
            self.unsynced_names.add(os.path.dirname(path))

    def judge_removal(self, path: str, *_: Any, dir_fd: int | None = None) -> None:
        folder = os.path.dirname(path) if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        if ".removed" in folder and str(self.run) in self.unsynced_names:
            self.problems.append(f"{folder}/{path} is removed before the removal of its checkpoint's name is durable")

    def look_for_commits(self) -> None:
        """A checkpoint that was not there before has to be durable, whatever call put it there."""
        now = self.checkpoints()
        for inode in now.keys() - self.known.keys():
            self.commits += 1
            self.unsynced_names.add(str(self.run))
            for folder, _, names in os.walk(now[inode]):
                for path in (folder, *(os.path.join(folder, name) for name in names)):
                    self.require_synced(path, "has its final name")
        self.known = now

    def checkpoints(self) -> dict[int, str]:
        """{inode: path} of what has a step's name."""
        if not self.run.is_dir():
            return {}
        with os.scandir(self.run) as entries:
            return {entry.inode(): entry.path for entry in entries if entry.name.isdigit()}

    def require_synced(self, path: str, event: str) -> None:
        status = os.stat(path)
        if self.synced.get(status.st_ino) != stamp_of(status):
            self.problems.append(f"{path} {event}, and what it holds has not been synced")

    def check(self, commits: int = 0) -> None:
        """Nothing was out of order, and nothing is left to be synced now that it is announced."""
        assert self.problems == []
        assert self.unsynced_names == set(), "names in these directories changed, and are not synced"
        assert self.commits == commits


def stamp_of(status: os.stat_result) -> Stamp:
    # A sync changes none of these, and every write changes one.
    return status.st_mtime_ns, status.st_size, status.st_ino


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run", keep=None, async_save=False) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(), metrics={"loss": 0.5})
    return tmp_path / "run"


@pytest.fixture
def watch(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    yield Watch(run, monkeypatch)
    monkeypatch.undo()


def state() -> dict[str, Any]:
    return {"params": {"w": np.arange(500.0), "b": [np.float32(1), "text"]}, "opt_state": (np.arange(700),), "step": 1}


def test_a_saved_checkpoint_is_durable_before_its_name_and_its_name_before_the_return(run: Path, watch: Watch) -> None:
    """Every file and directory is synced, after its last change, before the rename; the run after it."""
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        manager.save(4, state(), metrics={"loss": 0.1})
        watch.check(commits=1)


@pytest.mark.parametrize("step", [3, 2], ids=["the newest", "an older one"])
def test_a_replaced_checkpoint_too(run: Path, watch: Watch, step: int) -> None:
    """The same where the new checkpoint takes an old one's place, and newer ones are set aside."""
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        manager.save(step, state(), force=True)
        watch.check(commits=1)


def test_an_asynchronous_save_too(run: Path, watch: Watch) -> None:
    """The same in the background, once the manager has waited."""
    with CheckpointManager(run, keep=None) as manager:
        manager.save(4, state())
        manager.wait()
        watch.check(commits=1)


def test_a_hooks_save_too(run: Path, watch: Watch) -> None:
    """The same from the hook."""
    with CheckpointHook(run, every_n_steps=4, keep=None) as hook:
        hook(4, state())
        hook.wait()
        watch.check(commits=1)


def test_a_checkpointers_save_too(run: Path, watch: Watch) -> None:
    """The same from a checkpointer without a run."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(run / "9", state())
    watch.check(commits=1)


def test_a_checkpoint_committed_in_place_has_everything_before_its_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no rename, the marker is written when all the rest is durable, and is durable at the return."""
    synced_before_marker: set[str] = set()
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not (tmp_path / "9" / "commit_success.txt").exists():
            synced_before_marker.add(path)
        fsync(descriptor)
        synced.append(path)

    monkeypatch.setattr(os, "fsync", record)
    with Checkpointer(StandardCheckpointHandler(), temporary_path_class=CommitFileTemporaryPath) as checkpointer:
        checkpointer.save(tmp_path / "9", state())
    everything = {str(tmp_path / "9"), *map(str, (tmp_path / "9").rglob("*"))}
    marker = str(tmp_path / "9" / "commit_success.txt")
    assert everything - synced_before_marker == {marker}
    assert synced[-3:] == [marker, str(tmp_path / "9"), str(tmp_path)]


def test_the_directories_of_a_new_run_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory that the first save makes is synced into its parent, up to one that was there."""
    watch = Watch(tmp_path / "new" / "deep" / "run", monkeypatch)
    with CheckpointManager(tmp_path / "new" / "deep" / "run", async_save=False) as manager:
        manager.save(1, state())
        watch.check(commits=1)


def test_what_retention_removes_has_durably_lost_its_name_first(run: Path, watch: Watch) -> None:
    """A power cut in the middle of a removal leaves no checkpoint without some of its files."""
    with CheckpointManager(run, keep=1, async_save=False) as manager:
        manager.save(4, state())
        manager.delete(4)
        watch.check(commits=1)
        assert manager.steps() == []


def test_what_is_set_aside_stays_there(run: Path, watch: Watch) -> None:
    """After a rollback, the new names are durable."""
    with CheckpointManager(run) as manager:
        manager.rollback(1)
        watch.check()
        assert manager.steps() == [1]


def test_recorded_metrics_are_durable_file_by_file(run: Path, watch: Watch) -> None:
    """Each file that `record_metrics` replaces is synced before its rename, and its directory after it."""
    with CheckpointManager(run, keep=None) as manager:
        manager.record_metrics(2, {"late": 1.0})
        watch.check()
        manager.record_metrics(2, {"loss": 0.25})
        watch.check()


def test_the_watch_sees_what_is_not_synced(run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename of what is not durable, and a name that is not, are told."""
    os.rename(run / "1" / "_CHECKSUMS", run / "1" / "new")
    assert "not been synced" in watch.problems.pop()
    os.mkdir(run / "77")
    (run / "77" / "a").write_text("a")
    os.rename(run / "77", run / "78")
    assert watch.problems
    watch.problems.clear()
    with pytest.raises(AssertionError, match="are not synced"):
        watch.check(commits=watch.commits)
