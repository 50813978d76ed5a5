"""What one save and one restore cost from 1 to 10,000 processes: counted by a model, timed from costs measured here.

    python -m benchmarks.scale
    python -m benchmarks.scale --max-entries 10000          # quicker

index: what process 0 does for all, by the entries of the index (a leaf has one, and one for each of its chunks).
coordination: a line in JAX's coordination service, by how many there are: each process puts one at each barrier.
model: the counts of `saved` and `restored`, and the seconds that follow from the costs above, without the arrays'
own bytes, which all processes write and read side by side. `tests/test_scale.py` holds the counts against 1, 2, 4
and 8 real processes. docs/scale.md explains both.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.options import Options, empty_directory, parser_of
from benchmarks.report import Report, text_table
from benchmarks.timing import seconds_of
from ckpt_hooks import leaves, tree
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import digest
from ckpt_hooks.storage.layout import ArraySpec, Layout
from ckpt_hooks.storage.lookup import read_file
from ckpt_hooks.storage.reader import Database
from ckpt_hooks.storage.writer import ArrayWriter, Sources

__all__ = ["Counts", "main", "restored", "saved"]

_CUTS = 8  # chunks of a leaf, where there are as many processes
_OWNERS = 1000  # of the chunks of an index that is measured
_CHUNK_FLOATS = 512  # 2 KiB: no chunk stands in the index itself
_CLAIM = "x" * 150  # a line as processes put it at a barrier
_ENTRIES = (1_000, 10_000, 100_000, 1_000_000)
_PROCESSES = (1, 8, 64, 512, 4096, 10_000)
_LEAVES = (100, 10_000, 1_000_000)


# ------------------------------------------------------------------ the model


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one operation takes, for an item that is the whole checkpoint.

    Attributes:
      files: that are made, or opened by one process.
      syncs: by process 0; by each other process at most.
      entries: of the index that process 0 writes, or that each process reads.
      lines: that all processes together put into the coordination service.
    """

    files: int
    syncs: tuple[int, int]
    entries: int
    lines: int


def saved(num_processes: int, num_leaves: int, cuts: int) -> Counts:
    """One save of leaves that are cut into `cuts` chunks each.

    >>> saved(4, 1000, cuts=8)
    Counts(files=15, syncs=(13, 5), entries=9000, lines=20)
    """
    others = num_processes - 1
    files = 9 + 2 * others  # a data file and its checksums each
    # Its own files; the directories of the checkpoint, of the data and of the array metadata; and of the run.
    syncs = (9 + 3 + 1, 2 + 3 if others else 0)
    return Counts(files, syncs, num_leaves * (1 + cuts), _lines(num_processes, barriers=5))


def restored(num_processes: int, num_leaves: int, cuts: int, *, data_files: int) -> Counts:
    """One restore by processes each of which needs chunks of `data_files` data files.

    >>> restored(4, 1000, cuts=8, data_files=1).lines
    4
    """
    files = 8 + 2 * (data_files - 1)  # all but the commit marker; the tables of the data files that it reads
    return Counts(files, (0, 0), num_leaves * (1 + cuts), _lines(num_processes, barriers=1))


def _lines(num_processes: int, barriers: int) -> int:
    """Each other process says that it is there, and process 0 answers all with one line."""
    return barriers * num_processes if num_processes > 1 else 0


@dataclasses.dataclass(frozen=True)
class _Costs:
    """In seconds: an index entry planned, written, read; a leaf in the tree's files; a line put, got; a file summed."""

    plan: float
    write: float
    read: float
    leaf: float
    put: float
    get: float
    small_file: float

    def barrier_secs(self, num_processes: int) -> float:
        """Lines come in while process 0 looks; its last look reads them all."""
        return num_processes * (self.put + self.get) if num_processes > 1 else 0.0

    def saved_secs(self, num_processes: int, num_leaves: int) -> tuple[float, float]:
        """(the first save of a structure, a later one)."""
        counts = saved(num_processes, num_leaves, min(num_processes, _CUTS))
        later = counts.entries * self.write + 5 * self.barrier_secs(num_processes)
        later += counts.files * self.small_file  # process 0 sums the tables of all
        return later + counts.entries * self.plan + num_leaves * self.leaf, later

    def restored_secs(self, num_processes: int, num_leaves: int) -> float:
        counts = restored(num_processes, num_leaves, min(num_processes, _CUTS), data_files=1)
        return counts.entries * self.read + num_leaves * self.leaf + self.barrier_secs(num_processes)


# ------------------------------------------------------------------ what is measured


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--max-entries", type=int, default=_ENTRIES[-1])
    parser.add_argument("--max-lines", type=int, default=_PROCESSES[-1])
    parsed = parser.parse_args(argv)
    if parsed.tiny:
        parsed.max_entries, parsed.max_lines = _ENTRIES[0], 64
    report = Report("scale", Options.of(parsed))
    costs = _Costs(**_index_costs(report, parsed), **_line_costs(report, parsed))
    _print_model(costs)
    report.close()


