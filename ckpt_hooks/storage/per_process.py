"""The names of files of which a checkpoint has one for each process that wrote it."""

from __future__ import annotations

import re

from ckpt_hooks import processes

__all__ = ["ARRAY_FILE", "DATA_FOLDER", "PROCESS_FILE", "array_file", "is_for_another", "process_file"]

ARRAY_FILE = "_ARRAY_CHECKSUMS"
DATA_FOLDER = "d"
PROCESS_FILE = re.compile(r"process_(\d+)-of-(\d+)\.json")
_OF_ONE_PROCESS = re.compile(rf"(?:.*/)?(?:{PROCESS_FILE.pattern}|{ARRAY_FILE}\.[1-9]\d*)", re.DOTALL).fullmatch


def array_file(rank: int) -> str:
    """The table of checksums of the data file of a process, by its place among those that write."""
    return ARRAY_FILE if rank == 0 else f"{ARRAY_FILE}.{rank}"


def process_file(process: int, count: int) -> str:
    """What an iterator's state is in, in one of so many processes; Grain's name for it.

    >>> process_file(1, 4)
    'process_1-of-4.json'
    """
    return f"process_{process}-of-{count}.json"


def is_for_another(path: str) -> bool:
    """Whether a restore by this process may have no use for a file: whoever has reads it, and checks it then.

    Were each process to check all files, a restore by N processes would read N x N.

    >>> is_for_another("params/_ARRAY_CHECKSUMS.2"), is_for_another("data/process_0-of-1.json")
    (True, False)
    """
    found = _OF_ONE_PROCESS(path)
    if found is None or found[1] is None:
        return found is not None
    return found[1] != str(processes.index()) and found[2] == str(processes.count())
