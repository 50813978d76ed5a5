"""Data order that a checkpoint can go on from: shuffled indices, and an iterator that is read ahead of."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ckpt_hooks import processes
from ckpt_hooks.arguments import require_count
from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, StructureMismatchError
from ckpt_hooks.handlers.iterator import StatesOfAll, can_divide_anew, require_stateful, set_saved_state

__all__ = ["RunAhead", "ShuffledIndices"]


class ShuffledIndices(Iterator[NDArray[np.int64]]):
    """Endless batches of indices, shuffled anew in each epoch; what is saved is the seed and the position.

    The order is a function of the seed alone, so a restore goes on at once with the very next batch. Each process
    gets its part of every batch, and the batch is the same one for any number of processes: a checkpoint of two
    processes goes on with four.

    Args:
      num_examples: indices are from 0 to this; those of an incomplete last batch are left out of their epoch.
      batch_size: examples in a batch of all processes together; a multiple of the number of processes.
      seed: of the order. A restore takes over the seed that was saved.
      process_index, process_count: which part this is; by default, this process's of all.

    Raises InvalidArgumentError for numbers that do not go together, InvalidArgumentTypeError for what is no integer.

    >>> indices = ShuffledIndices(6, 2, seed=0)
    >>> [next(indices).tolist() for _ in range(4)]
    [[3, 2], [5, 4], [0, 1], [1, 4]]
    >>> other = ShuffledIndices(6, 2)
    >>> other.set_state(indices.get_state())
    >>> next(other).tolist() == next(indices).tolist()
    True
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        self._count = processes.count() if process_count is None else require_count(process_count, "process_count")
        self._index = processes.index() if process_index is None else require_count(process_index, "process_index")
        if not 0 <= self._index < self._count:
            raise InvalidArgumentError(f"there is no process {self._index} of {self._count}")
        num_examples, batch_size = require_count(num_examples, "num_examples"), require_count(batch_size, "batch_size")
        if not 0 < batch_size <= num_examples:
            raise InvalidArgumentError(f"a batch has between 1 and all {num_examples} examples, got {batch_size}")
        if batch_size % self._count:
            raise InvalidArgumentError(f"batch_size={batch_size} cannot be divided among {self._count} processes")
        self._num_examples, self._batch_size = num_examples, batch_size
        self._seed, self._position = require_count(seed, "seed"), 0
        self._epoch = -1  # of `_order`

    @property
    def position(self) -> int:
        """How many batches have been drawn."""
        return self._position

    def __next__(self) -> NDArray[np.int64]:
        """This process's indices of the next batch: int64[batch_size / process_count]."""
        epoch, batch = divmod(self._position, self._num_examples // self._batch_size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_examples)
            self._epoch = epoch
        self._position += 1
        share = self._batch_size // self._count
        start = batch * self._batch_size + self._index * share
        return self._order[start : start + share].copy()

    def get_state(self) -> dict[str, int]:
        """The seed and the position, and what they are meaningless without."""
        return {
            "seed": self._seed,
            "position": self._position,
            "num_examples": self._num_examples,
            "batch_size": self._batch_size,
        }

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there. Raises StructureMismatchError where it is of another number of examples or batch size."""
        saved, own = ((d.get("num_examples"), d.get("batch_size")) for d in (state, self.get_state()))
        if saved != own:
            raise StructureMismatchError(
                "the position was saved with (num_examples, batch_size) = "
                f"{saved} and is to be set with {own}, which is another order. Make the iterator with the saved ones."
            )
        self._seed, self._position, self._epoch = state["seed"], state["position"], -1

    def set_states(self, states: Sequence[dict[str, int]]) -> None:
        """Goes on where another number of processes stopped, all at the same position."""
        if any(state != states[0] for state in states):
            raise StructureMismatchError(f"the processes were saved at different positions: {states}")
        self.set_state(states[0])


class RunAhead(Iterator[Any]):
    """Draws elements ahead of the loop, and is saved at the step that the loop is at.

    Who draws ahead of an iterator and saves the iterator itself loses, on resuming, the elements in between.

    Args:
      iterator: has `get_state` and `set_state`; to be drawn from by nobody else.
      num_ahead: how many elements are drawn before they are needed.
      put: is called with each element when it is drawn; with `jax.device_put`, the copy to the device begins then.

    >>> batches = RunAhead(ShuffledIndices(6, 2, seed=0), num_ahead=2)
    >>> next(batches).tolist(), batches.get_state()["position"]
    ([3, 2], 1)
    """

    def __init__(self, iterator: Any, num_ahead: int = 2, put: Callable[[Any], Any] = lambda element: element) -> None:
        if not callable(put):
            raise InvalidArgumentTypeError(f"put is a function of an element, such as jax.device_put; got {put!r}")
        self._num_ahead, self._put = require_count(num_ahead, "num_ahead"), put
        self._iterator = require_stateful("iterator", iterator)
        self._drawn: collections.deque[tuple[Any, Any]] = collections.deque()  # (element, the state after it)
        self._to_put: list[tuple[Any, Any]] = []  # likewise, at most one
        self._state = self._state_of_iterator()
        if can_divide_anew(iterator):
            self.set_states = self._set_states

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        while len(self._drawn) <= self._num_ahead:
            if not self._to_put:  # where `put` has failed, its element comes once more: none is passed over
                try:
                    element = next(self._iterator)
                except StopIteration:
                    break
                self._to_put.append((element, self._state_of_iterator()))
            element, state = self._to_put[0]
            self._drawn.append((self._put(element), state))
            self._to_put.clear()
        if not self._drawn:
            raise StopIteration
        element, self._state = self._drawn.popleft()
        return element

    def _state_of_iterator(self) -> Any:
        return copy.deepcopy(self._iterator.get_state())  # which may be what it goes on changing

    def get_state(self) -> Any:
        """The iterator's state after the element that was handed out last."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Sets the iterator's state and forgets what was drawn ahead."""
        self._iterator.set_state(state)
        self._forget()

    def _set_states(self, states: Sequence[Any]) -> None:
        set_saved_state(self._iterator, StatesOfAll(states))
        self._forget()

    def _forget(self) -> None:
        self._drawn.clear()
        self._to_put.clear()
        self._state = self._state_of_iterator()
