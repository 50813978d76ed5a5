"""A short version of `python -m attacks.damage`, which finds what it has to find."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attacks import damage
from attacks.damage import SPECIMENS, STEP, attack
from attacks.states import state_of
from ckpt_hooks import CheckpointManager

FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Rejected checkpoints are logged, thousands of them."""
    with caplog.at_level("CRITICAL"):
        yield


@pytest.mark.parametrize(("specimen", "stride"), [("tiny, items", 307), ("tiny, tree", 61), ("mixed, tree", 997)])
def test_no_damage_gives_a_wrong_value(specimen: str, stride: int) -> None:
    """Whatever is done to a file, a restore gives what was saved or raises, and `verify` has told of it."""
    tally = attack(SPECIMENS[specimen], stride=stride, pair_stride=5, directory=FAST)
    assert tally.failures == []
    assert tally.count("bit", "detected") > tally.count("bit", "harmless")  # markers, whose text nobody trusts
    assert tally.count("bit", "detected") + tally.count("bit", "harmless") == tally.count("bit") > 50


def test_only_markers_may_be_flipped() -> None:
    """Every file of a pytree but its marker notices every flip."""
    tally = attack(SPECIMENS["tiny, tree"], stride=61, pair_stride=100, directory=FAST)
    harmless = {file for (file, kind), found in tally.verdicts.items() if kind == "bit" and found["harmless"]}
    assert harmless == {"commit_success.txt"}


def test_the_attack_sees_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that restores something else than what was saved is found out."""
    real = CheckpointManager.restore

    def restore(manager: CheckpointManager, *args: Any, **options: Any) -> Any:
        restored = real(manager, *args, **options)
        try:
            intact = not manager.verify(STEP)
        except Exception:
            intact = False
        return restored if intact else state_of(STEP + 1)

    monkeypatch.setattr(CheckpointManager, "restore", restore)
    tally = attack(SPECIMENS["tiny, tree"], stride=997, pair_stride=100, directory=FAST)
    assert tally.count(verdict="WRONG")
    assert len(tally.failures) == tally.count(verdict="WRONG")


def test_the_attack_sees_what_verify_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `verify` that finds nothing wrong in what cannot be restored is found out."""
    monkeypatch.setattr(CheckpointManager, "verify", lambda manager, step: [])
    tally = attack(SPECIMENS["tiny, tree"], stride=997, pair_stride=100, directory=FAST)
    assert tally.count(verdict="UNTOLD")


def test_a_directory_that_was_never_saved_is_no_item(tmp_path: Path) -> None:
    """An item that somebody has copied into a checkpoint is not restored, with a target or without."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(10, state_of(10))
    shutil.copytree(tmp_path / "10/params", tmp_path / "10/params_again")
    manager = CheckpointManager(tmp_path)
    assert manager.restore().keys() == state_of(10).keys()
    assert manager.restore(state_of(0)).keys() == state_of(10).keys()
    assert manager.verify(10) == []


@pytest.mark.long
def test_more_than_1_000_000_flips(capsys: pytest.CaptureFixture[str]) -> None:
    """The full run flips every bit of every specimen."""
    assert damage.main(["--full", "--processes", "2"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "cases, of them" in line)
    assert int(line.split("of them ")[1].split()[0].replace(",", "")) >= 1_000_000
