"""What a leaf is: its kind on disk, its array form, and the host bytes that this process owns. Pure of I/O."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ckpt_hooks.errors import UnsupportedLeafError
from ckpt_hooks.storage.layout import ArraySpec

__all__ = ["LeafPlan", "describe_leaf", "host_chunks", "is_prng_key", "sharding_to_json", "signature"]

_SCALAR_DTYPES: dict[type, np.dtype] = {
    bool: np.dtype(np.bool_),
    int: np.dtype(np.int64),
    float: np.dtype(np.float64),
    complex: np.dtype(np.complex128),
}
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


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How a leaf of a given signature is stored.

    Attributes:
      value_type: Orbax's word for it: jax.Array, np.ndarray, scalar or string.
      array: its array on disk; None for a string.
      is_sharded: whether each device holds a different part.
      key_impl: the implementation of a typed PRNG key, whose data is stored as unsigned integers.
      sharding: the entry of Orbax's ``_sharding`` file; None where it has none.
    """

    value_type: str
    array: ArraySpec | None
    is_sharded: bool = False
    key_impl: str | None = None
    sharding: str | None = None


def is_prng_key(value: Any) -> bool:
    """Whether an array, or an abstract one, is of typed PRNG keys."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def signature(leaf: Any) -> Hashable:
    """What a leaf's plan depends on: all but its values."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), leaf.shape, leaf.dtype
    return (type(leaf),)


# ------------------------------------------------------------------ describing


def describe_leaf(name: str, leaf: Any) -> LeafPlan:
    """Raises UnsupportedLeafError, naming the leaf, for what no checkpoint can hold."""
    if isinstance(leaf, jax.Array):
        return _describe_jax_array(name, leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return LeafPlan("np.ndarray", ArraySpec.whole(name, leaf.shape, _storable(name, leaf.dtype)))
    if isinstance(leaf, str):
        return LeafPlan("string", None)
    for kind, dtype in _SCALAR_DTYPES.items():
        if isinstance(leaf, kind):
            return LeafPlan("scalar", ArraySpec.whole(name, (), dtype))
    raise UnsupportedLeafError(f"{name or 'the state'}: {_unsupported(leaf)}")


def _unsupported(leaf: Any) -> str:
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"{leaf} is abstract and has no values to save; pass the array itself."
    if callable(leaf):
        return (
            f"a function or class ({kind}) cannot be saved. Mark the field as static "
            "(`flax.struct.field(pytree_node=False)`), or leave it out of the state."
        )
    return (
        f"a leaf of type {kind} cannot be saved. Leaves are JAX and NumPy arrays, PRNG keys, numbers, "
        "strings and None; pass an object with get_state/set_state as a keyword item of its own."
    )


def _storable(name: str, dtype: np.dtype) -> np.dtype:
    plain = dtype.isbuiltin != 2 and dtype.kind in "biufc" and dtype.char not in "gG"
    if plain or dtype.name in _EXTENDED_DTYPES:
        return dtype
    raise UnsupportedLeafError(
        f"{name or 'the state'}: arrays of dtype {dtype} cannot be saved; cast it to a numeric dtype that zarr has."
    )


def _describe_jax_array(name: str, leaf: jax.Array) -> LeafPlan:
    if leaf.is_deleted():
        raise UnsupportedLeafError(
            f"{name or 'the state'}: this array has been deleted, probably donated to a jitted step "
            "(donate_argnums); save the state that the step returned."
        )
    key_impl = str(jax.random.key_impl(leaf)) if is_prng_key(leaf) else None
    data = leaf if key_impl is None else jax.random.key_data(leaf)
    dtype = _storable(name, np.dtype(data.dtype))
    sharding = sharding_to_json(data.sharding)
    if data.is_fully_replicated or 0 in data.shape:
        return LeafPlan("jax.Array", ArraySpec.whole(name, data.shape, dtype), False, key_impl, sharding)
    chunk_shape = data.sharding.shard_shape(data.shape)
    owners: dict[tuple[int, ...], int] = {}
    regions: Mapping[Any, Any] = data.sharding.devices_indices_map(data.shape)
    for device, region in regions.items():
        owners.setdefault(_grid_position(region, chunk_shape), device.process_index)
    spec = ArraySpec(name, data.shape, dtype, chunk_shape, tuple(owners), tuple(owners.values()))
    return LeafPlan("jax.Array", spec, True, key_impl, sharding)


def _grid_position(region: tuple[slice, ...], chunk_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((part.start or 0) // size for part, size in zip(region, chunk_shape, strict=True))


# ------------------------------------------------------------------ host bytes


def host_chunks(plan: LeafPlan, leaf: Any, *, copy: bool) -> Iterator[tuple[int, memoryview]]:
    """(number of the chunk, its bytes) of the chunks that this process owns.

    JAX arrays are immutable, so a view of a CPU array is as good as a copy: JAX keeps the buffer of an array
    that is donated or deleted as long as a view of it lives. NumPy arrays may change under a background
    writer, so `copy` takes one.
    """
    if plan.array is None or not plan.array.grid:
        return
    if not isinstance(leaf, jax.Array):
        array = np.array(leaf, plan.array.dtype, order="C", copy=copy or None)
        yield 0, _as_bytes(array)
        return
    data = leaf if plan.key_impl is None else jax.random.key_data(leaf)
    if not plan.is_sharded:
        yield 0, _as_bytes(np.asarray(data))
        return
    numbers = {position: number for number, position in enumerate(plan.array.grid)}
    for shard in data.addressable_shards:
        if shard.replica_id == 0:
            position = _grid_position(shard.index, plan.array.chunk_shape)
            yield numbers[position], _as_bytes(np.asarray(shard.data))


def _as_bytes(array: npt.NDArray[Any]) -> memoryview:
    # The extended dtypes have no buffer protocol; their bytes do.
    return array.reshape(-1).view(np.uint8).data


# ------------------------------------------------------------------ Orbax's _sharding file


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


def sharding_file(shardings: dict[str, str]) -> bytes:
    """The file ``_sharding``: {URL-safe base64 of the name: JSON text}."""
    return json.dumps(
        {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in shardings.items()}
    ).encode()
