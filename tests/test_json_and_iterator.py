"""JSON items, and iterators: anything with `get_state()` and `set_state(state)`."""

from __future__ import annotations

import collections
import json
import math
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ckpt_hooks import (
    Checkpointer,
    CompositeCheckpointHandler,
    IteratorCheckpointHandler,
    JsonCheckpointHandler,
    args,
    errors,
)


class Stateful:
    """Holds a state, and counts how often it is set."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.times_set = 0

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state
        self.times_set += 1


def through_iterator(directory: Path, state: Any) -> Any:
    """The state after it was saved and restored by the handler itself."""
    handler = IteratorCheckpointHandler()
    handler.save(epath.Path(directory), args.IteratorSave(Stateful(state)))
    return handler.restore(epath.Path(directory))


# ------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    "item", [None, True, 3, 10**40, 0.1, -1e-300, "text \u2713 \ud83d", [], {}, {"a": [1, {"b": None}]}, [[[]]]]
)
def test_json_item_round_trips(tmp_path: Path, item: Any) -> None:
    """Whatever JSON can hold comes back equal and of the same type."""
    with Checkpointer(JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", item)
        restored = checkpointer.restore(tmp_path / "c")
    assert restored == item
    assert type(restored) is type(item)


def test_json_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """NaN and infinities come back, as they do from Orbax."""
    with Checkpointer(JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", [math.nan, math.inf, -math.inf])
        restored = checkpointer.restore(tmp_path / "c")
    assert math.isnan(restored[0])
    assert restored[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("item", [b"bytes", {1, 2}, np.arange(2), object(), {(1, 2): 3}, 1j])
def test_json_item_that_is_not_json_is_refused(tmp_path: Path, item: Any) -> None:
    """What JSON cannot hold is a TypeError, before anything is written."""
    with Checkpointer(JsonCheckpointHandler()) as checkpointer, pytest.raises(TypeError, match="JSON item"):
        checkpointer.save(tmp_path / "c", item)
    assert os.listdir(tmp_path) == []


def test_json_item_that_contains_itself_is_refused(tmp_path: Path) -> None:
    """A list that contains itself is refused before anything is written."""
    item: list[Any] = []
    item.append(item)
    with Checkpointer(JsonCheckpointHandler()) as checkpointer, pytest.raises(TypeError, match="Circular"):
        checkpointer.save(tmp_path / "c", item)
    assert os.listdir(tmp_path) == []


def test_json_item_is_where_orbax_has_it(tmp_path: Path) -> None:
    """The item is a file `metadata` of plain JSON, or has the name that the handler was given."""
    with Checkpointer(CompositeCheckpointHandler(b=JsonCheckpointHandler("name"))) as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(a=args.JsonSave({"x": 1}), b=args.JsonSave(2)))
    assert json.loads((tmp_path / "c" / "a" / "metadata").read_text()) == {"x": 1}
    assert json.loads((tmp_path / "c" / "b" / "name").read_text()) == 2


def test_json_restore_needs_no_target(tmp_path: Path) -> None:
    """A target is accepted and not used."""
    with Checkpointer(JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": 1})
        assert checkpointer.restore(tmp_path / "c", args=args.JsonRestore({"b": 2})) == {"a": 1}


def test_json_item_that_is_not_there(tmp_path: Path) -> None:
    """A directory without the file is a FileNotFoundError that names it."""
    with pytest.raises(FileNotFoundError, match="metadata"):
        JsonCheckpointHandler().restore(epath.Path(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "{'a': 1}", "\xff"])
def test_damaged_json_item(tmp_path: Path, content: str) -> None:
    """A file that is no JSON is a CorruptCheckpointError that names it."""
    (tmp_path / "metadata").write_bytes(content.encode("latin-1"))
    with pytest.raises(errors.CorruptCheckpointError, match="metadata"):
        JsonCheckpointHandler().restore(epath.Path(tmp_path))


# ------------------------------------------------------------------ iterators


@pytest.mark.parametrize(
    "state",
    [
        None,
        0,
        10**40,
        -(2**63) - 1,
        True,
        "text",
        b"\x00\xff bytes",
        (),
        (1, (2, [3, b"4"])),
        {},
        {1: "a", "1": "b", (2, b"x"): None, None: 0, False: 1},
        {"$tuple": [1], "$": 2},
        {"$bytes": "not base64"},
        [{"a": {"b": (1.5, None)}}],
        math.inf,
        {"nested": [-math.inf, 1e-310]},
    ],
)
def test_state_round_trips(tmp_path: Path, state: Any) -> None:
    """Numbers of any size, bytes, tuples, and dicts with any keys come back equal and of the same types."""
    restored = through_iterator(tmp_path, state)
    assert repr(restored) == repr(state)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
_KEYS = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)
_STATES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(_KEYS | st.sampled_from(["$tuple", "$bytes", "$dict", "$array"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.given(_STATES)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_state_round_trips(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Whatever is made of numbers, strings, bytes, lists, tuples and dicts comes back as it was."""
    assert repr(through_iterator(tmp_path_factory.mktemp("state"), state)) == repr(state)


def test_nan_round_trips(tmp_path: Path) -> None:
    """A NaN in a state comes back as a NaN."""
    assert math.isnan(through_iterator(tmp_path, {"a": [math.nan]})["a"][0])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 2), np.uint8),
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.array([1, 2], ">u4"),
        np.array([math.nan, -0.0]),
    ],
)
def test_array_in_a_state_round_trips(tmp_path: Path, array: np.ndarray) -> None:
    """A NumPy array in a state comes back with its values, dtype and shape, and can be written to."""
    restored = through_iterator(tmp_path, {"array": array})["array"]
    assert restored.tobytes() == array.tobytes()
    assert (restored.dtype, restored.shape) == (array.dtype, array.shape)
    assert restored.flags.writeable


