"""What each of several real processes does in `test_processes.py`: all scenarios, one after another.

Prints one line of JSON, {scenario: what this process saw}. A scenario that raises is reported with its error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_hooks
from ckpt_hooks.handlers.composite import CompositeArgs
from ckpt_hooks.temporary_paths import absolute_path

PROCESS, COUNT, ADDRESS, FOLDER = 0, 1, "", Path()
if __name__ == "__main__":
    PROCESS, COUNT, ADDRESS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])


def values() -> dict[str, np.ndarray]:
    """What is saved, which no process has all of but this one."""
    return {
        "kernel": np.arange(64 * 48, dtype=np.float32).reshape(64, 48),
        "bias": np.arange(48, dtype=np.float32),
        "scale": np.full((8,), 3, np.float32),
    }


def global_array(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def state(mesh: Mesh, *, more: float = 0.0) -> dict[str, Any]:
    specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("x"), "scale": PartitionSpec()}
    return {
        name: global_array(value + np.float32(more), NamedSharding(mesh, specs[name]))
        for name, value in values().items()
    }


def mesh_of(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))


def is_equal(array: jax.Array, expected: np.ndarray) -> bool:
    return all(np.array_equal(np.asarray(shard.data), expected[shard.index]) for shard in array.addressable_shards)


def save_and_restore() -> Any:
    """One checkpoint results, and each process gets its shards back, in another mesh too."""
    saved = state(mesh_of(COUNT, 2))
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(FOLDER / "plain", saved)
        other = state(mesh_of(2, COUNT), more=1.0)
        targets = [saved, other]
        restored = [checkpointer.restore(FOLDER / "plain", target) for target in targets]
    return [
        is_equal(array[name], expected) and array[name].sharding == target[name].sharding
        for array, target in zip(restored, targets, strict=True)
        for name, expected in values().items()
    ]


def save_items_in_background() -> Any:
    handler = ckpt_hooks.CompositeCheckpointHandler()
    with ckpt_hooks.AsyncCheckpointer(handler, timeout_secs=60) as checkpointer:
        items: dict[str, Any] = {"params": ckpt_hooks.args.StandardSave(state(mesh_of(2, COUNT)))}
        items["config"] = ckpt_hooks.args.JsonSave({"layers": 3})
        checkpointer.save(FOLDER / "items", args=CompositeArgs(**items))
        checkpointer.wait_until_finished()
    return sorted(os.listdir(FOLDER / "items"))


def run_of_a_manager() -> Any:
    """Saves with retention, a late metric, a refused step, a resume by the hook in another mesh, and a rollback."""
    found: dict[str, Any] = {}
    with ckpt_hooks.CheckpointManager(FOLDER / "run", keep=2, timeout_secs=60) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"params": state(mesh_of(COUNT, 2), more=step), "step": step}, metrics={"loss": step})
        manager.wait()
        manager.record_metrics(3, {"accuracy": 0.5})
        try:
            manager.save(2, {"params": state(mesh_of(COUNT, 2)), "step": 2})
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {error}"
        found["metrics"] = manager.metadata(3).metrics
    with ckpt_hooks.CheckpointHook(FOLDER / "run", every_n_steps=2, timeout_secs=60, keep=None) as hook:
        target = {"params": state(mesh_of(2, COUNT)), "step": 0}
        restored = hook.restore(target)
        found["resumed"] = hook.start_step, restored["step"]
        expected = {name: value + np.float32(3) for name, value in values().items()}
        found["equal"] = [is_equal(restored["params"][name], expected[name]) for name in expected]
        found["saved"] = [step for step in (4, 5, 6) if hook(step, restored)]
        hook.wait()
        hook.manager.rollback(4)
        found["steps"] = hook.manager.steps()
    return found


def other_step() -> Any:
    """The last process is one step behind."""
    with ckpt_hooks.CheckpointManager(FOLDER / "behind", timeout_secs=60) as manager:
        manager.save(8 if PROCESS < COUNT - 1 else 7, {"params": state(mesh_of(COUNT, 2))})
        manager.wait()


def other_structure() -> Any:
    """The last process has a leaf more."""
    saved = state(mesh_of(COUNT, 2))
    if PROCESS == COUNT - 1:
        saved["more"] = saved["bias"]
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(FOLDER / "disagreed", saved)


def failing_process() -> Any:
    """The last process cannot write its data file: all others are told at once."""
    handler = ckpt_hooks.StandardCheckpointHandler()
    start_secs = time.monotonic()
    with ckpt_hooks.AsyncCheckpointer(handler, timeout_secs=60) as checkpointer:
        if PROCESS == COUNT - 1:
            staged = checkpointer.stage(ckpt_hooks.args.StandardSave(state(mesh_of(COUNT, 2))))

            def fail(directory: Any) -> None:
                raise OSError(5, "the disk of the last process failed", str(directory))

            broken = dataclasses.replace(staged, write=fail)
            checkpointer.save_args(absolute_path(FOLDER / "failed"), broken)
        else:
            checkpointer.save(FOLDER / "failed", state(mesh_of(COUNT, 2)))
        try:
            checkpointer.wait_until_finished()
        finally:
            assert time.monotonic() - start_secs < 20, "the others waited for the timeout"


def absent_process() -> Any:
    """The last process does not come."""
    if PROCESS == COUNT - 1:
        return None
    with ckpt_hooks.AsyncCheckpointer(ckpt_hooks.StandardCheckpointHandler(), timeout_secs=2) as checkpointer:
        checkpointer.save(FOLDER / "absent", state(mesh_of(COUNT, 2)))
    return None


def preemption() -> Any:
    """SIGTERM reaches one process only; all train until the hook says that it is time to leave."""
    with ckpt_hooks.CheckpointHook(FOLDER / "preempted", every_n_steps=10_000, timeout_secs=60) as hook:
        saved = {"params": state(mesh_of(COUNT, 2))}
        for step in range(1, 600):
            if step == 3 and PROCESS == COUNT - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                hook(step, saved)
            except ckpt_hooks.Preempted as left:
                return {"step": step, "code": left.code, "steps": hook.manager.steps()}
            time.sleep(0.05)
    return "never told"


SCENARIOS = [
    save_and_restore,
    save_items_in_background,
    run_of_a_manager,
    other_step,
    other_structure,
    failing_process,
    preemption,
    absent_process,  # the last, since the process that is absent goes on by itself
]


def main() -> None:
    jax.distributed.initialize(ADDRESS, COUNT, PROCESS, coordinator_bind_address=ADDRESS)
    report: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            report[scenario.__name__] = scenario()
        except Exception as error:
            report[scenario.__name__] = f"{type(error).__name__}: {error}"
    (FOLDER / f"report_{PROCESS}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
