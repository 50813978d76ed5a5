"""The safetensors example: parameters of a real model out, in again, and into a training of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import linen as nn

from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom
from ckpt_hooks.errors import InvalidArgumentError, ItemNotFoundError, StructureMismatchError
from ckpt_hooks.testing import assert_same
from examples import safetensors_io


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head", param_dtype=jnp.bfloat16)(nn.relu(nn.Dense(4, name="body")(x)))


def make_state(seed: int) -> dict[str, Any]:
    params = Net().init(jax.random.key(seed), jnp.ones((1, 2)))["params"]
    return {"params": params, "step": seed}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, make_state(7))
        manager.save(8, make_state(8))
    return tmp_path / "run"


def test_parameters_out(run: Path, tmp_path: Path) -> None:
    """Their names are the keys with dots, and others read the very arrays."""
    path = tmp_path / "params.safetensors"
    safetensors_io.main(["out", str(run), str(path)])
    found = safetensors.flax.load_file(path)
    assert_same(flax.traverse_util.flatten_dict(make_state(8)["params"], sep="."), found)
    safetensors_io.write_safetensors(str(run), str(path), items=["params/body"], step=7)
    assert safetensors.numpy.load_file(path).keys() == {"body.kernel", "body.bias"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["params.safetensors"]


def test_parameters_in(run: Path, tmp_path: Path) -> None:
    """A training begins with the arrays of a file, to the last bit, and goes on with its own."""
    path = tmp_path / "params.safetensors"
    safetensors.flax.save_file(flax.traverse_util.flatten_dict(make_state(5)["params"], sep="."), path)
    safetensors_io.main(["in", str(path), str(tmp_path / "imported")])
    with CheckpointHook(tmp_path / "tuned", every_n_steps=1, init_from=tmp_path / "imported") as hook:
        state = hook.restore(make_state(0))
        assert hook.start_step == 0
        assert_same(make_state(5)["params"], state["params"])
        hook(1, state)
    with CheckpointHook(tmp_path / "tuned", init_from=tmp_path / "imported") as hook:
        hook.restore(make_state(0))
        assert hook.start_step == 1
    with pytest.raises(InvalidArgumentError, match="has step 0 already"):
        safetensors_io.import_safetensors(str(path), str(tmp_path / "imported"))


def test_a_file_of_somebody_elses(tmp_path: Path) -> None:
    """With other names and dtypes: an error that names them, until it is said how they differ."""
    path, run = str(tmp_path / "theirs.safetensors"), tmp_path / "imported"
    theirs = flax.traverse_util.flatten_dict(make_state(5)["params"], sep=".")
    theirs = {name.replace("body", "encoder"): np.asarray(array, np.float32) for name, array in theirs.items()}
    safetensors.numpy.save_file(theirs, path)
    safetensors_io.import_safetensors(path, str(run))
    with pytest.raises(StructureMismatchError, match="encoder"):
        InitFrom(run).fill(make_state(0))
    state = InitFrom(run, rename={"params/encoder": "params/body"}, cast=True).fill(make_state(0))
    assert_same(make_state(5)["params"], state["params"])


def test_arrays_are_written_by_their_values(tmp_path: Path) -> None:
    """Whatever their order in memory, and without axes or elements too."""
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"params": {"t": np.arange(6.0).reshape(2, 3).T, "s": np.array(3.5), "e": np.zeros((0, 2))}})
    path = str(tmp_path / "file")
    safetensors_io.write_safetensors(str(tmp_path / "run"), path)
    found = safetensors_io.read_safetensors(path)
    assert_same({"t": np.arange(6.0).reshape(2, 3).T.copy(), "s": np.array(3.5), "e": np.zeros((0, 2))}, found)


def test_what_does_not_go_in_is_told(run: Path, tmp_path: Path) -> None:
    """And leaves no file behind, neither half of one nor another one."""
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="step is of type int; safetensors files hold arrays only"):
        safetensors_io.write_safetensors(str(run), str(path), items=["params", "step"])
    with pytest.raises(ItemNotFoundError, match="ema"):
        safetensors_io.write_safetensors(str(run), str(path), items=["ema"])
    with CheckpointManager(tmp_path / "odd") as manager:
        manager.save(1, {"params": {"w": jnp.ones(2, jnp.int4)}})
    with pytest.raises(ValueError, match="int4"):
        safetensors_io.write_safetensors(str(tmp_path / "odd"), str(path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["odd", "run"]


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a.b.c")])
def test_names_that_make_no_tree_are_told(tmp_path: Path, names: tuple[str, str]) -> None:
    """An array cannot have others below it."""
    safetensors.numpy.save_file({name: np.ones(1) for name in names}, str(tmp_path / "file"))
    with pytest.raises(ValueError, match="below"):
        safetensors_io.read_safetensors(str(tmp_path / "file"))
