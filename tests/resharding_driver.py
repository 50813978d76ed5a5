"""One process with 8 CPU devices: what is saved in one mesh is restored in another, by us and through Orbax.

Writes one JSON object to the file that it is given: {case: "equal", or what went wrong}.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_hooks

Specs = tuple[tuple[Any, ...], tuple[Any, ...]]  # of a matrix, and of a vector

# {name: (shape of the mesh, the devices that it takes, how a matrix and a vector are cut)}; of the axes x, y, z
MESHES: dict[str, tuple[tuple[int, ...], slice, Specs]] = {
    "rows of 8": ((8,), slice(8), (("x",), ("x",))),
    "columns of 8": ((8,), slice(8), ((None, "x"), ("x",))),
    "rows of 2": ((2,), slice(2), (("x",), ("x",))),
    "rows of 3": ((3,), slice(1, 4), (("x",), ("x",))),  # chunks that are no multiple of each other's
    "columns of 5": ((5,), slice(5), ((None, "x"), (None,))),
    "4 x 2": ((4, 2), slice(8), (("x", "y"), ("x",))),
    "2 x 4": ((2, 4), slice(8), (("x", "y"), ("y",))),
    "2 x 4 transposed": ((2, 4), slice(8), (("y", "x"), (("x", "y"),))),
    "2 x 2 x 2": ((2, 2, 2), slice(8), ((("x", "z"), "y"), (("z", "x"),))),
    "partly replicated": ((4, 2), slice(8), (("x",), ("y",))),
    "replicated": ((4, 2), slice(8), ((), ())),
    "backwards": ((8,), slice(None, None, -1), (("x",), ("x",))),
    "the last of 8": ((1,), slice(7, 8), (("x",), ())),
}
FLAX_LEAVES = ("kernel", "bias", "count")
ONE_DEVICE, NUMPY, ABSTRACT = "one device", "NumPy", "no shardings"

PAIRS = [
    *[(name, other) for name in ("rows of 8", "4 x 2") for other in MESHES],
    *[
        (name, "2 x 4")
        for name in ("columns of 8", "rows of 3", "columns of 5", "2 x 2 x 2", "replicated", "backwards")
    ],
    *[("2 x 4 transposed", other) for other in ("rows of 3", "columns of 5", "backwards", "partly replicated")],
    *[(name, other) for name in ("2 x 4", "partly replicated", "rows of 3") for other in (ONE_DEVICE, NUMPY, ABSTRACT)],
    *[(ONE_DEVICE, other) for other in ("rows of 8", "columns of 5", "2 x 4 transposed", "replicated")],
    *[(NUMPY, other) for other in ("4 x 2", "backwards")],
]
THROUGH_ORBAX = [
    ("4 x 2", "2 x 4 transposed"),
    ("rows of 8", "columns of 5"),
    ("rows of 3", "2 x 2 x 2"),
    ("replicated", "columns of 8"),
    ("2 x 4", "replicated"),
    ("partly replicated", ONE_DEVICE),
    ("2 x 2 x 2", NUMPY),
    ("2 x 4", ABSTRACT),
]


def values() -> dict[str, np.ndarray]:
    """Arrays of many dtypes and sizes; each axis is a multiple of 2, 3, 5 and 8."""
    random = np.random.default_rng(0)
    return {
        "kernel": random.standard_normal((240, 120)).astype(np.float32),
        "large": random.standard_normal((1200, 1200)).astype(np.float32),  # chunks of several pieces
        "half": random.standard_normal((120, 120)).astype(jax.numpy.bfloat16),
        "bias": np.arange(120, dtype=np.int32),
        "mask": np.arange(240) % 3 == 0,
        "count": np.asarray(7, np.int32),
    }


def key_data() -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(3), 120)))


def sharding(name: str, ndim: int) -> jax.sharding.Sharding:
    if name == ONE_DEVICE:
        return jax.sharding.SingleDeviceSharding(jax.devices()[5])
    shape, devices, (matrix, vector) = MESHES[name]
    mesh = Mesh(np.array(jax.devices()[devices]).reshape(shape), ("x", "y", "z")[: len(shape)])
    return NamedSharding(mesh, PartitionSpec(*{0: (), 1: vector, 2: matrix}[ndim]))


def state(name: str) -> Any:
    if name == NUMPY:
        return values()
    arrays: dict[str, Any] = {
        leaf: jax.device_put(value, sharding(name, value.ndim)) for leaf, value in values().items()
    }
    arrays["keys"] = jax.device_put(jax.random.wrap_key_data(jax.numpy.asarray(key_data())), sharding(name, 1))
    return arrays


def target(name: str, leaf: str) -> Any:
    value = jax.random.split(jax.random.key(0), 120) if leaf == "keys" else values()[leaf]
    if name == NUMPY and leaf != "keys":
        return np.zeros_like(value)
    how = None if name in (NUMPY, ABSTRACT) else sharding(name, value.ndim)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=how)


def check(restored: Any, name: str, saved_in: str) -> None:
    name = saved_in if name == ABSTRACT else name
    for leaf, found in restored.items():
        is_keys = leaf == "keys"
        expected = key_data() if is_keys else values()[leaf]
        plain = jax.random.key_data(found) if is_keys else found
        assert not is_keys or found.dtype == jax.random.key(0).dtype
        if name != NUMPY:
            how = sharding(name, found.ndim)
            is_there = found.sharding.is_equivalent_to(how, 1) if is_keys else found.sharding == how
            assert is_there and found.committed, f"{leaf}: {found.sharding}"
        assert name != NUMPY or is_keys or type(found) is np.ndarray
        assert plain.dtype == expected.dtype
        assert np.asarray(plain).tobytes() == expected.tobytes(), f"{leaf} differs"
        for shard in getattr(plain, "addressable_shards", ()):
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), f"{leaf} on {shard.device}"


def orbax(use_zarr3: bool = False, **options: Any) -> Any:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=use_zarr3), **options)


def cases(folder: Path) -> dict[str, Callable[[], None]]:
    ours = ckpt_hooks.Checkpointer(ckpt_hooks.StandardCheckpointHandler())
    theirs = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def like(saved: Any, name: str) -> Any:
        return {leaf: target(name, leaf) for leaf in saved}

    def once(kind: str, name: str, save: Callable[[Path, Any], None]) -> tuple[Path, Any]:
        path, saved = folder / kind / name, state(name)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            save(path, saved)
        return path, saved

    def we_both(name: str, other: str) -> None:
        path, saved = once("ours", name, ours.save)
        check(ours.restore(path, like(saved, other)), other, name)

    def orbax_writes(name: str, other: str, zarr3: bool) -> None:
        def save(path: Path, saved: Any) -> None:
            (orbax(zarr3) if zarr3 else theirs).save(path, saved)

        path, saved = once("zarr3" if zarr3 else "theirs", name, save)
        check(ours.restore(path, like(saved, other)), other, name)

    def orbax_restores(name: str, other: str) -> None:
        path, saved = once("ours", name, ours.save)
        wanted = ocp.args.StandardRestore(like(saved, other))
        check(theirs.restore(path, args=wanted), other, name)

    def compressed(name: str, other: str) -> None:
        def save(path: Path, saved: Any) -> None:
            with ckpt_hooks.CheckpointManager(path, compression="zstd") as manager:
                manager.save(1, {"all": saved})

        path, saved = once("zstd", name, save)
        restored = ckpt_hooks.CheckpointManager(path).restore({"all": like(saved, other)})
        check(restored["all"], other, name)

    found: dict[str, Callable[[], None]] = {}
    for pair in PAIRS:
        found[" -> ".join(pair)] = functools.partial(we_both, *pair)
    for pair in THROUGH_ORBAX:
        found["Orbax: " + " -> ".join(pair)] = functools.partial(orbax_writes, *pair, False)
        found["Orbax, zarr3: " + " -> ".join(pair)] = functools.partial(orbax_writes, *pair, True)
        found["zstd: " + " -> ".join(pair)] = functools.partial(compressed, *pair)
        if pair[1] != ABSTRACT:
            found[" -> Orbax: ".join(pair)] = functools.partial(orbax_restores, *pair)
    return found


def cast_and_renamed(folder: Path) -> None:
    """Converted and renamed leaves are spread as well."""
    with ckpt_hooks.CheckpointManager(folder / "changed") as manager:
        manager.save(1, {"p": {"w": jax.device_put(values()["kernel"], sharding("4 x 2", 2)), "n": 3}})
        manager.wait()
        how = sharding("2 x 4", 2)
        like = {"p": {"v": jax.ShapeDtypeStruct((240, 120), jax.numpy.bfloat16, sharding=how), "n": 0}}
        restored = manager.restore(like, cast=True, rename={"p/w": "p/v"})["p"]
    assert restored["v"].sharding == how
    assert restored["n"] == 3
    np.testing.assert_array_equal(np.asarray(restored["v"]), values()["kernel"].astype(jax.numpy.bfloat16))


def flax_file(folder: Path) -> None:
    """What Flax wrote into one file is spread over devices, and goes to one where nothing is asked for."""
    path = folder / "weights.msgpack"
    path.write_bytes(serialization.to_bytes({leaf: np.asarray(values()[leaf], copy=True) for leaf in FLAX_LEAVES}))
    check(ckpt_hooks.restore(path, {leaf: target("2 x 4", leaf) for leaf in FLAX_LEAVES}), "2 x 4", "")
    abstract = ckpt_hooks.restore(path, {leaf: target(ABSTRACT, leaf) for leaf in FLAX_LEAVES})
    assert abstract["kernel"].devices() == {jax.devices()[0]}


def one_array_of_orbax(folder: Path) -> None:
    """An item that is one array has its saved sharding again where none is asked for, and any that is."""
    array = jax.device_put(values()["kernel"], sharding("4 x 2", 2))
    with ocp.CheckpointManager(folder / "one array") as manager:
        manager.save(1, args=ocp.args.Composite(w=ocp.args.ArraySave(array)))
        manager.wait_until_finished()
    for how in ("4 x 2", "2 x 4"):
        given = None if how == "4 x 2" else sharding(how, 2)
        like = {"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=given)}
        restored = ckpt_hooks.restore(folder / "one array" / "1", like)["w"]
        assert restored.sharding.is_equivalent_to(sharding(how, 2), 2), restored.sharding
        assert np.asarray(restored).tobytes() == values()["kernel"].tobytes()


def weakly_typed(folder: Path) -> None:
    """A weakly typed array is one again in every sharding."""
    weak = jax.numpy.full(values()["kernel"].shape, 0.5).at[...].set(values()["kernel"])
    with ckpt_hooks.CheckpointManager(folder / "weak") as manager:
        manager.save(1, {"w": jax.device_put(weak, sharding("4 x 2", 2))})
        manager.wait()
        for how in ("4 x 2", "2 x 4"):
            like = jax.ShapeDtypeStruct(weak.shape, weak.dtype, sharding=sharding(how, 2), weak_type=True)
            restored = manager.restore({"w": like})["w"]
            assert restored.weak_type and restored.sharding == sharding(how, 2), restored.sharding
            assert np.asarray(restored).tobytes() == values()["kernel"].tobytes()


def devices_that_are_not_here(folder: Path) -> None:
    """Where the saved devices are not here and nothing is asked for, all goes to one, and a log line says so."""
    with ckpt_hooks.CheckpointManager(folder / "elsewhere") as manager:
        manager.save(1, {"p": state("4 x 2")})
        manager.wait()
    file = folder / "elsewhere" / "1" / "p" / "_sharding"
    before = file.read_bytes()
    assert b'\\"id\\": 7' in before
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener = Listener()
    logging.getLogger("ckpt_hooks.shards").addHandler(listener)
    file.write_bytes(before.replace(b'\\"id\\": 7', b'\\"id\\": 9'))
    item = ckpt_hooks.StandardCheckpointHandler()
    like = {leaf: target(ABSTRACT, leaf) for leaf in state("4 x 2")}
    restored = item.restore(epath.Path(file.parent), ckpt_hooks.args.StandardRestore(like))
    for leaf, value in values().items():
        assert restored[leaf].devices() == {jax.devices()[0]}
        assert np.asarray(restored[leaf]).tobytes() == value.tobytes()
    (message,) = messages
    assert "7 arrays were saved on devices that are not here" in message, message


def main() -> None:
    report = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        found = cases(folder)
        for more in (cast_and_renamed, flax_file, one_array_of_orbax, weakly_typed, devices_that_are_not_here):
            found[more.__name__] = functools.partial(more, folder)
        for name, case in found.items():
            try:
                case()
                report[name] = "equal"
            except Exception:
                report[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
