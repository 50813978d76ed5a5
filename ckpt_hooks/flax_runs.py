"""Runs that `flax.training.checkpoints` wrote: `checkpoint_<step>`, a msgpack file or an Orbax directory; only read.

And which checkpoints have names that are no steps, of Flax's making or Orbax's: a run of them
is not empty.
"""

from __future__ import annotations

import os
import re

from ckpt_hooks.committed import is_committed
from ckpt_hooks.storage.lookup import is_directory, is_file

__all__ = ["PREFIX", "checkpoints_named_otherwise", "flax_path", "is_flax_checkpoint"]

PREFIX = "checkpoint_"  # Flax's default; who chose another one names the path
_NUMBERED = re.compile(r"(?:.*_)?(\d+(?:\.\d+)?)")  # `best_0.97` of Flax, `ckpt_7` and `00000007` of Orbax
_STEP = re.compile(rf"(?:{PREFIX})?(?:0|[1-9][0-9]*)")  # a run's own, also where it has rejected it


def flax_path(directory: str, step: int) -> str:
    """Where Flax keeps a step of the run in `directory`."""
    return os.path.join(directory, f"{PREFIX}{step}")


def is_flax_checkpoint(path: str) -> bool:
    """Whether there is a checkpoint, whole as far as a look at it can tell."""
    return is_file(path) or is_committed(path)


def checkpoints_named_otherwise(directory: str) -> list[str]:
    """The names in a directory of what is a checkpoint and not called by its step alone, by their numbers."""
    names = os.listdir(directory) if is_directory(directory) else []
    others = [name for name in names if not _STEP.fullmatch(name)]
    numbers = {name: float(found[1]) for name in others if (found := _NUMBERED.fullmatch(name))}
    return sorted(filter(lambda name: _is_one(directory, name), numbers), key=numbers.__getitem__)


def _is_one(directory: str, name: str) -> bool:
    path = os.path.join(directory, name)
    return is_committed(path) or (name.startswith(PREFIX) and is_file(path))
