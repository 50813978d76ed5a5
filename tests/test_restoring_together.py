"""Real processes that restore: what groups of another size wrote, each its own part, and all of them the same step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_hooks
from benchmarks.process_groups import DEVICES_PER_PROCESS, Nursery
from tests import restoring_together as scenarios

pytestmark = pytest.mark.processes

MIB = 1 << 20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def written(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """{number of processes: what they wrote}."""
    folders = {count: tmp_path_factory.mktemp(f"by_{count}") for count in (2, 4)}
    for count, folder in folders.items():
        for process in nursery.run_group(scenarios.write, folder, count):
            assert process.code == 0, process.log
    return folders


# ------------------------------------------------------------------ other numbers of processes


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("layout", scenarios.LAYOUTS)
def test_one_process_restores_what_several_wrote(written: dict[int, Path], count: int, layout: str) -> None:
    """By us and by Orbax, in each of its layouts."""
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(written[count] / layout)
    assert restored.keys() == scenarios.values().keys()
    for leaf, value in scenarios.values().items():
        assert restored[leaf].dtype == value.dtype
        assert restored[leaf].tobytes() == value.tobytes(), leaf


def test_two_processes_restore_what_two_and_four_wrote(
    nursery: Nursery, written: dict[int, Path], tmp_path: Path
) -> None:
    """By us and by Orbax, in two meshes; without shardings, and the devices gone, each has all of it."""
    ended = nursery.run_group(scenarios.read, tmp_path, 2, [str(written[2]), str(written[4])])
    for process in ended:
        assert process.code == 0, process.log
        wrong = {case: found for case, found in process.report.items() if found != [[], True]}
        gone = {case for case in wrong if case.startswith(f"{written[2]} ") and case.endswith("without")}
        assert wrong.keys() == gone, wrong  # of two, the devices are here: the saved shardings are used again
        assert all(found == [[], False] for found in wrong.values()), wrong
        assert len(process.report) == 2 * len(scenarios.LAYOUTS) * 3


# ------------------------------------------------------------------ as little as can be


def test_each_process_reads_and_holds_only_its_part(nursery: Nursery, written: dict[int, Path], tmp_path: Path) -> None:
    """Of 96 MiB that four processes wrote in columns: half of it in columns is half of the files, half of the rows is
    half of each file; in both cases half of the bytes, and little memory beside."""
    ended = nursery.run_group(scenarios.read_little, tmp_path, 2, str(written[4]))
    for number, process in enumerate(ended):
        assert process.code == 0, process.log
        for turned, found in process.report.items():
            assert found["equal"] and found["kept"] == 48 * MIB
            read = {int(name, 16): nbytes for name, nbytes in found["read"].items() if nbytes >= MIB}
            assert 48 * MIB <= sum(found["read"].values()) <= 49 * MIB, turned
            assert set(read) == ({0, 1, 2, 3} if turned == "True" else {2 * number, 2 * number + 1})
            assert found["extra"] < 32 * MIB, f"{found['extra'] / MIB:.0f} MiB"


@pytest.mark.parametrize("count", [2, 4])
def test_a_save_holds_no_more_than_the_bound_in_each_process(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Beside its own shards, max_host_bytes and little more; without a bound, its shards once more."""
    for process in nursery.run_group(scenarios.hold_little, tmp_path, count, 12):
        assert process.code == 0, process.log
        found = process.report
        own_mib = 96 // count
        assert found["own"] == own_mib * MIB
        assert found["bound, equal"] and found["no bound, equal"]
        if found["no bound"]:  # where the system can tell
            assert found["no bound"] > (own_mib - 4) * MIB, f"{found['no bound'] / MIB:.1f} MiB"
            assert found["bound"] < (12 + 4) * MIB, f"{found['bound'] / MIB:.1f} MiB"


# ------------------------------------------------------------------ one step for all


@pytest.fixture(scope="module", params=[2, 4])
def reports(nursery: Nursery, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process of a group saw, scenario by scenario."""
    ended = nursery.run_group(scenarios.together, tmp_path_factory.mktemp("together"), request.param)
    for process in ended:
        assert process.code == 0, process.log
    return [process.report for process in ended]


def test_a_step_that_one_process_rejects_is_rejected_by_all(reports: Any) -> None:
    """Damage that only one process can see makes all restore the one before; undone, all restore the newest."""
    for report in reports:
        assert report["damaged"] == [[2, []], [1, 2]]
        assert report["newest"] == [3, []]


def test_a_damaged_step_that_was_asked_for_is_an_error_for_all(reports: Any) -> None:
    *others, last = reports
    assert last["only the rejected"].startswith("CorruptCheckpointError")
    for report in others:
        assert report["only the rejected"].startswith("OtherProcessError")
        assert f"process {len(others)} failed: CorruptCheckpointError" in report["only the rejected"]


def test_the_leader_chooses_whatever_the_others_would_find(reports: Any) -> None:
    """A listing that lags behind in one process does not make it restore an older step."""
    assert [report["lagging"] for report in reports] == [[3, []]] * len(reports)


def test_an_error_in_one_process_reaches_all(reports: Any) -> None:
    *others, last = reports
    assert last["misfit"].startswith("StructureMismatchError")
    assert last["no object"].startswith("InvalidArgumentTypeError")
    for report in others:
        assert f"process {len(others)} failed: StructureMismatchError" in report["misfit"]
        assert f"process {len(others)} failed: InvalidArgumentTypeError" in report["no object"]
    for report in reports:
        assert report["no such step"].startswith("CheckpointNotFoundError") and "[1, 2, 3]" in report["no such step"]
        assert report["disagree"].startswith("ProcessesDisagreeError")
        assert f"process {len(others)} has step 2 to restore" in report["disagree"]
        assert f"process {len(others)} has step 1 to restore" in report["another step"]


def test_what_process_0_cannot_look_at_is_the_same_error_for_all(reports: Any) -> None:
    """With the number of the failure; in process 0 it is the error itself, which has its cause."""
    texts = {report["no look"].pop("text") for report in reports}
    assert len(texts) == 1 and "/run/3: Input/output error" in texts.pop()
    causes = ["OSError", *["NoneType"] * (len(reports) - 1)]
    assert [report["no look"] for report in reports] == [{"errno": 5, "cause": cause} for cause in causes]


def test_an_empty_run_is_empty_for_all(reports: Any) -> None:
    for report in reports:
        assert report["empty"] == [True, 0]
        assert report["init"] == [1.0, 1.0]
        assert report["begin as run"] == report["begin as run/2"] == [[], 0]


def test_a_directory_that_is_not_shared_is_told(reports: Any) -> None:
    for report in reports:
        assert report["elsewhere"].startswith("NotSharedError"), report["elsewhere"]
        assert f"for processes [{len(reports) - 1}]" in report["elsewhere"]


def test_with_storage_of_its_own_all_restore_the_newest_step_that_all_have(reports: Any) -> None:
    assert [report["own storage"] for report in reports] == [[2, []]] * len(reports)


def test_the_groups_are_what_the_tests_take_them_for() -> None:
    """Two processes have half of the devices of four."""
    assert DEVICES_PER_PROCESS == 2
    assert all(value.nbytes for value in scenarios.values().values())
    assert np.prod(scenarios.values()["rows"].shape) > MIB
