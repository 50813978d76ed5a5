"""Has somebody asked us to stop? The only module that touches signals.

A first signal is noted and answered by the loop, at a step where the state is whole; nothing is saved inside the
signal handler. A second one ends the process at once.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError

__all__ = ["PreemptionNotice"]

_log = logging.getLogger(__name__)


class PreemptionNotice:
    """Listens for signals from its construction until `close`.

    Attributes:
      received: the number of the signal that came, 0 while none has; reading it costs nothing.
      received_secs: when it came, by `time.monotonic()`.
      is_open: whether it listens.

    Args:
      signals: to listen for.
      passes_on: whether each is sent again as SIGTERM, for which JAX's runtime listens, and is not answered here.
    """

    def __init__(self, signals: Iterable[signal.Signals | int], *, passes_on: bool = False) -> None:
        self.received = 0
        self.received_secs = 0.0
        self.passes_on = passes_on
        self.is_open = True
        numbers = [number for number in _check_signals(signals) if not (passes_on and number == signal.SIGTERM)]
        handler = _Handler(self)
        self._finalizer = weakref.finalize(self, handler.uninstall)
        _notices[next(_numbers)] = self
        if threading.current_thread() is not threading.main_thread():
            if numbers:
                _log.warning(
                    "preemption signals are not watched: Python allows that only in the main thread. "
                    "Create the hook there."
                )
            return
        for number in numbers:
            handler.previous[number] = signal.signal(number, handler)

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        self.is_open = False
        self._finalizer()


_numbers = itertools.count()
_notices: weakref.WeakValueDictionary[int, PreemptionNotice] = weakref.WeakValueDictionary()  # the newest last


def _close_in_child() -> None:
    # A forked data-loading worker has no loop that would answer: it has to die of the SIGTERM by which `terminate()`
    # and the end of the program stop it, or whoever joins it waits for ever.
    for notice in reversed(list(_notices.values())):
        notice.close()


os.register_at_fork(after_in_child=_close_in_child)


class _Handler:
    """What Python calls for a signal.

    It must not keep the notice alive, or a hook that is dropped would swallow signals for ever. It may outlive
    the notice where somebody else has put a handler of his own on top of it, and then only passes signals on.
    """

    def __init__(self, notice: PreemptionNotice) -> None:
        self._notice = weakref.ref(notice)
        self.previous: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        notice = self._notice()
        before = self.previous[number]
        if notice is None or not notice.is_open:
            if signal.getsignal(number) is self:
                _end_by(number, before)
                return
        elif notice.received:
            # The second signal. A handler of the user's has had the first one, and need not end the process.
            _end_by(number, before if before is signal.default_int_handler else signal.SIG_DFL)
            return
        elif notice.passes_on:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            notice.received, notice.received_secs = number, time.monotonic()
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # somebody else listens too

    def uninstall(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; until it does, signals are passed on
        for number, before in self.previous.items():
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_DFL if before is None else before)


def _end_by(number: int, handler: Any) -> None:
    """What happens on a signal when `handler` has it."""
    signal.signal(number, signal.SIG_DFL if handler is None else handler)
    os.kill(os.getpid(), number)


def _check_signals(signals: Iterable[signal.Signals | int]) -> list[int]:
    given: object = signals
    if isinstance(given, str) or not isinstance(given, Iterable):
        example = "signal.SIGTERM" if given is None else repr(given)
        raise InvalidArgumentTypeError(
            f"preemption_signals is a tuple, as in ({example},), or () for none; got {given!r}"
        )
    numbers = list(signals)
    for number in numbers:
        if number not in signal.valid_signals() or number in (signal.SIGKILL, signal.SIGSTOP):
            raise InvalidArgumentError(
                f"preemption_signals: {number!r} is no signal that a process can listen to; give some of the "
                "`signal` module, such as signal.SIGTERM"
            )
    return [int(number) for number in dict.fromkeys(numbers)]  # named twice, the first signal would be the second
