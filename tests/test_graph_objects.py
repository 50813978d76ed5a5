"""Flax NNX: modules, optimizers, Rngs and variables go in as they are and are updated in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom
from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, ItemNotFoundError, StructureMismatchError
from ckpt_hooks.testing import assert_same, damage


class Network(nnx.Module):
    """Batch norm, dropout with its own stream, a list and a dict of layers, a tied kernel, a static number."""

    def __init__(self, rngs: nnx.Rngs, width: int = 8) -> None:
        self.width = width
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(11)])
        self.heads = nnx.Dict(digit=nnx.Linear(width, 10, rngs=rngs))
        self.tied = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        for layer in self.hidden:
            x = x + layer(x)
        return self.heads["digit"](x)


def make(seed: int, width: int = 8) -> tuple[Network, Any]:
    network = Network(nnx.Rngs(seed), width)
    return network, nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)


IMAGES, LABELS = (np.asarray(part[:256]) for part in load_digits(return_X_y=True))


@nnx.jit
def train_step(network: Network, optimizer: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    def loss_of(network: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, grads)
    return loss


def train(network: Network, optimizer: Any, start: int, stop: int) -> list[float]:
    batches = [slice(32 * (step % 8), 32 * (step % 8) + 32) for step in range(start, stop)]
    return [float(train_step(network, optimizer, IMAGES[batch] / 16, LABELS[batch])) for batch in batches]


def values(*objects: Any) -> Any:
    return [nnx.to_pure_dict(nnx.state(each)) for each in objects]


# ------------------------------------------------------------------ every way in


def test_a_module_passed_as_the_state_is_updated_in_place_and_returned(tmp_path: Path) -> None:
    """`hook(step, model)`: the whole state is the model; what is returned on restore is the object that was given."""
    saved, _ = make(0)
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        assert hook(1, saved)
    fresh, _ = make(1)
    kernel = fresh.first.kernel
    with CheckpointHook(tmp_path) as hook:
        assert hook.restore(fresh) is fresh
        assert hook.start_step == 1
    assert fresh.first.kernel is kernel
    assert fresh.tied is kernel
    assert_same(values(saved), values(fresh))


def test_a_module_begins_as_it_is_in_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init_from` fills a module that is the whole state, from a path that is relative to where the program began."""
    saved, _ = make(0)
    with CheckpointHook(tmp_path / "base", every_n_steps=1) as hook:
        hook(1, saved)
    fresh, _ = make(1)
    monkeypatch.chdir(tmp_path)
    with (
        CheckpointHook(tmp_path / "tuned", init_from="base") as hook,
        pytest.raises(ItemNotFoundError, match="'state'"),
    ):
        hook.restore(fresh)
    with CheckpointHook(tmp_path / "tuned", init_from=InitFrom("base", items=["state"])) as hook:
        monkeypatch.chdir("/")
        assert hook.restore(fresh) is fresh
    assert_same(values(saved), values(fresh))
    with CheckpointHook(tmp_path / "new") as hook:
        assert hook.restore(fresh, items=["state"])["state"] is fresh


def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Model, optimizer, dropout's stream and batch statistics: 6 + 6 steps are 12 steps, to the last bit."""
    whole = make(0)
    losses = train(*whole, 0, 12)
    network, optimizer = make(0)
    train(network, optimizer, 0, 6)
    with CheckpointHook(tmp_path, every_n_steps=6) as hook:
        hook(6, {"model": network, "optimizer": optimizer})
    network, optimizer = make(5)
    with CheckpointHook(tmp_path) as hook:
        restored = hook.restore({"model": network, "optimizer": optimizer})
        assert restored["model"] is network
        assert restored["optimizer"] is optimizer
        assert train(network, optimizer, hook.start_step, 12) == losses[6:]
    assert_same(values(*whole), values(network, optimizer))


