"""Barriers of one operation at which an error, a dispute or an absence is told to everybody, with who it was.

Each process leaves a line in the coordination service's store when it comes to a barrier; the primary alone reads
them, and answers all with one line: go on, or why not. So no process sends or reads more than two lines a barrier,
the primary reads one a process. An error needs no barrier of its own: it stands in the answer to the next one.

Nothing here uses a device, so that a background thread may wait while the main thread trains.
"""

from __future__ import annotations

import time
from typing import Self

from ckpt_hooks import events, processes
from ckpt_hooks.errors import BarrierTimeoutError, CheckpointError, OtherProcessError, ProcessesDisagreeError
from ckpt_hooks.processes import MultiprocessingOptions

__all__ = ["OperationBarriers", "Together", "barriers_of"]

_FIRST_PAUSE_SECS = 0.001
_LONGEST_PAUSE_SECS = 0.05
_GOES_ON, _FAILED, _DISAGREES, _IS_LATE = "go on", "failed", "disagrees", "late"
_GRACE_SECS = 5.0  # for the primary's answer to reach a process that began to wait before the primary did


def barriers_of(operation: int, options: MultiprocessingOptions, timeout_secs: float) -> OperationBarriers:
    """The barriers of the operation with this number, which every process counts alike."""
    return OperationBarriers(options.key(f"Checkpointer.{operation}"), options, timeout_secs)


class Together:
    """What all processes do at once, or the primary does for all, as a context.

    At its end every process has come and has made the same claim; an error inside is told to the others.

    Attributes:
      decides: whether this is the process that acts for all.
      claim: what every process has to find alike, for example the step that it restored.
    """

    def __init__(self, options: MultiprocessingOptions, timeout_secs: float, claim: str = "") -> None:
        self.decides = options.is_primary()
        self.claim = claim
        self._barriers = barriers_of(processes.next_operation_id(), options, timeout_secs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._barriers.fail(error)
        else:
            self._barriers.meet("together", self.claim)


class OperationBarriers:
    """The barriers of one save or restore; each process makes one, of the same key.

    Args:
      key: of the operation, the same in every process and in no other operation.
      options: which processes take part, and who is primary.
      timeout_secs: how long a barrier waits for the last process.
    """

    def __init__(self, key: str, options: MultiprocessingOptions, timeout_secs: float) -> None:
        self._key = f"ckpt_hooks/{key}"
        self._members = options.members()
        self._primary = options.primary_host
        self._timeout_secs = timeout_secs

    def meet(self, name: str, claim: str = "") -> None:
        """Waits until every process is here and has made the same claim.

        Raises:
          BarrierTimeoutError: (TimeoutError) names those that did not come.
          OtherProcessError: (RuntimeError) one of them has failed, and says why.
          ProcessesDisagreeError: (ValueError) names those whose claim is not the primary's.
        """
        start_secs = time.perf_counter()
        if self._primary is not None and len(self._members) > 1:
            if processes.index() == self._primary:
                self._answer(name, claim)
            else:
                self._ask(name, claim)
        events.record_duration_secs(events.BARRIER_SECS, time.perf_counter() - start_secs, key=f"{self._key}/{name}")

    def fail(self, error: BaseException) -> BaseException:
        """Tells the others, who wait at a barrier of this operation or will come to one; returns what failed first."""
        if self._primary is None or len(self._members) == 1:
            return error
        if isinstance(error, OtherProcessError | ProcessesDisagreeError | BarrierTimeoutError):
            return error  # they know: it came from the answer that all of them got
        end = processes.published(self._key + "/").get("end")
        if end is not None:  # this process was still writing when the primary removed what there was
            try:
                _raise(*end.split("\n", 1))
            except CheckpointError as first:
                return first
        line = f"process {processes.index()} failed: {type(error).__name__}: {error}"
        if processes.index() == self._primary:
            processes.publish(f"{self._key}/end", f"{_FAILED}\n{line}")
        else:
            processes.publish(f"{self._key}/failed/{processes.index()}", line)
        return error

    # -------------------------------------------------------------- the primary

    def _answer(self, name: str, claim: str) -> None:
        kind, text = self._gather(name, claim)
        processes.publish(f"{self._key}/answer/{name}", f"{kind}\n{text}")
        if kind != _GOES_ON:
            processes.publish(f"{self._key}/end", f"{kind}\n{text}")
        _raise(kind, text)

    def _gather(self, name: str, claim: str) -> tuple[str, str]:
        """What to answer: (kind, text)."""
        deadline, pause_secs = time.monotonic() + self._timeout_secs, _FIRST_PAUSE_SECS
        others = self._members - {processes.index()}
        while True:
            failures = processes.published(f"{self._key}/failed/")
            if failures:
                return _FAILED, "; ".join(failures.values())
            claims = {int(process): said for process, said in processes.published(f"{self._key}/at/{name}/").items()}
            if others <= claims.keys():
                disagreeing = sorted(process for process in others if claims[process] != claim)
                if not disagreeing:
                    return _GOES_ON, ""
                differing = "; ".join(f"process {process} has {claims[process]}" for process in disagreeing)
                return _DISAGREES, f"process {processes.index()} has {claim}, but {differing}"
            if time.monotonic() > deadline:
                return _IS_LATE, self._missing(name, sorted(others - claims.keys()))
            time.sleep(pause_secs)
            pause_secs = min(2 * pause_secs, _LONGEST_PAUSE_SECS)

    def _missing(self, name: str, absent: list[int]) -> str:
        return (
            f"{self._timeout_secs:g} s passed at barrier {name!r}, and of processes {sorted(self._members)} these did "
            f"not come: {absent}. Look at their logs; a slower start or a larger save needs a longer timeout."
        )

    # -------------------------------------------------------------- the others

    def _ask(self, name: str, claim: str) -> None:
        processes.publish(f"{self._key}/at/{name}/{processes.index()}", claim)
        deadline = time.monotonic() + self._timeout_secs + _GRACE_SECS
        pause_secs = _FIRST_PAUSE_SECS
        while time.monotonic() < deadline:
            # The call returns at once when the answer comes; now and then one looks whether there will be none.
            answer = processes.wait_for(f"{self._key}/answer/{name}", pause_secs)
            answer = answer or processes.published(self._key + "/").get("end")
            if answer is not None:
                kind, _, text = answer.partition("\n")
                _raise(kind, text)
                return
            pause_secs = min(2 * pause_secs + 0.02, 1.0)
        raise BarrierTimeoutError(self._missing(name, [self._primary or 0]))


def _raise(kind: str, text: str) -> None:
    if kind == _FAILED:
        raise OtherProcessError(f"{text}. Nothing was committed; what was committed before is untouched.")
    if kind == _DISAGREES:
        raise ProcessesDisagreeError(f"{text}. Nothing was written; give every process the same.")
    if kind == _IS_LATE:
        raise BarrierTimeoutError(text)
