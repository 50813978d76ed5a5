"""Temporary paths: where a checkpoint is while it is not one, and the step that makes it one.

`AtomicRenameTemporaryPath` writes ``<final>.orbax-checkpoint-tmp`` and renames it; `CommitFileTemporaryPath`
writes in place and puts the marker ``commit_success.txt`` last, for storage without an atomic rename.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from etils import epath

from ckpt_hooks.committed import is_committed, is_incomplete, is_temporary
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    DestinationExistsError,
    DiskFullError,
    IncompleteCheckpointError,
    InvalidArgumentError,
    RunLockedError,
)
from ckpt_hooks.metadata import METADATA_FILE, MetadataStore, StepMetadata
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.shared_directory import require_shared, token_of
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FILE, FileChecksums
from ckpt_hooks.storage.commit import COMMIT_MARKER
from ckpt_hooks.storage.lookup import is_directory, is_file, is_named, is_there, local_path

__all__ = [
    "AtomicRenameTemporaryPath",
    "CommitFileTemporaryPath",
    "FileOptions",
    "NestedTemporaryPath",
    "TemporaryPath",
    "absolute_path",
    "accepted_options",
    "check_destination",
    "require_finalized",
    "require_free_bytes",
]


_NEW_METADATA = StepMetadata().to_json()

_ROOT = epath.Path("/")  # from which a path is made in half the time
_MARGIN_BYTES = 1 << 20  # of free space, for what is not array data

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How directories are made.

    Attributes:
      path_permission_mode: the mode of a checkpoint's and its items' directories (such as 0o750); None
        leaves it to the process's umask, which also holds for everything in them.
    """

    path_permission_mode: int | None = None

    def __post_init__(self) -> None:
        mode: Any = self.path_permission_mode
        if mode is not None and (type(mode) is not int or not 0 <= mode <= 0o7777):
            raise InvalidArgumentError(f"path_permission_mode is a mode such as 0o750, or None; got {mode!r}")


