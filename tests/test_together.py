"""What goes wrong among several real processes: each is told, in time, and by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_hooks import MultiprocessingOptions
from tests import together
from tests.process_groups import Nursery

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


# ------------------------------------------------------------------ barriers


@pytest.mark.parametrize("count", [2, 4])
def test_a_long_run_leaves_nothing_in_the_coordination_service(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Saves that process 0's clock started, late metrics, a restore and a refusal: their lines are gone."""
    ended = nursery.run_group(together.long_run, tmp_path, count)
    for process in ended:
        assert process.code == 0, process.log
        report = process.report
        assert report["left"] == []
        assert report["restored"] and report["newest"]
        assert report["step"] == ended[0].report["step"], "all saved when process 0 said so"
        assert f"step {report['step']} already" in report["refused"]


def test_barrier_timeout_secs_bounds_every_barrier_and_the_missing_are_named(nursery: Nursery, tmp_path: Path) -> None:
    """In the foreground and in the background."""
    *others, last = nursery.run_group(together.absent, tmp_path, 4)
    assert last.code == 0, last.log
    for process in others:
        assert process.code == 0, process.log
        for text, secs in process.report:
            assert text.startswith("BarrierTimeoutError"), text
            assert "[3]" in text and "barrier_timeout_secs" in text
            assert secs < 20


@pytest.mark.parametrize("secs", [0, -1, float("nan")])
def test_a_barrier_timeout_is_positive(secs: float) -> None:
    """Anything else is refused when it is given."""
    with pytest.raises(ValueError, match="barrier_timeout_secs"):
        MultiprocessingOptions(barrier_timeout_secs=secs)
