"""Training on eight devices, predicting on one, and on none: only the parameters are read.

    python examples/params_elsewhere.py
    python examples/params_elsewhere.py --width=4096 --directory=/tmp/elsewhere

Three programs, one after the other. The first trains a Flax model whose parameters and optimizer are divided among
eight devices (of one CPU) and saves it. The second has one device, the third uses NumPy alone: both restore nothing but
`params` and predict. The exit status is 0 if all three have the same parameters to the last bit, predict the same
digits, and the latter two have read less than half of the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook, CheckpointManager

NUM_TRAIN = 1500  # of 1797
NUM_STEPS = 50


class MLP(nn.Module):
    """Two hidden layers and a head for ten digits."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width, name="first")(images))
        x = nn.relu(nn.Dense(self.width, name="second")(x))
        return nn.Dense(10, name="head")(x)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """float32[1797, 64] from 0 to 1, and int32[1797]."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


# ------------------------------------------------------------------ the three programs


def train_on_all_devices(directory: Path, width: int) -> dict[str, Any]:
    """Trains and saves; arrays are divided by rows, where the rows can be."""
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    images, labels = digits()

    def create() -> TrainState:
        params = MLP(width).init(jax.random.key(0), images[:1])["params"]
        return TrainState.create(apply_fn=MLP(width).apply, params=params, tx=optax.adam(3e-3))

    def sharding(leaf: Any) -> NamedSharding:
        is_divisible = leaf.ndim and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec("rows") if is_divisible else PartitionSpec())

    shardings = jax.tree.map(sharding, jax.eval_shape(create))
    state = jax.jit(create, out_shardings=shardings)()

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def loss_of(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return state.apply_gradients(grads=jax.grad(loss_of)(state.params))

    with CheckpointHook(directory, on_steps=(NUM_STEPS,)) as hook:
        for step in range(1, NUM_STEPS + 1):
            chosen = np.arange(step * 100, step * 100 + 100) % NUM_TRAIN
            state = train_step(state, images[chosen], labels[chosen])
            jax.block_until_ready(state)  # with two steps in flight, eight devices on few cores may deadlock
            hook(step, state)
    logits = state.apply_fn({"params": state.params}, images[NUM_TRAIN:])
    return report("trained", len(jax.devices()), state.params, logits)


def predict_on_one_device(directory: Path, width: int) -> dict[str, Any]:
    """Restores the parameters into the abstract ones of the model, which say where they go: to the one device."""
    images, _ = digits()
    device = SingleDeviceSharding(jax.devices()[0])
    like = jax.jit(MLP(width).init, out_shardings=device).eval_shape(jax.random.key(0), images[:1])
    before = bytes_read()
    params = CheckpointManager(directory).restore(like, items=("params",))["params"]
    num_bytes = bytes_read() - before
    logits = MLP(width).apply({"params": params}, images[NUM_TRAIN:])
    return report("JAX", len(jax.devices()), params, logits, num_bytes)


def predict_with_numpy(directory: Path, width: int) -> dict[str, Any]:
    """Restores them without a target, as NumPy arrays, which need no device and no model."""
    images, _ = digits()
    before = bytes_read()
    params = CheckpointManager(directory).restore(items=("params",))["params"]
    num_bytes = bytes_read() - before
    x = images[NUM_TRAIN:]
    for name in ("first", "second"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return report("NumPy", 0, params, logits, num_bytes)


PROGRAMS = {program.__name__: program for program in (train_on_all_devices, predict_on_one_device, predict_with_numpy)}


def bytes_read() -> int:
    """How many bytes this process has read so far, of whatever file; Linux counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def report(name: str, num_devices: int, params: Any, logits: Any, num_bytes: int = 0) -> dict[str, Any]:
    """What one program has to say."""
    checksum = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        checksum.update(np.asarray(leaf).tobytes())
    predicted = np.asarray(logits).argmax(-1)
    correct = float((predicted == digits()[1][NUM_TRAIN:]).mean())
    return {
        "name": name,
        "devices": num_devices,
        "params": checksum.hexdigest()[:16],
        "accuracy": correct,
        "predicted": predicted.tolist(),
        "read_bytes": num_bytes,
    }


# ------------------------------------------------------------------ all of them


def run(program: str, num_devices: int, directory: Path, width: int) -> dict[str, Any]:
    """What the program reports, in a process of its own that has so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    process = subprocess.run(
        [sys.executable, __file__, f"--program={program}", f"--directory={directory}", f"--width={width}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
    )
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return json.loads(process.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layers (default: 1024)")
    parser.add_argument("--directory", type=Path, help="of the run, a new one (default: temporary)")
    parser.add_argument("--program", choices=PROGRAMS, help="only this one (default: all three)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.program:
            print(json.dumps(PROGRAMS[args.program](directory, args.width)))
            return 0
        reports = [
            run("train_on_all_devices", 8, directory, args.width),
            run("predict_on_one_device", 1, directory, args.width),
            run("predict_with_numpy", 1, directory, args.width),
        ]
        checkpoint = directory / str(NUM_STEPS)
        size_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    print(f"The checkpoint has {size_bytes:,} bytes.\n")
    print("         devices  parameters        accuracy  bytes read")
    for each in reports:
        read = f"{each['read_bytes']:,} ({each['read_bytes'] / size_bytes:.0%})" if each["read_bytes"] else "-"
        print("{name:9}{devices:<9}{params}  {accuracy:.4f}    ".format(**each) + read)
    is_same = all(each[what] == reports[0][what] for each in reports for what in ("params", "predicted"))
    is_part = all(each["read_bytes"] < size_bytes / 2 for each in reports)
    print("\nThe same parameters, the same predictions." if is_same else "\nThey differ.")
    return 0 if is_same and is_part else 1


if __name__ == "__main__":
    sys.exit(main())
