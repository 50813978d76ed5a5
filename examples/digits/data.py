"""Scikit-learn's handwritten digits, in an order that a checkpoint can resume."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distribution
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_TEST_EXAMPLES = 297


class Batch(NamedTuple):
    images: NDArray[np.float32]  # [examples, 64], from 0 to 1
    labels: NDArray[np.int32]  # [examples]


def load_digits() -> tuple[Batch, Batch]:
    """Returns 1500 training and 297 test examples, split in the same way every time."""
    # The file behind `sklearn.datasets.load_digits`: importing scikit-learn would take longer
    # than all the rest of a resume.
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), dtype=np.float32, delimiter=",")
    # Shuffled, since the file goes from writer to writer.
    table = np.random.default_rng(0).permutation(table)
    digits = Batch(images=table[:, :-1] / np.float32(16), labels=table[:, -1].astype(np.int32))
    test = slice(NUM_TEST_EXAMPLES)
    train = slice(NUM_TEST_EXAMPLES, None)
    return _take(digits, train), _take(digits, test)


class ShuffledBatches(Iterator[Batch]):
    """Endless batches of `examples`, shuffled anew in every epoch.

    The order is a function of the seed and the epoch alone, so two integers are all that a
    checkpoint needs to go on with the very next batch.
    """

    def __init__(self, examples: Batch, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._start_epoch(0)

    def __next__(self) -> Batch:
        if self._offset + self._batch_size > len(self._order):  # drop an incomplete batch
            self._start_epoch(self._epoch + 1)
        chosen = self._order[self._offset : self._offset + self._batch_size]
        self._offset += self._batch_size
        return _take(self._examples, chosen)

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "offset": self._offset}

    def set_state(self, state: dict[str, int]) -> None:
        self._start_epoch(state["epoch"], state["offset"])

    def _start_epoch(self, epoch: int, offset: int = 0) -> None:
        self._epoch = epoch
        self._offset = offset
        rng = np.random.default_rng([self._seed, epoch])
        self._order = rng.permutation(len(self._examples.labels))


def _take(examples: Batch, indices: NDArray[np.int64] | slice) -> Batch:
    return Batch(examples.images[indices], examples.labels[indices])
