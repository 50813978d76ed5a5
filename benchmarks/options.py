"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["Options", "Place", "empty_directory", "parse", "parser_of"]

Place = Callable[[], contextlib.AbstractContextManager[str]]  # gives a directory of one's own

_TINY_SCALE = 0.002
_SMALL_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
      rounds: how often everybody runs.
      workloads: what is saved.
      scale: how much of each workload.
      directory: where checkpoints are written, and removed.
      json, plot: files to write, or None.
      tiny: whether only to see that all of it works.
    """

    rounds: int
    workloads: tuple[Workload, ...]
    scale: float
    directory: str
    json: str | None
    plot: str | None
    tiny: bool

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Options:
        return cls(
            rounds=2 if parsed.tiny else parsed.rounds,
            workloads=tuple(WORKLOADS[name] for name in parsed.workloads),
            scale=_TINY_SCALE if parsed.tiny else parsed.scale,
            directory=parsed.directory,
            json=parsed.json,
            plot=parsed.plot,
            tiny=parsed.tiny,
        )


def parser_of(description: str | None, *, workloads: Sequence[str] = tuple(WORKLOADS)) -> argparse.ArgumentParser:
    """For a benchmark with options of its own; `workloads` are the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often everybody runs (default: %(default)s)")
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=workloads, help=f"default: {' '.join(workloads)}"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="how much of each workload (default: all)")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--json", metavar="FILE", help="append the results, one line a run")
    parser.add_argument("--plot", metavar="FILE", help="draw the results; needs matplotlib")
    parser.add_argument("--tiny", action="store_true", help="two rounds of next to nothing: does it work?")
    return parser


def parse(
    description: str | None, argv: Sequence[str] | None, *, workloads: Sequence[str] = tuple(WORKLOADS)
) -> Options:
    """For a benchmark without options of its own."""
    return Options.of(parser_of(description, workloads=workloads).parse_args(argv))


@contextlib.contextmanager
def empty_directory(parent: str, at_end: contextlib.ExitStack | None = None) -> Iterator[str]:
    """A new directory that is gone afterwards; where `at_end` is given, a small one only then.

    An ext4 without a journal gives the inodes of removed files to nobody for a minute, and looks past every one of them
    for each new file: 500 removals made a new file take 490 us instead of 60, and a small save makes a dozen.
    """
    path = tempfile.mkdtemp(prefix="benchmark-", dir=os.path.abspath(parent))
    remove = functools.partial(shutil.rmtree, path, ignore_errors=True)
    try:
        yield path
    finally:
        if at_end is not None and _num_bytes_below(path) <= _SMALL_BYTES:
            at_end.callback(remove)
        else:
            remove()


def _num_bytes_below(directory: str) -> int:
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum(os.lstat(path).st_size for path in paths)
