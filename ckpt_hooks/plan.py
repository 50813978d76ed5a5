"""The plan of a pytree item: everything that depends only on its structure, made once and reused by every save.

tree --Plan.of--> plan --stage--> Staged (the host bytes that this process owns) --write--> files
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from ckpt_hooks import events, processes, tree
from ckpt_hooks.errors import UnsupportedLeafError
from ckpt_hooks.leaves import LeafPlan, describe_leaf, host_chunks, sharding_file, signature
from ckpt_hooks.storage import checksums, commit, ocdbt
from ckpt_hooks.storage.layout import ChunkId, Layout, data_file_name
from ckpt_hooks.storage.writer import write_data_file

__all__ = ["METADATA_FILE", "Plan", "StagedTree"]

METADATA_FILE = "_METADATA"
SHARDING_FILE = "_sharding"
STRINGS_FILE = "_strings.json"
ARRAY_METADATA_FOLDER = "array_metadatas"
_CACHED_PLANS = 32


class Plan:
    """How one structure is stored. Raises UnsupportedLeafError and NameCollisionError before anything is written."""

    def __init__(self, item: Any) -> None:
        named = tree.flatten(item)
        self._names = [leaf.name for leaf in named if not leaf.is_empty]
        self._leaves = [describe_leaf(leaf.name, leaf.value) for leaf in named if not leaf.is_empty]
        arrays = [leaf.array for leaf in self._leaves if leaf.array is not None]
        numbers = itertools.count()
        self._array_numbers = [next(numbers) if leaf.array else -1 for leaf in self._leaves]
        self.layout = Layout(arrays, processes.count())
        self._metadata = _tree_metadata(named, self._leaves)
        self._shardings = sharding_file(
            {
                name: leaf.sharding
                for name, leaf in zip(self._names, self._leaves, strict=True)
                if leaf.sharding is not None
            }
        )
        self._array_metadata = _array_metadata(self._leaves)

    @classmethod
    def of(cls, item: Any) -> tuple[Plan, Sequence[Any]]:
        """The plan of a tree, from the cache where its structure was met before, and the tree's leaves."""
        leaves, structure = jax.tree_util.tree_flatten(item)
        key: Hashable = (structure, *map(signature, leaves), processes.count())
        try:
            with _cache_lock:
                plan = _cache.get(key)
        except (TypeError, ValueError):  # a node with metadata that cannot be hashed or compared
            return cls(item), leaves
        if plan is None:
            plan = cls(item)
            with _cache_lock:
                _cache[key] = plan
                while len(_cache) > _CACHED_PLANS:
                    _cache.popitem(last=False)
        return plan, leaves

    def stage(self, leaves: Sequence[Any], *, copy: bool) -> StagedTree:
        """Takes the bytes of the leaves; after it, the caller may change or donate them."""
        for leaf in leaves:
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.copy_to_host_async()  # transfers from an accelerator overlap; on CPU this does nothing
        chunks: dict[ChunkId, memoryview] = {}
        for name, number, plan, leaf in zip(self._names, self._array_numbers, self._leaves, leaves, strict=True):
            try:
                for chunk, content in host_chunks(plan, leaf, copy=copy):
                    chunks[number, chunk] = content
            except OverflowError as error:
                raise UnsupportedLeafError(
                    f"{name or 'the state'}: {leaf!r} does not fit into 64 bits; save it as a string."
                ) from error
            except RuntimeError as error:
                if "deleted" not in str(error):
                    raise
                raise UnsupportedLeafError(
                    f"{name or 'the state'}: this array has been deleted, probably donated to a jitted step "
                    "(donate_argnums); save the state that the step returned."
                ) from error
        strings = {
            name: leaf for name, plan, leaf in zip(self._names, self._leaves, leaves, strict=True) if plan.array is None
        }
        return StagedTree(self, chunks, strings)

    def small_files(self, process: int) -> dict[str, bytes]:
        """The files that depend on the structure alone."""
        files = {f"{ARRAY_METADATA_FOLDER}/process_{process}": self._array_metadata}
        if process == 0:
            files |= {METADATA_FILE: self._metadata, SHARDING_FILE: self._shardings}
        return files


_cache: collections.OrderedDict[Hashable, Plan] = collections.OrderedDict()
_cache_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class StagedTree:
    """A tree as host bytes, independent of what happens to it from here on."""

    plan: Plan
    chunks: dict[ChunkId, memoryview]
    strings: dict[str, str]

    @property
    def nbytes(self) -> int:
        """The size of this process's data file."""
        return self.plan.layout.data_nbytes[processes.index()]

    def write(self, directory: str) -> None:
        """Writes the files of this process; they are durable only after `commit.sync_tree`."""
        process = processes.index()
        for folder in (ARRAY_METADATA_FOLDER, "d"):
            os.makedirs(os.path.join(directory, folder), exist_ok=True)
        with events.phase("write/data"):
            pieces = self._write_data(directory, process)
        layout = self.plan.layout
        files = self.plan.small_files(process)
        table = checksums.ArrayChecksums({data_file_name(process): (pieces, layout.data_nbytes[process])})
        files[checksums.ARRAY_FILE] = table.encode()
        if process == 0:
            files["manifest.ocdbt"] = ocdbt.encode_manifest(layout.root, os.urandom(16), time.time_ns())
            if self.strings:
                files[STRINGS_FILE] = json.dumps(self.strings).encode()
        for name, content in files.items():
            commit.write_file(os.path.join(directory, name), content)
        events.scalar("write/bytes", layout.data_nbytes[process])

    def _write_data(self, directory: str, process: int) -> checksums.Pieces:
        layout = self.plan.layout
        parts = [(segment.offset, self.chunks[segment.chunk]) for segment in layout.segments[process]]
        if process == 0:
            parts += [(offset, memoryview(node)) for offset, node in layout.index_nodes(self.chunks)]
        path = os.path.join(directory, data_file_name(process))
        return write_data_file(path, parts, layout.data_nbytes[process])


# ------------------------------------------------------------------ Orbax's JSON files


def _tree_metadata(named: Sequence[tree.Leaf], leaves: Sequence[LeafPlan]) -> bytes:
    plans = iter(leaves)
    records = []
    for leaf in named:
        if leaf.is_empty:
            records.append(tree.LeafRecord(leaf.keys, tree.empty_type(leaf.value)))
            continue
        plan = next(plans)
        write_shape = plan.array.chunk_shape if plan.array and plan.value_type == "jax.Array" else None
        records.append(tree.LeafRecord(leaf.keys, plan.value_type, write_shape))
    return json.dumps(
        {
            "tree_metadata": tree.records_to_json(records),
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    ).encode()


def _array_metadata(leaves: Sequence[LeafPlan]) -> bytes:
    entries = []
    for leaf in leaves:
        if leaf.array is None or leaf.value_type != "jax.Array":
            continue
        shape = list(leaf.array.chunk_shape)
        extra = {"random_key_impl": leaf.key_impl} if leaf.key_impl else None
        entries.append(
            {
                "array_metadata": {
                    "param_name": leaf.array.name,
                    "write_shape": shape,
                    "chunk_shape": shape,
                    "ext_metadata": extra,
                }
            }
        )
    return json.dumps({"array_metadatas": entries}).encode()
