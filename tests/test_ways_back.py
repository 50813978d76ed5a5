"""What was saved comes back in part, renamed, in another dtype, with gaps, into another run; or an error says how."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from ckpt_hooks import CheckpointHook, CheckpointManager, InitFrom
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    NameCollisionError,
    StructureMismatchError,
)
from ckpt_hooks.testing import assert_same


def make_state(value: float, dtype: Any = np.float32) -> dict[str, Any]:
    layer = {"kernel": np.full((3, 2), value, dtype), "bias": np.full(2, value, dtype)}
    return {
        "params": {"encoder": {"a": layer, "b": dict(layer)}, "head": {"kernel": np.full(4, value, dtype)}},
        "stats": {"mean": np.full(3, value, dtype), "count": np.full(1, int(value), np.int32)},
        "step": int(value),
    }


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, make_state(5))
        manager.wait()
        yield manager


# ------------------------------------------------------------------ in part


def test_a_sub_tree_without_a_target(manager: CheckpointManager) -> None:
    """A path stands for all below it, and nothing else is returned."""
    assert_same({"params": {"head": make_state(5)["params"]["head"]}}, manager.restore(items=("params/head",)))


@pytest.mark.parametrize("pattern", ["params/encoder/*/kernel", "params/*kernel", "params/encoder/[ab]/kernel"])
def test_patterns_select_leaves_and_the_others_stay(manager: CheckpointManager, pattern: str) -> None:
    """Into a target, what is not selected keeps the value that it has there."""
    like = make_state(0)
    params = manager.restore(like, items=(pattern,))["params"]
    assert params["encoder"]["a"]["kernel"][0, 0] == params["encoder"]["b"]["kernel"][0, 0] == 5
    assert params["encoder"]["a"]["bias"] is like["params"]["encoder"]["a"]["bias"]


def test_only_the_selected_bytes_are_read(manager: CheckpointManager) -> None:
    """The bytes that a restore of one leaf reads are that leaf's."""
    read: list[float] = []

    def listen(event: str, value: float, **_: Any) -> None:
        if event.endswith("read/bytes"):
            read.append(value)

    jax.monitoring.register_scalar_listener(listen)
    try:
        manager.restore(items=("params/head/kernel",))
    finally:
        with contextlib.suppress(AttributeError):  # which a JAX that cannot forget a listener raises
            jax.monitoring.unregister_scalar_listener(listen)
    assert read == [16]


def test_a_whole_item_and_a_path_below_it_are_the_whole_item(manager: CheckpointManager) -> None:
    """Who names both gets both."""
    assert_same({"params": make_state(5)["params"]}, manager.restore(items=("params", "params/head")))


def test_a_path_that_selects_nothing_is_an_error_with_the_nearest_name(manager: CheckpointManager) -> None:
    """And nothing is returned for the paths that do exist."""
    with pytest.raises(ItemNotFoundError, match="'params/head/kernal'; is it 'params/head/kernel'"):
        manager.restore(items=("params/encoder", "params/head/kernal"))
    with pytest.raises(ItemNotFoundError, match=r"'params/encodr'; is it 'params/encoder'\?"):
        manager.restore(items=("params/encodr",))


# ------------------------------------------------------------------ renamed


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    params = state["params"]
    return {**state, "params": {"body": params["encoder"], "head": {"w": params["head"]["kernel"]}}}


def test_leaves_and_their_parents_are_renamed(manager: CheckpointManager) -> None:
    """The longest path that fits counts."""
    rename = {"params/encoder": "params/body", "params/head/kernel": "params/head/w"}
    assert_same(renamed(make_state(5)), manager.restore(renamed(make_state(0)), rename=rename))


def test_a_function_renames(manager: CheckpointManager) -> None:
    """It is given every saved path and returns the path in `like`."""

    def rename(path: str) -> str:
        return path.replace("/encoder/", "/body/").replace("head/kernel", "head/w")

    assert_same(renamed(make_state(5)), manager.restore(renamed(make_state(0)), rename=rename))


def test_an_item_is_renamed(manager: CheckpointManager) -> None:
    """By its name alone; together with leaves in it."""
    state = make_state(0)
    like = {"model": state["params"], "stats": state["stats"], "step": 0}
    restored = manager.restore(like, rename={"params": "model"})
    assert_same(make_state(5)["params"], restored["model"])


