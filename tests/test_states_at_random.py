"""States nested at random of every kind that users bring: the same after every way in and out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_hooks import CheckpointHook, CheckpointManager
from ckpt_hooks.testing import assert_same, zoo
from ckpt_hooks.tree import flatten
from tests.sameness import bits


@functools.cache
def brought_by_users() -> list[Any]:
    """Sub-trees of Optax, Flax and NNX."""
    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4, jnp.bfloat16)}}
    labels = {"dense": {"kernel": "fast", "bias": "slow"}}
    optimizers: list[Any] = [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        optax.masked(optax.sgd(0.1, momentum=0.9), {"dense": {"kernel": True, "bias": False}}),
        optax.multi_transform({"fast": optax.adam(0.1), "slow": optax.sgd(0.1)}, labels),
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1.0, 0.0, 9)),
        optax.MultiSteps(optax.adam(0.1), 3),
        optax.apply_if_finite(optax.sgd(0.1), 5),
        optax.contrib.schedule_free_adamw(0.1),
    ]
    trees: list[Any] = [optimizer.init(params) for optimizer in optimizers]
    trees.append(freeze({"params": params, "none": {}}))
    trees.append(TrainState.create(apply_fn=len, params=params, tx=optimizers[0]))
    trees.append(eqx.nn.GRUCell(2, 3, key=jax.random.key(0)))
    trees.append({"weak": jnp.full((2, 3), 0.5), "strong": jnp.full((2, 3), 0.5, jnp.float32)})
    trees.append(nnx.to_pure_dict(nnx.state(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Rngs(1)]))))
    return trees


def states() -> Any:
    return zoo.states(others=[st.deferred(lambda: st.sampled_from(brought_by_users()))])


def on_host(tree: Any) -> Any:
    """What a restore without a target gives: NumPy's arrays, but for keys."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) and not is_key(leaf) else leaf, tree
    )


def is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def without_functions(tree: Any) -> Any:
    """The tree with a dict of the fields in place of each `TrainState`, whose functions no record holds."""

    def fields(node: Any) -> Any:
        return {name: getattr(node, name) for name in ("step", "params", "opt_state")} if is_state(node) else node

    return jax.tree.map(fields, tree, is_leaf=is_state)


def is_state(node: Any) -> bool:
    return isinstance(node, TrainState)


def shown(tree: Any) -> Any:
    """`bits`, in which a NaN is the same as itself."""
    return {name: tuple(map(repr, value)) for name, value in bits(tree).items()}


def can_be_read_by_orbax(part: Any) -> bool:
    """Orbax takes a slash in a key for a path, and `~` in a string's name for an escape of JSON pointers."""
    return bool(jax.tree.leaves(part)) and not any(set("/~") & set(leaf.name) for leaf in flatten(part))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_every_way_back_gives_the_same(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Into a target, without any by names and bits, typed, and, where Orbax can, through Orbax."""
    directory = tmp_path_factory.mktemp("run")
    with CheckpointManager(directory, async_save=False) as manager:
        manager.save(1, state)
        assert_same(state, manager.restore(zoo.blank(state)))
        assert shown(manager.restore()) == shown(state)
        assert_same(on_host(without_functions(state)), without_functions(manager.restore(typed=True)))
    with ocp.PyTreeCheckpointer() as theirs:
        for name, part in state.items():
            if can_be_read_by_orbax(part):
                assert shown(theirs.restore(directory / "1" / name)) == shown(part)


# ------------------------------------------------------------------ objects that are updated in place


def make_trained(seed: int) -> dict[str, Any]:
    """A model and its optimizer, which share all parameters."""
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(seed)), nnx.BatchNorm(3, rngs=nnx.Rngs(seed)))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(lambda array: array + seed, nnx.state(model, nnx.Param)))
    return {"model": model, "optimizer": optimizer}


ADAM = optax.adam(0.1)  # once, since a TrainState differs from one with other functions
MADE_FROM_SEEDS: list[Callable[[int], Any]] = [
    make_trained,
    lambda seed: nnx.Dropout(0.5, rngs=nnx.Rngs(seed)),
    lambda seed: nnx.Rngs(seed, dropout=seed + 1),
    lambda seed: nnx.Param(jnp.full(2, float(seed))),
    lambda seed: nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(seed + number)) for number in range(11)]),
    lambda seed: eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(seed)),
    lambda seed: TrainState.create(apply_fn=len, params={"w": jnp.full(2, float(seed))}, tx=ADAM),
    lambda seed: {"step": seed, "key": jax.random.key(seed), "name": str(seed)},
]


def made_from_seeds() -> Any:
    """Functions of a seed, whose states hold objects, nested at random."""

    def dicts(children: dict[str, Callable[[int], Any]]) -> Callable[[int], Any]:
        return lambda seed: {name: child(seed) for name, child in children.items()}

    def lists(children: list[Callable[[int], Any]]) -> Callable[[int], Any]:
        return lambda seed: [child(seed) for child in children]

    names = st.sampled_from(["a", "b.c", "d/e"])
    nested = st.recursive(
        st.sampled_from(MADE_FROM_SEEDS),
        lambda inner: (
            st.dictionaries(names, inner, min_size=1, max_size=2).map(dicts)
            | st.lists(inner, min_size=1, max_size=2).map(lists)
        ),
        max_leaves=4,
    )
    return st.dictionaries(st.sampled_from(["params", "rest"]), nested, min_size=1).map(dicts)


def is_object(node: Any) -> bool:
    return isinstance(node, nnx.Module | nnx.Optimizer | nnx.Rngs | nnx.Variable)


def plain(state: Any) -> Any:
    """What is in the objects, in their places."""

    def of(node: Any) -> Any:
        if isinstance(node, nnx.Variable):
            return node[...]
        return nnx.to_pure_dict(nnx.state(node)) if is_object(node) else node

    arrays, _ = eqx.partition(jax.tree.map(of, state, is_leaf=is_object), lambda leaf: not callable(leaf))
    return arrays


def objects_in(state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=is_object) if is_object(node)]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(make=made_from_seeds())
def test_objects_anywhere_come_back_in_place(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[[int], Any]
) -> None:
    """The objects that are given hold what was saved and are returned; and where none is given, new ones do."""
    directory = tmp_path_factory.mktemp("run")
    like = make(2)
    with CheckpointManager(directory, async_save=False) as manager:
        manager.save(1, make(1))
        restored = manager.restore(like)
    assert all(found is given for found, given in zip(objects_in(restored), objects_in(like), strict=True))
    assert_same(plain(make(1)), plain(restored))
    with CheckpointHook(directory) as hook:
        assert_same(plain(make(1)), plain(hook.restore_or_init(make, 3)))
