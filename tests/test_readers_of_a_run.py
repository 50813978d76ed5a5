"""Managers that only read a run, while another one writes to it: they list and restore what there is by now."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_hooks.run
from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import CheckpointNotFoundError, IncompleteCheckpointError
from ckpt_hooks.storage.checksums import FileChecksums


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def writer(run: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        save(manager, 10, 20)
        yield manager


def save(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        manager.save(step, {"params": np.full(500, step)}, metrics={"loss": float(step)}, **options)


def after_first(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Does something right after the first call of a function, as another process may at any moment."""
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        monkeypatch.setattr(owner, name, real)
        action()
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("ask", ["steps", "latest_step", "restore"])
def test_a_listing_that_is_overtaken_is_made_anew(
    run: Path, writer: CheckpointManager, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """What was listed and is gone has given way to newer ones: neither an older one nor none is the newest then."""

    def overtake() -> None:
        save(writer, 30)
        writer.delete(20)

    reader = CheckpointManager(run)
    after_first(monkeypatch, os, "listdir", overtake)
    answers = {"steps": [10, 30], "latest_step": 30}
    found = getattr(reader, ask)()
    assert found["params"][0] == 30 if ask == "restore" else found == answers[ask]


@pytest.mark.parametrize("ask", ["restore", "metadata", "verify"])
def test_a_step_that_goes_while_it_is_asked_for_was_not_found(
    run: Path, writer: CheckpointManager, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """It is told as gone, and neither as damaged nor as never committed."""
    reader = CheckpointManager(run)
    calls = {
        "restore": lambda: reader.restore(step=20),
        "metadata": lambda: reader.metadata(20),
        "verify": lambda: reader.verify(20),
    }
    for owner, name in ((os, "stat"), (FileChecksums, "of_checkpoint")):
        with monkeypatch.context() as patch:
            after_first(patch, owner, name, lambda: writer.delete(20))
            with pytest.raises(CheckpointNotFoundError):
                calls[ask]()
        save(writer, 20, force=True)


def test_a_directory_that_goes_while_it_is_looked_at_was_not_found(
    run: Path, writer: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program removes in that moment is gone, and no save that was never committed."""
    reader = CheckpointManager(run)
    (run / "30").mkdir()
    with pytest.raises(IncompleteCheckpointError):
        reader.restore(step=30)
    after_first(monkeypatch, ckpt_hooks.run, "is_directory", (run / "30").rmdir)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 30"):
        reader.restore(step=30)


@pytest.mark.parametrize("ask", ["metadata", "verify", "best_step", "restore"])
def test_late_metrics_are_no_damage_to_who_reads(
    run: Path, writer: CheckpointManager, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Checksums that were read before the metrics were recorded say nothing about the files after it."""
    reader = CheckpointManager(run)
    after_first(monkeypatch, FileChecksums, "of_checkpoint", lambda: writer.record_metrics(20, {"loss": 0.5}))
    calls: dict[str, Callable[[], Any]] = {
        "metadata": lambda: reader.metadata(20).metrics,
        "verify": lambda: reader.verify(20),
        "best_step": lambda: [reader.best_step("loss"), reader.best_step("loss")][1],
        "restore": lambda: reader.restore()["params"][0],
    }
    expected = {"metadata": {"loss": 0.5}, "verify": [], "best_step": 20, "restore": 20}
    assert calls[ask]() == expected[ask]


def test_a_reader_ranks_by_the_metrics_that_there_are_now(run: Path, writer: CheckpointManager) -> None:
    """A reader that lives long sees what was recorded since it last looked."""
    reader = CheckpointManager(run)
    assert reader.best_step("loss") == 10
    writer.record_metrics(20, {"loss": 0.0})
    assert reader.best_step("loss") == 20


def test_a_step_that_was_damaged_and_is_saved_again_is_listed_again(run: Path, writer: CheckpointManager) -> None:
    """A reader that has rejected a checkpoint takes the next one of that number for what it is."""
    reader = CheckpointManager(run)
    (run / "20" / "params" / "_METADATA").unlink()
    assert reader.restore()["params"][0] == 10
    assert reader.steps() == [10]
    save(writer, 20, force=True)
    assert reader.steps() == [10, 20]
    assert reader.restore()["params"][0] == 20


def test_the_newest_goes_back_at_once(run: Path, writer: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """While newer steps are set aside after a save with force, none of them becomes the newest."""
    save(writer, *range(30, 200, 10))
    reader = CheckpointManager(run)
    seen: set[int | None] = set()
    rename = os.rename

    def look_after(*paths: str) -> None:
        rename(*paths)
        seen.add(reader.latest_step())

    monkeypatch.setattr(os, "rename", look_after)
    save(writer, 15, force=True)
    assert seen <= {190, 15}


class _Emptied:
    """What a directory lists that was emptied while it was listed."""

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(())

    def __exit__(self, *error: object) -> None:
        pass


def test_a_checkpoint_that_is_removed_while_it_is_listed_is_no_empty_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that overtakes the listing of the items is told; what is left of them is not restored as all."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"params": {"w": np.ones(3)}, "step": 1})
        manager.wait()
        listed = os.scandir

        def overtaken(path: Any) -> Any:
            if isinstance(path, int) or Path(path).name != "1":
                return listed(path)
            shutil.rmtree(path)
            return _Emptied()

        reader = CheckpointManager(tmp_path)
        monkeypatch.setattr("ckpt_hooks.restoring.os.scandir", overtaken)
        with pytest.raises(CheckpointNotFoundError, match="removed while"):
            reader.restore(step=1)


def test_the_best_step_is_sought_anew_where_checkpoints_are_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a removed checkpoint recorded is not taken for nothing: the best is the best of those that are there."""
    with CheckpointManager(tmp_path, keep=None) as manager:
        for step in (1, 2):
            manager.save(step, {"step": step}, metrics={"loss": float(step)})
        manager.wait()
        reader = CheckpointManager(tmp_path)
        read = reader._run.metrics

        def overtaken(step: int) -> Any:
            if step == 2:
                shutil.rmtree(tmp_path / "2", ignore_errors=True)
                manager._run.take_stock()
                if not (tmp_path / "3").exists():
                    manager.save(3, {"step": 3}, metrics={"loss": 0.5})
                    manager.wait()
            return read(step)

        monkeypatch.setattr(reader._run, "metrics", overtaken)
        assert reader.best_step("loss") == 3
