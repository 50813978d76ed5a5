"""A file system that fails: EIO, ENOSPC, EDQUOT, EINTR and short writes at every system call of every operation.

    python -m attacks.errors --short    # every call and error once, on a small state
    python -m attacks.errors            # all of it

A process is forked, opens a run with a few checkpoints, and begins an operation. Its n-th call that creates, writes,
syncs, renames or removes something in the run is refused, without being carried out: that one; it and the next one,
which is the first of the clearing up; or all from there on. EINTR for ever means a hundred in a row. Short writes write
the half of what they are given. In ``EIO reading`` it is a call that reads, looks up or lists.

Then the fault goes away. The operation must have failed with an error of the library's own that names the checkpoint
and the cause, or have done all that it acknowledged. In the same process, and then in another one, every checkpoint and
the newest are restored, bit by bit, the next one is saved, and anything left over counts.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from attacks import shim
from attacks.checks import Problem, go_on, left_over, look
from attacks.forks import Tell
from attacks.libraries import Run
from attacks.operations import OPERATIONS, Expected
from attacks.options import empty_directory, parser_of
from attacks.report import Report
from attacks.scenes import Scene, scenes
from attacks.shim import FOR_EVER, Strike

__all__ = ["main"]

_REFUSALS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
_MANY = 100  # interruptions in a row; Python goes on after each, so for ever would be for ever
_LARGE_EVERY = 8
# If one of these was refused for good, a save that says it is done says what is not so.
_ESSENTIAL = {"open", "write", "pwrite", "pwritev", "fsync", "fdatasync", "rename", "mkdir", "fallocate"}
_UNLISTED = re.compile(r"opendir .*\.orbax-checkpoint-tmp")  # so is one that could not see what it has to sync
_ONE_SAVE = {"save", "async save"}  # after whose commit nothing is removed, which may fail without harm


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where ours failed once."""
    parser = parser_of(__doc__, list(OPERATIONS), orbax_every=20, kinds=("tiny", "large"))
    parser.add_argument("--faults", nargs="+", choices=_FAULTS, default=list(_FAULTS), help="default: all")
    parser.add_argument("--short", action="store_true", help="one kind of state")
    options = parser.parse_args(argv)
    code = shim.rerun("attacks.errors", sys.argv[1:] if argv is None else argv)
    if code is not None:
        return code
    if options.short:
        options.kinds = ["tiny"]
    report = Report("errors", "faults", show=options.show, json_path=options.json)
    for library in options.libraries:
        stride = options.every * (options.orbax_every if library == "orbax" else 1)
        with empty_directory(options.directory) as directory:
            for scene in scenes(library, options.operations, options.kinds, directory):
                for number, fault in enumerate(options.faults):
                    _sweep(report, scene, fault, stride, first=1 + number % stride)
    report.close()
    return 1 if report.failures_of("ours") else 0


def _faults() -> Iterator[tuple[str, Strike]]:
    for number in _REFUSALS:
        ever = _MANY if number == errno.EINTR else FOR_EVER
        for often, times in (("once", 1), ("twice", 2), ("for ever", ever)):
            yield f"{errno.errorcode[number]} {often}", Strike("fail", times=times, error=number)
    for often, times in (("once", 1), ("for ever", FOR_EVER)):
        yield f"short write {often}", Strike("shorten", times=times, scope=shim.WRITES)
        yield f"EIO reading {often}", Strike("fail", times=times, error=errno.EIO, scope=shim.READS)


_FAULTS = dict(_faults())


def _sweep(report: Report, scene: Scene, fault: str, stride: int, first: int) -> None:
    """Strikes at each call, until the operation ends before it is struck."""
    stride *= _LARGE_EVERY if scene.kind == "large" else 1
    for at in range(first, 1 << 20, stride):
        was_struck, calls, problems = _strike(scene, dataclasses.replace(_FAULTS[fault], at=at))
        if not was_struck and not problems:
            return
        where = f"{scene.name}, {scene.kind} state, call {at} ({', '.join(calls[:2])})"
        report.add(scene.library.name, fault, where, problems)
        if not was_struck:
            return


