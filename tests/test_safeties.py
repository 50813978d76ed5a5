"""Safeties that no other test would miss: each was found by `python -m attacks.mutations`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckpt_hooks import (
    AsyncCheckpointer,
    Checkpointer,
    CheckpointManager,
    StandardCheckpointHandler,
    metadata_store,
)
from ckpt_hooks.errors import CorruptCheckpointError, ItemNotFoundError
from ckpt_hooks.reading import read_unchanged
from ckpt_hooks.restoring import restore_checkpoint
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.commit import DirectoryLock
from ckpt_hooks.temporary_paths import (
    AtomicRenameTemporaryPath,
    CommitFileTemporaryPath,
    NestedTemporaryPath,
    TemporaryPath,
)
from tests.faulty import delay, fail

STATE = {"params": np.arange(500.0), "step": 1}


def test_damaged_metadata_is_not_told(tmp_path: Path) -> None:
    """A changed digit in the step metadata is still JSON, and is neither returned nor ranked."""
    with CheckpointManager(tmp_path, async_save=False) as manager:
        manager.save(1, STATE, metrics={"loss": 0.5})
        manager.save(2, STATE, metrics={"loss": 0.7})
    path = tmp_path / "2" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(b"0.7", b"0.1"))
    reader = CheckpointManager(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="_CHECKPOINT_METADATA"):
        reader.metadata(2)
    assert reader.best_step("loss") == 1


@pytest.mark.parametrize("left", ["nothing", "half a save"])
def test_a_forced_save_in_place_needs_no_checkpoint_to_replace(tmp_path: Path, left: str) -> None:
    """Only a checkpoint is kept until the new one is there; what a dead writer left is not one."""
    path = tmp_path / "7"
    if left == "half a save":
        (path / "params").mkdir(parents=True)
        (path / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 1}')
    with Checkpointer(StandardCheckpointHandler(), temporary_path_class=CommitFileTemporaryPath) as checkpointer:
        checkpointer.save(path, STATE, force=True)
        np.testing.assert_array_equal(checkpointer.restore(path)["params"], STATE["params"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["7"]


@pytest.mark.parametrize("path_class", [AtomicRenameTemporaryPath, CommitFileTemporaryPath])
def test_a_commit_gives_the_lock_back(tmp_path: Path, path_class: type[TemporaryPath]) -> None:
    """Who has committed keeps nobody from writing there, also while the temporary path is still referred to."""
    temporary = path_class.from_final(tmp_path / "7")
    temporary.create()
    temporary.finalize()
    DirectoryLock(str(tmp_path / "7")).release()
    assert temporary.get_final().is_dir()


def test_a_leftover_that_cannot_be_removed_is_not_kept_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has failed to remove what a dead writer left keeps nobody from it, also while the error is held."""
    temporary = AtomicRenameTemporaryPath.from_final(tmp_path / "7")
    leftover = tmp_path / "7.orbax-checkpoint-tmp"
    leftover.mkdir()
    fail(monkeypatch, commit, "remove_tree", errno.EIO)
    with pytest.raises(OSError, match="Input/output") as held:
        temporary.create()
    DirectoryLock(str(leftover)).release()
    assert held.value.__traceback__ is not None


def test_a_checkpoint_without_items_has_parts_and_no_objects(tmp_path: Path) -> None:
    """A checkpoint that is one pytree has no item that belongs to an object, and says so; its keys stand for items."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", {"w": np.arange(3.0), "b": 1})
    with pytest.raises(ItemNotFoundError, match="one pytree without items"):
        restore_checkpoint(str(tmp_path / "1"), objects={"data": object()})
    assert restore_checkpoint(str(tmp_path / "1"), items=["b"])[0] == {"b": 1}
    with pytest.raises(ItemNotFoundError, match="nothing is saved at 'x'"):
        restore_checkpoint(str(tmp_path / "1"), items=["x"])


# ------------------------------------------------------------------ replacing and removing


def test_a_checkpoint_that_is_replaced_never_lacks_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that can exchange two names, a forced save has no instant without a checkpoint."""
    final, missing = tmp_path / "7", []

    def watched(call: Callable[..., None]) -> Callable[..., None]:
        def watch(*args: object, **options: object) -> None:
            call(*args, **options)
            missing.extend([] if final.exists() else [args])

        return watch

    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(final, STATE)
        for name in ("rename", "fsync", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, watched(getattr(os, name)))
        checkpointer.save(final, {**STATE, "step": 2}, force=True)
        assert checkpointer.restore(final)["step"] == 2
    assert missing == []


