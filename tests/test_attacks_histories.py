"""Histories of writers and readers: the run keeps its promises, and the checker finds what breaks one."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.history_check import Keep, Operation, check

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_keeps_its_promises_to_readers_and_writers(tmp_path: Path, seed: int) -> None:
    """Thousands of operations of killed writers and of readers leave a history without an anomaly."""
    command = [sys.executable, "-m", "attacks.histories", "--operations=2500", "--readers=3", "--kill-secs=0.5"]
    command += [f"--seed={seed}", f"--directory={tmp_path}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "anomalies: 0" in result.stdout


# ------------------------------------------------------------------ the checker

A, B, C, D = 101, 202, 303, 404  # stamps
NEVER, BACK = "never true", "back in time"


def change(
    kind: str, begin: int, end: int | None, step: int, steps: tuple[int, ...] | None, **fields: object
) -> Operation:
    fields = {"process": "w1", "loss": 0.5, **fields}
    return Operation(kind=kind, begin_ns=begin, end_ns=end, step=step, steps=steps, **fields)  # type: ignore[arg-type]


def read(kind: str, begin: int, end: int, **fields: object) -> Operation:
    return Operation(process="r1", kind=kind, begin_ns=begin, end_ns=end, **fields)  # type: ignore[arg-type]


# Steps 1 and 2 by the first writer, which is killed in the save of step 3; then 4 by another one, which keeps two.
KILLED = change("save", 50, None, 3, None, stamp=C)
WRITES = [
    change("save", 10, 20, 1, (1,), stamp=A, loss=0.1),
    change("save", 30, 40, 2, (1, 2), stamp=B),
    KILLED,
    Operation("w1", "killed", 55, 60),
]
KEEP_TWO = Keep(latest=2)
NEXT = change("save", 70, 80, 4, (2, 4), stamp=D, process="w2", keep=KEEP_TWO)
NEXT_WITH_3 = dataclasses.replace(NEXT, steps=(3, 4))

SOUND = {
    "nothing yet": [read("restore newest", 1, 5), read("steps", 1, 5, steps=()), read("newest", 1, 5)],
    "during a save, before it": [read("restore newest", 12, 18)],
    "during a save, after it": [read("restore newest", 12, 18, step=1, stamp=A)],
    "the newest": [read("restore newest", 41, 45, step=2, stamp=B), read("newest", 41, 45, step=2)],
    "by number": [read("restore step", 41, 45, step=1, stamp=A), read("verify", 41, 45, step=1)],
    "removed by retention, at last": [read("restore step", 81, 85, step=1, refused="CheckpointNotFoundError")],
    "while retention removes it": [
        read("restore step", 71, 79, step=1, refused="CheckpointNotFoundError"),
        read("steps", 71, 79, steps=(1, 2)),
    ],
    "the killed save is not there": [read("restore newest", 61, 65, step=2, stamp=B)],
    "a listing that no moment had as a whole": [read("steps", 15, 39, steps=(2,)), read("steps", 15, 39, steps=(1,))],
    "best": [read("best", 41, 45, step=1), read("restore best", 41, 45, step=1, stamp=A)],
    "metadata": [read("metadata", 41, 45, step=2, stamp=B, loss=0.5)],
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_history_has_no_anomaly(name: str) -> None:
    """What a run may answer is let pass."""
    assert check([*WRITES, NEXT, *SOUND[name]]) == []


def test_a_save_that_was_killed_may_have_committed() -> None:
    """A writer that died in a save left the checkpoint or not; what the next one lists decides."""
    seen = read("restore newest", 61, 65, step=3, stamp=C)
    assert check([*WRITES, NEXT_WITH_3, seen]) == []
    assert check([*WRITES, NEXT, read("restore newest", 61, 65, step=2, stamp=B)]) == []


ANOMALIES = {
    "an acknowledged save is not the newest": (NEVER, read("restore newest", 41, 45, step=1, stamp=A)),
    "an acknowledged save is not there": (NEVER, read("restore step", 41, 45, step=2, refused="NotFound")),
    "an empty run that has a checkpoint": (NEVER, read("restore newest", 41, 45)),
    "the values of another save": (NEVER, read("restore step", 41, 45, step=2, stamp=A)),
    "values that nobody saved": (NEVER, read("restore newest", 41, 45, step=2, stamp=999)),
    "half of one and half of another": ("params/w", read("restore newest", 41, 45, step=2, problem="params/w: other")),
    "an error that nothing allows": ("OSError", read("restore newest", 41, 45, problem="OSError: no such file")),
    "a step before its save began": (NEVER, read("steps", 5, 9, steps=(1,))),
    "a step that nobody saved": (NEVER, read("steps", 41, 45, steps=(1, 2, 7))),
    "a listing without an acknowledged step": (NEVER, read("steps", 41, 45, steps=(2,))),
    "a removed checkpoint": (NEVER, read("restore step", 81, 85, step=1, stamp=A)),
    "latest_step is old": (NEVER, read("newest", 41, 45, step=1)),
    "verified although it is gone": (NEVER, read("verify", 81, 85, step=1)),
    "metrics of nobody": (NEVER, read("metadata", 41, 45, step=2, stamp=B, loss=0.7)),
    "the best is not the best": (NEVER, read("best", 41, 45, step=2)),
    "the best is a removed one": (NEVER, read("restore best", 81, 85, step=1, stamp=A)),
    "a checkpoint comes and goes again": (
        BACK,
        read("restore newest", 31, 33, step=2, stamp=B),
        read("restore newest", 35, 38, step=1, stamp=A),
    ),
    "a step is gone and comes back": (
        BACK,
        read("restore step", 71, 73, step=1, refused="NotFound"),
        read("restore step", 75, 78, step=1, stamp=A),
    ),
    "a killed save is seen and is lost": (
        NEVER,
        read("restore newest", 56, 58, step=3, stamp=C),
        read("restore newest", 61, 65, step=2, stamp=B),
    ),
    "two writers": (
        "two writers",
        change("save", 24, 26, 9, (1, 9), process="w3", stamp=9),
        change("save", 32, 39, 10, (1,), process="w3", stamp=10),
    ),
}


@pytest.mark.parametrize("name", ANOMALIES)
def test_an_anomaly_is_found(name: str) -> None:
    """What no run that keeps its promises could have answered is told, as what it is."""
    expected, *operations = ANOMALIES[name]
    found = check([*WRITES, NEXT, *operations])  # type: ignore[list-item]
    assert any(anomaly.startswith(str(expected)) for anomaly in found), found


@pytest.mark.parametrize(
    ("steps", "keep"),
    [
        ((4,), KEEP_TWO),  # one that was to stay is gone
        ((1, 2, 4), KEEP_TWO),  # one that was to go is there
        ((2,), KEEP_TWO),  # the saved one is not there
        ((2, 4), Keep(latest=1, every=2, best=1)),  # the best one, step 1, is gone
        ((2, 4), Keep()),  # nothing was to go
    ],
)
def test_a_writer_that_loses_or_keeps_the_wrong_ones_is_found(steps: tuple[int, ...], keep: Keep) -> None:
    """What a new writer lists after its first save is what was acknowledged, and retention leaves."""
    assert check([*WRITES, dataclasses.replace(NEXT, steps=steps, keep=keep)])


def test_the_newest_jumps_when_a_run_is_taken_back() -> None:
    """While newer steps are set aside, the newest is the old one or the new one, and none in between."""
    three = [change("save", 10 * n, 10 * n + 5, n, tuple(range(1, n + 1)), stamp=n) for n in (1, 2, 3)]
    back = change("rollback", 40, 50, 1, (1,))
    for step in (1, 3):
        assert check([*three, back, read("newest", 41, 49, step=step)]) == []
    assert check([*three, back, read("newest", 41, 49, step=2)])


def test_retention_by_a_nan_keeps_the_best_that_ranks() -> None:
    """The checker's own retention: a NaN never ranks, the newer of equals does, and the newest always stays."""
    losses = {1: 0.2, 2: math.nan, 3: 0.2, 4: 0.9}
    assert Keep(best=1).kept(losses) == {3, 4}
    assert Keep(latest=2, every=2).kept(losses) == {2, 3, 4}
    assert Keep(best=1).kept({1: math.nan, 2: math.nan}) == {2}
    assert Keep().kept(losses) == {1, 2, 3, 4}
