"""States that cost users days elsewhere: each shown with Orbax 0.12.8, and what one argument of ours does about it.

Names that collide, targets that do not fit, zero-size and bare arrays, fewer devices: test_where_orbax_fails.py.
"""

from __future__ import annotations

import enum
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from ckpt_hooks import CheckpointHook, CheckpointManager
from ckpt_hooks.errors import ItemNotFoundError, StructureMismatchError
from ckpt_hooks.testing import assert_same


@pytest.fixture
def theirs() -> Iterator[ocp.StandardCheckpointer]:
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


PARAMS = {"encoder": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"kernel": jnp.ones((3, 1))}}
OPTIMIZER = optax.chain(optax.clip(1.0), optax.adam(0.1))


def make_state() -> dict[str, Any]:
    return {"params": PARAMS, "opt_state": OPTIMIZER.init(PARAMS), "step": 3}


def test_an_optimizer_state_does_not_come_back_as_lists(tmp_path: Path, theirs: ocp.StandardCheckpointer) -> None:
    """Without a target Orbax gives lists and dicts, with which no optimizer goes on; typed=True gives its own types."""
    theirs.save(tmp_path / "theirs", make_state())
    theirs.wait_until_finished()
    restored = theirs.restore(tmp_path / "theirs")["opt_state"]
    assert isinstance(restored, list)
    assert not isinstance(restored[1][0], optax.ScaleByAdamState)
    with pytest.raises((ValueError, AttributeError, TypeError)):
        OPTIMIZER.update(PARAMS, restored)

    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, make_state())
        typed = ours.restore(typed=True)["opt_state"]
    assert isinstance(typed[1][0], optax.ScaleByAdamState)
    expected = OPTIMIZER.update(PARAMS, make_state()["opt_state"], PARAMS)
    assert_same(expected, OPTIMIZER.update(PARAMS, jax.tree.map(jnp.asarray, typed), PARAMS))


def test_a_renamed_layer_is_told_and_one_argument(tmp_path: Path, theirs: ocp.StandardCheckpointer) -> None:
    """Orbax says that the trees differ; ours names both names, and takes what it names."""
    like = {"body": PARAMS["encoder"], "head": PARAMS["head"]}
    theirs.save(tmp_path / "theirs", PARAMS)
    theirs.wait_until_finished()
    with pytest.raises(ValueError, match="body") as told:
        theirs.restore(tmp_path / "theirs", like)
    assert "rename" not in str(told.value)

    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, {"params": PARAMS})
        with pytest.raises(
            StructureMismatchError, match=r"missing     body\.kernel[^\n]*\n.*unexpected  encoder\.kernel"
        ):
            ours.restore({"params": like})
        renamed = ours.restore({"params": like}, rename={"params/encoder": "params/body"})
    assert_same({"params": like}, renamed)


def test_parameters_alone_are_one_argument(tmp_path: Path) -> None:
    """Orbax wants the whole tree as a target; ours restores the items, or parts of them, that are asked for."""
    with ocp.CheckpointManager(tmp_path / "theirs") as manager:
        manager.save(1, args=ocp.args.StandardSave(make_state()))
        manager.wait_until_finished()
        with pytest.raises(ValueError, match="opt_state"):
            manager.restore(1, args=ocp.args.StandardRestore({"params": PARAMS}))
    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, make_state())
    for directory in ("ours", "theirs"):
        manager = CheckpointManager(tmp_path / directory)
        assert_same({"params": PARAMS}, manager.restore({"params": PARAMS}, items=["params"]))
        only_head = manager.restore(items=["params/head"])
        assert_same({"params": {"head": {"kernel": np.ones((3, 1), np.float32)}}}, only_head)
        with pytest.raises(ItemNotFoundError):
            manager.restore(items=["parms"])


def test_modules_go_in_as_they_are(tmp_path: Path, theirs: ocp.StandardCheckpointer) -> None:
    """Orbax makes a second module and leaves the one that it is given as it was; ours updates that one."""
    model, other = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    theirs.save(tmp_path / "theirs", {"model": model})
    theirs.wait_until_finished()
    assert theirs.restore(tmp_path / "theirs", {"model": other})["model"] is not other
    assert (other.kernel[...] != model.kernel[...]).any()
    with CheckpointHook(tmp_path / "ours", every_n_steps=1) as hook:
        hook(1, {"model": model})
        hook.wait()
        assert hook.restore({"model": other})["model"] is other
    assert (other.kernel[...] == model.kernel[...]).all()


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_every_kind_are_saved(tmp_path: Path, impl: str) -> None:
    """Orbax's own item for keys takes the default kind alone; for ours a key is a leaf like any other."""
    key = jax.random.key(1, impl=impl)
    with (
        ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler()) as theirs,
        pytest.raises(TypeError, match="invalid PRNG"),
    ):
        theirs.save(tmp_path / "theirs", args=ocp.args.JaxRandomKeySave(key))
    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, {"key": key})
        assert_same({"key": key}, ours.restore())
        assert_same({"key": key}, ours.restore({"key": jax.random.key(0, impl=impl)}))


