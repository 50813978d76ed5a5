"""Small states, each leaf of which tells the step that it belongs to.

`state_of` is a fixed function of the step, so whatever is restored can be compared, bit by bit, with what the step
that it claims to be was. NumPy alone is loaded: no accelerator backend, so that a process starts and forks fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["Position", "KINDS", "State", "differences", "leaves_of", "same", "state_of", "step_of"]

State = dict[str, Any]
Array = npt.NDArray[Any]
_Make = Callable[..., Array]  # of (dtype, *shape), once for each leaf

_GOLDEN = 2654435769  # 2**32 / the golden ratio: neighbours get unlike bits


def state_of(step: int, kind: str = "tiny") -> State:
    """The state of a step, of one of `KINDS`; always has a leaf ``step``.

    >>> state_of(7)["step"], state_of(7)["params"]["w"].shape
    (array(7), (4, 8))
    """
    count = 0

    def make(dtype: Any, *shape: int) -> Array:
        nonlocal count
        count += 1
        return _bits(step, count, np.dtype(dtype), shape)

    return {**_MAKERS[kind](make), "step": np.array(step)}


def differences(restored: Any, step: int, kind: str = "tiny") -> list[str]:
    """How a restored state differs from that of a step: each leaf with other bits, dtype or shape, by path.

    >>> differences(state_of(7), 7), differences(state_of(8), 7)
    ([], ['params/b: other values', 'params/w: other values', 'step: other values'])
    """
    return same(restored, state_of(step, kind))


def same(restored: Any, expected: Any) -> list[str]:
    """The leaves in which two nested states differ, each with what is wrong; [] where they are equal to the bit."""
    found, wanted = leaves_of(restored), leaves_of(expected)
    problems = [f"{path}: {_difference(found.get(path), wanted.get(path))}" for path in sorted(found | wanted)]
    return [problem for problem in problems if not problem.endswith(": ")]


def step_of(restored: Any) -> int | None:
    """The step that a restored state says it is of, None where it does not say."""
    try:
        return int(np.asarray(restored["step"]))
    except (KeyError, TypeError, ValueError):
        return None


def leaves_of(tree: Any) -> dict[str, Array]:
    """{path: leaf} of nested mappings and sequences, every leaf as an array."""
    return dict(_walk(tree, ""))


def _walk(tree: Any, path: str) -> Iterator[tuple[str, Array]]:
    if isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _walk(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, np.asarray(tree)


def _difference(found: Array | None, wanted: Array | None) -> str:
    if found is None or wanted is None:
        return "missing" if found is None else "unexpected"
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{found.dtype}{found.shape} instead of {wanted.dtype}{wanted.shape}"
    return "" if found.tobytes() == wanted.tobytes() else "other values"


# ------------------------------------------------------------------ kinds


def _tiny(make: _Make) -> State:
    return {"params": {"w": make("f4", 4, 8), "b": make("f4", 8)}}


def _mixed(make: _Make) -> State:
    """Every shape and width that is written in a way of its own: 0-d, odd sizes, Fortran order, nested lists."""
    return {
        "params": {
            "layers": [{"kernel": make("f4", 5, 3), "bias": make(ml_dtypes.bfloat16, 3)} for _ in range(3)],
            "fortran": np.asfortranarray(make("f8", 4, 6)),
            "mask": make(bool, 7),
        },
        "opt_state": {"mu": make("f2", 9), "count": make("i8"), "phase": make("c8", 2, 2)},
        "rng": make("u4", 2),
        "bytes": make("u1", 4097),
    }


def _many(make: _Make) -> State:
    return {"params": {f"layer_{n:03d}": {"w": make("f4", 6, n % 5 + 1), "b": make("f4", 6)} for n in range(60)}}


def _large(make: _Make) -> State:
    """More than 16 MiB in one item, so that several threads write one file."""
    return {"params": {"table": make("f4", 5 << 20), "tail": make("f4", 1023)}, "opt_state": {"mu": make("f4", 1023)}}


_MAKERS: dict[str, Callable[[_Make], State]] = {"tiny": _tiny, "mixed": _mixed, "many": _many, "large": _large}
KINDS = tuple(_MAKERS)


def _bits(step: int, leaf: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Bits that depend on the step, the leaf and the place in it; NaNs of every kind are among the floats."""
    nbytes = math.prod(shape) * dtype.itemsize
    words = _ramp(nbytes // 4 + 1) + np.uint32((step * 1_000_003 + leaf * 7919) * _GOLDEN % 2**32)
    words ^= words >> np.uint32(15)
    raw = words.view("u1")[:nbytes]
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


@functools.lru_cache(maxsize=8)
def _ramp(length: int) -> npt.NDArray[np.uint32]:
    return np.arange(length, dtype=np.uint32) * np.uint32(_GOLDEN)


class Position:
    """An iterator item: it stands where the value says."""

    def __init__(self, value: int) -> None:
        self.value = value

    def get_state(self) -> dict[str, int]:
        return {"position": self.value}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.value = state["position"]