def test_objects_may_be_keyword_items_beside_a_state(tmp_path: Path) -> None:
    """`hook(step, state, model=model, rngs=rngs)`, and on restore the same keywords."""
    network, optimizer = make(0)
    rngs = nnx.Rngs(3, noise=4)
    rngs.noise()
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        hook(1, {"ema": jnp.ones(3)}, model=network, optimizer=optimizer, rngs=rngs)
    other, other_optimizer = make(1)
    other_rngs = nnx.Rngs(0, noise=0)
    with CheckpointHook(tmp_path) as hook:
        like = {"ema": jnp.zeros(3)}
        restored = hook.restore(like, model=other, optimizer=other_optimizer, rngs=other_rngs)
    assert_same({"ema": jnp.ones(3)}, restored)
    assert_same(values(network, optimizer, rngs), values(other, other_optimizer, other_rngs))
    assert_same(rngs.noise(), other_rngs.noise())


@pytest.mark.parametrize("kind", ["module", "optimizer", "rngs", "variable", "list", "metric"])
def test_any_graph_object_is_a_state(tmp_path: Path, kind: str) -> None:
    """Whatever NNX counts as a node of its graph can be the state itself."""
    network, optimizer = make(2)
    network_too, optimizer_too = make(3)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    metrics.update(loss=jnp.asarray([1.0, 3.0]))
    pairs: dict[str, tuple[Any, Any]] = {
        "module": (network, network_too),
        "optimizer": (optimizer, optimizer_too),
        "rngs": (nnx.Rngs(1), nnx.Rngs(2)),
        "variable": (nnx.Param(jnp.arange(3.0)), nnx.Param(jnp.zeros(3))),
        "list": (network.hidden, network_too.hidden),
        "metric": (metrics, nnx.MultiMetric(loss=nnx.metrics.Average("loss"))),
    }
    saved, target = pairs[kind]
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, saved)
        assert manager.restore(target) is target
    found = [each.get_value() if kind == "variable" else nnx.state(each) for each in (saved, target)]
    assert_same(*map(jax.tree.leaves, found))
    if kind == "metric":
        assert target.compute() == {"loss": 2.0}


def test_objects_deep_in_a_state_are_found(tmp_path: Path) -> None:
    """In lists, tuples and dicts inside a part; what lies around them comes back in its own type."""
    networks, others = [make(0)[0], make(1)[0]], [make(2)[0], make(3)[0]]
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"ensemble": [{"net": networks[0], "w": np.ones(2)}, (networks[1], 5)]})
        restored = manager.restore({"ensemble": [{"net": others[0], "w": np.zeros(2)}, (others[1], 0)]})
    assert restored["ensemble"][0]["net"] is others[0]
    assert restored["ensemble"][1] == (others[1], 5)
    assert_same(np.ones(2), restored["ensemble"][0]["w"])
    assert_same(values(*networks), values(*others))


def test_variables_keep_their_class_metadata_and_functions(tmp_path: Path) -> None:
    """A subclass with metadata, one that changes what is read, and values that are trees or None."""

    class Scale(nnx.Variable[Any]):
        pass

    class Doubled(nnx.Variable[Any]):
        def get_value(self, **index: Any) -> Any:
            return super().get_value(**index) * 2

    def build(number: int) -> Any:
        value = jnp.float32(number)
        tree = nnx.Variable({"a": jnp.full(1, value), "b": None, "c": [jnp.full(2, value)]})
        return nnx.Dict(
            scale=Scale(jnp.full(3, value), tag="mine"), double=Doubled(jnp.full(2, value)), tree=tree,
            none=nnx.Variable(None), array=nnx.data(jnp.full(4, value)), keys=nnx.Variable(jax.random.key(number)),
        )  # fmt: skip

    saved, target = build(1), build(0)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"objects": saved})
        manager.restore({"objects": target})
    assert type(target.scale) is Scale
    assert target.scale.tag == "mine"
    assert_same(jnp.full(2, 2.0, jnp.float32), target.double.get_value())
    assert_same(saved.tree.get_value(), target.tree.get_value())
    assert_same(saved.array, target.array)
    assert_same(saved.keys.get_value(), target.keys.get_value())


# ------------------------------------------------------------------ sharing, shardings, abstract objects


