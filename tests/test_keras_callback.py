"""Keras: `fit`, interrupted anywhere and resumed, ends as an uninterrupted one, to the last bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ckpt_hooks import CheckpointHook, CheckpointManager, Preempted
from ckpt_hooks.keras_callback import CheckpointCallback
from ckpt_hooks.storage import commit
from examples.digits.data import load_digits
from tests.faulty import delay

NUM_EXAMPLES, BATCH_SIZE, EPOCHS = 208, 32, 3
NUM_BATCHES = 7  # the last one has 16 examples

TRAIN, TEST = load_digits()
X, Y = TRAIN.images[:NUM_EXAMPLES], TRAIN.labels[:NUM_EXAMPLES]


class Do(keras.callbacks.Callback):
    """Calls a function at the end of batch `batch` of epoch `epoch`, or (None) of that epoch's validation."""

    def __init__(self, action: Callable[[], None], epoch: int, batch: int | None = None) -> None:
        super().__init__()
        self.action, self.epoch, self.batch = action, epoch, batch
        self.current = -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.current, batch) == (self.epoch, self.batch):
            self.action()

    def on_test_end(self, logs: Any = None) -> None:
        if self.batch is None and self.current == self.epoch:
            self.action()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("out of memory")


def make_model(steps_per_execution: int = 1) -> Any:
    keras.utils.set_random_seed(7)
    layers = [
        keras.layers.Input((64,)),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),  # its seed is a variable of the model
        keras.layers.Dense(10),
    ]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], steps_per_execution=steps_per_execution)
    return model


class Digits(keras.utils.PyDataset):
    """Batches with noise of their own, as augmentation gives them: a function of the index alone."""

    def __len__(self) -> int:
        return NUM_BATCHES

    def __getitem__(self, index: int) -> Any:
        noise = np.random.default_rng(index).normal(0, 0.1, X[:BATCH_SIZE].shape).astype(np.float32)
        return X[index * 8 :][:BATCH_SIZE] + noise, Y[index * 8 :][:BATCH_SIZE]


def fit(
    directory: Path, *callbacks: Any, model: Any = None, data: Any = None, epochs: int = EPOCHS, **hook: Any
) -> Any:
    """What a program does each time it is started; returns (history, weights)."""
    model = make_model() if model is None else model
    inputs = {"x": X, "y": Y, "batch_size": BATCH_SIZE} if data is None else {"x": data}
    with CheckpointHook(directory, **hook) as checkpoint:
        history = model.fit(
            **inputs,
            epochs=epochs,
            verbose=0,
            validation_data=(TEST.images[:64], TEST.labels[:64]),
            callbacks=[*callbacks, CheckpointCallback(checkpoint)],
        )
    weights = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
    return history.history, [np.asarray(variable.value) for variable in weights]


