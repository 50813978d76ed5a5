"""Kinds of items that only Orbax writes, and that are only read here: one array, and random keys.

    ArraySave           the item is the pytree {"checkpoint": array}, in files
    JaxRandomKeySave    jax_random_key/ is such an array, jax_random_key_metadata/metadata is {"typed": true}
    NumpyRandomKeySave  np_random_key/ is a pytree, np_random_key_metadata/metadata is {"legacy": true}

One handler reads them all, since their files say which they are; `base.get_handler_type` knows it by their names.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from ckpt_hooks import structure, tree
from ckpt_hooks.changes import EXACT
from ckpt_hooks.errors import CorruptCheckpointError, InvalidArgumentError
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, register_with_handler
from ckpt_hooks.handlers.pytree import StandardRestoreArgs
from ckpt_hooks.loading import NO_TARGET, SavedTree
from ckpt_hooks.storage.lookup import content_of, is_file

__all__ = ["ARRAY_NAME", "OrbaxItemHandler", "OrbaxItemRestoreArgs"]

ARRAY_NAME = "checkpoint"  # the one leaf of an array item
_KEY_METADATA = "_metadata"  # after the name of a key's directory
_KEY_IMPL = "threefry2x32"  # JAX's default, and the only one that Orbax saves


class OrbaxItemHandler(CheckpointHandler):
    """Restores an array as an array, a JAX key as a key and NumPy's random state as `numpy.random.set_state` takes it.

    A target is fitted as that of a pytree is. Raises CorruptCheckpointError where files are missing.
    """

    def save(self, directory: epath.Path, args: CheckpointArgs) -> None:
        raise InvalidArgumentError("single arrays and keys are saved as leaves of a state; this only reads Orbax's")

    def restore(self, directory: epath.Path, args: StandardRestoreArgs | None = None) -> Any:
        args = StandardRestoreArgs() if args is None else args
        saved, key = _open(os.fspath(directory))
        restored = saved.restore(NO_TARGET if args.item is None else args.item, args.changes or EXACT)
        if args.typed:
            return structure.typed_item(
                os.fspath(directory), restored, saved.custom_metadata
            )  # raises: it has no types
        is_state = args.item is None and key is not None and key.get("legacy") is True
        return tuple(restored) if is_state else restored

    def metadata(self, directory: epath.Path) -> Any:
        """An array or the tree of them, with a `jax.ShapeDtypeStruct` for each."""
        return _open(os.fspath(directory))[0].metadata()

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.array_checkpoint_handler.ArrayCheckpointHandler"


@register_with_handler(OrbaxItemHandler, for_save=True, for_restore=True)
@dataclasses.dataclass(frozen=True)
class OrbaxItemRestoreArgs(StandardRestoreArgs):
    """Restores such an item; attributes as of `StandardRestoreArgs`."""


class _OneArray(SavedTree):
    """An array item as a tree that is a bare leaf."""

    def __init__(self, directory: str, key_impl: str | None = None) -> None:
        super().__init__(directory)
        if self.leaves.keys() != {ARRAY_NAME}:
            raise CorruptCheckpointError(f"{directory} is not Orbax's item of one array: it has {sorted(self.leaves)}")
        (record,) = self._records
        leaf = self.leaves[ARRAY_NAME]
        self._records = [tree.LeafRecord("", [], record.value_type)]
        self._arrays = _Renamed(self._arrays)
        self.leaves = {"": leaf._replace(key_impl=key_impl or leaf.key_impl)}

    def _saved_shardings(self) -> Mapping[str, str]:
        texts = list(super()._saved_shardings().values())
        return {"": texts[0]} if texts else {}  # of the one leaf, whose name is ""


class _Renamed:
    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays

    def info(self, name: str) -> Any:
        return self._arrays.info(ARRAY_NAME)

    def read(self, names: Any) -> dict[str, Any]:
        return {name: self._arrays.read([ARRAY_NAME])[ARRAY_NAME] for name in names}

    def read_regions(self, wanted: Any) -> dict[str, Any]:
        return {name: self._arrays.read_regions({ARRAY_NAME: wanted[name]})[ARRAY_NAME] for name in wanted}


def _open(directory: str) -> tuple[SavedTree, dict[str, Any] | None]:
    """The tree of an item, and what is recorded of the kind of key; None for an array."""
    if is_file(os.path.join(directory, tree.METADATA_FILE)):
        return _OneArray(directory), None
    names = set(os.listdir(directory))
    name = next((name for name in sorted(names) if f"{name}{_KEY_METADATA}" in names), None)
    if name is None:
        raise CorruptCheckpointError(f"{directory} is neither an array nor a random key of Orbax's: it has {names}")
    path = os.path.join(directory, f"{name}{_KEY_METADATA}", "metadata")
    try:
        kind = json.loads(content_of(path))
        is_typed = kind.get("typed")
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    inner = os.path.join(directory, name)
    if is_typed is None:
        return SavedTree(inner), kind
    return _OneArray(inner, _KEY_IMPL if is_typed else None), kind
