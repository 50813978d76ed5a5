"""How the time grows with leaves, with bytes and with kept checkpoints: with which power of them, and how much.

    python -m benchmarks.growth
    python -m benchmarks.growth --max-bytes 4294967296 --rounds 5

An exponent of 1 is linear growth, 0 is none. It is fitted where the fixed cost no longer counts: to sizes of at least
1,000 leaves, 16 MiB, and to all numbers of checkpoints. The factor is the largest figure over the smallest. Figures
are medians, except that of the first save of a structure, for which its plan is made: there is only one.

leaves: arrays of 1 KiB.    bytes: one array.    kept: checkpoints of three small leaves in one run.

Of kept checkpoints: `latest_step` of a new manager has to list the directory, `again` is the same manager's next
call; `start-up` is all of what a new process does: open, restore the newest, save the next.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.contestants import savers
from benchmarks.options import Options, empty_directory, parser_of
from benchmarks.report import Report
from benchmarks.timing import Series, seconds_of
from benchmarks.workloads import WORKLOADS, Shapes, State, abstract, noise
from ckpt_hooks import CheckpointManager

__all__ = ["main"]

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--max-leaves", type=int, default=100_000)
    parser.add_argument("--max-bytes", type=int, default=_GIB)
    parser.add_argument("--max-kept", type=int, default=10_000)
    parsed = parser.parse_args(argv)
    if parsed.tiny:
        parsed.max_leaves, parsed.max_bytes, parsed.max_kept = 10, 16 * _KIB, 10
    options = Options.of(parsed)
    report = Report("growth", options)

    leaves = _powers(1, 10, parsed.max_leaves)
    report.add_growth("leaves", "ms", leaves, _of_states(leaves, _many_leaves, options), linear_from=1000)
    nbytes = _powers(_KIB, 4, parsed.max_bytes)
    report.add_growth("bytes", "ms", nbytes, _of_states(nbytes, _one_leaf, options), linear_from=16 * _MIB)
    kept = _powers(1, 10, parsed.max_kept)
    report.add_growth("kept", "ms", kept, _of_runs(kept, options))
    report.close()


def _powers(first: int, factor: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


def _median_ms(rounds: int, action: Callable[[], object], clean_up: Callable[[], object] = lambda: None) -> float:
    def once() -> float:
        os.sync()
        seconds = seconds_of(action)
        clean_up()
        return seconds

    return 1e3 * statistics.median(once() for _ in range(rounds))


# ------------------------------------------------------------------ leaves and bytes


def _many_leaves(number: int) -> Shapes:
    return {f"leaf_{leaf}": (_KIB // 4,) for leaf in range(number)}


def _one_leaf(nbytes: int) -> Shapes:
    return {"leaf": (nbytes // 4,)}


def _of_states(sizes: Sequence[int], shapes: Callable[[int], Shapes], options: Options) -> Series:
    ours = savers()[0]
    series: Series = {"first save": [], "save": [], "restore": []}
    _time_state(noise({"warm": (1,), "up": (1,)}), ours.save, ours.restore, options)
    for size in sizes:
        times = _time_state(noise(shapes(size)), ours.save, ours.restore, options)
        for values, milliseconds in zip(series.values(), times, strict=True):
            values.append(milliseconds)
    return series


def _time_state(
    state: State, save: Callable[[str, State], object], restore: Callable[[str, State], object], options: Options
) -> tuple[float, float, float]:
    with empty_directory(options.directory) as directory:
        path = os.path.join(directory, "checkpoint")
        save_state = functools.partial(save, path, state)
        first = _median_ms(1, save_state)
        shutil.rmtree(path)
        later = _median_ms(options.rounds, save_state, functools.partial(shutil.rmtree, path))
        save_state()
        like = abstract(state)
        restored = _median_ms(options.rounds, lambda: jax.block_until_ready(restore(path, like)))
    return first, later, restored


# ------------------------------------------------------------------ kept checkpoints

# No process starts within the tick of the clock in which the directory changed last; if one did, it would list twice.
_TICK_SECS = 0.02


def _of_runs(sizes: Sequence[int], options: Options) -> Series:
    series: Series = {}
    state = WORKLOADS["tiny"].make(1.0)
    with empty_directory(options.directory) as run:
        for size in sizes:
            _fill(run, state, size)
            for name, milliseconds in _time_run(run, state, size, options).items():
                series.setdefault(name, []).append(milliseconds)
    return series


def _time_run(run: str, state: State, size: int, options: Options) -> dict[str, float]:
    like, median_ms = abstract(state), functools.partial(_median_ms, options.rounds)

    def remove_next() -> None:
        shutil.rmtree(os.path.join(run, str(size + 1)))
        time.sleep(_TICK_SECS)

    with CheckpointManager(run) as manager:
        assert manager.latest_step() == size
        return {
            "open": median_ms(lambda: CheckpointManager(run).close()),
            "latest_step": median_ms(lambda: CheckpointManager(run).latest_step()),
            "again": median_ms(lambda: [manager.latest_step() for _ in range(100)]) / 100,
            "restore": median_ms(lambda: jax.block_until_ready(manager.restore(like))),
            "first save": median_ms(lambda: _save_next(run, state, size + 1), remove_next),
            "start-up": median_ms(lambda: _start_up(run, like, state, size + 1), remove_next),
        }


def _save_next(run: str, state: State, step: int) -> None:
    """Takes the lock, looks at what there is, saves."""
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        manager.save(step, state)


def _start_up(run: str, like: State, state: State, step: int) -> None:
    with CheckpointManager(run, keep=None, async_save=False) as manager:
        jax.block_until_ready(manager.restore(like))
        manager.save(step, state)


def _fill(run: str, state: State, number: int) -> None:
    """Checkpoints of the steps 1 to `number`; all but the first are its files under other names."""
    if not os.listdir(run):
        _save_next(run, state, 1)
    for step in range(2, number + 1):
        path = os.path.join(run, str(step))
        if not os.path.exists(path):
            shutil.copytree(os.path.join(run, "1"), path, copy_function=os.link)


if __name__ == "__main__":
    main()
