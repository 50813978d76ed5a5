"""What a hook's restore can be asked for; and names that no object can have, since they are those of arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import CheckpointHook, CheckpointManager
from ckpt_hooks.errors import InvalidArgumentError, ItemNotFoundError, StructureMismatchError
from ckpt_hooks.testing import assert_same
from tests.stateful import Counter

NAMES = ["cast", "changes", "items", "like", "missing", "rename", "typed", "unexpected"]


def make_state(value: float = 0.0) -> dict[str, Any]:
    return {"params": {"w": np.full(3, value, np.float32), "b": np.full(2, value, np.float32)}, "count": int(value)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, make_state(5))
    return tmp_path / "run"


# ------------------------------------------------------------------ options of a hook


def test_a_hook_restores_in_another_dtype(run: Path) -> None:
    """cast=, as in a manager."""
    like = {"params": {"w": np.zeros(3), "b": np.zeros(2)}, "count": 0}
    with CheckpointHook(run) as hook:
        with pytest.raises(StructureMismatchError, match="retyped"):
            hook.restore(like)
        assert hook.start_step == 0
        assert hook.restore(like, cast=True)["params"]["w"].dtype == np.float64
        assert hook.start_step == 5
        assert hook.restore(like, cast=jnp.bfloat16)["params"]["w"].dtype == jnp.bfloat16


def test_a_hook_restores_what_has_changed(run: Path) -> None:
    """rename=, missing= and unexpected=, as in a manager, also in restore_or_init."""
    like: dict[str, Any] = {"params": {"kernel": np.zeros(3, np.float32), "new": np.ones(1)}, "count": 0}
    expected = {"params": {"kernel": make_state(5)["params"]["w"], "new": np.ones(1)}, "count": 5}
    options: dict[str, Any] = {
        "rename": {"params/w": "params/kernel"},
        "missing": "keep",
        "unexpected": "ignore",
    }
    with CheckpointHook(run) as hook:
        assert_same(expected, hook.restore(like, **options))
        del like["params"]["new"]
        options["missing"] = "error"
        restored = hook.restore_or_init(lambda: {"params": {"kernel": jnp.zeros(3)}, "count": 0}, **options)
        assert restored["params"]["kernel"][0] == 5
        assert hook.start_step == 5


@pytest.mark.parametrize("kind", ["a run", "an empty run"])
def test_a_hook_restores_parts(run: Path, tmp_path: Path, kind: str) -> None:
    """items= gives {item: value}, of the checkpoint or, where there is none, of what was given."""
    directory, value = (run, 5.0) if kind == "a run" else (tmp_path / "empty", 0.0)
    with CheckpointHook(directory) as hook:
        restored = hook.restore(make_state(), items=(name for name in ["params"]))
        assert_same({"params": make_state(value)["params"]}, restored)
        part = hook.restore(make_state(), items=["params/w"])["params"]
        assert_same({"w": make_state(value)["params"]["w"], "b": make_state()["params"]["b"]}, part)
        with pytest.raises(ItemNotFoundError, match="no part"):
            hook.restore(make_state(), items=["ema"])


@pytest.mark.parametrize("kind", ["a run", "an empty run"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"items": "params"}, "list of names"),
        ({"missing": "ignore"}, '"error" or "keep"'),
        ({"cast": int}, "only floating-point"),
        ({"step": 5}, r"step=: .* hook.manager.restore\(state, step=...\) or hook.manager.rollback"),
        ({"typed": True}, "typed=: no object"),
        ({"force": True}, r"force=True is for hook\.save"),
        ({"changes": None}, "changes=: no object"),
    ],
)
def test_wrong_options_of_a_hook_are_told(
    run: Path, tmp_path: Path, kind: str, options: dict[str, Any], text: str
) -> None:
    """Also at the first start, where there is nothing to restore yet."""
    with CheckpointHook(run if kind == "a run" else tmp_path / "empty") as hook:
        with pytest.raises(InvalidArgumentError, match=text):
            hook.restore(make_state(), **options)
        with pytest.raises(InvalidArgumentError, match=text):
            hook.restore_or_init(make_state, **options)
        assert hook.start_step == 0


# ------------------------------------------------------------------ names of objects

Save = Callable[[Path, dict[str, Any]], None]


def _with_manager(path: Path, objects: dict[str, Any]) -> None:
    with CheckpointManager(path) as manager:
        manager.save(1, make_state(), **objects)


def _with_hook(path: Path, objects: dict[str, Any]) -> None:
    with CheckpointHook(path, every_n_steps=1, on_save_error="warn") as hook:
        hook(1, make_state(), **objects)


def _with_hook_save(path: Path, objects: dict[str, Any]) -> None:
    with CheckpointHook(path) as hook:
        hook.save(1, make_state(), **objects)


def _when_leaving(path: Path, objects: dict[str, Any]) -> None:
    with CheckpointHook(path) as hook:
        os.kill(os.getpid(), 15)
        hook(1, make_state(), **objects)


def _when_bound(path: Path, objects: dict[str, Any]) -> None:
    with CheckpointHook(path) as hook:
        hook.bind(make_state, **objects)


@pytest.mark.parametrize("save", [_with_manager, _with_hook, _with_hook_save, _when_leaving, _when_bound])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_not_be_restored_is_refused_at_the_save(tmp_path: Path, save: Save, name: str) -> None:
    """By its name, before anything is written."""
    with pytest.raises(InvalidArgumentError, match=f"^{name}=: no object can have this name"):
        save(tmp_path / "run", {name: Counter()})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("save", [_with_hook, _when_leaving, _when_bound])
@pytest.mark.parametrize("name", ["force"])
def test_what_a_hook_does_not_take_does_not_leak_through(tmp_path: Path, save: Save, name: str) -> None:
    """force= is not passed on from a hook's call to the save below."""
    with pytest.raises(InvalidArgumentError, match="force=: no object"):
        save(tmp_path / "run", {name: True})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["changes", "force", "metadata", "metrics", "state"])
def test_a_name_that_was_never_saved_is_refused_at_the_restore(run: Path, name: str) -> None:
    """Where an object of it would be taken for an argument of the save."""
    objects: dict[str, Any] = {name: Counter()}
    with pytest.raises(InvalidArgumentError, match=f"{name}=: no object"):
        CheckpointManager(run).restore(make_state(), **objects)
    with pytest.raises(InvalidArgumentError, match=f"{name}=: no object"):
        ckpt_hooks.restore(run / "5", make_state(), **objects)


def test_parts_of_the_state_may_have_these_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are told by the state, and not by keywords; and other objects are saved as ever."""
    state = {name: np.full(2, number) for number, name in enumerate([*NAMES, "step", "state", "force"])}
    data, found = Counter(4), Counter()
    with CheckpointManager(tmp_path) as manager, caplog.at_level(logging.WARNING):
        manager.save(1, state, data=data)
        assert_same(state, manager.restore({name: np.zeros(2, int) for name in state}, data=found))
    assert found.get_state() == data.get_state()
    assert not caplog.records
