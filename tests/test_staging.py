"""What a save in the background holds of a state, and how it lets go of the caller's memory."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from ckpt_hooks import (
    ArrayOptions,
    AsyncCheckpointer,
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    StandardCheckpointHandler,
)
from ckpt_hooks.errors import SaveFailedError
from ckpt_hooks.handlers import pytree
from ckpt_hooks.storage import layout, writer
from ckpt_hooks.storage.memory import aligned_memory, host_bytes
from ckpt_hooks.storage.writer import ArrayWriter, HostMemory
from tests.sameness import typed_bits

MIB = 1 << 20


def large_state() -> dict[str, Any]:
    """12 MiB in leaves of every size, of both libraries."""
    return {
        "params": {f"w{i}": jnp.arange(MIB // 2, dtype=jnp.float32) + i for i in range(4)},
        "host": np.arange(MIB // 2, dtype=np.float32),
        "small": {f"s{i}": jnp.full((40, 100), i, jnp.float32) for i in range(120)},
        "scalars": {"step": jnp.int32(7), "lr": 0.5, "name": "adam"},
        "half": jnp.ones((300, 300), jnp.bfloat16),
        "key": jax.random.key(3),
    }


class ASave:
    """Who holds memory."""


class Hold:
    """Lets no background save write until it is let go of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go = threading.Event()
        write = ArrayWriter.write

        def held(array_writer: ArrayWriter, directory: str) -> dict[str, bytes]:
            assert self._go.wait(60)
            return write(array_writer, directory)

        monkeypatch.setattr(ArrayWriter, "write", held)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    hold = Hold(monkeypatch)
    yield hold
    hold.let_go()


