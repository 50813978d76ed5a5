"""A run has one writer, however its directory, its processes and its threads come and go."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import jax.monitoring
import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import BestN, CheckpointManager, LatestN
from ckpt_hooks.errors import CheckpointNotFoundError, RunLockedError
from ckpt_hooks.metadata import StepMetadata
from ckpt_hooks.run import RunDirectory
from ckpt_hooks.storage import commit
from ckpt_hooks.threads import BackgroundTask
from tests.faulty import fail

STATE = {"w": np.arange(3.0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def open_run(run: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager(run, **{"async_save": False, **options})


# ------------------------------------------------------------------ directories


@pytest.mark.parametrize("go_away", [shutil.rmtree, lambda run: run.rename(run.with_name("old"))])
def test_who_has_lost_his_run_locks_the_next_one(run: Path, go_away: Any) -> None:
    """Where a run is removed or renamed under a writer, his next save begins it anew, and he is its one writer."""
    with open_run(run) as first, open_run(run) as second:
        first.save(5, STATE)
        go_away(run)
        first.save(6, STATE)
        assert first.steps() == [6]
        with pytest.raises(RunLockedError):
            second.save(7, STATE)


def test_who_has_lost_his_run_does_not_write_into_anothers(run: Path) -> None:
    """A forgotten process whose run was removed is refused where somebody else has begun anew in its place."""
    with open_run(run) as forgotten, open_run(run) as new:
        forgotten.save(5000, STATE)
        shutil.rmtree(run)
        new.save(1, STATE)
        with pytest.raises(RunLockedError, match="this process is writing here"):
            forgotten.save(5001, STATE)
        assert new.steps() == [1]


def test_a_lock_on_a_directory_that_was_replaced_meanwhile_is_none(tmp_path: Path) -> None:
    """Who had it may have put another directory there between the moment it was opened and locked."""
    held = commit.DirectoryLock(os.fspath(tmp_path))
    assert held.is_of(os.fspath(tmp_path))
    tmp_path.rename(tmp_path.with_name("aside"))
    assert not held.is_of(os.fspath(tmp_path))
    tmp_path.mkdir()
    assert not held.is_of(os.fspath(tmp_path))
    assert held.is_of(os.fspath(tmp_path.with_name("aside")))
    held.release()
    assert not held.is_of(os.fspath(tmp_path.with_name("aside")))


def test_a_lock_that_comes_after_a_replacement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, somebody else has put another directory there: its one writer is not this one."""
    flock = fcntl.flock

    def replaced_first(descriptor: int, operation: int) -> None:
        (tmp_path / "run").rename(tmp_path / "aside")
        (tmp_path / "run").mkdir()
        flock(descriptor, operation)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(fcntl, "flock", replaced_first)
    with pytest.raises(RunLockedError, match="another writer is writing here"):
        commit.DirectoryLock(os.fspath(tmp_path / "run"))


def test_a_disk_that_fails_while_a_lock_is_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not taken for a file system without locks, and the directory is free, also while the error is kept."""
    with monkeypatch.context() as patch:
        fail(patch, os.path, "samestat", errno.EIO)
        with pytest.raises(OSError, match="Input/output error") as kept:
            commit.DirectoryLock(os.fspath(tmp_path))
    commit.DirectoryLock(os.fspath(tmp_path)).release()
    assert kept.value.errno == errno.EIO and not caplog.records


def test_what_others_recorded_before_the_lock_counts(run: Path) -> None:
    """A manager that looked at the metrics before it became the writer does not choose by what it saw then."""
    keep = [LatestN(1), BestN(1, "loss")]
    with open_run(run, keep=None) as other:
        for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
            other.save(step, STATE, metrics={"loss": loss})
        trainer = open_run(run, keep=keep)
        assert trainer.best_step() == 30
        other.record_metrics(10, {"loss": 0.5})
    with trainer:
        trainer.save(40, STATE, metrics={"loss": 4.0})
        assert trainer.steps() == [10, 40]


def test_a_leftover_that_cannot_be_looked_at_is_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's temporary directory, which nobody here may open, does not stop the run."""
    leftover = run / "7.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    lock = commit.DirectoryLock

    def forbidden(path: str) -> commit.DirectoryLock:
        if path == os.fspath(leftover):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return lock(path)

    monkeypatch.setattr(commit, "DirectoryLock", forbidden)
    with open_run(run) as manager:
        manager.save(8, STATE)
        assert manager.steps() == [8]
    assert leftover.is_dir()


