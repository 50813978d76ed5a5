"""What a leaf is: its kind on disk, its array form on the host, and its lines in Orbax's JSON files. No I/O."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks import tree
from ckpt_hooks.errors import UnsupportedLeafError
from ckpt_hooks.processes import ALONE, Writers
from ckpt_hooks.storage.layout import SMALL_CHUNK_BYTES, ArraySpec

__all__ = [
    "DELETED",
    "FUNCTION",
    "LeafPlan",
    "array_metadata_file",
    "describe_leaf",
    "is_on_host",
    "is_prng_key",
    "shard_arrays",
    "sharding_file",
    "sharding_from_json",
    "sharding_to_json",
    "tree_metadata_file",
]

_SCALAR_DTYPES: dict[type, np.dtype] = {
    bool: np.dtype(np.bool_),
    int: np.dtype(np.int64),
    float: np.dtype(np.float64),
    complex: np.dtype(np.complex128),
}
_PACKED = frozenset({"int2", "uint2", "int4", "uint4"})  # in JAX several to a byte, in NumPy one
_ARRAY_CLASSES = (np.ndarray, np.memmap)  # a file that is mapped is only where the numbers are
# The extended types that zarr v2 in tensorstore, and so Orbax, can read.
_EXTENDED_DTYPES = frozenset(
    {
        "bfloat16",
        "float4_e2m1fn",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "int2",
        "int4",
    }
)
DELETED = (
    "this array has been deleted, probably donated to a jitted step (donate_argnums); save the state that the step "
    "returned."
)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How a leaf of a given signature is stored.

    Attributes:
      value_type: Orbax's word for it: jax.Array, np.ndarray, scalar or string; None for what is not stored.
      array: its array on disk; None for a string.
      is_sharded: whether each device holds a different part.
      key_impl: the implementation of a typed PRNG key, whose data is stored as unsigned integers.
      sharding: the entry of Orbax's ``_sharding`` file; None where it has none.
      is_buffer: whether the leaf itself, seen as a buffer, is the bytes of its one chunk.
    """

    value_type: str
    array: ArraySpec | None
    is_sharded: bool = False
    key_impl: str | None = None
    sharding: str | None = None
    is_buffer: bool = False


FUNCTION = LeafPlan("None", None)  # of an Equinox module


