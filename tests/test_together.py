"""What goes wrong among several real processes: each is told, in time, and by name."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.process_groups import Nursery
from ckpt_hooks import CheckpointManager, MultiprocessingOptions
from ckpt_hooks.testing import damage
from tests import together

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


# ------------------------------------------------------------------ barriers


@pytest.mark.parametrize("count", [2, 4])
def test_a_long_run_leaves_nothing_in_the_coordination_service(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Saves that process 0's clock started, late metrics, a restore and a refusal: their lines are gone."""
    ended = nursery.run_group(together.long_run, tmp_path, count)
    for process in ended:
        assert process.code == 0, process.log
        report = process.report
        assert report["left"] == []
        assert report["restored"] and report["newest"]
        assert report["step"] == ended[0].report["step"], "all saved when process 0 said so"
        assert f"step {report['step']} already" in report["refused"]


def test_barrier_timeout_secs_bounds_every_barrier_and_the_missing_are_named(nursery: Nursery, tmp_path: Path) -> None:
    """In the foreground and in the background, and at the restore with which a run begins."""
    *others, last = nursery.run_group(together.absent, tmp_path, 4)
    assert last.code == 0, last.log
    for process in others:
        assert process.code == 0, process.log
        assert len(process.report) == 3
        for text, secs in process.report:
            assert text.startswith("BarrierTimeoutError"), text
            assert "[3]" in text and "barrier_timeout_secs" in text
            assert secs < 20


@pytest.mark.parametrize("secs", [0, -1, float("nan")])
def test_a_barrier_timeout_is_positive(secs: float) -> None:
    """Anything else is refused when it is given."""
    with pytest.raises(ValueError, match="barrier_timeout_secs"):
        MultiprocessingOptions(barrier_timeout_secs=secs)


# ------------------------------------------------------------------ bad input


def test_arguments_that_do_not_fit_in_one_process_are_told_to_all(nursery: Nursery, tmp_path: Path) -> None:
    """Nobody waits at a barrier for a process whose call was wrong; the next save is a good one."""
    *others, last = nursery.run_group(together.wrong_arguments, tmp_path, 2)
    for text, _ in last.report:
        assert text.startswith("InvalidArgumentTypeError") and "nonsense" in text
    for process in others:
        for text, secs in process.report:
            assert text.startswith("OtherProcessError: process 1 failed: InvalidArgumentTypeError")
            assert secs < 20, "told, and not found out by waiting"


@pytest.mark.parametrize("count", [2, 4])
def test_what_processes_do_not_have_alike_is_named_before_anything_is_written(
    nursery: Nursery, tmp_path: Path, count: int
) -> None:
    """Arrays of one process, values, dtypes, meshes and metadata that differ: leaf, process and both values."""
    ended = nursery.run_group(together.refused, tmp_path, count)
    last = f"process {count - 1} has"
    words = {
        "NumPy values": ["process 0 has params: 'scale' = NumPy array", f"{last} params: 'scale' = NumPy array"],
        "number": ["process 0 has step: the state = 7", f"{last} step: the state = 8"],
        "dtype": ["'scale' of np.ndarray float32[8]", "'scale' of np.ndarray float16[8]"],
        "mesh": [f"process 0 has params: 2 leaves on mesh(x={count}, y=2)", f"1 leaves on mesh(x=2, y={count})", last],
        "devices": [f"on mesh(x={count}, y=2) of devices [[0, 1]", last, f"of devices [[{2048 * (count - 1) + 1}, "],
        "metadata": ['{"seed": 0, ', f'{last} custom_metadata {{"seed": 1, '],
        "object": [f"process 0 has nothing more, but {last} data: the state of an object"],
        "async_save": [f"process 0 has async_save=False, but {last} async_save=True"],
    }
    if count == 2:
        del words["mesh"]  # 2 x 2 turned is 2 x 2
    for number, process in enumerate(ended):
        assert process.code == 0, process.log
        said = process.report["said"]
        own = "UnsupportedLeafError: item 'params': scale: this jax.Array is on cpu:"
        assert said["host-local everywhere"][0].startswith(own)
        text = said["host-local in one"][0]
        assert text.startswith(own if number == count - 1 else f"OtherProcessError: process {count - 1} failed: {own}")
        for name, expected in words.items():
            text, secs = said[name]
            assert text.startswith("ProcessesDisagreeError")
            assert not [word for word in expected if word not in text], text
            assert secs < 20, "told, and not found out by waiting"
        assert all(process.report["committed"])
        assert process.report["metrics"] == {"loss": 0}
    good = {*range(1, 18, 2), *([10] if count == 2 else [])}
    assert set(map(int, os.listdir(tmp_path / "run"))) == good
    assert not list((tmp_path / "run").glob("*/*.orbax-checkpoint-tmp")), "of metrics that process 0 has not"