# ------------------------------------------------------------------ processes

FORKING = """
import os, sys, numpy as np
from ckpt_hooks import CheckpointManager

with CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, {"w": np.zeros(3)})
    child = os.fork()
    if not child:
        try:
            manager.wait()
            manager.save(2, {"w": np.zeros(3)})
        except BlockingIOError as error:
            print("refused", flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    manager.wait()
    print(manager.steps(), flush=True)
"""


# The fork comes while a thread of the parent, which the child does not have, is about to record metrics.
FORKING_BESIDE_A_THREAD = FORKING.replace(
    "    child = os.fork()",
    """
    import threading
    lock, begun, over = manager._run.lock, threading.Event(), threading.Event()
    manager.wait()
    manager._run.lock = lambda: (begun.set(), over.wait(), lock())
    recording = threading.Thread(target=manager.record_metrics, args=(1, {"loss": 1.0}))
    recording.start()
    begun.wait()
    manager._run.lock = lock
    child = os.fork()""",
).replace("    manager.wait()\n    print", "    over.set()\n    recording.join()\n    print")


@pytest.mark.parametrize("program", [FORKING, FORKING_BESIDE_A_THREAD], ids=["while it saves", "beside a thread"])
def test_a_forked_process_is_another_writer(run: Path, program: str) -> None:
    """A child neither waits for what only its parent does, nor writes to the run that its parent has locked."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ckpt_hooks.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(run)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines() == ["refused", "[1]"], found.stderr


# ------------------------------------------------------------------ threads


def test_metrics_are_recorded_by_several_threads(run: Path) -> None:
    """Each thread's metrics of one step arrive, and the checkpoint stays whole."""
    with open_run(run, keep=None) as manager:
        manager.save(1, STATE)
        failures: list[BaseException] = []

        def record(number: int) -> None:
            try:
                for value in range(5):
                    manager.record_metrics(1, {f"metric_{number}": value})
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=record, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert manager.metadata(1).metrics == {"metric_0": 4, "metric_1": 4, "metric_2": 4}
        assert manager.verify(1) == []


def test_an_evaluation_records_while_the_loop_saves(run: Path) -> None:
    """Metrics that a thread records late make nothing half of a step, and of one that is gone say so."""
    keep = [LatestN(2), BestN(2, "accuracy", mode="max")]
    with open_run(run, keep=keep, async_save=True) as manager:
        manager.save(1, STATE, metrics={"accuracy": 0})
        failures: list[BaseException] = []
        is_over = threading.Event()

        def evaluate() -> None:
            while not is_over.is_set():
                try:
                    step = manager.latest_step() or 1
                    manager.record_metrics(step, {"accuracy": step % 7})
                except CheckpointNotFoundError:  # retention was first
                    continue
                except BaseException as error:
                    failures.append(error)

        thread = threading.Thread(target=evaluate)
        thread.start()
        for step in range(2, 60):
            manager.save(step, STATE)
        manager.wait()
        is_over.set()
        thread.join()
        assert not failures
        assert [problem for step in manager.steps() for problem in manager.verify(step)] == []


