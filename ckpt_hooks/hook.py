"""`CheckpointHook`: the one object that a training loop adds. When to save, resume, and leave."""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from ckpt_hooks import processes
from ckpt_hooks.abstract_result import abstract_result
from ckpt_hooks.arguments import given_or_new
from ckpt_hooks.bound import BoundHook
from ckpt_hooks.changes import Changes
from ckpt_hooks.checkpointer import DEFAULT_TIMEOUT_SECS
from ckpt_hooks.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    MetricNotFoundError,
    NameCollisionError,
    Preempted,
    UnsupportedLeafError,
)
from ckpt_hooks.grace import GracePeriod
from ckpt_hooks.graph_objects import split
from ckpt_hooks.init_from import InitFrom
from ckpt_hooks.manager import CheckpointManager
from ckpt_hooks.preemption import PreemptionNotice
from ckpt_hooks.primary_clock import PrimaryClock
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.requested import check_names
from ckpt_hooks.temporary_paths import FileOptions
from ckpt_hooks.train_state import no_state, parts_of
from ckpt_hooks.triggers import Triggers, check_step

__all__ = ["CheckpointHook"]

# What only the caller can mend: trying again at the next trigger would fail again.
_MISTAKES = (InvalidArgumentError, TypeError, UnsupportedLeafError, NameCollisionError, MetricNotFoundError)

_log = logging.getLogger(__name__)


class _Unmade(NamedTuple):
    """A state that is made where there is nothing to restore, and is only to be restored into elsewhere."""

    abstract: Any
    make: Callable[[], Any]


