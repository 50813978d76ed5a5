"""What the processes of a group do in `test_together.py`; each function is run by all of them at once."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_hooks
from ckpt_hooks import processes, shared_directory
from ckpt_hooks.errors import SaveFailedError
from ckpt_hooks.storage import checksums
from ckpt_hooks.testing import damage


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(-1, 2), ("x", "y"))


def global_array(values: np.ndarray, spec: PartitionSpec, over: Mesh | None = None) -> jax.Array:
    sharding = NamedSharding(mesh() if over is None else over, spec)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def state_at(step: int) -> dict[str, Any]:
    """A state that no process has all of, and whose values say its step."""
    kernel = np.arange(64 * 48, dtype=np.float32).reshape(64, 48) + step
    return {
        "params": {
            "kernel": global_array(kernel, PartitionSpec("x", "y")),
            "scale": global_array(np.full(8, step, np.float32), PartitionSpec()),
        },
        "step": step,
    }


def is_at(state: Any, step: int) -> bool:
    """Whether this process's shards are those of `state_at(step)`."""
    expected = state_at(step)
    pairs = zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected["params"]), strict=True)
    return state["step"] == step and all(
        np.array_equal(np.asarray(one.data), np.asarray(other.data))
        for array, wanted in pairs
        for one, other in zip(array.addressable_shards, wanted.addressable_shards, strict=True)
    )


def error_of(action: Callable[[], object]) -> tuple[str, float]:
    """(class and text of what an action raises, after how many seconds)."""
    start_secs = time.monotonic()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start_secs
    return "nothing", time.monotonic() - start_secs


def wait_for_all(name: str) -> None:
    """JAX's own barrier, so that what one process looks at afterwards is the doing of all."""
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None
    client.wait_at_barrier(name, 60_000)


# ------------------------------------------------------------------ barriers


def long_run(folder: Path) -> Any:
    """Many operations of every kind: what is left in the coordination service?"""
    with ckpt_hooks.CheckpointHook(folder / "run", every_secs=0.2, keep=2, timeout_secs=60) as hook:
        saved, step = 0, 0
        while saved < 4:
            step += 1
            saved += hook(step, state_at(step))
            time.sleep(0.005)
        hook.wait()
        hook.record_metrics(step, {"loss": 0.5})
        restored = is_at(hook.restore(state_at(0)), step)
        refused, _ = error_of(lambda: hook.save(step - 1, state_at(step - 1)))
        steps = hook.manager.steps()
    wait_for_all("done")
    return {
        "left": sorted(processes.published("ckpt_hooks/")),
        "restored": restored,
        "refused": refused,
        "newest": steps[-1] == step,
        "step": step,
    }


def absent(folder: Path) -> Any:
    """The last process does not come; the others' barriers have a timeout of their own."""
    if jax.process_index() == jax.process_count() - 1:
        wait_for_all("over")
        return None
    options = ckpt_hooks.MultiprocessingOptions(barrier_timeout_secs=1)
    reports = []
    for async_save in (True, False):
        with ckpt_hooks.CheckpointManager(
            folder / "run", async_save=async_save, timeout_secs=60, multiprocessing_options=options
        ) as manager:
            reports.append(error_of(lambda: manager.save(1, state_at(1))))
    with ckpt_hooks.CheckpointHook(folder / "run", timeout_secs=60, multiprocessing_options=options) as hook:
        reports.append(error_of(lambda: hook.restore(state_at(0))))  # with which a run begins
    wait_for_all("over")
    return reports


# ------------------------------------------------------------------ bad input


def wrong_arguments(folder: Path) -> Any:
    """What each process hears where the last one gives arguments that do not fit, to a save and to a restore."""
    wrong: dict[str, Any] = {"nonsense": 1} if jax.process_index() == jax.process_count() - 1 else {}
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        refused = error_of(lambda: checkpointer.save(folder / "c", state_at(1), **wrong))
        checkpointer.save(folder / "c", state_at(1))
        return [refused, error_of(lambda: checkpointer.restore(folder / "c", **wrong))]


