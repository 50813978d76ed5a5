"""What becomes of an operation that one process fails, and when the coordination service of process 0 is gone."""

from __future__ import annotations

import logging

import jax
import pytest
from jax._src import distributed

from ckpt_hooks import MultiprocessingOptions, processes
from ckpt_hooks.agreement import OperationBarriers
from ckpt_hooks.errors import OtherProcessError


class GoneService:
    """A client that nobody answers, with JAX's error of this case."""

    def __getattr__(self, name: str) -> object:
        def unanswered(*arguments: object, **keywords: object) -> None:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer")

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

    def key_value_increment(self, key: str, by: int) -> int:
        self._lines[key] = str(int(self._lines.get(key, 0)) + by)
        return int(self._lines[key])


def test_who_fails_because_another_failed_first_reports_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was still writing when process 0 gave the save up fails too, but its failure is not the cause."""
    jax.devices()
    monkeypatch.setattr(distributed.global_state, "client", Service())
    options = MultiprocessingOptions(active_processes={0, 1, 2})
    of_process = [OperationBarriers(0, options) for _ in range(3)]

    def run_as(process: int) -> OperationBarriers:
        monkeypatch.setattr(processes, "index", lambda: process)
        return of_process[process]

    run_as(1).fail(OSError(28, "No space left on device"))
    with pytest.raises(OtherProcessError, match="No space left"):
        run_as(0).meet("save")
    reported = run_as(2).fail(FileNotFoundError(2, "the temporary directory is gone"))
    assert isinstance(reported, OtherProcessError)
    assert "process 1 failed: OSError: [Errno 28] No space left" in str(reported)
