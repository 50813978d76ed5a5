"""SIGKILL at every system call that changes a run, in every operation.

    python -m attacks.kill --short    # every call site once, in a minute
    python -m attacks.kill            # all of it: more than 5,000 kills

A process is forked, opens a run with a few checkpoints, and begins an operation. At the n-th call that creates, writes,
syncs, renames or removes something in the run, counted over all threads, it is killed: before the call, or when half of
a write has gone out. n goes from 1 until the operation ends. What the process had acknowledged is known through a pipe.
Another process then opens the run, restores every checkpoint and the newest, bit by bit, saves the next one, and looks
for anything left over. In further rounds every call waits for a random moment first, so that threads overtake each
other.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

from attacks import shim
from attacks.checks import Problem
from attacks.forks import Tell
from attacks.operations import OPERATIONS
from attacks.options import empty_directory, parser_of
from attacks.report import Report
from attacks.scenes import Scene, scenes
from attacks.shim import Strike

__all__ = ["main"]

_CHANGING = [name for name, operation in OPERATIONS.items() if not operation.reads_only]
_JITTER_USECS = 400
_LARGE_EVERY = 4  # a kill in a large state takes ten times as long


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where ours failed once."""
    parser = parser_of(__doc__, _CHANGING, orbax_every=10)
    parser.add_argument(
        "--kills", type=int, default=5000, help="of ours; rounds go on until there are as many (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="one round on one kind of state, that is every call once")
    options = parser.parse_args(argv)
    code = shim.rerun("attacks.kill", sys.argv[1:] if argv is None else argv)
    if code is not None:
        return code
    if options.short:
        options.kinds, options.kills = ["mixed"], 1
    report = Report("kill", "kills", show=options.show, json_path=options.json)
    for library in options.libraries:
        stride = options.every * (options.orbax_every if library == "orbax" else 1)
        with empty_directory(options.directory) as directory:
            made = scenes(library, options.operations, options.kinds, directory)
            for seed in itertools.count():
                for scene in made:
                    _sweep(report, scene, seed, stride)
                if library == "orbax" or report.strikes_of(library) >= options.kills:
                    break
    report.close()
    return 1 if report.failures_of("ours") else 0


def _sweep(report: Report, scene: Scene, seed: int, stride: int) -> None:
    """Kills before every call and half-way through every write, until the operation ends before it is killed.

    With a seed other than 0, every call waits for a random moment before.
    """
    stride *= _LARGE_EVERY if scene.kind == "large" else 1
    for action, scope in (("kill", shim.CHANGES), ("kill halfway", shim.WRITES)):
        for at in range(1 + seed % stride, 1 << 20, stride):
            jitter_usecs = _JITTER_USECS if seed else 0
            strike = Strike(action, at, scope=scope, jitter_usecs=jitter_usecs, seed=seed)
            was_killed, problems = _kill(scene, strike)
            if was_killed or problems:
                report.add(scene.library.name, scene.name, f"{strike}, {scene.kind} state", problems)
            if not was_killed:
                break


def _kill(scene: Scene, strike: Strike) -> tuple[bool, list[Problem]]:
    """(whether the operation was killed rather than ended, what is wrong afterwards)."""

    def act(tell: Tell) -> None:
        run = scene.operation.open(scene.library, scene.run)
        with shim.armed(scene.run, strike):
            scene.operation.act(run, scene.kind, tell)

    scene.set_up()
    outcome = scene.fork(act)
    if outcome.problem:
        return True, [("hung", outcome.problem)]
    wrong = [("wrong", text) for texts in outcome.all("wrong") for text in texts]
    expected = scene.operation.expected(outcome.all("acknowledged"))
    return outcome.killed, wrong + scene.look_again(expected)


if __name__ == "__main__":
    sys.exit(main())
