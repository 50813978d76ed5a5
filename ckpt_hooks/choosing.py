"""Which checkpoint of a run is restored: the leader of the processes chooses one, all read it, what one rejects all do.

So no process restores another step than the others do, though each checks only what it reads itself::

    leader chooses the newest -> all read their parts of it -> each says how it went -> restored, or the next one

Both arrows to the right are one barrier. An error that is no damage (a target that does not fit) ends it for all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ckpt_hooks import errors, processes
from ckpt_hooks.agreement import OperationBarriers, some_of
from ckpt_hooks.errors import CheckpointError, NotSharedError
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.reading import Watch
from ckpt_hooks.restoring import Rejected, nothing_left, read_newest, read_or_reject
from ckpt_hooks.run import OvertakenError, RunDirectory

__all__ = ["is_empty", "read_chosen"]

_MAX_ABSENCES = 10  # of a step that was chosen: each time a writer may have removed it in between
_PAUSE_SECS = 0.05

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def read_chosen(
    run: RunDirectory,
    asked: Callable[[], int] | None,
    read: Callable[[str], _T],
    options: MultiprocessingOptions,
    wanted: str = "newest",
) -> tuple[int, _T]:
    """(step, what `read` makes of its path), of the same step in every process.

    Args:
      asked: says which step, and no other one will do; None for the newest that verifies.
      read: reads what this process needs of the checkpoint at a path.
      wanted: which step was asked for, in words that are the same in every process.

    Raises:
      CheckpointNotFoundError, NoValidCheckpointError: in all processes, where the leader finds none (any more).
      NotSharedError: the processes do not see the same directory.
      OtherProcessError: another process has failed; and whatever `read` raises that is no damage.
    """
    if len(options.members()) > 1:
        return _read_together(run, asked, read, options, wanted)
    if asked is None:
        return read_newest(run, read)
    step = asked()
    return step, read(run.require(step))


def is_empty(run: RunDirectory, options: MultiprocessingOptions) -> bool:
    """Whether the leader finds no checkpoint in the run."""
    if len(options.members()) == 1:
        return _finds_nothing(run)
    with _operation(options) as barriers:  # before the look: one that fails has taken its number, and is told
        found = str(_finds_nothing(run)) if processes.index() == options.leader() else ""
        return barriers.meet("newest", "asks for the newest step", found) == str(True)


def _finds_nothing(run: RunDirectory) -> bool:
    if run.latest_step() is not None:
        return False
    if hint := run.hint_at_other_names():
        _log.warning("%s has no checkpoint%s", run.path, hint)
    return True


@contextlib.contextmanager
def _operation(options: MultiprocessingOptions) -> Iterator[OperationBarriers]:
    barriers = OperationBarriers(processes.next_operation_id(options), options)
    try:
        yield barriers
    except BaseException as error:
        barriers.fail(error)
        raise
    barriers.leave()


def _read_together(
    run: RunDirectory,
    asked: Callable[[], int] | None,
    read: Callable[[str], _T],
    options: MultiprocessingOptions,
    wanted: str,
) -> tuple[int, _T]:
    leader = _Leader(run, asked)
    leads = processes.index() == options.leader()
    with _operation(options) as barriers:
        claim = f"step {wanted} to restore"
        have_own = asked is None and options.primary_host is None  # a directory each
        if have_own:
            barriers.consult("steps", json.dumps(run.steps()), leader.find_common)
        decision = json.loads(barriers.meet("choose", claim, leader.choose() if leads else ""))
        for number in itertools.count():
            if "error" in decision:
                barriers.leave()  # everybody has it
                if have_own and decision["error"] == errors.CheckpointNotFoundError.__name__:
                    _reject_above(run, -1)  # a first save that not all have committed: the run begins afresh
                raise leader.error or _as_of_the_leader(decision)
            outcome, result = _attempt(run, decision["step"], read, may_reject=asked is None)
            decision = json.loads(barriers.consult(f"read.{number}", outcome, leader.judge))
            if decision.get("restored"):
                break
    rejected = {int(step): reason for step, reason in decision["rejected"].items()}
    run.reject(rejected)
    for step, reason in rejected.items():
        _log.warning("step %d of %s is restored instead of %d: %s", decision["step"], run.path, step, reason)
    if have_own:
        _reject_above(run, decision["step"])
    return decision["step"], result


def _reject_above(run: RunDirectory, step: int) -> None:
    """What is newer here was not committed by every process; the next save sets it aside."""
    newer = [other for other in run.steps() if other > step]
    if newer:
        _log.warning("steps %s of %s are no checkpoints: not every process has them", newer, run.path)
        run.reject(dict.fromkeys(newer, "not every process has it"))


_IS_READ, _IS_ABSENT, _IS_DAMAGED = "", "absent", "damaged: "  # what a process says of the step that was chosen


def _attempt(run: RunDirectory, step: int, read: Callable[[str], _T], *, may_reject: bool) -> tuple[str, Any]:
    """(what to say of it, what was read) of the step that was chosen."""
    try:
        path = run.require(step)
    except (errors.CheckpointNotFoundError, errors.IncompleteCheckpointError):
        return _IS_ABSENT, None
    if not may_reject:
        return _IS_READ, read(path)
    try:
        with contextlib.closing(Watch(path)) as watch:
            result = read_or_reject(run, step, functools.partial(read, path), watch)
    except OvertakenError:
        return _IS_ABSENT, None
    return (_IS_DAMAGED + result.reason, None) if isinstance(result, Rejected) else (_IS_READ, result)


class _Leader:
    """What the leader decides, as lines of JSON; the other processes ask for none of it."""

    def __init__(self, run: RunDirectory, asked: Callable[[], int] | None) -> None:
        self._run = run
        self._asked = asked
        self._step = -1
        self._rejected: dict[int, str] = {}
        self._num_absences = 0
        self._common: set[int] | None = None  # the steps that all have, where each has a directory of its own
        self.error: CheckpointError | None = None  # why there is none to read

    def find_common(self, said: Mapping[int, str]) -> str:
        """Goes on with the steps that every process has."""
        self._common = set.intersection(*(set(json.loads(steps)) for steps in said.values()))
        return ""

    def choose(self) -> str:
        """The step that all are to read, or why there is none."""
        try:
            self._step = self._newest() if self._asked is None else self._asked()
            self._run.require(self._step)
        except CheckpointError as error:
            return self._fails(error)
        return json.dumps({"step": self._step})

    def _fails(self, error: CheckpointError) -> str:
        """An error that every process is to raise: the leader this one, with its traceback and cause."""
        self.error = error
        return json.dumps({"error": type(error).__name__, "text": str(error), "errno": getattr(error, "errno", None)})

    def _newest(self) -> int:
        run, rejected = self._run, self._rejected
        step = run.anew_if_overtaken(lambda: next(filter(self._may_be_read, run.newest_first()), None))
        if step is None:
            raise nothing_left(run, rejected)
        return step

    def _may_be_read(self, step: int) -> bool:
        return step not in self._rejected and (self._common is None or step in self._common)

    def judge(self, said: Mapping[int, str]) -> str:
        """What follows from what the processes say of the step that they were to read."""
        absent = [process for process, outcome in said.items() if outcome == _IS_ABSENT]
        if absent:
            self._num_absences += 1
            if self._num_absences <= _MAX_ABSENCES:
                time.sleep(self._num_absences * _PAUSE_SECS)  # a network file system may lag
                return self.choose()
            return self._fails(
                NotSharedError(
                    f"step {self._step} is not in {self._run.path} for processes [{some_of(absent)}], but it is for "
                    f"process {processes.index()}. Is it the same directory for all of them?"
                )
            )
        reasons = {p: outcome.removeprefix(_IS_DAMAGED) for p, outcome in said.items() if outcome != _IS_READ}
        if reasons:
            sentences = [f"process {process}: {reason}" for process, reason in reasons.items()]
            self._rejected[self._step] = some_of(sentences, "; ")
            return self.choose()
        return json.dumps({"step": self._step, "restored": True, "rejected": self._rejected})


def _as_of_the_leader(decision: Mapping[str, Any]) -> CheckpointError:
    error: type[CheckpointError] = getattr(errors, decision["error"])
    if error is errors.StorageError:  # the one whose `errno` is not the same for the whole class
        return error(decision["errno"], decision["text"])
    return error(decision["text"])