def test_what_is_shared_is_saved_once(tmp_path: Path) -> None:
    """A tied kernel, and a model that a part and an optimizer of the old kind both hold."""
    network, _ = make(0)
    optimizer = nnx.ModelAndOptimizer(network, optax.sgd(0.1))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": network, "optimizer": optimizer, "teacher": network})
        plain = manager.restore()
    assert "tied" not in plain["model"]
    assert "model" not in plain["optimizer"]
    assert plain["teacher"] == {}
    other, _ = make(1)
    old = nnx.ModelAndOptimizer(other, optax.sgd(0.1))
    with CheckpointManager(tmp_path) as manager:
        manager.restore({"model": other, "optimizer": old, "teacher": other})
    assert_same(values(network, optimizer), values(other, old))
    assert old.model is other


def test_an_abstract_module_becomes_a_concrete_one(tmp_path: Path) -> None:
    """`nnx.eval_shape` gives a target that holds no array."""
    network, _ = make(0)
    abstract = nnx.eval_shape(lambda: make(1)[0])
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": network})
        assert manager.restore({"model": abstract})["model"] is abstract
    assert_same(values(network), values(abstract))
    assert abstract.tied is abstract.first.kernel
    abstract(jnp.ones((2, 64)))


@pytest.mark.parametrize("jitted", [False, True])
def test_restore_or_init_builds_no_module_that_it_replaces(tmp_path: Path, jitted: bool) -> None:
    """With a checkpoint, an init function of NNX is only evaluated abstractly."""
    built = []

    def init(seed: int) -> Any:
        network, optimizer = make(seed)
        built.append(not isinstance(network.first.kernel.get_value(), jax.core.Tracer))
        return {"model": network, "optimizer": optimizer}

    function = nnx.jit(init, static_argnums=0) if jitted else init
    with CheckpointHook(tmp_path / "run", every_n_steps=1) as hook:
        state = hook.restore_or_init(function, 0)
        train(state["model"], state["optimizer"], 0, 2)
        hook(1, state)
    built.clear()
    with CheckpointHook(tmp_path / "run") as hook:
        restored = hook.restore_or_init(function, 1)
    assert not any(built)
    assert restored["model"].tied is restored["model"].first.kernel
    assert_same(values(state["model"], state["optimizer"]), values(restored["model"], restored["optimizer"]))
    train(restored["model"], restored["optimizer"], 0, 1)


def test_shardings_of_the_variables_are_kept(tmp_path: Path) -> None:
    """In a process with four devices, arrays come back where the variables of the target have them."""
    code = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec
from flax import nnx
from ckpt_hooks import CheckpointManager
mesh = jax.make_mesh((4,), ("x",))
def build(seed, spec):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(seed))
    model.kernel.set_value(jax.device_put(model.kernel.get_value(), NamedSharding(mesh, spec)))
    return model
with CheckpointManager(sys.argv[1]) as manager:
    saved = build(0, PartitionSpec("x"))
    manager.save(1, saved)
    target = build(1, PartitionSpec(None, "x"))
    manager.restore(target)
assert target.kernel.get_value().sharding.spec == PartitionSpec(None, "x")
np.testing.assert_array_equal(saved.kernel.get_value(), target.kernel.get_value())
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=120, env={"PYTHONPATH": ":".join(sys.path), **environment})


# ------------------------------------------------------------------ nothing half done


def test_what_does_not_fit_leaves_every_object_untouched(tmp_path: Path) -> None:
    """The error lists the leaves; neither the model that fits nor the one that does not has changed."""
    network, _ = make(0)
    fitting, narrow = make(1)[0], make(1, width=4)[0]
    before = values(fitting, narrow)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"a": network, "b": make(2)[0]})
        with pytest.raises(StructureMismatchError, match=r"reshaped +first\.kernel: saved as float32\[64, 8\]"):
            manager.restore({"a": fitting, "b": narrow})
    assert_same(before, values(fitting, narrow))


def test_damage_leaves_the_object_untouched(tmp_path: Path) -> None:
    """A checkpoint that does not verify changes nothing."""
    network, _ = make(0)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, network)
        manager.wait()
        path = next((tmp_path / "1" / "state" / "d").iterdir())
        with damage.flip_bit(path, 4096 * 8):
            target, _ = make(1)
            before = values(target)
            with pytest.raises(ValueError, match="restored"):
                manager.restore(target)
    assert_same(before, values(target))


