"""What a failing disk says when it is asked whether something is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import StorageError
from ckpt_hooks.storage.lookup import is_directory, is_file, is_named, is_there


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
