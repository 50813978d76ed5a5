"""The attacks at system calls: in short for us, in full where asked, and proof that they find what there is to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from attacks import shim
from attacks.operations import OPERATIONS
from attacks.states import KINDS, differences, leaves_of, state_of, step_of

REPOSITORY = Path(__file__).parents[1]
# What is tested does not depend on the disk, and memory is faster.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()

needs_shim = pytest.mark.skipif(bool(shim.why_not()), reason=shim.why_not())


def attack(name: str, *arguments: str, history: Path) -> tuple[int, dict[str, Any]]:
    """(exit code, what it counted)."""
    command = [sys.executable, "-m", f"attacks.{name}", "--directory", MEMORY, "--json", str(history), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=7200)
    assert history.exists(), done.stdout + done.stderr
    counted: dict[str, Any] = json.loads(history.read_text().splitlines()[-1])
    return done.returncode, counted


def classes_of(counted: dict[str, Any]) -> set[str]:
    return {name for row in counted["rows"] for name in row["classes"]}


@needs_shim
def test_sigkill_at_a_sample_of_system_calls(tmp_path: Path) -> None:
    """Killed at every 15th call of each operation, we lose nothing that was acknowledged, and leave nothing behind."""
    code, counted = attack(
        *("kill", "--libraries", "ours", "--kinds", "tiny", "--kills", "1", "--every", "15"), history=tmp_path / "kill"
    )
    assert counted["failures"] == []
    assert code == 0
    assert {row["row"] for row in counted["rows"]} >= {name for name, op in OPERATIONS.items() if op.attempts}


@needs_shim
def test_errors_at_a_sample_of_system_calls(tmp_path: Path) -> None:
    """Where system calls fail, we say so, lose nothing, leave nothing behind, and save again when they work."""
    operations = ("async save", "overwrite", "retention", "restore")
    faults = ("EIO once", "ENOSPC for ever", "short write once", "EIO reading once")
    code, counted = attack(
        *("errors", "--libraries", "ours", "--short", "--every", "23"),
        *("--operations", *operations, "--faults", *faults),
        history=tmp_path / "errors",
    )
    assert counted["failures"] == []
    assert code == 0
    assert {row["row"] for row in counted["rows"]} == set(faults)


@needs_shim
@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("kill", ("--kills", "1"), {"torn", "refused", "lost", "wrong"}),
        ("errors", ("--faults", "EIO once", "short write once"), {"torn", "refused", "silent", "lost"}),
    ],
)
def test_an_attack_finds_what_is_careless(tmp_path: Path, name: str, options: tuple[str, ...], found: set[str]) -> None:
    """What is written straight to its place, without a look at errors, is found in every way in which it fails."""
    _, counted = attack(
        *(name, "--libraries", "careless", "--kinds", "tiny", "--operations", "save", "retention", "overwrite"),
        *options,
        history=tmp_path / name,
    )
    assert classes_of(counted) >= found


@needs_shim
@pytest.mark.long
@pytest.mark.parametrize(("name", "least"), [("kill", 5000), ("errors", 5000)])
def test_every_system_call(tmp_path: Path, name: str, least: int) -> None:
    """At every call, in every operation, on every kind of state: not one failure."""
    code, counted = attack(name, "--libraries", "ours", history=tmp_path / name)
    assert counted["failures"] == []
    assert code == 0
    assert sum(row["strikes"] for row in counted["rows"]) >= least


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine without a C compiler an attack ends with a message that names what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SystemExit, match="C compiler: install gcc"):
        shim.rerun("attacks.kill", [])


@pytest.mark.parametrize("kind", KINDS)
def test_each_leaf_tells_its_step(kind: str) -> None:
    """A state says which step it is of, equals itself, and differs from that of another step in every leaf."""
    state = state_of(7, kind)
    assert step_of(state) == 7
    assert differences(state, 7, kind) == []
    assert len(differences(state, 8, kind)) == len(leaves_of(state))
