"""SIGKILL at every system call that changes a run, in every operation.

    python -m attacks.kill --short    # every call site once, in a minute
    python -m attacks.kill            # all of it: more than 5,000 kills

A process is forked, opens a run with a few checkpoints, and begins an operation. At the n-th call that creates, writes,
syncs, renames or removes something in the run, counted over all threads, it is killed: before the call, or when half of
a write has gone out. n goes from 1 until the operation ends. What the process had acknowledged is known through a pipe.
Another process then opens the run and restores every checkpoint, bit by bit, and the newest; saves the next one; and
looks for anything left over. In further rounds every call waits for a random moment, so that threads overtake each other.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence

from attacks import shim
from attacks.checks import Problem, look_again
from attacks.forks import Tell, in_fork
from attacks.libraries import LIBRARIES, Library
from attacks.operations import OPERATIONS, Operation
from attacks.options import empty_directory, parser_of
from attacks.report import Report
from attacks.shim import WRITES, Strike, armed

__all__ = ["main"]

_CHANGING = [name for name, operation in OPERATIONS.items() if not operation.reads_only]
_JITTER_USECS = 400
_LARGE_EVERY = 4  # a kill in a large state takes ten times as long


@dataclasses.dataclass(frozen=True)
class Scene:
    """One operation of one library on one kind of state, with the run that is there before."""

    library: Library
    operation: Operation
    kind: str
    template: str
    run: str

    def set_up(self) -> None:
        """The run as it is before."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(f"{self.run}.aside", ignore_errors=True)
        shutil.copytree(self.template, self.run)

    def act(self, strike: Strike, tell: Tell) -> None:
        """The operation, in a process of its own, until it is struck."""
        run = self.operation.open(self.library, self.run)
        with armed(self.run, strike) as seen:
            self.operation.act(run, self.kind, tell)
        tell(calls=seen.calls)
        run.close()

    def kill(self, strike: Strike) -> tuple[bool, list[Problem]]:
        """(whether the operation was killed rather than ended, what is wrong afterwards)."""
        self.set_up()
        outcome = in_fork(lambda tell: self.act(strike, tell), timeout_secs=self.library.timeout_secs)
        if outcome.problem:
            return True, [("hung", outcome.problem)]
        expected = self.operation.expected(outcome.all("acknowledged"))

        def check(tell: Tell) -> None:
            tell(problems=look_again(self.library, self.run, expected, self.operation, self.kind))

        after = in_fork(check, timeout_secs=self.library.timeout_secs)
        problems = [(name, text) for name, text in after.last("problems", ())]
        return outcome.killed, [*problems, *([("hung", after.problem)] if after.problem else [])]


def scenes(library: Library, names: Sequence[str], kinds: Sequence[str], directory: str) -> Iterator[tuple[str, Scene]]:
    """Each operation that a library has, on each kind of state; the runs are made below `directory`."""
    for name in names:
        operation = OPERATIONS[name]
        if operation.needs and operation.needs not in library.has:
            continue
        for kind in kinds:
            place = os.path.join(directory, f"{library.name}-{name.replace(' ', '-')}-{kind}")
            scene = Scene(library, operation, kind, f"{place}-before", place)

            def prepare(tell: Tell, scene: Scene = scene) -> None:
                scene.operation.prepare(scene.library, scene.template, scene.kind)
                tell(prepared=True)

            outcome = in_fork(prepare, timeout_secs=library.timeout_secs)
            if not outcome.last("prepared"):
                raise RuntimeError(f"{library.name} cannot prepare {name!r}: {outcome.problem}")
            yield name, scene
            for path in (scene.template, scene.run, f"{scene.run}.aside"):
                shutil.rmtree(path, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where ours failed once."""
    parser = parser_of(__doc__, _CHANGING)
    parser.add_argument("--rounds", type=int, default=5, help="further rounds with random waits (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="one state, no further rounds, Orbax at every 7th call")
    options = parser.parse_args(argv)
    code = shim.rerun("attacks.kill", sys.argv[1:] if argv is None else argv)
    if code is not None:
        return code
    if options.short:
        options.kinds, options.rounds, options.orbax_every = ["mixed"], 0, 7
    report = Report("kill", "kills", show=options.show, json_path=options.json)
    for name in options.libraries:
        library = LIBRARIES[name]
        library.load()
        stride = options.every * (options.orbax_every if name == "orbax" else 1)
        with empty_directory(options.directory) as directory:
            for operation, scene in scenes(library, options.operations, options.kinds, directory):
                for strikes in _sweeps(options.rounds, stride * (_LARGE_EVERY if scene.kind == "large" else 1)):
                    _sweep(report, operation, scene, strikes)
    report.close()
    return 1 if report.failures_of("ours") else 0


def _sweeps(rounds: int, stride: int) -> Iterator[Iterator[Strike]]:
    """Before every call; half-way through every write; and both again with random waits, from another first call."""
    for seed in range(rounds + 1):
        jitter_usecs = _JITTER_USECS if seed else 0
        for action, scope in (("kill", shim.CHANGES), ("kill halfway", WRITES)):
            yield (
                Strike(action, at, scope=scope, jitter_usecs=jitter_usecs, seed=seed)
                for at in range(1 + seed % stride, 1 << 20, stride)
            )


def _sweep(report: Report, operation: str, scene: Scene, strikes: Iterator[Strike]) -> None:
    """Kills at each call, until the operation ends before it is killed."""
    for strike in strikes:
        killed, problems = scene.kill(strike)
        if killed or problems:
            report.add(scene.library.name, operation, f"{strike}, {scene.kind} state", problems)
        if not killed:
            return


if __name__ == "__main__":
    sys.exit(main())