# ------------------------------------------------------------------ an initial state that is about to be replaced


def test_what_could_not_be_allocated_is_not(tmp_path: Path) -> None:
    """restore_or_init takes an initial state whose making would need 32 TiB."""

    def init() -> dict[str, Any]:
        return {"w": jnp.zeros((1 << 43,), jnp.float32)[:4] + jnp.zeros(4), "n": np.float32(0)}

    with pytest.raises(Exception, match=r"(?i)out of memory|allocat|exhausted"):
        init()
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        hook(1, {"w": jnp.arange(4.0), "n": np.float32(2)})
        hook.wait()
        state = hook.restore_or_init(init)
    assert_same(jnp.arange(4.0), state["w"])


COUNT = """
import sys, jax, jax.numpy as jnp
from ckpt_hooks import CheckpointHook
directory, way, num_arrays, size = sys.argv[1], sys.argv[2], 8, 8 << 20
def peak_bytes():  # not getrusage: what it tells of a program counts the one that started it too
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
def init():
    return {"params": {str(n): jnp.full(size, 1.5) + n for n in range(num_arrays)}}
with CheckpointHook(directory) as hook:
    if way == "save":
        hook.save(1, init())
    else:
        jax.block_until_ready(jnp.full(4, 1.0) + 1)
        before = peak_bytes()
        made = init() if way == "built" else None
        state = hook.restore(made) if way == "built" else hook.restore_or_init(init)
        assert hook.start_step == 1 and state["params"]["7"][0] == 8.5
        nbytes = num_arrays * size * 4
        print((peak_bytes() - before) / nbytes)
        del made
        print(sum(array.nbytes for array in jax.live_arrays()) / nbytes)
"""


def test_memory_holds_one_state_and_not_two(tmp_path: Path) -> None:
    """The peak of a process that resumes is one state with restore_or_init, and two where the first one is built."""

    def measured(way: str) -> list[float]:
        command = [sys.executable, "-c", COUNT, str(tmp_path), way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [float(line) for line in done.stdout.split()]

    measured("save")
    peak, live = measured("abstract")
    peak_built, live_built = measured("built")
    assert live == pytest.approx(1, abs=0.01)
    assert live_built == pytest.approx(1, abs=0.01)
    assert peak < 1.4
    assert peak_built > peak + 0.5


# ------------------------------------------------------------------ what is no JAX array


@pytest.mark.parametrize("with_nnx", [False, True])
def test_a_state_that_jax_cannot_trace_resumes_as_it_began(tmp_path: Path, with_nnx: bool) -> None:
    """restore_or_init gives the same types at the second start as at the first: also of text, numbers and float64."""

    def init(seed: int) -> dict[str, Any]:
        state = {"w": jnp.full(2, seed, jnp.float32), "name": "digits", "rate": 0.5, "count": seed, "table": np.ones(2)}
        return {**state, "model": nnx.Linear(1, 2, rngs=nnx.Rngs(seed))} if with_nnx else state

    with pytest.raises(TypeError, match="str"):
        jax.eval_shape(lambda: init(1))
    for seed, start_step in ((1, 0), (2, 1)):
        with CheckpointHook(tmp_path, every_n_steps=1) as hook:
            state = hook.restore_or_init(init, seed)
            assert hook.start_step == start_step
            model = state.pop("model", None)
            assert_same({key: value for key, value in init(1).items() if key != "model"}, state)
            hook(hook.start_step + 1, state | ({"model": model} if with_nnx else {}))


def test_an_equinox_module_with_functions_needs_no_wrapper(tmp_path: Path) -> None:
    """Its activation is a function, which `jax.eval_shape` refuses and restore_or_init leaves where it is."""
    eqx = pytest.importorskip("equinox")

    def init(seed: int) -> Any:
        return {"model": eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(seed))}

    with pytest.raises(TypeError, match="activation"):
        jax.eval_shape(lambda: init(0))
    with CheckpointHook(tmp_path, every_n_steps=1) as hook:
        hook(1, init(0))
        hook.wait()
        restored = hook.restore_or_init(init, 1)
    assert eqx.tree_equal(restored, init(0))


class Color(str, enum.Enum):  # noqa: UP042  (the text of a StrEnum is its value)
    """As a key it is equal to a string, which is not its name."""

    RED = "red"


@pytest.mark.parametrize("keys", [[1, True, 1.0], [Color.RED, "red"], ["red", Color.RED]])
def test_a_key_keeps_its_name_whatever_was_saved_before(tmp_path: Path, keys: list[Any]) -> None:
    """To Python 1, 1.0 and True are one key, and to a checkpoint three, in any order and process."""
    for step, key in enumerate(keys, 1):
        with CheckpointManager(tmp_path) as manager:
            manager.save(step, {"params": {key: np.ones(3)}})
            manager.wait()
            assert list(manager.restore()["params"]) == [str(key)]
            assert list(manager.restore({"params": {key: np.zeros(3)}})["params"]) == [key]
