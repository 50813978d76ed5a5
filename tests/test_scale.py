"""The model of a save and a restore by many processes counts what real processes do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.process_groups import DEVICES_PER_PROCESS, Nursery
from benchmarks.scale import restored, saved
from tests import scale_driver

pytestmark = pytest.mark.processes

NUM_LEAVES = 20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_files_syncs_entries_and_lines_are_those_of_the_model(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Also by each process: none does more because there are others, but process 0."""
    ended = nursery.run_group(scale_driver.count, tmp_path, count, NUM_LEAVES)
    assert [process.code for process in ended] == [0] * count, [process.log for process in ended]
    reports = [process.report for process in ended]
    cuts = DEVICES_PER_PROCESS * count
    model = saved(count, NUM_LEAVES, cuts)
    assert reports[0]["files"] == model.files
    assert reports[0]["syncs"] == model.syncs[0]
    assert all(4 <= report["syncs"] <= model.syncs[1] for report in reports[1:])
    assert reports[0]["entries"] == model.entries
    assert sum(report["saved lines"] for report in reports) == model.lines
    read = restored(count, NUM_LEAVES, cuts, data_files=1)
    assert read.entries == model.entries
    assert sum(report["restored lines"] for report in reports) == read.lines
