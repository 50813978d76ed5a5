"""The shim of `shim.c`: compiled, preloaded, and told where to strike.

A preloaded library counts over all threads, needs no privilege and costs nothing between strikes; strace counts by
thread and takes a process along. It needs a C compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["CHANGES", "FOR_EVER", "READS", "WRITES", "ShimUnavailable", "Strike", "Struck", "armed", "rerun", "why_not"]

CHANGES, WRITES, READS = 1, 2, 4  # which calls count; the numbers are those of shim.c
_ACTIONS = {"count": 0, "kill": 1, "kill halfway": 2, "fail": 3, "shorten": 4}
FOR_EVER = 1 << 40
_SOURCE = Path(__file__).with_suffix(".c")
_VARIABLE = "CKPT_HOOKS_ATTACK_SHIM"  # where the preloaded shim is


class ShimUnavailable(SystemExit):
    """This machine cannot compile or preload the shim; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Strike:
    """What happens at which system call.

    Attributes:
      action: "count" (nothing), "kill" before the call, "kill halfway" through a write, "fail", or "shorten" a write
        to its half.
      at: the first call that is struck, counted from 1 over all threads, of those in `scope`.
      times: how many calls in a row are.
      error: the errno of "fail".
      scope: `CHANGES` (whatever changes a file or a name), `WRITES` (of them, those that carry data), or `READS`.
      jitter_usecs: each counted call waits up to this long before, so that threads overtake each other.
      seed: of that waiting.
    """

    action: str = "count"
    at: int = 1
    times: int = 1
    error: int = 0
    scope: int = CHANGES
    jitter_usecs: int = 0
    seed: int = 0

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error else self.action
        often = {1: "", FOR_EVER: " and for ever"}.get(self.times, f", {self.times} times")
        return f"{what} at call {self.at}{often}" + (f" (seed {self.seed})" if self.jitter_usecs else "")


@dataclasses.dataclass
class Struck:
    """What the shim saw.

    Attributes:
      calls: each counted call, as "name path", the path below the directory.
      struck: those of them that were struck.
    """

    calls: list[str] = dataclasses.field(default_factory=list)
    struck: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def armed(directory: str, strike: Strike) -> Iterator[Struck]:
    """Counts and strikes, in this process, calls below `directory`, which must be a real path without links."""
    library = _library()
    seen = Struck()
    library.shim_arm(
        os.fsencode(directory),
        *(strike.scope, _ACTIONS[strike.action], strike.at, strike.times),
        *(strike.error, strike.jitter_usecs, strike.seed),
    )
    try:
        yield seen
    finally:
        library.shim_disarm()
        seen.calls = [_call(library, n + 1) for n in range(library.shim_calls())]
        seen.struck = [_call(library, library.shim_struck_call(n)) for n in range(min(library.shim_struck(), 16))]


def _call(library: ctypes.CDLL, number: int) -> str:
    text: bytes = library.shim_call(number)
    return text.decode(errors="replace")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ[_VARIABLE])
    library.shim_arm.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long),
        *(ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
    ]
    library.shim_call.restype = ctypes.c_char_p
    library.shim_call.argtypes = library.shim_struck_call.argtypes = [ctypes.c_long]
    for count in (library.shim_calls, library.shim_struck, library.shim_struck_call):
        count.restype = ctypes.c_long
    return library


# ------------------------------------------------------------------ making it, and starting under it


def why_not() -> str:
    """Why the shim cannot be used on this machine; "" where it can."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return "attacks at system calls need 64-bit Linux"
    if _compiler() is None:
        return "attacks at system calls need a C compiler: install gcc (apt install gcc libc6-dev), or set CC"
    return ""


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def rerun(module: str, arguments: Sequence[str]) -> int | None:
    """Runs ``python -m module`` again under the shim and returns its exit code; None where this process is that one.

    Raises ShimUnavailable, which says what is missing.
    """
    if os.environ.get(_VARIABLE):
        return None
    reason = why_not()
    if reason:
        raise ShimUnavailable(reason)
    with tempfile.TemporaryDirectory(prefix="attack-shim-") as folder:
        shim = os.path.join(folder, "shim.so")
        command = [str(_compiler()), "-O2", "-shared", "-fPIC", "-o", shim, str(_SOURCE), "-ldl"]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode != 0:
            raise ShimUnavailable(f"{' '.join(command)} failed:\n{compiled.stderr}")
        environment = {
            **os.environ,
            _VARIABLE: shim,
            "LD_PRELOAD": " ".join(filter(None, [shim, os.environ.get("LD_PRELOAD")])),
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # a process that has threads must not fork
        }
        return subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode
