"""`compression="zstd"`: smaller, as safe, and Orbax reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest

from ckpt_hooks import ArrayOptions, Checkpointer, CheckpointManager, StandardCheckpointHandler
from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import layout
from ckpt_hooks.storage.compression import decompressed
from ckpt_hooks.storage.foreign import ForeignArrays
from tests.sameness import bits, typed_bits

COMPRESSED = ArrayOptions(compression="zstd")


def state() -> dict[str, Any]:
    return {
        "zeros": jnp.zeros((700, 900)),
        "noise": jax.random.normal(jax.random.key(0), (3000,)),
        "large": np.tile(np.arange(1 << 12, dtype=np.int64), 600),  # 19 MiB: more than one block
        "many": {f"w{i}": jnp.full((37, 41), i, jnp.float32) for i in range(150)},
        "none": np.zeros((0, 3), np.float32),
        "half": jnp.ones((50, 3), jnp.bfloat16),
        "step": 12,
        "name": "adam",
    }


def nbytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("d/*"))


def save(path: Path, options: ArrayOptions, tree: Any) -> None:
    with Checkpointer(StandardCheckpointHandler(options)) as checkpointer:
        checkpointer.save(path, tree)


def test_a_compressed_checkpoint_restores_bit_equal_and_is_smaller(tmp_path: Path) -> None:
    """Every kind of leaf comes back as it was, from a fraction of the bytes."""
    save(tmp_path / "plain", ArrayOptions(), state())
    save(tmp_path / "zstd", COMPRESSED, state())
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:  # who restores need not say how it was saved
        assert typed_bits(checkpointer.restore(tmp_path / "zstd", state())) == typed_bits(state())
        assert bits(checkpointer.restore(tmp_path / "zstd")) == bits(state())
    assert nbytes_of(tmp_path / "zstd") < nbytes_of(tmp_path / "plain") / 5


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_orbax_restores_a_compressed_checkpoint(tmp_path: Path) -> None:
    """The compressor is zarr's, so Orbax needs to know nothing of us."""
    tree = {name: leaf for name, leaf in state().items() if name != "none"}  # Orbax has no arrays of size zero
    save(tmp_path / "zstd", COMPRESSED, tree)
    with orbax.PyTreeCheckpointer() as checkpointer:
        assert bits(checkpointer.restore(tmp_path / "zstd")) == bits(tree)


def test_tensorstore_finds_the_same_arrays(tmp_path: Path) -> None:
    """What we write compressed, the reference reader of the format reads."""
    save(tmp_path / "zstd", COMPRESSED, state())
    names = ["zeros", "noise", "large", "many.w7", "step"]
    found = ForeignArrays(str(tmp_path / "zstd"), names, use_ocdbt=True, use_zarr3=False).read(names)
    assert all(found[name].tobytes() == np.asarray(state()[name]).tobytes() for name in names if "." not in name)
    assert found["many.w7"].tobytes() == np.asarray(state()["many"]["w7"]).tobytes()


def test_a_flipped_bit_in_compressed_bytes_is_found(tmp_path: Path) -> None:
    """The checksums are of the bytes on the disk, compressed or not."""
    save(tmp_path / "zstd", COMPRESSED, {"w": jax.random.normal(jax.random.key(0), (50, 50))})
    path = tmp_path / "zstd" / layout.data_file_name(0)
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with Checkpointer(StandardCheckpointHandler()) as checkpointer:
            try:
                restored = checkpointer.restore(tmp_path / "zstd")
            except CorruptCheckpointError:
                continue
        np.testing.assert_array_equal(restored["w"], jax.random.normal(jax.random.key(0), (50, 50)))


@pytest.mark.parametrize("content", [b"", b"no frame", bytes(100)])
def test_what_is_no_compressed_chunk_is_damage(content: bytes) -> None:
    """Bytes that do not decompress, or to another length, are damage by name, not a wrong value."""
    with pytest.raises(CorruptCheckpointError, match="here"):
        decompressed(memoryview(content), 1000, "here")


def test_a_manager_compresses_and_goes_on_without(tmp_path: Path) -> None:
    """A run may begin compressed and go on without; each checkpoint says of itself how it is stored."""
    for step, compression in ((1, "zstd"), (2, None)):
        with CheckpointManager(tmp_path, compression=compression) as manager:  # type: ignore[arg-type]
            manager.save(step, {"params": {"w": jnp.zeros((500, 500))}, "step": step})
            manager.wait()
            assert manager.verify(step) == []
    assert nbytes_of(tmp_path / "1") < nbytes_of(tmp_path / "2") / 50
    assert [CheckpointManager(tmp_path).restore(step=step)["step"] for step in (1, 2)] == [1, 2]