def assert_same(weights: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [(w.dtype, w.shape, w.tobytes()) for w in weights] == [(w.dtype, w.shape, w.tobytes()) for w in expected]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every `fit` compiles functions of its own, which are the same few programs: most of the time of these tests."""
    options: dict[str, Any] = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    _configure(options)
    yield
    _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # so that JAX looks at them anew


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (1, 3), (1, NUM_BATCHES - 1)])
def test_preempted_fit_resumes_to_the_last_bit(epoch: int, batch: int, tmp_path: Path, uninterrupted: Any) -> None:
    """SIGTERM at a batch saves at its end and leaves `fit`; another one ends in the same weights and metrics."""
    with pytest.raises(Preempted) as preempted:
        fit(tmp_path, Do(terminate, epoch, batch))
    assert preempted.value.code == 143
    assert CheckpointManager(tmp_path).latest_step() == epoch * NUM_BATCHES + batch + 1
    model = make_model()
    np.random.seed(99)  # another process has drawn other numbers
    history, weights = fit(tmp_path, model=model)
    assert_same(weights, uninterrupted[1])
    assert history == {name: values[epoch:] for name, values in uninterrupted[0].items()}


def test_crashed_fit_resumes_to_the_last_bit(tmp_path: Path, uninterrupted: Any) -> None:
    """A crash costs the batches since the last checkpoint, and not a bit of what comes out."""
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, Do(crash, 1, 5), every_n_steps=4)
    assert CheckpointManager(tmp_path).latest_step() == 12
    assert_same(fit(tmp_path, every_n_steps=4)[1], uninterrupted[1])
    assert CheckpointManager(tmp_path).steps() == [16, 20, 21]


def test_asked_to_stop_during_the_last_validation(tmp_path: Path) -> None:
    """SIGTERM after the last batch leaves with everything saved, and a later `fit` has nothing to do."""
    with pytest.raises(Preempted):
        fit(tmp_path, Do(terminate, 0), epochs=1)
    assert CheckpointManager(tmp_path).steps() == [NUM_BATCHES]
    assert fit(tmp_path, Do(crash, 0, 0), epochs=1)[0] == {}


def test_fit_returns_where_the_hook_does_not_raise(tmp_path: Path, uninterrupted: Any) -> None:
    """With raise_on_preemption=False, `fit` returns within its epoch, and the next one finishes that epoch."""
    fit(tmp_path, Do(terminate, 1, 2), raise_on_preemption=False)
    assert CheckpointManager(tmp_path).steps() == [10]
    assert_same(fit(tmp_path)[1], uninterrupted[1])


def test_finished_fit_goes_on_to_more_epochs(tmp_path: Path, uninterrupted: Any) -> None:
    """The end of `fit` is saved; with more epochs it goes on from there, as if it had had them from the start."""
    fit(tmp_path, epochs=1)
    assert CheckpointManager(tmp_path).restore()["progress"] == {"epoch": 1, "batch": 0}
    assert_same(fit(tmp_path)[1], uninterrupted[1])


def test_the_end_of_fit_waits_for_its_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When `fit` returns, the last step is committed, however slow the disk is."""
    delay(monkeypatch, commit, "publish", secs=0.5)
    model = make_model()
    with CheckpointHook(tmp_path) as hook:
        model.fit(X, Y, batch_size=BATCH_SIZE, epochs=1, verbose=0, callbacks=[CheckpointCallback(hook)])
        assert CheckpointManager(tmp_path).steps() == [NUM_BATCHES]


def test_several_steps_in_one_execution(tmp_path: Path, uninterrupted: Any) -> None:
    """The step counts batches, also where Keras trains several at a time and the last time fewer."""
    with pytest.raises(Preempted):
        fit(tmp_path, Do(terminate, 1, 3), model=make_model(2))
    assert CheckpointManager(tmp_path).latest_step() == NUM_BATCHES + 4
    assert_same(fit(tmp_path, model=make_model(2))[1], uninterrupted[1])
    assert CheckpointManager(tmp_path).latest_step() == EPOCHS * NUM_BATCHES


def test_a_py_dataset_resumes(tmp_path: Path) -> None:
    """A dataset of batches, shuffled by Keras, resumes in the order that its epoch was in."""
    expected = fit(tmp_path / "uninterrupted", data=Digits())[1]
    with pytest.raises(Preempted):
        fit(tmp_path / "run", Do(terminate, 1, 3), data=Digits())
    assert_same(fit(tmp_path / "run", data=Digits())[1], expected)


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A model of another shape is an error that lists the variables, and is left as it was."""
    fit(tmp_path, epochs=1)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [np.asarray(variable.value) for variable in model.variables]
    with pytest.raises(ValueError, match="trainable"):
        fit(tmp_path, model=model)
    for weight, expected in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(weight.value, expected)


def test_what_is_no_hook_is_refused() -> None:
    """A directory in place of the hook is a TypeError at once."""
    with pytest.raises(TypeError, match="CheckpointHook"):
        CheckpointCallback("runs/keras")  # type: ignore[arg-type]
