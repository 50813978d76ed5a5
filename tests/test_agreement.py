"""What becomes of an operation when the coordination service, which runs in process 0, is gone."""

from __future__ import annotations

import logging

import jax
import pytest
from jax._src import distributed

from ckpt_hooks import MultiprocessingOptions
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
