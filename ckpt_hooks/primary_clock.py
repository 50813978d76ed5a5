"""One clock for all processes: whether a time has come is the leader's to say, since clocks differ.

Every process asks at every step, in the same order. Most askings need no message: with each answer the leader says
how many more times nobody need ask, which is half of what its own pace leaves until then.
"""

from __future__ import annotations

import time

from ckpt_hooks import processes
from ckpt_hooks.errors import BarrierTimeoutError
from ckpt_hooks.processes import DEFAULT_BARRIER_TIMEOUT_SECS, MultiprocessingOptions

__all__ = ["PrimaryClock"]

_MOST_SKIPPED = 10_000


class PrimaryClock:
    """Answers for one hook; each process makes one at the same place of its program."""

    def __init__(self, options: MultiprocessingOptions) -> None:
        self._leads = processes.index() == options.leader()
        self._leader = options.leader()
        self._timeout_secs = options.barrier_timeout_secs or DEFAULT_BARRIER_TIMEOUT_SECS
        self._folder = f"ckpt_hooks/{options.key('clock')}.{options.group()}{processes.next_operation_id(options)}"
        self._num_asked = 0
        self._num_skipped = 0  # askings that still need no answer
        self._answered_at: tuple[int, float] | None = None  # (asking, seconds) of the answer before

    def has_come(self, due_secs: float) -> bool:
        """Whether the leader's `time.monotonic()` has reached its `due_secs`.

        Raises BarrierTimeoutError where the leader does not come to the same asking in time.
        """
        self._num_asked += 1
        if self._num_skipped:
            self._num_skipped -= 1
            return False
        key = f"{self._folder}/{self._num_asked}"
        if self._leads:
            answer = self._answer(due_secs)
            processes.publish(key, answer)
        else:
            found = processes.wait_for(key, self._timeout_secs)
            if found is None:
                raise BarrierTimeoutError(
                    f"{self._timeout_secs:g} s passed, and process {self._leader} has not said whether a checkpoint is "
                    "due (`every_secs`). Look at its log; every process has to call the hook at the same steps."
                )
            answer = found
        is_due, skipped = answer.split()
        self._num_skipped = int(skipped)
        return is_due == "due"

    def _answer(self, due_secs: float) -> str:
        now, before = time.monotonic(), self._answered_at
        self._answered_at = (self._num_asked, now)
        if now >= due_secs:
            self._answered_at = None  # the save that follows says nothing of the pace
            return "due 0"
        if before is None:
            return "early 0"
        pace_secs = (now - before[1]) / (self._num_asked - before[0])
        return f"early {min(_MOST_SKIPPED, int((due_secs - now) / max(pace_secs, 1e-6) / 2))}"

    def forget(self) -> None:
        """After a barrier that every process has passed since it last asked: nobody needs the answers any more."""
        if self._leads:
            processes.forget(self._folder)