def is_prng_key(value: Any) -> bool:
    """Whether an array, or an abstract one, is of typed PRNG keys."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


# ------------------------------------------------------------------ describing


def describe_leaf(name: str, leaf: Any, writers: Writers = ALONE) -> LeafPlan:
    """Raises UnsupportedLeafError, naming the leaf, for what no checkpoint can hold, or not one of these writers."""
    if isinstance(leaf, jax.core.Tracer):
        raise UnsupportedLeafError(
            f"{name or 'the state'}: in a function that JAX traces (jit, grad, scan) there are no values to save; "
            "save what the function returns."
        )
    if isinstance(leaf, jax.Array):
        return _describe_jax_array(name, leaf, writers)
    if isinstance(leaf, np.ma.MaskedArray):
        raise UnsupportedLeafError(
            f"{name or 'the state'}: a masked array would lose its mask; save `.data` and `.mask` as two arrays."
        )
    if isinstance(leaf, np.ndarray) and type(leaf) not in _ARRAY_CLASSES:
        raise UnsupportedLeafError(
            f"{name or 'the state'}: a {_kind(leaf)} would come back as a plain array, without what its class adds; "
            "save `np.asarray(x)`, and what else it has as leaves of their own."
        )
    if isinstance(leaf, str):  # before NumPy's, of which a string is one too
        return LeafPlan("string", None)
    if isinstance(leaf, np.ndarray | np.generic):
        return LeafPlan("np.ndarray", ArraySpec.whole(name, leaf.shape, _storable(name, leaf.dtype)))
    for kind, dtype in _SCALAR_DTYPES.items():
        if isinstance(leaf, kind):
            return LeafPlan("scalar", ArraySpec.whole(name, (), dtype))
    raise UnsupportedLeafError(f"{name or 'the state'}: {_unsupported(leaf)}")


def _unsupported(leaf: Any) -> str:
    kind = _kind(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"{leaf} is abstract and has no values to save; pass the array itself."
    if callable(leaf):
        return (
            f"a function or class ({kind}) cannot be saved. Mark the field as static "
            "(`flax.struct.field(pytree_node=False)`), or leave it out of the state."
        )
    advice = "pass an object with get_state/set_state as a keyword item of its own"
    if isinstance(leaf, Mapping):
        advice = "JAX does not know this mapping as a tree, so pass `dict(state)` in its place"
    return (
        f"a leaf of type {kind} cannot be saved. Leaves are JAX and NumPy arrays, PRNG keys, numbers, "
        f"strings and None; {advice}."
    )


def _kind(leaf: Any) -> str:
    return f"{type(leaf).__module__}.{type(leaf).__qualname__}"


def _storable(name: str, dtype: np.dtype) -> np.dtype:
    plain = dtype.isbuiltin != 2 and dtype.kind in "biufc" and dtype.char not in "gG"
    if plain or dtype.name in _EXTENDED_DTYPES:
        return dtype
    raise UnsupportedLeafError(
        f"{name or 'the state'}: arrays of dtype {dtype} cannot be saved; cast it to a numeric dtype that zarr has."
    )


def _describe_jax_array(name: str, leaf: jax.Array, writers: Writers) -> LeafPlan:
    if leaf.is_deleted():
        raise UnsupportedLeafError(f"{name or 'the state'}: {DELETED}")
    if len(writers.indexes) > 1 and leaf.is_fully_addressable:
        raise UnsupportedLeafError(f"{name or 'the state'}: {_host_local(leaf, writers)}")
    key_impl = str(jax.random.key_impl(leaf)) if is_prng_key(leaf) else None
    data = leaf if key_impl is None else jax.random.key_data(leaf)
    dtype = _storable(name, np.dtype(data.dtype))
    sharding = sharding_to_json(data.sharding)
    if data.is_fully_replicated or 0 in data.shape:
        # One that is on one device is written as it is by the only writer that there is.
        is_buffer = key_impl is None and data.size > 0 and dtype.isbuiltin == 1 and len(data.sharding.device_set) == 1
        array = ArraySpec.whole(name, data.shape, dtype)
        if writers is not ALONE and array.grid:
            array = _owned(array, dict.fromkeys(data.sharding.device_set, array.grid[0]), writers)
        return LeafPlan("jax.Array", array, False, key_impl, sharding, is_buffer and is_on_host(data))
    chunk_shape = data.sharding.shard_shape(data.shape)
    regions: Mapping[Any, Any] = data.sharding.devices_indices_map(data.shape)
    positions = {device: _grid_position(region, chunk_shape) for device, region in regions.items()}
    array = _owned(ArraySpec(name, data.shape, dtype, chunk_shape, (), ()), positions, writers)
    return LeafPlan("jax.Array", array, True, key_impl, sharding)


def _owned(array: ArraySpec, positions: Mapping[Any, tuple[int, ...]], writers: Writers) -> ArraySpec:
    """The array with an owner for each of its chunks, of which `positions` says what each device has.

    Small chunks are the first writer's that has them; large ones are shared out among those that have a replica.
    """
    holders: dict[tuple[int, ...], set[int]] = {}
    for device, position in positions.items():
        ranks = holders.setdefault(position, set())
        rank = writers.ranks.get(device.process_index)
        if rank is not None:
            ranks.add(rank)
    if writers.is_local:
        holders = {position: ranks for position, ranks in holders.items() if ranks}
    elif not all(holders.values()):
        elsewhere = sorted({device.process_index for device in positions} - writers.ranks.keys())
        raise UnsupportedLeafError(
            f"{array.name or 'the state'}: parts of this array are only in processes {elsewhere}, and those that save "
            f"it are {sorted(writers.indexes)} (`active_processes`). Save with all that have a part of it."
        )
    turn = zlib.crc32(array.name.encode()) if array.chunk_nbytes > SMALL_CHUNK_BYTES else 0
    owners = [
        sorted(ranks)[(turn + number) % len(ranks) if turn else 0] for number, ranks in enumerate(holders.values())
    ]
    return dataclasses.replace(array, grid=tuple(holders), owners=tuple(owners))


def _host_local(leaf: jax.Array, writers: Writers) -> str:
    devices = ", ".join(sorted(map(str, leaf.sharding.device_set)))
    return (
        f"this jax.Array is on {devices} alone, devices of one process, and {len(writers.indexes)} processes save one "
        "state: each may have another value here. Make it global: jax.device_put(x, NamedSharding(mesh, "
        "PartitionSpec())) where all have the same value, or jax.make_array_from_process_local_data(sharding, x) where "
        "each has a part. What belongs to one process alone goes into a keyword item with get_state and set_state."
    )


def _grid_position(region: tuple[slice, ...], chunk_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((part.start or 0) // size for part, size in zip(region, chunk_shape, strict=True))


# ------------------------------------------------------------------ host bytes


def shard_arrays(plan: LeafPlan, leaf: jax.Array, process: int) -> list[jax.Array]:
    """The single-device arrays of the chunks that a process owns, in the order of the grid."""
    assert plan.array is not None
    shards: dict[tuple[int, ...], jax.Array] = {}
    for shard in leaf.addressable_shards:
        shards.setdefault(_grid_position(shard.index, plan.array.chunk_shape), shard.data)
    places = zip(plan.array.grid, plan.array.owners, strict=True)
    return [shards[position] for position, owner in places if owner == process]


def is_on_host(array: jax.Array) -> bool:
    """Whether NumPy can see the memory of an array without a copy, which one of half bytes needs anywhere."""
    devices: Any = array.sharding.device_set
    return array.dtype.name not in _PACKED and all(device.platform == "cpu" for device in devices)


# ------------------------------------------------------------------ Orbax's JSON files


def sharding_to_json(sharding: jax.sharding.Sharding) -> str | None:
    """One entry of ``_sharding``; None for the kinds that Orbax leaves out."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (device,) = sharding.device_set
        return json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(device)})
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    mesh = sharding.mesh
    devices = np.vectorize(lambda device: {"id": device.id}, otypes=[object])(mesh.devices)
    return json.dumps(
        {
            "sharding_type": "NamedSharding",
            "shape": list(mesh.devices.shape),
            "axis_names": list(mesh.axis_names),
            "axis_types": [f"AxisType.{axis.name}" for axis in mesh.axis_types],
            "partition_spec": [list(part) if isinstance(part, tuple) else part for part in sharding.spec],
            "device_mesh": {"mesh": devices.tolist()},
        }
    )


