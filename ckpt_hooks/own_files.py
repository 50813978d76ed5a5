"""Which files of a save another process has written, and makes durable itself.

Were every process to sync all files that it sees, a save by N processes would take N x N syncs; and what another
machine has in its cache, only that machine can sync. Of a file that is not known here, such as a handler of yours
writes, nobody knows who wrote it: every process syncs it.
"""

from __future__ import annotations

import re

from ckpt_hooks import processes
from ckpt_hooks.metadata import METADATA_FILE
from ckpt_hooks.storage.ocdbt import MANIFEST_FILE
from ckpt_hooks.storage.per_process import ARRAY_FILE, DATA_FOLDER, PROCESS_FILE
from ckpt_hooks.tree import METADATA_FILE as TREE_METADATA_FILE
from ckpt_hooks.tree import OWN_ARRAY_METADATA, SHARDING_FILE, STRINGS_FILE

__all__ = ["is_of_another"]

_PER_PROCESS = re.compile(
    rf"/(?:{DATA_FOLDER}/([0-9a-f]{{32}})|{ARRAY_FILE}(?:\.(\d+))?|{PROCESS_FILE.pattern})$"
).search
_OF_THE_FIRST = re.compile(
    rf"/(?:{METADATA_FILE}|{TREE_METADATA_FILE}|{SHARDING_FILE}|{STRINGS_FILE}|{MANIFEST_FILE}"
    rf"|{OWN_ARRAY_METADATA})$"
).search


def is_of_another(rank: int, path: str) -> bool:
    """Whether the file at `path` is that of a process which is not the one of this rank.

    >>> [is_of_another(1, path) for path in ("/7/params/_ARRAY_CHECKSUMS.1", "/7/params/_ARRAY_CHECKSUMS.2", "/7/mine")]
    [False, True, False]
    """
    found = _PER_PROCESS(path)
    if found is None:
        return rank != 0 and _OF_THE_FIRST(path) is not None
    if found[3]:
        return found[3] != str(processes.index())
    return rank != (int(found[1], 16) if found[1] else int(found[2] or 0))
