"""Checks a recorded history of a run against what a run promises. Pure: operations in, anomalies out.

A run is a register for each step and one for the newest. One writer at a time changes them, one operation after
another; so the order of the changes is known, and of each only the moment is not: somewhere between the call and its
return, or never, where the writer was killed in it. `check` follows every state that the run may have been in. A read
must return what was true at one moment between its call and its return, and of two reads, one after the other, the
second must not return what had been overwritten when the first one looked.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Keep", "Operation", "check"]

CHANGES = frozenset({"save", "force", "rollback", "delete", "record"})
READS = frozenset({"restore newest", "restore step", "restore best", "metadata", "verify", "steps", "newest", "best"})


@dataclasses.dataclass(frozen=True)
class Keep:
    """A retention, as the checker understands it: the newest always stays."""

    latest: int | None = None
    every: int | None = None
    best: int | None = None

    def kept(self, losses: Mapping[int, float]) -> set[int]:
        """The steps that stay, of {step: loss}; written down anew here, and not taken from the library."""
        if self == Keep() or not losses:
            return set(losses)
        newest_first = sorted(losses, reverse=True)
        kept = set(newest_first[: max(self.latest or 0, 1)])
        if self.every:
            kept |= {step for step in losses if step % self.every == 0}
        if self.best:
            finite = [step for step in newest_first if math.isfinite(losses[step])]
            ranked = sorted(finite, key=lambda step: losses[step]) or newest_first  # stable: of equals, the newer
            kept |= set(ranked[: self.best])
        return kept


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one process did, and what came of it.

    Attributes:
      begin_ns, end_ns: CLOCK_MONOTONIC before the call and after its return; no end where the process was killed.
      stamp: what tells one save from every other, also of the same step; None where a read found nothing.
      loss: the metric that goes with the stamp.
      steps: what was listed; of a change, what its writer lists right after it.
      keep: of a change, the retention of its writer.
      problem: what was wrong with the value itself, or an error that nothing allows.
      refused: the error's class, where a change or a read was refused as it may be.
    """

    process: str
    kind: str
    begin_ns: int
    end_ns: int | None = None
    step: int | None = None
    stamp: int | None = None
    loss: float | None = None
    steps: tuple[int, ...] | None = None
    keep: Keep = Keep()
    problem: str = ""
    refused: str = ""

    def __str__(self) -> str:
        fields = {name: getattr(self, name) for name in ("step", "stamp", "loss", "steps", "refused")}
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, ""))
        return f"{self.process}: {self.kind} {told} [{self.begin_ns}, {self.end_ns}]"


Saved = tuple[int, float | None]  # stamp, loss
State = tuple[tuple[int, Saved], ...]  # sorted by step


@dataclasses.dataclass(frozen=True)
class _Moment:
    """A stretch of the run's life: from when on at the earliest, and until when at the latest, it may have lasted."""

    since_ns: float
    until_ns: float
    states: frozenset[State]


def check(history: Iterable[Operation]) -> list[str]:
    """The anomalies of a history; [] if it keeps every promise.

    `history` holds the changes (`CHANGES`) and reads (`READS`) of all processes; ``killed`` for a writer that was
    killed, from before the signal until it was reaped; and ``closed`` for a writer that gave the lock back.
    """
    operations = sorted(history, key=lambda operation: operation.begin_ns)
    anomalies = [f"{operation.problem}: {operation}" for operation in operations if operation.problem]
    sound = [operation for operation in operations if not operation.problem]
    periods = _writers(sound)
    for one, other in itertools.pairwise(periods):
        if other.since_ns < one.until_ns:
            anomalies.append(f"two writers at a time: {one} and {other}")
    reads = [operation for operation in sound if operation.kind in READS and operation.end_ns is not None]
    seen = {read.stamp for read in reads if read.stamp is not None}
    timeline = _Timeline(_moments(sound, periods, seen, anomalies))
    explained: dict[Hashable, list[tuple[Operation, int, int]]] = defaultdict(list)
    for read in reads:
        window = timeline.window(read)
        matching = [number for number, moment in window.items() if any(_explains(state, read) for state in moment)]
        if read.kind in _JOINED and not _JOINED[read.kind](list(window.values()), read):
            matching = []
        if not matching:
            states = [dict(state) for moment in window.values() for state in moment]
            anomalies.append(f"never true while it was read: {read}; the run was {states[:4]}")
        elif (register := _register(read)) is not None:
            explained[register].append((read, matching[0], matching[-1]))
    for reads_of_one in explained.values():
        anomalies += _backward_reads(reads_of_one)
    return anomalies


