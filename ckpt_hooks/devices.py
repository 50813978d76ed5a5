"""Many host arrays onto devices at once.

`jax.device_put` spends about 20 microseconds of Python on each array, several times what reading a small one from the
disk takes. The call that it ends in takes a seventh of that; it is private to JAX, so it is used only after it has
passed a test in this very process, and `jax.device_put` is used where it has not.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks.errors import NoDeviceError

__all__ = ["put_bound", "put_free", "require_a_device", "weakly_typed"]


def require_a_device(error: Exception) -> None:
    """Raises NoDeviceError where `error` came because JAX has no device, which may be a bare AssertionError."""
    try:
        jax.local_devices()
    except Exception:
        config: Any = jax.config
        platforms = config.jax_platforms or ""
        raise NoDeviceError(
            f"arrays are to be restored onto a device, and JAX has none, with JAX_PLATFORMS={platforms!r}: "
            f"{str(error) or 'none could be started'}. Set JAX_PLATFORMS=cpu, or give NumPy arrays in `like`."
        ) from error


def put_free(arrays: Sequence[Any], weak: Sequence[bool] = ()) -> list[jax.Array]:
    """Arrays on the default device, free to be moved by what they are used with; `weak` as in `weakly_typed`."""
    if not arrays:
        return []
    if not _is_fast(arrays, weak):
        return _weakened(jax.device_put(list(arrays)), weak)
    sharding = jax.sharding.SingleDeviceSharding(_default_device())
    return _weakened(_fast_put(arrays, [sharding] * len(arrays), weak, committed=False), weak)


def _default_device() -> jax.Device:
    config: Any = jax.config
    device = config.jax_default_device  # of this thread
    if device is None:
        return jax.local_devices()[0]
    if isinstance(device, jax.Device):
        return device
    (device,) = jax.device_put(0).devices()  # the name of a platform
    return device


def put_bound(
    arrays: Sequence[Any], shardings: Sequence[jax.sharding.Sharding], weak: Sequence[bool] = ()
) -> list[jax.Array]:
    """Arrays with these shardings, bound to their devices; `weak` as in `weakly_typed`."""
    if not arrays:
        return []
    single = set(map(type, shardings)) == {jax.sharding.SingleDeviceSharding}
    if not single or not _is_fast(arrays, weak):
        return _weakened(jax.device_put(list(arrays), list(shardings)), weak)
    return _weakened(_fast_put(arrays, shardings, weak, committed=True), weak)


def _weakened(arrays: Sequence[jax.Array], weak: Sequence[bool]) -> list[jax.Array]:
    if not any(weak):
        return list(arrays)
    return [weakly_typed(array) if is_weak else array for array, is_weak in zip(arrays, weak, strict=True)]


def weakly_typed(array: jax.Array) -> jax.Array:
    """The array where it is, with the type that `jnp.full(shape, 0.5)` has; itself where its dtype has no weak one.

    A weakly typed array promotes differently (w32 * bf16 is bf16), so a run would not go on as it was without. It is
    a copy, where it was not put there with this type.
    """
    if array.weak_type or not _has_weak_type(array.dtype):
        return array
    if array.ndim == 0:  # as most are: quicker
        weak = jnp.asarray(array.item())
        return put_bound([weak], [array.sharding])[0] if array.committed else weak
    if not array.committed:
        free: jax.Array = jax.jit(_weak_copy)(array)
        return free
    sharding = _without_axis_types(array.sharding)
    copied: jax.Array = jax.jit(_weak_copy, out_shardings=sharding)(jax.device_put(array, sharding))
    placed: jax.Array = jax.device_put(copied, array.sharding)
    return placed


def _weak_copy(array: jax.Array) -> jax.Array:
    # Nothing public makes data weak, but a Python number is, and an array that is written into stays as it was made.
    return jnp.full(array.shape, np.zeros((), array.dtype).item()).at[...].set(array)


def _has_weak_type(dtype: Any) -> bool:
    kind = type(np.zeros((), dtype).item())
    return kind in (int, float, complex) and jax.dtypes.canonicalize_dtype(kind) == dtype


def _without_axis_types(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The same places, without the explicit axes for which JAX asks in each operation."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    mesh = jax.sharding.Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _is_fast(arrays: Sequence[Any], weak: Sequence[bool]) -> bool:
    # For a single array, the test takes longer than it saves, but for the copy of a weakly typed one.
    return (len(arrays) > 1 or any(weak) or _fast_put_works.cache_info().currsize > 0) and _fast_put_works()


def _fast_put(
    arrays: Sequence[Any], shardings: Sequence[Any], weak: Sequence[bool] = (), *, committed: bool
) -> list[jax.Array]:
    put, seen, devices = _private_put(), None, []
    placed = []
    for array, sharding, is_weak in zip(arrays, shardings, weak or itertools.repeat(False)):  # noqa: B905  (endless)
        if sharding is not seen:
            seen, devices = sharding, list(sharding.device_set)
        if isinstance(array, np.ndarray):
            aval = _aval(array.shape, array.dtype, is_weak and _has_weak_type(array.dtype))
            placed.append(put(aval, sharding, [array], devices, committed))
        else:  # a PRNG key is on a device already
            placed.append(jax.device_put(array, sharding) if committed else array)
    return placed


@functools.lru_cache(maxsize=4096)
def _aval(shape: tuple[int, ...], dtype: np.dtype, is_weak: bool) -> Any:
    from jax._src import core

    return core.ShapedArray(shape, dtype, weak_type=is_weak)


@functools.cache
def _private_put() -> Any:
    return importlib.import_module("jax._src.lib").xla_client.batched_device_put


@functools.cache
def _fast_put_works() -> bool:
    """Whether the private call makes of an array exactly what `jax.device_put` makes of it."""
    device = jax.local_devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    try:
        for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int32), np.zeros((0, 2), np.bool_)):
            for committed in (False, True):
                (found,) = _fast_put([array], [sharding], committed=committed)
                expected = jax.device_put(array, sharding if committed else None)
                same = (found.shape, found.dtype, found.weak_type, found.committed, found.sharding) == (
                    expected.shape,
                    expected.dtype,
                    expected.weak_type,
                    expected.committed,
                    expected.sharding,
                ) and np.array_equal(np.asarray(found), array)
                if not same:
                    return False
        # Compared without an operation, which would be compiled at every start.
        weak = np.full(3, 0.5, jax.dtypes.canonicalize_dtype(float))
        (found,) = _fast_put([weak], [sharding], [True], committed=False)
        if not found.weak_type or not np.array_equal(np.asarray(found), weak):
            return False
    except Exception:  # a JAX that has changed it
        return False
    return True
