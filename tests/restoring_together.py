"""What each of several real processes does in `test_restoring_together.py`; each function returns JSON."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_hooks
from ckpt_hooks.testing import damage

MIB = 1 << 20


@functools.cache
def values() -> dict[str, np.ndarray]:
    """What is saved; the matrices are large enough for chunks of several pieces of 1 MiB."""
    random = np.random.default_rng(1)
    return {
        "rows": random.standard_normal((3200, 701)).astype(np.float32),
        "columns": random.standard_normal((700, 3200)).astype(np.float32),
        "vector": np.arange(320, dtype=np.int32),
        "replicated": np.arange(30, dtype=np.float32).astype(jax.numpy.bfloat16),
    }


@functools.cache
def big() -> np.ndarray:
    return np.arange(96 * MIB // 4, dtype=np.float32).reshape(4096, -1)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("x",))


def sharding(leaf: str, *, turned: bool = False) -> NamedSharding:
    specs = {"rows": ("x",), "columns": (None, "x"), "vector": ("x",), "replicated": (), "big": (None, "x")}
    turned_specs = {"rows": (None,), "columns": ("x",), "vector": (), "replicated": ("x",), "big": ("x",)}
    return NamedSharding(mesh(), PartitionSpec(*(turned_specs if turned else specs)[leaf]))


def spread(value: np.ndarray, how: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, how, lambda index: value[index])


def state(more: float = 0) -> dict[str, Any]:
    return {leaf: spread((value + more).astype(value.dtype), sharding(leaf)) for leaf, value in values().items()}


def abstract(leaf: str, how: Any) -> jax.ShapeDtypeStruct:
    value = values()[leaf]
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=how)


def differing(restored: Any, expected: dict[str, np.ndarray]) -> list[str]:
    """The leaves of which a shard of this process is not what was saved."""
    return [
        leaf
        for leaf, value in expected.items()
        for shard in restored[leaf].addressable_shards
        if np.asarray(shard.data).tobytes() != value[shard.index].tobytes()
    ]


# ------------------------------------------------------------------ writing


def write(folder: Path) -> None:
    """By Orbax in each of its layouts, and by us."""
    import orbax.checkpoint as ocp

    saved = state()
    layouts = {"ocdbt": (True, False), "zarr3": (True, True), "files": (False, False)}
    for name, (ocdbt, zarr3) in layouts.items():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        ocp.Checkpointer(handler).save(folder / name, saved)
    ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(folder / "standard", saved)
    with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "ours", saved)
        checkpointer.save(folder / "big", {"big": spread(big(), sharding("big"))})
    compressed = ckpt_hooks.StandardCheckpointHandler(ckpt_hooks.ArrayOptions(compression="zstd"))
    with ckpt_hooks.Checkpointer(compressed) as checkpointer:
        checkpointer.save(folder / "ours, zstd", saved)


LAYOUTS = ("ocdbt", "zarr3", "files", "standard", "ours", "ours, zstd")


# ------------------------------------------------------------------ reading in other meshes


def read(folder: Path, written: list[str]) -> Any:
    """What groups of other sizes wrote, into two meshes, and without shardings."""
    report: dict[str, Any] = {}
    for source in written:
        for name in LAYOUTS:
            with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer:
                for turned in (False, True):
                    like = {
                        leaf: abstract(leaf, sharding(leaf, turned=turned)) for leaf in values() if may(leaf, turned)
                    }
                    handler_args = ckpt_hooks.args.StandardRestore(like, changes=_ignoring())
                    restored = checkpointer.restore(Path(source) / name, args=handler_args)
                    are_there = [restored[leaf].sharding == like[leaf].sharding for leaf in like]
                    found = differing(restored, {leaf: values()[leaf] for leaf in like})
                    report[f"{source} {name} {turned}"] = [found, all(are_there)]
                like = {leaf: abstract(leaf, None) for leaf in values()}
                restored = checkpointer.restore(Path(source) / name, like)
                on_one = [len(restored[leaf].devices()) == 1 for leaf in like]
                report[f"{source} {name} without"] = [differing(restored, values()), all(on_one)]
    return report


def may(leaf: str, turned: bool) -> bool:
    """Whether the shape can be cut that way."""
    return not (turned and leaf == "replicated")  # 30 elements on 4 devices


def _ignoring() -> Any:
    from ckpt_hooks.changes import Changes

    return Changes(unexpected="ignore")


@contextlib.contextmanager
def counted_reads() -> Iterator[dict[str, int]]:
    """{data file: bytes that are read of it}."""
    counts: dict[str, int] = {}
    counting_one = threading.Lock()  # several threads read
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        got = preadv(descriptor, buffers, offset)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        with counting_one:
            counts[name] = counts.get(name, 0) + got
        return got

    os.preadv = counting  # type: ignore[assignment]
    try:
        yield counts
    finally:
        os.preadv = preadv


def read_little(folder: Path, written: str) -> Any:
    """How many bytes are read, and how much memory is needed at most, beside what this process keeps."""
    report = {}
    for turned in (False, True):
        how = sharding("big", turned=turned)
        like = {"big": jax.ShapeDtypeStruct((4096, 96 * MIB // 4 // 4096), np.float32, sharding=how)}
        expected = big()
        before = reset_peak_bytes()
        with ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler()) as checkpointer, counted_reads() as counts:
            restored = checkpointer.restore(Path(written) / "big", like)["big"]
        kept = sum(shard.data.nbytes for shard in restored.addressable_shards)
        extra = peak_bytes() - before - kept if before else 0
        equal = all(np.array_equal(np.asarray(s.data), expected[s.index]) for s in restored.addressable_shards)
        report[str(turned)] = {"equal": equal, "kept": kept, "extra": extra, "read": counts}
        del restored
    return report


def hold_little(folder: Path, limit_mib: int) -> Any:
    """How much memory a save in the background takes at most, beside the state: with a bound, and with none."""
    saved = {"big": spread(big(), sharding("big"))}
    small = {"vector": spread(values()["vector"], sharding("vector"))}
    report: dict[str, Any] = {"own": sum(shard.data.nbytes for shard in saved["big"].addressable_shards)}
    for name, limit_bytes in (("bound", limit_mib * MIB), ("no bound", None)):
        options = ckpt_hooks.ArrayOptions(max_host_bytes=limit_bytes)
        with ckpt_hooks.AsyncCheckpointer(
            ckpt_hooks.StandardCheckpointHandler(options), timeout_secs=60
        ) as checkpointer:
            checkpointer.save(folder / f"warm, {name}", small)  # what the code itself needs is there then
            checkpointer.wait_until_finished()
            before = reset_peak_bytes()
            checkpointer.save(folder / name, saved)
            checkpointer.wait_until_finished()
            report[name] = peak_bytes() - before if before else 0
            like = {"big": jax.ShapeDtypeStruct(big().shape, np.float32, sharding=sharding("big"))}
            report[f"{name}, equal"] = not differing(checkpointer.restore(folder / name, like), {"big": big()})
    return report


def reset_peak_bytes() -> int:
    """From here on, `peak_bytes` counts; 0 where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


