"""A training loop of Equinox, interrupted and resumed: the whole module goes in, and comes back.

    python examples/equinox_loop.py
    python examples/equinox_loop.py --steps=2000 --directory=/tmp/equinox

Trains a small convolutional network on scikit-learn's digits twice: uninterrupted, and with a SIGTERM half-way, after
which another network, of other random weights, takes up the checkpoint. The exit status is 0 if both end in the same
network and optimizer, to the last bit.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook, ShuffledIndices
from ckpt_hooks.testing import assert_same
from examples._interrupted import arguments, preemption_of

NUM_TRAIN = 1500  # of 1797
OPTIMIZER = optax.adamw(2e-3)


def make_state(seed: int) -> dict[str, Any]:
    """A new network and its optimizer's state. Its activation functions are leaves, too; nothing is saved of them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    layers: list[Any] = [
        eqx.nn.Conv2d(1, 16, kernel_size=3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(16, 16, kernel_size=3, padding=1, key=keys[1]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(256, 10, key=keys[2]),
    ]
    network = eqx.nn.Sequential(layers)
    return {"network": network, "opt_state": OPTIMIZER.init(eqx.filter(network, eqx.is_array))}


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """float32[1797, 1, 8, 8] from 0 to 1, and int32[1797]."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int32)


@eqx.filter_jit
def train_step(state: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Any], jax.Array]:
    def loss_of(network: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(network)(images), labels).mean()

    network = state["network"]
    loss, grads = eqx.filter_value_and_grad(loss_of)(network)
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], eqx.filter(network, eqx.is_array))
    return {"network": eqx.apply_updates(network, updates), "opt_state": opt_state}, loss


@eqx.filter_jit
def accuracy(network: Any, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    return jnp.mean(jax.vmap(network)(images).argmax(-1) == labels)


def train(directory: Path, num_steps: int, seed: int = 0, sigterm_at: int | None = None) -> dict[str, Any]:
    """Trains from the newest checkpoint, or else from the weights of `seed`, to the end."""
    images, labels = load_images()
    state, indices = make_state(seed), ShuffledIndices(NUM_TRAIN, batch_size=50, seed=1)
    with CheckpointHook(directory, every_n_steps=50, on_steps=(num_steps,)) as hook:
        state = hook.restore(state, data=indices)
        print(f"{directory.name:14}from step {hook.start_step}", flush=True)
        for step in range(hook.start_step + 1, num_steps + 1):
            chosen = next(indices)
            state, loss = train_step(state, images[chosen], labels[chosen])
            if step == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does it
            hook(step, state, metrics={"loss": loss}, data=indices)
    unseen = accuracy(state["network"], images[NUM_TRAIN:], labels[NUM_TRAIN:])
    print(f"{directory.name:14}to step {num_steps}, accuracy on unseen digits {unseen:.4f}", flush=True)
    return state


def main() -> None:
    with arguments(__doc__, "steps", 600) as (num_steps, directory):
        expected = train(directory / "uninterrupted", num_steps)
        interrupted = partial(train, directory / "interrupted", num_steps)
        print(f"{'interrupted':14}{preemption_of(partial(interrupted, sigterm_at=num_steps // 2), directory)}")
        resumed = interrupted(seed=1)  # whose weights are all replaced
    assert_same(*(eqx.filter(state, eqx.is_array) for state in (expected, resumed)))
    print(f"All {len(jax.tree.leaves(eqx.filter(expected, eqx.is_array)))} arrays are equal to the last bit.")


if __name__ == "__main__":
    main()
