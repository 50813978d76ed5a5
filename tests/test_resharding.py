"""What was saved in one mesh comes back in another, bit for bit: 8 CPU devices in one process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resharding_driver import PAIRS, THROUGH_ORBAX

_DRIVER = Path(__file__).with_name("resharding_driver.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{case: "equal", or a traceback}; all cases run in one process, started once."""
    path = tmp_path_factory.mktemp("resharding") / "report.json"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    flags["PYTHONPATH"] = str(_DRIVER.parent.parent)
    subprocess.run([sys.executable, str(_DRIVER), str(path)], env=os.environ | flags, check=True, timeout=300)
    found: dict[str, str] = json.loads(path.read_text())
    return found


def test_enough_pairs_are_tried() -> None:
    assert len(set(PAIRS)) >= 30
    assert len({name for name, _ in PAIRS}) >= 10


@pytest.mark.parametrize("pair", PAIRS, ids=" -> ".join)
def test_a_state_is_restored_in_another_mesh(report: dict[str, str], pair: tuple[str, str]) -> None:
    """Arrays of many dtypes and PRNG keys, each shard on its device."""
    assert report[" -> ".join(pair)] == "equal"


@pytest.mark.parametrize("pair", THROUGH_ORBAX, ids=" -> ".join)
def test_what_orbax_wrote_is_restored_in_another_mesh(report: dict[str, str], pair: tuple[str, str]) -> None:
    assert report["Orbax: " + " -> ".join(pair)] == "equal"
    assert report["Orbax, zarr3: " + " -> ".join(pair)] == "equal"


@pytest.mark.parametrize("pair", [pair for pair in THROUGH_ORBAX if pair[1] != "no shardings"], ids=" -> ".join)
def test_orbax_restores_what_we_wrote_in_another_mesh(report: dict[str, str], pair: tuple[str, str]) -> None:
    assert report[" -> Orbax: ".join(pair)] == "equal"


@pytest.mark.parametrize("pair", THROUGH_ORBAX, ids=" -> ".join)
def test_a_compressed_state_is_restored_in_another_mesh(report: dict[str, str], pair: tuple[str, str]) -> None:
    assert report["zstd: " + " -> ".join(pair)] == "equal"


@pytest.mark.parametrize(
    "case", ["cast_and_renamed", "flax_file", "one_array_of_orbax", "weakly_typed", "devices_that_are_not_here"]
)
def test_more(report: dict[str, str], case: str) -> None:
    """A cast and a renaming, and a file of Flax, spread; and saved shardings whose devices are gone."""
    assert report[case] == "equal"