# ------------------------------------------------------------------ writers


@dataclasses.dataclass(frozen=True)
class _Period:
    """A writer holds the run at least from the end of its first change until it closes or is killed."""

    process: str
    since_ns: float
    until_ns: float
    dead_ns: float = math.inf  # when it can have changed nothing any more


def _writers(operations: Sequence[Operation]) -> list[_Period]:
    """Who held the run, one after another."""
    held: dict[str, _Period] = {}
    for operation in operations:
        name = operation.process
        if operation.kind in CHANGES and operation.end_ns is not None and not operation.refused:
            held.setdefault(name, _Period(name, operation.end_ns, math.inf))
        elif operation.kind in ("closed", "killed") and name in held:
            dead_ns = operation.end_ns or math.inf
            held[name] = dataclasses.replace(held[name], until_ns=operation.begin_ns, dead_ns=dead_ns)
    return sorted(held.values(), key=lambda period: period.since_ns)


def _moments(
    operations: Sequence[Operation], periods: Sequence[_Period], seen: set[int], anomalies: list[str]
) -> list[_Moment]:
    """Every state that the run may have been in, in order; adds what the writers' own listings contradict."""
    changes = defaultdict(list)
    for operation in operations:
        if operation.kind in CHANGES and not operation.refused:
            changes[operation.process].append(operation)
    possible = frozenset[State]({()})
    moments = [_Moment(-math.inf, math.inf, possible)]
    free_ns = -math.inf
    for number, period in enumerate(periods):
        next_ns = periods[number + 1].since_ns if number + 1 < len(periods) else math.inf
        for change in changes[period.process]:
            # Whatever it called earlier, it changed nothing before the one before it had gone.
            since_ns = max(change.begin_ns, free_ns)
            end_ns = min(period.dead_ns, next_ns) if change.end_ns is None else change.end_ns
            moments[-1] = dataclasses.replace(moments[-1], until_ns=end_ns)
            ways = [_way(before, change) for before in possible]
            if change.end_ns is None:
                # It stopped somewhere on its way, and nobody was told where; but what was read was there.
                done = 1 if change.stamp in seen else 0
                between = frozenset(state for way in ways for state in way)
                possible = frozenset(state for way in ways for state in way[done:])
            else:
                ways = _as_told(ways, change, anomalies)
                between = frozenset(state for way in ways for state in way[:-1])
                possible = frozenset(way[-1] for way in ways)
            stages = [frozenset({state}) for state in ways[0]] if len(ways) == 1 else [between]
            moments += [_Moment(since_ns, end_ns, stage) for stage in stages]
            moments.append(_Moment(since_ns, math.inf, possible))
        free_ns = period.until_ns
    return moments


def _as_told(ways: list[list[State]], change: Operation, anomalies: list[str]) -> list[list[State]]:
    """The ways that end in what the writer listed after its change; where none does, that is an anomaly."""
    matching = [way for way in ways if _steps(way[-1]) == change.steps]
    if not matching:
        anomalies.append(f"the run should hold {sorted({_steps(way[-1]) for way in ways})} after {change}")
        known = {step: saved for way in ways for state in way for step, saved in state}
        matching = [[_state({step: known.get(step, (-1, None)) for step in change.steps or ()})]]
    return matching


def _way(before: State, change: Operation) -> list[State]:
    """The states that a change leads the run through, from the one before it to the one after it."""
    assert change.step is not None
    now: dict[int, Saved] = dict(before)
    way = [before]
    if change.kind in ("save", "force"):
        assert change.stamp is not None
        now[change.step] = (change.stamp, change.loss)
        way.append(_state(now))
    if change.kind == "record" and change.step in now:
        now[change.step] = (now[change.step][0], change.loss)
        way.append(_state(now))
    if change.kind in ("force", "rollback"):
        # From the oldest on, so that the newest is the old one until the new one is.
        for newer in sorted(step for step in now if step > change.step):
            del now[newer]
            way.append(_state(now))
    if change.kind == "delete" and change.step in now:
        del now[change.step]
        way.append(_state(now))
    if change.kind in ("save", "force", "record"):
        losses = {step: math.nan if loss is None else loss for step, (_, loss) in now.items()}
        for doomed in sorted(now.keys() - change.keep.kept(losses)):
            del now[doomed]
            way.append(_state(now))
    return way


