"""A changed copy of the repository, and which test notices: each trial is a fork that has imported JAX already."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from attacks.passages import FOLDER, Passages, read_passages

__all__ = ["Copy", "record"]

REPOSITORY = Path(__file__).parents[1]
COPIED = ("ckpt_hooks", "tests", "attacks", "benchmarks", "examples", "configs", "docs")
COPIED_FILES = ("pyproject.toml", "README.md", "ARCHITECTURE.md", "CHANGELOG.md")
TRIAL_SECS = 1200
TEST_SECS = 120  # of one test; without a safety, some wait for ever
_IMPORTED = (
    "jax",
    "optax",
    "flax.linen",
    "flax.nnx",
    "orbax.checkpoint",
    "hypothesis.stateful",
    "pytest",
    "clu.metrics",
    "equinox",
    "scipy.stats",
    "sklearn.datasets",
)
_OWN = ("ckpt_hooks", "tests", "attacks")
# They look at the source, the machine or the other library; what they notice is not a safety.
_NOT_ASKED = (
    *("architecture", "attacks_mutations", "attacks_syscalls", "benchmarks", "costs", "docs", "examples", "stops"),
    *("where_orbax_fails", "triggers"),
)


class Copy:
    """A copy of the repository, in which one thing at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in COPIED_FILES:
            shutil.copy(REPOSITORY / name, folder / name)
        compiled = ["ckpt_hooks", "attacks", "tests", "benchmarks"]
        subprocess.run([sys.executable, "-m", "compileall", "-q", *compiled], cwd=folder, check=True)

    @contextlib.contextmanager
    def changed(self, module: str, content: bytes) -> Iterator[None]:
        """A module of the package holds something else."""
        path = self.folder / "ckpt_hooks" / module
        source, status = path.read_bytes(), path.stat()
        try:
            path.write_bytes(content)
            os.utime(path, (0, 0))  # so that what was compiled before is not taken for it
            yield
        finally:
            path.write_bytes(source)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def first_failure(self, tests: Sequence[str], test_secs: float = TEST_SECS) -> str:
        """The test that fails, of those by these ids; "" if none does. One that takes longer than that has failed."""
        with tempfile.TemporaryDirectory(prefix="trial-", dir=_shared_memory()) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fork that JAX does not like; it has not begun to do anything
            output = Path(scratch) / "output"
            pid = os.fork()
            if pid == 0:
                self._run(tests, output, scratch, test_secs)
            status = _wait(pid, time.monotonic() + TRIAL_SECS)
            text = output.read_text(errors="replace") if output.exists() else ""
        if status == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", text, re.MULTILINE)
        if failed:
            return failed[1] + (" (does not end)" if "Failed: Timeout" in text else "")
        begun = re.findall(r"^(tests/\S+) ", text, re.MULTILINE)
        return f"{begun[-1] if begun else tests[0]} ({_ending(status)})"

    def _run(self, tests: Sequence[str], output: Path, scratch: str, test_secs: float) -> NoReturn:
        code: object = 1
        try:
            os.setsid()
            descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(self.folder)
            os.environ.update(PYTHONPATH=str(self.folder), PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            sys.path[:] = [str(self.folder), *(path for path in sys.path if path not in ("", str(REPOSITORY)))]
            for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
                del sys.modules[name]
            # Without rewritten assertions: half of the time until the first test begins went into them.
            options = ["-x", "-v", "--no-header", "--tb=line", "-rfE", "--assert=plain", f"--timeout={test_secs:.0f}"]
            plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
            code = importlib.import_module("pytest").main([*options, *plugins, f"--basetemp={scratch}/t", *tests])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))  # type: ignore[call-overload]


def record(folder: Path, processes: int, chosen: Sequence[str] = ()) -> Passages:
    """Runs the tests of a copy once, to see which of them passes through which line."""
    copy = Copy(folder / "copy")
    passages = folder / "passages"
    passages.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(copy.folder), FOLDER: str(passages)}
    tests = chosen or [
        f"tests/{path.name}"
        for path in sorted((copy.folder / "tests").glob("test_*.py"))
        if path.stem.removeprefix("test_") not in _NOT_ASKED
    ]
    options = ["-q", "-p", "attacks.passages", "-p", "no:cacheprovider", "-n", str(processes), "--timeout=300"]
    subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=copy.folder, env=environment, check=False)
    return read_passages(passages)


@functools.cache
def import_what_tests_need() -> None:
    """Once, before the forks; nothing of it starts a thread or a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _IMPORTED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _wait(pid: int, deadline_secs: float) -> int:
    """The exit code; -SIGKILL where it does not end in time. Nothing that it started is left."""
    try:
        while time.monotonic() < deadline_secs:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _ending(status: int) -> str:
    return "does not end" if status == -signal.SIGKILL else f"exit code {status}"


def _shared_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
