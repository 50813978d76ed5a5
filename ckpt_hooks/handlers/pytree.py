"""Pytrees: states, parameters, anything that JAX can flatten.

    tree --Plan.of--> plan, leaves --Plan.take--> chunks (host bytes) --Plan.write--> files

The plan is everything that depends only on the structure: names, JSON, offsets, index. It is made once and reused by
every later save of the same structure.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import os
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ckpt_hooks import processes, tree
from ckpt_hooks.errors import UnsupportedLeafError
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.leaves import (
    DELETED,
    LeafPlan,
    array_metadata_file,
    describe_leaf,
    shard_arrays,
    sharding_file,
    tree_metadata_file,
)
from ckpt_hooks.loading import NO_TARGET, SavedTree
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import DATA_FOLDER
from ckpt_hooks.storage.layout import ChunkId, Layout
from ckpt_hooks.storage.writer import write_arrays

__all__ = ["Plan", "StandardCheckpointHandler", "StandardRestoreArgs", "StandardSaveArgs"]

_CACHED_PLANS = 32
_BYTE = np.dtype(np.uint8)
_ORBAX_PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


class StandardCheckpointHandler(CheckpointHandler):
    """Saves a pytree in Orbax's layout, with a checksum of every chunk, and restores it.

    Leaves are JAX arrays (any dtype that zarr has, sharded or not), typed PRNG keys, NumPy arrays, Python and
    NumPy scalars, strings and None; containers may be empty, and a tree may be one bare leaf.
    """

    def __init__(self) -> None:
        self._process, self._num_processes = processes.index(), processes.count()

    def stage(self, args: StandardSaveArgs, *, copy: bool = True) -> StagedSave:
        plan, leaves = Plan.of(args.item, self._num_processes)
        chunks, strings = plan.take(leaves, copy=copy)
        write = functools.partial(plan.write, chunks, strings, self._process)
        return StagedSave(write, nbytes=plan.layout.data_nbytes[self._process], recorded_name=plan.recorded_name)

    def save(self, directory: epath.Path, args: StandardSaveArgs) -> None:
        self.stage(args, copy=False).write(directory)

    def restore(self, directory: epath.Path, args: StandardRestoreArgs | None = None) -> Any:
        args = args or StandardRestoreArgs()
        saved = SavedTree(os.fspath(directory), verify=args.verify)
        return saved.restore(NO_TARGET if args.item is None else args.item, cast=args.cast)

    def metadata(self, directory: epath.Path) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array."""
        return SavedTree(os.fspath(directory)).metadata()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        return os.path.isfile(os.path.join(directory, tree.METADATA_FILE))

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


# ------------------------------------------------------------------ the plan

Chunks = dict[ChunkId, memoryview]