def data_nbytes(directory: Path) -> int:
    """What the data files of a save in flight hold, on the disk or on the way to it."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("d/*"))


# ------------------------------------------------------------------ the bound


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("staging", ["copy", "view"])
@pytest.mark.parametrize("max_host_bytes", [0, 1, 3 * MIB, 11 * MIB, 10**12])
def test_a_bounded_save_is_whole(tmp_path: Path, staging: Any, max_host_bytes: int, compression: Any) -> None:
    """Whatever a background save may hold, what is changed after the call is saved as it was at the call."""
    options = ArrayOptions(staging=staging, max_host_bytes=max_host_bytes, compression=compression)
    state = large_state()
    with AsyncCheckpointer(StandardCheckpointHandler(options)) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        state["host"][:] = -1
        for leaf in state["params"].values():
            leaf.delete()
        restored = checkpointer.restore(tmp_path / "c", large_state())
    assert typed_bits(restored) == typed_bits(large_state())


@pytest.mark.parametrize("max_host_bytes", [0, 2 * MIB, 6 * MIB])
def test_what_does_not_fit_into_memory_is_written_before_the_call_returns(
    tmp_path: Path, hold: Hold, max_host_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a state that is larger than the bound, all but the bound is in the file when `save` returns."""
    monkeypatch.setattr(writer, "_preallocate", lambda descriptor, nbytes: None)  # which takes the blocks at once
    state = {f"w{i}": np.full(MIB // 8, i, np.float64) for i in range(8)}
    with AsyncCheckpointer(StandardCheckpointHandler(ArrayOptions(max_host_bytes=max_host_bytes))) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        assert data_nbytes(tmp_path) >= 8 * MIB - max_host_bytes
        hold.let_go()
        assert typed_bits(checkpointer.restore(tmp_path / "c")) == typed_bits(state)


def test_the_items_of_a_checkpoint_share_one_bound(tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of several parts is bounded as a whole, not part by part."""
    monkeypatch.setattr(writer, "_preallocate", lambda descriptor, nbytes: None)
    state = {f"part{i}": {"w": np.full(MIB // 8, i, np.float64)} for i in range(6)}
    with CheckpointManager(tmp_path, max_host_bytes=2 * MIB) as manager:
        manager.save(1, state)
        assert data_nbytes(tmp_path) >= 4 * MIB
        hold.let_go()
        assert typed_bits(manager.restore()) == typed_bits(state)


def test_what_is_fetched_is_not_kept_by_the_callers_arrays(tmp_path: Path) -> None:
    """JAX keeps the host copy of an array that is not on the host, or is of four bits, as long as the array lives."""
    state = {f"w{i}": jnp.full((1000, 1000), i, jnp.int4) for i in range(4)}
    with CheckpointManager(tmp_path, max_host_bytes=0) as manager:
        manager.save(1, state)
        manager.wait()
        assert all(getattr(array, "_npy_value", None) is None for array in state.values())
        assert typed_bits(manager.restore(state)) == typed_bits(state)


def test_a_save_that_is_over_holds_nothing(tmp_path: Path) -> None:
    """The bound counts the saves in flight, also after one that failed half-way."""
    state = {f"w{i}": np.full(MIB // 8, i, np.float64) for i in range(4)}
    with CheckpointHook(tmp_path, every_n_steps=1, max_host_bytes=4 * MIB, on_save_error="warn") as hook:
        (tmp_path / "1.orbax-checkpoint-tmp").write_text("in the way, and removed")
        for step in range(1, 5):
            hook(step, state)
        hook.wait()
        handler = hook.manager.checkpointer.handler._pin("part", pytree.StandardSaveArgs({})).handler
        assert handler._memory.claim(ASave(), 4 * MIB) == 4 * MIB


@pytest.mark.parametrize(
    "wrong", [{"staging": "move"}, {"max_host_bytes": -1}, {"max_host_bytes": 1.5}, {"compression": "lz4"}]
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """An option has a value that is known, or the hook says so before it makes anything."""
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        CheckpointHook(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ memory


def test_large_memory_is_in_huge_pages() -> None:
    """Where Linux gives huge pages on request, large memory has them: making its pages takes a quarter of the time."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")

    def huge_kib() -> int:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(row.split()[1] for row in rows if row.startswith("AnonHugePages")))

    before = huge_kib()
    memory = aligned_memory(64 * MIB)
    memory[:] = 1
    assert huge_kib() - before >= 32 * 1024


def test_memory_is_used_again_by_the_next_save() -> None:
    """The memory that one save has given back is what the next one gets, if it is large enough."""
    memory, owner = HostMemory(), ASave()
    first = memory.take(5 * MIB)
    memory.release(owner, first)
    assert memory.take(4 * MIB) is first
    assert memory.take(4 * MIB) is not first, "one memory, one save"


def test_saves_in_the_background_take_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a save has copied into goes to the next one, also when one between them failed."""
    taken: list[int] = []

    def counting(nbytes: int) -> Any:
        taken.append(nbytes)
        return aligned_memory(nbytes)

    monkeypatch.setattr(writer, "aligned_memory", counting)
    state = {"w": np.ones(MIB // 8), "v": np.ones(MIB // 4)}
    pwrite = os.pwrite

    def take_no_arrays(descriptor: int, content: memoryview, offset: int) -> int:
        return 0 if len(content) >= MIB else pwrite(descriptor, content, offset)

    with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
        for number in range(4):
            with monkeypatch.context() as patch:
                if number == 1:
                    patch.setattr(os, "pwrite", take_no_arrays)
                checkpointer.save(tmp_path / str(number), state)
                with pytest.raises(SaveFailedError) if number == 1 else contextlib.nullcontext():
                    checkpointer.wait_until_finished()
    assert taken == [3 * MIB]


def test_memory_that_is_too_small_is_given_up() -> None:
    """A structure that has grown does not leave the memory of the smaller one behind."""
    memory, owner = HostMemory(), ASave()
    memory.release(owner, memory.take(1 * MIB))
    memory.release(owner, memory.take(5 * MIB))
    assert [idle.nbytes for idle in memory._idle] == [5 * MIB]


def test_a_save_in_the_foreground_copies_no_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written before the call returns is written from where it is."""
    copies: list[int] = []
    monkeypatch.setattr(writer, "aligned_memory", copies.append)
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", large_state())
    assert copies == []


# ------------------------------------------------------------------ where arrays may be


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # None is here: arrays on CPU are taken for remote ones, which goes the same way but for the transfer.
    for module in ("ckpt_hooks.leaves", "ckpt_hooks.handlers.pytree"):
        monkeypatch.setattr(f"{module}.is_on_host", lambda array: False)
    monkeypatch.setattr(writer, "_FETCHED_BYTES", 3 * MIB)
    monkeypatch.setattr(layout, "BLOCK_BYTES", MIB)
    pytree._cache.clear()
    yield
    pytree._cache.clear()


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("checkpointer_class", [Checkpointer, AsyncCheckpointer])
@pytest.mark.parametrize("max_host_bytes", [None, 0, 3 * MIB])
def test_arrays_of_an_accelerator_are_fetched(
    tmp_path: Path, checkpointer_class: type[Checkpointer], max_host_bytes: int | None, compression: Any
) -> None:
    """Arrays that NumPy cannot see are brought to the host, some at a time, and saved as they are."""
    state = {**large_state(), "other": jnp.ones((7, 9), jnp.complex64), "wide": jnp.arange(MIB, dtype=jnp.float32)}
    options = ArrayOptions(max_host_bytes=max_host_bytes, compression=compression)
    with checkpointer_class(StandardCheckpointHandler(options)) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        restored = checkpointer.restore(tmp_path / "c", state)
    assert typed_bits(restored) == typed_bits(state)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("checkpointer_class", [Checkpointer, AsyncCheckpointer])
def test_what_was_fetched_and_written_is_held_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointer_class: type[Checkpointer], compression: Any
) -> None:
    """Neither by the save, before it fetches more, nor by the arrays of the caller, which live on."""
    state = {f"w{i}": jnp.full(3 * MIB // 2, i, jnp.int4) for i in range(8)}  # whose fetch is a copy, on CPU too
    fetched: list[weakref.ref[np.ndarray]] = []
    held_bytes = []

    def note(array: Any) -> np.ndarray:
        fetched.append(weakref.ref(found := host_bytes(array)))
        held_bytes.append(sum(array.nbytes for reference in fetched if (array := reference()) is not None))
        return found

    monkeypatch.setattr(writer, "host_bytes", note)
    with checkpointer_class(
        StandardCheckpointHandler(ArrayOptions(max_host_bytes=0, compression=compression))
    ) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
    assert len(held_bytes) == 8
    assert max(held_bytes) <= 3 * MIB + 3 * MIB // 2  # a window ends with the chunk that fills it
    assert [getattr(array, "_npy_value") for array in state.values()] == [None] * 8  # noqa: B009  (what JAX keeps)


@pytest.mark.parametrize("size", [6, 300_000])
def test_an_array_of_another_layout_in_memory_is_saved_in_c_order(tmp_path: Path, size: int) -> None:
    """How XLA has laid out an array does not matter to what is saved."""
    array = jnp.arange(size, dtype=jnp.float32).reshape(2, -1)
    columns = Format(Layout((1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    state = {"w": jax.device_put(array, columns), "other": jnp.zeros(100)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        np.testing.assert_array_equal(manager.restore()["w"], array)


def test_arrays_of_numpy_in_any_order_are_saved_in_c_order(tmp_path: Path) -> None:
    """Strides, byte order and extended dtypes do not matter to what is saved."""
    base = np.arange(240_000, dtype=np.float32).reshape(300, 800)
    state = {
        "fortran": np.asfortranarray(base),
        "part": base[::3, 1::2],
        "back": base[::-1],
        "swapped": base.astype(">f4"),
        "half": base.astype(ml_dtypes.bfloat16)[:, ::-1],
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        restored = manager.restore()
    assert typed_bits(restored) == typed_bits({name: np.ascontiguousarray(array) for name, array in state.items()})
