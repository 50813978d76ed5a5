"""What each of several processes does in `benchmarks.processes`: it saves and restores in step with the others.

A barrier stands before each timed action, and what counts is the time of the slowest process.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.contestants import CONTROL, ORBAX, OURS, Saver, savers
from benchmarks.timing import Measurement, Series, alternate
from benchmarks.workloads import WORKLOADS, State, abstract, describe

__all__ = ["compare", "spread"]

CONTESTANTS = (OURS, CONTROL, *ORBAX)


def compare(folder: Path, workload: str, scale: float, rounds: int) -> tuple[str, dict[str, Series]]:
    """(what was saved, {"save" or "restore": {contestant: ms, one value a round}}), the same in every process."""
    state = spread(WORKLOADS[workload].make(scale))
    paths = (folder / str(number) for number in itertools.count())  # every process counts alike
    everybody = [saver for saver in savers() if saver.name in CONTESTANTS]
    for saver in everybody:
        _check(saver, next(paths), state)
    runs = {saver.name: functools.partial(_save_and_restore, saver, paths, state) for saver in everybody}
    return describe(state), alternate(runs, rounds)


def spread(state: State) -> State:
    """The state over the devices of all processes: each leaf by its first axis that they divide, or on all of them."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("data",))

    def over_devices(leaf: jax.Array) -> jax.Array:
        divides = [n % len(devices) == 0 for n in leaf.shape]
        axes = [*[None] * divides.index(True), "data"] if any(divides) else []
        values = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, PartitionSpec(*axes)), values.__getitem__)

    return jax.block_until_ready(jax.tree.map(over_devices, state))


def _save_and_restore(saver: Saver, paths: Iterator[Path], state: State) -> Measurement:
    path, like = str(next(paths)), abstract(state)
    measured = {
        "save": _slowest_ms(lambda: saver.save(path, state)),
        "restore": _slowest_ms(lambda: jax.block_until_ready(saver.restore(path, like))),
    }
    _remove(path)
    return measured


def _slowest_ms(action: Callable[[], object]) -> float:
    multihost_utils.sync_global_devices("before")
    start_secs = time.perf_counter()
    result = action()
    secs = time.perf_counter() - start_secs
    del result
    return 1e3 * float(np.max(multihost_utils.process_allgather(np.array(secs))))


def _check(saver: Saver, path: Path, state: State) -> None:
    """What is restored is what was saved, bit by bit, and where it was."""
    saver.save(str(path), state)
    restored = saver.restore(str(path), abstract(state))
    assert jax.tree.all(jax.tree.map(_is_equal, state, restored)), saver.name
    multihost_utils.sync_global_devices("checked")
    _remove(str(path))


def _is_equal(saved: jax.Array, found: jax.Array) -> bool:
    return found.sharding == saved.sharding and all(
        np.array_equal(np.asarray(one.data), np.asarray(other.data))
        for one, other in zip(saved.addressable_shards, found.addressable_shards, strict=True)
    )


def _remove(path: str) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(path)