class Plan:
    """How one structure is stored.

    Raises UnsupportedLeafError and NameCollisionError, before anything is written, for what cannot be.
    """

    def __init__(self, item: Any, num_processes: int) -> None:
        named = tree.flatten(item)
        self._names = [leaf.name for leaf in named if not leaf.is_empty]
        self._leaves = [describe_leaf(leaf.name, leaf.value) for leaf in named if not leaf.is_empty]
        numbers = itertools.count()
        self._array_numbers = [next(numbers) if leaf.array else -1 for leaf in self._leaves]
        self.layout = Layout([leaf.array for leaf in self._leaves if leaf.array], num_processes)
        # A part of a state that is None, and Python's complex numbers: what Orbax's StandardCheckpointHandler
        # refuses to restore, its other one does.
        is_none = [leaf.keys for leaf in named if leaf.is_empty and tree.empty_type(leaf.value) == "None"] == [()]
        is_complex = any(isinstance(leaf.value, complex) for leaf in named)
        self.recorded_name = _ORBAX_PYTREE_HANDLER if is_none or is_complex else None
        self._array_metadata = array_metadata_file(self._leaves)
        self._primary_files = {
            tree.METADATA_FILE: tree_metadata_file(named, self._leaves),
            tree.SHARDING_FILE: sharding_file(self._names, self._leaves),
        }

    @classmethod
    def of(cls, item: Any, num_processes: int) -> tuple[Plan, Sequence[Any]]:
        """The plan of a tree, from the cache where its structure was met before, and the tree's leaves."""
        try:
            leaves, structure = jax.tree_util.tree_flatten(item)
        except (TypeError, ValueError) as error:  # keys that cannot be sorted
            raise UnsupportedLeafError(f"the tree cannot be flattened by JAX: {error}") from error
        key: Hashable = (structure, num_processes, *map(_signature, leaves))
        try:
            with _cache_lock:
                plan = _cache.get(key)
        except (TypeError, ValueError):  # a node with metadata that cannot be hashed or compared
            return cls(item, num_processes), leaves
        if plan is None:
            plan = cls(item, num_processes)
            with _cache_lock:
                _cache[key] = plan
                while len(_cache) > _CACHED_PLANS:
                    _cache.popitem(last=False)
        return plan, leaves

    def take(self, leaves: Sequence[Any], *, copy: bool) -> tuple[Chunks, dict[str, str]]:
        """(the bytes that this process owns, {name: string}); after it, the caller may change or donate the leaves.

        JAX arrays are immutable, so a view of a CPU array is as good as a copy: JAX keeps the buffer of an array
        that is donated or deleted for as long as a view of it lives. NumPy arrays may change under a background
        writer, so `copy` takes one.
        """
        chunks: Chunks = {}
        strings: dict[str, str] = {}
        rows = zip(self._names, self._array_numbers, self._leaves, leaves, strict=True)
        for name, number, plan, leaf in rows:
            if plan.array is None:
                strings[name] = leaf
            elif plan.is_sharded:
                for chunk, array in shard_arrays(plan, leaf):
                    chunks[number, chunk] = array.reshape(-1).view(_BYTE).data
            elif plan.array.grid:
                # The extended dtypes have no buffer protocol; their bytes do.
                array = _to_host(name, plan, leaf, copy=copy)
                chunks[number, 0] = array.reshape(-1).view(_BYTE).data
        return chunks, strings

    def write(self, chunks: Chunks, strings: dict[str, str], process: int, directory: epath.Path) -> None:
        """Writes the files of one process; they are durable only after `commit.sync_tree`."""
        path = os.fspath(directory)
        for folder in (tree.ARRAY_METADATA_FOLDER, DATA_FOLDER):
            os.makedirs(os.path.join(path, folder), exist_ok=True)
        files = {f"{tree.ARRAY_METADATA_FOLDER}/process_{process}": self._array_metadata}
        files |= write_arrays(path, self.layout, chunks, process)
        if process == 0:
            files |= self._primary_files
        if strings:
            files[tree.STRINGS_FILE] = json.dumps(strings).encode()
        for name, content in files.items():
            commit.write_file(os.path.join(path, name), content)


def _signature(leaf: Any) -> Hashable:
    """All of a leaf that its plan depends on: everything but its values."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def _to_host(name: str, plan: LeafPlan, leaf: Any, *, copy: bool) -> Any:
    """A leaf that is one chunk, as a NumPy array in C order; a view of a JAX array on CPU."""
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise UnsupportedLeafError(f"{name or 'the state'}: {DELETED}")
        return np.asarray(leaf if plan.key_impl is None else jax.random.key_data(leaf))
    assert plan.array is not None
    try:
        return np.array(leaf, plan.array.dtype, order="C", copy=copy or None)
    except OverflowError as error:
        raise UnsupportedLeafError(
            f"{name or 'the state'}: {leaf!r} does not fit into 64 bits; save it as a string."
        ) from error


_cache: collections.OrderedDict[Hashable, Plan] = collections.OrderedDict()
_cache_lock = threading.Lock()
