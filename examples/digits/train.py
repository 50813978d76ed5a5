"""The training loop: stop it whenever you like, call it again, and it goes on to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from clu import metrics as clu_metrics
from ml_collections import ConfigDict

from ckpt_hooks import CheckpointHook
from examples.digits.data import Batch, ShuffledBatches, load_digits
from examples.digits.model import TrainState, create_state, eval_logits, train_logits

Metrics = clu_metrics.Collection.create(
    loss=clu_metrics.Average.from_output("loss"),
    accuracy=clu_metrics.Accuracy,
)


def print_metrics(step: int, metrics: Mapping[str, Any]) -> None:
    values = "  ".join(f"{name} {float(value):.4f}" for name, value in metrics.items())
    print(f"step {step}  {values}", flush=True)


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    log: Callable[[int, Mapping[str, Any]], None] = print_metrics,
) -> TrainState:
    """Trains to `config.num_steps` from the newest checkpoint in `workdir`, if there is one."""
    examples, _ = load_digits()
    batches = ShuffledBatches(examples, config.batch_size, config.seed)
    state = create_state(config)
    with CheckpointHook(workdir, every_n_steps=config.checkpoint_every_steps, on_steps=(config.num_steps,)) as hook:
        state = hook.restore(state, data=batches)
        for step in range(hook.start_step, config.num_steps):
            state, metrics = train_step(state, next(batches))
            if (step + 1) % config.log_every_steps == 0:
                log(step + 1, metrics.compute())
            hook(step + 1, state, metrics=metrics, data=batches)
    return state


# The old state is donated, as in any large training: the hook has to have taken what it saves
# before it returns, since the next step writes over these buffers.
@partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, clu_metrics.Collection]:
    # The rng moves with the state, so that a resumed run drops the same units.
    dropout_rng, rng = jax.random.split(state.dropout_rng)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, batch_stats = train_logits(state, params, batch, rng)
        return mean_loss(logits, batch), (logits, batch_stats)

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats, dropout_rng=dropout_rng)
    return state, compute_metrics(loss, logits, batch)


def evaluate(state: TrainState) -> dict[str, Any]:
    """Returns the metrics of `state` on the test examples."""
    _, examples = load_digits()
    return eval_step(state, examples).compute()


@jax.jit
def eval_step(state: TrainState, batch: Batch) -> clu_metrics.Collection:
    logits = eval_logits(state, batch)
    return compute_metrics(mean_loss(logits, batch), logits, batch)


def mean_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def compute_metrics(loss: jax.Array, logits: jax.Array, batch: Batch) -> clu_metrics.Collection:
    return Metrics.single_from_model_output(loss=loss, logits=logits, labels=batch.labels)
