"""The hook as a callback of Keras 3 on its JAX backend. Who imports this module imports Keras."""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError
from ckpt_hooks.hook import CheckpointHook

__all__ = ["CheckpointCallback"]


class CheckpointCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Saves what `fit` trains, and resumes inside `fit`: in the same epoch, after the same batch.

    The state has the items `trainable`, `non_trainable`, `optimizer` and `metrics`, each a list of arrays in the order
    of the model's variables, and `progress`. The step counts trained batches; it goes on over epochs. When `fit` ends,
    its last state is saved too. A signal makes the next batch's end save and raise `Preempted`; with
    ``raise_on_preemption=False``, `fit` returns.

    A resumed `fit` reads the batches that its epoch has trained already, and drops them. It goes on to the last bit
    where each epoch reads the data anew, in an order of Python's or NumPy's global random generator, which is saved
    too, or of its own: arrays, and a `keras.utils.PyDataset`. A generator that yields all epochs has to be set by you.

    Args:
      hook: says when and where; it may not be used for another loop meanwhile. Closing it is yours: use ``with``.

    Raises (from `fit`): what `hook.restore` and `hook` raise; InvalidArgumentError on another backend than JAX.
    """

    def __init__(self, hook: CheckpointHook) -> None:
        if not isinstance(hook, CheckpointHook):
            raise InvalidArgumentTypeError(
                f"CheckpointCallback takes a CheckpointHook, got a {type(hook).__qualname__}"
            )
        if keras.backend.backend() != "jax":
            raise InvalidArgumentError(
                f"CheckpointCallback saves JAX arrays, and Keras runs on {keras.backend.backend()!r}; set "
                "KERAS_BACKEND=jax before Keras is imported."
            )
        super().__init__()
        self._hook = hook
        self._order = _Order()
        self._save_if_due = hook.bind(self._state, data=self._order)
        self._resumed: dict[str, Any] | None = None  # what was restored, until its epoch has begun

    # -------------------------------------------------------------- what Keras calls

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the newest checkpoint into the model, and makes `fit` begin in its epoch."""
        self._epoch = self._num_trained = 0
        self._stopped = False
        state = self._hook.restore(self._state(), data=self._order)
        self._step = self._hook.start_step
        self._resumed = state if self._step else None
        if self._resumed is None:
            return
        for name, variables in self._variables().items():
            _assign(variables, state[name])
        self._epoch, self._num_trained = state["progress"]["epoch"], state["progress"]["batch"]
        self.model._initial_epoch = self._epoch  # as Keras's own BackupAndRestore says it to `fit`

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Draws the epoch's order; in the resumed one as it was drawn, with the metrics that `fit` has just reset."""
        self._order.begin_epoch()
        self._epoch = epoch
        if self._resumed is None:
            self._num_trained = 0
            return
        self.model._initial_epoch = None  # the next `fit` begins where it is told to
        if self._num_trained:
            _assign(self.model.metrics_variables, self._resumed["metrics"])
            _skip_batches(self.model, self._num_trained)
        self._resumed = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves if a checkpoint is due, after a batch that was trained and not skipped."""
        ended = min(batch + 1, self.params.get("steps") or batch + 1)  # steps_per_execution counts beyond the last one
        if ended <= self._num_trained:
            return
        self._step += ended - self._num_trained
        self._num_trained = ended
        self._save_if_due(self._step)
        if self._hook.preempted and self._hook.manager.latest_step() == self._step:
            self._stopped = self.model.stop_training = True  # of a hook that raises, there is no return to here

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """From here on a checkpoint begins with the next epoch, unless `fit` was stopped within this one."""
        if not self._stopped and self._num_trained >= (self.params.get("steps") or 0):
            self._epoch, self._num_trained = epoch + 1, 0
            self._order.forget()

    def on_train_end(self, logs: Any = None) -> None:
        """Saves the last state, if it was not, and waits for it."""
        self._hook.wait()
        if self._step > (self._hook.manager.latest_step() or 0):
            self._hook.save(self._step, self._state(), data=self._order)
            self._hook.wait()
        if self._hook.preempted and not self._stopped:
            self._save_if_due(self._step)  # who was asked to stop during the last validation has to leave too

    # -------------------------------------------------------------- the state

    def _variables(self) -> dict[str, list[Any]]:
        return {
            "trainable": self.model.trainable_variables,
            "non_trainable": self.model.non_trainable_variables,
            "optimizer": self.model.optimizer.variables,
            "metrics": self.model.metrics_variables,
        }

    def _state(self) -> dict[str, Any]:
        self.model.jax_state_sync()  # within an epoch `fit` has the arrays, and the variables have none
        arrays = {name: [variable.value for variable in variables] for name, variables in self._variables().items()}
        return {**arrays, "progress": {"epoch": self._epoch, "batch": self._num_trained}}


def _assign(variables: list[Any], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _skip_batches(model: Any, count: int) -> None:
    """Makes the model's train function read so many batches and train none of them; then it is the old one again."""
    train, logs = model.train_function, model.get_metrics_result()
    remaining = count

    def read_only(state: Any, iterator: Any) -> tuple[Any, Any]:
        nonlocal remaining
        num_read = min(remaining, model.steps_per_execution)
        for _ in range(num_read):
            next(iterator)
        remaining -= num_read
        if remaining == 0:
            model.train_function = train
        return logs, state

    model.train_function = read_only


class _Order:
    """The global random generators, as they were when the epoch's order was drawn."""

    def __init__(self) -> None:
        self._at_begin: Any = None
        self._is_restored = False

    def begin_epoch(self) -> None:
        if self._is_restored:
            random.setstate(self._at_begin[0])
            np.random.set_state(self._at_begin[1])
        self._is_restored = False
        self._at_begin = (random.getstate(), np.random.get_state())

    def forget(self) -> None:
        """The epoch is over: the next one's order is drawn from what the generators are then."""
        self._at_begin = None

    def get_state(self) -> Any:
        return self._at_begin or (random.getstate(), np.random.get_state())

    def set_state(self, state: Any) -> None:
        self._at_begin, self._is_restored = state, True
