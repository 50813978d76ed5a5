"""`Checkpointer` and `AsyncCheckpointer`: one checkpoint, whole or not at all.

A save, in order (each barrier is passed by every process, the primary does the rest)::

    barrier save_start -> is the destination free? -> stage (refuse early; take the state) -> temporary path
    -> handler writes -> step metadata -> barrier save -> handler finalizes, commit -> barrier finalize

`AsyncCheckpointer` returns after the temporary path is made; the rest happens in one background thread.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from etils import epath

from ckpt_hooks import events, processes
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    DestinationExistsError,
    IncompleteCheckpointError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    SaveFailedError,
    explain_os_error,
)
from ckpt_hooks.handlers.base import (
    CheckpointArgs,
    construct_checkpoint_args,
    get_registered_handler_cls,
    stage_with,
)
from ckpt_hooks.handlers.composite import CompositeCheckpointHandler
from ckpt_hooks.handlers.legacy import LegacyHandler, recorded_name, wrap_legacy
from ckpt_hooks.metadata import (
    METADATA_FILE,
    MetadataStore,
    StepMetadata,
    check_custom_metadata,
    metadata_store,
    read_step_metadata,
)
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FileChecksums
from ckpt_hooks.temporary_paths import AtomicRenameTemporaryPath, FileOptions, TemporaryPath, is_committed

__all__ = ["AsyncCheckpointer", "Checkpointer"]

DEFAULT_TIMEOUT_SECS = 600.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Save:
    """A save between its beginning and its commit."""

    final: epath.Path
    temporary: TemporaryPath
    operation: int
    custom_metadata: Mapping[str, Any]
    metrics: Mapping[str, Any]
    on_commit: Callable[[], None] | None
    start_secs: float
    write: Callable[[epath.Path], None] | None = None


class Checkpointer:
    """Saves and restores one checkpoint with a handler; a save is committed when the call returns.

    Args:
      handler: what is saved and restored; one that registered no args classes is used in the old way, with
        its own arguments.
      multiprocessing_options: which processes take part and which commits.
      file_options: how directories are made.
      checkpoint_metadata_store: how the step metadata is read and written; must block here.
      temporary_path_class: how the commit is made; `AtomicRenameTemporaryPath` where None.

    >>> import numpy as np, tempfile
    >>> from ckpt_hooks import Checkpointer, StandardCheckpointHandler
    >>> path = tempfile.mkdtemp() + "/first"
    >>> with Checkpointer(StandardCheckpointHandler()) as checkpointer:
    ...     checkpointer.save(path, {"w": np.arange(3.0)}, custom_metadata={"epoch": 1})
    ...     print(checkpointer.restore(path), checkpointer.metadata(path).custom_metadata)
    {'w': array([0., 1., 2.])} {'epoch': 1}
    """

    _needs_blocking_store = True

    def __init__(
        self,
        handler: Any,
        *,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
        checkpoint_metadata_store: MetadataStore | None = None,
        temporary_path_class: type[TemporaryPath] | None = None,
    ) -> None:
        self._handler = wrap_legacy(handler)
        self._multiprocessing_options = multiprocessing_options or MultiprocessingOptions()
        self._multiprocessing_options.check_membership()
        store = checkpoint_metadata_store
        if store is not None and not store.is_blocking_writer and self._needs_blocking_store:
            raise InvalidArgumentError("Checkpointer needs a metadata store that blocks; this one does not")
        self._store = store or metadata_store(
            enable_write=self._multiprocessing_options.is_primary(), blocking_write=True
        )
        self._temporary_path_class = temporary_path_class or AtomicRenameTemporaryPath
        self._path_options: dict[str, Any] = {
            "checkpoint_metadata_store": self._store,
            "file_options": file_options or FileOptions(),
            "multiprocessing_options": self._multiprocessing_options,
        }
        self._barrier_timeout_secs = processes.DEFAULT_BARRIER_TIMEOUT_SECS
        self._is_primary = self._multiprocessing_options.is_primary()
        self._store_blocks = self._store.is_blocking_writer
        self._is_alone = processes.count() == 1
        self._barrier_prefix = self._multiprocessing_options.key("")
        self._stage = getattr(self._handler, "stage", None) or functools.partial(stage_with, self._handler)
        self._handler_names: Callable[[], dict[str, str] | str] = (
            self._handler.item_handler_names
            if isinstance(self._handler, CompositeCheckpointHandler)
            else functools.partial(recorded_name, self._handler)
        )
        self.failure: SaveFailedError | None = None
        events.record_event(events.CHECKPOINTER_INIT)

    # -------------------------------------------------------------- saving

    def save(
        self,
        directory: Any,
        *args: Any,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves into `directory`, which must not exist.

        What to save is given as an args object (``args=args.StandardSave(state)``), or as the arguments of
        the args class that the handler registered (``save(path, state)``).

        Args:
          directory: an absolute or relative path; its parents are made.
          force: whether a checkpoint that is there gives way, once the new one is durable.
          custom_metadata: {string: JSON}, kept in the step metadata.

        Raises:
          DestinationExistsError: (ValueError) something is there.
          UnsupportedLeafError, NameCollisionError, NotSerializableError: before anything is written.
          DiskFullError, UnwritableDirectoryError: (OSError) nothing is left behind.
        """
        save_args = self._construct_args(True, args, kwargs)
        self.save_args(_absolute(directory), save_args, force=force, custom_metadata=custom_metadata)

    def save_args(self, directory: epath.Path, args: CheckpointArgs, **options: Any) -> None:
        """`save`, with one args object and the options that a `CheckpointManager` has besides.

        Args:
          options: `force` and `custom_metadata` as in `save`; `metrics`, recorded beside them; and
            `on_commit`, called in the primary process after the commit.
        """
        save = self._begin(directory, args, **options)
        try:
            self._complete(save, "save", "finalize")
        except BaseException as error:
            failure = self._failed(save, error)
            raise failure from error if failure is not error else error.__cause__

    def _begin(
        self,
        final: epath.Path,
        args: CheckpointArgs,
        *,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        on_commit: Callable[[], None] | None = None,
    ) -> _Save:
        """All that must happen before the caller may change the state."""
        start_secs = time.perf_counter()
        events.record_event(events.WRITE_START)
        temporary = self._temporary_path_class.from_final(final, **self._path_options)
        temporary.replaces = force
        operation = next(processes.operation_ids)
        save = _Save(final, temporary, operation, {}, metrics or {}, on_commit, start_secs)
        try:
            save.custom_metadata = check_custom_metadata(custom_metadata)
            self._barrier("save_start", operation)
            if os.path.lexists(final):
                self._check_destination(final, force=force)
            staged = self._stage(args)
            staged_secs = time.perf_counter()
            events.record_duration_secs(events.WRITE_STAGE_SECS, staged_secs - start_secs)
            self._create(temporary, final, staged.nbytes, operation)
            if staged.begin is not None:
                staged.begin(temporary.get())
            save.write = staged.write
            events.record_scalar(events.WRITE_BYTES, staged.nbytes)
            events.record_duration_secs(events.WRITE_DIRECTORY_SECS, time.perf_counter() - staged_secs)
        except BaseException as error:
            failure = self._failed(save, error)
            raise failure from error if failure is not error else error.__cause__
        return save

    def _create(self, temporary: TemporaryPath, final: epath.Path, nbytes: int, operation: int) -> None:
        self._barrier("create_tmp_directory:pre", operation)
        if self._is_primary:
            commit.require_free_bytes(os.fspath(final), nbytes)
            temporary.create()
        self._barrier("create_tmp_directory:post", operation)
        if not self._is_primary:
            temporary.join()

    def _complete(self, save: _Save, written: str, committed: str) -> None:
        """Everything after the state has been taken, to the commit."""
        start_secs = time.perf_counter()
        path = save.temporary.get()
        if save.write is not None:
            save.write(path)
        if not self._is_primary:
            commit.sync_tree(os.fspath(path))  # the primary syncs what it sees; a network file system may lag
        written_secs = time.perf_counter()
        events.record_duration_secs(events.WRITE_ITEMS_SECS, written_secs - start_secs)
        self._barrier(written, save.operation)
        if self._is_primary:
            self._commit(save, path)
            events.record_duration_secs(events.WRITE_COMMIT_SECS, time.perf_counter() - written_secs)
        self._barrier(committed, save.operation)
        if self._is_primary and save.on_commit is not None:
            save.on_commit()
        events.record_event(events.WRITE_SUCCESS)
        events.record_duration_secs(events.WRITE_TOTAL_SECS, time.perf_counter() - save.start_secs)

    def _commit(self, save: _Save, path: epath.Path) -> None:
        self._store.update(
            path / METADATA_FILE,
            custom_metadata=dict(save.custom_metadata),
            item_handlers=self._handler_names(),
            metrics=dict(save.metrics),
        )
        self._handler.finalize(path)
        save.temporary.finalize()

    def _failed(self, save: _Save, error: BaseException) -> BaseException:
        """Clears up after a save that failed, and reports it; the error to raise says what to do."""
        if self._is_primary:
            try:
                save.temporary.discard()
            except OSError as second:
                _log.warning("cannot remove the failed save at %s: %s", save.final, second)
        events.record_event(events.WRITE_FAILURE, reason=type(error).__name__)
        _log.error("saving %s failed: %s: %s", save.final, type(error).__name__, error)
        if not isinstance(error, OSError):
            return error
        return explain_os_error(error, f"saving {save.final}")

    def _check_destination(self, final: epath.Path, *, force: bool) -> None:
        if not os.path.isdir(final):
            raise DestinationExistsError(f"{final} is a file; a checkpoint is a directory. Choose another path.")
        begun = os.path.exists(final / METADATA_FILE)
        if force and (begun or is_committed(final) or not os.listdir(final)):
            return
        if force:
            raise DestinationExistsError(
                f"{final} is there and is no checkpoint; force=True replaces only checkpoints. Choose another path."
            )
        in_place = self._temporary_path_class.writes_in_place
        if in_place and begun and not self._temporary_path_class.is_finalized(final):
            return  # what a writer that died has left
        raise DestinationExistsError(
            f"destination {final} already exists. Choose another path, or pass force=True to replace it once the "
            "new checkpoint is durable."
        )

    # -------------------------------------------------------------- restoring

    def restore(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Restores from `directory`, with arguments in the same three forms as `save`.

        Raises CheckpointNotFoundError where there is nothing, IncompleteCheckpointError where a save was
        never committed, CorruptCheckpointError where the bytes are not what was saved.
        """
        path = self._committed_path(directory)
        start_secs = time.perf_counter()
        events.record_event(events.READ_START)
        try:
            checksums = FileChecksums.of_checkpoint(os.fspath(path), METADATA_FILE)
            if checksums is not None:
                composite = isinstance(self._handler, CompositeCheckpointHandler)
                checksums.check(os.fspath(path), below="" if composite else None)
            restored = self._handler.restore(path, args=self._construct_args(False, args, kwargs))
        except BaseException:
            events.record_event(events.READ_FAILURE)
            raise
        self._barrier("restore", processes.next_operation_id())
        events.record_event(events.READ_SUCCESS)
        events.record_duration_secs(events.READ_TOTAL_SECS, time.perf_counter() - start_secs)
        return restored

    def metadata(self, directory: Any) -> StepMetadata:
        """The step metadata, with what the handler tells of its items."""
        path = self._committed_path(directory)
        metadata = read_step_metadata(os.fspath(path)) or StepMetadata()
        try:
            items = self._handler.metadata(path)
        except (FileNotFoundError, NotImplementedError, ValueError, TypeError) as error:
            if isinstance(self._handler, CompositeCheckpointHandler):
                raise
            _log.warning("%s: no item metadata: %s", path, error)
            items = None
        return dataclasses.replace(metadata, item_metadata=items)

    def _committed_path(self, directory: Any) -> epath.Path:
        path = _absolute(directory)
        if not os.path.isdir(path):
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}")
        if not self._temporary_path_class.is_finalized(path):
            raise IncompleteCheckpointError(
                f"Found incomplete checkpoint at {path}: its save was never committed. Restore an older one."
            )
        return path

    # -------------------------------------------------------------- parts

    @property
    def handler(self) -> Any:
        """The handler as it was given."""
        return self._handler.wrapped if isinstance(self._handler, LegacyHandler) else self._handler

    def get_temporary_path(self, directory: Any) -> TemporaryPath:
        """Where a checkpoint for `directory` is written before it is committed; nothing is created."""
        return self._temporary_path_class.from_final(_absolute(directory), **self._path_options)

    async def create_temporary_path(self, temporary_path: TemporaryPath) -> epath.Path:
        """Makes the directory of a temporary path, between the same barriers as a save does."""
        self._create(temporary_path, temporary_path.get_final(), 0, processes.next_operation_id())
        return temporary_path.get()

    def synchronize_next_awaitable_signal_operation_id(self) -> int:
        """The next operation's id, which every process counts alike."""
        return processes.next_operation_id()

    def close(self) -> None:
        """Closes the handler and the metadata store."""
        self._handler.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _construct_args(self, for_save: bool, args: Any, kwargs: Any) -> CheckpointArgs:
        constructed = construct_checkpoint_args(self._handler, for_save, *args, **kwargs)
        expected = get_registered_handler_cls(constructed)
        if not isinstance(self._handler, expected):
            raise InvalidArgumentTypeError(
                f"{type(constructed).__qualname__} is for {expected.__qualname__}, and this checkpointer has a "
                f"{type(self.handler).__qualname__}"
            )
        return constructed

    def _barrier(self, name: str, operation: int) -> None:
        key = f"{self._barrier_prefix}Checkpointer:{name}.{operation}"
        if self._is_alone:
            events.record_duration_secs(events.BARRIER_SECS, 0.0, key=key)
        else:
            processes.barrier(key, self._multiprocessing_options, self._barrier_timeout_secs)


class AsyncCheckpointer(Checkpointer):
    """A `Checkpointer` whose `save` returns as soon as the state is taken, and commits in the background.

    One save runs at a time: the next one waits for it. A failure is raised once, as SaveFailedError, by the next
    call of any method. A program that ends right after a save commits it first; if that fails, it says so and exits
    with a code that is not 0.

    Args:
      timeout_secs: bounds every wait for another process.

    >>> import numpy as np, tempfile
    >>> from ckpt_hooks import AsyncCheckpointer, StandardCheckpointHandler
    >>> path = tempfile.mkdtemp() + "/first"
    >>> with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
    ...     checkpointer.save(path, {"w": np.arange(3.0)})
    ...     checkpointer.wait_until_finished()
    ...     print(checkpointer.restore(path))
    {'w': array([0., 1., 2.])}
    """

    _needs_blocking_store = False

    def __init__(self, handler: Any, *, timeout_secs: float = DEFAULT_TIMEOUT_SECS, **options: Any) -> None:
        if timeout_secs <= 0:
            raise InvalidArgumentError(f"timeout_secs is positive, got {timeout_secs}")
        super().__init__(handler, **options)
        self._barrier_timeout_secs = timeout_secs
        self._thread: threading.Thread | None = None
        self._is_idle = threading.Event()
        self._is_idle.set()
        events.record_event(events.ASYNC_CHECKPOINTER_INIT)

    def save_args(self, directory: epath.Path, args: CheckpointArgs, **options: Any) -> None:
        start_secs = time.perf_counter()
        self.wait_until_finished()
        save = self._begin(directory, args, **options)
        # Not a daemon: the interpreter waits for it, so a program that ends now still commits.
        self._thread = threading.Thread(target=self._run, args=(save,), name=f"ckpt_hooks-save-{directory.name}")
        self._is_idle.clear()
        try:
            if not threading.main_thread().is_alive():
                raise RuntimeError("the interpreter is ending, and waits for no thread that starts now")
            self._thread.start()
        except RuntimeError:
            self._run(save)
        events.record_duration_secs(events.WRITE_BLOCKING_SECS, time.perf_counter() - start_secs)

    def _run(self, save: _Save) -> None:
        try:
            name = save.final.name
            self._complete(save, f"async_write_complete.{name}", f"async_commit_complete.{name}")
        except BaseException as error:
            failure = SaveFailedError(f"the background save of {save.final} failed: {error}")
            failure.__cause__ = self._failed(save, error)
            self.failure = failure
            _untold.add(self)
        finally:
            self._is_idle.set()

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return not self._is_idle.is_set()

    def wait_until_finished(self) -> None:
        """Waits for the save in flight; raises its failure, once."""
        if self._thread is not threading.current_thread():
            # Not join(): if Ctrl-C interrupts it, Python 3.11 takes the thread for ended, and at its exit drops it.
            self._is_idle.wait()
        if not self._store_blocks:
            self._store.wait_until_finished()
        if self.failure is not None:
            self.check_for_errors()

    def check_for_errors(self) -> None:
        """Raises the failure of a background save, once; does not wait."""
        error, self.failure = self.failure, None
        _untold.discard(self)
        if error is not None:
            raise error

    def restore(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        self.wait_until_finished()
        return super().restore(directory, *args, **kwargs)

    def metadata(self, directory: Any) -> StepMetadata:
        self.check_for_errors()
        return super().metadata(directory)

    def close(self) -> None:
        try:
            self.wait_until_finished()
        finally:
            super().close()


_untold: set[AsyncCheckpointer] = set()  # those with a failure; nobody else may hold them any more


@atexit.register
def _exit_loudly() -> None:
    """A failure that nobody has been told of must not end in exit code 0."""
    failures = [checkpointer.failure for checkpointer in list(_untold) if checkpointer.failure]
    if failures:
        for failure in failures:
            print(f"ckpt_hooks: {failure}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _absolute(directory: Any) -> epath.Path:
    path = os.fspath(epath.Path(directory))
    if "://" in path:
        raise InvalidArgumentError(f"{path}: only local and mounted directories can be used")
    return epath.Path(os.path.abspath(path))