@pytest.mark.parametrize(
    ("rename", "error", "text"),
    [
        ({"head/kernel": "head/w"}, InvalidArgumentError, r"saved at 'head/kernel'\. A path begins with its"),
        ({"parms/head": "parms/h"}, InvalidArgumentError, "nothing is saved at 'parms/head'; is it 'params/head'?"),
        ({"stat": "statistics"}, InvalidArgumentError, "nothing is saved at 'stat'; is it 'stats'?"),
        ({"params/encoda": "params/body"}, InvalidArgumentError, "nothing is saved at 'params/encoda'; is it"),
        ({"params/head/kernel": "stats/kernel"}, InvalidArgumentError, "a leaf stays in its item"),
        ({"params": "stats/x"}, InvalidArgumentError, "a leaf stays in its item"),
        ({"params/encoder/a": "params/encoder/b"}, NameCollisionError, "params/encoder/b/bias of"),
        ({1: "params"}, InvalidArgumentError, "has paths"),
        ("params", InvalidArgumentError, "a dict of paths or a function"),
        (lambda path: "elsewhere/" + path, InvalidArgumentError, "stays in its item"),
    ],
)
def test_a_wrong_rename_is_an_error(manager: CheckpointManager, rename: Any, error: Any, text: str) -> None:
    """A path that names nothing, one that leaves its item, two leaves with one name."""
    with pytest.raises(error, match=text):
        manager.restore(make_state(0), rename=rename)


# ------------------------------------------------------------------ keys that are written like paths


def haiku(value: float, name: str = "mlp") -> dict[str, Any]:
    """Parameters as Haiku names them, and keys with brackets and dots."""
    layers = {f"{name}/~/linear_{number}": {"w": np.full(2, value), "b": np.zeros(1)} for number in range(2)}
    return {"params": {**layers, "layers[0]": {"w": np.full(3, value)}, "a.b": np.full(1, value)}}


@pytest.mark.parametrize(
    ("path", "chosen"),
    [
        ("params/mlp/~/linear_0", {"mlp/~/linear_0": ("w", "b")}),
        ("params/mlp/~/linear_0/w", {"mlp/~/linear_0": ("w",)}),
        ("params/mlp/~/*/w", {"mlp/~/linear_0": ("w",), "mlp/~/linear_1": ("w",)}),
        ("params/layers[0]", {"layers[0]": ("w",)}),
        ("params/layers[0]/", {"layers[0]": ("w",)}),
    ],
)
def test_keys_with_slashes_and_brackets_are_reached_by_their_path(
    tmp_path: Path, path: str, chosen: dict[str, tuple[str, ...]]
) -> None:
    """With and without a target, and whether or not the path ends with a slash."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, haiku(5))
        manager.wait()
        params = haiku(5)["params"]
        expected = {layer: {name: params[layer][name] for name in names} for layer, names in chosen.items()}
        assert_same({"params": expected}, manager.restore(items=[path]))
        into = manager.restore(haiku(0), items=[path])["params"]
    for layer in ("mlp/~/linear_0", "mlp/~/linear_1", "layers[0]"):
        assert into[layer]["w"][0] == (5 if "w" in chosen.get(layer, ()) else 0)


@pytest.mark.parametrize(
    "rename",
    [
        {"params/mlp/~/linear_0": "params/body/~/linear_0", "params/mlp/~/linear_1/": "params/body/~/linear_1/"},
        lambda path: path.replace("/mlp/", "/body/"),
    ],
)
def test_keys_with_slashes_are_renamed(tmp_path: Path, rename: Any) -> None:
    """To keys with slashes, which need not stand for levels of the tree."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, haiku(5))
        manager.wait()
        assert_same(haiku(5, "body"), manager.restore(haiku(0, "body"), rename=rename))
        with pytest.raises(StructureMismatchError) as caught:
            manager.restore(haiku(0, "body"))
    advised = str(caught.value).split("`rename=", 1)[1].split("`", 1)[0]
    restored = CheckpointManager(tmp_path).restore(haiku(0, "body"), rename=ast.literal_eval(advised))
    assert_same(haiku(5, "body"), restored)


# ------------------------------------------------------------------ gaps


def with_gaps() -> dict[str, Any]:
    like = make_state(0)
    like["params"]["adapter"] = {"down": np.full(2, 9.0, np.float32)}
    like["ema"] = {"w": np.full(2, 8.0, np.float32)}
    del like["stats"]
    del like["params"]["head"]
    return like


