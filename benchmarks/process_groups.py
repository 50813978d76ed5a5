"""Groups of real processes with `jax.distributed`, started quickly.

A nursery imports JAX and the library once and forks the processes of each group, so that a group costs a second or
two and not ten. `run_group` is the parent's side; this file run as a program is the nursery's.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

REPOSITORY = Path(__file__).parents[1]
DEVICES_PER_PROCESS = 2


class Ended(NamedTuple):
    """How one process of a group ended.

    Attributes:
      code: its exit code; minus the signal's number where one ended it.
      report: what its function returned; None where it never returned.
      log: what it wrote to standard error.
    """

    code: int
    report: Any
    log: str


class Nursery:
    """Starts groups, one at a time, as a context."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.process_groups"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        return self

    def run_group(
        self, function: Any, folder: Path, count: int, *arguments: Any, initialize: dict[str, Any] | None = None
    ) -> list[Ended]:
        """What becomes of ``function(folder, *arguments)`` in each of `count` processes.

        Args:
          function: of a module; returns JSON.
          folder: where they may write.
          initialize: more arguments of `jax.distributed.initialize`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        task = {
            "function": [function.__module__, function.__qualname__],
            "arguments": [str(folder), *arguments],
            "count": count,
            "address": address,
            "initialize": initialize or {},
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [Ended(code, *_left_by(folder, number)) for number, code in enumerate(codes)]

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def _left_by(folder: Path, number: int) -> tuple[Any, str]:
    path = folder / f"report_{number}.json"
    report = json.loads(path.read_text()) if path.exists() else None
    return report, (folder / f"log_{number}.txt").read_text()


# ------------------------------------------------------------------ the nursery


def _nursery() -> None:
    import jax  # noqa: F401

    import ckpt_hooks  # noqa: F401

    for line in sys.stdin:
        task = json.loads(line)
        importlib.import_module(task["function"][0])
        # Process 0 has the coordination service, without which JAX aborts the others: it goes last.
        others_ended, until_others_end = os.pipe()
        first, *others = [_fork(task, number, (others_ended, until_others_end)) for number in range(task["count"])]
        os.close(others_ended)
        codes = list(map(_code_of, others))
        os.close(until_others_end)
        print(json.dumps([_code_of(first), *codes]), flush=True)


def _code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(task: dict[str, Any], number: int, pipe: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.close(pipe[1])
    folder = Path(task["arguments"][0])
    (folder / f"report_{number}.json").unlink(missing_ok=True)
    log = os.open(folder / f"log_{number}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    os.dup2(log, 1)
    code = 1
    try:
        report = _in_group(task, number)
        (folder / f"report_{number}.json").write_text(json.dumps(report))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        if number == 0:
            os.read(pipe[0], 1)
        os._exit(code)  # no shutdown barrier, at which those that are left would wait for the dead


def _in_group(task: dict[str, Any], number: int) -> Any:
    import jax

    module, name = task["function"]
    arguments: Sequence[Any] = task["arguments"]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES_PER_PROCESS}"
    address = task["address"]
    jax.distributed.initialize(address, task["count"], number, coordinator_bind_address=address, **task["initialize"])
    return getattr(importlib.import_module(module), name)(Path(arguments[0]), *arguments[1:])


if __name__ == "__main__":
    _nursery()
