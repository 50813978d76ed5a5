"""Disks that are full, directories that cannot be written, files that are damaged: what was asked, found, and to do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import CheckpointHook, CheckpointManager
from ckpt_hooks.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DiskFullError,
    NoValidCheckpointError,
    SaveFailedError,
    StructureMismatchError,
    UnwritableDirectoryError,
)

MIB = 1 << 20
REPOSITORY = Path(ckpt_hooks.__file__).parents[1]


def mount(*arguments: object) -> None:
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")


def unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", path)
    yield path
    unmount(path)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A run of the steps 5 and 10 on a read-only file system."""
    with CheckpointManager(tmp_path / "run", async_save=False) as manager:
        for step in (5, 10):
            manager.save(step, state_at(step), metrics={"loss": 1.0})
    path = tmp_path / "mounted"
    path.mkdir()
    mount("--bind", tmp_path / "run", path)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)
        yield path
    finally:
        unmount(path)


def state_at(step: int, nbytes: int = 4000) -> dict[str, Any]:
    return {"params": {"w": np.full(nbytes // 8, float(step))}, "step": step}


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# ------------------------------------------------------------------ full disks


@pytest.mark.parametrize("async_save", [False, True])
def test_too_little_space_is_found_before_writing(disk: Path, async_save: bool) -> None:
    """A checkpoint that cannot fit is refused before a byte is written, saying what it needs and what is free."""
    with CheckpointManager(disk / "run", async_save=async_save) as manager:
        manager.save(1, state_at(1, 2 * MIB))
        with pytest.raises(
            DiskFullError, match=r"run/2: the checkpoint needs [\d,]+ bytes and [\d,]+ are free, of which 1,048,576 are"
        ) as error:
            manager.save(2, state_at(2, 20 * MIB))
        assert isinstance(error.value, OSError)
        assert error.value.errno == errno.ENOSPC
        assert "keep" in str(error.value)
        assert names(disk / "run") == ["1"]
        manager.save(2, state_at(2, 2 * MIB))
        manager.wait()
        assert manager.steps() == [1, 2]
        assert manager.verify(2) == []


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_fills_up_while_writing(disk: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    """A disk that is full in the middle of a save fails it clearly, keeps no part of it, and the next one works."""
    # Somebody else takes the space between the look at it and the writing.
    monkeypatch.setattr("ckpt_hooks.checkpointer.require_free_bytes", lambda directory, said: None)
    with CheckpointManager(disk / "run", async_save=async_save) as manager:
        manager.save(1, state_at(1, 2 * MIB))
        manager.wait()
        with pytest.raises(SaveFailedError if async_save else DiskFullError, match="full") as error:
            save_and_wait(manager, 2, state_at(2, 20 * MIB))
        assert "free some space" in str(error.value)
        if async_save:
            assert isinstance(error.value.__cause__, DiskFullError)
        assert names(disk / "run") == ["1"]
        np.testing.assert_array_equal(manager.restore()["params"]["w"], state_at(1, 2 * MIB)["params"]["w"])
        save_and_wait(manager, 2, state_at(2, 2 * MIB))
        assert manager.steps() == [1, 2]
        assert manager.verify(2) == []


def save_and_wait(manager: CheckpointManager, step: int, state: Any) -> None:
    manager.save(step, state)
    manager.wait()


def test_a_disk_without_inodes(tmp_path: Path) -> None:
    """A file system that takes no more files, though it has space, fails a save at any point, and nothing is left."""
    for inodes in range(4, 24, 3):
        path = tmp_path / str(inodes)
        path.mkdir()
        mount("-t", "tmpfs", "-o", f"size=16m,nr_inodes={inodes}", "tmpfs", path)
        try:
            with CheckpointManager(path / "run", async_save=False) as manager:
                with pytest.raises(DiskFullError, match=r"full.*No space left.*free some space"):
                    manager.save(1, state_at(1))
                assert manager.steps() == []
                assert names(path / "run") == []
                mount("-o", "remount,nr_inodes=1000", path)
                manager.save(1, state_at(1))
                assert manager.verify(1) == []
        finally:
            unmount(path)


def test_a_full_disk_does_not_stop_a_run_that_only_warns(
    disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_save_error="warn" a full disk is logged, training goes on, and once there is space, saves work again."""
    filler = disk / "filler"
    with CheckpointHook(disk / "run", every_n_steps=1, keep=1, on_save_error="warn") as hook:
        assert hook(1, state_at(1, 2 * MIB))
        hook.wait()
        filler.write_bytes(bytes(12 * MIB))
        with caplog.at_level(logging.ERROR, "ckpt_hooks.hook"):
            assert not hook(2, state_at(2, 2 * MIB))
        assert any("needs" in record.getMessage() and "free" in record.getMessage() for record in caplog.records)
        filler.unlink()
        assert hook(3, state_at(3, 2 * MIB))
    assert CheckpointManager(disk / "run").steps() == [3]


def fill(disk: Path) -> None:
    """Leaves no byte free."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_record_metrics_on_a_full_disk_leaves_the_old_ones(disk: Path) -> None:
    """Metrics that cannot be written leave the checkpoint valid, with the metrics that it had."""
    with CheckpointManager(disk / "run", async_save=False) as manager:
        manager.save(1, state_at(1), metrics={"loss": 1.0})
        fill(disk)
        with pytest.raises(DiskFullError, match="full"):
            manager.record_metrics(1, {"loss": 2.0})
        os.unlink(disk / "filler")
    with CheckpointManager(disk / "run", async_save=False) as manager:
        assert manager.verify(1) == []
        assert manager.metadata(1).metrics == {"loss": 1.0}
        manager.record_metrics(1, {"loss": 2.0})
        assert manager.verify(1) == []
        assert manager.metadata(1).metrics == {"loss": 2.0}


# ------------------------------------------------------------------ directories that cannot be written


CHANGES: dict[str, Callable[[CheckpointManager], object]] = {
    "save": lambda manager: manager.save(20, state_at(20)),
    "force": lambda manager: manager.save(5, state_at(5), force=True),
    "delete": lambda manager: manager.delete(5),
    "rollback": lambda manager: manager.rollback(5),
    "record_metrics": lambda manager: manager.record_metrics(5, {"loss": 0.5}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("async_save", [False, True])
def test_a_read_only_run_says_so(read_only: Path, change: str, async_save: bool) -> None:
    """Every change of a run on a read-only file system is an OSError naming the path, the reason, and what to do."""
    with CheckpointManager(read_only, async_save=async_save) as manager:
        with pytest.raises(UnwritableDirectoryError, match=r"mounted.*Read-only file system.*Choose a directory"):
            CHANGES[change](manager)
        assert manager.steps() == [5, 10]
        assert manager.verify(5) == []


def test_a_save_in_place_of_a_damaged_checkpoint_on_a_read_only_run(tmp_path: Path, read_only: Path) -> None:
    """Also setting a damaged checkpoint aside says that the run is read-only."""
    (tmp_path / "run" / "10" / "params" / "manifest.ocdbt").write_bytes(b"")
    with CheckpointManager(read_only, async_save=False) as manager:
        assert manager.restore()["step"] == 5
        with pytest.raises(UnwritableDirectoryError, match=r"mounted.*Read-only file system"):
            manager.save(20, state_at(20))


AS_NOBODY = """
import sys
import numpy as np
from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import CheckpointError
manager = CheckpointManager(sys.argv[1], async_save=False)
print(manager.steps())
if manager.steps():
    print(manager.restore()["step"])
try:
    manager.save(20, {"w": np.ones(3)})
except CheckpointError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def for_all(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach and read, and only we can write."""
    path = Path("/tmp") / f"ckpt_hooks-{os.getpid()}-{tmp_path.name}"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def run_as_nobody(*arguments: object) -> list[str]:
    """The rows printed by AS_NOBODY under another user."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    probe = f"import os, numpy; os.listdir({str(REPOSITORY)!r})"
    if subprocess.run([*become, sys.executable, "-c", probe], capture_output=True, cwd="/").returncode:
        pytest.skip("another user cannot read this Python or this repository")
    result = subprocess.run(
        [*become, sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"},
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_another_users_run_can_be_read_and_not_written(for_all: Path) -> None:
    """Without the right to write, reading works, and a save is an error that says what may not be done where."""
    run = for_all / "run"
    with CheckpointManager(run, async_save=False) as manager:
        manager.save(5, state_at(5))
    before = names(run)
    steps, step, error = run_as_nobody(run)
    assert (steps, step) == ("[5]", "5")
    assert re.match(r"UnwritableDirectoryError .*run.*Permission denied\. Choose a directory", error)
    assert names(run) == before


def test_a_directory_that_cannot_be_made(for_all: Path) -> None:
    """A run that cannot be created is an error that names it."""
    steps, error = run_as_nobody(for_all / "new" / "run")
    assert steps == "[]"
    assert re.match(r"UnwritableDirectoryError .*new/run.*Permission denied\. Choose a directory", error)
    assert names(for_all) == []


# ------------------------------------------------------------------ damaged files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one checkpoint with every kind of file: a tree with strings and keys, JSON, an iterator."""
    import jax

    class Data:
        def get_state(self) -> dict[str, int]:
            return {"position": 3}

        def set_state(self, state: dict[str, int]) -> None:
            raise AssertionError("a damaged checkpoint must not be set")

    state = {**state_at(5), "mixed": {"key": jax.random.key(0), "name": "digits", "list": [1, np.float32(2)]}}
    with CheckpointManager(tmp_path / "run", async_save=False) as manager:
        manager.save(5, state, metrics={"loss": 1.0}, data=Data())
    return tmp_path / "run"


def files_in(checkpoint: Path) -> list[Path]:
    # What a commit marker says is nowhere trusted, and so not checked.
    return [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != "commit_success.txt"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def remove(path: Path) -> None:
    path.unlink()


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{[" * 10)


@pytest.mark.parametrize("spoil", [flip, cut, empty, extend, remove, scramble])
def test_damage_to_any_file_is_found_and_named(run: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Whichever file of a checkpoint is damaged, in whatever way, restore and verify find it and name its place."""
    paths = [path.relative_to(run) for path in files_in(run / "5")]
    assert len(paths) > 20
    for path in paths:
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        if spoil is not empty or (copy / path).stat().st_size:
            spoil(copy / path)
            manager = CheckpointManager(copy)
            assert any(str(copy / "5") in problem for problem in manager.verify(5)), path
            # Restore reads no metrics, and of a data file only what belongs to an array.
            if path.parts[1] != "metrics" and not (spoil is extend and "d" in path.parts):
                with pytest.raises(CorruptCheckpointError, match=re.escape(str(copy / "5"))):
                    manager.restore(step=5)
                with pytest.raises(NoValidCheckpointError, match=re.escape(str(copy / "5"))):
                    manager.restore()
        shutil.rmtree(copy)


def test_a_like_of_the_wrong_structure_lists_every_leaf(tmp_path: Path) -> None:
    """A like of the wrong structure is an error that lists each leaf, what it was, what was wanted, and what to do."""
    with CheckpointManager(tmp_path, async_save=False) as manager:
        manager.save(1, {"params": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2), "scale": np.zeros(2), "n": 3}})
        like = {"params": {"kernal": np.zeros((3, 2)), "bias": np.zeros(3), "scale": np.zeros(2, int), "n": 3}}
        with pytest.raises(StructureMismatchError) as error:
            manager.restore(like)
    text = str(error.value)
    assert re.search(r"missing +kernal.*float64\[3, 2\].*'kernel'", text)
    assert re.search(r"unexpected +kernel.*float64\[3, 2\]", text)
    assert re.search(r"reshaped +bias.*float64\[2\].*float64\[3\]", text)
    assert re.search(r"retyped +scale.*float64\[2\].*int64\[2\]", text)
    assert not re.search(r"^ *\w+ +n:", text, re.MULTILINE)
    assert "cast=True" in text


@pytest.mark.parametrize("directory", ["gs://bucket/run", "s3://bucket/run"])
def test_object_stores_are_refused_by_name(directory: str) -> None:
    """A directory that is no path of a file system is refused rather than made in the working directory."""
    for kind in (CheckpointManager, CheckpointHook):
        with pytest.raises(CheckpointError, match=re.escape(directory)):
            kind(directory)
