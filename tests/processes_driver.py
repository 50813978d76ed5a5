"""What each of several real processes does in `test_processes.py`: all scenarios, one after another."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_hooks
from ckpt_hooks.handlers.composite import CompositeArgs
from ckpt_hooks.temporary_paths import absolute_path


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


def save_and_restore(folder: Path) -> Any:
    """One checkpoint results, and each process gets its shards back, in another mesh too."""
    saved = state(mesh_of(jax.process_count(), 2))
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "plain", saved)
        other = state(mesh_of(2, jax.process_count()), more=1.0)
        targets = [saved, other]
        restored = [checkpointer.restore(folder / "plain", target) for target in targets]
    return [
        is_equal(array[name], expected) and array[name].sharding == target[name].sharding
        for array, target in zip(restored, targets, strict=True)
        for name, expected in values().items()
    ]


def save_items_in_background(folder: Path) -> Any:
    handler = ckpt_hooks.CompositeCheckpointHandler()
    with ckpt_hooks.AsyncCheckpointer(handler, timeout_secs=60) as checkpointer:
        items: dict[str, Any] = {"params": ckpt_hooks.args.StandardSave(state(mesh_of(2, jax.process_count())))}
        items["config"] = ckpt_hooks.args.JsonSave({"layers": 3})
        checkpointer.save(folder / "items", args=CompositeArgs(**items))
        checkpointer.wait_until_finished()
    return sorted(os.listdir(folder / "items"))


def run_of_a_manager(folder: Path) -> Any:
    """Saves with retention, a late metric, a refused step, a resume by the hook in another mesh, and a rollback."""
    found: dict[str, Any] = {}
    with ckpt_hooks.CheckpointManager(folder / "run", keep=2, timeout_secs=60) as manager:
        for step in (1, 2, 3):
            manager.save(
                step,
                {"params": state(mesh_of(jax.process_count(), 2), more=step), "step": step},
                metrics={"loss": step},
            )
        manager.wait()
        manager.record_metrics(3, {"accuracy": 0.5})
        try:
            manager.save(2, {"params": state(mesh_of(jax.process_count(), 2)), "step": 2})
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {error}"
        found["metrics"] = manager.metadata(3).metrics
    with ckpt_hooks.CheckpointHook(folder / "run", every_n_steps=2, timeout_secs=60, keep=None) as hook:
        target = {"params": state(mesh_of(2, jax.process_count())), "step": 0}
        restored = hook.restore(target)
        found["resumed"] = hook.start_step, restored["step"]
        expected = {name: value + np.float32(3) for name, value in values().items()}
        found["equal"] = [is_equal(restored["params"][name], expected[name]) for name in expected]
        found["saved"] = [step for step in (4, 5, 6) if hook(step, restored)]
        hook.wait()
        hook.manager.rollback(4)
        found["steps"] = hook.manager.steps()
    return found


def other_step(folder: Path) -> Any:
    """The last process is one step behind."""
    with ckpt_hooks.CheckpointManager(folder / "behind", timeout_secs=60) as manager:
        manager.save(
            8 if jax.process_index() < jax.process_count() - 1 else 7,
            {"params": state(mesh_of(jax.process_count(), 2))},
        )
        manager.wait()


def other_structure(folder: Path) -> Any:
    """The last process has a leaf more."""
    saved = state(mesh_of(jax.process_count(), 2))
    if jax.process_index() == jax.process_count() - 1:
        saved["more"] = saved["bias"]
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "disagreed", saved)


def failing_process(folder: Path) -> Any:
    """The last process cannot write its data file: all others are told at once."""
    handler = ckpt_hooks.StandardCheckpointHandler()
    start_secs = time.monotonic()
    with ckpt_hooks.AsyncCheckpointer(handler, timeout_secs=60) as checkpointer:
        if jax.process_index() == jax.process_count() - 1:
            staged = checkpointer.stage(ckpt_hooks.args.StandardSave(state(mesh_of(jax.process_count(), 2))))

            def fail(directory: Any) -> None:
                raise OSError(5, "the disk of the last process failed", str(directory))

            broken = dataclasses.replace(staged, write=fail)
            checkpointer.save_args(absolute_path(folder / "failed"), broken)
        else:
            checkpointer.save(folder / "failed", state(mesh_of(jax.process_count(), 2)))
        try:
            checkpointer.wait_until_finished()
        finally:
            assert time.monotonic() - start_secs < 20, "the others waited for the timeout"


def absent_process(folder: Path) -> Any:
    """The last process does not come."""
    if jax.process_index() == jax.process_count() - 1:
        return None
    with ckpt_hooks.AsyncCheckpointer(ckpt_hooks.StandardCheckpointHandler(), timeout_secs=2) as checkpointer:
        checkpointer.save(folder / "absent", state(mesh_of(jax.process_count(), 2)))
    return None


def preemption(folder: Path) -> Any:
    """SIGTERM reaches one process only; all train until the hook says that it is time to leave."""
    with ckpt_hooks.CheckpointHook(folder / "preempted", every_n_steps=10_000, timeout_secs=60) as hook:
        saved = {"params": state(mesh_of(jax.process_count(), 2))}
        for step in range(1, 600):
            if step == 3 and jax.process_index() == jax.process_count() - 1:
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


def run(folder: Path) -> dict[str, Any]:
    """{scenario: what this process saw}; of one that raises, its error."""
    report: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            report[scenario.__name__] = scenario(folder)
        except Exception as error:
            report[scenario.__name__] = f"{type(error).__name__}: {error}"
    return report
