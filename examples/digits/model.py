"""The model and everything that its training has to remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from ml_collections import ConfigDict

from examples.digits.data import Batch

NUM_PIXELS = 64
NUM_CLASSES = 10


class MLP(nn.Module):
    """A multi-layer perceptron with batch normalization and dropout."""

    hidden_sizes: Sequence[int]
    dropout_rate: float

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for size in self.hidden_sizes:
            x = nn.Dense(size, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(NUM_CLASSES)(x)


class TrainState(train_state.TrainState):
    """Adds what batch normalization and dropout carry from one step to the next."""

    batch_stats: Any
    dropout_rng: jax.Array


def create_state(config: ConfigDict) -> TrainState:
    """Returns the state before the first step; it depends on `config` alone."""
    model = MLP(tuple(config.hidden_sizes), config.dropout_rate)
    optimizer = create_optimizer(config)

    @jax.jit  # one compilation instead of one for every operation
    def init() -> TrainState:
        params_rng, dropout_rng = jax.random.split(jax.random.key(config.seed))
        variables = model.init(params_rng, jnp.zeros((1, NUM_PIXELS)), train=False)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optimizer,
            batch_stats=variables["batch_stats"],
            dropout_rng=dropout_rng,
        )

    return init()


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.num_steps // 20,
        decay_steps=config.num_steps,
    )
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def train_logits(state: TrainState, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the logits for `params`, and the batch statistics that this batch has moved."""
    logits, updates = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        batch.images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": rng},
    )
    return logits, updates["batch_stats"]


def eval_logits(state: TrainState, batch: Batch) -> jax.Array:
    """Returns the logits without dropout, normalized by the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: jax.Array = state.apply_fn(variables, batch.images, train=False)
    return logits
