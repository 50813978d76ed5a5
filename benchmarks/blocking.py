"""What an asynchronous save takes from the training loop.

    python -m benchmarks.blocking

blocking: until the call that starts the save returns; then also per leaf.
stall: blocking, and how much longer the next step takes than one before the save. The step is given its state to reuse
(`donate_argnums`). A saver that only holds on to that memory returns early, and makes the next step look for fresh
memory: blocking alone would not show it.

The next save starts when the one before is committed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import jax

from benchmarks.contestants import BackgroundSaver, background_savers
from benchmarks.options import Place, empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate, seconds_of
from benchmarks.workloads import State, describe, num_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("blocking", options)
    with contextlib.ExitStack() as at_end:
        place = functools.partial(empty_directory, options.directory, at_end)
        for workload in options.workloads:
            training = _Training(workload.make(options.scale))
            runs = {saver.name: functools.partial(_save, saver, training, place) for saver in background_savers()}
            measured = alternate(runs, options.rounds, state_bytes=num_bytes(training.state))
            title = f"{workload.name}: {describe(training.state)}"
            report.add(f"{title}; blocking", "ms", measured["blocking"])
            report.add(f"{title}; per leaf", "us", measured["per leaf"])
            report.add(f"{title}; stall", "ms", measured["stall"])
    report.close()


class _Training:
    """A state that every step replaces, in the memory of the one before."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.num_leaves = len(jax.tree.leaves(state))

    def step(self) -> None:
        self.state = jax.block_until_ready(jax.tree.map(_decay, self.state))


@functools.partial(jax.jit, donate_argnums=0)
def _decay(leaf: jax.Array) -> jax.Array:
    return leaf * 0.999


def _save(saver: BackgroundSaver, training: _Training, place: Place) -> Measurement:
    with place() as directory:
        training.step()
        undisturbed = seconds_of(training.step)
        path = os.path.join(directory, "checkpoint")
        blocking = seconds_of(lambda: saver.start(path, training.state))
        next_step = seconds_of(training.step)
        saver.wait()
    return {
        "blocking": 1e3 * blocking,
        "per leaf": 1e6 * blocking / training.num_leaves,
        "stall": 1e3 * (blocking + next_step - undisturbed),
    }


if __name__ == "__main__":
    main()