def refused(folder: Path) -> Any:
    """{what is wrong: what a save says of it}; a good save after each shows that nothing was broken by it."""
    is_last = jax.process_index() == jax.process_count() - 1
    good = state_at(7)

    def with_leaf(leaf: Any) -> dict[str, Any]:
        return {**good, "params": {**good["params"], "scale": leaf}}

    values = np.full(8, 3, np.float32)
    turned = Mesh(np.array(jax.devices()).reshape(2, -1), ("x", "y"))
    reordered = Mesh(np.array(jax.devices()[::-1]).reshape(-1, 2), ("x", "y"))
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "host-local everywhere": (with_leaf(jnp.asarray(values)), {}),
        "host-local in one": (with_leaf(jnp.asarray(values)) if is_last else good, {}),
        "NumPy values": (with_leaf(values + is_last), {}),
        "number": ({**good, "step": 7 + is_last}, {}),
        "dtype": (with_leaf(values.astype(np.float16 if is_last else np.float32)), {}),
        "mesh": (with_leaf(global_array(values, PartitionSpec("x"), turned if is_last else mesh())), {}),
        "devices": (with_leaf(global_array(values, PartitionSpec("x"), reordered if is_last else mesh())), {}),
        "metadata": (good, {"metadata": {"seed": int(is_last)}}),
        "object": (good, {"data": Position(1)} if is_last else {}),
    }
    said, committed = {}, []
    with ckpt_hooks.CheckpointManager(folder / "run", keep=None, timeout_secs=60) as manager:
        for step, (name, (state, options)) in enumerate(cases.items()):
            said[name] = error_of(lambda: manager.save(2 * step, state, **options))  # noqa: B023
            own: dict[str, Any] = {} if name == "object" and not is_last else {"metrics": {"loss": jax.process_index()}}
            manager.save(2 * step + 1, good, **own)  # each may have its own, or none
            manager.wait()
            committed.append(manager.latest_step() == 2 * step + 1)
    waits = ckpt_hooks.CheckpointManager(folder / "waits", async_save=is_last, timeout_secs=60)
    said["async_save"] = error_of(lambda: waits.save(1, good))
    return {"said": said, "committed": committed, "metrics": manager.metadata(1).metrics}


def refused_before_the_barrier(folder: Path) -> Any:
    """{what is wrong: [what a save says of it in the last process alone, and in all]}; good saves after each."""
    is_last = jax.process_index() == jax.process_count() - 1
    cases: dict[str, dict[str, Any]] = {
        "step": {"step": -1},
        "metric": {"metrics": {"loss": np.zeros(2)}},
        "metadata": {"metadata": {"step": 1}},
        "name": {"like": Position(0)},
        "state": {"state": None},
        "object": {"data": object()},
        "earlier save": {},
    }
    said: dict[str, list[Any]] = {}
    with ckpt_hooks.CheckpointManager(folder / "run", keep=1, timeout_secs=60) as manager:
        step = 0
        for name, wrong in cases.items():
            said[name] = []
            for has_it in (is_last, True):
                step += 2
                if has_it and name == "earlier save":
                    manager.checkpointer.failure = SaveFailedError("of the background save, which nobody else has")
                given = {"step": step, "state": state_at(step), **(wrong if has_it else {})}
                said[name].append(error_of(lambda: manager.save(**given)))  # noqa: B023
                manager.save(step + 1, state_at(step + 1))
                manager.wait()
        newest = manager.latest_step()
    return {"said": said, "is newest": newest == step + 1}


def changes_that_differ(folder: Path) -> Any:
    """{change: what each process hears where the last one asks for another}, and what is there then; then all agree."""
    is_last = jax.process_index() == jax.process_count() - 1
    with ckpt_hooks.CheckpointManager(folder / "run", keep=None, timeout_secs=60) as manager:
        for step in range(5):
            manager.save(step, state_at(step))
        manager.wait()
        changes: dict[str, Callable[[], None]] = {
            "delete": lambda: manager.delete(3 + is_last),
            "roll back": lambda: manager.rollback(1 + is_last),
            "delete or roll back": lambda: manager.delete(1) if is_last else manager.rollback(1),
            "record": lambda: manager.record_metrics(1, {"loss": "none" if is_last else 1}),
        }
        said = {name: error_of(change) for name, change in changes.items()}
        wait_for_all("looks")
        untouched = manager.steps(), dict(manager.metadata(1).metrics)
        wait_for_all("goes on")
        manager.record_metrics(1, {"loss": 1})
        manager.delete(2)
        manager.rollback(3)
        return {"said": said, "untouched": untouched, "changed": (manager.steps(), manager.metadata(1).metrics)}


