"""Has somebody asked us to stop? The only module that touches signals.

A first signal is noted and answered by the loop, at a step where the state is whole; nothing is saved inside the
signal handler. A second one ends the process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

__all__ = ["PreemptionNotice"]

_log = logging.getLogger(__name__)


class PreemptionNotice:
    """Listens for signals from its construction until `close`.

    Attributes:
      received: the number of the signal that came, 0 while none has; reading it costs nothing.
    """

    def __init__(self, signals: Iterable[signal.Signals | int]) -> None:
        self.received = 0
        previous: dict[int, Any] = {}
        self._finalizer = weakref.finalize(self, _restore_handlers, previous)
        if threading.current_thread() is not threading.main_thread():
            _log.warning(
                "preemption signals are not watched: Python allows that only in the main thread. Create the hook there."
            )
            return
        # The handler must not keep the notice alive, or a hook that is dropped would swallow signals for ever.
        reference = weakref.ref(self)

        def handle(number: int, frame: FrameType | None) -> None:
            notice = reference()
            if notice is None or notice.received:
                _give_up(number, previous)
                return
            notice.received = number
            before = previous.get(number)
            if callable(before) and before is not signal.default_int_handler:
                before(number, frame)  # somebody else listens too

        for number in signals:
            previous[int(number)] = signal.signal(number, handle)

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        self._finalizer()


def _give_up(number: int, previous: dict[int, Any]) -> None:
    """The second signal: what would have happened had nobody listened."""
    _restore_handlers(previous)
    if signal.getsignal(number) in (signal.SIG_IGN, None):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _restore_handlers(previous: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, handler in previous.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    previous.clear()
