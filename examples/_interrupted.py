"""What the small programs share: their command line, and a run that SIGTERM has to interrupt."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt_hooks import Preempted

__all__ = ["arguments", "preemption_of"]


@contextlib.contextmanager
def arguments(description: str | None, unit: str, default: int) -> Iterator[tuple[int, Path]]:
    """(how many steps or epochs each run has, a directory for the runs), as the command line says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{unit}", type=int, default=default, help=f"of each run (default: {default})")
    parser.add_argument("--directory", type=Path, help="of all runs, a new one (default: temporary)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        yield getattr(args, unit), args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))


def preemption_of(run: Callable[[], object], directory: Path) -> Preempted:
    """What a run that sends itself SIGTERM ends with; exits where it was finished in `directory` before."""
    try:
        run()
    except Preempted as preempted:
        return preempted
    sys.exit(f"It was not interrupted: choose a new --directory, {directory} has finished runs.")
