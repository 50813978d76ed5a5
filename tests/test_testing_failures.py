"""`ckpt_hooks.testing`: storage that fails where a test says, in this library and in code that knows nothing of it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import DiskFullError, SaveFailedError, StorageError
from ckpt_hooks.testing import SimulatedKill, StorageCall, failing_storage, for_every_failure

Write = Callable[[Path], object]


def write_by_os(path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.write(descriptor, b"text")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_by_open(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"text")


def write_unbuffered(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(b"text")


def write_by_numpy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.arange(100_000))  # NumPy writes past the files of the io module that it knows


WRITES: list[Write] = [
    write_by_os,
    write_by_open,
    write_unbuffered,
    write_by_numpy,
    lambda path: path.write_text("text"),
    lambda path: open(path, "a").close(),
]
CHANGES: dict[str, Callable[[Path], object]] = {
    "mkdir": lambda path: (path / "new").mkdir(),
    "rename": lambda path: (path / "old").rename(path / "new"),
    "replace": lambda path: (path / "old").replace(path / "new"),
    "unlink": lambda path: (path / "old").unlink(),
    "remove": lambda path: os.remove(path / "old"),
    "rmdir": lambda path: os.rmdir(path / "empty"),
    "chmod": lambda path: (path / "old").chmod(0o600),
    "truncate": lambda path: os.truncate(path / "old", 0),
    "symlink": lambda path: (path / "new").symlink_to("old"),
    "link": lambda path: (path / "new").hardlink_to(path / "old"),
    "rmtree": lambda path: shutil.rmtree(path / "empty"),
    "makedirs": lambda path: os.makedirs(path / "new" / "newer"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a file and an empty directory."""
    path = tmp_path / "folder"
    (path / "empty").mkdir(parents=True)
    (path / "old").write_text("old")
    return path


def content(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@pytest.mark.parametrize("write", WRITES)
def test_each_call_of_a_write_can_fail(folder: Path, write: Write) -> None:
    """However a file is written, each of its calls is counted, and raises the error that was asked for."""
    with failing_storage(folder) as storage:
        write(folder / "counted")
    assert storage.calls[0] == StorageCall("open", "counted")
    for at in range(1, len(storage.calls) + 1):
        full = OSError(errno.EDQUOT, "")
        with failing_storage(folder, at=at, error=full) as failing, pytest.raises(OSError, match="quota exceeded"):
            write(folder / f"failing-{at}")
        assert [call.name for call in failing.failed] == [storage.calls[at - 1].name]


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_of_a_name_can_fail(folder: Path, name: str) -> None:
    """Whatever makes, renames or removes a name is refused, and has not happened then."""
    before = content(folder)
    with failing_storage(folder, at=1, error=OSError(errno.EIO, "")), pytest.raises(OSError, match=r"\[Errno 5\]"):
        CHANGES[name](folder)
    assert content(folder) == before


def test_a_kill_stops_every_later_call(folder: Path) -> None:
    """After a simulated kill nothing changes any more, whatever is caught and cleared up, and in whatever thread."""
    before = content(folder)

    def write_and_clear_up() -> None:
        try:
            write_unbuffered(folder / "new")
        finally:
            os.unlink(folder / "new")

    def unlink() -> None:
        with contextlib.suppress(SimulatedKill):
            os.unlink(folder / "old")

    with failing_storage(folder, at=2) as storage:
        with pytest.raises(SimulatedKill):
            write_and_clear_up()
        thread = threading.Thread(target=unlink)
        thread.start()
        thread.join()
    assert content(folder) == {**before, "new": b""}
    assert [call.name for call in storage.failed] == ["write", "unlink", "unlink"]


def test_only_changes_below_the_directory_count(folder: Path, tmp_path: Path) -> None:
    """Reading, and what happens elsewhere, is let through, also in a directory whose name begins alike."""
    (tmp_path / "folder-2").mkdir()
    with failing_storage(folder, at=1) as storage:
        write_by_open(tmp_path / "elsewhere")
        write_by_os(tmp_path / "folder-2" / "file")
        assert (folder / "old").read_text() == "old"
        assert os.listdir(folder)
    assert storage.calls == []


def test_everything_is_as_before_afterwards(folder: Path) -> None:
    """When the context ends, also with an error, the functions are the real ones again."""
    real = (open, io.open, os.open, os.rename, os.fsync)
    with pytest.raises(SimulatedKill), failing_storage(folder, at=1):
        os.mkdir(folder / "new")
    assert (open, io.open, os.open, os.rename, os.fsync) == real


@pytest.mark.parametrize(
    ("async_save", "number", "expected"),
    [(False, errno.ENOSPC, DiskFullError), (False, errno.EIO, StorageError), (True, errno.EIO, SaveFailedError)],
)
def test_the_library_meets_the_failure(
    tmp_path: Path, async_save: bool, number: int, expected: type[Exception]
) -> None:
    """A save on storage that fails raises what it raises on a disk that fails, naming step and cause."""
    with CheckpointManager(tmp_path / "run", async_save=async_save) as manager:

        def save(step: int) -> None:
            manager.save(step, {"w": np.ones(3)})
            manager.wait()

        save(1)
        with failing_storage(tmp_path / "run", at=12, error=OSError(number, "")), pytest.raises(expected) as raised:
            save(2)
        assert str(tmp_path / "run" / "2") in str(raised.value)
        assert os.strerror(number) in str(raised.value)
        save(3)
        assert manager.steps() == [1, 3]


def save_carelessly(directory: str) -> None:
    Path(directory, "state").write_text("new")


def save_with_care(directory: str) -> None:
    path = Path(directory, "state.tmp")
    path.write_text("new")
    path.rename(Path(directory, "state"))


def put_old(directory: str) -> None:
    Path(directory, "state").write_text("old")


def check_old_or_new(directory: str, failure: BaseException | None) -> None:
    text = Path(directory, "state").read_text()
    assert text == "new" or (text == "old" and failure is not None), f"neither old nor new: {text!r}"


def test_every_failure_finds_a_careless_save(tmp_path: Path) -> None:
    """A save that can leave half a file is found, with the call after which it did; a careful one passes all."""
    with pytest.raises(AssertionError, match=r"after kill at call 2, write\(state\): .*neither old nor new: ''"):
        for_every_failure(save_carelessly, check_old_or_new, tmp_path / "careless", before=put_old)
    runs = for_every_failure(save_with_care, check_old_or_new, tmp_path / "careful", before=put_old)
    assert runs == 3 * 5  # open, write, rename; killed, and two errors once and for ever


def test_every_failure_passes_on_an_error_without_a_fault(tmp_path: Path) -> None:
    """A save that fails by itself is not taken for one that was made to fail."""

    def broken(directory: str) -> None:
        raise KeyError(directory)

    with pytest.raises(KeyError):
        for_every_failure(broken, check_old_or_new, tmp_path)


@pytest.mark.parametrize(
    "errors",
    [
        pytest.param(["kill"], id="kill"),
        pytest.param([OSError(errno.EIO, ""), OSError(errno.ENOSPC, "")], id="errors", marks=pytest.mark.long),
    ],
)
def test_a_save_of_ours_stands_every_failure(tmp_path: Path, errors: list[OSError | Literal["kill"]]) -> None:
    """Whatever call of a save fails, or is the last before a kill, the run has the old checkpoint or the new one."""

    def save(directory: str, step: int = 2) -> None:
        with CheckpointManager(directory, async_save=False) as manager:
            manager.save(step, {"w": np.full(3, step)})

    def check(directory: str, failure: BaseException | None) -> None:
        with CheckpointManager(directory, async_save=False) as manager:
            step, state = manager.restore_with_step()
            assert step == 2 or failure is not None
            np.testing.assert_array_equal(state["w"], np.full(3, step))
            manager.save(3, {"w": np.full(3, 3)})
        assert not [name for name in os.listdir(directory) if not name.isdigit()]

    def before(directory: str) -> None:
        save(directory, 1)

    assert for_every_failure(save, check, tmp_path, before=before, errors=errors) > 10
