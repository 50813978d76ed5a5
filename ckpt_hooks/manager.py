"""`CheckpointManager`: the checkpoints of a run; which is newest, which is best, which stay, which one restores."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self, TypeVar, cast

from etils import epath

from ckpt_hooks import events, retention, train_state
from ckpt_hooks.agreement import Together, tell_others
from ckpt_hooks.arguments import given_or_new
from ckpt_hooks.changes import EXACT, Changes
from ckpt_hooks.checkpointer import DEFAULT_TIMEOUT_SECS, AsyncCheckpointer, Checkpointer
from ckpt_hooks.choosing import is_empty, read_chosen
from ckpt_hooks.errors import CheckpointNotFoundError, InvalidArgumentError, explain_os_error
from ckpt_hooks.graph_objects import NNX, GraphObjects
from ckpt_hooks.handlers.base import CheckpointArgs
from ckpt_hooks.handlers.composite import CompositeArgs, CompositeCheckpointHandler, CompositeOptions
from ckpt_hooks.handlers.iterator import IteratorSaveArgs, require_stateful
from ckpt_hooks.handlers.json import JsonSaveArgs
from ckpt_hooks.handlers.pytree import ArrayOptions, StandardSaveArgs
from ckpt_hooks.item_handlers import item_handlers
from ckpt_hooks.metadata import StepMetadata, check_custom_metadata, to_json_numbers, to_orbax_metrics
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.pruning import known_metrics, prune
from ckpt_hooks.reading import read_unchanged
from ckpt_hooks.requested import RestoreRequest, check_names
from ckpt_hooks.restoring import find_problems, read_metadata
from ckpt_hooks.run import METRICS_ITEM, RunDirectory
from ckpt_hooks.storage.lookup import is_directory, is_named
from ckpt_hooks.structure import describe_state
from ckpt_hooks.temporary_paths import FileOptions
from ckpt_hooks.triggers import check_step

__all__ = ["CheckpointManager"]

_RESERVED = frozenset({"step", "metrics"})  # keys of custom_metadata that the manager writes
_Change = TypeVar("_Change", bound=Callable[..., Any])


def _one_at_a_time(change: _Change) -> _Change:
    """A change of a run, which waits for those of other threads: an evaluation may record metrics from one of its own.

    So no save is in flight once it has waited for the last one, and none begins until it has ended.
    """

    @functools.wraps(change)
    def alone(self: CheckpointManager, *args: Any, **kwargs: Any) -> Any:
        task = self.checkpointer.task
        if task is not None and task.thread == threading.get_ident() and task.is_running:
            # By the save in flight, as of who listens to its events: whoever has the lock waits for it.
            return change(self, *args, **kwargs)
        if self._process != os.getpid():  # forked, perhaps while the lock was a thread's that is not here
            self._process, self._changing = os.getpid(), threading.RLock()
        with self._changing:
            return change(self, *args, **kwargs)

    return cast(_Change, alone)


class CheckpointManager:
    """The checkpoints of one run, in ``<directory>/<step>/``.

    A state's parts become items (`params`, `opt_state`, `step`, ...); keyword arguments of `save` are stateful
    objects, such as data iterators. Reading makes nothing and needs no lock; the first change makes the
    directory and locks it against other writers until `close`.

    Args:
      directory: of the run; absolute or relative.
      keep: how many of the newest checkpoints stay, or a policy (`LatestN`, `BestN`, `EveryNSteps`), or a list
        of policies each of which may keep a step; None keeps all. The newest always stays.
      async_save: whether `save` returns once the state is taken, and commits in the background.
      timeout_secs: bounds every wait for another process; `MultiprocessingOptions(barrier_timeout_secs=)` goes first.
      compression: "zstd" compresses arrays, for who pays for bytes: weights lose less than a tenth, and a save takes
        several times as long. None for none.
      staging: "copy" lets a save in the background copy JAX arrays on CPU before training goes on, so that a step
        that is given the state to reuse (`donate_argnums`) finds its memory free; "view" copies only NumPy arrays,
        for states that are not donated.
      max_host_bytes: how much of a state a save in the background may hold in host memory; what does not fit is
        written before `save` returns. None for all of it.
      multiprocessing_options: which processes take part and which commits.
      file_options: how directories are made.

    Attributes:
      requires_metrics: whether a save is refused once `BestN` would have to choose by a metric that nobody recorded.

    A failure in the background is raised once, as SaveFailedError, by the next call of any method but `is_empty`.

    >>> import numpy as np, tempfile
    >>> with CheckpointManager(tempfile.mkdtemp(), keep=2) as manager:
    ...     for step in (10, 20, 30):
    ...         manager.save(step, {"params": {"w": np.full(2, step)}}, metrics={"loss": 1 / step})
    ...     manager.wait()
    ...     print(manager.steps(), manager.restore()["params"])
    [20, 30] {'w': array([30, 30])}
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: Any = 3,
        async_save: bool = True,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        compression: Literal["zstd"] | None = None,
        staging: Literal["copy", "view"] = "copy",
        max_host_bytes: int | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
    ) -> None:
        self._run = RunDirectory(directory)
        self._retention = retention.Retention(keep)
        given = given_or_new(multiprocessing_options, MultiprocessingOptions)
        self._processes = given.with_timeout(timeout_secs)
        files = given_or_new(file_options, FileOptions)
        self.requires_metrics = True
        self._process, self._changing = os.getpid(), threading.RLock()
        self._decides = self._processes.is_primary()  # what clocks, listings and files say, for all processes
        options: Any = {"multiprocessing_options": self._processes, "file_options": files}
        array_options = ArrayOptions(compression=compression, staging=staging, max_host_bytes=max_host_bytes)
        handler = CompositeCheckpointHandler(
            handler_registry=item_handlers(array_options), composite_options=CompositeOptions(file_options=files)
        )
        self.checkpointer: Checkpointer = (
            AsyncCheckpointer(handler, timeout_secs=timeout_secs, **options)
            if async_save
            else Checkpointer(handler, **options)
        )
        events.record_event(events.MANAGER_INIT)

    @property
    def directory(self) -> epath.Path:
        """The run's directory, absolute."""
        return epath.Path(self._run.path)

    # -------------------------------------------------------------- saving

    @_one_at_a_time
    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Any = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        **items: Any,
    ) -> None:
        """Saves a state as the newest checkpoint.

        Args:
          step: number of updates that the state has seen; above that of every checkpoint there is.
          state: a pytree; split into items one level down.
          metrics: {name: real scalar}, or a `clu.metrics.Collection`.
          metadata: {string: JSON}, kept in `custom_metadata` beside ``step`` and ``metrics``.
          force: whether `step` may be at or below the newest. It becomes the newest once it is durable: one
            of the same number is replaced, newer ones are set aside as ``<step>.rolled_back``.
          items: stateful objects (``get_state()``/``set_state(state)``), each an item of its own.

        Raises:
          InvalidArgumentError: (ValueError) a step that is not above the newest, an object with the name of an
            argument (`items`, `cast`, ...), among others.
          RunLockedError: another live process writes to this run.
          UnsupportedLeafError, NameCollisionError, NotSerializableError, MetricNotFoundError,
          DiskFullError, UnwritableDirectoryError: before anything is written.
        """
        try:
            if type(step) is not int or step < 0:
                step = check_step(step)
            numbers = to_json_numbers(metrics) if metrics is not None else {}
            custom = {"step": step, "metrics": numbers}
            if metadata is not None:
                custom |= check_custom_metadata(metadata, reserved=_RESERVED)
            if items:
                check_names(items)
            self.wait()
            # What cannot be saved is refused here, before the run is locked, made, or cleared of damaged steps.
            run, path = self._run, epath.Path(f"{self._run.path}/{step}")
            args = self._save_args(state, numbers, items)
            try:
                staged = self.checkpointer.stage(args)
            except BaseException as error:
                self.checkpointer.report_failure(path, error)
                raise
            if self._decides and not (run.writer_lock and run.writer_lock.is_of(run.path)):
                run.lock()
            if self._decides and run.rejected:
                run.take_stock()  # somebody may have mended one by hand, which counts again
            if not force and ((run.known and step <= run.known[-1]) or step <= run.flax_newest):
                run.require_newer(step)
            if self._decides and self._retention.ranks and self.requires_metrics:
                retention.check_recorded(self._retention.policies, known_metrics(run, self._retention), numbers)
            if self._decides and (run.rejected or is_named(path)):
                run.make_way(step)
        except BaseException as error:
            tell_others(error, self._processes)
            raise
        self.checkpointer.save_args(
            path,
            staged,
            force=force,
            custom_metadata=custom,
            metrics=numbers,
            on_commit=functools.partial(self._after_commit, step, numbers),
        )

    def _save_args(self, state: Any, numbers: Mapping[str, Any], items: Mapping[str, Any]) -> CompositeArgs:
        if state is None:
            raise train_state.no_state("save(step, state)")
        if NNX in sys.modules:
            taken = GraphObjects(state, items)
            state, items = taken.state, taken.items
        kind = None if type(state) is dict and set(map(type, state)) == {str} else describe_state(state)
        parts = train_state.split(state)
        args: dict[str, CheckpointArgs] = {name: StandardSaveArgs(part, kind) for name, part in parts.items()}
        for name, value in items.items():
            if name in args:
                raise InvalidArgumentError(f"item {name!r} is a part of the state already; rename the keyword")
            is_tree = isinstance(value, train_state.PureState)
            args[name] = StandardSaveArgs(value) if is_tree else IteratorSaveArgs(require_stateful(name, value))
        if numbers and self._decides and METRICS_ITEM not in args:
            args[METRICS_ITEM] = JsonSaveArgs(to_orbax_metrics(numbers))  # where Orbax's best_fn looks
        return CompositeArgs(**args)

    def _after_commit(self, step: int, metrics: Mapping[str, Any]) -> None:
        """When `step` is durable: sets newer ones aside, and removes what need not stay."""
        run, keep = self._run, self._retention
        run.recorded[step] = metrics
        if (run.known and step <= run.known[-1]) or step <= run.flax_newest:
            run.roll_back(step)
        else:
            run.known.append(step)
        if keep.policies and (run.older or len(run.known) > keep.newest):
            prune(run, keep)

    # -------------------------------------------------------------- restoring

    def restore(
        self,
        like: Any = None,
        *,
        step: int | Literal["latest", "best"] | None = None,
        items: Iterable[str] | None = None,
        cast: Any = False,
        missing: Literal["error", "keep"] = "error",
        unexpected: Literal["error", "ignore"] = "error",
        rename: Any = None,
        typed: bool = False,
        **objects: Any,
    ) -> Any:
        """Restores a state.

        Args:
          like: a state with the structure, types, dtypes and shardings to restore into, of arrays or of
            `jax.ShapeDtypeStruct`; None gives {item: nested dicts and lists of NumPy arrays}.
          step: one that no other replaces; "best" by the `BestN` in `keep`; None or "latest": the newest that verifies.
          items: the items to restore, as {item: value}; `like` is then such a dict or a whole state. Also paths below
            them, or patterns (``params/encoder``, ``params/*/kernel``): all other leaves keep their values in `like`.
          cast, missing, unexpected, rename: how the checkpoint may differ from `like`; see `changes.Changes`.
          typed: whether, without `like`, it comes back in its own types, with NumPy arrays; see docs/restore.md.
          objects: stateful objects whose saved state is set in place, once everything else has been read.

        Raises:
          CheckpointNotFoundError: (FileNotFoundError) there is no checkpoint, or not this one.
          StructureMismatchError: (ValueError) `like` does not fit; the message lists every leaf.
          ItemNotFoundError: (KeyError) an item was not saved.
          ClassNotFoundError: (ImportError) `typed`, and a class cannot be imported or has changed.
          NoValidCheckpointError: (CorruptCheckpointError) none verifies; the message has each one's reason.
        """
        changes = Changes.checked(cast, missing, unexpected, rename, typed, has_target=like is not None)
        return self.restore_with_step(like, step=step, items=items, changes=changes, objects=objects)[1]

    def restore_with_step(
        self,
        like: Any = None,
        *,
        step: Any = None,
        items: Iterable[str] | None = None,
        changes: Changes = EXACT,
        objects: Mapping[str, Any] | None = None,
    ) -> tuple[int, Any]:
        """(the step that was restored, the state): `restore` for who needs to know which step it was."""
        try:
            self.wait()
            request = RestoreRequest(like, items=items, changes=changes, objects=objects or {})
        except BaseException as error:
            tell_others(error, self._processes)
            raise
        asked = None if step is None or step == "latest" else functools.partial(self._number_of, step)
        wanted = "newest" if asked is None else str(step)
        number, (restored, states) = read_chosen(self._run, asked, request.read, self._processes, wanted)
        return number, request.deliver(restored, states)

    def _number_of(self, step: Any) -> int:
        number = self.best_step() if step == "best" else check_step(step, 'step, "latest" and "best" apart,')
        if number is None:
            raise CheckpointNotFoundError(f"{self._run.path} has no checkpoint with a finite metric to be the best")
        return number

    # -------------------------------------------------------------- asking

    def is_empty(self) -> bool:
        """Whether the run has no checkpoint. Every process has to ask, and is told what the primary finds."""
        return is_empty(self._run, self._processes)

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        self._raise_failure()
        return self._run.steps()

    def latest_step(self) -> int | None:
        """The newest committed step, None for an empty run."""
        self._raise_failure()
        return self._run.latest_step()

    def best_step(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> int | None:
        """The step with the best finite value of a metric (by default the one of the `BestN` in `keep`).

        None for an empty run. Raises MetricNotFoundError where no checkpoint recorded the metric.
        """
        self._raise_failure()
        recorded = self._run.all_metrics()
        if not recorded and metric is None:
            return None
        return retention.best_step(recorded, *self._retention.ranking(metric, mode))

    def metadata(self, step: int) -> StepMetadata:
        """The step metadata of a checkpoint. Raises CheckpointNotFoundError where there is none."""
        self._raise_failure()
        path = self._run.require(step := check_step(step))

        def verified() -> StepMetadata:
            self._run.metadata(step)
            found = read_metadata(path)
            return found if found.metrics else dataclasses.replace(found, metrics=dict(self._run.metrics(step)))

        return read_unchanged(path, verified)

    def verify(self, step: int) -> list[str]:
        """Reads every byte of a checkpoint and says what is not as it was saved; [] where all is well.

        One that another library wrote has no checksums: it is well if it can be read.
        """
        self._raise_failure()
        path = self._run.require(step := check_step(step))
        return read_unchanged(path, lambda: find_problems(self._run, step), is_doubtful=bool)

    # -------------------------------------------------------------- changing

    @_one_at_a_time
    def record_metrics(self, step: int, metrics: Any) -> None:
        """Adds metrics that arrived after the save; retention looks again."""
        with Together(self._processes, f"metrics of step {step} to record") as all_processes:
            numbers = to_json_numbers(metrics)
            self.wait()
            self._run.require(step := check_step(step))
            if all_processes.agree():
                self._record_metrics(step, numbers)

    def _record_metrics(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.lock()
        try:
            self._run.record_metrics(step, numbers)
            prune(self._run, self._retention)
        except OSError as error:
            raise explain_os_error(error, f"recording metrics of {self._run.step_path(step)}") from error

    @_one_at_a_time
    def rollback(self, step: int) -> None:
        """Makes `step` the newest: newer checkpoints are set aside as ``<step>.rolled_back``."""
        with Together(self._processes, f"step {step} to roll back to") as all_processes:
            self.wait()
            self._run.require(step := check_step(step))
            if all_processes.agree():
                self._run.lock()
                self._run.roll_back(step)

    @_one_at_a_time
    def delete(self, step: int) -> None:
        """Removes a checkpoint. Raises CheckpointNotFoundError where there is none."""
        with Together(self._processes, f"step {step} to delete") as all_processes:
            self.wait()
            path = self._run.step_path(step := check_step(step))
            if all_processes.decides and not is_directory(path):
                self._run.require(step)
            if all_processes.agree():
                self._run.lock()
                self._run.remove(step)

    # -------------------------------------------------------------- waiting

    def wait(self) -> None:
        """Waits until the save in flight is committed; raises its failure, once."""
        if isinstance(self.checkpointer, AsyncCheckpointer):
            self.checkpointer.wait_until_finished()

    def _raise_failure(self) -> None:
        if isinstance(self.checkpointer, AsyncCheckpointer):
            self.checkpointer.check_for_errors()

    @_one_at_a_time
    def close(self) -> None:
        """Waits, and gives the run's lock back; the manager may still be used for reading."""
        try:
            self.checkpointer.close()
        finally:
            if not self.checkpointer.is_saving:  # or Ctrl-C has ended the wait, and the save goes on
                self._run.unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