def test_an_iterator_that_fails_leaves_the_object_untouched(tmp_path: Path) -> None:
    """Objects are updated last, when nothing can fail any more."""

    class Broken:
        def get_state(self) -> dict[str, int]:
            return {"position": 1}

        def set_state(self, state: dict[str, int]) -> None:
            raise RuntimeError(f"cannot go to {state}")

    target, _ = make(1)
    before = values(target)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": 1}, model=make(0)[0], data=Broken())
        with pytest.raises(RuntimeError, match="cannot go to"):
            manager.restore({"w": 0}, model=target, data=Broken())
    assert_same(before, values(target))


def test_mistakes_are_told(tmp_path: Path) -> None:
    """A keyword that is a part already, a pytree as a keyword, an item that was not saved, an array in a tuple."""
    network, _ = make(0)
    with CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(InvalidArgumentError, match=r"'model'.*rename"):
            manager.save(1, {"model": jnp.ones(2)}, model=network)
        with pytest.raises(InvalidArgumentTypeError, match="A pytree belongs into the state"):
            manager.save(1, {"w": 1}, model={"w": jnp.ones(2)})
        assert not (tmp_path / "run").exists()
        manager.save(1, {"w": 1})
        with pytest.raises(ItemNotFoundError, match="model"):
            manager.restore({"w": 0}, model=network)
        frozen = nnx.Dict(pair=nnx.data((jnp.ones(2), jnp.ones(3))))
        manager.save(2, {"w": frozen})
        with pytest.raises(InvalidArgumentError, match=r"Dict.*nnx\.Variable"):
            manager.restore({"w": frozen})


# ------------------------------------------------------------------ Orbax, and without a target


def test_orbax_reads_a_module_that_we_saved(tmp_path: Path) -> None:
    """As the pure dict of `nnx.to_pure_dict`, without and with a target; and `replace_by_pure_dict` takes it."""
    network, optimizer = make(0)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": network, "optimizer": optimizer})
    with ocp.StandardCheckpointer() as theirs:
        plain = theirs.restore(tmp_path / "1" / "model")
        typed = theirs.restore(tmp_path / "1" / "model", nnx.to_pure_dict(nnx.state(network)))
    assert_same(nnx.to_pure_dict(nnx.state(network)), typed)
    other, _ = make(1)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, plain)
    nnx.update(other, state)
    assert_same(values(network), values(other))


def test_we_read_a_module_that_orbax_saved(tmp_path: Path) -> None:
    """The pure dict, as Flax's guide saves it, is restored into the module itself."""
    network, _ = make(0)
    with ocp.CheckpointManager(tmp_path) as theirs:
        theirs.save(3, args=ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(network))))
    target, _ = make(1)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(target) is target
    assert_same(values(network), values(target))


def test_without_a_target_a_module_is_nested_dicts(tmp_path: Path) -> None:
    """NumPy arrays under the names of the attributes; no NNX is needed to read them."""
    network, _ = make(0)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, network)
    code = (
        "import sys, json; from ckpt_hooks import CheckpointManager\n"
        "state = CheckpointManager(sys.argv[1]).restore()['state']\n"
        "assert 'flax' not in sys.modules\n"
        "print(json.dumps([sorted(state), float(state['hidden']['10']['kernel'].sum())]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    names, total = json.loads(output)
    assert names == ["dropout", "first", "heads", "hidden", "norm"]
    assert total == pytest.approx(float(np.sum(network.hidden[10].kernel.get_value(), dtype=np.float32)), rel=1e-5)


def test_an_nnx_state_is_a_pytree_of_its_own(tmp_path: Path) -> None:
    """Who splits by hand gets a new `nnx.State` back; the one that was given stays as it was."""
    _, state = nnx.split(make(0)[0])
    _, blank = nnx.split(make(1)[0])
    before = jax.tree.map(jnp.copy, blank)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"state": state, "step": 1})
        restored = manager.restore({"state": blank, "step": 0})["state"]
    assert type(restored) is type(state)
    assert_same(jax.tree.leaves(state), jax.tree.leaves(restored))
    structures: list[Any] = [jax.tree.structure(each) for each in (state, restored)]
    assert structures[0] == structures[1]
    assert_same(jax.tree.leaves(before), jax.tree.leaves(blank))
