"""The digits example: it learns, it resumes to the last bit, and it survives being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from ckpt_hooks import CheckpointManager, Preempted
from configs import digits_tiny
from examples.digits.data import ShuffledBatches, load_digits
from examples.digits.model import TrainState
from examples.digits.train import evaluate, train

REPOSITORY = Path(__file__).resolve().parents[1]
Log = Callable[[int, Mapping[str, Any]], None]


@pytest.fixture
def config() -> ConfigDict:
    config = digits_tiny.get_config()
    config.log_every_steps = 1  # so that the tests can act at any step
    return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return train(digits_tiny.get_config(), tmp_path_factory.mktemp("uninterrupted"))


def at_step(when: int, action: Callable[[], None]) -> Log:
    """Returns a log that calls `action` instead of writing down step `when`."""

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        if step == when:
            action()

    return log


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("out of memory")


def never() -> None:
    raise AssertionError("this step was not to be done again")


def assert_bit_identical(state: TrainState, expected: TrainState) -> None:
    def bits(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    leaves, expected_leaves = (
        {jax.tree_util.keystr(path): bits(leaf) for path, leaf in tree}
        for tree in map(jax.tree_util.tree_leaves_with_path, (state, expected))
    )
    assert leaves == expected_leaves


def test_digits_are_scikit_learns() -> None:
    """The example's data are the 1797 digits of `sklearn.datasets.load_digits`."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    images = np.concatenate([part.images for part in load_digits()])
    labels = np.concatenate([part.labels for part in load_digits()])
    table = np.column_stack([images * 16, labels])
    expected = np.column_stack(load_sklearn_digits(return_X_y=True))
    assert table.shape == (1797, 65)
    assert sorted(table.tolist()) == sorted(expected.tolist())


def test_digits_are_learnt(uninterrupted: TrainState) -> None:
    """Training with the tiny config ends with at least 95 % accuracy on digits it never saw."""
    assert float(evaluate(uninterrupted)["accuracy"]) >= 0.95


def test_batches_resume_within_an_epoch_and_across_epochs() -> None:
    """Batches that took over a state are followed by the very batches that it was followed by."""
    examples, _ = load_digits()
    batches = ShuffledBatches(examples, batch_size=64, seed=1)
    for _ in range(40):  # an epoch has 23
        state = batches.get_state()
        resumed = ShuffledBatches(examples, batch_size=64, seed=1)
        resumed.set_state(state)
        np.testing.assert_array_equal(next(batches).images, next(resumed).images)


def test_preempted_run_resumes_bit_identical(config: ConfigDict, tmp_path: Path, uninterrupted: TrainState) -> None:
    """SIGTERM half-way saves that very step, and the resumed run ends in the same bits."""
    with pytest.raises(Preempted) as preempted:
        train(config, tmp_path, log=at_step(100, terminate))
    assert preempted.value.code == 143
    assert CheckpointManager(tmp_path).latest_step() == 100

    state = train(config, tmp_path, log=at_step(100, never))
    assert_bit_identical(state, uninterrupted)


def test_crashed_run_resumes_bit_identical(config: ConfigDict, tmp_path: Path, uninterrupted: TrainState) -> None:
    """A crash costs the steps since the last checkpoint, and not a bit of the final state."""
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, tmp_path, log=at_step(100, crash))
    assert CheckpointManager(tmp_path).latest_step() == 90

    state = train(config, tmp_path, log=at_step(90, never))
    assert_bit_identical(state, uninterrupted)


def test_finished_run_is_left_alone(config: ConfigDict, tmp_path: Path) -> None:
    """Training again after the last step restores the final state, and does and saves nothing."""
    config.num_steps = 10
    state = train(config, tmp_path)
    again = train(config, tmp_path, log=lambda step, metrics: never())
    assert_bit_identical(again, state)
    assert CheckpointManager(tmp_path).steps() == [10]


def test_final_step_is_saved_with_its_metrics(config: ConfigDict, tmp_path: Path) -> None:
    """The last step has a checkpoint also where it is not due, which names the metrics."""
    config.num_steps = 10
    logged: list[dict[str, float]] = []

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        logged.append({name: float(value) for name, value in metrics.items()})

    train(config, tmp_path, log=log)
    custom_metadata = CheckpointManager(tmp_path).metadata(10).custom_metadata
    assert custom_metadata == {"step": 10, "metrics": pytest.approx(logged[-1])}


@pytest.mark.parametrize("name", ["digits", "digits_tiny"])
def test_configs_are_overridden_on_the_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config loads with `--config=`, and `--config.num_steps=` changes that one value."""
    expected = import_module(f"configs.{name}").get_config()
    expected.num_steps = 7
    argv = ["main", f"--config={REPOSITORY}/configs/{name}.py", "--config.num_steps=7"]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides

    flag_values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=flag_values)
    flag_values(argv)
    assert config.value.to_dict() == expected.to_dict()


def test_main_trains_and_reports_the_accuracy(tmp_path: Path) -> None:
    """`python -m examples.digits.main` prints its steps and the test accuracy, and exits with 0."""
    output = run_python(
        *("-m", "examples.digits.main", f"--workdir={tmp_path}"),
        *("--config=configs/digits_tiny.py", "--config.num_steps=50"),
    )
    assert "step 50  loss" in output
    assert "test accuracy 0." in output


def test_survive_ends_with_identical_states(tmp_path: Path) -> None:
    """`survive.py` exits with 0 after a SIGTERM and a SIGKILL, from any directory."""
    output = run_python(
        str(REPOSITORY / "examples" / "survive.py"),
        *("--terms=1", "--kills=1", "--num_steps=500", f"--workdir={tmp_path}"),
        f"--config={REPOSITORY}/configs/digits_tiny.py",
        cwd=tmp_path,
    )
    assert "leaves)" in output and "(0 leaves)" not in output
    assert output.count("bit-identical") == 2
    assert not list(tmp_path.iterdir()), "the runs are removed at the end"


def run_python(*arguments: str, cwd: Path = REPOSITORY) -> str:
    process = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
