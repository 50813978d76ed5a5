"""Power cuts, real ones: the disk as it was at some moment, mounted and restored from.

    python -m attacks.power_cut                        # 10 cuts each
    python -m attacks.power_cut --cuts 200 --orbax 50  # the full run, some minutes

A process saves in a loop onto a file system in an image, and notes in a file outside what it was told is durable.
The image lies on XFS, where a copy by reference takes one moment's state of it: what the file system had given to its
disk by then. What was still in memory is not in the copy, as after a power cut. The copy is mounted, which replays its
journal, and a fresh process state restores from it: the newest checkpoint has to be one that was noted before the cut,
or a newer one, every value right; every step that is listed has to be right; and the next save has to work.

It needs root, loop devices, `mkfs.xfs` and `mkfs.ext4` (packages xfsprogs, e2fsprogs), and says which of them is
missing. Everything is mounted in a mount namespace of its own, so that nothing stays mounted, however it ends.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from attacks.at_once import io_at_once
from attacks.quiet import quiet
from attacks.states import differences, state_of, step_of

__all__ = ["main", "missing"]

_KIND = "many"  # enough files and bytes for a cut to fall into the middle of a save
_TOOLS = {
    "mkfs.xfs": "xfsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mount": "mount",
    "umount": "mount",
    "unshare": "util-linux",
}
_INSIDE = "--inside"
_FIRST_SAVES = 2  # before the first cut
_PATIENCE_SECS = 120.0
_LONGEST_PAUSE_SECS = 0.25


def missing() -> list[str]:
    """What this machine lacks for real power cuts; [] where it has all of it."""
    lacks = [] if os.geteuid() == 0 else ["root, to mount"]
    lacks += [f"{tool} (package {package})" for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    return lacks if os.path.exists("/dev/loop-control") else [*lacks, "loop devices (/dev/loop-control)"]


# ------------------------------------------------------------------ who saves, who restores


class Library(Protocol):
    """A library under attack."""

    def save_forever(self, run: str, noted: str) -> None:
        """Saves step after step, and notes each one once it has been told that it is durable."""

    def problem(self, run: str, noted: int) -> str | None:
        """What is wrong with a run of which the step `noted` had been noted; None where nothing is."""


class Ours:
    """`CheckpointManager`, with late metrics and replaced steps among the saves."""

    def save_forever(self, run: str, noted: str) -> None:
        from ckpt_hooks import CheckpointManager

        with CheckpointManager(run, keep=3) as manager:
            for step in itertools.count(1):
                manager.save(step, state_of(step, _KIND), metrics={"loss": 1 / step})
                manager.wait()
                _note(noted, step)
                if step % 3 == 0:
                    manager.record_metrics(step, {"accuracy": 1 / step})
                if step % 5 == 0:
                    manager.save(step, state_of(step, _KIND), force=True)

    def problem(self, run: str, noted: int) -> str | None:
        from ckpt_hooks import CheckpointManager

        manager = CheckpointManager(run)
        restored = manager.restore()
        newest = step_of(restored)
        if newest is None or newest < noted:
            return f"lost: restored {newest}, and {noted} was durable"
        for step in manager.steps():
            problems = differences(manager.restore(step=step), step, _KIND)
            if problems:
                return f"wrong: {problems}"
        with CheckpointManager(run) as manager:
            manager.save(newest + 1, state_of(newest + 1, _KIND))
        return None if step_of(CheckpointManager(run).restore()) == newest + 1 else "stuck: the next save is lost"


class Orbax:
    """Orbax's CheckpointManager, at its defaults."""

    def _manager(self, run: str) -> Any:
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(run, options=ocp.CheckpointManagerOptions(max_to_keep=3))

    def save_forever(self, run: str, noted: str) -> None:
        import orbax.checkpoint as ocp

        manager = self._manager(run)
        for step in itertools.count(1):
            manager.save(step, args=ocp.args.StandardSave(state_of(step, _KIND)))
            manager.wait_until_finished()
            _note(noted, step)

    def problem(self, run: str, noted: int) -> str | None:
        import orbax.checkpoint as ocp

        with contextlib.closing(self._manager(run)) as manager:
            newest = manager.latest_step()
            if newest is None or newest < noted:
                return f"lost: the newest step is {newest}, and {noted} was durable"
            restored = manager.restore(newest, args=ocp.args.StandardRestore(state_of(0, _KIND)))
        problems = differences(restored, newest, _KIND)
        return f"wrong: {problems}" if problems else None


LIBRARIES: dict[str, Library] = {"ours": Ours(), "orbax": Orbax()}


