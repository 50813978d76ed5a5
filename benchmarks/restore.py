"""How long a restore into JAX arrays takes, the files being in the page cache.

    python -m benchmarks.restore

Everybody restores a checkpoint of its own into the shapes, dtypes and shardings that it is told, until the arrays are
ready, in a process of its own that lives through all rounds. Once, before the clock runs, they are compared with what
was saved. ``raw`` reads one file into fresh memory, and makes no arrays. Two more tables are of ours restoring what
Orbax wrote, at its defaults and tuned, beside Orbax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from benchmarks.contestants import CONTROL, ORBAX, OURS, Saver, savers
from benchmarks.options import Options, empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate
from benchmarks.workers import Worker
from benchmarks.workloads import WORKLOADS, State, Workload, describe, num_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("restore", options)
    names = [saver.name for saver in savers()]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in names}
        for workload in options.workloads:
            with empty_directory(options.directory) as directory:
                paths = {name: os.path.join(directory, str(number)) for number, name in enumerate(names)}
                paths[CONTROL] = paths[OURS]
                _compare(workload, options, report, workers, paths)
    report.close()


def _compare(
    workload: Workload, options: Options, report: Report, workers: Mapping[str, Worker], paths: Mapping[str, str]
) -> None:
    tables = {"": [(name, name) for name in workers]}
    for theirs in ORBAX:
        tables[f"; what {theirs} wrote"] = [(reader, theirs) for reader in (OURS, CONTROL, theirs)]
    pairs = {pair for pairs in tables.values() for pair in pairs}
    # By a process that ends: what it has freed would be lacking for everybody's turns.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        title, state_bytes = pool.submit(_prepare, workload.name, options.scale, paths, pairs).result()
    for what, readers in tables.items():
        runs = {
            reader: functools.partial(_restore, workers[reader], paths[writer], workload, options.scale)
            for reader, writer in readers
        }
        measured = alternate(runs, options.rounds, state_bytes=state_bytes)
        report.add(f"{title}{what}", "ms", measured["restore"])


def _prepare(name: str, scale: float, paths: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> tuple[str, int]:
    """Saves with everybody, sees that each (reader, writer) gives the state back; returns a title and its bytes."""
    everybody = {saver.name: saver for saver in savers() if saver.name in paths}
    state = WORKLOADS[name].make(scale)
    for writer, path in paths.items():
        if not os.path.exists(path):
            everybody[writer].save(path, everybody[writer].prepare(state))
    for reader, writer in pairs:
        _check(everybody[reader], paths[writer], state, WORKLOADS[name].abstract(scale))
    return f"{name}: {describe(state)}", num_bytes(state)


def _restore(worker: Worker, path: str, workload: Workload, scale: float) -> Measurement:
    return {"restore": 1e3 * worker.restore_secs(path, workload.name, scale)}


def _check(saver: Saver, path: str, state: State, like: State) -> None:
    restored = saver.restore(path, like)
    if isinstance(restored, np.ndarray):  # raw bytes
        assert restored.tobytes() == saver.prepare(state), saver.name
        return
    assert jax.tree.all(jax.tree.map(_is_equal, state, restored)), saver.name


def _is_equal(saved: jax.Array, found: object) -> bool:
    return isinstance(found, jax.Array) and np.array_equal(saved, found)


if __name__ == "__main__":
    main()
