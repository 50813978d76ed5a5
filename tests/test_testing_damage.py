"""`ckpt_hooks.testing.damage`: each damage does what it says, and is undone."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from ckpt_hooks.testing import damage
from ckpt_hooks.testing.operations import read_tree


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two items with a file each, one of them longer than a sector, beside another checkpoint."""
    for step in (10, 20):
        for item, data in (("params", bytes([step]) * 600), ("step", bytes([step, 1, 2]))):
            (tmp_path / f"{step}/{item}").mkdir(parents=True)
            (tmp_path / f"{step}/{item}/data").write_bytes(data)
    return tmp_path / "20"


def test_every_damage_changes_something_and_is_undone(checkpoint: Path) -> None:
    """Each damage leaves another tree than there was, no two the same bits, and the old one when it is undone."""
    run = str(checkpoint.parent)
    whole = read_tree(run)
    seen = set()
    for each in [*damage.damages(checkpoint), *damage.damages_between(checkpoint, checkpoint.parent / "10")]:
        with each:
            struck = read_tree(run)
            assert struck != whole, each
            seen.add(str(sorted(struck.items())))
        assert read_tree(run) == whole, each
    assert len(seen) > 8 * 603


def test_all_damages_are_all(checkpoint: Path) -> None:
    """Each bit, each length that is shorter, each sector, each file and directory, each pair."""
    kinds = collections.Counter(each.kind for each in damage.damages(checkpoint))
    assert kinds == {
        "bit": 8 * 603,
        "truncate": 603,
        "sector": 3,
        "remove": 4,
        "move": 4,
        "swap": 2,
        "copy": 4,
    }
    between = collections.Counter(each.kind for each in damage.damages_between(checkpoint, checkpoint.parent / "10"))
    assert between == {"swap": 4, "copy": 4}


def test_damages_of_some_paths(checkpoint: Path) -> None:
    """Patterns say which files are struck, and a stride which bits."""
    found = list(damage.damages(checkpoint, ["bit"], paths=("step/*",), stride=7))
    assert {each.path for each in found} == {str(checkpoint / "step/data")}
    assert len(found) == 4


def test_a_flip_for_good(checkpoint: Path) -> None:
    """`strike` alone stays; a damage says what it is."""
    flip = damage.flip_bit(checkpoint / "step/data", 9)
    flip.strike()
    assert (checkpoint / "step/data").read_bytes() == bytes([20, 3, 2])
    assert str(flip).endswith("20/step/data: bit 1 of byte 1 flipped")


def test_a_sector_is_zeroed(checkpoint: Path) -> None:
    """A sector at the end of a file is as long as the file goes on, and the file stays as long as it was."""
    with damage.zero_sector(checkpoint / "params/data", 1):
        assert (checkpoint / "params/data").read_bytes() == bytes([20]) * 512 + bytes(88)
