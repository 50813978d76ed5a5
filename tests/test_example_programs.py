"""The small programs of `examples/`: each is one command, and fails where what it shows is not so."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ckpt_hooks import CheckpointHook, CheckpointManager

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Small arguments, and what has to stand in the output: where the second half begins, and the verdict.
PROGRAMS = {
    "characters": (["--steps=12"], r"interrupted +from step 6\n(.*\n)+12 .*\n(.*\n)*Equal to the last bit"),
    "equinox_loop": (["--steps=12"], r"interrupted +from step 6\n(.*\n)+All 19 arrays are equal to the last bit"),
    "finetune": (["--steps=12"], r"interrupted +steps 6 to 12\n(.*\n)+.*the same ones to the last bit"),
    "keras_fit": (["--epochs=2"], r"in epoch 2, after batch 7\n(.*\n)+All metrics and 23 variables are equal to the"),
    "params_elsewhere": (["--width=256"], r"trained +8 (.*\n)+JAX +1 .*\nNumPy +0 .*\n\nThe same parameters"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_shows_what_it_says(name: str, tmp_path: Path) -> None:
    """`python examples/NAME.py`, from any directory: exit code 0, its numbers, and nothing left behind."""
    arguments, expected = PROGRAMS[name]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Warning" not in process.stderr
    assert re.search(expected, process.stdout), process.stdout
    assert not list(tmp_path.iterdir())


def run_here(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    program: Any = import_module(f"examples.{name}")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return program.main()


@pytest.mark.parametrize("name", ["characters", "equinox_loop", "finetune", "keras_fit"])
def test_program_fails_where_the_data_start_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that gets other batches than the uninterrupted one ends in another state: that is an error."""
    restore = CheckpointHook.restore
    monkeypatch.setattr(CheckpointHook, "restore", lambda hook, state, **items: restore(hook, state))
    with pytest.raises(AssertionError, match="differ in"):
        run_here(name, [*PROGRAMS[name][0], f"--directory={tmp_path}"], monkeypatch)
    assert CheckpointManager(tmp_path / "interrupted").steps(), "--directory keeps the runs"


def test_program_fails_where_the_runs_were_finished_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second time in the same directory nothing is interrupted: that proves nothing, and says so."""
    arguments = ["--steps=4", f"--directory={tmp_path}"]
    run_here("equinox_loop", arguments, monkeypatch)
    with pytest.raises(SystemExit, match="choose a new --directory"):
        run_here("equinox_loop", arguments, monkeypatch)


@pytest.mark.parametrize("differing", [{"params": "0" * 16}, {"predicted": [0]}, {"read_bytes": 10**9}])
def test_params_elsewhere_fails_where_a_report_differs(
    differing: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other parameters, another prediction, or as much read as the whole checkpoint has: exit code 1."""
    program: Any = import_module("examples.params_elsewhere")
    CheckpointManager(tmp_path, async_save=False).save(program.NUM_STEPS, {"params": [0.0] * 9})
    report = {"name": "x", "devices": 1, "params": "f" * 16, "accuracy": 1.0, "predicted": [1], "read_bytes": 1}
    reports = iter([report, report, report, report, report, report | differing])
    monkeypatch.setattr(program, "run", lambda *_: next(reports))
    arguments = [f"--directory={tmp_path}"]
    assert run_here("params_elsewhere", arguments, monkeypatch) == 0
    assert run_here("params_elsewhere", arguments, monkeypatch) == 1
