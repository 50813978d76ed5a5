"""Work in threads, which Ctrl-C, a fork or the end of the program may meet at any moment.

What waits here uses plain locks: Ctrl-C in the middle of `Thread.join` makes Python 3.11 take the thread for ended, and
in the middle of `Event.wait` it may leave a lock that nobody gives back.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable

__all__ = ["BackgroundTask", "run_parallel"]


class BackgroundTask:
    """One call in a thread of its own, which the interpreter waits for at its end.

    Exactly one side ends the task: its thread, or who was interrupted while he started it.

    Args:
      call: what to do; it raises nothing.
      name: of the thread.

    >>> done = []
    >>> task = BackgroundTask(lambda: done.append(1), "example")
    >>> task.start(on_interrupt=print)
    >>> task.wait()
    >>> done, task.is_running
    ([1], False)
    """

    def __init__(self, call: Callable[[], None], name: str) -> None:
        self._call, self._name = call, name
        self._process, self._thread = os.getpid(), 0
        self._claim = threading.Lock()  # taken by who ends it
        self._running = threading.Lock()  # held until it has ended
        self._has_ended = not self._running.acquire()

    def start(self, on_interrupt: Callable[[BaseException], object]) -> None:
        """Begins; where the call will never be made (Ctrl-C), `on_interrupt` is called and the error raised."""
        try:
            if not threading.main_thread().is_alive():
                raise RuntimeError("the interpreter is ending, and waits for no thread that starts now")
            threading.Thread(target=self._end_by, args=(self._call,), name=self._name).start()
        except RuntimeError:
            self._end_by(self._call)
        except BaseException as error:
            self._end_by(functools.partial(on_interrupt, error))  # unless the thread is there: nobody else can tell
            raise

    def _end_by(self, call: Callable[[], object]) -> None:
        if self._claim.acquire(blocking=False):
            self._thread = threading.get_ident()
            try:
                call()
            finally:
                self._has_ended = True
                self._running.release()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended; in a process that was forked meanwhile, where the thread is not, it has."""
        return not self._has_ended and self._process == os.getpid()

    def wait(self) -> None:
        """Until it has ended; not in its own thread."""
        if self.is_running and self._thread != threading.get_ident():
            with self._running:
                pass


def run_parallel(tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Runs the tasks on this thread and `num_threads - 1` others; raises the first error."""
    remaining = iter(tasks)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:
                errors.append(error)

    def work_until(done: threading.Event) -> None:
        work()
        done.set()

    ends = []
    for _ in range(num_threads - 1):
        end = threading.Event()
        try:
            threading.Thread(target=work_until, args=(end,), name="ckpt_hooks-io").start()
        except RuntimeError:  # the interpreter is ending: a save in flight commits all the same, more slowly
            break
        ends.append(end)
    work()
    for end in ends:
        while not end.is_set():  # not join(), which in Python 3.11 takes a thread for ended if Ctrl-C interrupts it
            try:
                end.wait()
            except BaseException as error:  # Ctrl-C: no thread may outlive the file that it writes to
                errors.append(error)
    if errors:
        raise errors[0]
