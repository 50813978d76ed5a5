"""Fair comparison on a machine that is never quiet: alternating rounds, medians, and ratios within a round.

A round runs every contestant once, in an order that is shuffled anew, so that a slow minute of the machine meets all
of them and nobody always follows the same neighbour. The ratio of two contestants is taken round by round.
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Measurement", "Series", "Spread", "alternate", "ratios", "seconds_of"]

_TOUCHED_STATES = 8  # of two, a restore of 1.5 GB beside 12 GB in the page cache still met memory that was not at hand
_SPARED_BYTES = 1 << 30

Measurement = Mapping[str, float]  # {quantity: value}, of one run
Series = dict[str, list[float]]  # {contestant: one value a round}


def seconds_of(action: Callable[[], object]) -> float:
    """How long `action` takes; what it returns is freed after the clock has stopped."""
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    del result
    return seconds


def alternate(
    runs: Mapping[str, Callable[[], Measurement]],
    rounds: int,
    *,
    warm_ups: int = 1,
    state_bytes: int = 0,
    num_processes: int = 1,
) -> dict[str, Series]:
    """{quantity: {contestant: values}} of `rounds` alternating rounds, after `warm_ups` that do not count.

    Before each turn, each of `num_processes` makes the machine have its free memory at hand, up to some states of
    `state_bytes`.
    """
    shuffled = random.Random(0)
    quantities: dict[str, Series] = {}
    for number in range(-warm_ups, rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            os.sync()  # nobody writes back what another one left in the page cache
            _touch_memory(min(_TOUCHED_STATES * state_bytes, _free_bytes() // num_processes))
            gc.collect()
            measured = runs[name]()
            if number >= 0:
                for quantity, value in measured.items():
                    quantities.setdefault(quantity, {}).setdefault(name, []).append(value)
    return {
        quantity: {name: series[name] for name in runs if name in series} for quantity, series in quantities.items()
    }


def _free_bytes() -> int:
    """Memory that can be had without taking any from the page cache."""
    return max(0, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE - _SPARED_BYTES)


def _touch_memory(num_bytes: int) -> None:
    """Takes that much memory from the system, and gives it back."""
    if num_bytes:
        with mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            for start in range(0, num_bytes, mmap.PAGESIZE):
                memory[start] = 1


def ratios(series: Series, one: str, other: str) -> list[float]:
    """`one` / `other`, round by round."""
    return [a / b if b else float("nan") for a, b in zip(series[one], series[other], strict=True)]


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle of some values, and how far they go."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))
