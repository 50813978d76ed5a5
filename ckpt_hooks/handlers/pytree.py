"""Pytrees: states, parameters, anything that JAX can flatten."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from etils import epath

from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.loading import NO_TARGET, SavedTree
from ckpt_hooks.plan import METADATA_FILE, Plan

__all__ = ["StandardCheckpointHandler", "StandardRestoreArgs", "StandardSaveArgs"]


class StandardCheckpointHandler(CheckpointHandler):
    """Saves a pytree in Orbax's layout, with a checksum of every chunk, and restores it.

    Leaves are JAX arrays (any dtype that zarr has, sharded or not), typed PRNG keys, NumPy arrays, Python and
    NumPy scalars, strings and None; containers may be empty, and a tree may be one bare leaf.
    """

    def stage(self, args: StandardSaveArgs) -> StagedSave:
        return self._stage(args, copy=True)

    def save(self, directory: epath.Path, args: StandardSaveArgs) -> None:
        self._stage(args, copy=False).write(directory)

    def _stage(self, args: StandardSaveArgs, *, copy: bool) -> StagedSave:
        plan, leaves = Plan.of(args.item)
        staged = plan.stage(leaves, copy=copy)
        return StagedSave(lambda directory: staged.write(os.fspath(directory)), nbytes=staged.nbytes)

    def restore(self, directory: epath.Path, args: StandardRestoreArgs | None = None) -> Any:
        args = args or StandardRestoreArgs()
        saved = SavedTree(os.fspath(directory), verify=args.verify)
        return saved.restore(NO_TARGET if args.item is None else args.item, cast=args.cast)

    def metadata(self, directory: epath.Path) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array."""
        return SavedTree(os.fspath(directory)).metadata()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        return os.path.isfile(os.path.join(directory, METADATA_FILE))

    @classmethod
    def typestr(cls) -> str:
        # Orbax's own name, so that Orbax restores our checkpoints without being told how.
        return "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


@register_with_handler(StandardCheckpointHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class StandardSaveArgs(CheckpointArgs):
    """Saves `item`, a pytree."""

    item: Any


@register_with_handler(StandardCheckpointHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class StandardRestoreArgs(CheckpointArgs):
    """Restores a pytree.

    Attributes:
      item: the structure, types, dtypes and shardings to restore into, of arrays or `jax.ShapeDtypeStruct`;
        None gives nested dicts and lists of NumPy arrays.
      cast: whether a leaf of another dtype is converted; otherwise it is an error.
      verify: whether every byte that is read is checked against its checksum.
    """

    item: Any = None
    cast: bool = False
    verify: bool = True
