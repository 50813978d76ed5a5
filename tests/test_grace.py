"""`grace_secs`: a save that does not fit into the grace period is told before it is too late."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_hooks import CheckpointHook, CheckpointManager, Preempted


def state_at(step: int) -> dict[str, Any]:
    return {"w": np.full(100_000, float(step)), "step": step}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "grace_secs" in record.getMessage()]


def test_a_save_that_takes_longer_than_the_grace_period_is_told_at_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Long before any signal comes, with the measured time, and not again at every save."""
    with CheckpointHook(tmp_path, every_n_steps=5, grace_secs=1e-4) as hook:
        for step in range(1, 41):
            hook(step, state_at(step))
            hook.wait()
            if step == 9:
                assert warnings(caplog) == []  # one save is measured, and nobody has asked since
    found = warnings(caplog)
    assert "a preemption would lose steps: the last save took " in found[0]
    assert "grace_secs=0.0001" in found[0]
    assert len(found) < 8


def test_the_time_of_a_step_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The signal may come at the beginning of a step: the save that answers it begins only after that step."""
    with CheckpointHook(tmp_path, every_n_steps=1, grace_secs=5) as hook:
        for step in (1, 2, 3):
            hook(step, state_at(step))
            hook.wait()
        assert warnings(caplog) == []
        time.sleep(5.1)
        hook(4, state_at(4))
    assert "a step takes 5." in warnings(caplog)[0]


def test_a_save_that_fits_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even when it answers a signal."""
    before = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        with CheckpointHook(tmp_path, every_n_steps=5, grace_secs=600) as hook:
            for step in range(1, 12):
                hook(step, state_at(step))
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted):
                hook(12, state_at(12))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert warnings(caplog) == []


def test_what_is_left_of_the_period_counts_when_the_signal_has_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step during which the signal came took most of it: the line says from where a restart would go on."""
    before = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        with CheckpointHook(tmp_path, every_n_steps=5, grace_secs=0.2) as hook:
            for step in range(1, 8):
                hook(step, state_at(step))
            hook.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.25)
            caplog.clear()
            with caplog.at_level(logging.WARNING), pytest.raises(Preempted):
                hook(8, state_at(8))
    finally:
        signal.signal(signal.SIGTERM, before)
    (found,) = warnings(caplog)
    assert "step 8 is being saved" in found
    assert "of grace_secs=0.2 there is 0.0 s left" in found
    assert "goes on from step 5" in found
    assert CheckpointManager(tmp_path).latest_step() == 8  # nobody killed it, and it is there all the same


@pytest.mark.parametrize("secs", [0, -3, float("inf"), float("nan"), "30", True, np.True_])
def test_grace_secs_is_a_number_of_seconds(tmp_path: Path, secs: Any) -> None:
    """Anything else is refused when the hook is made."""
    with pytest.raises(ValueError, match="grace_secs"):
        CheckpointHook(tmp_path, grace_secs=secs)


@pytest.mark.parametrize("secs", [np.int64(30), np.float32(30)])
def test_a_grace_period_may_be_a_number_of_numpy(tmp_path: Path, secs: Any) -> None:
    """As every other number of seconds may be."""
    with CheckpointHook(tmp_path, grace_secs=secs) as hook:
        assert hook.start_step == 0
