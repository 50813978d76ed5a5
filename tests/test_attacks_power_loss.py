"""Short versions of `python -m attacks.power_loss` and `attacks.power_cut`; that they find what they have to find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import power_cut, power_loss
from attacks.power_loss import CONTROLS, STORIES, attack

REPOSITORY = Path(__file__).parents[1]
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Rejected and ignored checkpoints are logged, thousands of them."""
    with caplog.at_level("CRITICAL"):
        yield


@pytest.mark.parametrize("story", STORIES)
def test_no_power_loss_loses_anything(story: str) -> None:
    """After a power loss at every operation, the newest acknowledged checkpoint or a newer one is whole."""
    outcome = attack(STORIES[story], per_cut=2, directory=FAST)
    assert outcome.failures == []
    assert len(outcome.distinct) > outcome.operations
    assert outcome.saved_again


@pytest.mark.parametrize("control", CONTROLS)
def test_a_missing_sync_is_found(control: str) -> None:
    """Without the fsyncs of one kind, a power loss loses a checkpoint: the simulator sees that."""
    outcome = attack(STORIES["late metrics"], per_cut=8, directory=FAST, skip=control, until_failure=True)
    assert outcome.failures


@pytest.mark.long
def test_more_than_100_000_states(capsys: pytest.CaptureFixture[str]) -> None:
    """The full run finds nothing in more than 100,000 distinct states."""
    assert power_loss.main(["--full"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("all ")]
    assert int(row[3].replace(",", "")) >= 100_000


def test_a_power_cut_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it cannot mount, it names what is missing, does nothing, and exits with 2."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    assert power_cut.main([]) == 2
    printed = capsys.readouterr().out
    assert "root" in printed
    assert "mkfs.xfs (package xfsprogs)" in printed


@pytest.mark.long
@pytest.mark.skipif(bool(power_cut.missing()), reason=f"needs {power_cut.missing()}")
def test_a_real_power_cut_loses_nothing(tmp_path: Path) -> None:
    """A real ext4 that loses what it had in memory has the newest acknowledged checkpoint, whole."""
    command = [sys.executable, "-m", "attacks.power_cut", "--cuts", "20", "--orbax", "0", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 power cuts on ext4" in done.stdout
    assert list(tmp_path.iterdir()) == []