@pytest.mark.parametrize("scalar", [np.float64(0.1), np.int8(-3), np.bool_(True), np.uint64(2**64 - 1)])
def test_numpy_scalar_in_a_state_round_trips(tmp_path: Path, scalar: Any) -> None:
    """A NumPy scalar comes back as one of the same type, not as a Python number."""
    restored = through_iterator(tmp_path, [scalar])[0]
    assert restored == scalar
    assert type(restored) is type(scalar)


def test_jax_array_in_a_state_comes_back_as_numpy(tmp_path: Path) -> None:
    """A JAX array in a state comes back as a NumPy array of its values."""
    restored = through_iterator(tmp_path, [jnp.arange(3)])[0]
    assert isinstance(restored, np.ndarray)
    np.testing.assert_array_equal(restored, [0, 1, 2])


def test_states_of_random_generators(tmp_path: Path) -> None:
    """The states of Python's and NumPy's random generators come back so that both go on as before."""
    generator, numpy_generator = random.Random(1), np.random.default_rng(1)
    state = {"python": generator.getstate(), "numpy": numpy_generator.bit_generator.state}
    expected = generator.random(), numpy_generator.random()
    restored = through_iterator(tmp_path, state)
    generator.setstate(restored["python"])
    numpy_generator.bit_generator.state = restored["numpy"]
    assert (generator.random(), numpy_generator.random()) == expected


class Position(NamedTuple):
    epoch: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
        (1j, "builtins.complex"),
        (collections.deque([1]), "collections.deque"),
        (Position(1), "Position"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        (np.datetime64("2020-01-01"), "datetime64"),
    ],
)
def test_state_that_cannot_be_saved_is_refused(tmp_path: Path, value: Any, name: str) -> None:
    """What would not come back as it is, is a TypeError that names the place, before anything is written."""
    with (
        Checkpointer(IteratorCheckpointHandler()) as checkpointer,
        pytest.raises(TypeError, match=rf"get_state\(\)\['a'\]\[1\] .*{name}"),
    ):
        checkpointer.save(tmp_path / "c", Stateful({"a": [0, value]}))
    assert os.listdir(tmp_path) == []


def test_prng_key_in_a_state_is_refused(tmp_path: Path) -> None:
    """A typed PRNG key, which belongs into the state that is trained, is a TypeError that names its place."""
    says = r"get_state\(\)\['key'\] holds what is no array of numbers"
    with Checkpointer(IteratorCheckpointHandler()) as checkpointer, pytest.raises(TypeError, match=says):
        checkpointer.save(tmp_path / "c", Stateful({"key": jax.random.key(0)}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("item", [3, {"w": 1}, iter([1])])
def test_item_without_a_state_is_refused(tmp_path: Path, item: Any) -> None:
    """What has no get_state and set_state is a TypeError that says so, before anything is written."""
    with Checkpointer(IteratorCheckpointHandler()) as checkpointer, pytest.raises(TypeError, match="get_state"):
        checkpointer.save(tmp_path / "c", item)
    assert os.listdir(tmp_path) == []


def test_state_is_set_only_by_a_restore(tmp_path: Path) -> None:
    """Saving never sets a state; restoring sets it once, in the object given, and returns that object."""
    saved, other = Stateful({"position": 3}), Stateful()
    with Checkpointer(IteratorCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", saved)
        assert saved.times_set == 0
        assert checkpointer.restore(tmp_path / "c") == {"position": 3}
        assert checkpointer.restore(tmp_path / "c", other) is other
    assert (other.state, other.times_set) == ({"position": 3}, 1)


def test_state_is_not_set_by_a_restore_that_fails(tmp_path: Path) -> None:
    """Where the saved state is damaged, the object is left as it is."""
    iterator = Stateful("old")
    with Checkpointer(IteratorCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", Stateful("new"))
        (tmp_path / "c" / "process_0-of-1.json").write_text('"nww"')
        with pytest.raises(errors.CorruptCheckpointError):
            checkpointer.restore(tmp_path / "c", iterator)
    assert (iterator.state, iterator.times_set) == ("old", 0)


def test_truncated_state_is_damage(tmp_path: Path) -> None:
    """A state file that is no JSON is a CorruptCheckpointError, also where there are no checksums."""
    (tmp_path / "process_0-of-1.json").write_text('{"a": ')
    with pytest.raises(errors.CorruptCheckpointError, match="process_0-of-1"):
        IteratorCheckpointHandler().restore(epath.Path(tmp_path))


def test_state_of_other_processes_is_explained(tmp_path: Path) -> None:
    """A state saved by another number of processes is a ValueError that names the files there are."""
    for process in range(2):
        (tmp_path / f"process_{process}-of-2.json").write_text("{}")
    with pytest.raises(ValueError, match=r"process 0 of 1.*process_0-of-2.json, process_1-of-2.json"):
        IteratorCheckpointHandler().restore(epath.Path(tmp_path))


def test_iterator_is_restored_by_its_files(tmp_path: Path) -> None:
    """Without arguments a composite restores an iterator's bare state, though Orbax takes the item for JSON."""
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(data=args.IteratorSave(Stateful((1, b"2")))))
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        assert checkpointer.restore(tmp_path / "c").data == (1, b"2")
    recorded = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())["item_handlers"]["data"]
    assert recorded.startswith("orbax.") and recorded.endswith(".JsonCheckpointHandler")
    assert json.loads((tmp_path / "c" / "data" / "metadata").read_text()) == {"process_count": 1}