@pytest.mark.parametrize("count", [2, 4])
def test_nothing_is_deleted_set_aside_or_recorded_before_all_have_asked_for_the_same(
    nursery: Nursery, tmp_path: Path, count: int
) -> None:
    """A checkpoint is changed when every process has come to the call with the same step, and not before."""
    last = f"process {count - 1} has"
    disputes = {
        "delete": f"process 0 has step 3 to delete, but {last} step 4 to delete",
        "roll back": f"process 0 has step 1 to roll back to, but {last} step 2 to roll back to",
        "delete or roll back": f"process 0 has step 1 to roll back to, but {last} step 1 to delete",
    }
    for number, process in enumerate(nursery.run_group(together.changes_that_differ, tmp_path, count)):
        assert process.code == 0, process.log
        said = process.report["said"]
        for name, words in disputes.items():
            assert said[name][0].startswith(f"ProcessesDisagreeError: {words}. Nothing was written"), said[name]
        told = "" if number == count - 1 else f"OtherProcessError: process {count - 1} failed: "
        assert said["record"][0].startswith(f"{told}NotSerializableError: metrics['loss']")
        assert max(secs for _, secs in said.values()) < 20, "told, and not found out by waiting"
        assert process.report["untouched"] == [[0, 1, 2, 3, 4], {}]
        assert process.report["changed"] == [[0, 1, 3], {"loss": 1}]


