"""Who is compared: each saves a state to a path and restores it, in its own best or usual way.

`savers` return when the checkpoint is as durable as they make it (ours syncs every file and directory; Orbax syncs its
data and neither its metadata nor its rename). `background_savers` return while the writing goes on. ``ours (A/A)`` is
``ours`` once more: how far it lies from 1.0 is how far any other ratio may lie from the truth.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint.experimental import v1 as orbax_v1

from benchmarks.workloads import State
from ckpt_hooks import ArrayOptions, AsyncCheckpointer, Checkpointer, StandardCheckpointHandler

try:
    import safetensors.flax as safetensors
except ImportError:
    safetensors = None

__all__ = ["CONTROL", "ORBAX", "OURS", "BackgroundSaver", "Saver", "background_savers", "savers"]

OURS, CONTROL = "ours", "ours (A/A)"
ORBAX = ("orbax", "orbax, tuned")  # whose checkpoints ours restores too
_DATA_FILE_BYTES = 256 << 20  # of the sizes tried, the one with which Orbax is fastest


def _as_it_is(state: State) -> Any:
    return state


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves and restores.

    Attributes:
      save: of (path, what `prepare` returned).
      restore: of (path, abstract state).
      prepare: runs before the clock does.
    """

    name: str
    save: Callable[[str, Any], object]
    restore: Callable[[str, State], Any]
    prepare: Callable[[State], Any] = _as_it_is


@dataclasses.dataclass(frozen=True)
class BackgroundSaver:
    """Starts a save of (path, state), and waits until it is committed."""

    name: str
    start: Callable[[str, State], object]
    wait: Callable[[], object]


def savers() -> list[Saver]:
    """Everybody, `OURS` first."""
    known = [
        _ours(OURS),
        _ours(CONTROL),
        _orbax_default(),
        _orbax_tuned(),
        _orbax_v1_tuned(),
        Saver("msgpack", _save_msgpack, _restore_msgpack),
        Saver("raw", _save_raw, _restore_raw, prepare=_bytes_of),
    ]
    return known if safetensors is None else [*known, Saver("safetensors", _save_safetensors, _restore_safetensors)]


def background_savers() -> list[BackgroundSaver]:
    """Those that have an asynchronous save, `OURS` first."""
    default = orbax.StandardCheckpointer()
    tuned = orbax.AsyncCheckpointer(_tuned_handler())
    return [
        _ours_in_background(OURS),
        _ours_in_background(CONTROL),
        _ours_in_background("ours, views", staging="view"),
        BackgroundSaver(ORBAX[0], default.save, default.wait_until_finished),
        BackgroundSaver(ORBAX[1], functools.partial(_save_tuned, tuned), tuned.wait_until_finished),
    ]


# ------------------------------------------------------------------ ours


def _ours(name: str) -> Saver:
    checkpointer = Checkpointer(StandardCheckpointHandler())
    return Saver(name, checkpointer.save, checkpointer.restore)


def _ours_in_background(name: str, **options: Any) -> BackgroundSaver:
    checkpointer = AsyncCheckpointer(StandardCheckpointHandler(ArrayOptions(**options)))
    return BackgroundSaver(name, checkpointer.save, checkpointer.wait_until_finished)


# ------------------------------------------------------------------ Orbax


def _orbax_default() -> Saver:
    checkpointer = orbax.StandardCheckpointer()

    def save(path: str, state: State) -> None:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()

    return Saver(ORBAX[0], save, checkpointer.restore)


def _orbax_tuned() -> Saver:
    checkpointer = orbax.Checkpointer(_tuned_handler())

    def restore(path: str, like: State) -> Any:
        restore_args = orbax.checkpoint_utils.construct_restore_args(like)
        return checkpointer.restore(path, args=orbax.args.PyTreeRestore(like, restore_args=restore_args))

    return Saver(ORBAX[1], functools.partial(_save_tuned, checkpointer), restore)


def _tuned_handler() -> Any:
    return orbax.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True)


def _save_tuned(checkpointer: Any, path: str, state: State) -> None:
    checkpointer.save(path, args=orbax.args.PyTreeSave(state, ocdbt_target_data_file_size=_DATA_FILE_BYTES))


def _orbax_v1_tuned() -> Saver:
    context = orbax_v1.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
    saving.enable_post_merge_validation = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None

    def save(path: str, state: State) -> None:
        with context:
            orbax_v1.save(path, state)

    def restore(path: str, like: State) -> Any:
        with context:
            return orbax_v1.load(path, like)

    return Saver("orbax v1, tuned", save, restore)


# ------------------------------------------------------------------ one file


def _save_msgpack(path: str, state: State) -> None:
    _write(path, flax.serialization.to_bytes(state))


def _restore_msgpack(path: str, like: State) -> Any:
    with open(path, "rb") as file:
        return jax.device_put(flax.serialization.from_bytes(like, file.read()))


def _save_safetensors(path: str, state: State) -> None:
    safetensors.save_file(flax.traverse_util.flatten_dict(state, sep="."), path)
    _sync(path)


def _restore_safetensors(path: str, like: State) -> Any:
    del like
    return flax.traverse_util.unflatten_dict(safetensors.load_file(path), sep=".")


def _bytes_of(state: State) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def _save_raw(path: str, content: bytes) -> None:
    _write(path, content)


def _restore_raw(path: str, like: State) -> Any:
    """The bytes, in fresh memory: no arrays are made of them."""
    del like
    memory = np.empty(os.path.getsize(path), np.uint8)
    with open(path, "rb", buffering=0) as file:
        view = memory.data
        while view:
            view = view[file.readinto(view) or len(view) :]
    return memory


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]  # one call writes at most 2 GiB
        os.fsync(file.fileno())


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
