"""How long a restore into JAX arrays takes, the files being in the page cache.

    python -m benchmarks.restore

Everybody restores a checkpoint of its own into the shapes, dtypes and shardings that it is told, until the arrays are
ready, in a process of its own that lives through all rounds. Once, before the clock runs, they are compared with what
was saved. ``raw`` reads one file into fresh memory, and makes no arrays. Two more tables are of ours restoring what
Orbax wrote, at its defaults and tuned, beside Orbax.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from benchmarks.contestants import CONTROL, ORBAX, OURS, Saver, savers
from benchmarks.options import Options, empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate
from benchmarks.workers import Worker
from benchmarks.workloads import State, Workload, describe, num_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("restore", options)
    everybody = {saver.name: saver for saver in savers()}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in everybody}
        for workload in options.workloads:
            with empty_directory(options.directory) as directory:
                paths = {name: os.path.join(directory, str(number)) for number, name in enumerate(everybody)}
                _compare(workload, options, report, everybody, workers, paths)
    report.close()


def _compare(
    workload: Workload,
    options: Options,
    report: Report,
    everybody: Mapping[str, Saver],
    workers: Mapping[str, Worker],
    paths: Mapping[str, str],
) -> None:
    tables = {"": [(name, name) for name in everybody]}
    for theirs in ORBAX:
        tables[f"; what {theirs} wrote"] = [(reader, theirs) for reader in (OURS, CONTROL, theirs)]
    state = workload.make(options.scale)
    title, state_bytes = f"{workload.name}: {describe(state)}", num_bytes(state)
    for name, saver in everybody.items():
        saver.save(paths[name], saver.prepare(state))
    for reader, writer in {pair for pairs in tables.values() for pair in pairs}:
        _check(everybody[reader], paths[writer], state, workload.abstract(options.scale))
    del state
    for what, pairs in tables.items():
        runs = {
            reader: functools.partial(_restore, workers[reader], paths[writer], workload, options.scale)
            for reader, writer in pairs
        }
        measured = alternate(runs, options.rounds, state_bytes=state_bytes)
        report.add(f"{title}{what}", "ms", measured["restore"])


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
