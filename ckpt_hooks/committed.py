"""What is a checkpoint: which directories were committed, by us or by Orbax."""

from __future__ import annotations

import os
from typing import Any

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.metadata import METADATA_FILE, read_step_metadata
from ckpt_hooks.storage.checksums import FILE
from ckpt_hooks.storage.commit import COMMIT_MARKER, TMP_SUFFIX
from ckpt_hooks.storage.lookup import blocks_of, is_directory, is_file, is_there
from ckpt_hooks.tree import METADATA_FILE as TREE_METADATA_FILE
from ckpt_hooks.tree import STRUCTURE_FILE

__all__ = ["has_early_tree", "is_committed", "is_incomplete", "is_temporary"]


def is_temporary(path: Any) -> bool:
    """Whether the name says that this is not a checkpoint yet."""
    return TMP_SUFFIX in os.path.basename(os.fspath(path))


def is_committed(path: Any) -> bool:
    """Whether a directory is a checkpoint: it has a commit marker, or what Orbax left when it wrote none.

    An empty directory is not one, and neither is one whose step metadata has no commit time.
    """
    directory = os.fspath(path)
    if is_temporary(directory) or not is_there(directory) or not is_directory(directory):
        return False
    if is_there(os.path.join(directory, COMMIT_MARKER)):
        return True
    if is_incomplete(directory):
        return False
    names = (METADATA_FILE, FILE, TREE_METADATA_FILE)
    if any(is_there(os.path.join(directory, name)) for name in names):
        return True
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return False  # removed since the first look at it
    inside = [directory, *(os.path.join(directory, name) for name in entries)]
    return any(is_there(os.path.join(path, TREE_METADATA_FILE)) or has_early_tree(path) for path in inside)


def has_early_tree(directory: str) -> bool:
    """Whether a directory holds a tree as Orbax wrote it at first: a file `checkpoint` that is a msgpack map."""
    path = os.path.join(directory, STRUCTURE_FILE)
    try:
        return is_file(path) and next(blocks_of(path), b"")[:1] in _MAPS  # TensorFlow's file of this name is text
    except FileNotFoundError:  # removed in between
        return False


_MAPS = frozenset(bytes([code]) for code in (*range(0x80, 0x90), 0xDE, 0xDF))


def is_incomplete(directory: str) -> bool:
    """Whether a save has begun here and has not come to its end."""
    if is_there(os.path.join(directory, COMMIT_MARKER)):
        return False
    try:
        metadata = read_step_metadata(directory)
    except CorruptCheckpointError:
        return False  # damaged, which is something else: whoever reads it is told
    return metadata is not None and metadata.commit_timestamp_nsecs is None
