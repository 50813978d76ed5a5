"""Keras's `fit` on JAX, interrupted within an epoch and resumed after the same batch.

    python examples/keras_fit.py
    python examples/keras_fit.py --epochs=10 --directory=/tmp/keras

One more callback does it. The model is trained on scikit-learn's digits twice: uninterrupted, and with a SIGTERM in
the middle of an epoch, after which `fit` is called anew, with a new model. The exit status is 0 if both end in the same
weights, optimizer and history of metrics, to the last bit.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras
import numpy as np
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook
from ckpt_hooks.keras_callback import CheckpointCallback
from ckpt_hooks.testing import assert_same
from examples._interrupted import arguments, preemption_of

NUM_TRAIN = 1500  # of 1797
BATCH_SIZE = 50


class Terminate(keras.callbacks.Callback):
    """Sends this process a SIGTERM, as a scheduler does it, once so many batches have been trained."""

    def __init__(self, after_batches: int) -> None:
        super().__init__()
        self.remaining = after_batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def make_model(seed: int) -> Any:
    """A compiled model; the seed of its dropout is one of its variables, and saved with them."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def train(directory: Path, epochs: int, seed: int = 0, sigterm_at: int = 0) -> tuple[Any, dict[str, list[float]]]:
    """Fits from the newest checkpoint to the end; returns the model's variables and {metric: value of each epoch}."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)  # JAX has no 64 bits by default
    model = make_model(seed)
    with CheckpointHook(directory, every_n_steps=20) as hook:
        fitted = model.fit(
            images[:NUM_TRAIN],
            labels[:NUM_TRAIN],
            batch_size=BATCH_SIZE,
            epochs=epochs,
            validation_data=(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
            callbacks=[Terminate(sigterm_at), CheckpointCallback(hook)],
            verbose=0,
        )
    variables = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {name: [np.asarray(each.value) for each in parts] for name, parts in variables.items()}, fitted.history


def main() -> None:
    num_batches = NUM_TRAIN // BATCH_SIZE
    with arguments(__doc__, "epochs", 6) as (epochs, directory):
        expected, history = train(directory / "uninterrupted", epochs)
        interrupted = partial(train, directory / "interrupted", epochs)
        step = preemption_of(partial(interrupted, sigterm_at=epochs * num_batches // 2 + 7), directory).step
        epoch, batch = divmod(step, num_batches)
        print(f"interrupted after {step} batches: in epoch {epoch + 1}, after batch {batch}\n")
        resumed, rest = interrupted(seed=1)  # whose weights are all replaced

    print("         uninterrupted          resumed\nepoch    loss    val_accuracy    loss    val_accuracy")
    first = epochs - len(rest["loss"])
    for epoch in range(epochs):
        row = [f"{history[name][epoch]:.4f}" for name in ("loss", "val_accuracy")]
        row += [f"{rest[name][epoch - first]:.4f}" if epoch >= first else "-" for name in ("loss", "val_accuracy")]
        print("{:<9}{:<8}{:<16}{:<8}{}".format(epoch + 1, *row))
    assert_same({name: values[first:] for name, values in history.items()}, rest)
    assert_same(expected, resumed)
    num_arrays = sum(map(len, expected.values()))
    print(f"All metrics and {num_arrays} variables are equal to the last bit.")


if __name__ == "__main__":
    main()
