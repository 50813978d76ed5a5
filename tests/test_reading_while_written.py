"""Reads while a writer is at work: a checkpoint is read as it was at one moment, and what is removed is not damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import CheckpointManager, reading
from ckpt_hooks.committed import is_committed
from ckpt_hooks.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from ckpt_hooks.reading import read_unchanged
from ckpt_hooks.restoring import read_newest, restore_checkpoint
from ckpt_hooks.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def save(run: Path, step: int, value: float = 0.0, **options: Any) -> None:
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        manager.save(step, {"a": np.full(500, value), "b": np.full(500, value)}, metrics={"loss": value}, **options)


def once(action: Callable[[], object]) -> Callable[[], None]:
    """Does something at the first call only."""
    pending = [action]

    def act() -> None:
        if pending:
            pending.pop()()

    return act


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(run: Path) -> None:
    """What is returned is the old one or the new one, and not an item of each."""
    save(run, 1, 1.0)
    replace = once(lambda: save(run, 1, 2.0, force=True))

    def read_item_by_item() -> list[float]:
        first = restore_checkpoint(str(run / "1"), items=["a"])[0]["a"]
        replace()
        second = restore_checkpoint(str(run / "1"), items=["b"])[0]["b"]
        return [float(first[0]), float(second[0])]

    assert read_unchanged(str(run / "1"), read_item_by_item) == [2.0, 2.0]


def test_an_error_while_metrics_are_recorded_is_no_damage(run: Path) -> None:
    """Checksums read before `record_metrics`, and a file after it: it is read anew."""
    save(run, 1, 1.0)
    attempts: list[int] = []

    def read() -> str:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            with CheckpointManager(run) as manager:
                manager.record_metrics(1, {"loss": 0.5})
            raise CorruptCheckpointError("old checksums, new file")
        return "read"

    assert read_unchanged(str(run / "1"), read) == "read"
    assert len(attempts) == 2


def test_an_error_while_nothing_changes_is_raised_at_once(run: Path) -> None:
    """Damage is told, after one read."""
    save(run, 1)
    attempts = []

    def read() -> None:
        attempts.append(1)
        raise CorruptCheckpointError("damage")

    with pytest.raises(CorruptCheckpointError, match="damage"):
        read_unchanged(str(run / "1"), read)
    assert len(attempts) == 1


@pytest.mark.parametrize("found", ["an error", "problems"])
def test_what_is_removed_while_it_is_read_was_not_found(run: Path, found: str) -> None:
    """Removal by a writer is told as what it is, whatever it led to."""
    save(run, 1)

    def read() -> list[str]:
        shutil.rmtree(run / "1")
        if found == "an error":
            os.stat(run / "1" / "a")
        return [found]

    with pytest.raises(CheckpointNotFoundError, match="removed while it was read"):
        read_unchanged(str(run / "1"), read, is_doubtful=bool)


def test_what_was_read_before_the_removal_is_returned(run: Path) -> None:
    """A checkpoint that was whole when it was read may go afterwards."""
    save(run, 1, 3.0)

    def read() -> float:
        value = restore_checkpoint(str(run / "1"))[0]["a"][0]
        shutil.rmtree(run / "1")
        return float(value)

    assert read_unchanged(str(run / "1"), read) == 3.0


def test_a_doubtful_result_counts_only_where_nothing_changed(run: Path) -> None:
    """Problems that `verify` finds while the checkpoint is replaced are not the checkpoint's."""
    save(run, 1)
    replace = once(lambda: save(run, 1, 1.0, force=True))
    results = [["problem"], []]

    def read() -> list[str]:
        replace()
        return results.pop(0)

    assert read_unchanged(str(run / "1"), read, is_doubtful=bool) == []
    assert read_unchanged(str(run / "1"), lambda: ["damage"], is_doubtful=bool) == ["damage"]


def test_a_checkpoint_that_never_stays_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading anew has an end."""
    monkeypatch.setattr(reading, "_MAX_READS", 3)
    save(run, 1)
    with pytest.raises(CheckpointError, match="replaced 3 times"):
        read_unchanged(str(run / "1"), lambda: save(run, 1, force=True))


def test_the_newest_is_looked_for_anew_where_the_one_that_was_listed_is_gone(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Retention that overtakes a reader leads it to the newer checkpoint, and not to an older one or to an error."""
    save(run, 10)
    save(run, 20, 2.0)

    def overtake() -> None:
        save(run, 30, 3.0)
        shutil.rmtree(run / "20")

    overtake_once = once(overtake)

    def read(path: str) -> float:
        overtake_once()
        return float(restore_checkpoint(path)[0]["a"][0])

    directory = RunDirectory(run)
    assert read_newest(directory, read) == (30, 3.0)
    assert not directory.rejected
    assert "rejected" not in caplog.text  # nobody is told of damage that there is not


def test_the_newest_that_goes_when_it_has_been_read_was_the_newest(run: Path) -> None:
    """A reader that has read all of it need not read another one because retention came after it."""
    save(run, 10)
    save(run, 20, 2.0)

    def read(path: str) -> float:
        value = float(restore_checkpoint(path)[0]["a"][0])
        shutil.rmtree(path)
        return value

    assert read_newest(RunDirectory(run), read) == (20, 2.0)


def test_a_directory_that_goes_while_one_looks_is_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a directory is committed is False, and no error, where it is removed in between."""
    save(run, 1)
    stat = os.stat

    def remove_after(path: str, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        monkeypatch.undo()
        shutil.rmtree(path)
        return found

    monkeypatch.setattr(os, "stat", remove_after)
    assert not is_committed(str(run / "1"))


def test_what_takes_the_place_of_the_newest_is_the_newest_only_when_newer_ones_have_gone(run: Path) -> None:
    """A listing is overtaken by a newer step, and then by the return to the one that it names."""
    save(run, 10)
    save(run, 20, 2.0)
    directory = RunDirectory(run)

    def overtake() -> None:
        save(run, 30, 3.0)
        save(run, 20, 2.5, force=True)
        os.rename(run / "30.rolled_back", run / "30")  # the return is half done: 20 is there, and 30 is there still

    overtake_once = once(overtake)

    def read(path: str) -> float:
        overtake_once()
        return float(restore_checkpoint(path)[0]["a"][0])

    assert read_newest(directory, read) == (30, 3.0)


def test_the_newest_is_looked_for_anew_where_the_listing_is_overtaken_before_the_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, where it happens between the listing and the first look at the step."""
    save(run, 20, 2.0)
    directory = RunDirectory(run)
    watch = reading.Watch.__init__

    def overtaken(self: reading.Watch, path: str) -> None:
        monkeypatch.undo()
        save(run, 30, 3.0)
        save(run, 20, 2.5, force=True)
        os.rename(run / "30.rolled_back", run / "30")
        watch(self, path)

    monkeypatch.setattr(reading.Watch, "__init__", overtaken)
    assert read_newest(directory, lambda path: float(restore_checkpoint(path)[0]["a"][0])) == (30, 3.0)
