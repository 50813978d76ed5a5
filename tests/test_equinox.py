"""Equinox: modules go in whole; functions among their leaves are structure and stay as the target has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ckpt_hooks import Checkpointer, CheckpointHook, CheckpointManager, StandardCheckpointHandler
from ckpt_hooks.errors import StructureMismatchError, UnsupportedLeafError
from ckpt_hooks.testing import assert_same


class Network(eqx.Module):
    """Functions as leaves, one of them in a list, a static field, a float, a field that is None."""

    mlp: eqx.nn.MLP
    functions: list[Any]
    scale: float
    nothing: None
    name: str = eqx.field(static=True)

    def __init__(self, seed: int, scale: float = 0.5) -> None:
        self.mlp = eqx.nn.MLP(3, 2, width_size=8, depth=2, activation=jax.nn.gelu, key=jax.random.key(seed))
        self.functions = [jnp.tanh, jnp.full(2, float(seed))]
        self.scale = scale
        self.nothing = None
        self.name = "net"

    def __call__(self, x: jax.Array) -> Any:
        return self.functions[0](self.mlp(x)) * self.scale + self.functions[1]


def make_state(seed: int) -> dict[str, Any]:
    network = Network(seed, scale=float(seed))
    return {"model": network, "opt_state": OPTIMIZER.init(eqx.filter(network, eqx.is_array)), "step": seed}


OPTIMIZER = optax.adam(1e-2)


@eqx.filter_jit
def train_step(state: dict[str, Any]) -> dict[str, Any]:
    def loss_of(network: Network) -> Any:
        return jnp.mean(jax.vmap(network)(jnp.linspace(0, 1, 12).reshape(4, 3)) ** 2)

    grads = eqx.filter_grad(loss_of)(state["model"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
    return {"model": eqx.apply_updates(state["model"], updates), "opt_state": opt_state, "step": state["step"]}


def test_a_run_with_whole_modules_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Three steps, a restore into another initialisation, three more: as six without a stop."""
    whole = state = make_state(1)
    for _ in range(6):
        whole = train_step(whole)
    for _ in range(3):
        state = train_step(state)
    with CheckpointHook(tmp_path, every_n_steps=3) as hook:
        assert hook(3, state)
    with CheckpointHook(tmp_path) as hook:
        resumed = hook.restore(make_state(2))
    for _ in range(3):
        resumed = train_step(resumed)
    structures: list[Any] = [jax.tree.structure(state) for state in (whole, resumed)]
    assert structures[0] == structures[1]
    assert_same(eqx.filter(whole, eqx.is_array), eqx.filter(resumed, eqx.is_array))
    assert resumed["model"].scale == 1.0


def test_functions_stay_as_the_target_has_them(tmp_path: Path) -> None:
    """Another activation in the target is kept, and the module is of its own class."""
    target = eqx.tree_at(lambda net: net.mlp.activation, Network(2), jax.nn.relu)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": Network(1)})
        restored = manager.restore({"model": target})["model"]
    assert type(restored) is Network
    assert restored.mlp.activation is jax.nn.relu
    assert_same(Network(1).mlp.layers[0].weight, restored.mlp.layers[0].weight)


@pytest.mark.parametrize("saved_whole", [False, True])
def test_a_whole_module_and_a_filtered_one_restore_each_other(tmp_path: Path, saved_whole: bool) -> None:
    """Both have None where there is no array."""
    whole, other = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1))
    filtered = eqx.filter(whole, eqx.is_array)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": whole if saved_whole else filtered})
        assert eqx.tree_equal(manager.restore({"model": other})["model"], whole)
        assert eqx.tree_equal(manager.restore({"model": eqx.filter(other, eqx.is_array)})["model"], filtered)


def test_a_module_may_be_the_state(tmp_path: Path) -> None:
    """It is the one item `state`, by the hook and by a bare checkpointer."""
    with CheckpointHook(tmp_path / "run", every_n_steps=1) as hook:
        hook(1, Network(1))
        assert eqx.tree_equal(hook.restore(Network(2)), Network(1, 0.5))
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "one", Network(1))
        assert eqx.tree_equal(checkpointer.restore(tmp_path / "one", Network(2)), Network(1))


def test_restore_or_init_and_abstract_targets(tmp_path: Path) -> None:
    """`eqx.filter_eval_shape` gives a target without arrays."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": Network(1)})
        abstract = eqx.filter_eval_shape(Network, 2)
        assert eqx.tree_equal(manager.restore({"model": abstract})["model"], Network(1))


def test_stateful_layers(tmp_path: Path) -> None:
    """`eqx.nn.State` of a batch norm, whose values have been updated."""

    def make() -> Any:
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")

    norm, state = make()
    _, state = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(jnp.ones((4, 3)), state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"norm": norm, "state": state})
        restored = manager.restore(dict(zip(("norm", "state"), make(), strict=True)))
    assert_same(jax.tree.leaves(state), jax.tree.leaves(restored["state"]))
    assert eqx.tree_equal(restored["norm"], norm)


def test_without_a_target_functions_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Typed, the module comes back but for its functions, which the log names and `eqx.combine` fills in."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": Network(1)})
        plain = manager.restore()["model"]
        typed = manager.restore(typed=True)["model"]
    assert plain["mlp"]["activation"] is None
    assert plain["scale"] == 0.5
    assert "['mlp.activation', 'mlp.final_activation', 'functions.0']" in caplog.text
    assert type(typed) is Network
    assert typed.name == "net"
    combined = eqx.combine(typed, Network(1))
    assert combined.functions[0] is jnp.tanh
    assert_same(Network(1)(jnp.ones(3)), combined(jnp.ones(3)))


def test_orbax_reads_a_whole_module(tmp_path: Path) -> None:
    """As the filtered module, which Orbax can restore."""
    filtered = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))})
    with ocp.StandardCheckpointer() as theirs:
        restored = theirs.restore(tmp_path / "1" / "model", filtered)
    assert_same(jax.tree.leaves(filtered), jax.tree.leaves(restored))


def test_elsewhere_a_function_is_refused(tmp_path: Path) -> None:
    """By the name of its leaf, before a byte is written; and on restore it does not stand for an array."""
    with CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(UnsupportedLeafError, match=r"^item '\w+': extra\.f: a function"):
            manager.save(1, {"params": {"model": Network(1), "extra": {"f": jnp.tanh}}})
        assert not (tmp_path / "run").exists()
        manager.save(1, {"params": {"w": np.ones(2)}})
        with pytest.raises(StructureMismatchError, match="w: saved as float64"):
            manager.restore({"params": {"w": jnp.tanh}})
        with pytest.raises(StructureMismatchError, match=r"missing +f: "):
            manager.restore({"params": {"w": np.ones(2), "f": jnp.tanh}})
        with pytest.raises(StructureMismatchError, match=r"unexpected +w"):
            manager.restore({"params": Network(1)})


def test_equinox_is_never_imported() -> None:
    """Neither by the import, nor by a save and a restore."""
    code = (
        "import sys, tempfile, numpy as np, ckpt_hooks\n"
        "manager = ckpt_hooks.CheckpointManager(tempfile.mkdtemp())\n"
        "manager.save(1, {'w': np.ones(2)}); manager.restore({'w': np.ones(2)}); manager.restore(typed=True)\n"
        "assert not {'equinox', 'flax'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
