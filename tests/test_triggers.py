"""When a checkpoint is due: marks by number, by time, at given steps, and loops that jump."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError
from ckpt_hooks.triggers import NEVER, Triggers, check_step

steps = st.integers(0, 10**12)
periods = st.none() | st.integers(1, 10**6)
marks = st.lists(steps, max_size=8)


def is_mark(step: int, every_n_steps: int | None, on_steps: list[int]) -> bool:
    """The rule in its plainest form."""
    return step in on_steps or (every_n_steps is not None and step % every_n_steps == 0)


@given(steps, periods, marks)
def test_next_step_is_a_mark_beyond(after: int, every_n_steps: int | None, on_steps: list[int]) -> None:
    """The next due step lies beyond `after` and is a multiple or one of the given steps."""
    due = Triggers(every_n_steps, 1.0, tuple(sorted(set(on_steps)))).next_step(after)
    assert due > after
    assert due == NEVER or is_mark(due, every_n_steps, on_steps)


@given(st.integers(0, 300), st.none() | st.integers(1, 60), st.lists(st.integers(0, 300), max_size=5))
def test_next_step_misses_no_mark(after: int, every_n_steps: int | None, on_steps: list[int]) -> None:
    """Between `after` and the next due step there is no mark."""
    due = Triggers.checked(every_n_steps, 1.0, on_steps).next_step(after)
    expected = (step for step in range(after + 1, 401) if is_mark(step, every_n_steps, on_steps))
    assert due == next(expected, NEVER)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 30))
def test_a_jumping_loop_saves_once_for_each_stride_with_a_mark(strides: list[int], every_n_steps: int) -> None:
    """A loop that advances by many steps at a time is due exactly where it reached or jumped over a multiple."""
    triggers = Triggers(every_n_steps)
    step, due = 0, triggers.next_step(0)
    for stride in strides:
        crossed = (step + stride) // every_n_steps > step // every_n_steps
        step += stride
        assert (step >= due) == crossed
        if step >= due:
            due = triggers.next_step(step)


@given(st.floats(0, 1e9), st.floats(1e-3, 1e6))
def test_next_secs_is_the_period_later(now: float, every_secs: float) -> None:
    """The next time is one period after the last save."""
    assert Triggers(every_secs=every_secs).next_secs(now) == now + every_secs


def test_without_a_period_time_never_comes() -> None:
    """Without `every_secs`, no time is due."""
    assert Triggers(every_n_steps=5).next_secs(0.0) == math.inf


def test_without_a_trigger_every_1000_steps() -> None:
    """Where no trigger is given, a checkpoint is due every 1000 steps."""
    assert Triggers.checked(None, None, ()) == Triggers(every_n_steps=1000)


@pytest.mark.parametrize("given_triggers", [(None, 2.0, ()), (None, None, (7,)), (50, None, ())])
def test_a_trigger_replaces_the_default(given_triggers: tuple[Any, Any, Any]) -> None:
    """Any trigger that is given takes the place of the default one."""
    assert Triggers.checked(*given_triggers).every_n_steps == given_triggers[0]


@pytest.mark.parametrize("secs", [np.int64(3), np.float32(3)])
def test_seconds_of_numpy_are_seconds(secs: Any) -> None:
    """They come back as Python's, and a bool of NumPy's is none."""
    checked = Triggers.checked(None, secs, ()).every_secs
    assert (type(checked), checked) == (float, 3.0)
    with pytest.raises(InvalidArgumentTypeError, match="every_secs"):
        Triggers.checked(None, np.True_, ())  # type: ignore[arg-type]


def test_on_steps_are_sorted_and_unique() -> None:
    """Steps may be given in any order, more than once, and by any iterable."""
    assert Triggers.checked(None, None, iter([30, 10, 30, 20])).on_steps == (10, 20, 30)


@pytest.mark.parametrize(
    ("triggers", "error", "message"),
    [
        ((0, None, ()), InvalidArgumentError, "every_n_steps=0"),
        ((-5, None, ()), InvalidArgumentError, "every_n_steps.*-5"),
        ((2.5, None, ()), InvalidArgumentTypeError, "every_n_steps.*2.5"),
        ((True, None, ()), InvalidArgumentTypeError, "every_n_steps.*True"),
        ((None, 0, ()), InvalidArgumentError, "every_secs.*0"),
        ((None, -1.0, ()), InvalidArgumentError, "every_secs.*-1"),
        ((None, math.nan, ()), InvalidArgumentError, "every_secs.*nan"),
        ((None, math.inf, ()), InvalidArgumentError, "every_secs.*inf"),
        ((None, True, ()), InvalidArgumentTypeError, "every_secs.*True"),
        ((None, "60", ()), InvalidArgumentTypeError, "every_secs.*'60'"),
        ((None, None, (3, -1)), InvalidArgumentError, "on_steps.*-1"),
        ((None, None, ("3",)), InvalidArgumentTypeError, "on_steps.*'3'"),
    ],
)
def test_a_trigger_that_cannot_be_meant_is_refused(
    triggers: tuple[Any, Any, Any], error: type[Exception], message: str
) -> None:
    """A trigger of zero, a negative one, or one of the wrong type is refused by its name and value."""
    with pytest.raises(error, match=message):
        Triggers.checked(*triggers)


@pytest.mark.parametrize("step", [7, np.int64(7), np.array(7), jnp.int32(7)])
def test_check_step_takes_any_integer(step: Any) -> None:
    """Python, NumPy and JAX integers are steps, and come back as a Python int."""
    checked = check_step(step)
    assert checked == 7
    assert type(checked) is int


@pytest.mark.parametrize("step", [True, np.True_, 7.0, "7", None, np.array([7, 8]), np.float32(7)])
def test_check_step_refuses_what_is_no_integer(step: Any) -> None:
    """A bool, a float, a string or an array of several numbers is a TypeError that shows it."""
    with pytest.raises(TypeError, match=r"step.* int; got"):
        check_step(step)


def test_check_step_refuses_negative_numbers() -> None:
    """A negative step is a ValueError that shows it."""
    with pytest.raises(ValueError, match="not negative; got -1"):
        check_step(-1)
