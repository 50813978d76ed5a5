"""`Checkpointer` and `AsyncCheckpointer`: one checkpoint, whole or not at all.

A save, in order (each barrier is passed by every process, the primary does the rest):
    barrier save_start -> is the destination free? -> args -> stage (refuse early; take the state) -> temporary path
    -> handler writes -> step metadata -> barrier save -> handler finalizes, commit -> barrier finalize
`AsyncCheckpointer` returns after the temporary path is made; the rest happens in one background thread.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from etils import epath

from ckpt_hooks import events, processes
from ckpt_hooks.agreement import OperationBarriers, Together
from ckpt_hooks.arguments import given_or_new
from ckpt_hooks.claims import save_claim
from ckpt_hooks.errors import CheckpointError, InvalidArgumentError, SaveFailedError, explain_os_error
from ckpt_hooks.handlers.base import CheckpointArgs, StagedSave, args_for_handler, method_of
from ckpt_hooks.handlers.legacy import recorded_name, unwrapped, wrap_legacy
from ckpt_hooks.loud_exit import untold
from ckpt_hooks.metadata import MetadataStore, StepMetadata, check_custom_metadata, metadata_store
from ckpt_hooks.own_files import is_of_another
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.reading import describe_checkpoint, read_checkpoint
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.lookup import is_directory, is_named
from ckpt_hooks.temporary_paths import (
    AtomicRenameTemporaryPath,
    FileOptions,
    TemporaryPath,
    absolute_path,
    accepted_options,
    check_destination,
    require_finalized,
    require_free_bytes,
)
from ckpt_hooks.threads import BackgroundTask

__all__ = ["AsyncCheckpointer", "Checkpointer"]

DEFAULT_TIMEOUT_SECS = 600.0
_Args = CheckpointArgs | StagedSave | functools.partial[CheckpointArgs]  # the last are still to be built
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Save:
    """A save between its beginning and its commit."""

    final: epath.Path
    temporary: TemporaryPath
    operation: int
    on_commit: Callable[[], None] | None
    start_secs: float
    write: Callable[[epath.Path], None] | None = None


class Checkpointer:
    """Saves and restores one checkpoint with a handler; a save is committed when the call returns.

    Args:
      handler: what is saved and restored; one without args classes is called in the old way, with its own arguments.
      multiprocessing_options: which processes take part and which commits.
      file_options: how directories are made.
      checkpoint_metadata_store: how the step metadata is read and written; must block here.
      temporary_path_class: how the commit is made; `AtomicRenameTemporaryPath` where None.

    >>> import ckpt_hooks, numpy as np, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> with Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
    ...     checkpointer.save(path, {"w": np.arange(3.0)}, custom_metadata={"epoch": 1})
    ...     print(checkpointer.restore(path), checkpointer.metadata(path).custom_metadata)
    {'w': array([0., 1., 2.])} {'epoch': 1}
    """

    _goes_on = False  # whether training does while a save is written
    task: BackgroundTask | None = None  # the last one that did; it may have ended

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
        self._multiprocessing_options = together = given_or_new(multiprocessing_options, MultiprocessingOptions)
        together.check_membership()
        self._operation_ids = processes.operation_ids(together)
        store = checkpoint_metadata_store or metadata_store(enable_write=together.is_primary(), blocking_write=True)
        self._store, self._store_blocks = store, store.is_blocking_writer()
        if not self._store_blocks and not self._goes_on:
            raise InvalidArgumentError("Checkpointer needs a metadata store that blocks; this one does not")
        self._temporary_path_class = temporary_path_class or AtomicRenameTemporaryPath
        files = given_or_new(file_options, FileOptions)
        options = {"checkpoint_metadata_store": store, "file_options": files, "multiprocessing_options": together}
        self._path_options = accepted_options(self._temporary_path_class, options)
        self._is_primary = together.is_primary()
        self._is_alone, rank = processes.count() == 1, together.writers().ranks[processes.index()]
        self._is_others = None if self._is_alone else functools.partial(is_of_another, rank)
        self._barrier_prefix = together.key("")
        self._barriers = functools.lru_cache(2)(functools.partial(OperationBarriers, options=together))
        self._stage, self._finalize = method_of(self._handler, "stage"), method_of(self._handler, "finalize")
        self._recorded_name = recorded_name(self._handler)
        method_of(self._handler, "take_part")(together)
        self.failure: SaveFailedError | None = None
        self.last_save_secs = 0.0  # from the call to the commit; of the last one that was committed
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
        save_args = functools.partial(args_for_handler, self._handler, True, *args, **kwargs)
        self.save_args(absolute_path(directory), save_args, force=force, custom_metadata=custom_metadata)

    def save_args(self, directory: epath.Path, args: _Args, **options: Any) -> None:
        """`save`, with one args object and the options that a `CheckpointManager` has besides.

        Args:
          args: what to save, what builds it once the destination is known to be free, or what `stage` has made of it.
          options: those of `save`; `metrics`, recorded beside them; `on_commit`, called in the primary after it.
        """
        save = self._begin(directory, args, **options)
        try:
            self._complete(save, "save", "finalize")
        except BaseException as error:
            failure = self._failed(save, error)
            raise failure from error if failure is not error else error.__cause__

    def stage(self, args: CheckpointArgs) -> StagedSave:
        """Takes what `args` wants saved, and refuses what cannot be; for `save_args`, and nothing is written yet."""
        start_secs = time.perf_counter()
        staged: StagedSave = self._stage(args)
        events.record_duration_secs(events.WRITE_STAGE_SECS, time.perf_counter() - start_secs)
        return staged

    def _begin(
        self,
        final: epath.Path,
        args: _Args,
        *,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        on_commit: Callable[[], None] | None = None,
    ) -> _Save:
        """All that must happen before the caller may change the state."""
        start_secs = time.perf_counter()
        events.record_event(events.WRITE_START)
        temporary = self.get_temporary_path(final)
        temporary.replaces, temporary.is_others, temporary.store_blocks = force, self._is_others, self._store_blocks
        operation, options = next(self._operation_ids), self._multiprocessing_options
        save = _Save(final, temporary, operation, on_commit, start_secs)
        try:
            recorded = {"custom_metadata": check_custom_metadata(custom_metadata), "metrics": dict(metrics or {})}
            self._barrier("save_start", operation)
            if self._is_primary and is_named(final):
                check_destination(final, self._temporary_path_class, force=force)
            args = args() if isinstance(args, functools.partial) else args
            staged = args if isinstance(args, StagedSave) else self.stage(args)
            staged_secs = time.perf_counter()
            temporary.recorded = {"item_handlers": staged.item_handlers or self._recorded_name, **recorded}
            claim = ""
            if not self._is_alone:
                claim = save_claim(os.fspath(final), staged.claim, recorded, options, goes_on=self._goes_on)
            self._create(temporary, final, staged.nbytes, operation, claim)
            if staged.begin is not None:
                staged.begin(temporary.get())
            if self._goes_on and staged.detach is not None:
                staged.detach(temporary.get())
            save.write = staged.write
            events.record_scalar(events.WRITE_BYTES, staged.nbytes)
            events.record_duration_secs(events.WRITE_DIRECTORY_SECS, time.perf_counter() - staged_secs)
        except BaseException as error:
            failure = self._failed(save, error)
            raise failure from error if failure is not error else error.__cause__
        return save

    def _create(self, temporary: TemporaryPath, final: epath.Path, nbytes: int, operation: int, claim: str) -> None:
        path = os.fspath(final)
        if self._is_alone or self._multiprocessing_options.primary_host is None:  # storage of its own
            self._barrier("create_tmp_directory:pre", operation, claim)
            require_free_bytes(path, {0: nbytes})
        else:
            hear = functools.partial(require_free_bytes, path)
            self._barriers(operation).meet("create_tmp_directory:pre", claim, said=str(nbytes), hear=hear)
        if self._is_primary:
            temporary.create()
        told = "" if self._is_alone else temporary.token()
        token = self._barrier("create_tmp_directory:post", operation, told=told)
        if not self._is_primary:
            temporary.join(token)

    def _complete(self, save: _Save, written: str, committed: str) -> None:
        """Everything after the state has been taken, to the commit."""
        start_secs = time.perf_counter()
        path = save.temporary.get()
        if save.write is not None:
            save.write(path)
        if not self._is_primary:
            commit.sync_tree(os.fspath(path), self._is_others)  # nobody else can: it may be in this machine's cache
        written_secs = time.perf_counter()
        events.record_duration_secs(events.WRITE_ITEMS_SECS, written_secs - start_secs)
        self._barrier(written, save.operation)
        if self._is_primary:
            self._commit(save)
            events.record_duration_secs(events.WRITE_COMMIT_SECS, time.perf_counter() - written_secs)
        try:
            self._barrier(committed, save.operation)
            if not self._is_alone:
                self._barriers(save.operation).leave()
        finally:
            if self._is_primary and save.on_commit is not None:
                save.on_commit()  # whatever has become of the others: there is a checkpoint now
        events.record_event(events.WRITE_SUCCESS)
        self.last_save_secs = time.perf_counter() - save.start_secs
        events.record_duration_secs(events.WRITE_TOTAL_SECS, self.last_save_secs)

    def _commit(self, save: _Save) -> None:
        self._finalize(save.temporary.get())
        save.temporary.seal(self._store)  # and not in `finalize`, which may be one of the user's
        save.temporary.finalize()
        if not is_directory(save.final):
            raise CheckpointError(f"{type(save.temporary).__qualname__}.finalize() has not made the checkpoint")
        save.temporary.is_committed = True

    def _failed(self, save: _Save, error: BaseException) -> BaseException:
        """Clears up after a save that failed, and reports it; the error to raise says what to do."""
        error = self._barriers(save.operation).fail(error)
        if self._is_primary:
            try:
                save.temporary.discard()
            except Exception as second:
                _log.warning("cannot remove the failed save at %s: %s", save.final, second)
        self.report_failure(save.final, error)
        return explain_os_error(error, f"saving {save.final}") if isinstance(error, OSError) else error

    def report_failure(self, final: epath.Path, error: BaseException) -> None:
        """An event and a log line for a save that failed."""
        events.record_event(events.WRITE_FAILURE, reason=type(error).__name__)
        _log.error("saving %s failed: %s: %s", final, type(error).__name__, error)

    # -------------------------------------------------------------- restoring

    def restore(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Restores from `directory`, with arguments in the same three forms as `save`.

        Raises CheckpointNotFoundError where there is nothing, IncompleteCheckpointError where a save was
        never committed, CorruptCheckpointError where the bytes are not what was saved.
        """
        with Together(self._multiprocessing_options, name="restore"):
            path = require_finalized(directory, self._temporary_path_class)
            restore_args = args_for_handler(self._handler, False, *args, **kwargs)
            return read_checkpoint(self._handler, path, restore_args)

    def metadata(self, directory: Any) -> StepMetadata:
        """The step metadata, with what the handler tells of its items."""
        return describe_checkpoint(self._handler, require_finalized(directory, self._temporary_path_class), self._store)

    @property
    def handler(self) -> Any:
        """The handler as it was given."""
        return unwrapped(self._handler)

    def get_temporary_path(self, directory: Any) -> TemporaryPath:
        """Where a checkpoint for `directory` is written before it is committed; nothing is created."""
        return self._temporary_path_class.from_final(absolute_path(directory), **self._path_options)

    async def create_temporary_path(self, temporary_path: TemporaryPath) -> epath.Path:
        """Makes the directory of a temporary path, between the same barriers as a save does."""
        self._create(temporary_path, temporary_path.get_final(), 0, next(self._operation_ids), "")
        return temporary_path.get()

    def synchronize_next_awaitable_signal_operation_id(self) -> int:
        """The next operation's id, which every process counts alike."""
        return next(self._operation_ids)

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight, in the background."""
        return self.task is not None and self.task.is_running

    def close(self) -> None:
        """Closes the handler and the metadata store."""
        method_of(self._handler, "close")()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _barrier(self, name: str, operation: int, claim: str = "", told: str = "") -> str:
        if not self._is_alone:
            return self._barriers(operation).meet(name, claim, told)
        key = f"{self._barrier_prefix}Checkpointer:{name}.{operation}"
        events.record_duration_secs(events.BARRIER_SECS, 0.0, key=key)
        return told


class AsyncCheckpointer(Checkpointer):
    """A `Checkpointer` whose `save` returns as soon as the state is taken, and commits in the background.

    One save runs at a time: the next one waits for it. A failure is raised once, as SaveFailedError, by the next
    call that saves, restores, reads metadata, waits or closes. A program that ends right after a save commits it first;
    if that fails, it says so and exits with a code that is not 0.

    Args:
      timeout_secs: bounds every wait for another process; `MultiprocessingOptions(barrier_timeout_secs=)` goes first.

    >>> import ckpt_hooks, numpy as np, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> with AsyncCheckpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
    ...     checkpointer.save(path, {"w": np.arange(3.0)})
    ...     checkpointer.wait_until_finished()
    ...     print(checkpointer.restore(path))
    {'w': array([0., 1., 2.])}
    """

    _goes_on = True

    def __init__(self, handler: Any, *, timeout_secs: float = DEFAULT_TIMEOUT_SECS, **options: Any) -> None:
        given = given_or_new(options.pop("multiprocessing_options", None), MultiprocessingOptions)
        super().__init__(handler, multiprocessing_options=given.with_timeout(timeout_secs), **options)
        events.record_event(events.ASYNC_CHECKPOINTER_INIT)

    def save_args(self, directory: epath.Path, args: _Args, **options: Any) -> None:
        start_secs = time.perf_counter()
        self.wait_until_finished()
        task = BackgroundTask(f"ckpt_hooks-save-{directory.name}")
        save = self._begin(directory, args, **options)
        try:
            self.task = task
            task.start(functools.partial(self._run, save))
        except BaseException as error:  # Ctrl-C, which may come before the first line of `start`
            task.end_by(functools.partial(self._failed, save, error))  # if the thread is there, it tells
            raise
        events.record_duration_secs(events.WRITE_BLOCKING_SECS, time.perf_counter() - start_secs)

    def _run(self, save: _Save) -> None:
        try:
            name = save.final.name
            self._complete(save, f"async_write_complete.{name}", f"async_commit_complete.{name}")
        except BaseException as error:
            self._tell(save, error)

    def _tell(self, save: _Save, error: BaseException) -> None:
        """Keeps a failure for the next call, whatever goes wrong while it is cleared up."""
        try:
            error = self._failed(save, error)
        except Exception as second:
            _log.error("clearing up after the save of %s: %s", save.final, second, exc_info=True)
        finally:
            failure = SaveFailedError(f"the background save of {save.final} failed: {error}")
            failure.__cause__ = error
            self.failure = untold[self] = failure  # untold until the next call raises it

    def wait_until_finished(self) -> None:
        """Waits for the save in flight; raises its failure, once."""
        if self.task is not None:
            self.task.wait()
        if not self._store_blocks:
            self._store.wait_until_finished()
        if self.failure is not None:
            self.check_for_errors()

    def check_for_errors(self) -> None:
        """Raises the failure of a background save, once; does not wait."""
        error, self.failure = self.failure, None
        untold.pop(self, None)
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
            if not self.is_saving:  # or Ctrl-C has ended the wait, and the save needs the handler
                super().close()