def sharding_from_json(text: str, ndim: int) -> jax.sharding.NamedSharding | None:
    """The opposite, for an array with so many axes; None for what was on one device, and for what is not understood.

    Raises LookupError where the devices are not here.
    """
    try:
        fields = json.loads(text)
        if fields["sharding_type"] != "NamedSharding":
            return None
        ids = np.vectorize(lambda device: device["id"], otypes=[int])(np.array(fields["device_mesh"]["mesh"], object))
        parts = [tuple(part) if isinstance(part, list) else part for part in fields["partition_spec"]]
        axis_names = tuple(fields["axis_names"])
        kinds = fields.get("axis_types") or ["AxisType.Auto"] * len(axis_names)
        axis_types = tuple(jax.sharding.AxisType[kind.rpartition(".")[2]] for kind in kinds)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    while len(parts) > ndim and parts[-1] is None:
        parts.pop()  # that of the numbers of PRNG keys, which have axes more
    here = {device.id: device for device in jax.devices()}
    missing = sorted(set(ids.flat) - here.keys())
    if missing or len(parts) > ndim:
        raise LookupError(f"devices {missing} are not here")
    devices = np.vectorize(here.__getitem__, otypes=[object])(ids)
    mesh = jax.sharding.Mesh(devices, axis_names, axis_types=axis_types)
    spec = jax.sharding.PartitionSpec(*parts)  # type: ignore[no-untyped-call]
    return jax.sharding.NamedSharding(mesh, spec, memory_kind=fields.get("memory_kind") or None)


def sharding_file(names: Sequence[str], leaves: Sequence[LeafPlan]) -> bytes:
    """The file ``_sharding``: {URL-safe base64 of the name: JSON text}."""
    entries = {
        base64.urlsafe_b64encode(name.encode()).decode(): leaf.sharding
        for name, leaf in zip(names, leaves, strict=True)
        if leaf.sharding is not None
    }
    return _to_json(entries)


def tree_metadata_file(named: Sequence[tree.Leaf], leaves: Sequence[LeafPlan], custom_metadata: Any = None) -> bytes:
    """The file ``_METADATA``; `leaves` are the plans of those in `named` that are not empty nodes."""
    plans = iter(leaves)
    records = []
    for leaf in named:
        if leaf.is_empty:
            records.append(tree.record_to_json(leaf.keys, tree.empty_type(leaf.value)))
            continue
        plan = next(plans)
        write_shape = plan.array.chunk_shape if plan.array and plan.value_type == "jax.Array" else None
        records.append(tree.record_to_json(leaf.keys, plan.value_type, write_shape))
    content = {
        "tree_metadata": dict(records),
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": custom_metadata,
    }
    return _to_json(content)


def array_metadata_file(leaves: Sequence[LeafPlan]) -> bytes:
    """The file ``array_metadatas/process_0``: chunk shapes, and the kinds of PRNG keys."""
    entries = []
    for leaf in leaves:
        if leaf.array is None or leaf.value_type != "jax.Array":
            continue
        shape = list(leaf.array.chunk_shape)
        entry = {
            "param_name": leaf.array.name,
            "write_shape": shape,
            "chunk_shape": shape,
            "ext_metadata": {"random_key_impl": leaf.key_impl} if leaf.key_impl else None,
        }
        entries.append({"array_metadata": entry})
    return _to_json({"array_metadatas": entries})


def _to_json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()  # with many leaves, a tenth of these files is spaces
