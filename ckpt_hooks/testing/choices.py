"""All answers to a row of questions, or some of them at random.

A state of a disk is built by a function that asks, wherever more than one thing may have happened. How many questions
there are depends on the answers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

__all__ = ["CONTENT_WAYS", "Chooser", "choose"]

T = TypeVar("T")

CONTENT_WAYS = 5  # all, nothing, size without data, torn, cut off


class Chooser(Protocol):
    """Answers the questions that a state is made of."""

    lost: int

    def keeps(self) -> bool:
        """Whether something that is not durable is on the disk."""

    def pick(self, count: int) -> int:
        """One of `count` possibilities; 0 is the one in which most is kept."""

    def way(self) -> int:
        """In which of its ways a file that was not synced is found; 0 is whole."""


class _Scripted:
    """Answers as the script says, then with 0 (everything is kept)."""

    def __init__(self, script: list[int]) -> None:
        self._script = script
        self.taken: list[tuple[int, int]] = []  # (answer, how many there were)
        self.lost = 0

    def pick(self, count: int) -> int:
        answer = self._script[len(self.taken)] if len(self.taken) < len(self._script) else 0
        self.taken.append((answer, count))
        return answer

    def keeps(self) -> bool:
        return self.pick(2) == 0

    def way(self) -> int:
        answer = self.pick(CONTENT_WAYS)
        self.lost += answer != 0
        return answer


class _Random:
    """Answers at random; how much is kept differs from state to state, so that nearly all and nothing occur too."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names_kept = rng.choice((0.0, 0.5, 0.9, 1.0, 1.0))
        self._contents_kept = rng.choice((0.0, 0.5, 0.9, 0.97, 1.0))
        self.lost = 0

    def pick(self, count: int) -> int:
        return self._rng.randrange(count)

    def keeps(self) -> bool:
        return self._rng.random() < self._names_kept

    def way(self) -> int:
        if self._rng.random() < self._contents_kept:
            return 0
        self.lost += 1
        return self._rng.randrange(1, CONTENT_WAYS)


def choose(build: Callable[[Chooser], T], limit: int, rng: random.Random) -> Iterator[T]:
    """All states, where there are at most `limit`; otherwise so many, at random."""
    first = list(itertools.islice(_all_states(build), limit + 1))
    if len(first) <= limit:
        yield from first
        return
    yield first[0]  # nothing is lost: a crash of the process alone
    for _ in range(limit - 1):
        yield build(_Random(rng))


def _all_states(build: Callable[[Chooser], T]) -> Iterator[T]:
    """Every state: the answers are counted through like the digits of a number."""
    script: list[int] = []
    while True:
        chooser = _Scripted(script)
        yield build(chooser)
        taken = chooser.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        if not taken:
            return
        script = [answer for answer, _ in taken[:-1]] + [taken[-1][0] + 1]
