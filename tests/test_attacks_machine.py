"""Random lives of a run: the library does what a dict says, and a library that does not is found out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BROKEN = {
    "retention keeps the oldest": "retention.LatestN.keep = lambda self, metrics: set(sorted(metrics)[: self.n])",
    "damage is not looked for": "checksums.FileChecksums.check = reader.check_piece = lambda *args, **options: None",
    "nothing is set aside": "commit.move_aside = lambda path, label, beside: path",
    "a second writer is let in": "commit.DirectoryLock.__init__ = lambda self, path: None",
}


def run_machine(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
from attacks import machine
from ckpt_hooks import retention
from ckpt_hooks.storage import checksums, commit, reader
{before}
sys.exit(machine.main())
"""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("runs", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_a_run_lives_as_the_model_says(runs: int) -> None:
    """Whatever is saved, taken back, damaged, killed and reopened, the run holds what a dict holds."""
    result = run_machine(f"--runs={runs}", "--seed=0")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.long
@pytest.mark.parametrize("fault", BROKEN)
def test_a_library_that_breaks_a_promise_is_found_out(fault: str) -> None:
    """A fault in the library makes the machine fail."""
    result = run_machine("--runs=200", "--no-shrink", before=BROKEN[fault])
    assert result.returncode == 1
    assert "differs from the model" in result.stdout
