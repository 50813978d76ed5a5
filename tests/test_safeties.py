"""Safeties that no other test would miss: each was found by `python -m attacks.mutations`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt_hooks import Checkpointer, CheckpointManager, StandardCheckpointHandler
from ckpt_hooks.errors import CorruptCheckpointError, ItemNotFoundError
from ckpt_hooks.restoring import restore_checkpoint
from ckpt_hooks.storage.commit import DirectoryLock
from ckpt_hooks.temporary_paths import AtomicRenameTemporaryPath, CommitFileTemporaryPath, TemporaryPath

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


def test_a_checkpoint_without_items_has_parts_and_no_objects(tmp_path: Path) -> None:
    """A checkpoint that is one pytree has no item that belongs to an object, and says so; its keys stand for items."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", {"w": np.arange(3.0), "b": 1})
    with pytest.raises(ItemNotFoundError, match="one pytree without items"):
        restore_checkpoint(str(tmp_path / "1"), objects={"data": object()})
    assert restore_checkpoint(str(tmp_path / "1"), items=["b"])[0] == {"b": 1}
    with pytest.raises(ItemNotFoundError, match="nothing is saved at 'x'"):
        restore_checkpoint(str(tmp_path / "1"), items=["x"])
