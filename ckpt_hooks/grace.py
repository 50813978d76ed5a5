"""Does a save fit into the time between the signal that asks a process to stop and its end?"""

from __future__ import annotations

import logging
import math
import numbers
import time
from collections.abc import Callable

from ckpt_hooks.errors import InvalidArgumentError

__all__ = ["GracePeriod"]

_WORSE_FACTOR = 1.25  # a warning is repeated only where the figure has become so much worse

_log = logging.getLogger(__name__)


class GracePeriod:
    """What the scheduler grants, compared with what saves take, as soon as that is known.

    Args:
      grace_secs: between the signal and the end of the process.

    Raises InvalidArgumentError for what is not a positive number of seconds.
    """

    def __init__(self, grace_secs: float) -> None:
        given: object = grace_secs
        if isinstance(given, bool) or not isinstance(given, numbers.Real) or not 0 < float(given) < math.inf:
            raise InvalidArgumentError(
                f"grace_secs is how many seconds pass from the signal to the end of the process; got {grace_secs!r}"
            )
        self._grace_secs = float(given)
        self._warned_secs = 0.0
        self._before: tuple[int, float] | None = None  # (step, seconds) of the call before

    def check(self, step: int, save_secs: float) -> None:
        """Warns where a save that took `save_secs` would not have fitted, after the step during which the signal comes.

        Args:
          step: at which a save begins; the pace of the loop is measured from one to the next.
          save_secs: of the last save, from the call to the commit; 0 where none has ended yet.
        """
        now, before, step_secs = time.monotonic(), self._before, 0.0
        self._before = (step, now)
        if before is not None and step > before[0]:
            step_secs = (now - before[1]) / (step - before[0])
        needed_secs = step_secs + save_secs
        if save_secs and needed_secs > max(self._grace_secs, self._warned_secs * _WORSE_FACTOR):
            self._warned_secs = needed_secs
            _log.warning(
                "a preemption would lose steps: the last save took %.1f s and a step takes %.1f s, and grace_secs=%g. "
                "Ask the scheduler for more time (docs/cluster.md), save a smaller state, or save more often.",
                save_secs,
                step_secs,
                self._grace_secs,
            )

    def begin_last_save(
        self, step: int, save_secs: float, signal_secs: float, newest_step: Callable[[], object]
    ) -> None:
        """Warns where what is left of the period is less than the last save took.

        Args:
          step: that is saved before leaving.
          save_secs: of the last save.
          signal_secs: when the signal came, by `time.monotonic()`; 0 where it is not known (another process got it).
          newest_step: says what a restart would find if this save does not end.
        """
        left_secs = self._grace_secs - (time.monotonic() - signal_secs if signal_secs else 0.0)
        if save_secs > left_secs:
            _log.warning(
                "step %d is being saved, perhaps not in time: the last save took %.1f s, and of grace_secs=%g there is "
                "%.1f s left. If the process is killed before, the run goes on from step %s.",
                step,
                save_secs,
                self._grace_secs,
                max(0.0, left_secs),
                newest_step(),
            )