class TemporaryPath(abc.ABC):
    """Where one checkpoint is written: `create` it, fill `get()`, `finalize` it into `get_final()`.

    Subclass it to commit in another way, and give the class to `Checkpointer(temporary_path_class=)`. Its `finalize`
    finds the metadata and checksums written (`seal`), and makes all of it durable.

    Attributes:
      replaces: whether a checkpoint that is at the final path already gives way to this one at the commit.
      is_others: of a path, whether it is a file that another process of this save makes durable; None where there is
        no other. If each synced all, a save by N processes would take N x N syncs.
      recorded: fields of the step metadata that `seal` writes, with the commit time.
      store_blocks: whether the metadata store is known to block, and need not be waited for.
      is_committed: whether `finalize` has returned; what fails then must not remove what may be in its place.
    """

    replaces = False
    recorded: Mapping[str, Any] = {}
    is_others: Callable[[str], bool] | None = None
    writes_in_place = False
    store_blocks = False
    is_committed = False
    # For a class that has a constructor of its own.
    _created = False
    _is_sealed = False
    _lock: commit.DirectoryLock | None = None
    _store: MetadataStore | None = None

    def __init__(
        self,
        temporary_path: Any,
        final_path: Any,
        *,
        checkpoint_metadata_store: MetadataStore | None = None,
        file_options: FileOptions | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
    ) -> None:
        self._temporary, self._final = epath.Path(temporary_path), epath.Path(final_path)
        if not os.path.isabs(self._final):
            self._temporary, self._final = absolute_path(temporary_path), absolute_path(final_path)
        self._store = checkpoint_metadata_store
        self._file_options = file_options or FileOptions()
        self._multiprocessing_options = multiprocessing_options or MultiprocessingOptions()

    @classmethod
    @abc.abstractmethod
    def from_final(cls, final_path: Any, **options: Any) -> Self:
        """The temporary path of a final one; `options` as in the constructor."""

    @abc.abstractmethod
    def finalize(self) -> None:
        """The commit. Everything below `get()` is durable before it, and the checkpoint is when it returns."""

    @classmethod
    def is_finalized(cls, path: Any) -> bool:
        """Whether `path` was committed in this class's way."""
        directory = os.fspath(path)
        return is_directory(directory) and not is_temporary(directory) and not is_incomplete(directory)

    def get(self) -> epath.Path:
        """Where to write. Raises ValueError before `create`."""
        if not self._created:
            raise IncompleteCheckpointError(f"{self._temporary} has not been created yet: call create() first")
        return self._temporary

    def get_final(self) -> epath.Path:
        """Where the checkpoint will be."""
        return self._final

    def create(self) -> epath.Path:
        """Makes the directory anew, with the time at which the save began; removes what a dead writer left.

        Raises RunLockedError where a live writer is at work on the same checkpoint.
        """
        path = os.fspath(self._temporary)
        if is_named(path):
            self._remove_stale(path)
        commit.make_directory(path, self._file_options.path_permission_mode)
        self._created = True  # whatever fails from here on, `discard` removes it
        try:
            # While this lock is held, no other writer takes the directory for one that a dead process left.
            self._lock = commit.DirectoryLock(path)
        except (RunLockedError, FileNotFoundError):
            self._created = False  # somebody has taken it for such a one already: what is there now, or soon, is his
            raise
        if self._store is not None:
            fields = {**_NEW_METADATA, "init_timestamp_nsecs": time.time_ns()}
            self._store.write(self._temporary / METADATA_FILE, fields)
        return self._temporary

    def token(self) -> str:
        """What the other processes of a save have to find in the directory, once this one has created it."""
        if not self._created or self._store is None:
            return ""
        self._store.wait_until_finished()
        return token_of(os.path.join(self._temporary, METADATA_FILE))

    def join(self, token: str) -> epath.Path:
        """What `create` is in a process that is not primary: the directory is there already.

        Raises NotSharedError where it is not the primary's.
        """
        require_shared(os.fspath(self._temporary), METADATA_FILE, token)
        self._created = True
        return self._temporary

    def discard(self) -> None:
        """Removes what a failed save has written, so that it does not keep a disk full."""
        try:
            if self._created and not self.is_committed:
                self._settle_store()
                commit.remove_tree(os.fspath(self._temporary))
                self._created = False
        finally:
            self._release()

    def _settle_store(self) -> None:
        """A store that writes in the background must be done before its files are removed."""
        if self._store is None:
            return
        try:
            self._store.wait_until_finished()
        except Exception as error:  # the save has failed already; this must not hide why
            _log.warning("writing the metadata of %s failed: %s", self._final, error)

    def _remove_stale(self, path: str) -> None:
        lock = commit.DirectoryLock(path)  # until it is gone: another writer may have made it just now
        try:
            commit.remove_tree(path)
        finally:
            lock.release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def seal(self, store: MetadataStore | None = None) -> None:
        """Writes the commit time, what is `recorded`, and checksums; what is written after this is not covered by them.

        With a metadata store for a class that keeps none.
        """
        if self._is_sealed:
            return
        path, store = self.get(), self._store or store
        if store is not None:
            store.update(path / METADATA_FILE, **self.recorded, commit_timestamp_nsecs=time.time_ns())
            if not self.store_blocks:
                store.wait_until_finished()
        commit.write_file(os.path.join(path, FILE), FileChecksums.of_directory(os.fspath(path)).encode())
        self._is_sealed = True

    def _write_marker(self) -> None:
        text = f"Checkpoint commit was successful to {self._final}"
        commit.write_file(os.path.join(self._temporary, COMMIT_MARKER), text)


class AtomicRenameTemporaryPath(TemporaryPath):
    """Commits by one rename.

    >>> AtomicRenameTemporaryPath.from_final("/runs/7").get_final().name
    '7'
    """

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> Self:
        final = epath.Path(final_path)
        return cls(final.parent / f"{final.name}{commit.TMP_SUFFIX}", final, **options)

    def finalize(self) -> None:
        path = os.fspath(self.get())
        self.seal()
        self._write_marker()
        commit.sync_tree(path, self.is_others)
        commit.publish(path, os.fspath(self._final), replace=self.replaces)
        self._created = False
        if self._lock is not None:
            self._lock.release()


class NestedTemporaryPath(AtomicRenameTemporaryPath):
    """An item inside a checkpoint that is temporary itself: the checkpoint's commit makes both durable."""

    def create(self) -> epath.Path:
        path = os.fspath(self._temporary)
        try:
            commit.make_directory(path, self._file_options.path_permission_mode)
        except FileExistsError:  # the checkpoint's directory is fresh: another process of this save was first
            if not is_directory(path):
                raise
        self._created = True
        return self._temporary

    def finalize(self) -> None:
        self._write_marker()
        commit.rename(os.fspath(self.get()), os.fspath(self._final))


