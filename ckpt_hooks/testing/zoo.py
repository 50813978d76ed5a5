"""A zoo of nasty states: what a checkpoint has to bring back to the last bit, and what it has to refuse by name.

For the tests of a loop, a handler or a storage of your own::

    @pytest.mark.parametrize("name", zoo.names())
    def test_my_loop_resumes(name, tmp_path):
        state = zoo.make(name)
        with CheckpointManager(tmp_path) as manager:
            manager.save(1, state)
            testing.assert_same(state, manager.restore(zoo.blank(state)))

Every call of `make` builds the state anew, always with the same bits. Flax and Optax are imported only by the
members that are made of them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks.testing.zoo_states import FLAX, OPTAX, PLAIN, Moments, Nothing, Opaque, Registered

__all__ = [
    "Moments",
    "Nothing",
    "Opaque",
    "Registered",
    "blank",
    "make",
    "make_refused",
    "names",
    "refused_names",
    "states",
]

# ------------------------------------------------------------------ what cannot be saved


def _deleted() -> jax.Array:
    array = jnp.arange(3.0)
    array.delete()
    return array


# {name: (a leaf that no checkpoint holds)}; it stands at params.layer.bad
_BAD_LEAVES: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
    {
        "object array": lambda: np.array([object(), None]),
        "structured array": lambda: np.zeros(2, [("x", "f4"), ("y", "i4")]),
        "datetime array": lambda: np.array(["2020-01-01"], "datetime64[D]"),
        "masked array": lambda: np.ma.array([1, 2], mask=[False, True]),
        "matrix": lambda: np.ones((1, 2)).view(np.matrix),
        "record array": lambda: np.arange(3).view(np.recarray),
        "array of strings": lambda: np.array(["text"]),
        "long double": lambda: np.zeros(2, np.longdouble),
        "bytes": lambda: b"bytes",
        "set": lambda: {1, 2},
        "function": lambda: len,
        "abstract array": lambda: jax.ShapeDtypeStruct((2,), jnp.float32),  # type: ignore[no-untyped-call]
        "deleted array": _deleted,
        "opaque object": object,
        "integer beyond 64 bits": lambda: 2**63,
    }
)
_COLLISIONS: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
    {
        "dotted key": lambda: {"layer": {"bad": 1.0}, "layer.bad": 2.0},
        "int and its text": lambda: {"layer": [{"bad": 1.0}, 2.0], "layer.0.bad": 3.0},
    }
)


# ------------------------------------------------------------------ the zoo


def names(*, flax: bool = False, optax: bool = False) -> list[str]:
    """The names of the states; those made of Flax (which needs Optax too) or Optax where asked for."""
    return [*PLAIN, *(FLAX if flax else ()), *(OPTAX if optax else ())]


def make(name: str) -> Any:
    """The state of that name, built anew. Raises KeyError for a name that is not in the zoo.

    >>> make("named tuple").mean
    {'w': array([0., 1., 2.])}
    """
    return {**PLAIN, **FLAX, **OPTAX}[name]()


def refused_names() -> list[str]:
    """The names of the states that no checkpoint can hold."""
    return [*_BAD_LEAVES, *_COLLISIONS]


def make_refused(name: str) -> tuple[Any, str]:
    """(a state that cannot be saved, the name of the leaf that is to blame, inside the item ``params``).

    The bad leaf stands between good ones, so that who saves as it goes has written before it is found.
    """
    if name in _COLLISIONS:
        bad = "layer.0.bad" if name == "int and its text" else "layer.bad"
        return {"a": np.arange(3.0), "params": _COLLISIONS[name](), "step": 1}, bad
    layer = {"a": np.arange(3.0), "bad": _BAD_LEAVES[name](), "z": np.arange(4.0)}
    return {"a": np.arange(3.0), "params": {"layer": layer}, "step": 1}, "layer.bad"


def blank(state: Any) -> Any:
    """A state like `state` with other values: zeros, empty strings, other keys. What to restore into.

    >>> blank({"w": np.arange(3.0), "step": 7, "name": "digits"})
    {'name': '', 'step': 0, 'w': array([0., 0., 0.])}
    """
    if isinstance(state, Opaque):
        return Opaque(blank(state.params), 0)
    return jax.tree.map(_blank_leaf, state)


def _blank_leaf(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jnp.zeros_like(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(leaf)))
        if leaf.weak_type:
            return jnp.full(leaf.shape, np.zeros((), leaf.dtype).item())
        return jnp.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        zeros = np.zeros(leaf.shape, leaf.dtype)
        return zeros if isinstance(leaf, np.ndarray) else zeros[()]
    return type(leaf)()


def states(**options: Any) -> Any:
    """A Hypothesis strategy for states, nested at random; needs Hypothesis. Options as in `zoo_strategies.states`."""
    from ckpt_hooks.testing import zoo_strategies

    return zoo_strategies.states(**options)
