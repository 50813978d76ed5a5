"""How long a restore into JAX arrays takes, the files being in the page cache.

    python -m benchmarks.restore

Everybody restores a checkpoint of its own into the shapes, dtypes and shardings that it is told, until the arrays are
ready. Once, before the clock runs, they are compared with what was saved. ``raw`` reads one file into fresh memory,
and makes no arrays. Two more tables are of ours restoring what Orbax wrote, at its defaults and tuned, beside Orbax.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.contestants import CONTROL, ORBAX, OURS, Saver, savers
from benchmarks.options import empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate, seconds_of
from benchmarks.workloads import State, abstract, describe, num_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("restore", options)
    everybody = {saver.name: saver for saver in savers()}
    tables = {"": [(name, name) for name in everybody]}
    for theirs in ORBAX:
        tables[f"; what {theirs} wrote"] = [(reader, theirs) for reader in (OURS, CONTROL, theirs)]
    for workload in options.workloads:
        state = workload.make(options.scale)
        like, title = abstract(state), f"{workload.name}: {describe(state)}"
        state_bytes = num_bytes(state)
        with empty_directory(options.directory) as directory:
            paths = {name: os.path.join(directory, str(number)) for number, name in enumerate(everybody)}
            for name, saver in everybody.items():
                saver.save(paths[name], saver.prepare(state))
            for reader, writer in {pair for pairs in tables.values() for pair in pairs}:
                _check(everybody[reader], paths[writer], state, like)
            del state
            for what, pairs in tables.items():
                runs = {
                    reader: functools.partial(_restore, everybody[reader], paths[writer], like)
                    for reader, writer in pairs
                }
                measured = alternate(runs, options.rounds, state_bytes=state_bytes)
                report.add(f"{title}{what}", "ms", measured["restore"])
    report.close()


def _restore(saver: Saver, path: str, like: State) -> Measurement:
    return {"restore": 1e3 * seconds_of(lambda: jax.block_until_ready(saver.restore(path, like)))}


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