class CheckpointHook:
    """Saves periodically, resumes by itself, and saves before it leaves when the process is asked to stop.

    Args:
      directory: of the run.
      every_n_steps: save whenever the step reaches or jumps over a multiple of this; 1000 where no trigger is
        given.
      every_secs: save when this many seconds have passed since the last save.
      on_steps: save at these steps.
      keep: which checkpoints stay; see `CheckpointManager`.
      save_on_preemption: whether one of `preemption_signals` makes the next call save, wait for the commit, and
        raise `Preempted`. A second signal ends the process at once.
      raise_on_preemption: whether that call raises; if not, ``if hook(step, state) and hook.preempted: break`` leaves.
      preemption_signals: which signals ask the process to stop. With several processes of `jax.distributed`, it is
        enough that one of them gets one: all save the same step and leave.
      grace_secs: how long after the signal the process will be killed; a log line warns as soon as it is known that
        a save takes longer. None where that is not known.
      init_from: another run, one of its checkpoints, or an `InitFrom` that says more: while this run has no checkpoint
        of its own, `restore` and `restore_or_init` take the parameters from there, and start at step 0.
      async_save: whether training goes on while a checkpoint is written.
      on_save_error: "raise" raises the failure of a background save at the next call; "warn" logs it, goes on,
        and tries again at the next trigger.
      timeout_secs: bounds every wait for another process; `MultiprocessingOptions(barrier_timeout_secs=)` goes first.
      compression, staging, max_host_bytes, multiprocessing_options, file_options: as in `CheckpointManager`.

    >>> import numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> for num_steps in (25, 40):  # the second run goes on where the first one ended
    ...     state = {"w": np.zeros(2)}
    ...     with CheckpointHook(directory, every_n_steps=10) as hook:
    ...         state = hook.restore(state)
    ...         for step in range(hook.start_step, num_steps):
    ...             state = {"w": state["w"] + 1}
    ...             _ = hook(step + 1, state, metrics={"w": state["w"][0]})
    ...         print(hook.start_step, state["w"])
    0 [25. 25.]
    20 [40. 40.]
    """

    def __init__(
        self,
        directory: Any = "checkpoints",
        *,
        every_n_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] = (),
        keep: Any = 3,
        save_on_preemption: bool = True,
        raise_on_preemption: bool = True,
        preemption_signals: Iterable[signal.Signals | int] = (signal.SIGTERM,),
        grace_secs: float | None = None,
        init_from: Any = None,
        async_save: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise",
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        compression: Literal["zstd"] | None = None,
        staging: Literal["copy", "view"] = "copy",
        max_host_bytes: int | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
    ) -> None:
        if on_save_error not in ("raise", "warn"):
            raise InvalidArgumentError(f"on_save_error is 'raise' or 'warn', got {on_save_error!r}")
        self._init_from = init_from if init_from is None or isinstance(init_from, InitFrom) else InitFrom(init_from)
        self._triggers = Triggers.checked(every_n_steps, every_secs, on_steps)
        self._grace = None if grace_secs is None else GracePeriod(grace_secs)
        self._warns = on_save_error == "warn"
        self._raises_preempted = raise_on_preemption
        given = given_or_new(multiprocessing_options, MultiprocessingOptions)
        self._processes = given.with_timeout(timeout_secs)
        self.manager = CheckpointManager(
            directory,
            keep=keep,
            async_save=async_save,
            timeout_secs=timeout_secs,
            compression=compression,
            staging=staging,
            max_host_bytes=max_host_bytes,
            multiprocessing_options=self._processes,
            file_options=file_options,
        )
        # With jax.distributed, the runtime itself listens and tells all processes of one step; see `_is_preempted`.
        is_shared = save_on_preemption and processes.count() > 1
        self._asks_runtime = is_shared and processes.watches_preemption()
        if is_shared and not self._asks_runtime:
            _log.warning("no preemption is answered: JAX's jax_enable_preemption_service is off")
        listens = save_on_preemption and is_shared == self._asks_runtime
        self._notice = PreemptionNotice(preemption_signals if listens else (), passes_on=is_shared)
        self._preempted = False
        self._start_step = 0
        self._last_step = 0  # of the last call
        self._saved_step = -1  # of the last save that was started
        self._next_step = 0  # the next one that is due
        self._checkpointer = self.manager.checkpointer
        self._watches_time = self._triggers.every_secs is not None
        self._clock: PrimaryClock | None = None  # where there are several processes
        self._always_looks = self._watches_time or self._asks_runtime
        self._follow(0)

    # -------------------------------------------------------------- the loop

    def __call__(self, step: int, state: Any, *, metrics: Any = None, metadata: Any = None, **items: Any) -> bool:
        """Saves `state` if a checkpoint is due at `step`; returns whether a save was started.

        Where nothing is due, it looks at nothing but `step`, and costs about a microsecond.

        Args:
          step: number of updates that the state has seen, a Python int.
          state, metrics, metadata, items: as in `CheckpointManager.save`.

        Raises:
          Preempted: the process was asked to stop; `state` is saved and committed.
          SaveFailedError: an earlier save in the background failed (unless on_save_error="warn").
        """
        if (
            type(step) is int  # and not an array, for whose value the comparison would wait
            and self._last_step < step < self._next_step
            and not self._notice.received
            and self._checkpointer.failure is None
            and not self._always_looks
        ):
            self._last_step = step
            return False
        return self._look(step, state, metrics, metadata, items)

    def bind(self, state: Any, *, metrics: Any = None, metadata: Any = None, **items: Any) -> BoundHook:
        """This hook as one that is called with the step alone, as those of `clu.periodic_actions` are.

        Args:
          state: a function without arguments that returns the state of the moment, or an NNX object, which is updated
            in place.
          metrics, metadata: what `hook(step, state, ...)` takes, or functions that return it.
          items: stateful objects.

        The functions are called only where a checkpoint is due.

        Raises InvalidArgumentTypeError for a state that would be the same one for ever.
        """
        return BoundHook(self, state, metrics, metadata, items)

    def _look(self, step: int, state: Any, metrics: Any, metadata: Any, items: Mapping[str, Any]) -> bool:
        if type(step) is not int or step < 0:
            step = check_step(step)
        if step <= self._last_step:
            # The loop went back, or begins with the step that was restored, or repeats the one that it saved.
            self._follow(step if step == self._saved_step else step - 1)
        self._last_step = step
        if self._notice.received or (self._asks_runtime and self._is_preempted()):
            return self._leave(step, state, metrics, metadata, items)
        if self._checkpointer.failure is not None:
            self._raise_or_warn()
        if step < self._next_step and not (self._watches_time and self._is_time()):
            return False
        return self._save(step, state, metrics, metadata, items)

    def _is_time(self) -> bool:
        if processes.count() == 1:
            return time.monotonic() >= self._next_secs
        if self._clock is None:
            self._clock = PrimaryClock(self._processes)
        return self._clock.has_come(self._next_secs)

    def _save(self, step: int, state: Any, metrics: Any, metadata: Any, items: Mapping[str, Any]) -> bool:
        if items:
            check_names(items)  # or `force` would go through
        # Before the save: one that fails is tried again at the next trigger, not at the next step.
        if self._next_step <= step:
            self._next_step = next(self._marks)
            if self._next_step <= step:
                self._follow(step)  # the loop jumped over more than one mark
        if self._watches_time:
            self._next_secs = self._triggers.next_secs(time.monotonic())
        try:
            if isinstance(state, BoundHook):
                state, metrics, metadata = state.values()
            self.manager.save(step, state, metrics=metrics, metadata=metadata, **items)
        except (CheckpointError, OSError) as error:
            if not self._warns or isinstance(error, _MISTAKES):
                raise
            _log.error("saving step %d failed, training goes on: %s", step, error)
            return False
        if self._clock is not None:
            self._clock.forget()
        if self._grace is not None:
            self._grace.check(step, self._checkpointer.last_save_secs)
        self._saved_step = step
        return True

    def save(
        self, step: int, state: Any, *, metrics: Any = None, metadata: Any = None, force: bool = False, **items: Any
    ) -> None:
        """Saves now, whatever the triggers say; arguments as in `CheckpointManager.save`."""
        self.manager.save(step, state, metrics=metrics, metadata=metadata, force=force, **items)
        self._saved_step = check_step(step)
        self._follow(self._saved_step)

    def record_metrics(self, step: int, metrics: Any) -> None:
        """Adds metrics that arrived after the save; retention looks again."""
        self.manager.record_metrics(step, metrics)

    def wait(self) -> None:
        """Waits until the save in flight is committed; raises its failure."""
        self.manager.wait()

    def close(self) -> None:
        """Waits, gives the signals back, and gives up the run's lock."""
        try:
            self.manager.close()
        finally:
            self._notice.close()  # not before: a signal during the wait would end the process, and lose the last save
            is_behind = self._last_step > max(self._saved_step, self._start_step)
            if self._notice.received and not self._preempted and is_behind:
                _log.warning("asked to stop, and closed without another call: step %d is not saved", self._last_step)

    def _follow(self, step: int) -> None:
        """Looks from `step` on for the next one that is due."""
        self._last_step = step
        self._marks = self._triggers.marks(step)
        self._next_step = next(self._marks)
        self._next_secs = self._triggers.next_secs(time.monotonic())

    def _raise_or_warn(self) -> None:
        try:
            self.manager.wait()
        except CheckpointError as error:
            self._saved_step = -1  # whoever is asked to stop at this step has to save it again
            if not self._warns:
                raise
            _log.error("%s; training goes on, the next trigger tries again", error)

    # -------------------------------------------------------------- resuming

    @property
    def start_step(self) -> int:
        """The step that was restored, 0 for a fresh start."""
        return self._start_step

    def restore(
        self,
        state: Any,
        *,
        items: Iterable[str] | None = None,
        cast: Any = False,
        missing: Literal["error", "keep"] = "error",
        unexpected: Literal["error", "ignore"] = "error",
        rename: Any = None,
        **objects: Any,
    ) -> Any:
        """The newest checkpoint that verifies, in the structure of `state`.

        In an empty run it is `state` itself, with the parameters of `init_from`.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`, with the shardings to restore into.
          items: only these parts of it, as {item: value}, or paths below them.
          cast, missing, unexpected, rename: how the checkpoint may differ from it, as in `CheckpointManager.restore`.
          objects: stateful objects, whose state is set in place.

        Raises:
          InvalidArgumentError: (ValueError) an option that cannot be meant, or an object that has the name of one.
          StructureMismatchError: the newest checkpoint does not fit `state`.
          NoValidCheckpointError: there are checkpoints and none verifies; it never starts afresh then.
        """
        like, make = state if isinstance(state, _Unmade) else _Unmade(state, lambda: state)
        if like is None:
            raise no_state("restore(state), which without one is hook.manager.restore()")
        changes = Changes.checked(cast, missing, unexpected, rename, has_target=True)
        items = items if items is None or isinstance(items, str) else tuple(items)
        names, _ = changes.selecting(items)
        try:
            step, restored = self.manager.restore_with_step(like, items=items, changes=changes, objects=objects)
        except CheckpointNotFoundError:
            if not self.manager.is_empty():
                raise
            state = make() if self._init_from is None else self._init_from.fill(make(), self._processes)
            return state if names is None else parts_of(split(state), names)
        self._start_step = self._saved_step = step
        self._follow(step)
        _log.info("resumed from step %d of %s", step, self.manager.directory)
        return restored

    def restore_or_init(self, init_fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The newest checkpoint, or ``init_fn(*args)`` in an empty run.

        Where there is a checkpoint, `init_fn` is only evaluated abstractly: no initial state is built. Shardings
        of a jitted `init_fn` are kept, not those of a `jax.device_put` in another, and arguments that are not arrays
        reach it untouched. What it returns that is no JAX array comes back in its own type. Options and objects are
        those of `restore`.
        """
        if not callable(init_fn):
            raise InvalidArgumentTypeError(
                f"restore_or_init() takes a function that makes the first state, and its arguments; got a "
                f"{type(init_fn).__qualname__}. A state that there is already goes to restore(state)."
            )
        if self.manager.is_empty():
            return self.restore(init_fn(*args), **options)
        # What is there now may be none when it is read: not every process has it, or somebody has removed it.
        unmade = _Unmade(abstract_result(init_fn, *args), functools.partial(init_fn, *args))
        return self.restore(unmade, **options)

    # -------------------------------------------------------------- leaving

    @property
    def preempted(self) -> bool:
        """Whether the process has been asked to stop; to be polled in a long evaluation or a warm-up, for example.

        The signal may come right after a call that had nothing to save: only the next call answers it.

        With several processes it is enough that one of them was asked, and all are told at the same poll or call of
        the hook, so that no process leaves a loop alone. So all have to poll equally often.
        """
        return bool(self._notice.received) or (self._asks_runtime and self._is_preempted())

    def _is_preempted(self) -> bool:
        self._preempted = self._preempted or processes.reached_preemption_sync_point()
        return self._preempted

    def _leave(self, step: int, state: Any, metrics: Any, metadata: Any, items: Mapping[str, Any]) -> bool:
        """Saves, waits for the commit, and raises `Preempted`."""
        self._preempted = True
        self.manager.requires_metrics = False  # the last save is wanted with or without
        try:
            self.manager.wait()
        except CheckpointError as error:
            # There may be no later call to raise it, and the state of this step must not be lost with that one.
            _log.error("%s; step %d is saved before leaving", error, step)
            self._saved_step = -1
        started = step != self._saved_step
        if not self._asks_runtime and not started:
            started = self.manager.latest_step() != step  # its save has failed, and somebody else was told
        if started:
            check_names(items)
            if isinstance(state, BoundHook):
                state, metrics, metadata = state.values()
            if self._grace is not None:
                secs = self._checkpointer.last_save_secs, self._notice.received_secs
                self._grace.begin_last_save(step, *secs, self.manager.latest_step)
            self.manager.save(step, state, metrics=metrics, metadata=metadata, **items)
            self._saved_step = step
        self.manager.wait()
        _log.warning("asked to stop: step %d is saved", step)
        if self._raises_preempted:
            raise Preempted(step)
        return started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, Preempted):
            self.close()
            return
        try:
            self.close()
        except Exception as failure:
            # The error that ended the loop is what the user has to see first.
            error.add_note(f"and the last checkpoint failed too: {failure}")