def look_that_fails(folder: Path) -> Any:
    """What each process is told of a run at which process 0 cannot look, twice; then all can, and save."""
    run, stat = folder / "run", os.stat

    def failing(path: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
        if os.fspath(path) == str(run):
            raise OSError(5, "Input/output error", str(path))
        return stat(path, *arguments, **keywords)

    with ckpt_hooks.CheckpointManager(run, timeout_secs=60) as manager:
        os.stat = failing if jax.process_index() == 0 else stat
        said = [error_of(manager.is_empty) for _ in range(2)]
        os.stat = stat
        found = [manager.is_empty()]
        manager.save(1, state_at(1))
        manager.wait()
        found.append(manager.is_empty())
    return {"said": said, "found": found}


def not_shared(folder: Path) -> Any:
    """A directory of the same name in every process that is another one in the last."""
    shared_directory._SEEN_WITHIN_SECS = 1.0
    own = folder / ("elsewhere" if jax.process_index() == jax.process_count() - 1 else "here")
    own.mkdir(exist_ok=True)
    os.chdir(own)
    said = []
    for leftover in (False, True):
        if leftover and own.name == "elsewhere":  # of the same name as what the primary makes
            (own / "run" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
        with ckpt_hooks.CheckpointManager("/proc/self/cwd/run", timeout_secs=60, async_save=False) as manager:
            said.append(error_of(lambda: manager.save(1, state_at(1))))
        wait_for_all(f"told {leftover}")
    return {"said": said, "here": sorted(os.listdir(folder / "here" / "run"))}


def too_little_space(folder: Path, free_mib: int) -> Any:
    """Each process writes MiB of its own, onto a disk that has only so much free; then onto one that has enough."""
    real, values = os.statvfs, np.zeros((2 * jax.device_count(), 1 << 18), np.float32)  # 2 MiB of each device
    state = {"w": global_array(values, PartitionSpec(("x", "y")))}

    def almost_full(path: Any) -> os.statvfs_result:
        block_bytes, *rest = real(path)
        return os.statvfs_result((block_bytes, 1 << 20, rest[1], free_mib, free_mib, *rest[4:]))

    found: dict[str, Any] = {}
    for name, primary in (("shared", 0), ("own", None)):
        options = ckpt_hooks.MultiprocessingOptions(primary_host=primary)
        own = folder / (f"run_{jax.process_index()}" if primary is None else "run")
        with ckpt_hooks.CheckpointManager(own, timeout_secs=60, multiprocessing_options=options) as manager:
            os.statvfs = almost_full
            found[name] = error_of(lambda: manager.save(1, state))
            manager.wait()
            os.statvfs = real
            wait_for_all(f"told {name}")
            found[f"{name} left"] = sorted(path for path in os.listdir(own) if not path.startswith("."))
            wait_for_all(f"listed {name}")
            manager.save(2, state)
            manager.wait()
            found[f"{name} then"] = manager.latest_step()
    return found


# ------------------------------------------------------------------ who does what


def synced_and_written(folder: Path) -> dict[str, list[str]]:
    """What this process syncs in one save, as paths below the step, and at process 0 also what there is at its end."""
    synced: set[str] = set()
    fsync = os.fsync

    def recording(fd: Any) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    os.fsync = recording
    me = jax.process_index()
    with ckpt_hooks.CheckpointManager(folder / "run", async_save=False) as manager:
        manager.save(1, state_at(1), data=Position(me))
        wait_for_all("saved")
        os.fsync, checked, problem = fsync, [], checksums._problem

        def recording_check(path: str, accepted: Any) -> str | None:
            checked.append(os.path.basename(path))
            return problem(path, accepted)

        checksums._problem = recording_check
        position = Position(-1)
        manager.restore(state_at(0), data=position)
    assert position.at == me
    final = folder / "run" / "1"
    names = [Path(path.replace(".orbax-checkpoint-tmp", "")) for path in synced]
    below = [os.path.relpath(path, final) for path in names if path.is_relative_to(final)]
    present = [os.path.relpath(path, final) for path in final.rglob("*") if path.is_file()]
    states = sorted(name for name in checked if "-of-" in name)
    return {"synced": sorted(below), "present": sorted(present), "states checked": states}


def compressed(folder: Path) -> Any:
    """Saves in the background, of several items, most of it written before the call returns; one that cannot be."""
    found: dict[str, Any] = {}
    last = jax.process_index() == jax.process_count() - 1
    with ckpt_hooks.CheckpointManager(
        folder / "run", keep=2, timeout_secs=60, compression="zstd", max_host_bytes=1 << 12
    ) as manager:

        def save_9() -> None:
            manager.save(9, state_at(9))
            manager.wait()

        for step in (1, 2, 3):
            manager.save(step, state_at(step))
            if step == 2:
                manager.wait()
                os.pwrite, pwrite = (_failing if last else os.pwrite), os.pwrite
                found["failed"], _ = error_of(save_9)
                os.pwrite = pwrite
        manager.wait()
        wait_for_all("saved")  # and process 0 has removed what goes
        found["steps"], found["problems"] = manager.steps(), manager.verify(3)
        found["restored"] = is_at(manager.restore(state_at(0)), 3)
    with ckpt_hooks.CheckpointManager(folder / "run", timeout_secs=60, compression=None if last else "zstd") as manager:
        found["not alike"], _ = error_of(lambda: manager.save(4, state_at(4)))
    return found


def _failing(descriptor: int, content: Any, position: int) -> int:
    raise OSError(5, "this disk failed")


# ------------------------------------------------------------------ SIGKILL

PHASES = ["before staging", "while writing", "before the commit barrier", "after the commit"]


def killed(folder: Path, victim: int, phase: str) -> Any:
    """Step 1 is committed, and in the save of step 2 the victim is killed; the others say what became of them."""
    options = ckpt_hooks.MultiprocessingOptions(barrier_timeout_secs=1.5)
    with ckpt_hooks.CheckpointManager(folder / "run", keep=1, multiprocessing_options=options) as manager:
        manager.save(1, state_at(1))
        manager.wait()
        if jax.process_index() == victim:
            _die_in(phase)

        def save(step: int) -> None:
            manager.save(step, state_at(step))
            manager.wait()

        # The second is for those that had passed the last barrier when the victim died.
        return [error_of(functools.partial(save, step)) for step in (2, 3)]


def _die_in(phase: str) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(event: str, duration_secs: float, **details: Any) -> None:
        named = event.rpartition("/")[2] + str(details.get("key", ""))
        if phase == "before the commit barrier" and named.startswith("items_duration"):
            die()
        is_last = "async_commit_complete" in named or named.startswith("commit_duration")
        if phase == "after the commit" and is_last:
            die()

    def half_a_write(descriptor: int, content: Any, position: int) -> int:
        write(descriptor, content[: len(content) // 2], position)
        die()
        return 0

    if phase == "before staging":
        die()
    if phase == "while writing":
        write, os.pwrite = os.pwrite, half_a_write
    jax.monitoring.register_event_duration_secs_listener(after)


def resumed(folder: Path, names: list[str]) -> Any:
    """Each run goes on from its newest checkpoint, and clears up after the dead."""
    found = []
    for name in names:
        with ckpt_hooks.CheckpointHook(folder / name / "run", every_n_steps=1, keep=2, timeout_secs=30) as hook:
            state = hook.restore(state_at(0))
            step = hook.start_step
            is_right = is_at(state, step)
            hook(step + 1, state_at(step + 1))
        found.append([step, is_right])
    return found


# ------------------------------------------------------------------ storage of one's own, groups


def turned(state: dict[str, Any]) -> dict[str, Any]:
    """The same with the devices of its kernel's mesh in another order."""
    over = Mesh(np.array(jax.devices()[::-1]).reshape(-1, 2), ("x", "y"))
    kernel = global_array(np.zeros((64, 48), np.float32), PartitionSpec("x", "y"), over)
    return {**state, "params": {**state["params"], "kernel": kernel}}


def two_parts_at(step: int) -> dict[str, Any]:
    """A state of which each process has a part of two items."""
    state = state_at(step)
    return {**state, "ema": state["params"]}


def own_storage(folder: Path) -> Any:
    """Each process has a directory of its own, also at a path of its own; then one of them loses its newest step."""
    options = ckpt_hooks.MultiprocessingOptions(primary_host=None)
    own = folder / f"disk_{jax.process_index()}" / "run"
    found: dict[str, Any] = {}
    with ckpt_hooks.CheckpointHook(
        own, every_n_steps=10, keep=2, timeout_secs=60, multiprocessing_options=options, compression="zstd"
    ) as hook:
        found["fresh"] = hook.restore(two_parts_at(0))["step"]
        for step in range(1, 31):
            hook(step, two_parts_at(step))
        hook.wait()
        found["steps"] = hook.manager.steps()
        found["problems"] = hook.manager.verify(30)
        found["without a target"], _ = error_of(hook.manager.restore)
        found["in another mesh"], _ = error_of(lambda: hook.restore(turned(two_parts_at(0))))
        found["with a target"] = is_at(hook.restore(two_parts_at(0)), 30)
    if jax.process_index() == jax.process_count() - 1:
        with damage.flip_bit(next((own / "30" / "params" / "d").iterdir()), 100):
            found["damaged"] = len(hook.manager.verify(30))
        shutil.rmtree(own / "30")
    wait_for_all("lost")
    with ckpt_hooks.CheckpointHook(
        own, every_n_steps=10, keep=2, timeout_secs=60, multiprocessing_options=options
    ) as hook:
        found["restored"] = [is_at(hook.restore(two_parts_at(0)), 20), hook.start_step]
        hook(30, two_parts_at(30))
        hook.wait()
        found["again"] = hook.manager.steps()
        found["at 30"] = is_at(hook.restore(two_parts_at(0)), 30)
    if jax.process_index() == 0:
        shutil.rmtree(own)
    wait_for_all("all lost")
    with ckpt_hooks.CheckpointHook(
        own, every_n_steps=10, keep=2, timeout_secs=60, multiprocessing_options=options
    ) as hook:
        found["afresh"] = hook.restore(two_parts_at(0))["step"]
        hook(10, two_parts_at(10))
        hook.wait()
        found["then"] = hook.manager.steps()
    return found


def half_committed(folder: Path) -> Any:
    """Each process has a directory of its own, and process 0 alone has committed the first save; all begin anew."""
    own = folder / f"disk_{jax.process_index()}" / "run"
    options = ckpt_hooks.MultiprocessingOptions(primary_host=None)
    with ckpt_hooks.CheckpointManager(own, timeout_secs=60, multiprocessing_options=options) as manager:
        manager.save(10, state_at(10))
    if jax.process_index() > 0:
        shutil.rmtree(own / "10")
    wait_for_all("lost")
    with ckpt_hooks.CheckpointHook(own, every_n_steps=10, timeout_secs=60, multiprocessing_options=options) as hook:
        is_first = is_at(hook.restore_or_init(lambda: state_at(0)), 0)
        start_step = hook.start_step
        hook(10, state_at(10))
    return {"is first": is_first, "start_step": start_step, "steps": hook.manager.steps()}


def groups(folder: Path) -> Any:
    """Two halves of the processes save runs of their own, side by side and not equally often; then all save one."""
    me, count = jax.process_index(), jax.process_count()
    half = frozenset(range(count // 2) if me < count // 2 else range(count // 2, count))
    devices = [device for device in jax.devices() if device.process_index in half]
    over = Mesh(np.array(devices).reshape(-1, 2), ("x", "y"))
    primary = max(half)
    options = ckpt_hooks.MultiprocessingOptions(
        primary_host=primary, active_processes=half, barrier_sync_key_prefix=f"half{min(half)}"
    )
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8) + primary

    def state(step: int) -> dict[str, Any]:
        return {"w": global_array(values + step, PartitionSpec("x", "y"), over), "seed": primary}

    found: dict[str, Any] = {}
    with ckpt_hooks.CheckpointManager(
        folder / f"run_{min(half)}", keep=None, timeout_secs=60, multiprocessing_options=options
    ) as manager:
        last = 3 if me < count // 2 else 6
        for step in range(1, last):
            manager.save(step, state(step), data=Position(me))
        manager.wait()
        position = Position(-1)
        restored = manager.restore(state(0), data=position)
        found["restored"] = restored["seed"] == primary and all(
            np.array_equal(np.asarray(shard.data), (values + last - 1)[shard.index])
            for shard in restored["w"].addressable_shards
        )
        found["position"] = position.at == me
        found["primary"] = manager._decides == (me == primary)
        outside = {"w": global_array(values, PartitionSpec("x", "y")), "seed": primary}
        found["outside"], _ = error_of(lambda: manager.save(9, outside))
    everywhere = frozenset(range(count))
    found["stranger"], _ = error_of(
        lambda: ckpt_hooks.CheckpointManager(
            folder / "other",
            multiprocessing_options=ckpt_hooks.MultiprocessingOptions(
                primary_host=(me + 1) % count, active_processes=everywhere - {me}
            ),
        )
    )
    with ckpt_hooks.CheckpointManager(folder / "run", timeout_secs=60) as manager:
        manager.save(1, state_at(1))
        found["all"] = is_at(manager.restore(state_at(0)), 1)
    return found


class Position:
    """An iterator as far as checkpoints are concerned."""

    def __init__(self, at: int) -> None:
        self.at = at

    def get_state(self) -> int:
        return self.at

    def set_state(self, at: int) -> None:
        self.at = at


# ------------------------------------------------------------------ preemption


def preempted_in_an_evaluation(folder: Path, signal_name: str, stride: int) -> Any:
    """One process gets a signal while all evaluate, each at its own pace; the hook is called at every 10th step."""
    me, count = jax.process_index(), jax.process_count()
    add = jax.jit(lambda array: array.sum(), out_shardings=NamedSharding(mesh(), PartitionSpec()))
    batch = global_array(np.ones((64, 48), np.float32), PartitionSpec("x", "y"))
    with ckpt_hooks.CheckpointHook(
        folder / "run", every_n_steps=10_000, timeout_secs=30, preemption_signals=(getattr(signal, signal_name),)
    ) as hook:
        step = batches = 0
        try:
            while step < 100_000:
                step += stride
                hook(step, state_at(step))
                for _ in range(5):
                    if hook.preempted:
                        break
                    batches += 1
                    if batches == 7 and me == count - 1:
                        os.kill(os.getpid(), getattr(signal, signal_name))
                    time.sleep(0.002 * (me + 1))
                    add(batch).block_until_ready()  # all take part: a process that left alone would leave them waiting
        except ckpt_hooks.Preempted as left:
            return {"step": left.step, "batches": batches, "code": left.code, "steps": hook.manager.steps()}
    return "never told"


def preempted_with_two_hooks(folder: Path) -> Any:
    """One process gets SIGTERM while all train two models, each with a hook; {model: step at which it was saved}."""
    left: dict[str, int] = {}
    options: dict[str, Any] = {"every_n_steps": 10_000, "timeout_secs": 30, "raise_on_preemption": False}
    with (
        ckpt_hooks.CheckpointHook(folder / "actor", **options) as actor,
        ckpt_hooks.CheckpointHook(folder / "critic", **options) as critic,
    ):
        hooks = {"actor": actor, "critic": critic}
        for step in range(1, 400):
            if step == 3 and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for name in [name for name in hooks if name not in left]:  # in the same order in all processes
                if hooks[name](step, state_at(step)) and hooks[name].preempted:
                    left[name] = step
            if left.keys() == hooks.keys():
                break
            time.sleep(0.02)
        return {"left": left, "steps": {name: hook.manager.steps() for name, hook in hooks.items()}}
