"""What each of several processes does in `benchmarks.processes`: it saves and restores in step with the others.

A barrier stands before each timed action, and what counts is the time of the slowest process.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.contestants import CONTROL, ORBAX, OURS, Saver, savers
from benchmarks.timing import Measurement, Series, alternate, seconds_of
from benchmarks.workloads import WORKLOADS, State, abstract, describe, num_bytes

__all__ = ["compare", "spread"]

CONTESTANTS = (OURS, CONTROL, *ORBAX)


def compare(folder: Path, workload: str, scale: float, rounds: int) -> tuple[str, dict[str, Series]]:
    """(what was saved, {"save" or "restore": {contestant: ms, one value a round}}), the same in every process."""
    state = spread(WORKLOADS[workload].make(scale))
    chosen = [saver for saver in savers() if saver.name in CONTESTANTS]
    everybody = {str(folder / str(number)): saver for number, saver in enumerate(chosen)}
    for path, saver in everybody.items():
        _check(saver, path, state)  # and so both have run once before the clock does
    again = str(folder / "again")
    saves = {saver.name: functools.partial(_save, saver, again, state) for saver in chosen}
    restores = {saver.name: functools.partial(_restore, saver, path, state) for path, saver in everybody.items()}
    state_bytes = num_bytes(state) // jax.process_count()
    return describe(state), {
        **alternate(saves, rounds, warm_ups=0, state_bytes=state_bytes, num_processes=jax.process_count()),
        **alternate(restores, rounds, warm_ups=0, state_bytes=state_bytes, num_processes=jax.process_count()),
    }


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


def _save(saver: Saver, path: str, state: State) -> Measurement:
    measured = _slowest_ms(lambda: saver.save(path, state))
    if jax.process_index() == 0:
        shutil.rmtree(path)
    return {"save": measured}


def _restore(saver: Saver, path: str, state: State) -> Measurement:
    like = abstract(state)
    return {"restore": _slowest_ms(lambda: jax.block_until_ready(saver.restore(path, like)))}


def _slowest_ms(action: Callable[[], object]) -> float:
    multihost_utils.sync_global_devices("all are here")
    secs = seconds_of(action)
    return 1e3 * float(np.max(multihost_utils.process_allgather(np.array(secs))))


def _check(saver: Saver, path: str, state: State) -> None:
    """What is restored is what was saved, bit by bit, and where it was."""
    saver.save(path, state)
    restored = saver.restore(path, abstract(state))
    assert jax.tree.all(jax.tree.map(_is_equal, state, restored)), saver.name


def _is_equal(saved: jax.Array, found: jax.Array) -> bool:
    return found.sharding == saved.sharding and all(
        np.array_equal(np.asarray(one.data), np.asarray(other.data))
        for one, other in zip(saved.addressable_shards, found.addressable_shards, strict=True)
    )
