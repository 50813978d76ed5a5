"""Several processes train one model; one of them is asked to stop, and as many or another number of them go on.

    python examples/multihost.py
    python examples/multihost.py --first=4 --then 4 2 1 --num_steps=2000

Starts processes of `jax.distributed` on this machine, as a cluster would on several: each has two CPU devices, the
parameters of a Flax model are sharded over all of them, and every process calls the same hook. In the midst of it one
process gets SIGTERM. All save the same step and leave; then each number of processes in `--then` goes on from there.

The parameters at the end are compared with those of a training without interruption:

- resumed by as many processes, they are bit-identical: the same program runs on the same mesh.
- resumed by another number, they are equal but for rounding. What is restored is the same to the last bit, but sums
  over the batch and over sharded axes are then taken in another order, on which floating-point addition depends.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
DEVICES_PER_PROCESS = 2
BATCH_SIZE = 64
SAVE_EVERY_STEPS = 100
PREEMPTED = 143


# ------------------------------------------------------------------ what every process does


def train(process: int, count: int, address: str, workdir: Path, num_steps: int) -> None:
    """One process of a training; with one process, `jax.distributed` is not needed."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ckpt_hooks import CheckpointHook
    from examples.digits.data import Batch, ShuffledBatches, load_digits

    if count > 1:
        jax.distributed.initialize(address, count, process, coordinator_bind_address=address)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
    optimizer = optax.adamw(1e-3)

    def sharding_of(leaf: Any) -> NamedSharding:
        # The rows of each kernel, and of its moments, are divided among all devices; what is small is everywhere.
        is_divided = leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec("data") if is_divided else PartitionSpec())

    def init(rng: Any) -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=model.init(rng, jnp.zeros((1, 64))), tx=optimizer)

    rng = jax.random.key(0)
    shardings = jax.tree.map(sharding_of, jax.eval_shape(init, rng))
    init = jax.jit(init, out_shardings=shardings)

    @jax.jit
    def step_of(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        def loss_of(params: Any) -> Any:
            logits = state.apply_fn(params, batch.images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        state = jax.lax.with_sharding_constraint(state.apply_gradients(grads=grads), shardings)
        return state, loss

    examples, _ = load_digits()
    batches = ShuffledBatches(examples, BATCH_SIZE, seed=0)
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    # The order of the data is one of the whole run and not of a process, so it is a part of the state.
    with CheckpointHook(workdir, every_n_steps=SAVE_EVERY_STEPS, on_steps=(num_steps,), timeout_secs=60) as hook:
        saved = {"train": init(rng), "data": batches.get_state()}
        saved = hook.restore(saved)
        state = saved["train"]
        batches.set_state(saved["data"])
        if hook.start_step and process == 0:
            print(f"resumed from step {hook.start_step} with {count} processes", flush=True)
        for step in range(hook.start_step, num_steps):
            batch = next(batches)  # the whole of it in every process, which takes the examples of its own devices
            batch = jax.tree.map(
                lambda part: jax.make_array_from_callback(part.shape, by_example, part.__getitem__), batch
            )
            # One step at a time: CPU devices that wait for each other in two of them can take all threads there are.
            state, loss = jax.block_until_ready(step_of(state, batch))
            if process == 0:
                print(f"step {step + 1}", flush=True)
            metrics = {"loss": loss} if (step + 1) % SAVE_EVERY_STEPS == 0 else None
            hook(step + 1, {"train": state, "data": batches.get_state()}, metrics=metrics)


# ------------------------------------------------------------------ the launcher


def main() -> int:
    args = parse_args()
    if args.process is not None:
        train(args.process, args.count, args.address, args.workdir, args.num_steps)
        return 0
    with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
        reference, interrupted = Path(folder, "uninterrupted"), Path(folder, "interrupted")
        run(args.first, reference, args.num_steps)
        codes = run(args.first, interrupted, args.num_steps, stop_at=args.num_steps // 5)
        print(f"SIGTERM to process {args.first - 1}: step {newest(interrupted)[0]} is saved, exit codes {codes}\n")
        verdicts = []
        for count in args.then:
            resumed = Path(folder, f"resumed_by_{count}")
            shutil.copytree(interrupted, resumed)
            run(count, resumed, args.num_steps)
            verdicts.append(verdict(newest(reference), newest(resumed), is_same=count == args.first))
    return 0 if all(verdicts) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=2, help="processes until the SIGTERM (default: 2)")
    parser.add_argument("--then", type=int, nargs="+", default=[2, 4], help="processes that resume (default: 2 4)")
    parser.add_argument("--num_steps", type=int, default=1000, help="of the training (default: 1000)")
    parser.add_argument("--workdir", type=Path, help="where to put the runs (default: temporary)")
    for name, kind in (("process", int), ("count", int), ("address", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of a process that this program starts
    return parser.parse_args()


def run(count: int, workdir: Path, num_steps: int, *, stop_at: int | None = None) -> list[int]:
    """Starts `count` processes, sends SIGTERM to the last one at a step, and waits for all: their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES_PER_PROCESS}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, f"--workdir={workdir}", f"--num_steps={num_steps}", f"--count={count}"]
    processes = [
        subprocess.Popen(
            [*command, f"--process={number}", f"--address={address}"],
            env=environment,
            stdout=subprocess.PIPE if number == 0 else None,
            text=True,
        )
        for number in range(count)
    ]
    try:
        follow(processes, stop_at)
        codes = [process.wait(timeout=120) for process in processes]
    finally:  # reached early by Ctrl-C, which must leave none behind
        for process in processes:
            process.kill()
    expected = PREEMPTED if stop_at else 0
    if any(code != expected for code in codes):
        raise SystemExit(f"{count} processes ended with {codes} instead of {expected}; what they said is above")
    return codes


def follow(processes: Sequence[subprocess.Popen[str]], stop_at: int | None) -> None:
    start_secs, step = time.monotonic(), 0
    output = processes[0].stdout
    assert output is not None
    for line in output:
        if match := re.fullmatch(r"step (\d+)\n", line):
            step = int(match[1])
        else:
            print(line, end="", flush=True)
        if stop_at is not None and step >= stop_at:
            processes[-1].send_signal(signal.SIGTERM)
            stop_at = None
    print(f"{len(processes)} processes came to step {step} in {time.monotonic() - start_secs:.0f} s", flush=True)


def newest(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, parameters) of the newest checkpoint: one process reads what several wrote."""
    import jax

    from ckpt_hooks import CheckpointManager

    jax.config.update("jax_platforms", "cpu")
    manager = CheckpointManager(workdir)
    step = manager.latest_step()
    assert step is not None, f"{workdir} has no checkpoint"
    problems = manager.verify(step)
    assert not problems, problems
    leaves = jax.tree_util.tree_leaves_with_path(manager.restore(step=step)["train"]["params"])
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def verdict(
    reference: tuple[int, dict[str, np.ndarray]],
    resumed: tuple[int, dict[str, np.ndarray]],
    *,
    is_same: bool,
) -> bool:
    """Says how the two ends compare, and whether that is as it should be."""
    (step, expected), (resumed_step, found) = reference, resumed
    identical = sum(np.array_equal(found[name], value) for name, value in expected.items())
    apart = max(float(np.max(np.abs(found[name] - value))) for name, value in expected.items())
    print(f"step {resumed_step}: {identical} of {len(expected)} parameters bit-identical, at most {apart:.1e} apart\n")
    return resumed_step == step and (identical == len(expected) if is_same else apart < 0.05)


if __name__ == "__main__":
    sys.exit(main())
