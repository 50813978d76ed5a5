"""Real processes with `jax.distributed`: what N of them write is one checkpoint, and who fails is named to all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckpt_hooks
from benchmarks.process_groups import Nursery
from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.checksums import array_problems
from ckpt_hooks.testing import damage
from tests import processes_driver
from tests.processes_driver import values

pytestmark = pytest.mark.processes


class Group(NamedTuple):
    """What the processes of a group left: {scenario: what it saw} of each, and their folder."""

    reports: list[dict[str, Any]]
    folder: Path

    @property
    def num_processes(self) -> int:
        return len(self.reports)


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Started once, for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    with Nursery() as nursery:
        ended = nursery.run_group(processes_driver.run, folder, request.param)
    assert [process.code for process in ended] == [0] * request.param, [process.log for process in ended]
    return Group([process.report for process in ended], folder)


def test_every_process_gets_its_shards_back_in_the_same_mesh_and_in_another(group: Group) -> None:
    for report in group.reports:
        assert report["save_and_restore"] == [True] * 6


def test_each_process_writes_one_data_file_and_no_byte_twice(group: Group) -> None:
    files = sorted((group.folder / "plain" / "d").iterdir())
    assert [int(file.name, 16) for file in files] == list(range(group.num_processes))
    # kernel and bias, cut evenly; the first process has the index and what is small besides.
    sizes = [file.stat().st_size for file in files[1:]]
    assert all(size < 64 * 48 * 4 / group.num_processes + 4096 for size in sizes)


def test_one_process_and_orbax_restore_what_several_wrote(group: Group) -> None:
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        ours = checkpointer.restore(group.folder / "plain")
    target = {name: np.zeros_like(value) for name, value in values().items()}
    theirs = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
        group.folder / "plain", args=ocp.args.StandardRestore(target)
    )
    for name, expected in values().items():
        np.testing.assert_array_equal(ours[name], expected)
        np.testing.assert_array_equal(theirs[name], expected)


def test_damage_in_the_file_of_any_process_is_found(group: Group) -> None:
    item = group.folder / "plain"
    assert list(array_problems(str(item))) == []
    victim = item / "d" / f"{group.num_processes - 1:032x}"
    with damage.flip_bit(victim, 0), pytest.raises(CorruptCheckpointError, match=victim.name):
        ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()).restore(item)


def test_a_lost_table_of_checksums_is_found(group: Group) -> None:
    item = group.folder / "plain"
    table = item / f"_ARRAY_CHECKSUMS.{group.num_processes - 1}"
    with damage.remove(table), pytest.raises(CorruptCheckpointError, match=table.name):
        ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()).restore(item)


def test_several_items_in_the_background(group: Group) -> None:
    for report in group.reports:
        assert {"config", "params", "_CHECKPOINT_METADATA"} <= set(report["save_items_in_background"])
    with ckpt_hooks.Checkpointer(ckpt_hooks.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(group.folder / "items")
    assert restored.config == {"layers": 3}
    np.testing.assert_array_equal(restored.params["kernel"], values()["kernel"])


def test_the_manager_and_the_hook_lead_one_run(group: Group) -> None:
    """One process lists, locks, refuses, removes and records for all; all resume at the same step, in any mesh."""
    for number, report in enumerate(group.reports):
        found = report["run_of_a_manager"]
        assert "step 3 already" in found.pop("refused"), f"process {number}"
        assert found == {
            "metrics": {"loss": 3, "accuracy": 0.5},
            "resumed": [3, 3],
            "equal": [True] * 3,
            "saved": [4, 6],
            "steps": [2, 3, 4],
        }
    assert sorted(os.listdir(group.folder / "run")) == ["2", "3", "4", "6.rolled_back"]


def test_a_process_at_another_step_is_named(group: Group) -> None:
    """A save is of one step; nothing is written where the processes have come to different ones."""
    for report in group.reports:
        assert report["other_step"].startswith("ProcessesDisagreeError"), report["other_step"]
        assert f"process {group.num_processes - 1} has" in report["other_step"]
    assert not [name for name in os.listdir(group.folder / "behind") if not name.startswith(".")]


def test_a_process_with_another_structure_is_named_and_nothing_is_written(group: Group) -> None:
    for report in group.reports:
        assert report["other_structure"].startswith("ProcessesDisagreeError")
        assert f"process {group.num_processes - 1} has" in report["other_structure"]
        assert "4 leaves" in report["other_structure"]
    assert not any(name.startswith("disagreed") for name in os.listdir(group.folder))


def test_an_error_in_one_process_reaches_all_others_at_once(group: Group) -> None:
    for report in group.reports:
        assert report["failing_process"].startswith("SaveFailedError")
        assert "the disk of the last process failed" in report["failing_process"]
    for report in group.reports[:-1]:
        assert f"process {group.num_processes - 1} failed: OSError" in report["failing_process"]
    assert not any(name.startswith("failed") for name in os.listdir(group.folder))


def test_sigterm_in_one_process_makes_all_save_the_same_step_and_leave(group: Group) -> None:
    """JAX's runtime agrees on the step; the checkpoint is committed before anybody leaves."""
    step = group.reports[0]["preemption"]["step"]
    for report in group.reports:
        assert report["preemption"] == {"step": step, "code": 143, "steps": [step]}


def test_a_process_that_does_not_come_is_named(group: Group) -> None:
    for report in group.reports[:-1]:
        assert report["absent_process"].startswith("BarrierTimeoutError")
        assert f"did not come: [{group.num_processes - 1}]" in report["absent_process"]
