"""LoRA-style fine-tuning on digits: a frozen base from another run, adapters that train, both ways of saving them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom
from ckpt_hooks.errors import StructureMismatchError
from ckpt_hooks.testing import assert_same

HIDDEN = 64


class Adapted(nn.Module):
    """A dense layer with a low-rank one beside it."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = self.param("lora_down", nn.initializers.normal(0.1), (x.shape[-1], 2))
        up = self.param("lora_up", nn.initializers.zeros, (2, self.features))
        return nn.Dense(self.features, name="base")(x) + x @ down @ up


class Classifier(nn.Module):
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(10, name="out")(nn.relu(self.layer(HIDDEN, name="hidden")(x)))


DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16, jnp.float32), jnp.asarray(DIGITS.target)
RENAME = {"params/hidden": "params/hidden/base", "params/out": "params/out/base"}


def is_adapter(path: Any) -> bool:
    return bool(path[-1].startswith("lora"))


def by_label(params: Any) -> Any:
    return path_aware_map(lambda path, _: "train" if is_adapter(path) else "freeze", params)


OPTIMIZERS = {
    "multi_transform": optax.multi_transform({"train": optax.adamw(1e-2), "freeze": optax.set_to_zero()}, by_label),
    "masked": optax.chain(
        optax.masked(optax.adamw(1e-2), lambda params: path_aware_map(lambda path, _: is_adapter(path), params)),
        optax.masked(optax.set_to_zero(), lambda params: path_aware_map(lambda path, _: not is_adapter(path), params)),
    ),
}
MODEL = Classifier(Adapted)


@pytest.fixture(params=OPTIMIZERS)
def tx(request: pytest.FixtureRequest) -> optax.GradientTransformation:
    return OPTIMIZERS[request.param]


@jax.jit
def train_step(state: TrainState, number: jax.Array) -> TrainState:
    rows = jax.random.permutation(jax.random.fold_in(jax.random.key(0), number), len(LABELS))[:128]

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, IMAGES[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def make_state(model: nn.Module, tx: optax.GradientTransformation, seed: int) -> TrainState:
    params = model.init(jax.random.key(seed), IMAGES[:1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the plain classifier has been trained for a while."""
    directory: Path = tmp_path_factory.mktemp("base")
    state = make_state(Classifier(nn.Dense), optax.adam(1e-3), 0)
    with CheckpointHook(directory, every_n_steps=20) as hook:
        for step in range(20):
            state = train_step(state, jnp.int32(step))
            hook(step + 1, state)
    return directory


def frozen(params: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in flatten_dict(params, sep="/").items() if "lora" not in name}


def saved_base(base: Path) -> dict[str, Any]:
    params = CheckpointManager(base).restore()["params"]
    return {f"{layer}/base/{name}": leaf for layer in params for name, leaf in params[layer].items()}


def tune_all(directory: Path, base: Path, tx: optax.GradientTransformation, num_steps: int) -> TrainState:
    origin = InitFrom(base, rename=RENAME, missing="keep")
    with CheckpointHook(directory, every_n_steps=2, init_from=origin) as hook:
        state = hook.restore(make_state(MODEL, tx, 1))
        for step in range(hook.start_step, num_steps):
            state = train_step(state, jnp.int32(step))
            hook(step + 1, state)
    return state


def adapters_of(state: TrainState) -> dict[str, Any]:
    params = flatten_dict(state.params, sep="/")
    adapters = {name: leaf for name, leaf in params.items() if "lora" in name}
    return {"adapters": adapters, "opt_state": state.opt_state, "step": state.step}


def tune_adapters(directory: Path, base: Path, tx: optax.GradientTransformation, num_steps: int) -> TrainState:
    with CheckpointHook(directory, every_n_steps=2) as hook:
        state = InitFrom(base, rename=RENAME, missing="keep").fill(make_state(MODEL, tx, 1))
        saved = hook.restore(adapters_of(state))
        params = unflatten_dict({**flatten_dict(state.params, sep="/"), **saved["adapters"]}, sep="/")
        state = state.replace(params=params, opt_state=saved["opt_state"], step=saved["step"])
        for step in range(hook.start_step, num_steps):
            state = train_step(state, jnp.int32(step))
            hook(step + 1, adapters_of(state))
    return state


@pytest.mark.parametrize("tune", [tune_all, tune_adapters])
def test_a_resumed_fine_tuning_ends_as_one_that_ran_through(
    tmp_path: Path, base: Path, tx: optax.GradientTransformation, tune: Any
) -> None:
    """To the last bit; the base stays as it was saved, and the adapters have learned something."""
    through = tune(tmp_path / "through", base, tx, 8)
    tune(tmp_path / "resumed", base, tx, 4)
    resumed = tune(tmp_path / "resumed", base, tx, 8)
    assert_same(through, resumed)
    frozen_now = {name: np.asarray(leaf) for name, leaf in frozen(resumed.params).items()}
    assert_same(saved_base(base), frozen_now)
    assert np.abs(resumed.params["hidden"]["lora_up"]).max() > 0


def test_only_the_adapters_are_on_the_disk(tmp_path: Path, base: Path, tx: optax.GradientTransformation) -> None:
    """Neither frozen parameters nor a state of the optimizer for them."""
    tune_adapters(tmp_path / "run", base, tx, 2)
    saved = CheckpointManager(tmp_path / "run").restore()
    sizes = {leaf.size for leaf in jax.tree.leaves(saved)}
    assert sizes <= {1, 2 * HIDDEN, 2 * 10}
    assert saved["adapters"].keys() == {
        f"{layer}/lora_{side}" for layer in ("hidden", "out") for side in ("down", "up")
    }


def test_another_base_is_not_taken_for_it(tmp_path: Path, base: Path, tx: optax.GradientTransformation) -> None:
    """Without being told how the names differ, it is an error that names them, and no half of a base."""
    with (
        CheckpointHook(tmp_path / "run", init_from=base) as hook,
        pytest.raises(StructureMismatchError, match=r"missing .*hidden\.base\.kernel"),
    ):
        hook.restore(make_state(MODEL, tx, 1))