class CommitFileTemporaryPath(TemporaryPath):
    """Commits by writing ``commit_success.txt`` last, into the final directory itself."""

    writes_in_place = True
    _replaced: str | None = None

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> Self:
        return cls(final_path, final_path, **options)

    @classmethod
    def is_finalized(cls, path: Any) -> bool:
        return is_file(os.path.join(path, COMMIT_MARKER))

    def create(self) -> epath.Path:
        path = os.fspath(self._final)
        if self.replaces and is_committed(path):
            self._replaced = commit.move_to_replaced(path)
        return super().create()

    def finalize(self) -> None:
        path = os.fspath(self.get())
        self.seal()
        commit.sync_tree(path, self.is_others)
        # The marker only after everything else is durable: it may reach the disk before the rest otherwise.
        self._write_marker()
        commit.sync_file(os.path.join(path, COMMIT_MARKER))
        commit.sync_directory(path)
        commit.sync_directory(os.path.dirname(path))
        self._created = False
        self._release()
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            commit.remove_replaced(replaced)

    def discard(self) -> None:
        try:
            super().discard()
        finally:
            if self._replaced is not None:
                commit.rename(self._replaced, os.fspath(self._final))
                self._replaced = None


# ------------------------------------------------------------------ the final path


def check_destination(final: epath.Path, path_class: type[TemporaryPath], *, force: bool) -> None:
    """Raises DestinationExistsError where what is at `final` may not give way to a checkpoint."""
    if not is_directory(final):
        raise DestinationExistsError(f"{final} is a file; a checkpoint is a directory. Choose another path.")
    begun = is_there(final / METADATA_FILE)
    if force and (begun or is_committed(final) or not os.listdir(final)):
        return
    if force:
        raise DestinationExistsError(
            f"{final} is there and is no checkpoint; force=True replaces only checkpoints. Choose another path."
        )
    if path_class.writes_in_place and begun and not path_class.is_finalized(final):
        return  # what a writer that died has left
    raise DestinationExistsError(
        f"destination {final} already exists. Choose another path, or pass force=True to replace it once the new "
        "checkpoint is durable."
    )


def require_free_bytes(directory: str, said: Mapping[int, int | str]) -> None:
    """Raises DiskFullError where the file system of `directory` has too little room for what all processes write.

    Args:
      said: {process: how many bytes it will write}.
    """
    folder = directory
    while not is_directory(folder):
        folder = os.path.dirname(folder)
    space = os.statvfs(folder)
    free_bytes = space.f_bavail * space.f_frsize
    needed_bytes = sum(map(int, said.values()))
    if free_bytes >= needed_bytes + _MARGIN_BYTES:
        return
    most = max(said, key=lambda process: int(said[process]))
    shares = f" in {len(said)} processes (the most, {int(said[most]):,}, in process {most})" if len(said) > 1 else ""
    raise DiskFullError(
        f"{directory}: the checkpoint needs {needed_bytes:,} bytes{shares} and {free_bytes:,} are free, of which "
        f"{_MARGIN_BYTES:,} are kept for the small files. Nothing was written; free some space, or keep fewer "
        "checkpoints (`keep=`)."
    )


def accepted_options(path_class: type[TemporaryPath], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the options that its `from_final` takes: one that was written for Orbax does not take all of ours."""
    taken = inspect.signature(path_class.from_final).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return options
    return {parameter.name: options[parameter.name] for parameter in taken if parameter.name in options}


def absolute_path(directory: Any) -> epath.Path:
    """A directory as an absolute path. Raises InvalidArgumentError for what is not on a file system."""
    return _ROOT / local_path(os.fspath(directory))


def require_finalized(directory: Any, path_class: type[TemporaryPath]) -> epath.Path:
    """The absolute path of a whole checkpoint; raises for one that is missing or was never committed."""
    path = absolute_path(directory)
    if not path_class.is_finalized(path):
        if not is_directory(path):
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}")
        raise IncompleteCheckpointError(
            f"Found incomplete checkpoint at {path}: its save was never committed. Restore an older one."
        )
    return path
