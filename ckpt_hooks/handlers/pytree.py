"""Pytrees: states, parameters, anything that JAX can flatten.

    tree --Plan.of--> plan, leaves --Plan.take--> sources (host bytes) --Plan.write--> files

The plan is everything that depends only on the structure: names, JSON, offsets, index. It is made once and reused by
every later save of the same structure.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import json
import operator
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from ckpt_hooks import processes, structure, tree
from ckpt_hooks.changes import EXACT, Changes
from ckpt_hooks.claims import structure_claim, value_claim
from ckpt_hooks.equinox_modules import functions_in_modules
from ckpt_hooks.errors import InvalidArgumentError, UnsupportedLeafError
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.leaves import (
    DELETED,
    FUNCTION,
    LeafPlan,
    array_metadata_file,
    describe_leaf,
    is_on_host,
    shard_arrays,
    sharding_file,
    tree_metadata_file,
)
from ckpt_hooks.loading import NO_TARGET
from ckpt_hooks.msgpack_tree import MsgpackTree, open_tree
from ckpt_hooks.processes import Writers
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.compression import CompressingWriter
from ckpt_hooks.storage.layout import Layout
from ckpt_hooks.storage.lookup import is_directory, is_file
from ckpt_hooks.storage.memory import host_bytes
from ckpt_hooks.storage.writer import ArrayWriter, HostMemory, Sources

__all__ = ["ArrayOptions", "Plan", "StandardCheckpointHandler", "StandardRestoreArgs", "StandardSaveArgs"]

_CACHED_PLANS = 32
_ORBAX_PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayOptions:
    """How arrays are taken from a state and written.

    Attributes:
      compression: "zstd" compresses each array on its way to the disk, for who pays for bytes; weights lose less than a
        tenth, and a save takes several times as long.
      staging: what a save in the background does with JAX arrays on CPU before training goes on. "copy" copies
        them, so that a step that is given the state to reuse (`donate_argnums`) finds its memory free; the copy's
        memory is kept for the next save. "view" copies only NumPy arrays: for states that are not donated.
      max_host_bytes: how much of a state a save in the background may hold in host memory; what does not fit is
        written before the call returns. None for all of it.
    """

    compression: Literal["zstd"] | None = None
    staging: Literal["copy", "view"] = "copy"
    max_host_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.compression not in (None, "zstd"):
            raise InvalidArgumentError(f"compression is 'zstd', or None for none; got {self.compression!r}")
        if self.staging not in ("copy", "view"):
            raise InvalidArgumentError(f"staging is 'copy' or 'view', got {self.staging!r}")
        limit: Any = self.max_host_bytes
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidArgumentError(f"max_host_bytes is a number of bytes, or None for no bound; got {limit!r}")


class StandardCheckpointHandler(CheckpointHandler):
    """Saves a pytree in Orbax's layout, with a checksum of every byte, and restores it.

    Leaves are JAX arrays (any dtype that zarr has, sharded or not), typed PRNG keys, NumPy arrays, Python and
    NumPy scalars, strings and None; containers may be empty, and a tree may be one bare leaf.

    Args:
      options: how arrays are taken and written.
    """

    def __init__(self, options: ArrayOptions | None = None) -> None:
        self._options = ArrayOptions() if options is None else options
        self._memory = HostMemory(self._options.max_host_bytes)
        self._compresses = self._options.compression is not None
        self._unfinished: dict[str, CompressingWriter] = {}  # by the item's directory
        self._writer_class = CompressingWriter if self._compresses else ArrayWriter
        self.take_part(processes.MultiprocessingOptions())

    def take_part(self, options: processes.MultiprocessingOptions) -> None:
        self._writers = options.writers()
        self._rank = self._writers.ranks.get(processes.index(), 0)
        self._finishes = self._compresses and self._rank == 0 and len(self._writers.indexes) > 1

    def stage(self, args: StandardSaveArgs) -> StagedSave:
        plan, leaves = Plan.of(args.item, self._writers, self._compresses, args.part_of)
        sources, strings = plan.take(leaves, self._rank)
        writer = self._writer_class(plan.layout, self._rank, sources)
        write = functools.partial(plan.write, writer, strings, self._rank)
        return StagedSave(
            functools.partial(self._write_unfinished, writer, write) if self._finishes else write,
            detach=functools.partial(self._detach, writer),
            nbytes=plan.layout.files[self._rank].nbytes,
            recorded_name=plan.recorded_name,
            claim=plan.claim_with(leaves) if plan.claim else "",
        )

    def _detach(self, writer: ArrayWriter, directory: epath.Path) -> None:
        writer.detach(os.fspath(directory), self._memory, copies=self._options.staging == "copy")

    def _write_unfinished(self, writer: Any, write: Callable[[epath.Path], None], directory: epath.Path) -> None:
        write(directory)
        failed = [path for path in self._unfinished if not is_directory(path)]
        for path in failed:
            del self._unfinished[path]
        self._unfinished[os.fspath(directory)] = writer

    def save(self, directory: epath.Path, args: StandardSaveArgs) -> None:
        self.stage(args).write(directory)

    def finalize(self, directory: epath.Path) -> None:
        """Of several processes that compress, the first one writes the index now, when all chunks have their places."""
        if self._finishes:
            path = os.fspath(directory)
            for name, content in self._unfinished.pop(path).finish(path).items():
                commit.write_file(os.path.join(path, name), content)

    def close(self) -> None:
        self._memory.clear()
        self._unfinished.clear()

    def restore(self, directory: epath.Path, args: StandardRestoreArgs | None = None) -> Any:
        args = StandardRestoreArgs() if args is None else args
        with _collection_paused():
            saved = open_tree(os.fspath(directory), verify=args.verify)
            changes = args.changes or (Changes(cast=args.cast) if args.cast else EXACT)
            restored = saved.restore(NO_TARGET if args.item is None else args.item, changes)
            custom_metadata = saved.custom_metadata
            del saved  # with its objects for each leaf, or the collector, which runs right behind, looks through them
        if args.typed:
            return structure.typed_item(os.fspath(directory), restored, custom_metadata)
        return restored

    def metadata(self, directory: epath.Path) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array."""
        return open_tree(os.fspath(directory)).metadata()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        return is_file(os.path.join(directory, tree.METADATA_FILE)) or MsgpackTree.is_at(directory)

    @classmethod
    def typestr(cls) -> str:
        # Orbax's own name, so that Orbax restores our checkpoints without being told how.
        return "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


