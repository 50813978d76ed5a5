"""Arrays that are spread over devices: which regions of them this process needs, and how they become one array again.

Every process asks only for the regions of its own devices, reads each once, also where several devices have the same,
and puts each where it belongs. No process ever holds all of such an array, and none of JAX's collectives is needed.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ckpt_hooks.devices import put_bound
from ckpt_hooks.leaves import is_prng_key, sharding_from_json
from ckpt_hooks.storage.regions import Region, whole

__all__ = ["Parts", "Spread", "are_undecided", "on_devices", "put_parts", "spreads_of", "with_shardings"]

_ELSEWHERE = object()
_ON_ONE_DEVICE = {type(None), jax.sharding.SingleDeviceSharding}
_log = logging.getLogger(__name__)


class Spread(NamedTuple):
    """Which region of an array each device of this process has.

    Attributes:
      sharding: of the array.
      regions: those that this process needs, each once.
      devices: (a device, the number of its region).
    """

    sharding: jax.sharding.Sharding
    regions: tuple[Region, ...]
    devices: tuple[tuple[jax.Device, int], ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    """An array on its way to its devices.

    Attributes:
      shape, dtype: of the whole array.
      arrays: the regions of `spread`.
      key_impl: the implementation of typed PRNG keys, which these are the data of.
    """

    spread: Spread
    shape: tuple[int, ...]
    dtype: Any
    arrays: Sequence[np.ndarray]
    key_impl: str | None = None


def spreads_of(targets: Mapping[str, Any], shapes: Callable[[str], tuple[int, ...]]) -> dict[str, Spread]:
    """How the leaves are spread whose targets are; without those that go to one device, or nowhere in particular.

    `shapes` says of a leaf, by its name, which shape it has on disk.
    """
    shardings = {name: getattr(like, "sharding", None) for name, like in targets.items()}
    if set(map(type, shardings.values())) <= _ON_ONE_DEVICE:
        return {}
    return {
        name: spread
        for name, sharding in shardings.items()
        if type(sharding) not in _ON_ONE_DEVICE and (spread := _spread_of(sharding, shapes(name), targets[name]))
    }


def _spread_of(sharding: Any, shape: tuple[int, ...], like: Any) -> Spread | None:
    if not is_prng_key(like):
        return _spread(sharding, shape)
    keys = _spread(sharding, like.shape)  # what is on disk are numbers, with axes more
    rest = whole(shape[like.ndim :])
    return keys and keys._replace(regions=tuple([region + rest for region in keys.regions]))


@functools.lru_cache(maxsize=4096)
def _spread(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Spread | None:
    numbers: dict[Region, int] = {}
    devices = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if index is None or not all(isinstance(cut, slice) for cut in index):
            return None  # a sharding of another kind, which JAX itself takes apart
        region = tuple([cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True)])
        devices.append((device, numbers.setdefault(region, len(numbers))))
    return Spread(sharding, tuple(numbers), tuple(devices))


def put_parts(parts: Sequence[Parts]) -> list[jax.Array]:
    """The arrays, each spread over its devices; all parts are put in one go."""
    if not parts:
        return []
    arrays = [part.arrays[number] for part in parts for _, number in part.spread.devices]
    shardings = [
        _on_device(device, part.spread.sharding.memory_kind) for part in parts for device, _ in part.spread.devices
    ]
    placed = iter(put_bound(arrays, shardings))
    return [_joined(part, [next(placed) for _ in part.spread.devices]) for part in parts]


@functools.lru_cache(maxsize=4096)
def _on_device(device: jax.Device, memory_kind: str | None) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)


def _joined(parts: Parts, arrays: list[jax.Array]) -> jax.Array:
    sharding = parts.spread.sharding
    if parts.key_impl is not None:
        keys = [jax.random.wrap_key_data(array, impl=parts.key_impl) for array in arrays]
        return jax.make_array_from_single_device_arrays(parts.shape, sharding, keys, dtype=parts.dtype)
    return jax.make_array_from_single_device_arrays(parts.shape, sharding, arrays, dtype=parts.dtype)


# ------------------------------------------------------------------ abstract arrays that name no devices


def are_undecided(likes: Collection[Any]) -> bool:
    """Whether there is an abstract array that says nothing of devices."""
    shardings = [like.sharding for like in likes if type(like) is jax.ShapeDtypeStruct]
    distinct = {id(sharding): sharding for sharding in shardings}  # thousands of leaves share a few
    return any(map(_names_no_devices, distinct.values()))


def _names_no_devices(sharding: Any) -> bool:
    return sharding is None or isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)


def on_devices(sharding: Any) -> Any:
    """The sharding; on the mesh that `jax.set_mesh` has set, where it is on one of that shape which has no devices.

    Abstract evaluation says so of arrays on explicit axes, as `jax.make_mesh` makes them.
    """
    if sharding is None or not _names_no_devices(sharding):
        return sharding
    get_mesh = getattr(jax.sharding, "get_mesh", None)  # not in JAX 0.7
    mesh = get_mesh and get_mesh()
    if not mesh or mesh.shape != sharding.mesh.shape:
        return sharding
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def with_shardings(item: str, targets: Mapping[str, Any], encoded: Mapping[str, str]) -> dict[str, Any]:
    """`targets`, with devices where an abstract array names none: those of `jax.set_mesh`, or as it was saved.

    Where those devices are not here, it stays as it is, and goes to one device.

    Args:
      item: for the log.
      targets: {saved name: leaf of `like`}.
      encoded: the content of the file ``_sharding``.
    """
    found, num_elsewhere = dict(targets), 0
    for name, target in targets.items():
        if type(target) is jax.ShapeDtypeStruct and (sharding := on_devices(target.sharding)) is not target.sharding:
            found[name] = target.update(sharding=sharding)  # type: ignore[no-untyped-call]
    for key, text in encoded.items():
        name = base64.urlsafe_b64decode(key).decode()
        like: Any = targets.get(name)
        if type(like) is not jax.ShapeDtypeStruct or like.sharding is not None:
            continue
        sharding = _saved_sharding(text, like.ndim)
        if sharding is _ELSEWHERE:
            num_elsewhere += 1
        elif sharding is not None:
            found[name] = like.update(sharding=sharding)  # type: ignore[no-untyped-call]
    if num_elsewhere:
        _log.warning(
            "%s: %d arrays were saved on devices that are not here, and `like` gives them no shardings: they go to "
            "one device",
            item,
            num_elsewhere,
        )
    return found


@functools.lru_cache(maxsize=4096)
def _saved_sharding(text: str, ndim: int) -> Any:
    try:
        return sharding_from_json(text, ndim)
    except LookupError:
        return _ELSEWHERE
