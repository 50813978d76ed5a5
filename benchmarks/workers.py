"""Everybody in a process of its own, as with a user.

In one process `malloc` gives to a library what another one has freed, so that none pays for its own pages: of Orbax's
page faults for half of big, a quarter went away when seven others had restored before it.

`Worker` is the side that asks; this file run as a program is the one that answers.
"""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Self

__all__ = ["Worker"]

_REPOSITORY = Path(__file__).parents[1]


class Worker:
    """Restores with one of `contestants.savers`, which is named, as a context."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", self._name],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def restore_secs(self, path: str, workload: str, scale: float) -> float:
        """How long it takes until the arrays of the checkpoint at `path` are ready."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([path, workload, scale]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self._name} has died; it wrote why above")
        return float(answer)

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def _serve(name: str) -> None:
    import jax

    from benchmarks.contestants import savers
    from benchmarks.timing import seconds_of
    from benchmarks.workloads import WORKLOADS

    saver = next(saver for saver in savers() if saver.name == name)
    likes = functools.cache(lambda workload, scale: WORKLOADS[workload].abstract(scale))
    for line in sys.stdin:
        path, workload, scale = json.loads(line)
        restore = functools.partial(saver.restore, path, likes(workload, scale))
        gc.collect()
        secs = seconds_of(lambda: jax.block_until_ready(restore()))  # noqa: B023  (called at once)
        gc.collect()  # before which JAX frees nothing of the host's memory, unless it is called again
        print(secs, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
