"""What a failing disk says when it is asked whether something is there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import StorageError
from ckpt_hooks.storage.checksums import FileChecksums, array_problems
from ckpt_hooks.storage.commit import sync_tree
from ckpt_hooks.storage.lookup import is_directory, is_file, is_named, is_there, walk


def fail_once(monkeypatch: pytest.MonkeyPatch, path: Path, code: int = errno.EIO) -> None:
    """The first look at `path` fails."""
    stat, faults = os.stat, iter([code])

    def failing(asked: Any, **options: Any) -> os.stat_result:
        if not isinstance(asked, int) and os.fspath(asked) == str(path):
            number = next(faults, None)
            if number is not None:
                raise OSError(number, os.strerror(number), str(path))
        return stat(asked, **options)

    monkeypatch.setattr(os, "stat", failing)


@pytest.mark.parametrize("ask", [is_directory, is_file, is_named, is_there])
def test_a_disk_that_fails_gives_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ask: Callable[[Path], bool]
) -> None:
    """EIO is an error that names the path, where `os.path` would say that nothing is there."""
    fail_once(monkeypatch, tmp_path)
    with pytest.raises(StorageError, match=str(tmp_path)):
        ask(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.EACCES])
def test_what_cannot_be_there_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    """As for `os.path`: absent, below a file, or in a directory that one may not enter."""
    fail_once(monkeypatch, tmp_path, code)
    assert not is_there(tmp_path)
    assert not is_there("/a\0b")


def test_links_are_followed_but_for_their_names(tmp_path: Path) -> None:
    """A link to nothing takes a name, and is neither a file nor a directory."""
    os.symlink(tmp_path / "nothing", tmp_path / "link")
    answers = [ask(tmp_path / "link") for ask in (is_named, is_there, is_file, is_directory)]
    assert answers == [True, False, False, False]
    (tmp_path / "nothing").mkdir()
    assert is_directory(tmp_path / "link")


@pytest.mark.parametrize("go_through", [sync_tree, FileChecksums.of_directory, lambda path: list(array_problems(path))])
def test_a_directory_that_cannot_be_listed_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, go_through: Callable[[str], object]
) -> None:
    """What is in it would be neither synced nor covered nor verified, and nobody would be told."""
    (tmp_path / "params").mkdir()
    scandir = os.scandir

    def failing(asked: Any) -> Any:
        if os.fspath(asked) == str(tmp_path / "params"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), asked)
        return scandir(asked)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match=r"Input/output error.*params"):
        go_through(str(tmp_path))


def test_a_name_that_cannot_be_told_from_a_directory_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some file systems list names alone, and whether one is a directory is a look-up more, which may fail."""

    class Entry:
        name = "params"

        def is_dir(self) -> bool:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)

    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext([Entry()]))
    with pytest.raises(OSError, match=r"Input/output error.*params"):
        list(walk(str(tmp_path)))


def test_a_link_to_a_directory_is_listed_and_not_followed(tmp_path: Path) -> None:
    """As by `os.walk`: what it leads to is no part of the checkpoint, and may be a directory that it is in."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path, tmp_path / "folder" / "link")
    assert list(walk(str(tmp_path))) == list(os.walk(tmp_path))


def test_a_failing_look_at_an_item_costs_no_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The newest checkpoint is read once more, and not taken for one that lacks the item."""
    with CheckpointManager(tmp_path / "run", async_save=False) as manager:
        for step in (1, 2):
            manager.save(step, {"params": {"w": np.full(3, step)}})
        fail_once(monkeypatch, tmp_path / "run" / "2" / "params")
        assert manager.restore()["params"]["w"][0] == 2
        assert manager.steps() == [1, 2]


def test_a_rollback_that_cannot_look_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It does not return as if the newer steps had gone."""
    with CheckpointManager(tmp_path / "run", async_save=False) as manager:
        for step in (1, 2):
            manager.save(step, {"params": {"w": np.full(3, step)}})
        fail_once(monkeypatch, tmp_path / "run" / "2")
        with pytest.raises(StorageError, match="/2"):
            manager.rollback(1)
        manager.rollback(1)
        assert manager.steps() == [1]
