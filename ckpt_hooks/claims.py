"""What every process of a save has to have alike, as lines that a person can read.

The barrier before anything is written compares them, and an error names the lines in which a process differs.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_hooks.leaves import LeafPlan
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.storage.checksums import digest
from ckpt_hooks.storage.memory import host_bytes

__all__ = ["save_claim", "structure_claim", "value_claim"]

_MOST_LINES = 32  # what is more than this stands in one line, as a digest
_LONGEST_VALUE = 40  # characters


def save_claim(
    path: str, items: str, recorded: Mapping[str, Any], options: MultiprocessingOptions, *, goes_on: bool
) -> str:
    """Of a whole save: which checkpoint, what its items claim, the metadata, and its barriers; metrics may differ."""
    place = os.path.basename(path) if options.primary_host is None else path
    metadata = dict(recorded["custom_metadata"])
    if metadata.get("metrics") == recorded["metrics"]:
        del metadata["metrics"]
    custom = f"custom_metadata {_short(json.dumps(metadata, sort_keys=True))}"
    return "\n".join([place, *items.splitlines(), custom, f"async_save={goes_on}"])


def structure_claim(names: Sequence[str], leaves: Sequence[LeafPlan], types: Any, *, shared: bool) -> str:
    """Of a tree: names, dtypes and shapes of its leaves, its types, and for shared storage meshes and shardings."""
    kinds = [f"{_quoted(name)} of {_kind(leaf)}" for name, leaf in zip(names, leaves, strict=True)]
    summary = f"{len(leaves)} leaves of structure {_digest([*kinds, json.dumps(types)])}"
    lines = [summary, *(kinds if len(kinds) <= _MOST_LINES else ())]
    if shared:
        lines += _mesh_lines(leaf.sharding for leaf in leaves)
        lines.append(f"shardings {_digest([str((leaf.sharding, leaf.array)) for leaf in leaves])}")
    return "\n".join(lines)


def value_claim(names: Sequence[str], leaves: Sequence[LeafPlan], values: Sequence[Any]) -> str:
    """Of the leaves that are no JAX arrays: each process has its own, and one of them is written for all."""
    on_host = [
        f"{_quoted(name)} = {_value(leaf, value)}"
        for name, leaf, value in zip(names, leaves, values, strict=True)
        if leaf.value_type in ("np.ndarray", "scalar", "string")
    ]
    if len(on_host) <= _MOST_LINES:
        return "\n".join(on_host)
    return f"{len(on_host)} NumPy arrays, numbers and strings with digest {_digest(on_host)}"


def _value(leaf: LeafPlan, value: Any) -> str:
    if leaf.value_type != "np.ndarray":
        return _short(repr(value))
    return f"NumPy array with digest {digest(host_bytes(np.asarray(value)).data):016x}"


def _kind(leaf: LeafPlan) -> str:
    if leaf.array is None:
        return leaf.value_type
    key = f" PRNG key {leaf.key_impl}" if leaf.key_impl else ""
    return f"{leaf.value_type} {leaf.array.dtype}{list(leaf.array.shape)}{key}"


def _mesh_lines(shardings: Iterable[str | None]) -> list[str]:
    counts: collections.Counter[str] = collections.Counter()
    for text, number in collections.Counter(shardings).items():
        fields = json.loads(text) if text else {}
        if "device_mesh" in fields:
            axes = ", ".join(f"{name}={size}" for name, size in zip(fields["axis_names"], fields["shape"], strict=True))
            ids = json.dumps(fields["device_mesh"]["mesh"]).replace('{"id": ', "").replace("}", "")
            counts[f"mesh({axes}) of devices {_short(ids)}"] += number
    return [f"{number} leaves on {mesh}" for mesh, number in sorted(counts.items())]


def _quoted(name: str) -> str:
    return repr(name) if name else "the state"


def _short(text: str) -> str:
    """A text that differs where the whole one does."""
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... (digest {digest(text.encode()):016x})"


def _digest(lines: Iterable[str]) -> str:
    return f"{digest(chr(10).join(lines).encode()):016x}"
