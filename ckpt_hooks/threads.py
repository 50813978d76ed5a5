"""Work in threads, which Ctrl-C, a fork or the end of the program may meet at any moment.

What waits here uses plain locks: Ctrl-C in the middle of `Thread.join` makes Python 3.11 take the thread for ended, and
in the middle of `Event.wait` it may leave a lock that nobody gives back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

__all__ = ["BackgroundTask", "run_parallel"]


class BackgroundTask:
    """One call in a thread of its own, which the interpreter waits for at its end.

    Exactly one side ends the task: its thread, or who was interrupted while he started it.

    Args:
      name: of the thread.

    Attributes:
      thread: the number of the one that makes the call, 0 before.

    >>> done = []
    >>> task = BackgroundTask("example")
    >>> task.start(lambda: done.append(1))
    >>> task.wait()
    >>> done, task.is_running
    ([1], False)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process, self.thread = os.getpid(), 0
        self._claim = threading.Lock()  # taken by who ends it
        self._running = threading.Lock()  # held until it has ended
        self._running.acquire()
        self._has_ended = False

    def start(self, call: Callable[[], None]) -> None:
        """Begins the call, which raises nothing; whatever is raised here (Ctrl-C), `end_by` has to follow."""
        try:
            if not threading.main_thread().is_alive():
                raise RuntimeError("the interpreter is ending, and waits for no thread that starts now")
            threading.Thread(target=self._end, args=([call],), name=self._name).start()
        except RuntimeError:
            self.end_by(call)

    def end_by(self, call: Callable[[], object]) -> None:
        """Makes a call here and now, which ends the task, unless its thread is at work already."""
        self._end([call])

    def _end(self, calls: list[Callable[[], object]]) -> None:
        if self._claim.acquire(blocking=False):
            self.thread = threading.get_ident()
            try:
                calls.pop()()  # so that nothing holds what was called, as a run that it has locked, when `wait` returns
            finally:
                self._has_ended = True
                self._running.release()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended; in a process that was forked meanwhile, where the thread is not, it has."""
        return not self._has_ended and self._process == os.getpid()

    def wait(self) -> None:
        """Until it has ended; not in its own thread."""
        if self.is_running and self.thread != threading.get_ident():
            with self._running:
                pass


def run_parallel(tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Runs the tasks on this thread and `num_threads - 1` others; when all have ended, raises the first error."""
    remaining = iter(tasks)
    taking = threading.Lock()
    at_work = [threading.Lock() for _ in range(num_threads - 1)]  # each is held by a thread while it works
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with taking:
                    task = next(remaining, None)
                if task is None:
                    return
                task()
        except BaseException as error:  # of a task, or of what makes them
            errors.append(error)

    def work_holding(lock: threading.Lock) -> None:
        with lock:  # who gets it late finds no task left, or an error
            work()

    def work_with_others() -> None:
        for lock in at_work:
            try:  # a daemon: one that Ctrl-C in start() has stopped for ever must not keep the interpreter from ending
                threading.Thread(target=work_holding, args=(lock,), name="ckpt_hooks-io", daemon=True).start()
            except RuntimeError:  # the interpreter is ending: a save in flight commits all the same, more slowly
                break
        work()

    is_over = False
    while not is_over:
        try:
            if not errors:
                work_with_others()
            for lock in at_work:
                with lock:
                    pass
            is_over = True
        except BaseException as error:  # Ctrl-C, anywhere: no thread may outlive the file that it writes to
            errors.append(error)
    if errors:
        raise errors[0]
