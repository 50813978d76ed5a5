"""A hook with its state bound, called as the hooks of `clu.periodic_actions` are."""

from __future__ import annotations

import ast
import inspect
import os
import signal
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from ckpt_hooks import CheckpointHook, CheckpointManager, Preempted
from ckpt_hooks.bound import BoundHook
from tests.stateful import Counter


def test_is_called_as_clus_actions_are() -> None:
    """The call has the parameters of clu's `PeriodicAction`, whose module cannot be imported without TensorFlow."""
    source = Path(str(distribution("clu").locate_file("clu/periodic_actions.py"))).read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    methods = {node.name: node for node in classes["PeriodicAction"].body if isinstance(node, ast.FunctionDef)}
    arguments = methods["__call__"].args
    assert [argument.arg for argument in arguments.args] == list(inspect.signature(BoundHook.__call__).parameters)
    assert [ast.unparse(default) for default in arguments.defaults] == ["None"]
    assert inspect.signature(BoundHook.__call__).parameters["t"].default is None


def test_stands_in_a_list_of_hooks(tmp_path: Path) -> None:
    """In a list that is called with the step, it saves state, metrics and iterator of each step that is due."""
    seen: list[int] = []
    state, data = {"w": np.zeros(2)}, Counter()
    with CheckpointHook(tmp_path, every_n_steps=2, keep=9) as hook:
        hooks: list[Any] = [seen.append, hook.bind(lambda: state, metrics=lambda: {"w": state["w"][0]}, data=data)]
        for step in range(1, 7):
            state = {"w": state["w"] + 1}
            data.position += 10
            for each in hooks:
                each(step)
    assert seen == [1, 2, 3, 4, 5, 6]
    manager = CheckpointManager(tmp_path)
    assert manager.steps() == [2, 4, 6]
    for step in manager.steps():
        assert manager.restore(step=step)["w"].tolist() == [step, step]
        assert manager.restore(step=step)["data"] == {"position": 10 * step}
        assert manager.metadata(step).metrics == {"w": step}


def test_the_state_is_asked_for_only_where_it_is_saved(tmp_path: Path) -> None:
    """A step with nothing due costs no state, also where the time decides."""
    asked: list[int] = []
    step = 0

    def state() -> dict[str, int]:
        asked.append(step)
        return {"step": step}

    with CheckpointHook(tmp_path, every_n_steps=3, every_secs=3600) as hook:
        bound = hook.bind(state)
        for step in range(1, 7):
            assert bound(step, 0.5) == (step % 3 == 0)
    assert asked == [3, 6]


def test_bound_hook_leaves_when_asked_to(tmp_path: Path) -> None:
    """A SIGTERM makes the next call save the state of that moment and raise."""
    step = 0
    with CheckpointHook(tmp_path) as hook:
        bound = hook.bind(lambda: {"step": step})
        for step in range(1, 5):
            assert not bound(step)
        os.kill(os.getpid(), signal.SIGTERM)
        step = 5
        with pytest.raises(Preempted):
            bound(step)
    assert CheckpointManager(tmp_path).restore() == {"step": 5}


def test_an_nnx_module_is_bound_as_it_is(tmp_path: Path) -> None:
    """A module is updated in place, so it is no function that returns the state, though it can be called."""
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        bound = hook.bind(model)
        model.bias[...] = np.full(1, 7.0)
        bound(1)
    assert CheckpointManager(tmp_path).restore()["state"]["bias"] == [7]


def test_a_state_that_would_never_change_is_refused(tmp_path: Path) -> None:
    """A state in place of the function that returns it is a TypeError that says so."""
    with CheckpointHook(tmp_path) as hook, pytest.raises(TypeError, match="lambda: state"):
        hook.bind({"w": np.zeros(2)})