def test_missing_leaves_and_items_are_kept_and_unexpected_ones_left_out(manager: CheckpointManager) -> None:
    """What was not saved keeps its value, a whole item too; what `like` lacks is not read."""
    like = with_gaps()
    restored = manager.restore(like, missing="keep", unexpected="ignore")
    assert restored["params"]["adapter"]["down"] is like["params"]["adapter"]["down"]
    assert restored["ema"]["w"] is like["ema"]["w"]
    assert_same(make_state(5)["params"]["encoder"], restored["params"]["encoder"])
    assert restored["step"] == 5


def test_one_does_not_stand_for_the_other(manager: CheckpointManager) -> None:
    """`missing="keep"` alone still refuses what is unexpected, and the other way round."""
    with pytest.raises(StructureMismatchError, match='unexpected="ignore"'):
        manager.restore(with_gaps(), missing="keep")
    with pytest.raises(ItemNotFoundError, match='missing="keep"'):
        manager.restore(with_gaps(), unexpected="ignore")


@pytest.mark.parametrize("place", ["leaf", "item"])
def test_what_has_no_value_cannot_be_kept(manager: CheckpointManager, place: str) -> None:
    """An abstract leaf that was not saved is an error, and not a hole in the state."""
    like = make_state(0)
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
    (like["params"] if place == "leaf" else like)["new"] = {"w": leaf}
    with pytest.raises(StructureMismatchError, match=r"new/w was not saved.*instead of restore_or_init\(f\)"):
        manager.restore(like, missing="keep")


def test_a_mismatch_names_the_arguments_that_would_accept_it(manager: CheckpointManager) -> None:
    """Each leaf with both shapes and dtypes, the nearest name, and what to pass."""
    params = make_state(0)["params"]
    like = {**make_state(0, np.float16), "params": {"encoders": params["encoder"], "head": params["head"]}}
    with pytest.raises(StructureMismatchError) as caught:
        manager.restore(like)
    text = str(caught.value)
    assert "missing     encoders.a.bias: `like` wants float32[2], not saved (the checkpoint has" in text
    assert "'params/encoder/b/kernel': 'params/encoders/b/kernel'" in text
    assert 'missing="keep"' in text
    assert 'unexpected="ignore"' in text
    assert "mean: saved as float32[3], `like` wants float16[3]" in text
    assert "cast=True" in text


def test_an_item_that_is_missing_is_named_with_the_nearest(manager: CheckpointManager) -> None:
    """Whether it is asked for by name or by what `like` has."""
    state = make_state(0)
    for options in (
        {"items": ["parms"]},
        {"like": {**state, "stat": state["stats"]}},
        {"like": state, "items": ["stat"]},
    ):
        with pytest.raises(ItemNotFoundError, match=r"is it '(params|stats)'\?"):
            manager.restore(**options)


# ------------------------------------------------------------------ another dtype


