"""Fine-tuning from another run: its parameters, low-rank adapters beside them, and a new head.

    python examples/finetune.py
    python examples/finetune.py --steps=1000 --directory=/tmp/finetune

A Flax model is trained on the digits 0 to 4 of scikit-learn. A second run learns 5 to 9 from a few examples: it begins
with the layers of the first one, which stay as they are, and trains LoRA-style adapters and a head of its own. It is
interrupted half-way, and goes on from its own checkpoint and no longer from the first run. The exit status is 0 if that
ends as it would have without the interruption, and left the layers as they were, both to the last bit.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom, ShuffledIndices
from ckpt_hooks.testing import assert_same
from examples._interrupted import arguments, preemption_of

NUM_FEW = 50  # examples that fine-tuning sees
LAYERS = ("layer_0", "layer_1")


class Classifier(nn.Module):
    """Two hidden layers and a head for five digits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        for name in LAYERS:
            images = nn.relu(nn.Dense(128, name=name)(images))
        return nn.Dense(5, name="head")(images)


class AdaptedDense(nn.Module):
    """A dense layer `base`, and beside it a product of two thin matrices that is zero at first."""

    features: int
    rank: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = nn.Dense(self.rank, use_bias=False, name="down")(x)
        up = nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.zeros, name="up")(down)
        return nn.Dense(self.features, name="base")(x) + up


class AdaptedClassifier(nn.Module):
    """`Classifier` with adapters, and another head."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        for name in LAYERS:
            images = nn.relu(AdaptedDense(128, name=name)(images))
        return nn.Dense(5, name="new_head")(images)


def adapters_only(learning_rate: float) -> optax.GradientTransformation:
    """Adam for the adapters and the head. What is frozen has no optimizer state, so none is saved of it."""

    def label(path: Any, leaf: Any) -> str:
        return "frozen" if "base" in jax.tree_util.keystr(path) else "trained"

    return optax.multi_transform(
        {"trained": optax.adam(learning_rate), "frozen": optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


# How a run is named in another one: what was saved, to where it belongs in the new state.
RENAME = {f"params/{name}": f"params/{name}/base" for name in LAYERS}


def from_run(directory: Path) -> InitFrom:
    """The layers of that run; adapters and head were not saved there and keep their values, its head is left out."""
    return InitFrom(directory, rename=RENAME, missing="keep", unexpected="ignore")


def digits(first: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Images float32[n, 64] of the digits `first` to `first + 4`, and which of the five they are, int32[n]."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero((labels >= first) & (labels < first + 5))[part]
    return (images[chosen] / 16).astype(np.float32), (labels[chosen] - first).astype(np.int32)


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    def loss_of(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss_of)(state.params))


def accuracy(state: TrainState, images: np.ndarray, labels: np.ndarray) -> float:
    return float(jnp.mean(state.apply_fn({"params": state.params}, images).argmax(-1) == labels))


def train(
    directory: Path,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    examples: tuple[np.ndarray, np.ndarray],
    num_steps: int,
    *,
    init_from: InitFrom | None = None,
    sigterm_at: int | None = None,
) -> TrainState:
    """Trains from the newest checkpoint of this run, or else from `init_from`, or else from scratch."""
    images, labels = examples
    params = model.init(jax.random.key(1), images[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    indices = ShuffledIndices(len(images), batch_size=25)
    with CheckpointHook(directory, every_n_steps=100, on_steps=(num_steps,), init_from=init_from) as hook:
        state = hook.restore(state, data=indices)
        for step in range(hook.start_step + 1, num_steps + 1):
            chosen = next(indices)
            state = train_step(state, images[chosen], labels[chosen])
            if step == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does it
            hook(step, state, data=indices)
    print(f"{directory.name:14}steps {hook.start_step} to {num_steps}", flush=True)
    return state


def main() -> None:
    few, unseen = digits(5, slice(NUM_FEW)), digits(5, slice(NUM_FEW, None))
    with arguments(__doc__, "steps", 300) as (num_steps, directory):
        pretrained = directory / "pretraining"
        train(pretrained, Classifier(), optax.adam(1e-3), digits(0), num_steps)

        model, optimizer = AdaptedClassifier(), adapters_only(3e-3)
        tuned = train(directory / "fine-tuning", model, optimizer, few, num_steps, init_from=from_run(pretrained))
        interrupted = partial(train, directory / "interrupted", model, optimizer, few, num_steps)
        first = partial(interrupted, init_from=from_run(pretrained), sigterm_at=num_steps // 2)
        print(f"{'interrupted':14}{preemption_of(first, directory)}")
        # Where a run has checkpoints of its own, those of the other one may be gone.
        resumed = interrupted(init_from=from_run(directory / "gone"))
        layers = CheckpointManager(pretrained).restore(items=[f"params/{name}" for name in LAYERS])["params"]

    print(f"\nThe digits 5 to 9, from {NUM_FEW} examples   uninterrupted  resumed")
    print(
        f"accuracy on unseen ones                {accuracy(tuned, *unseen):.4f}  {accuracy(resumed, *unseen):>13.4f}\n"
    )
    assert_same((tuned.params, tuned.opt_state), (resumed.params, resumed.opt_state))
    assert_same(layers, {name: jax.tree.map(np.asarray, resumed.params[name]["base"]) for name in LAYERS})
    all_, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (resumed.params, layers))
    print(f"Trained were {all_ - frozen:,} of {all_:,} parameters. Both runs ended in the same ones to the last bit;")
    print("the others are those of the pretraining, to the last bit.")


if __name__ == "__main__":
    main()