# ------------------------------------------------------------------ which step


def outcome(action: Callable[[], Any]) -> str:
    try:
        return str(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def together(folder: Path) -> Any:
    """All restore what one has chosen, and are told of whatever goes wrong in any of them."""
    process = jax.process_index()
    last = jax.process_count() - 1
    report: dict[str, Any] = {}

    def manager(name: str = "run", **options: Any) -> ckpt_hooks.CheckpointManager:
        return ckpt_hooks.CheckpointManager(folder / name, timeout_secs=60, **options)

    def params(more: float = 0) -> dict[str, Any]:
        return {"params": state(more), "step": int(more)}

    with manager(keep=None) as run:
        for step in (1, 2, 3):
            run.save(step, params(step))
        run.wait()

    target = params()

    def restored_step(run: ckpt_hooks.CheckpointManager, **options: Any) -> Any:
        start_secs = time.monotonic()
        step, restored = run.restore_with_step(target, **options)
        assert time.monotonic() - start_secs < 30
        assert restored["step"] == step
        expected = {leaf: (value + step).astype(value.dtype) for leaf, value in values().items()}
        return [step, differing(restored["params"], expected)]

    # A piece that only the last process reads is damaged: nobody restores this step.
    victim = folder / "run" / "3" / "params" / "d" / f"{last:032x}"
    with together_damaged(victim, process):
        run = manager()
        report["damaged"] = [restored_step(run), run.steps()]
        report["only the rejected"] = outcome(lambda: restored_step(manager(), step=3))
    report["newest"] = restored_step(manager())

    # Another listing, as a network file system may give it for a while, changes nothing.
    lagging = manager()
    if process == last:
        lagging._run.newest_first = lambda: iter((2, 1))  # type: ignore[method-assign]
    report["lagging"] = restored_step(lagging)

    # One process gives a target that does not fit.
    if process == last:
        target["params"] = {**target["params"], "rows": abstract("columns", sharding("columns"))}
    report["misfit"] = outcome(lambda: restored_step(manager()))
    target = params()

    # One process gives an object that has no state.
    objects = {"data": object()} if process == last else {}
    report["no object"] = outcome(lambda: restored_step(manager(), objects=objects))

    report["no such step"] = outcome(lambda: restored_step(manager(), step=7))
    report["another step"] = outcome(lambda: restored_step(manager(keep=None), step=1 if process == last else 2))
    report["disagree"] = outcome(lambda: restored_step(manager(), step=2 if process == last else None))

    # Process 0, which chooses, cannot look at the newest step.
    with look_that_fails(folder / "run" / "3") if process == 0 else contextlib.nullcontext():
        try:
            restored_step(manager())
        except ckpt_hooks.errors.StorageError as error:
            report["no look"] = {"errno": error.errno, "text": str(error), "cause": type(error.__cause__).__name__}

    # An empty run: all begin afresh, or as another run was.
    with ckpt_hooks.CheckpointHook(folder / "empty", timeout_secs=60) as hook:
        report["empty"] = [hook.restore(target) is target, hook.start_step]
        report["init"] = hook.restore_or_init(lambda: {"w": np.ones(2)})["w"].tolist()

    for begin in ("run", "run/2"):
        with ckpt_hooks.CheckpointHook(folder / "tuned", timeout_secs=60, init_from=folder / begin) as hook:
            more = 3 if begin == "run" else 2
            expected = {leaf: (value + more).astype(value.dtype) for leaf, value in values().items()}
            restored = hook.restore(target)
            report[f"begin as {begin}"] = [differing(restored["params"], expected), restored["step"]]

    # Not the same directory.
    report["elsewhere"] = outcome(lambda: restored_step(manager("run" if process < last else "another")))

    # Storage of its own for each: the newest step that all have.
    own = folder / f"own_{process}"
    shutil.copytree(folder / "run", own)
    if process == last:
        shutil.rmtree(own / "3")
    local = ckpt_hooks.MultiprocessingOptions(primary_host=None)
    report["own storage"] = restored_step(manager(own.name, multiprocessing_options=local))
    return report


@contextlib.contextmanager
def look_that_fails(at: Path) -> Iterator[None]:
    """A disk that cannot say whether there is something."""
    stat = os.stat

    def failing(path: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
        if not isinstance(path, int) and os.fsdecode(path) == str(at):
            raise OSError(5, "Input/output error", str(path))
        return stat(path, *arguments, **keywords)

    os.stat = failing
    try:
        yield
    finally:
        os.stat = stat


@contextlib.contextmanager
def together_damaged(victim: Path, process: int) -> Iterator[None]:
    """Process 0 damages a file, and all go on when it has, and when it has undone it."""
    from jax.experimental import multihost_utils

    with damage.flip_bit(victim, 8 * (victim.stat().st_size // 2)) if process == 0 else contextlib.nullcontext():
        multihost_utils.sync_global_devices("damaged")
        yield
        multihost_utils.sync_global_devices("used")
    multihost_utils.sync_global_devices("undone")
