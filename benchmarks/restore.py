"""How long a restore into JAX arrays takes, the files being in the page cache.

    python -m benchmarks.restore

Everybody restores a checkpoint of its own into the shapes, dtypes and shardings that it is told, until the arrays are
ready. Once, before the clock runs, they are compared with what was saved. ``raw`` reads one file into fresh memory,
and makes no arrays.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.contestants import Saver, savers
from benchmarks.options import empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate, seconds_of
from benchmarks.workloads import State, abstract, describe

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("restore", options)
    for workload in options.workloads:
        state = workload.make(options.scale)
        like, title = abstract(state), f"{workload.name}: {describe(state)}"
        with empty_directory(options.directory) as directory:
            runs = {}
            for number, saver in enumerate(savers()):
                path = os.path.join(directory, str(number))
                saver.save(path, saver.prepare(state))
                _check(saver, path, state, like)
                runs[saver.name] = functools.partial(_restore, saver, path, like)
            del state
            report.add(title, "ms", alternate(runs, options.rounds)["restore"])
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
