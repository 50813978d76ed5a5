"""The zoo: every state in it comes back to the last bit, and what cannot be saved is refused by the leaf's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from ckpt_hooks import CheckpointManager
from ckpt_hooks.errors import CheckpointError
from ckpt_hooks.testing import assert_same, differences, zoo

ALL = zoo.names(flax=True, optax=True)


@pytest.mark.parametrize("name", ALL)
def test_every_state_of_the_zoo_comes_back(tmp_path: Path, name: str) -> None:
    """A state is the same to the last bit after a save and a restore into a blank one."""
    state = zoo.make(name)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, state)
        assert_same(zoo.make(name), manager.restore(zoo.blank(state)))


@pytest.mark.parametrize("name", ALL)
def test_a_blank_state_differs(name: str) -> None:
    """A restore that does nothing would be noticed: the target has other values wherever there are any."""
    state = zoo.make(name)
    same = not [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "size", 1)]
    assert same or differences(state, zoo.blank(state))
    assert_same(state, zoo.make(name))


@pytest.mark.parametrize("name", zoo.refused_names())
def test_what_cannot_be_saved_is_refused_by_leaf_before_a_byte_is_written(tmp_path: Path, name: str) -> None:
    """The error names the leaf, and the run's directory has not been made."""
    state, leaf = zoo.make_refused(name)
    with CheckpointManager(tmp_path / "run") as manager, pytest.raises(CheckpointError) as error:
        manager.save(1, state)
    assert leaf in str(error.value)
    assert not (tmp_path / "run").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=zoo.states())
def test_states_nested_at_random_come_back(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Whatever tree the strategy builds comes back to the last bit."""
    with CheckpointManager(tmp_path_factory.mktemp("run"), async_save=False) as manager:
        manager.save(1, state)
        assert_same(state, manager.restore(zoo.blank(state)))


def test_the_zoo_needs_neither_flax_nor_hypothesis_until_asked() -> None:
    """Importing the testing tools loads neither Flax, Optax, Hypothesis nor pytest."""
    code = "import sys, ckpt_hooks.testing; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"flax", "optax", "hypothesis", "pytest", "_pytest", "orbax"} & set(loaded.stdout.split())


CHANGES: dict[str, tuple[Any, Any]] = {
    "value": ({"w": np.arange(3.0)}, {"w": np.array([0.0, 1.0, 3.0])}),
    "negative zero": ({"x": 0.0}, {"x": -0.0}),
    "nan payload": (np.array([0x7FC00000], np.uint32).view("f4"), np.array([0x7FC00001], np.uint32).view("f4")),
    "dtype": (np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int64)),
    "byte order": (np.arange(3, dtype="<i4"), np.arange(3, dtype=">i4")),
    "shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "zero size shape": (np.zeros((0, 3)), np.zeros((3, 0))),
    "library": (np.zeros(3, np.float32), jnp.zeros(3)),
    "scalar or array": (np.float32(1), np.array(1, np.float32)),
    "weak type": (jnp.asarray(1.0), jnp.asarray(1.0, jnp.float32)),
    "python type": (1, True),
    "int or float": (1, 1.0),
    "container": ([1, 2], (1, 2)),
    "empty container": ({"a": []}, {"a": ()}),
    "none or empty": ({"a": None}, {"a": {}}),
    "missing": ({"a": 1, "b": None}, {"a": 1}),
    "unexpected": ({"a": 1}, {"a": 1, "b": None}),
    "named tuple": (zoo.Moments(1, 2), (1, 2)),
    "static field": (zoo.Registered(1, "one"), zoo.Registered(1, "two")),
    "opaque field": (zoo.Opaque(1, 2), zoo.Opaque(1, 3)),
    "key": (jax.random.key(1), jax.random.key(2)),
    "key implementation": (jax.random.key(1), jax.random.key(1, impl="rbg")),
    "int4": (np.array([1, 2], "int4"), np.array([1, 3], "int4")),
    "text": ("a", "b"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_of_any_kind_is_found(name: str) -> None:
    """`differences` finds what differs, in both directions, and nothing in a state compared with itself."""
    one, other = CHANGES[name]
    assert differences(one, other)
    assert differences(other, one)
    assert not differences(one, one)
    assert not differences(other, other)


def test_differences_are_named_by_path() -> None:
    """A difference deep in a state is told by where it is."""
    with pytest.raises(AssertionError, match=r"\['params'\]\['w'\]\[1\]: bits differ in 1 of 3 elements"):
        assert_same({"params": {"w": [0, np.arange(3)]}}, {"params": {"w": [0, np.array([0, 1, 5])]}})