@pytest.mark.parametrize(
    ("saved", "wanted", "is_convertible"),
    [
        (np.ones(3), np.ones(3, int), True),
        (3, 3.0, True),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), False),
        (jax.random.key(0), np.zeros(2, np.uint32), False),
        ("text", 3, False),
        (3, "text", False),
        (np.ones(2), np.zeros(2, object), False),
        (np.ones(2), np.zeros(2, "U3"), False),
    ],
)
def test_cast_is_advised_where_it_helps(tmp_path: Path, saved: Any, wanted: Any, is_convertible: bool) -> None:
    """And is an error that says so where it does not, rather than objects in place of numbers."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"params": {"x": saved}})
        manager.wait()
        with pytest.raises(StructureMismatchError) as caught:
            manager.restore({"params": {"x": wanted}})
        assert ("`cast=True` converts arrays of another dtype" in str(caught.value)) == is_convertible
        if is_convertible:
            assert_same({"params": {"x": wanted}}, manager.restore({"params": {"x": wanted}}, cast=True))
        else:
            with pytest.raises(StructureMismatchError, match="only numbers into numbers, and no key"):
                manager.restore({"params": {"x": wanted}}, cast=True)


@pytest.mark.parametrize("kind", ["numpy", "jax", "abstract", "none"])
def test_floating_arrays_come_back_in_the_dtype_that_is_asked_for(manager: CheckpointManager, kind: str) -> None:
    """`cast=dtype` converts floating-point arrays and nothing else, whatever `like` has."""
    state = make_state(0)
    arrays = jax.tree.map(jnp.asarray, state)
    like = {"numpy": state, "jax": arrays, "abstract": jax.eval_shape(lambda: arrays), "none": None}[kind]
    restored = manager.restore(like, cast=jnp.bfloat16)
    assert restored["params"]["head"]["kernel"].dtype == jnp.bfloat16
    assert isinstance(restored["params"]["head"]["kernel"], np.ndarray if kind in ("numpy", "none") else jax.Array)
    assert restored["stats"]["count"].dtype == jnp.int32
    assert restored["stats"]["mean"][0] == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cast": "float31"}, "True, False or a dtype"),
        ({"cast": np.int32}, "only floating-point"),
        ({"missing": "ignore"}, '"error" or "keep"'),
        ({"unexpected": "keep"}, '"error" or "ignore"'),
        ({"items": "params"}, "list of names"),
        ({"items": (3,)}, r"strings; got \[3\]"),
    ],
)
def test_wrong_options_are_told(manager: CheckpointManager, options: dict[str, Any], text: str) -> None:
    """Before anything is read."""
    with pytest.raises(InvalidArgumentError, match=text):
        manager.restore(make_state(0), **options)


def test_options_that_fit_a_target_need_one(manager: CheckpointManager) -> None:
    """Without `like` there is nothing to fit."""
    with pytest.raises(InvalidArgumentError, match="none was given"):
        manager.restore(missing="keep")


# ------------------------------------------------------------------ from another run


def make_train_state(seed: int, width: int = 4) -> Any:
    model = nn.Sequential([nn.Dense(8), nn.Dense(width)])
    params = model.init(jax.random.key(seed), jnp.ones((1, 3)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))


def test_a_run_begins_with_the_parameters_of_another_and_goes_on_with_its_own(tmp_path: Path) -> None:
    """Only at the first start: the optimizer is new, the step is 0, and afterwards its own checkpoints count."""
    base = make_train_state(0)
    with CheckpointManager(tmp_path / "base") as manager:
        manager.save(100, base.replace(step=100))
    with CheckpointHook(tmp_path / "tuned", every_n_steps=1, init_from=tmp_path / "base") as hook:
        state = hook.restore(make_train_state(1))
        assert hook.start_step == 0
        assert state.step == 0
        assert_same(base.params, state.params)
        tuned = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
        hook(1, tuned)
    with CheckpointHook(tmp_path / "tuned", init_from=tmp_path / "base") as hook:
        state = hook.restore_or_init(make_train_state, 2)
        assert hook.start_step == 1
        assert_same(tuned.params, state.params)
        assert_same(tuned.opt_state, state.opt_state)


def test_restore_or_init_fills_what_it_has_made(tmp_path: Path) -> None:
    """From one checkpoint of the other run, with a new head."""
    base = make_train_state(0)
    with CheckpointManager(tmp_path / "base") as manager:
        manager.save(1, base)
        manager.save(2, make_train_state(3))
    origin = InitFrom(tmp_path / "base" / "1", items=("params/layers_0",))
    with CheckpointHook(tmp_path / "tuned", init_from=origin) as hook:
        state = hook.restore_or_init(lambda: make_train_state(1, width=7))
    assert_same(base.params["layers_0"], state.params["layers_0"])
    assert_same(make_train_state(1, width=7).params["layers_1"], state.params["layers_1"])


def test_init_from_where_there_is_nothing_is_an_error(tmp_path: Path) -> None:
    """A fine-tuning that silently began with random parameters would be lost time."""
    with (
        CheckpointHook(tmp_path / "tuned", init_from=tmp_path / "typo") as hook,
        pytest.raises(CheckpointNotFoundError, match="typo has no checkpoint"),
    ):
        hook.restore(make_state(0))
    with pytest.raises(InvalidArgumentTypeError, match="got 3"):
        CheckpointHook(tmp_path / "tuned", init_from=3)
    with pytest.raises(InvalidArgumentError, match='"error" or "keep"'):
        InitFrom("base", missing="none")  # type: ignore[arg-type]


def test_a_state_without_params_is_told_which_items_to_name(tmp_path: Path) -> None:
    """`init_from` means the item `params` unless it says otherwise, as it has to where a state has no such part."""
    with CheckpointManager(tmp_path / "base") as manager:
        manager.save(1, {"model": np.ones(2), "step": 1})
    like = {"model": np.zeros(2), "step": 0}
    with (
        CheckpointHook(tmp_path / "tuned", init_from=tmp_path / "base") as hook,
        pytest.raises(ItemNotFoundError, match=r"no part \['params'\].*InitFrom\('.*base', items=\('model',\)\)"),
    ):
        hook.restore(like)
    for items in (("model",), iter(["model"])):
        assert_same({"model": np.ones(2), "step": 0}, InitFrom(tmp_path / "base", items=items).fill(like))
