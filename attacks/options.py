"""The command line that the attacks share."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from attacks.libraries import LIBRARIES
from attacks.states import KINDS

__all__ = ["empty_directory", "parser_of"]


def parser_of(
    description: str | None, operations: Sequence[str], *, orbax_every: int, kinds: Sequence[str] = KINDS
) -> argparse.ArgumentParser:
    """For an attack; `operations` are those that it knows, `kinds` the states that it takes by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=operations, default=operations, help="default: all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=kinds, help=f"default: {' '.join(kinds)}")
    parser.add_argument(
        "--libraries", nargs="+", choices=LIBRARIES, default=["ours", "orbax"], help="default: ours orbax"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="strike at every N-th call only")
    parser.add_argument(
        "--orbax-every",
        type=int,
        default=orbax_every,
        metavar="N",
        help="of these, every N-th for Orbax, which is slow (default: %(default)s)",
    )
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the runs are, and are removed")
    parser.add_argument("--json", metavar="FILE", help="append the results, one line a run")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="print the first N failures of each library")
    return parser


@contextlib.contextmanager
def empty_directory(parent: str) -> Iterator[str]:
    """A new directory, as a real path, that is gone afterwards."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="attack-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
