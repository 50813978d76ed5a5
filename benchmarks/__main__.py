"""All tables, one after another, each in a process of its own.

    python -m benchmarks --rounds 5 --json history.jsonl

Every option is handed on to every table.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

TABLES = ("save", "restore", "blocking", "interference", "hook", "growth", "processes")


def main(argv: Sequence[str]) -> int:
    """The number of tables that failed; the others run all the same."""
    commands = [[sys.executable, "-m", f"benchmarks.{table}", *argv] for table in TABLES]
    return sum(subprocess.run(command).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
