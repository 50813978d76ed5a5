"""How much a save in the background slows the training loop in front of it.

    python -m benchmarks.interference
    python -m benchmarks.interference --secs 10

Saves follow one another for `--secs` (and at least one save) while a loop runs in front of them:

training: steps per second of a small network, trained by JAX on all cores, between the starts of saves.
lost: milliseconds of training that one save costs in all, its start included.
python: turns per second of a loop in plain Python. It competes for the interpreter's lock, as a data pipeline does.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from benchmarks.contestants import BackgroundSaver, background_savers
from benchmarks.options import Options, empty_directory, parser_of
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate
from benchmarks.workloads import State, describe, num_bytes

__all__ = ["main"]

_NO_SAVE = "no save"


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, workloads=("many", "gpt2"))
    parser.add_argument("--secs", type=float, default=2.0, help="of each loop (default: %(default)s)")
    parsed = parser.parse_args(argv)
    options, secs = Options.of(parsed), 0.05 if parsed.tiny else parsed.secs
    report = Report("interference", options)
    train = _trainer()
    nobody = BackgroundSaver(_NO_SAVE, start=lambda path, state: None, wait=lambda: time.sleep(secs))
    for workload in options.workloads:
        state = workload.make(options.scale)
        runs = {
            saver.name: functools.partial(_interfere, saver, state, train, secs, options.directory)
            for saver in (*background_savers(), nobody)
        }
        measured = alternate(runs, options.rounds, state_bytes=num_bytes(state))
        alone = measured["training"][_NO_SAVE]
        lost = {
            name: [
                1e3 * (total - steps / rate)
                for total, steps, rate in zip(totals, measured["steps per save"][name], alone, strict=True)
            ]
            for name, totals in measured["secs per save"].items()
            if name != _NO_SAVE
        }
        title = f"{workload.name}: {describe(state)}"
        report.add(f"{title}; training", "steps/s", measured["training"])
        report.add(f"{title}; lost", "ms", lost)
        report.add(f"{title}; python", "turns/s", measured["python"])
    report.close()


def _interfere(
    saver: BackgroundSaver, state: State, train: Callable[[], None], secs: float, parent: str
) -> Measurement:
    with empty_directory(parent) as directory:
        steps, step_secs, saves, total_secs = _loop(saver, state, train, secs, os.path.join(directory, "training"))
        turns, turn_secs, _, _ = _loop(saver, state, _turn, secs, os.path.join(directory, "python"))
    return {
        "training": steps / step_secs,
        "steps per save": steps / saves,
        "secs per save": total_secs / saves,
        "python": turns / turn_secs,
    }


def _loop(
    saver: BackgroundSaver, state: State, step: Callable[[], None], secs: float, path: str
) -> tuple[int, float, int, float]:
    """(steps while saves were in flight, their seconds, saves, seconds in all)."""
    steps = saves = 0
    step_secs = 0.0
    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as waiter:
        while time.perf_counter() - begin < secs:
            saver.start(f"{path}_{saves}", state)
            saves += 1
            committed: Future[object] = waiter.submit(saver.wait)
            start = time.perf_counter()
            while not committed.done():
                step()
                steps += 1
            step_secs += time.perf_counter() - start
            committed.result()
    return steps, step_secs, saves, time.perf_counter() - begin


def _trainer() -> Callable[[], None]:
    """A step of a few milliseconds."""
    weights = jnp.full((256, 256), 1e-3)
    batch = jnp.ones((64, 256))

    def loss(weights: jax.Array) -> jax.Array:
        hidden = batch
        for _ in range(8):
            hidden = jnp.tanh(hidden @ weights)
        return jnp.mean(hidden**2)

    @jax.jit
    def update(weights: jax.Array) -> jax.Array:
        return weights - 1e-3 * jax.grad(loss)(weights)

    def train() -> None:
        nonlocal weights
        weights = jax.block_until_ready(update(weights))

    train()  # compiles
    return train


def _turn() -> None:
    for _ in range(1000):
        pass


if __name__ == "__main__":
    main()
