"""Barriers of one operation at which an error, a dispute or an absence is told to everybody, with who it was.

Each process leaves a line in the coordination service's store when it comes to a barrier; the leader alone reads
them, and answers all with one line: go on, or why not. So no process sends or reads more than two lines a barrier,
the leader reads one a process. An error needs no barrier of its own: it stands in the answer to the next one.
When an operation is over, the last process to leave it removes its lines, so that the store does not grow.

Nothing here uses a device, so that a background thread may wait while the main thread trains.
"""

from __future__ import annotations

import collections
import functools
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Self

from ckpt_hooks import events, processes
from ckpt_hooks.errors import BarrierTimeoutError, CheckpointError, OtherProcessError, ProcessesDisagreeError
from ckpt_hooks.processes import DEFAULT_BARRIER_TIMEOUT_SECS, MultiprocessingOptions

__all__ = ["OperationBarriers", "Together", "some_of", "tell_others"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECS = 0.02  # until one looks whether somebody has failed; who comes is known at once
_LONGEST_PAUSE_SECS = 0.05
_GOES_ON, _FAILED, _DISAGREES, _IS_LATE = "go on", "failed", "disagrees", "late"
_GRACE_SECS = 5.0  # for the leader's answer to reach a process that began to wait before the leader did
_MAX_NAMED = 20  # processes in a message
_random = random.Random()  # of its own: a user's seeded numbers stay what they are

_Judge = Callable[[Mapping[int, str]], tuple[str, str]]  # {process: what it said}, but for the leader, to an answer


class Together:
    """What all processes do at once, or the primary does for all, as a context.

    At its end every process has come and has made the same claim; an error inside is told to the others. What changes
    something goes between `agree` and that end.

    Attributes:
      decides: whether this process acts for all; with storage of its own, each does.
      claim: what every process has to find alike, for example the step that it restored.
    """

    def __init__(self, options: MultiprocessingOptions, claim: str = "", name: str = "together") -> None:
        self._name = name
        self.decides = options.is_primary()
        self.claim = claim
        self._barriers = OperationBarriers(processes.next_operation_id(options), options)

    def __enter__(self) -> Self:
        return self

    def agree(self) -> bool:
        """Waits until every process has come so far, with the same claim; returns `decides`."""
        self._barriers.meet("agree", self.claim)
        return self.decides

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._barriers.fail(error)
            return
        try:
            self._barriers.meet(self._name, self.claim)
        except BaseException as failure:
            self._barriers.fail(failure)
            raise
        self._barriers.leave()


def tell_others(error: BaseException, options: MultiprocessingOptions) -> None:
    """Tells those that are about to begin their next operation that this process will not."""
    OperationBarriers(processes.next_operation_id(options), options).fail(error)


class OperationBarriers:
    """The barriers of one save or restore; each process makes one, of the same number.

    Args:
      operation: its number, the same in every process; no other operation of these processes has it.
      options: which processes take part, who leads, and how long a barrier waits for the last process.
    """

    def __init__(self, operation: int, options: MultiprocessingOptions) -> None:
        self._operation, self._options = operation, options
        self._members = options.members()
        self._timeout_secs = options.barrier_timeout_secs or DEFAULT_BARRIER_TIMEOUT_SECS
        self._has_left = len(self._members) == 1  # and so has nobody to tell
        self._is_over = False  # for all, who have the leader's answer that says why

    @functools.cached_property
    def _key(self) -> str:
        options = self._options
        return f"ckpt_hooks/{options.key('Checkpointer')}.{options.group()}{self._operation}"

    @functools.cached_property
    def _leader(self) -> int:
        return self._options.leader()

    def meet(
        self,
        name: str,
        claim: str = "",
        told: str = "",
        said: str = "",
        hear: Callable[[Mapping[int, str]], None] = lambda said: None,
    ) -> str:
        """Waits until every process is here and has made the same claim.

        Args:
          name: of the barrier, within the operation.
          claim: lines that have to be the same in every process.
          told: what the leader has to tell the others.
          said: one line that each process has for itself, for `hear`.
          hear: given {process: what it said}, in the leader alone, once all agree; what it raises fails the operation.

        Returns: what the leader tells.

        Raises:
          BarrierTimeoutError: (TimeoutError) names those that did not come.
          OtherProcessError: (RuntimeError) one of them has failed, and says why.
          ProcessesDisagreeError: (ValueError) names those whose claim is not the leader's, and where they differ.
        """

        def judge(others: Mapping[int, str]) -> tuple[str, str]:
            lines = {process: line.partition("\n") for process, line in others.items()}
            claims = {process: theirs for process, (_, _, theirs) in lines.items()}
            dispute = _dispute(self._leader, claim, claims) if claims else ""
            if dispute:
                return _DISAGREES, dispute
            hear({processes.index(): said, **{process: line for process, (line, _, _) in lines.items()}})
            return _GOES_ON, told

        return self._pass(name, f"{said}\n{claim}", judge)

    def consult(self, name: str, said: str, decide: Callable[[Mapping[int, str]], str]) -> str:
        """What the leader decides, from what each process has said; every process has to be here.

        Args:
          name: of the barrier, within the operation.
          said: what this process has to say.
          decide: {process: what it said} to the decision; called in the leader alone.

        Raises what `meet` raises.
        """
        return self._pass(name, said, lambda others: (_GOES_ON, decide({processes.index(): said, **others})))

    def _pass(self, name: str, said: str, judge: _Judge) -> str:
        start_secs = time.perf_counter()
        if len(self._members) == 1:
            _, told = judge({})
        else:
            told = self._answer(name, judge) if processes.index() == self._leader else self._ask(name, said)
        events.record_duration_secs(
            events.BARRIER_SECS,
            time.perf_counter() - start_secs,
            key=self._options.key(f"Checkpointer:{name}.{self._operation}"),
        )
        return told

    def fail(self, error: BaseException) -> BaseException:
        """Tells the others, who wait at a barrier of this operation or will come to one; returns what failed first."""
        if self._has_left:
            return error
        try:
            return self._tell(error)
        except Exception as gone:  # nobody can be told, and this process's own reason must not be lost in that
            _log.warning("the other processes cannot be told of a failure: %s: %s", type(gone).__name__, gone)
            return error
        finally:
            self.leave()

    def leave(self) -> None:
        """The operation is over for this process; for the last one, its lines are of no more use to anybody."""
        if not self._has_left:
            self._has_left = True
            try:
                processes.leave(self._key, len(self._members))
            except Exception as gone:  # what has been committed is no failure; the next barrier will be one
                _log.warning("%s", gone)

    def _tell(self, error: BaseException) -> BaseException:
        if self._is_over:
            return error
        end = processes.found(f"{self._key}/end")
        if end is not None:  # this process was still writing when the primary removed what there was
            try:
                _raise(*end.split("\n", 1))
            except CheckpointError as first:
                return first
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        line = f"process {processes.index()} failed: {type(error).__name__}: {str(error).removesuffix('.')}{notes}"
        leads = processes.index() == self._leader
        if not leads:
            processes.publish(f"{self._key}/failed/{processes.index()}", line)
        if leads or isinstance(error, BarrierTimeoutError):  # the others wait for the leader too, which may never come
            processes.publish(f"{self._key}/end", f"{_FAILED}\n{line}")
        return error

    # -------------------------------------------------------------- the leader

    def _answer(self, name: str, judge: _Judge) -> str:
        kind, text = self._gather(name, judge)
        processes.publish(f"{self._key}/answer/{name}", f"{kind}\n{text}")
        if kind != _GOES_ON:
            processes.publish(f"{self._key}/end", f"{kind}\n{text}")
            self._is_over = True
        _raise(kind, text)
        return text

    def _gather(self, name: str, judge: _Judge) -> tuple[str, str]:
        """What to answer: (kind, text)."""
        deadline, pause_secs = time.monotonic() + self._timeout_secs, _FIRST_PAUSE_SECS
        others = self._members - {processes.index()}
        while True:
            failures = processes.published(f"{self._key}/failed/")
            if failures:
                return _FAILED, some_of(list(failures.values()), "; ")
            claims = {int(process): said for process, said in processes.published(f"{self._key}/at/{name}/").items()}
            missing = others - claims.keys()
            if not missing:
                return judge(claims)
            if time.monotonic() > deadline:
                return _IS_LATE, self._missing(name, sorted(missing))
            # The call returns at once when that process comes. One at random: when it does, half of the others that
            # were missing have come too, in whatever order they come, so that all lines are read a few times only.
            processes.wait_for(f"{self._key}/at/{name}/{_random.choice(list(missing))}", pause_secs)
            pause_secs = min(2 * pause_secs, _LONGEST_PAUSE_SECS)

    def _missing(self, name: str, absent: list[int]) -> str:
        return (
            f"{self._timeout_secs:g} s passed at barrier {name!r}, and of {len(self._members)} processes these did not "
            f"come: [{some_of(absent)}]. Look at their logs: they died, hang, or did not make this call. A slower "
            "start or a larger save needs a longer timeout (`timeout_secs`, or "
            "`MultiprocessingOptions(barrier_timeout_secs=)`)."
        )

    # -------------------------------------------------------------- the others

    def _ask(self, name: str, claim: str) -> str:
        processes.publish(f"{self._key}/at/{name}/{processes.index()}", claim)
        deadline = time.monotonic() + self._timeout_secs + _GRACE_SECS
        pause_secs = _FIRST_PAUSE_SECS
        while time.monotonic() < deadline:
            # The call returns at once when the answer comes; now and then one looks whether there will be none.
            answer = processes.wait_for(f"{self._key}/answer/{name}", pause_secs)
            answer = answer or processes.found(f"{self._key}/end")
            if answer is not None:
                kind, _, text = answer.partition("\n")
                self._is_over = kind != _GOES_ON
                _raise(kind, text)
                return text
            pause_secs = min(2 * pause_secs + 0.02, 1.0)
        raise BarrierTimeoutError(self._missing(name, [self._leader]))


# ------------------------------------------------------------------ words


def _raise(kind: str, text: str) -> None:
    if kind == _FAILED:
        # Not "nothing was": the leader may have committed while another process gave up waiting for that.
        raise OtherProcessError(f"{text}. Nothing more is committed; what was committed before is untouched.")
    if kind == _DISAGREES:
        raise ProcessesDisagreeError(f"{text}. Nothing was written; give every process the same.")
    if kind == _IS_LATE:
        raise BarrierTimeoutError(text)


def _dispute(leader: int, claim: str, claims: Mapping[int, str]) -> str:
    """Which processes claim something else, and the lines in which they differ; "" where all agree."""
    differing: dict[str, list[int]] = collections.defaultdict(list)
    for process in sorted(claims):
        if process != leader and claims[process] != claim:
            differing[claims[process]].append(process)
    sentences = []
    for other, members in differing.items():
        mine, theirs = claim.splitlines(), other.splitlines()
        ours = ", ".join(line for line in mine if line not in theirs) or "nothing more"
        others = ", ".join(line for line in theirs if line not in mine) or "nothing more"
        who = f"process {members[0]}" if len(members) == 1 else f"processes [{some_of(members)}]"
        sentences.append(f"process {leader} has {ours}, but {who} has {others}")
    return some_of(sentences, "; ")


def some_of(things: list[int] | list[str], separator: str = ", ") -> str:
    """The first of them, in one text that fits on a page also where there are thousands."""
    shown = separator.join(map(str, things[:_MAX_NAMED]))
    return shown if len(things) <= _MAX_NAMED else f"{shown}{separator}and {len(things) - _MAX_NAMED} more"