def _note(path: str, step: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{step}\n".encode())
    finally:
        os.close(descriptor)


def _noted(path: str) -> int:
    """The newest step that was noted; 0 before the first."""
    try:
        with open(path) as file:
            return max((int(line) for line in file if line.endswith("\n")), default=0)
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------ the disk


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _mounted(image: str, directory: str, *options: str) -> Iterator[str]:
    os.makedirs(directory, exist_ok=True)
    _call("mount", "-o", ",".join(("loop", *options)), image, directory)
    try:
        yield directory
    finally:
        for _ in range(50):
            with contextlib.suppress(RuntimeError):
                _call("umount", directory)
                break
            time.sleep(0.1)  # somebody still has a file open
        else:
            _call("umount", "--lazy", directory)


def _make_image(path: str, nbytes: int, *mkfs: str) -> str:
    with open(path, "wb") as file:
        file.truncate(nbytes)
    _call(*mkfs, path)
    return path


@contextlib.contextmanager
def _writer(library: str, run: str, noted: str, log: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "attacks.power_cut", _INSIDE, "--save", library, run, noted]
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@dataclasses.dataclass
class _Bench:
    """Where the images are, and how they are mounted."""

    folder: str
    file_system: str
    rng: random.Random

    def cuts(self, library: str, number: int) -> Iterator[tuple[int, str | None]]:
        """(the step noted before the cut, what is wrong) of each cut."""
        with contextlib.ExitStack() as stack:
            host_image = _make_image(f"{self.folder}/host.img", 6 << 30, "mkfs.xfs", "-q", "-m", "reflink=1")
            host = stack.enter_context(_mounted(host_image, f"{self.folder}/host"))
            mkfs = (f"mkfs.{self.file_system}", "-q")
            disk = _make_image(f"{host}/disk.img", 512 << 20, *mkfs)
            inner = stack.enter_context(_mounted(disk, f"{self.folder}/disk"))
            noted, log = f"{self.folder}/noted-{library}", f"{self.folder}/log-{library}"
            writer = stack.enter_context(_writer(library, f"{inner}/run", noted, log))
            self._await(writer, noted, log)
            for _ in range(number):
                time.sleep(self.rng.uniform(0, _LONGEST_PAUSE_SECS))
                if writer.poll() is not None:
                    raise RuntimeError(f"the writer has ended: {_tail(log)}")
                durable = _noted(noted)
                _call("cp", "--reflink=always", disk, f"{host}/cut.img")
                yield durable, self._problem(library, f"{host}/cut.img", durable)
                os.unlink(f"{host}/cut.img")

    def _await(self, writer: subprocess.Popen[bytes], noted: str, log: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECS
        while _noted(noted) < _FIRST_SAVES:
            if writer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the writer has not come to its save {_FIRST_SAVES}: {_tail(log)}")
            time.sleep(0.02)

    def _problem(self, library: str, image: str, durable: int) -> str | None:
        # XFS refuses the same disk twice unless told that it is a copy.
        options = ("nouuid",) if self.file_system == "xfs" else ()
        with _mounted(image, f"{self.folder}/cut", *options) as cut:
            try:
                with io_at_once(), quiet():
                    return LIBRARIES[library].problem(f"{cut}/run", durable)
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:200]}"


def _tail(log: str) -> str:
    with open(log, errors="replace") as file:
        return file.read()[-2000:]


# ------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    if options.save:
        name, run, noted = options.save
        LIBRARIES[name].save_forever(run, noted)
        return 0
    lacks = missing()
    if lacks:
        print(f"A real power cut needs {'; '.join(lacks)}. Nothing was done.")
        return 2
    if not options.inside:
        # In a mount namespace of its own, whatever is mounted goes with the last process, also after a SIGKILL.
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "attacks.power_cut", _INSIDE]
        os.execvp(command[0], [*command, *argv])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the images are removed
    logging.disable(logging.CRITICAL)
    failed = _attack("ours", options.cuts, options)
    if options.orbax:
        _attack("orbax", options.orbax, options)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10, help="of a run of ours (%(default)s)")
    parser.add_argument("--orbax", type=int, default=10, help="of a run by Orbax (%(default)s)")
    parser.add_argument("--file-system", choices=("ext4", "xfs"), default="ext4", help="that loses its power")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="with some GiB free (default: %(default)s)")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=3, metavar=("LIBRARY", "RUN", "NOTED"), help=argparse.SUPPRESS)
    return parser


def _attack(library: str, cuts: int, options: argparse.Namespace) -> int:
    """Prints what came of the cuts; how many failed."""
    start_secs = time.perf_counter()
    problems: list[str] = []
    steps: list[int] = []
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="power-cut-") as folder:
        bench = _Bench(folder, options.file_system, random.Random(options.seed))
        for noted, problem in bench.cuts(library, cuts):
            steps.append(noted)
            if problem is not None:
                problems.append(problem)
    seconds = time.perf_counter() - start_secs
    print(
        f"{library}: {len(steps)} power cuts on {options.file_system}, between steps {steps[0]} and {steps[-1]}: "
        f"{len(problems)} failed ({seconds:.0f} s)",
        flush=True,
    )
    for problem, number in collections.Counter(problem.split(":")[0] for problem in problems).most_common():
        example = next(each for each in problems if each.startswith(problem))
        print(f"  {number} x {example[:300]}", flush=True)
    return len(problems)


if __name__ == "__main__":
    sys.exit(main())