@pytest.mark.parametrize("count", [2, 4])
def test_a_save_that_one_process_refuses_fails_in_all_at_once(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Its arguments, or the failure of its last save: the others are told, and what all refuse is each one's own error.

    The next save is one of all.
    """
    words = {
        "step": "InvalidArgumentError: step",
        "metric": "NotSerializableError: metrics['loss']: a metric is one real number",
        "metadata": "InvalidArgumentError: ",
        "name": "InvalidArgumentError: like=: no object can have this name",
        "state": "InvalidArgumentTypeError: ",
        "object": "InvalidArgumentTypeError: ",
        "earlier save": "SaveFailedError: of the background save, which nobody else has",
    }
    for number, process in enumerate(nursery.run_group(together.refused_before_the_barrier, tmp_path, count)):
        assert process.code == 0, process.log
        assert process.report["is newest"]
        assert process.report["said"].keys() == words.keys()
        for name, ((in_one, _), (in_all, _)) in process.report["said"].items():
            told = "" if number == count - 1 else f"OtherProcessError: process {count - 1} failed: "
            assert in_one.startswith(f"{told}{words[name]}"), in_one
            assert in_all.startswith(words[name]), in_all
        longest = max(secs for pair in process.report["said"].values() for _, secs in pair)
        assert longest < 20, "told, and not found out by waiting"


def test_a_run_that_process_0_cannot_look_at_is_an_error_in_all(nursery: Nursery, tmp_path: Path) -> None:
    """At every asking; nobody takes the answer to one for that to another, and all go on together afterwards."""
    for number, process in enumerate(nursery.run_group(together.look_that_fails, tmp_path, 2)):
        assert process.code == 0, process.log
        for text, secs in process.report["said"]:
            assert text.startswith("OtherProcessError: process 0 failed: " if number else "StorageError: "), text
            assert "Input/output error" in text
            assert secs < 20
        assert process.report["found"] == [True, False]


@pytest.mark.parametrize("count", [2, 4])
def test_a_directory_that_is_not_shared_is_found_out(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Also where there is one of the same name; the checkpoint is not committed, and nothing is left of it."""
    *others, last = nursery.run_group(together.not_shared, tmp_path, count)
    assert last.code == 0, last.log
    for text, _ in last.report["said"]:
        assert text.startswith("NotSharedError") and "primary_host=None" in text
    assert "has another content" in last.report["said"][1][0]
    for process in others:
        assert process.code == 0, process.log
        for text, secs in process.report["said"]:
            assert f"process {count - 1} failed: NotSharedError" in text
            assert secs < 20
        assert process.report["here"] == []


@pytest.mark.parametrize("count", [2, 4])
def test_too_little_space_for_what_all_write_is_found_before_anything_is_written(
    nursery: Nursery, tmp_path: Path, count: int
) -> None:
    """A shared disk has to have room for the sum, and the figures are named; one of its own only for its own part."""
    free_mib = 4 * count  # each writes 4 MiB, and some room has to be left
    ended = nursery.run_group(together.too_little_space, tmp_path, count, free_mib)
    words = rf"needs (\S+) bytes in {count} processes \(the most, (\S+), in process 0\) and (\S+) are free"
    for number, process in enumerate(ended):
        assert process.code == 0, process.log
        text, secs = process.report.pop("shared")
        assert text.startswith("OtherProcessError: process 0 failed: DiskFullError" if number else "DiskFullError")
        figures = re.search(words, text)
        assert figures, text
        needed, most, free = (int(figure.replace(",", "")) for figure in figures.groups())
        assert (needed >> 20, most >> 20, free) == (4 * count, 4, free_mib << 20)
        assert secs < 20
        assert process.report.pop("own")[0] == "nothing"
        assert process.report == {"shared left": [], "shared then": 2, "own left": ["1"], "own then": 2}


# ------------------------------------------------------------------ who does what


@pytest.mark.parametrize("count", [2, 4])
def test_each_file_is_synced_by_who_wrote_it(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """Every file of a save is durable, and no process syncs the data, the checksums or the iterator of another one.

    Nor does it check another one's iterator when it restores.
    """
    ended = nursery.run_group(together.synced_and_written, tmp_path, count)
    assert [process.code for process in ended] == [0] * count, [process.log for process in ended]
    synced = [set(process.report["synced"]) for process in ended]
    assert set(ended[0].report["present"]) <= set.union(*synced)
    for rank in range(count):
        table = "_ARRAY_CHECKSUMS" if rank == 0 else f"_ARRAY_CHECKSUMS.{rank}"
        state = f"process_{rank}-of-{count}.json"
        assert ended[rank].report["states checked"] == [state], "by a restore"
        for own in (f"params/d/{rank:032x}", f"params/{table}", f"data/{state}"):
            assert [own in some for some in synced] == [other == rank for other in range(count)], own


def test_one_process_verifies_what_several_have_saved(nursery: Nursery, tmp_path: Path) -> None:
    """That an iterator cannot go on in another number of processes is no damage, and that of any of them is found."""
    nursery.run_group(together.synced_and_written, tmp_path, 2)
    manager = CheckpointManager(tmp_path / "run")
    assert manager.verify(1) == []
    for process in range(2):
        state = tmp_path / "run" / "1" / "data" / f"process_{process}-of-2.json"
        with damage.flip_bit(state, 0):
            assert [state.name in problem for problem in manager.verify(1)] == [True]


def test_what_is_the_same_in_all_processes_is_written_once(nursery: Nursery, tmp_path: Path) -> None:
    """A process more adds two files to an item: its data and their checksums."""
    alone, four = (
        nursery.run_group(together.synced_and_written, tmp_path / str(count), count)[0].report for count in (1, 4)
    )
    new = [name for name in four["present"] if name not in alone["present"]]
    more = [name for name in new if not name.startswith("data/")]
    assert len(new) - len(more) == 4, "of the iterators"
    items = sorted({name.split("/")[0] for name in more})
    assert more == sorted(
        f"{item}/{name}"
        for item in items
        for rank in (1, 2, 3)
        for name in (f"_ARRAY_CHECKSUMS.{rank}", f"d/{rank:032x}")
    )


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_compresses_its_own_and_one_index_has_all(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """In the background too, and after a save that failed; Orbax restores it, and damage in any data file is found."""
    for number, process in enumerate(nursery.run_group(together.compressed, tmp_path, count)):
        assert process.code == 0, process.log
        failed, not_alike = process.report.pop("failed"), process.report.pop("not alike")
        assert "this disk failed" in failed and (number == count - 1 or f"process {count - 1} failed" in failed), failed
        assert not_alike.startswith("ProcessesDisagreeError") and "has params: compression" in not_alike, not_alike
        assert process.report == {"steps": [2, 3], "problems": [], "restored": True}
    item = tmp_path / "run" / "3" / "params"
    files = sorted((item / "d").iterdir())
    assert [int(file.name, 16) for file in files] == list(range(count))
    assert sum(file.stat().st_size for file in files) < 64 * 48 * 4 * 0.75
    kernel = np.arange(64 * 48, dtype=np.float32).reshape(64, 48) + 3
    target = {"kernel": np.zeros_like(kernel), "scale": np.zeros(8, np.float32)}
    theirs = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(item, args=ocp.args.StandardRestore(target))
    np.testing.assert_array_equal(theirs["kernel"], kernel)
    manager = CheckpointManager(tmp_path / "run")
    np.testing.assert_array_equal(manager.restore()["params"]["kernel"], kernel)
    for file in files:
        with damage.flip_bit(file, 100):
            assert any(file.name in problem for problem in manager.verify(3))


# ------------------------------------------------------------------ SIGKILL


@pytest.mark.parametrize(("count", "victim"), [(2, 1), (4, 3), (2, 0), (4, 0)])
def test_a_process_that_is_killed_in_a_save_is_named_and_the_run_goes_on(
    nursery: Nursery, tmp_path: Path, count: int, victim: int
) -> None:
    """Killed before staging, while writing, before the commit barrier or after the commit: the others fail in time,
    what was committed stays, and a restart resumes from it and clears up.
    """
    # JAX itself aborts those that are left when a heartbeat is missing: later than our barriers notice.
    patient = {"heartbeat_timeout_seconds": 60}
    newest = []
    for phase in together.PHASES:
        start_secs = time.monotonic()
        folder = tmp_path / phase
        ended = nursery.run_group(together.killed, folder, count, victim, phase, initialize=patient)
        assert time.monotonic() - start_secs < 30
        assert ended.pop(victim).code == -signal.SIGKILL
        for process in ended:
            if victim == 0 and process.code == -signal.SIGABRT:
                # The coordination service died with it, and JAX aborts who had it, unless they end first.
                assert "leader task was preempted/died/restarted" in process.log, process.log
                continue
            assert process.code == 0, process.log
            first, second = process.report
            text, secs = second if phase == "after the commit" else first
            assert ("runs in process 0" if victim == 0 else f"did not come: [{victim}]") in text, text
            assert secs < 15
        manager = CheckpointManager(folder / "run")
        # Retention is process 0's, which is alive to do it, or died before.
        is_committed = phase == "after the commit"
        assert manager.steps() == ([1] if not is_committed else [2] if victim else [1, 2])
        assert [manager.verify(step) for step in manager.steps()] == [[]] * len(manager.steps())
        newest.append([manager.latest_step(), True])
    for process in nursery.run_group(together.resumed, tmp_path, 2, together.PHASES):
        assert process.code == 0, process.log
        assert process.report == newest
    for phase in together.PHASES:
        assert all(name.isdigit() for name in os.listdir(tmp_path / phase / "run"))


# ------------------------------------------------------------------ storage of one's own, groups


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_may_have_storage_of_its_own(nursery: Nursery, tmp_path: Path, count: int) -> None:
    """primary_host=None: each directory has this process's shards alone, and all restore the newest step that all have.

    Its part verifies as whole, what it has not is no damage: no step is rejected because more was asked for.

    Such a process writes alone, so its arrays may be compressed.
    """
    ended = nursery.run_group(together.own_storage, tmp_path, count)
    for number, process in enumerate(ended):
        assert process.code == 0, process.log
        for asked in ("without a target", "in another mesh"):
            text = process.report.pop(asked)
            assert text.startswith("PartialCheckpointError") and "'kernel' lacks chunk" in text, text
            assert f"is the part of process {number}" in text
        assert process.report.pop("damaged", 1) == 1
        assert process.report == {
            "fresh": 0,
            "steps": [20, 30],
            "problems": [],
            "with a target": True,
            "restored": [True, 20],
            "again": [20, 30],
            "at 30": True,
            "afresh": 0,
            "then": [10],
        }
    sizes = [path.stat().st_size for path in tmp_path.glob("disk_*/run/10/params/d/*")]  # of a hook without compression
    assert len(sizes) == count
    assert max(sizes) < 64 * 48 * 4 / count + 4096


def test_a_first_save_that_not_all_have_committed_is_begun_afresh(nursery: Nursery, tmp_path: Path) -> None:
    """restore_or_init makes the first state in all processes; the log names the step, and not as one to go on with."""
    for number, process in enumerate(nursery.run_group(together.half_committed, tmp_path, 2)):
        assert process.code == 0, process.log
        assert process.report == {"is first": True, "start_step": 0, "steps": [10]}
        assert ("steps [10] of" in process.log) == (number == 0), process.log
        assert "init_from=" not in process.log


def test_groups_of_processes_save_runs_of_their_own(nursery: Nursery, tmp_path: Path) -> None:
    """active_processes: each half has its primary, counts its operations, and refuses what is not its own."""
    for number, process in enumerate(nursery.run_group(together.groups, tmp_path, 4)):
        assert process.code == 0, process.log
        outside, stranger = process.report.pop("outside"), process.report.pop("stranger")
        assert outside.startswith("UnsupportedLeafError: item 'w': parts of this array are only in processes"), outside
        assert f"process {number} is not one of active_processes" in stranger
        assert set(process.report.values()) == {True}, process.report
    assert sorted(os.listdir(tmp_path / "run_0")) == ["1", "2"]
    assert sorted(os.listdir(tmp_path / "run_2")) == ["1", "2", "3", "4", "5"]
    restored = CheckpointManager(tmp_path / "run_2").restore(items=("w", "seed"))
    assert restored["seed"] == 3
    assert (restored["w"].ravel() == np.arange(64.0) + 3 + 5).all()


# ------------------------------------------------------------------ preemption


@pytest.mark.parametrize(("count", "signal_name", "stride"), [(2, "SIGUSR1", 10), (4, "SIGTERM", 1)])
def test_a_preemption_is_told_to_all_at_the_same_poll(
    nursery: Nursery, tmp_path: Path, count: int, signal_name: str, stride: int
) -> None:
    """A loop of batches that all compute together is left by all or by none, also where steps are jumped over.

    JAX listens for SIGTERM; another signal is passed on to it.
    """
    ended = nursery.run_group(together.preempted_in_an_evaluation, tmp_path, count, signal_name, stride)
    step = ended[0].report["step"]
    for process in ended:
        assert process.code == 0, process.log
        assert process.report == {"step": step, "batches": ended[0].report["batches"], "code": 143, "steps": [step]}
    assert ended[0].report["batches"] >= 7


def test_a_preemption_is_told_to_every_hook(nursery: Nursery, tmp_path: Path) -> None:
    """Each of two saves its run, within a step of the other one, and at the same steps in all processes."""
    ended = nursery.run_group(together.preempted_with_two_hooks, tmp_path, 2)
    left = ended[0].report["left"]
    assert left.keys() == {"actor", "critic"}
    assert abs(left["actor"] - left["critic"]) <= 1
    for process in ended:
        assert process.code == 0, process.log
        assert process.report == {"left": left, "steps": {name: [step] for name, step in left.items()}}
