"""How long it takes several processes to save and restore one state that is spread over all their devices.

    python -m benchmarks.processes
    python -m benchmarks.processes --processes 2 --workloads many --rounds 9

Each group is real: processes of `jax.distributed` on this machine, with two CPU devices each and gloo between them.
They save one checkpoint and restore it, each its own part, by turns with ours and with Orbax; the files are in the
page cache. All begin at once, and the time is that of the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import sharded
from benchmarks.options import Options, empty_directory, parser_of
from benchmarks.process_groups import Nursery
from benchmarks.report import Report
from benchmarks.timing import Series
from benchmarks.workloads import Workload

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, workloads=("many", "big"))
    parser.add_argument("--processes", nargs="+", type=int, default=(2, 4), help="of each group (default: 2 4)")
    parsed = parser.parse_args(argv)
    options = Options.of(parsed)
    report = Report("processes", options)
    with Nursery() as nursery, empty_directory(options.directory) as directory:
        for workload in options.workloads:
            for count in parsed.processes:
                folder = Path(directory, f"{workload.name}_{count}")
                what, measured = _compared(nursery, folder, count, workload, options)
                for quantity, series in measured.items():
                    report.add(f"{workload.name}: {what}; {quantity} by {count} processes", "ms", series)
    report.close()


def _compared(
    nursery: Nursery, folder: Path, count: int, workload: Workload, options: Options
) -> tuple[str, dict[str, Series]]:
    """What process 0 reports; all others report the same."""
    ended = nursery.run_group(sharded.compare, folder, count, workload.name, options.scale, options.rounds)
    for number, process in enumerate(ended):
        if process.code != 0:
            raise RuntimeError(f"process {number} of {count} ended with code {process.code}:\n{process.log}")
    what, measured = ended[0].report
    return what, measured


if __name__ == "__main__":
    main()
