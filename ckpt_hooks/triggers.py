"""When a checkpoint is due. Pure: the step and the time are arguments.

A trigger fires when the step reaches, or jumps over, one of its marks, so a loop that advances by a hundred steps
at a time misses none.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator

from ckpt_hooks.arguments import require_secs
from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError

__all__ = ["Triggers"]

NEVER = 1 << 62  # a step that no run reaches


@dataclasses.dataclass(frozen=True)
class Triggers:
    """Saves every `every_n_steps` steps, every `every_secs` seconds, and at `on_steps`.

    >>> triggers = Triggers(every_n_steps=10, on_steps=(3,))
    >>> [triggers.next_step(after) for after in (0, 3, 9, 10)]
    [3, 10, 10, 20]
    """

    every_n_steps: int | None = None
    every_secs: float | None = None
    on_steps: tuple[int, ...] = ()

    @classmethod
    def checked(cls, every_n_steps: int | None, every_secs: float | None, on_steps: Iterable[int]) -> Triggers:
        """Raises ValueError or TypeError for what cannot be meant; every 1000 steps where nothing is given."""
        if not isinstance(on_steps, Iterable):
            raise InvalidArgumentTypeError(f"on_steps are steps, as in ({on_steps!r},); got {on_steps!r}")
        steps = tuple(sorted({check_step(step, "on_steps") for step in on_steps}))
        if every_n_steps is not None and check_step(every_n_steps, "every_n_steps") == 0:
            raise InvalidArgumentError("every_n_steps=0 would save never or always; give a positive number, or None")
        if every_secs is not None:
            require_secs(every_secs, "every_secs")
            every_secs = float(every_secs)  # of NumPy's, too
        if every_n_steps is None and every_secs is None and not steps:
            every_n_steps = 1000
        return cls(every_n_steps, every_secs, steps)

    def next_step(self, after: int) -> int:
        """The first step beyond `after` at which a checkpoint is due by the count of steps."""
        return next(self.marks(after))

    def marks(self, after: int) -> Iterator[int]:
        """All those steps, ascending (one may come twice) and without end."""
        position = bisect.bisect_right(self.on_steps, after)
        ends = (self.on_steps[position:], itertools.repeat(NEVER))
        if self.every_n_steps is None:
            return itertools.chain(*ends)
        multiples = itertools.count((after // self.every_n_steps + 1) * self.every_n_steps, self.every_n_steps)
        return heapq.merge(multiples, *ends) if ends[0] else multiples

    def next_secs(self, after_secs: float) -> float:
        """The time, on the clock of `after_secs`, at which a checkpoint is due by time."""
        return math.inf if self.every_secs is None else after_secs + self.every_secs


def check_step(step: object, what: str = "step, the number of updates that the state has seen,") -> int:
    """A step, or another count, as an int; TypeError for what is no integer, ValueError for a negative one.

    >>> check_step(7)
    7
    """
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise InvalidArgumentTypeError(f"{what} is an int; got {step!r} ({type(step).__name__})")
    try:
        value = step.__index__()
    except TypeError as error:
        raise InvalidArgumentTypeError(f"{what} is one int; got {step!r}: {error}") from None
    if value < 0:
        raise InvalidArgumentError(f"{what} is not negative; got {value}")
    return int(value)
