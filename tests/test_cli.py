"""`ckpt-hooks`: what one looks at a run with when something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import CheckpointManager
from ckpt_hooks.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 3, with a metric."""
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.full(3, step)}, metrics={"größe": step / 2})
    return tmp_path / "run"


def save_two(run: Path, one: Any, other: Any) -> None:
    with CheckpointManager(run) as manager:
        manager.save(1, {"x": one})
        manager.save(2, {"x": other})


def test_a_run_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row a step, with its metrics."""
    assert main(["ls", str(run)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["step", "1", "2", "3"]
    assert rows[3].endswith("größe=1.5")


def test_one_damaged_step_hides_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named in its row, and the exit code is 1."""
    path = run / "2" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(b"commit", b"COMMIT"))
    assert main(["ls", str(run)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and "DAMAGED: " in rows[2] and "DAMAGED" not in rows[1] + rows[3]


def test_a_run_without_checkpoints_is_not_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` of the wrong directory does not pass in silence."""
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_what_a_writer_removes_meanwhile_is_not_missed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify` of all steps goes on with the others; a step that was asked for by its number is told of."""
    verify = CheckpointManager.verify

    def removing(manager: CheckpointManager, step: int) -> list[str]:
        shutil.rmtree(run / "2", ignore_errors=True)
        return verify(manager, step)

    monkeypatch.setattr(CheckpointManager, "verify", removing)
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == "step 1: ok\nstep 3: ok\n"
    assert main(["verify", str(run), "2"]) == 2
    assert "no checkpoint of step 2; there are [1, 3]" in capsys.readouterr().err


def test_damage_is_named_and_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` tells every step, and its exit code is 1 where one is damaged."""
    assert main(["verify", str(run)]) == 0
    shutil.rmtree(run / "3" / "w")
    assert main(["verify", str(run)]) == 1
    assert "step 2: ok\nstep 3: DAMAGED\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show {run} | head -n 1", "ls {run} | true", "ls {run} > /dev/null"])
def test_a_reader_that_has_seen_enough_is_no_error(run: Path, command: str) -> None:
    """Into `head`, and also where the terminal has no letters for a name, nothing is complained of."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(ckpt_hooks.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONIOENCODING": "ascii",
    }
    with CheckpointManager(run) as manager:
        manager.save(4, {f"leaf_{number}": np.zeros(1) for number in range(3000)})
    shell = f"set -o pipefail; {sys.executable} -m ckpt_hooks.cli {command.format(run=run)}"
    found = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (np.array([2**62 + 1]), np.array([2**62 + 2]), "1 of 1 values differ, by at most 1"),
        (np.array([2**64 - 1], np.uint64), np.array([0], np.uint64), f"by at most {2**64 - 1}"),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.5]), "1 of 2 values differ, by at most 0.5"),
        (np.array([np.inf, 1.0]), np.array([-np.inf, 1.0]), "1 of 2 values differ, by at most inf"),
        (np.array([0.0]), np.array([-0.0]), "the same numbers in other bits"),
        (np.array([1, 2]), np.array([1.0, 2.0]), "int64[2] and float64[2]"),
    ],
)
def test_a_difference_is_as_large_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one: Any, other: Any, says: str
) -> None:
    """`diff` counts the values that differ and says by how much, also of large integers, NaN and infinity."""
    save_two(tmp_path, one, other)
    assert main(["diff", str(tmp_path), "1", "2"]) == 1
    assert says in capsys.readouterr().out
