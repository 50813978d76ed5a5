"""What becomes of an operation that one process fails, and when the coordination service of process 0 is gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import jax
import pytest
from jax._src import distributed

from ckpt_hooks import MultiprocessingOptions, agreement, processes
from ckpt_hooks.agreement import OperationBarriers
from ckpt_hooks.errors import BarrierTimeoutError, OtherProcessError


class GoneService:
    """A client that nobody answers, with JAX's error of this case, or with another one."""

    def __init__(self, says: str = "UNAVAILABLE: recvmsg:Connection reset by peer") -> None:
        self._says = says

    def __getattr__(self, name: str) -> object:
        def unanswered(*arguments: object, **keywords: object) -> None:
            raise jax.errors.JaxRuntimeError(self._says)

        return unanswered


@pytest.fixture
def barriers(monkeypatch: pytest.MonkeyPatch) -> OperationBarriers:
    """Of a save by two processes, one of which has just died."""
    options = MultiprocessingOptions(active_processes={0, 1}, barrier_timeout_secs=1)
    jax.devices()  # started with this client, a backend would wait for others
    monkeypatch.setattr(distributed.global_state, "client", GoneService())
    return OperationBarriers(0, options)


def test_a_barrier_says_which_process_to_look_at(barriers: OperationBarriers) -> None:
    """JAX's own words name neither the process nor what to do."""
    with pytest.raises(OtherProcessError, match="look at its log"):
        barriers.meet("staged")


def test_a_failure_that_cannot_be_told_keeps_its_own_reason(barriers: OperationBarriers) -> None:
    """The others are dead already; what is wrong here is what the user has to read."""
    disk_full = OSError(28, "No space left on device")
    assert barriers.fail(disk_full) is disk_full


def test_a_service_that_fails_hides_no_failure(barriers: OperationBarriers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers to who wants to tell the others of one, or to leave."""
    monkeypatch.setattr(distributed.global_state, "client", GoneService("INTERNAL: RPC failed"))
    disk_full = OSError(28, "No space left on device")
    assert barriers.fail(disk_full) is disk_full


def test_what_has_been_committed_stays_a_success(barriers: OperationBarriers, caplog: pytest.LogCaptureFixture) -> None:
    """After the commit only lines in the service are left to be removed, which went with it."""
    with caplog.at_level(logging.WARNING):
        barriers.leave()
    assert "It runs in process 0" in caplog.text


class Service:
    """A client that keeps the lines of all processes in memory."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self._lines[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self._lines.items() if key.startswith(folder)]

    def key_value_try_get(self, key: str) -> str:
        if key not in self._lines:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self._lines[key]

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        if key not in self._lines:
            time.sleep(timeout_ms / 1000)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self._lines[key]

    def key_value_increment(self, key: str, by: int) -> int:
        self._lines[key] = str(int(self._lines.get(key, 0)) + by)
        return int(self._lines[key])


@pytest.fixture
def run_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], OperationBarriers]:
    """Makes this process one of three that save, of which process 0 leads; returns its barriers."""
    jax.devices()
    monkeypatch.setattr(distributed.global_state, "client", Service())
    options = MultiprocessingOptions(active_processes={0, 1, 2}, barrier_timeout_secs=0.2)
    of_process = [OperationBarriers(0, options) for _ in range(3)]

    def run_as(process: int) -> OperationBarriers:
        monkeypatch.setattr(processes, "index", lambda: process)
        return of_process[process]

    return run_as


def test_who_fails_because_another_failed_first_reports_the_first(run_as: Callable[[int], OperationBarriers]) -> None:
    """A process that was still writing when process 0 gave the save up fails too, but its failure is not the cause."""
    run_as(1).fail(OSError(28, "No space left on device"))
    with pytest.raises(OtherProcessError, match="No space left"):
        run_as(0).meet("save")
    reported = run_as(2).fail(FileNotFoundError(2, "the temporary directory is gone"))
    assert isinstance(reported, OtherProcessError)
    assert "process 1 failed: OSError: [Errno 28] No space left" in str(reported)


def test_who_gives_up_waiting_for_the_leader_tells_the_others(
    run_as: Callable[[int], OperationBarriers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for it too, and the leader when it comes: at once, with who gave up and who was missing."""
    monkeypatch.setattr(agreement, "_GRACE_SECS", 0.0)
    with pytest.raises(BarrierTimeoutError, match=r"did not come: \[0\]") as raised:
        run_as(1).meet("save")
    assert run_as(1).fail(raised.value) is raised.value
    for process in (2, 0):
        with pytest.raises(OtherProcessError, match=r"^process 1 failed: BarrierTimeoutError: .*'save'.*come: \[0\]"):
            run_as(process).meet("save")
