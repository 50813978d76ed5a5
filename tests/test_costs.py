"""What a save and a restore cost, counted: calls, not seconds, so that a slow path cannot come back unseen.

Python reports each call of a Python function and of a built-in one to a profiler. System calls are among the latter.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_hooks import (
    AsyncCheckpointer,
    Checkpointer,
    CheckpointHook,
    CompositeCheckpointHandler,
    StandardCheckpointHandler,
    args,
)
from ckpt_hooks.storage import commit
from tests.profiled import run_profiled
from tests.stateful import Counter

SYSTEM_CALLS = ("open", "pwrite", "write", "fsync", "mkdir", "preadv", "rename", "posix_fallocate", "stat", "listdir")


def calls_of(action: Callable[[], object]) -> collections.Counter[str]:
    """{name: how often} of every function that `action` calls, in all threads."""
    counts: collections.Counter[str] = collections.Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            counts[frame.f_code.co_name] += 1
        elif event == "c_call":
            counts[argument.__name__] += 1

    run_profiled(action, note)
    return counts


def leaves(number: int) -> dict[str, jax.Array]:
    return {f"w{i}": jnp.full((32, 32), i, jnp.float32) for i in range(number)}


def calls_per_leaf(action: Callable[[dict[str, Any]], object]) -> float:
    """By how many calls each further leaf makes it dearer."""
    few, many = leaves(500), leaves(1500)
    for state in (few, many):
        action(state)  # makes plans, fills caches
    fewer, more = (calls_of(lambda state=state: action(state)) for state in (few, many))  # type: ignore[misc]
    return (more.total() - fewer.total()) / 1000


def test_a_save_of_a_known_structure_makes_few_calls_a_leaf(tmp_path: Path) -> None:
    """A leaf costs a save at most 8 calls, where Orbax makes several hundred."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        assert calls_per_leaf(lambda state: checkpointer.save(tmp_path / "c", state, force=True)) <= 8


def test_what_blocks_makes_few_calls_a_leaf(tmp_path: Path) -> None:
    """A leaf holds up the training loop for at most 8 calls."""
    with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
        assert calls_per_leaf(lambda state: checkpointer.save(tmp_path / "c", state, force=True)) <= 8


def test_a_restore_makes_few_calls_a_leaf(tmp_path: Path) -> None:
    """A leaf costs a restore into JAX arrays at most 40 calls."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        for state in (leaves(500), leaves(1500)):
            checkpointer.save(tmp_path / str(len(state)), state)
        assert calls_per_leaf(lambda state: checkpointer.restore(tmp_path / str(len(state)), state)) <= 40


def test_system_calls_do_not_grow_with_the_leaves(tmp_path: Path) -> None:
    """Ten times as many small leaves take as many system calls, but for one write and read per 4 MiB."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        saves, restores = [], []
        for number in (90, 900):
            state = leaves(number)
            path = tmp_path / str(number)
            checkpointer.save(path, state)
            saves.append(calls_of(lambda: checkpointer.save(path, state, force=True)))  # noqa: B023
            restores.append(calls_of(lambda: checkpointer.restore(path, state)))  # noqa: B023
    for few, many in (saves, restores):
        assert {name: many[name] - few[name] for name in SYSTEM_CALLS if many[name] > few[name] + 1} == {}


def test_a_restore_opens_each_small_file_once(tmp_path: Path) -> None:
    """Seven small files and the one with the arrays, in which the index stands too, are opened once each."""
    state = {"w": jnp.ones(300), "b": jnp.zeros(3)}
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        counts = calls_of(lambda: checkpointer.restore(tmp_path / "c", state))
    assert counts["open"] == 8


def test_what_is_checked_of_a_small_item_is_what_is_restored(tmp_path: Path) -> None:
    """A JSON item and the state of an iterator, whose checksums have been compared, are not opened once more."""
    saved = args.Composite(config=args.JsonSave({"lr": 0.1}), data=args.IteratorSave(Counter()))
    wanted = args.Composite(config=args.JsonRestore(), data=args.IteratorRestore(Counter()))
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", saved)
        counts = calls_of(lambda: checkpointer.restore(tmp_path / "c", wanted))
    unread = {commit.COMMIT_MARKER}
    assert counts["open"] == len([p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.name not in unread])


def test_a_small_checkpoint_has_few_files_to_sync(tmp_path: Path) -> None:
    """One tree: nine files, each synced once, as two directories in it, its own and the parent's. The step metadata are
    written twice, at the beginning and at the end."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        counts = calls_of(lambda: checkpointer.save(tmp_path / "c", {"w": jnp.ones(300)}))
    assert len([path for path in (tmp_path / "c").rglob("*") if path.is_file()]) == 9
    assert counts["fsync"] == 13
    assert counts["rename"] == 2 + 1  # and the commit


def test_a_call_with_nothing_due_makes_no_call(tmp_path: Path) -> None:
    """The hook looks at the step and returns."""
    with CheckpointHook(tmp_path, every_n_steps=1000) as hook:
        hook(1, {})
        counts = calls_of(lambda: hook(2, {}))
    assert set(counts) <= {"<lambda>", "__call__", "setprofile"}


# ------------------------------------------------------------------ platforms that lack a call


@pytest.mark.parametrize("missing", ["pwrite", "preadv", "posix_fallocate", "sync_file_range", "renameat2"])
def test_a_platform_without_a_call_saves_and_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """What only some systems have makes a save faster, and is not needed."""
    if missing == "sync_file_range":
        monkeypatch.setattr(commit, "_sync_file_range", None)
    elif missing == "renameat2":
        monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    else:
        monkeypatch.delattr(os, missing)
    state = {"large": np.arange(3 << 20), "small": {f"w{i}": np.full(100, i) for i in range(50)}}
    with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
        for _ in range(2):
            checkpointer.save(tmp_path / "c", state, force=True)
        restored = checkpointer.restore(tmp_path / "c")
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_interrupted_and_short_system_calls_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes and reads that do a part of what was asked, in any of the threads, are followed by the rest."""
    pwrite, preadv, write, read = os.pwrite, os.preadv, os.write, os.read
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[: 1 + len(content) // 3]))
    monkeypatch.setattr(os, "read", lambda fd, nbytes: read(fd, 1 + nbytes // 3))
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: pwrite(fd, content[: 1 + len(content) // 3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: 1 + len(views[0]) // 3]], at))
    state = {"large": np.arange(3 << 20), "small": np.arange(300)}
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        restored = checkpointer.restore(tmp_path / "c")
    jax.tree.map(np.testing.assert_array_equal, restored, state)
