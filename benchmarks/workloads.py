"""The states that are saved: float32 noise of known shapes, the same in every run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["WORKLOADS", "State", "Workload", "abstract", "describe", "noise", "num_bytes"]

State = dict[str, Any]  # nested dicts of float32 arrays
Shapes = dict[str, Any]  # the same with the shapes

_KIB, _MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True)
class Workload:
    """A state that can be made anew; `shapes(scale)` has about `scale` times the bytes."""

    name: str
    shapes: Callable[[float], Shapes]

    def make(self, scale: float) -> State:
        """The state, as JAX arrays on the default device."""
        return noise(self.shapes(scale))

    def abstract(self, scale: float) -> State:
        """What a restore of it is told, without making it."""
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        tell = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32, sharding=sharding)
        like: State = jax.tree.map(tell, self.shapes(scale), is_leaf=_is_shape)
        return like


def noise(shapes: Shapes) -> State:
    """Normal noise: no compressor gains much on it, as on trained weights."""
    generator = np.random.default_rng(0)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        return jax.device_put(generator.standard_normal(shape, np.float32))

    state: State = jax.block_until_ready(jax.tree.map(leaf, shapes, is_leaf=_is_shape))
    return state


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)


def abstract(state: State) -> State:
    """What a restore is told: shapes, dtypes and shardings."""
    like: State = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return like


# ------------------------------------------------------------------ shapes


def _tiny(scale: float) -> Shapes:
    del scale
    return {"dense": {"kernel": (64, 64), "bias": (64,)}, "scale": (1,)}


def _many(scale: float) -> Shapes:
    return {f"leaf_{number:04}": (16 * _KIB // 4,) for number in range(math.ceil(3000 * scale))}


def _moe(scale: float) -> Shapes:
    layers = math.ceil(50 * scale)
    experts = math.ceil(400 * min(1, 50 * scale))
    return {f"layer_{layer}": {f"expert_{expert}": (32, 32) for expert in range(experts)} for layer in range(layers)}


def _gpt2(scale: float) -> Shapes:
    """GPT-2 small (without the last norm) and Adam's two moments: 438 leaves."""
    width = max(8, round(768 * scale**0.5))
    block = {
        "norm_1": {"scale": (width,), "bias": (width,)},
        "attention": {"kernel": (width, 3 * width), "bias": (3 * width,)},
        "projection": {"kernel": (width, width), "bias": (width,)},
        "norm_2": {"scale": (width,), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
    }
    embeddings = {"tokens": (math.ceil(50257 * scale**0.5), width), "positions": (1024, width)}
    params = {**embeddings, **{f"block_{number}": block for number in range(12)}}
    return {"params": params, "opt_state": {"mu": params, "nu": params}}


def _big(scale: float) -> Shapes:
    return {f"shard_{number:02}": (math.ceil(64 * _MIB // 4 * scale),) for number in range(16)}


WORKLOADS = {
    name: Workload(name, shapes)
    for name, shapes in {"tiny": _tiny, "many": _many, "moe": _moe, "gpt2": _gpt2, "big": _big}.items()
}


def describe(state: State) -> str:
    """Its leaves and bytes.

    >>> describe({"w": np.zeros(250_000, np.float32)})
    '1 leaves, 1.0 MB'
    """
    return f"{len(jax.tree.leaves(state)):,} leaves, {num_bytes(state) / 1e6:,.1f} MB"


def num_bytes(state: State) -> int:
    """Those of all its leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
