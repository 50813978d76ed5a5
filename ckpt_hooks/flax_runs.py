"""Runs that `flax.training.checkpoints` wrote: `checkpoint_<step>`, a msgpack file or an Orbax directory; only read."""

from __future__ import annotations

import os

from ckpt_hooks.storage.lookup import is_file
from ckpt_hooks.temporary_paths import is_committed

__all__ = ["PREFIX", "flax_path", "is_flax_checkpoint"]

PREFIX = "checkpoint_"  # Flax's default; who chose another one names the path


def flax_path(directory: str, step: int) -> str:
    """Where Flax keeps a step of the run in `directory`."""
    return os.path.join(directory, f"{PREFIX}{step}")


def is_flax_checkpoint(path: str) -> bool:
    """Whether there is a checkpoint, whole as far as a look at it can tell."""
    return is_file(path) or is_committed(path)
