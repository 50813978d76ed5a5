"""One function in one forked process: it may be killed, hang or crash, and what it said before that is known."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Outcome", "Tell", "in_fork"]

Tell = Callable[..., None]  # of what is known by now, as keywords of JSON


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a forked function ended.

    Attributes:
      told: what it told, in order.
      killed: whether a SIGKILL ended it.
      problem: why it did not come to its end in another way ("hung", an exception's traceback); "" if it did.
      stderr: what it printed there.
    """

    told: list[dict[str, Any]]
    killed: bool
    problem: str
    stderr: str

    def last(self, name: str, default: Any = None) -> Any:
        """The last value told under this name."""
        return next((facts[name] for facts in reversed(self.told) if name in facts), default)

    def all(self, name: str) -> list[Any]:
        """Every value told under this name, in order."""
        return [facts[name] for facts in self.told if name in facts]


def in_fork(function: Callable[[Tell], None], *, timeout_secs: float = 60.0) -> Outcome:
    """Runs `function(tell)` in a forked process, which ends right after it, without atexit and without threads' ends.

    This process must have no other thread.
    """
    reading, writing = os.pipe()
    stderr = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        _run_and_exit(function, writing, stderr)
    os.close(writing)
    deadline_secs = time.monotonic() + timeout_secs
    told, is_late = _read_until_end(reading, deadline_secs)
    if is_late:
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = os.pread(stderr, 1 << 20, 0).decode(errors="replace")
    os.close(stderr)
    # Of the last line a kill may have left a part.
    facts = [json.loads(line) for line in told.split(b"\n")[:-1]]
    problem = f"hung for {timeout_secs:.0f} s" if is_late else ""
    if not is_late and status not in (0, -signal.SIGKILL):
        problem = f"ended with {status}: {text[-3000:]}"
    return Outcome(facts, status == -signal.SIGKILL and not is_late, problem, text)


def _run_and_exit(function: Callable[[Tell], None], writing: int, stderr: int) -> None:
    code = 1
    try:
        os.dup2(stderr, 2)

        def tell(**facts: Any) -> None:
            os.write(writing, json.dumps(facts).encode() + b"\n")

        function(tell)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _read_until_end(reading: int, deadline_secs: float) -> tuple[bytes, bool]:
    """(what was written, whether the deadline came first)."""
    received = b""
    while True:
        left_secs = deadline_secs - time.monotonic()
        if left_secs <= 0 or not select.select([reading], [], [], left_secs)[0]:
            return received, True
        part = os.read(reading, 1 << 16)
        if not part:
            return received, False
        received += part