def test_what_a_disk_kept_is_removed_by_the_next_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that failed is tried again, once it can be done; but not while a writer uses that name again."""
    run, kept = tmp_path / "run", tmp_path / "run" / f"1{commit.TMP_SUFFIX}"
    kept.mkdir(parents=True)
    with monkeypatch.context() as failing:
        fail(failing, shutil, "rmtree", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            commit.remove_tree(str(kept))
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        lock = DirectoryLock(str(kept))
        checkpointer.save(run / "2", STATE)
        assert kept.exists(), "a live writer has it"
        lock.release()
        commit._unremoved.add(str(kept))
        checkpointer.save(run / "3", STATE)
        assert not kept.exists()
        kept.write_text("of somebody else")
        checkpointer.save(run / "4", STATE)
        assert kept.exists(), "it has been removed, and is no longer this process's to remove"


def test_a_replacement_that_a_dead_writer_began_is_undone(tmp_path: Path) -> None:
    """While it is being written, nobody touches it; once its writer is dead, the checkpoint before is back."""
    final, replaced = tmp_path / "7", tmp_path / f"7.replaced{commit.TMP_SUFFIX}"
    with Checkpointer(StandardCheckpointHandler(), temporary_path_class=CommitFileTemporaryPath) as checkpointer:
        checkpointer.save(final, STATE)
        commit.move_to_replaced(str(final))
        (final / "half").mkdir(parents=True)
        lock = DirectoryLock(str(final))
        commit.remove_dead_temporaries(str(tmp_path))
        assert (final / "half").exists() and replaced.exists()
        lock.release()
        commit.remove_dead_temporaries(str(tmp_path))
        assert checkpointer.restore(final)["step"] == 1
    assert os.listdir(tmp_path) == ["7"]


@pytest.mark.parametrize("path_class", [AtomicRenameTemporaryPath, CommitFileTemporaryPath])
def test_a_discarded_save_holds_nothing_open(tmp_path: Path, path_class: type[TemporaryPath]) -> None:
    """Thousands of failed saves must not use up the descriptors of a process."""
    before = len(os.listdir("/proc/self/fd"))
    temporary = path_class.from_final(tmp_path / "7")
    temporary.create()
    temporary.discard()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_item_does_not_take_a_file_for_its_directory(tmp_path: Path) -> None:
    """Another process may have made an item's directory first; a file by its name was made by somebody else."""
    temporary = NestedTemporaryPath.from_final(tmp_path / "params")
    (tmp_path / f"params{commit.TMP_SUFFIX}").write_text("of somebody else")
    with pytest.raises(FileExistsError):
        temporary.create()


def test_a_slow_background_store_is_sealed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata is all there before its checksum is taken, however long a store that does not block needs."""
    delay(monkeypatch, commit, "replace_file", secs=0.1)
    store = metadata_store(enable_write=True, blocking_write=False)
    with AsyncCheckpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        checkpointer.save(tmp_path / "7", STATE, custom_metadata={"epoch": 1})
        checkpointer.wait_until_finished()
        assert checkpointer.restore(tmp_path / "7")["step"] == 1
        assert checkpointer.metadata(tmp_path / "7").commit_timestamp_nsecs
    store.close()
    assert CheckpointManager(tmp_path).verify(7) == []


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_replaced_while_it_is_read_is_read_anew(tmp_path: Path, fails: bool) -> None:
    """Neither a result nor an error counts that may be half of each, also where no checksums tell the two apart."""
    path, reads = tmp_path / "7", []
    path.mkdir()

    def read() -> int:
        reads.append(path)
        if len(reads) == 1:
            path.rename(tmp_path / "before")
            path.mkdir()
            if fails:
                raise ValueError("half of each")
        return len(reads)

    assert read_unchanged(str(path), read) == 2
