"""What a save and a restore by the processes of a group take, counted; each function is run by all of them at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ckpt_hooks import Checkpointer, StandardCheckpointHandler, args, processes
from ckpt_hooks.storage.reader import Database
from tests.together import global_array


def state(num_leaves: int) -> dict[str, Any]:
    """Leaves that every device has a different part of; no part is small enough to stand in the index."""
    over = Mesh(np.array(jax.devices()), ("x",))
    values = np.arange(512.0 * len(jax.devices()), dtype=np.float32)
    return {f"leaf_{number:03}": global_array(values, PartitionSpec("x"), over) for number in range(num_leaves)}


def count(folder: Path, num_leaves: int) -> dict[str, Any]:
    """Of the second save of a structure, and of a restore of it: what this process does."""
    calls = {"fsync": 0, "publish": 0}
    fsync, publish = os.fsync, processes.publish

    def counting_fsync(fd: Any) -> None:
        calls["fsync"] += 1
        fsync(fd)

    def counting_publish(key: str, value: str) -> None:
        calls["publish"] += 1
        publish(key, value)

    os.fsync, processes.publish = counting_fsync, counting_publish
    tree = state(num_leaves)
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "first", args.StandardSave(tree))
        calls.update(fsync=0, publish=0)
        checkpointer.save(folder / "second", args.StandardSave(tree))
        saved = dict(calls)
        calls.update(fsync=0, publish=0)
        checkpointer.restore(folder / "second", args.StandardRestore(tree))
    files = sum(path.is_file() for path in (folder / "second").rglob("*"))
    return {
        "files": files,
        "syncs": saved["fsync"],
        "saved lines": saved["publish"],
        "restored lines": calls["publish"],
        "entries": len(Database(str(folder / "second"))._values),
    }