def test_who_listens_to_a_save_may_record_its_metrics(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener to the events of a save in the background changes the run while the loop waits to save again."""
    with open_run(run, keep=None, async_save=True) as manager:
        failures: list[BaseException] = []
        is_waiting = threading.Event()

        def wait_and_tell() -> None:
            is_waiting.set()
            CheckpointManager.wait(manager)

        def evaluate(event: str, **kwargs: str | int) -> None:
            if event.endswith("write/success") and threading.current_thread() is not threading.main_thread():
                try:
                    is_waiting.wait(60)
                    manager.record_metrics(manager.latest_step() or 0, {"accuracy": 1.0})
                except BaseException as error:
                    failures.append(error)

        jax.monitoring.register_event_listener(evaluate)
        try:
            manager.save(1, STATE)
            monkeypatch.setattr(manager, "wait", wait_and_tell)
            manager.save(2, STATE)
            manager.wait()
        finally:
            jax.monitoring.unregister_event_listener(evaluate)
        assert not failures
        assert [manager.metadata(step).metrics for step in (1, 2)] == [{"accuracy": 1.0}] * 2


def test_closing_waits_for_metrics_that_a_thread_records(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stays locked until they stand in the checkpoint."""
    replace_file, has_begun, may_go_on = commit.replace_file, threading.Event(), threading.Event()

    def replace_late(*args: Any, **options: Any) -> None:
        has_begun.set()
        may_go_on.wait(60)
        replace_file(*args, **options)

    manager = open_run(run)
    manager.save(1, STATE)
    monkeypatch.setattr(commit, "replace_file", replace_late)
    recording = threading.Thread(target=manager.record_metrics, args=(1, {"loss": 1.0}))
    closing = threading.Thread(target=manager.close)
    recording.start()
    assert has_begun.wait(60)
    closing.start()
    closing.join(0.2)
    with open_run(run) as other, pytest.raises(RunLockedError):
        other.save(2, STATE)
    may_go_on.set()
    closing.join(60)
    with open_run(run) as other:
        other.save(2, STATE)
        assert other.metadata(1).metrics == {"loss": 1.0}


def test_metrics_that_are_read_hide_none_that_are_recorded_meanwhile(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread records while another one looks at the same step is still there after the next ones."""
    metadata = RunDirectory.metadata

    def overtaken(self: RunDirectory, step: int) -> StepMetadata:
        found = metadata(self, step)
        monkeypatch.undo()
        manager.record_metrics(1, {"accuracy": 0.5})
        return found

    with open_run(run) as before:
        before.save(1, STATE, metrics={"loss": 1.0})
        before.save(2, STATE, metrics={"loss": 2.0})
    with open_run(run) as manager:
        manager.record_metrics(2, {"accuracy": 0.25})
        monkeypatch.setattr(RunDirectory, "metadata", overtaken)
        assert manager.best_step("loss") == 1
        manager.record_metrics(1, {"recall": 0.25})
        assert manager.metadata(1).metrics == {"loss": 1.0, "accuracy": 0.5, "recall": 0.25}


@pytest.mark.parametrize(
    ("moment", "name"),
    [("call", "start"), ("c_return", "start_new_thread")],
    ids=["before its thread is made", "before its thread has run"],
)
def test_ctrl_c_as_a_save_begins_costs_that_save_alone(run: Path, moment: str, name: str) -> None:
    """One save is given up, nobody waits for it, and the later ones are whole."""

    def interrupt(frame: FrameType, event: str, argument: Any) -> None:
        if event == moment and getattr(argument, "__name__", frame.f_code.co_name) == name:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with open_run(run, keep=None, async_save=True) as manager:
        manager.save(1, STATE)
        manager.wait()
        sys.setprofile(interrupt)
        with pytest.raises(KeyboardInterrupt):
            manager.save(2, STATE)
        for step in range(3, 12):
            manager.save(step, STATE)
        manager.wait()
        assert manager.steps() in ([1, *range(3, 12)], [*range(1, 12)])
        assert [problem for step in manager.steps() for problem in manager.verify(step)] == []
        assert [name for name in os.listdir(run) if not name.isdigit()] == []


def test_ctrl_c_while_closing_leaves_the_run_locked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the save goes on, nobody else may write; closing once more waits for it."""
    publish, may_end = commit.publish, threading.Event()

    def publish_late(*args: Any, **options: Any) -> None:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        may_end.wait(60)
        publish(*args, **options)

    monkeypatch.setattr(commit, "publish", publish_late)
    manager, other = open_run(run, async_save=True), open_run(run)

    def save_and_close() -> None:
        manager.save(1, STATE)
        manager.close()
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):  # wherever the main thread is by then
        save_and_close()
    with pytest.raises(RunLockedError):
        other.save(2, STATE)
    may_end.set()
    manager.close()
    other.save(2, STATE)
    assert other.steps() == [1, 2]


def test_what_has_ended_holds_nothing_of_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """When `wait` returns, the thread may still be there; a manager that is dropped then leaves no run locked."""
    told, task = threading.Event(), BackgroundTask("example")

    class Lock:
        def release(self) -> None:
            running.release()
            told.wait(10)  # the thread is held up right after it has told that the task has ended

        def __enter__(self) -> None:
            running.acquire()

        def __exit__(self, *error: object) -> None:
            running.release()

    running = task._running
    monkeypatch.setattr(task, "_running", Lock())
    state = np.zeros(3)
    held = weakref.ref(state)
    task.start(functools.partial(np.sum, state))
    del state
    task.wait()
    assert held() is None
    told.set()