def _strike(scene: Scene, strike: Strike) -> tuple[bool, list[str], list[Problem]]:
    """(whether there was such a call, the calls that were struck, what is wrong afterwards)."""
    scene.set_up()
    outcome = scene.fork(lambda tell: _act_and_go_on(scene, strike, tell))
    struck: list[str] = outcome.last("struck", [])
    problems = [(name, text) for name, text in outcome.last("problems", ())]
    if outcome.problem or outcome.killed:
        return True, struck, [*problems, ("hung", outcome.problem or "it was killed")]
    expected = _expected(scene, strike, outcome.all("acknowledged")).and_next()
    if not problems:
        problems = [(name, f"in the next process, {text}") for name, text in scene.look_again(expected)]
    return bool(struck), struck, problems


def _act_and_go_on(scene: Scene, strike: Strike, tell: Tell) -> None:
    """The operation under the fault, and then, without it, what a training would do next."""
    told: list[dict[str, object]] = []

    def note(**facts: object) -> None:
        told.append(facts)
        tell(**facts)

    run = scene.operation.open(scene.library, scene.run)
    failure: BaseException | None = None
    with shim.armed(scene.run, strike) as seen:
        try:
            scene.operation.act(run, scene.kind, note)
        except BaseException as error:
            failure = error
    _hear_all(run)
    tell(struck=seen.struck)
    acknowledged: Any = [facts["acknowledged"] for facts in told if "acknowledged" in facts]
    expected = _expected(scene, strike, acknowledged)
    problems = [("wrong", text) for facts in told for text in facts.get("wrong", ())]  # type: ignore[attr-defined]
    problems += _judge(scene, strike, seen.struck, failure, is_done=bool(acknowledged))
    problems += look(run, expected, scene.operation, scene.kind)
    problems += go_on(run, expected.next_step, scene.operation, scene.kind)
    steps = run.steps()
    run.close()
    problems += left_over(scene.library, scene.run, steps, expected, scene.kind)
    tell(problems=problems)


def _hear_all(run: Run) -> None:
    """A failure in the background that nobody has been told of yet must not be taken for one of the next call."""
    for _ in range(3):
        try:
            run.wait()
        except Exception:
            continue
        return


def _expected(scene: Scene, strike: Strike, acknowledged: list[int]) -> Expected:
    expected = scene.operation.expected(acknowledged)
    may_reject = strike.scope == shim.READS and scene.operation.restores and strike.times > 1
    return expected.after_reading_errors() if may_reject else expected


def _judge(
    scene: Scene, strike: Strike, struck: Sequence[str], failure: BaseException | None, *, is_done: bool
) -> Iterator[Problem]:
    """Whether success or failure is what it says."""
    if failure is None:
        essential = [call for call in struck if call.split()[0] in _ESSENTIAL or _UNLISTED.match(call)]
        if is_done and strike.error not in (0, errno.EINTR) and scene.name in _ONE_SAVE and essential:
            yield "silent", f"acknowledged, though refused: {essential[:3]}"
        return
    if "errors" in scene.library.has:
        yield from _unclear(scene, strike, failure)


def _unclear(scene: Scene, strike: Strike, failure: BaseException) -> Iterator[Problem]:
    from ckpt_hooks.errors import CheckpointError, CheckpointNotFoundError

    text = f"{type(failure).__name__}: {failure}"
    if isinstance(failure, CheckpointNotFoundError) and scene.operation.reads_only:
        yield "afresh", text
    elif scene.run not in text:
        yield "unclear", f"does not name the checkpoint: {text}"
    elif strike.scope == shim.READS:
        return  # what a failed look-up leads to may be told in other words
    elif not isinstance(failure, CheckpointError):
        yield "unclear", f"not an error of the library: {text}"
    elif strike.error and os.strerror(strike.error) not in text:
        yield "unclear", f"does not name the cause: {text}"


if __name__ == "__main__":
    sys.exit(main())
