"""Reading one committed checkpoint with a handler: verified, timed, reported; whole, also while a writer changes it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

from ckpt_hooks import events
from ckpt_hooks.errors import CheckpointError, CheckpointNotFoundError
from ckpt_hooks.handlers.base import CheckpointArgs, method_of
from ckpt_hooks.handlers.composite import CompositeCheckpointHandler
from ckpt_hooks.metadata import METADATA_FILE, MetadataStore, StepMetadata, read_step_metadata
from ckpt_hooks.storage.checksums import FILE, FileChecksums
from ckpt_hooks.storage.lookup import ReadOnce, is_named

__all__ = ["Watch", "describe_checkpoint", "read_checkpoint", "read_unchanged"]

_T = TypeVar("_T")
_MAX_READS = 100  # a writer replaces a checkpoint more slowly than a reader opens it, except by chance

_log = logging.getLogger(__name__)


def read_checkpoint(handler: Any, path: epath.Path, args: CheckpointArgs) -> Any:
    """What `handler` restores from `path`. Raises CorruptCheckpointError where the bytes are not what was saved."""
    start_secs, directory = time.perf_counter(), os.fspath(path)
    events.record_event(events.READ_START)
    try:
        with ReadOnce():
            checksums = FileChecksums.of_checkpoint(directory, METADATA_FILE)
            if checksums is not None:
                # A composite checks each item that it restores; the others need not be whole.
                composite = isinstance(handler, CompositeCheckpointHandler)
                checksums.check(directory, below="" if composite else None)
            restored = handler.restore(path, args=args)
    except BaseException:
        events.record_event(events.READ_FAILURE)
        raise
    events.record_event(events.READ_SUCCESS)
    events.record_duration_secs(events.READ_TOTAL_SECS, time.perf_counter() - start_secs)
    return restored


def describe_checkpoint(handler: Any, path: epath.Path, store: MetadataStore | None = None) -> StepMetadata:
    """The step metadata of `path`, with what `handler` tells of its items.

    A store with a `read` of its own is asked first: it may keep them elsewhere. What it does not have is in the file.
    """
    asked = store if store is not None and type(store).read is not MetadataStore.read else None  # ours hides damage
    content = asked.read(path / METADATA_FILE) if asked is not None else None
    saved = read_step_metadata(os.fspath(path)) if content is None else StepMetadata.from_json(content)
    metadata = saved or StepMetadata()
    try:
        items = method_of(handler, "metadata")(path)
    except (FileNotFoundError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(handler, CompositeCheckpointHandler):
            raise
        _log.warning("%s: no item metadata: %s", path, error)
        items = None
    return dataclasses.replace(metadata, item_metadata=items)


def read_unchanged(
    path: str, read: Callable[[], _T], *, is_doubtful: Callable[[_T], bool] = lambda result: False
) -> _T:
    """What `read` makes of the checkpoint at `path`, as it was at one moment; readers take no lock.

    A writer may remove the checkpoint in the meantime, put another one in its place or record metrics in it. So what
    was read of a checkpoint that is no longer the one at `path` is read anew, lest it be half of each; and an error
    (or a result that `is_doubtful`) counts only if the checkpoint is as it was.

    Raises CheckpointNotFoundError where it was removed while it was read, and whatever `read` raises.
    """
    for _ in range(_MAX_READS):
        watch = Watch(path)
        with contextlib.closing(watch):
            try:
                result = read()
                doubtful = is_doubtful(result)
            except Exception as error:
                if watch.is_gone():
                    raise CheckpointNotFoundError(f"{path} was removed while it was read") from error
                if watch.is_same():
                    raise
                continue
            if doubtful and watch.is_gone():
                raise CheckpointNotFoundError(f"{path} was removed while it was read")
            if watch.is_gone() or (watch.is_same() if doubtful else watch.is_in_place()):
                return result
    raise CheckpointError(f"{path} was replaced {_MAX_READS} times, each time while it was read: read another step")


class Watch:
    """A checkpoint at the beginning of a read, to be compared with what is there at its end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        try:
            # While the directory is open, no other one gets its inode number.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
        except OSError:
            self.close()  # whatever it is, `read` will say it better
            return
        self._directory = status.st_dev, status.st_ino
        self._checksums = _identity(os.path.join(path, FILE))

    def is_gone(self) -> bool:
        """Whether nothing is at the path now."""
        return not is_named(self._path)

    def is_in_place(self) -> bool:
        """Whether the checkpoint is the one at the path, whatever was recorded in it."""
        if self._descriptor is None:
            return True
        return _identity(self._path)[:2] == self._directory

    def is_same(self) -> bool:
        """Whether it is in place and nothing was recorded in it, which replaces the checksums, first and last."""
        return self.is_in_place() and (
            self._descriptor is None or self._checksums == _identity(os.path.join(self._path, FILE))
        )

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _identity(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
