"""How long a save takes, to durable.

    python -m benchmarks.save
    python -m benchmarks.save --workloads many gpt2 --rounds 9 --json history.jsonl --plot save.png

Everybody saves the same JAX arrays into a fresh place; the clock stops when the checkpoint is as durable as they make
it. The pages that others left are written back, and checkpoints removed, while it does not run. The first save of a
structure, for which plans are made and code is compiled, does not count.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

from benchmarks.contestants import Saver, savers
from benchmarks.options import Place, empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate, seconds_of
from benchmarks.workloads import describe, num_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv)
    report = Report("save", options)
    with contextlib.ExitStack() as at_end:
        place = functools.partial(empty_directory, options.directory, at_end)
        for workload in options.workloads:
            state = workload.make(options.scale)
            runs = {saver.name: functools.partial(_save, saver, saver.prepare(state), place) for saver in savers()}
            measured = alternate(runs, options.rounds, state_bytes=num_bytes(state))
            report.add(f"{workload.name}: {describe(state)}", "ms", measured["save"])
    report.close()


def _save(saver: Saver, prepared: object, place: Place) -> Measurement:
    with place() as directory:
        path = os.path.join(directory, "checkpoint")
        return {"save": 1e3 * seconds_of(functools.partial(saver.save, path, prepared))}


if __name__ == "__main__":
    main()
