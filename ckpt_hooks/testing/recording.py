"""Records every change that this process makes below a directory, in the order in which it was made.

Python's own file functions are replaced while a recording runs: those of `os`, `open`, and `renameat2` through
ctypes, also where a module has imported them by name. What native code writes by itself (tensorstore, a memory
map, `ndarray.tofile`) is not seen; the log is replayed at the end, and an error tells what it does not explain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ckpt_hooks.testing.operations import Image, Mark, Operation, read_tree
from ckpt_hooks.testing.recorder import Recorder

__all__ = ["IncompleteRecordingError", "Recording", "record"]


class IncompleteRecordingError(RuntimeError):
    """The directory is not what the recorded operations make of it."""


class Recording:
    """A log of operations, and the tree that they began with.

    Attributes:
      base: the tree before the first operation, all of it durable.
      operations: in the order in which they were carried out.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.base = Image()
        self.operations: list[Operation] = []

    def mark(self, label: str) -> None:
        """Notes that something has been reported, such as that a save is durable: a crash state knows its marks."""
        self.operations.append(Mark(label))

    def replay(self) -> Image:
        """The tree after all operations."""
        image = self.base.copy()
        for operation in self.operations:
            image.apply(operation)
        return image

    def check(self) -> None:
        """Raises IncompleteRecordingError unless the operations explain the directory as it is now."""
        replayed, found = self.replay().tree(), read_tree(self.directory)
        names = sorted(name for name in replayed.keys() | found.keys() if replayed.get(name, 0) != found.get(name, 0))
        if names:
            raise IncompleteRecordingError(
                f"{self.directory}: {names[:5]} ({len(names)} in all) changed in a way that was not recorded. Only "
                "what Python itself does to files is: write them without native code and memory maps, from this "
                "process, and open them after the recording has begun."
            )


@contextlib.contextmanager
def record(directory: Any) -> Iterator[Recording]:
    """Records what this process does below `directory`, which must be there, with all its threads.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, record(directory) as log:
    ...     with open(f"{directory}/a", "wb") as file:
    ...         _ = file.write(b"x")
    ...         file.flush()
    ...         os.fsync(file.fileno())
    ...     os.rename(f"{directory}/a", f"{directory}/b")
    >>> [type(operation).__name__ for operation in log.operations]
    ['Create', 'Write', 'Sync', 'Rename']
    """
    recording = Recording(os.path.abspath(os.fspath(directory)))
    with Recorder(recording.directory, recording.base, recording.operations).installed():
        yield recording
    recording.check()