def _state(saved: Mapping[int, Saved]) -> State:
    return tuple(sorted(saved.items()))


def _steps(state: State) -> tuple[int, ...]:
    return tuple(step for step, _ in state)


# ------------------------------------------------------------------ reads


class _Timeline:
    def __init__(self, moments: Sequence[_Moment]) -> None:
        self._states = [moment.states for moment in moments]
        self._since_ns = [moment.since_ns for moment in moments]
        # A moment may end before an earlier one that overlaps it; the largest end so far never shrinks.
        self._until_ns: list[float] = []
        for moment in moments:
            self._until_ns.append(max(moment.until_ns, self._until_ns[-1] if self._until_ns else -math.inf))

    def window(self, read: Operation) -> dict[int, frozenset[State]]:
        """{number: possible states} of the moments that may have been while `read` was under way."""
        assert read.end_ns is not None
        first = bisect.bisect_left(self._until_ns, read.begin_ns)
        numbers = range(first, bisect.bisect_right(self._since_ns, read.end_ns))
        return {number: self._states[number] for number in numbers}


def _explains(state: State, read: Operation) -> bool:
    """Whether the run may have been in `state` when `read` looked."""
    saved = dict(state)
    newest = max(saved, default=None)
    match read.kind:
        case "restore newest":
            return newest == read.step and (newest is None or saved[newest][0] == read.stamp)
        case "newest":
            return newest == read.step
        case "restore step":
            return _holds(saved, read)
        case "restore best":
            return not saved if read.refused else _holds(saved, read)
        case "metadata":
            return _holds(saved, read) and (bool(read.refused) or _same(saved[read.step or 0][1], read.loss))
        case "verify":
            return (read.step in saved) != bool(read.refused)
    return True  # what looks at several steps, one after another, is judged by all moments together


def _listed(moments: Sequence[frozenset[State]], read: Operation) -> bool:
    """Each step that was listed was there at one moment, and each that was not was missing at one."""
    states = [set(_steps(state)) for moment in moments for state in moment]
    listed = set(read.steps or ())
    return listed <= set().union(*states) and set.intersection(*states) <= listed


def _was_best(moments: Sequence[frozenset[State]], read: Operation) -> bool:
    """The step was the best one; where a change came in between, it was one of the run's."""
    states = [dict(state) for moment in moments for state in moment]
    if len(moments) == 1:
        return any(read.step == _best(saved) for saved in states)
    return any(read.step in saved or read.step == _best(saved) for saved in states)


_JOINED = {"steps": _listed, "best": _was_best}


def _holds(saved: Mapping[Any, Saved], read: Operation) -> bool:
    if read.refused:
        return read.step not in saved
    return read.step in saved and saved[read.step][0] == read.stamp


def _same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


def _best(saved: Mapping[int, Saved]) -> int | None:
    finite = {step: loss for step, (_, loss) in saved.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], -step)) if finite else None


def _register(read: Operation) -> Hashable:
    """What the read looked at, where reads of the same thing can be put in an order."""
    if read.kind in ("restore newest", "newest"):
        return "newest"
    return read.step if read.kind in ("restore step", "metadata", "verify") else None


def _backward_reads(reads: Sequence[tuple[Operation, int, int]]) -> Iterator[str]:
    """Of two reads, one after the other, the second may not see an earlier moment than the first has seen."""
    ended = sorted(reads, key=lambda item: item[0].end_ns or 0)
    position, seen, witness = 0, -1, None
    for read, _, last in sorted(reads, key=lambda item: item[0].begin_ns):
        while position < len(ended) and (ended[position][0].end_ns or 0) < read.begin_ns:
            if ended[position][1] > seen:
                seen, witness = ended[position][1], ended[position][0]
            position += 1
        if last < seen:
            yield f"back in time: {read} after {witness}"