@register_with_handler(StandardCheckpointHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class StandardSaveArgs(CheckpointArgs):
    """Saves `item`, a pytree.

    Attributes:
      item: the tree.
      part_of: of which kind of state it is a part, as `structure.describe_state` says.
    """

    item: Any
    part_of: str | None = None


@register_with_handler(StandardCheckpointHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class StandardRestoreArgs(CheckpointArgs):
    """Restores a pytree.

    Attributes:
      item: the structure, types, dtypes and shardings to restore into, of arrays or `jax.ShapeDtypeStruct`;
        None gives nested dicts and lists of NumPy arrays.
      cast: whether a leaf of another dtype is converted; otherwise it is an error.
      verify: whether every byte that is read is checked against its checksum.
      changes: what else may differ, with paths inside this item; its `cast` then counts.
      typed: whether, without `item`, the tree comes back in the types that it was saved in; see docs/restore.md.
    """

    item: Any = None
    cast: bool = False
    verify: bool = True
    changes: Changes | None = None
    typed: bool = False

    def __post_init__(self) -> None:
        if self.typed and self.item is not None:
            raise InvalidArgumentError("typed=True is for a restore without a target, so leave one of them out")


# ------------------------------------------------------------------ the plan


class Plan:
    """How one structure is stored.

    Raises UnsupportedLeafError and NameCollisionError, before anything is written, for what cannot be.
    """

    def __init__(self, item: Any, writers: Writers, compresses: bool = False, part_of: str | None = None) -> None:
        named = tree.flatten(item)
        filled = [leaf for leaf in named if not leaf.is_empty]
        self._names = [leaf.name for leaf in filled]
        functions = functions_in_modules(item) if any(callable(leaf.value) for leaf in filled) else ()
        self._leaves = [
            FUNCTION if leaf.name in functions else describe_leaf(leaf.name, leaf.value, writers) for leaf in filled
        ]
        self._jax_arrays = [number for number, leaf in enumerate(self._leaves) if leaf.value_type == "jax.Array"]
        self._has_only_buffers = all(leaf.is_buffer for leaf in self._leaves)
        arrays = [leaf.array for leaf in self._leaves if leaf.array]
        part = writers.indexes[0] if writers.is_local else None
        rank = writers.ranks.get(processes.index(), 0)
        self.layout = Layout(arrays, len(writers.indexes), inlines=not compresses, part_of_process=part, only=rank)
        # A part of a state that is None, and Python's complex numbers: what Orbax's StandardCheckpointHandler
        # refuses to restore, its other one does.
        is_none = [leaf.keys for leaf in named if leaf.is_empty and tree.empty_type(leaf.value) == "None"] == [()]
        is_complex = any(isinstance(leaf.value, complex) for leaf in named)
        self.recorded_name = _ORBAX_PYTREE_HANDLER if is_none or is_complex else None
        self._is_shared, types = len(writers.indexes) > 1, structure.metadata_of(item, part_of)
        self._primary_files = {
            tree.OWN_ARRAY_METADATA: array_metadata_file(self._leaves),
            tree.METADATA_FILE: tree_metadata_file(named, self._leaves, types),
            tree.SHARDING_FILE: sharding_file(self._names, self._leaves),
        }
        is_alone = writers is processes.ALONE
        self.claim = "" if is_alone else structure_claim(self._names, self._leaves, types, shared=self._is_shared)
        self.claim += "\ncompression" if self.claim and compresses else ""

    def claim_with(self, leaves: Sequence[Any]) -> str:
        """What the other processes compare with theirs, the values of those leaves included that each has by itself."""
        if not self._is_shared:
            return self.claim
        return f"{self.claim}\n{value_claim(self._names, self._leaves, leaves)}".strip()

    @classmethod
    def of(
        cls, item: Any, writers: Writers, compresses: bool = False, part_of: str | None = None
    ) -> tuple[Plan, Sequence[Any]]:
        """The plan of a tree, from the cache where its structure was met before, and the tree's leaves."""
        try:
            leaves, treedef = jax.tree_util.tree_flatten(item)
        except (TypeError, ValueError) as error:  # keys that cannot be sorted
            raise UnsupportedLeafError(f"the tree cannot be flattened by JAX: {error}") from error
        try:
            # With its text: to Python, keys 1, 1.0 and True are one, and "a" and a string enum of it.
            key: Hashable = (treedef, str(treedef), writers, compresses, part_of, *_signatures(leaves))
            with _cache_lock:
                plan = _cache.get(key)
        except Exception:  # a node with metadata that cannot be hashed, compared or shown
            return cls(item, writers, compresses, part_of), leaves
        if plan is None:
            with _collection_paused():
                plan = cls(item, writers, compresses, part_of)
            with _cache_lock:
                _cache[key] = plan
                while len(_cache) > _CACHED_PLANS:
                    _cache.popitem(last=False)
        return plan, leaves

    def take(self, leaves: Sequence[Any], process: int) -> tuple[Sources, dict[str, str]]:
        """(the bytes that a process owns, {name: string}): the caller's memory as it is, nothing is copied.

        Raises UnsupportedLeafError for an array that has been deleted.
        """
        deleted = [number for number in self._jax_arrays if leaves[number].is_deleted()]
        if deleted:
            raise UnsupportedLeafError(f"{', '.join(self._names[n] for n in deleted) or 'the state'}: {DELETED}")
        if self._has_only_buffers:
            return Sources(leaves if process == 0 else ()), {}
        buffers: list[Any] = []
        mutable, remote, strings = set(), {}, {}
        for name, plan, leaf in zip(self._names, self._leaves, leaves, strict=True):
            if plan.array is None:
                if plan is not FUNCTION:
                    strings[name] = leaf
                continue
            for source in _chunks(name, plan, leaf, process):
                if plan.value_type == "np.ndarray":
                    mutable.add(len(buffers))
                if isinstance(source, jax.Array) and not plan.is_buffer:
                    remote[len(buffers)] = source
                buffers.append(source)
        return Sources(buffers, mutable, remote), strings

    def write(self, writer: ArrayWriter, strings: dict[str, str], process: int, directory: epath.Path) -> None:
        """Writes the files of one process; they are durable only after `commit.sync_tree`."""
        path = os.fspath(directory)
        files = writer.write(path)
        if process == 0:  # what is the same in all processes: written by each, it would grow with processes x leaves
            os.makedirs(os.path.join(path, tree.ARRAY_METADATA_FOLDER))
            files |= self._primary_files
            files |= {tree.STRINGS_FILE: json.dumps(strings).encode()} if strings else {}
        for name, content in files.items():
            commit.write_file(os.path.join(path, name), content)


def _signatures(leaves: Sequence[Any]) -> list[Hashable]:
    """All of the leaves that a plan depends on: everything but their values."""
    # By their classes first, since `isinstance` of every leaf would take longer than all of the rest.
    if all(issubclass(kind, jax.Array) for kind in set(map(type, leaves))):
        return list(map(_array_signature, leaves))
    return [_signature(leaf) for leaf in leaves]


_array_signature = operator.attrgetter("shape", "dtype", "sharding")


def _signature(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return leaf.shape, leaf.dtype, leaf.sharding
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def _chunks(name: str, plan: LeafPlan, leaf: Any, process: int) -> Sequence[Any]:
    """The chunks of a leaf that a process owns: buffers, or JAX arrays that are still on an accelerator."""
    assert plan.array is not None
    if plan.is_buffer:
        return [leaf] if process == 0 else ()
    if not isinstance(leaf, jax.Array):
        return [host_bytes(_as_array(name, plan.array.dtype, leaf))] if plan.array.grid and process == 0 else ()
    data = leaf if plan.key_impl is None else jax.random.key_data(leaf)
    held = [data] if process in plan.array.owners else []
    arrays = shard_arrays(plan, data, process) if plan.is_sharded else held
    return [host_bytes(array) if is_on_host(array) else array for array in arrays]


def _as_array(name: str, dtype: np.dtype, leaf: Any) -> np.ndarray:
    try:
        return np.asarray(leaf, dtype)
    except OverflowError as error:
        raise UnsupportedLeafError(
            f"{name or 'the state'}: {leaf!r} does not fit into 64 bits; save it as a string."
        ) from error


_cache: collections.OrderedDict[Hashable, Plan] = collections.OrderedDict()
_cache_lock = threading.Lock()


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Makes many objects without the garbage collector looking through all that there are again and again.

    With a leaf in several objects, and several hundred thousand of JAX's own, that takes most of the time.
    """
    global _num_paused, _was_enabled
    with _pause_lock:
        if _num_paused == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_paused += 1
    try:
        yield
    finally:
        with _pause_lock:
            _num_paused -= 1
            if _num_paused == 0 and _was_enabled:
                gc.enable()


_num_paused = 0
_was_enabled = True
_pause_lock = threading.Lock()