def _index_costs(report: Report, parsed: argparse.Namespace) -> dict[str, float]:
    sizes = [size for size in _ENTRIES if size <= parsed.max_entries]
    series: dict[str, list[float]] = {name: [] for name in ("plan", "write", "read", "tree files", "bytes an entry")}
    with empty_directory(parsed.directory) as directory:
        for size in sizes:
            found = _time_index(os.path.join(directory, str(size)), size // (1 + _CUTS))
            for name, value in found.items():
                series[name].append(value)
        small_file = os.path.join(directory, "small")
        commit.write_file(small_file, bytes(4096))
        # What process 0 does with a table of another one.
        small_file_secs = statistics.median(seconds_of(lambda: digest(read_file(small_file))) for _ in range(100))
    report.add_growth("index entries", "ms", sizes, series)
    per_entry = {name: series[name][-1] / 1e3 / sizes[-1] for name in ("plan", "write", "read")}
    leaf_secs = series["tree files"][-1] / 1e3 / (sizes[-1] // (1 + _CUTS))
    return {**per_entry, "leaf": leaf_secs, "small_file": small_file_secs}


def _time_index(directory: str, num_leaves: int) -> dict[str, float]:
    """In ms: process 0 of `_OWNERS` plans, writes and syncs the index over all chunks; a process reads it."""
    os.makedirs(directory)
    specs = [_spec(number) for number in range(num_leaves)]
    start = time.perf_counter()
    layout = Layout(specs, _OWNERS, only=0)
    planned = time.perf_counter()
    own = np.zeros(_CHUNK_FLOATS, np.float32)
    for name, content in ArrayWriter(layout, 0, Sources([own] * len(layout.chunk_nbytes[0]))).write(directory).items():
        commit.write_file(os.path.join(directory, name), content)
    commit.sync_tree(directory)
    written = time.perf_counter()
    assert Database(directory).info(specs[-1].name).shape == specs[-1].shape
    read = time.perf_counter()
    _make_tree_files(num_leaves)
    ended = time.perf_counter()
    index_nbytes = sum(block.nbytes for block in layout.files[0].blocks if block.is_node)
    times = {"plan": planned - start, "write": written - planned, "read": read - written, "tree files": ended - read}
    entries = num_leaves * (1 + _CUTS)
    return {**{name: 1e3 * secs for name, secs in times.items()}, "bytes an entry": index_nbytes / entries}


def _spec(number: int) -> ArraySpec:
    grid = tuple((position, 0) for position in range(_CUTS))
    owners = tuple((number + position * (_OWNERS // _CUTS)) % _OWNERS for position in range(_CUTS))
    shape = (_CUTS * _CHUNK_FLOATS // 8, 8)
    name = f"params.layer_{number // 12:06}.block.kernel_{number % 12}"
    return ArraySpec(name, shape, np.dtype(np.float32), (shape[0] // _CUTS, 8), grid, owners)


def _make_tree_files(num_leaves: int) -> None:
    array = np.zeros(1, np.float32)
    named = tree.flatten({f"layer_{number:06}": array for number in range(num_leaves)})
    plans = [leaves.describe_leaf(leaf.name, leaf.value) for leaf in named]
    leaves.tree_metadata_file(named, plans)
    leaves.sharding_file([leaf.name for leaf in named], plans)
    leaves.array_metadata_file(plans)


def _line_costs(report: Report, parsed: argparse.Namespace) -> dict[str, float]:
    """The coordination service is JAX's own, with one process."""
    from jaxlib import _jax  # what `jax.distributed.initialize` calls, which must come before all other calls

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0)
    client.connect()
    sizes = [size for size in _PROCESSES[1:] if size <= parsed.max_lines]
    series: dict[str, list[float]] = {"put": [], "get": []}
    try:
        for size in sizes:
            start = time.perf_counter()
            for process in range(size):
                client.key_value_set(f"{size}/{process}", _CLAIM)
            put = time.perf_counter()
            assert len(client.key_value_dir_get(f"{size}/")) == size
            series["put"].append(1e3 * (put - start))
            series["get"].append(1e3 * (time.perf_counter() - put))
    finally:
        client.shutdown()
        service.shutdown()
    report.add_growth("lines", "ms", sizes, series)
    return {name: values[-1] / 1e3 / sizes[-1] for name, values in series.items()}


def _print_model(costs: _Costs) -> None:
    head = ["model: processes, leaves", "files", "entries", "lines", "first save, s", "save, s", "restore, s"]
    rows = []
    for num_processes in _PROCESSES:
        for num_leaves in _LEAVES:
            counts = saved(num_processes, num_leaves, min(num_processes, _CUTS))
            first, later = costs.saved_secs(num_processes, num_leaves)
            secs = (first, later, costs.restored_secs(num_processes, num_leaves))
            numbers = (counts.files, counts.entries, counts.lines)
            cells = [*(f"{number:,}" for number in numbers), *(f"{value:.3g}" for value in secs)]
            rows.append([f"{num_processes:,}, {num_leaves:,}", *cells])
    print(f"\n{text_table(head, rows)}", flush=True)


if __name__ == "__main__":
    main()
