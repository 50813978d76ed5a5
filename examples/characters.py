"""A character model of Flax NNX, fed by Grain: interrupted and resumed to the last bit, the order of its data included.

    python examples/characters.py
    python examples/characters.py --steps=2000 --directory=/tmp/characters

Learns to write like the descriptions of scikit-learn's datasets, which come with that package. It is trained twice:
uninterrupted, and with a SIGTERM half-way, after which new objects go on from the checkpoint. The exit status is 0 if
both saw the same batches and ended in the same model, optimizer and random numbers, to the last bit.
"""

from __future__ import annotations

import os
import signal
import zlib
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx

from ckpt_hooks import CheckpointHook
from ckpt_hooks.testing import assert_same
from examples._interrupted import arguments, preemption_of

WINDOW = 64  # characters that are predicted in a row
BATCH_SIZE = 16
NUM_CODES = 128  # ASCII


class CharacterModel(nnx.Module):
    """Predicts each next character from those before it."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128) -> None:
        self.embed = nnx.Embed(NUM_CODES, width, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(width, width, rngs=rngs), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # draws from a stream of random numbers, which is saved too
        self.head = nnx.Linear(width, NUM_CODES, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """int32[batch, time] to the logits of the next characters, float32[batch, time, NUM_CODES]."""
        return self.head(self.dropout(self.rnn(self.embed(codes))))


def read_text() -> np.ndarray:
    """The descriptions of scikit-learn's datasets, one after the other, as int32 codes."""
    folder = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/descr")))
    words = [word for path in sorted(folder.glob("*.rst")) for word in path.read_text().split()]
    text = " ".join(words)
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


def batches(text: np.ndarray) -> Any:
    """Endless shuffled windows of the text, int32[BATCH_SIZE, WINDOW + 1]; a Grain iterator."""
    starts = grain.MapDataset.range(len(text) - WINDOW).shuffle(seed=1).repeat()
    windows = starts.map(lambda start: text[start : start + WINDOW + 1])
    return iter(windows.batch(BATCH_SIZE).to_iter_dataset())


@nnx.jit
def train_step(model: CharacterModel, optimizer: nnx.Optimizer, codes: jax.Array) -> jax.Array:
    def loss_of(model: CharacterModel) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(codes[:, :-1]), codes[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train(directory: Path, num_steps: int, sigterm_at: int | None = None) -> tuple[dict[str, Any], dict[int, Any]]:
    """Trains from the newest checkpoint to the end; returns the state and {step: (loss, checksum of its batch)}."""
    model = CharacterModel(nnx.Rngs(0))
    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)}
    data = batches(read_text())
    log = {}
    with CheckpointHook(directory, every_n_steps=50) as hook:
        hook.restore(state, data=data)  # NNX objects are updated in place, and the iterator goes on where it was
        print(f"{directory.name:14}from step {hook.start_step}", flush=True)
        for step in range(hook.start_step + 1, num_steps + 1):
            codes = next(data)
            loss = train_step(model, state["optimizer"], codes)
            log[step] = (float(loss), zlib.crc32(codes.tobytes()))
            if step == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does it
            hook(step, state, metrics={"loss": loss}, data=data)
    return state, log


def write(model: CharacterModel, start: str, length: int) -> str:
    """Goes on from `start`, drawing each character from what the model thinks likely."""
    model.eval()
    predict = nnx.jit(lambda model, codes, last, rng: jax.random.categorical(rng, 2 * model(codes)[0, last]))
    codes = np.zeros((1, length), np.int32)
    codes[0, : len(start)] = [ord(character) for character in start]
    for last in range(len(start) - 1, length - 1):
        codes[0, last + 1] = predict(model, codes, last, jax.random.key(last))
    return bytes(codes[0].tolist()).decode("ascii")


def main() -> None:
    with arguments(__doc__, "steps", 500) as (num_steps, directory):
        state, log = train(directory / "uninterrupted", num_steps)
        interrupted = partial(train, directory / "interrupted", num_steps)
        print(f"{'interrupted':14}{preemption_of(partial(interrupted, sigterm_at=num_steps // 2), directory)}")
        resumed_state, resumed_log = interrupted()

    print("\n          uninterrupted          resumed\nstep      loss    batch          loss    batch")
    for step in sorted(resumed_log)[:: max(1, len(resumed_log) // 5)]:
        (loss, batch), (resumed_loss, resumed_batch) = log[step], resumed_log[step]
        print(f"{step:<10}{loss:.4f}  {batch:08x}       {resumed_loss:.4f}  {resumed_batch:08x}")
    assert_same({step: log[step] for step in resumed_log}, resumed_log)
    assert_same(nnx.to_pure_dict(nnx.state(state)), nnx.to_pure_dict(nnx.state(resumed_state)))
    print(f"\nEqual to the last bit. The resumed model writes:\n\n{write(resumed_state['model'], 'The data', 200)}")


if __name__ == "__main__":
    main()
