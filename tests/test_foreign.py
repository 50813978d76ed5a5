"""Arrays that another library wrote: what tensorstore reads one by one, and not more work than it takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage import direct, foreign
from ckpt_hooks.storage.array_info import ArrayInfo
from ckpt_hooks.storage.foreign import ForeignArrays
from ckpt_hooks.storage.zarr import ArrayKind

Arrays = dict[str, np.ndarray]

DTYPES = [np.dtype(name) for name in ("bool", "int8", "uint16", "int64", "float16", "float32", "complex64")] + [
    np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "int4")
]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7, 5), (3, 1, 4), (0, 3), (40, 40)]


def make_array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(1, 7, shape)  # no zero, which chunks that are lacking would have
    return np.asarray(values + 1j * values if dtype.kind == "c" else values).astype(dtype)


def bytes_of(arrays: Arrays) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


# ------------------------------------------------------------------ layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an item is kept: where, and of which zarr metadata, given the shape of an array.

    Attributes:
      extra: fields of every array's metadata.
      chunk: the shape of a chunk, of at most 3 in each axis or the whole array.
      filled: whether chunks that are lacking have a value.
      inner: whether a chunk is a shard of one or of several chunks ("one", "several").
      index: where a shard has its index.
    """

    ocdbt: bool = True
    zarr3: bool = False
    extra: Any = dataclasses.field(default_factory=dict)
    chunks: bool = False
    inner: str = ""
    index: str = "end"
    filled: bool = False

    def spec(self, path: Path, name: str, array: np.ndarray) -> dict[str, Any]:
        chunk = [min(3, max(1, n)) if self.chunks else max(1, n) for n in array.shape]
        files = {"driver": "file", "path": f"{path}/"}
        store: dict[str, Any] = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        metadata = {"shape": list(array.shape), **self.extra}
        if array.ndim < 2:
            metadata.pop("order", None)  # tensorstore refuses it
        if self.zarr3:
            metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
            if self.inner:
                metadata["codecs"] = [self._sharding(chunk, metadata["codecs"])]
        else:
            metadata["chunks"] = chunk
        return {
            "driver": "zarr3" if self.zarr3 else "zarr",
            "kvstore": store if self.ocdbt else {"driver": "file", "path": f"{path}/{name}/"},
            "metadata": metadata,
            "dtype": ts.dtype(array.dtype).name,
            "store_data_equal_to_fill_value": True,
        }

    def _sharding(self, chunk: list[int], codecs: list[Any]) -> Any:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        inner = [1 if self.inner == "several" else n for n in chunk]
        configuration = {"chunk_shape": inner, "codecs": codecs, "index_codecs": index, "index_location": self.index}
        return {"name": "sharding_indexed", "configuration": configuration}

    def write(self, path: Path, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self.create(path, name, array).write(array).result()

    def create(self, path: Path, name: str, array: np.ndarray) -> Any:
        """An array like this one, with no chunk yet."""
        options: dict[str, Any] = {"fill_value": np.ones((), array.dtype)} if self.filled else {}
        return ts.open(self.spec(path, name, array), create=True, context=_CONTEXT, **options).result()

    def open(self, path: Path, names: Any, **options: Any) -> ForeignArrays:
        return ForeignArrays(str(path), names, use_ocdbt=self.ocdbt, use_zarr3=self.zarr3, **options)


_CONTEXT = ts.Context({"file_io_sync": False})  # what a test writes need not be durable

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": 3}}
_PLAIN, _ZSTD2 = {"compressor": None}, {"compressor": {"id": "zstd", "level": 1}}
_PLAIN3, _ZSTD3 = {"codecs": [_BYTES]}, {"codecs": [_BYTES, _ZSTD]}

LAYOUTS = {
    "zarr2": Layout(extra=_PLAIN),
    "zarr2, zstd": Layout(extra=_ZSTD2),
    "zarr2, F order": Layout(extra=_PLAIN | {"order": "F"}),
    "zarr2, blosc": Layout(extra={"compressor": {"id": "blosc"}}),
    "zarr2, zstd, chunks": Layout(extra=_ZSTD2, chunks=True),
    "zarr2, chunks between slashes": Layout(extra=_PLAIN | {"dimension_separator": "/"}, chunks=True),
    "zarr2, files": Layout(ocdbt=False, extra=_ZSTD2, chunks=True),
    "zarr2, zlib, fill value": Layout(extra={"compressor": {"id": "zlib", "level": 1}}, filled=True),
    "zarr3": Layout(zarr3=True, extra=_PLAIN3),
    "zarr3, zstd": Layout(zarr3=True, extra=_ZSTD3),
    "zarr3, zstd, chunks": Layout(zarr3=True, extra=_ZSTD3, chunks=True),
    "zarr3, checksums": Layout(zarr3=True, extra={"codecs": [_BYTES, {"name": "crc32c"}]}),
    "zarr3, keys of v2": Layout(zarr3=True, extra=_PLAIN3 | {"chunk_key_encoding": {"name": "v2"}}, chunks=True),
    "zarr3, shards": Layout(zarr3=True, extra=_PLAIN3, inner="one"),
    "zarr3, index before the shard": Layout(zarr3=True, extra=_PLAIN3, inner="one", index="start"),
    "zarr3, big endian": Layout(
        zarr3=True, extra={"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, inner="one"
    ),
    "zarr3, zstd, shards": Layout(zarr3=True, extra=_ZSTD3, inner="one"),
    "zarr3, shards of several": Layout(zarr3=True, extra=_ZSTD3, inner="several"),
    "zarr3, chunks and shards": Layout(zarr3=True, extra=_ZSTD3, chunks=True, inner="several"),
    "zarr3, files": Layout(ocdbt=False, zarr3=True, extra=_ZSTD3, inner="one"),
    "zarr3, transposed": Layout(
        zarr3=True, extra={"codecs": [{"name": "transpose", "configuration": {"order": "F"}}, _BYTES]}, chunks=True
    ),
    "zarr3, with attributes": Layout(zarr3=True, extra=_PLAIN3 | {"attributes": {"a": 1}}),
}


@pytest.fixture(params=["many at once", "one by one", "one by one, two in flight"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which arrays are read."""
    if request.param != "many at once":
        monkeypatch.setattr(foreign, "_SMALL_BYTES", 0)
    if request.param.endswith("in flight"):
        monkeypatch.setattr(foreign, "_IN_FLIGHT_BYTES", 1)
    return str(request.param)


def assert_as_tensorstore_reads(layout: Layout, path: Path, arrays: Arrays, **options: Any) -> None:
    ours = layout.open(path, arrays, **options)
    found = ours.read(arrays)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        spec = layout.spec(path, name, array) | {"fill_missing_data_reads": options.get("fill_missing", False)}
        store = ts.open(spec, open=True, context=_CONTEXT).result()
        expected = np.asarray(store.read().result())
        for value in (found[name], ours.info(name)):
            assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        assert ours.info(name).chunk_shape == (store.chunk_layout.read_chunk.shape or ()), name
        assert found[name].tobytes() == expected.tobytes(), name


def forbid_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once falls back to one by one, which would hide its errors."""

    def read_each(ours: ForeignArrays, names: Sequence[str], memory: object) -> Arrays:
        assert not names
        return {}

    monkeypatch.setattr(ForeignArrays, "_read_each", read_each)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_are_what_tensorstore_reads(
    layout: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout, arrays of any dtype and shape are bit for bit what tensorstore reads from them one by one."""
    if way == "many at once" and layout != "zarr3, transposed":
        forbid_one_by_one(monkeypatch)
    arrays = {
        f"{dtype.name}.{number}": make_array(shape, dtype, number)
        for dtype in DTYPES
        for number, shape in enumerate(SHAPES)
    }
    LAYOUTS[layout].write(tmp_path, arrays)
    assert_as_tensorstore_reads(LAYOUTS[layout], tmp_path, arrays)


FORMS = {
    "zarr2": "bytes",
    "zarr3": "bytes",
    "zarr3, with attributes": "bytes",
    "zarr3, shards": "shard",
    "zarr2, zstd": "zstd",
    "zarr3, zstd": "zstd",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_whole_chunks_are_read_without_tensorstore(layout: str, tmp_path: Path) -> None:
    """Only an array in one chunk that holds nothing but its bytes, or these in zstd, is read without tensorstore."""
    array = make_array((4, 5), np.dtype("f4"))
    store = LAYOUTS[layout].create(tmp_path, "w", array)
    kind = ArrayKind(ArrayInfo(array.shape, array.dtype, array.shape), store.spec().to_json()["metadata"])
    assert kind.form == FORMS.get(layout)


# ------------------------------------------------------------------ what is lacking, what is damaged

FILLED = {
    "zarr2": Layout(extra=_ZSTD2, chunks=True, filled=True),
    "zarr2, files": Layout(ocdbt=False, extra=_PLAIN, chunks=True, filled=True),
    "zarr3": Layout(zarr3=True, extra=_ZSTD3, chunks=True, filled=True),
    "zarr3, shards": Layout(zarr3=True, extra=_PLAIN3, chunks=True, filled=True, inner="several"),
}


@pytest.mark.parametrize("layout", FILLED.values(), ids=FILLED)
def test_a_lacking_chunk_is_damage_unless_it_may_lack(layout: Layout, way: str, tmp_path: Path) -> None:
    """A chunk that is not there is an error that names the array, and the fill value only where that was asked for."""
    arrays = {f"{dtype.name}.{len(shape)}": make_array(shape, dtype) for dtype in DTYPES for shape in ((), (7, 5))}
    for name, array in arrays.items():
        store = layout.create(tmp_path, name, array)
        if array.shape:
            store[4:].write(array[4:]).result()
    assert_as_tensorstore_reads(layout, tmp_path, arrays, fill_missing=True)
    with pytest.raises(CorruptCheckpointError, match=r"array '\w+\.[02]' cannot be read.*missing"):
        layout.open(tmp_path, arrays).read(arrays)


def damaged_item(tmp_path: Path, damage: Callable[[bytes], bytes]) -> tuple[Layout, Arrays]:
    """An item of which the data of the array `w13` is damaged."""
    layout = LAYOUTS["zarr2, files"]
    arrays = {f"w{number}": make_array((20, 3), np.dtype("f4"), number) for number in range(20)}
    layout.write(tmp_path, arrays)
    chunk = tmp_path / "w13" / "2.0"
    chunk.write_bytes(damage(chunk.read_bytes()))
    return layout, arrays


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"", lambda content: b"!" * 40])
def test_the_damaged_array_is_named(tmp_path: Path, way: str, damage: Callable[[bytes], bytes]) -> None:
    """Where one of many arrays cannot be decoded, the error has the directory and the name of that one."""
    layout, arrays = damaged_item(tmp_path, damage)
    with pytest.raises(CorruptCheckpointError, match=rf"{tmp_path}: array 'w13' cannot be read: "):
        layout.open(tmp_path, arrays).read(arrays)


def test_damage_in_one_array_does_not_hurt_the_others(tmp_path: Path, way: str) -> None:
    """Arrays that are asked for are read though another one is damaged."""
    layout, arrays = damaged_item(tmp_path, lambda content: b"")
    others = {name: array for name, array in arrays.items() if name != "w13"}
    found = layout.open(tmp_path, arrays).read(others)
    assert bytes_of(found) == bytes_of(others)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"zarr_format": 2, "shape": [3], "chunks": [3]}'])
def test_metadata_that_lacks_or_is_damaged_names_the_array(tmp_path: Path, content: bytes | None) -> None:
    """An array without metadata, or with metadata that says too little, is an error that names it."""
    layout = LAYOUTS["zarr2, files"]
    arrays = {name: make_array((3,), np.dtype("f4")) for name in ("a", "b")}
    layout.write(tmp_path, arrays)
    metadata = tmp_path / "b" / ".zarray"
    metadata.unlink() if content is None else metadata.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=rf"{tmp_path}: array 'b' cannot be read: "):
        layout.open(tmp_path, arrays)


def test_a_data_file_that_is_gone_names_an_array(tmp_path: Path, way: str) -> None:
    """Where a data file of a database is gone, the error names an array that was in it."""
    layout = LAYOUTS["zarr2, zstd"]
    layout.write(tmp_path, {"a": make_array((40, 40), np.dtype("f4"))})
    before = set((tmp_path / "d").iterdir())
    layout.write(tmp_path, {"b": make_array((40, 40), np.dtype("f4"))})
    ours = layout.open(tmp_path, ["a", "b"])
    for path in before:
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match="array 'a' cannot be read"):
        ours.read(["a", "b"])


@pytest.mark.parametrize("damaged", [6400, 6408, 6416, 6419])
def test_a_damaged_index_of_a_shard_is_found(tmp_path: Path, way: str, damaged: int) -> None:
    """A shard whose index is not what it was is an error that names the array, also where its bytes are the array."""
    layout = LAYOUTS["zarr3, shards"]
    arrays = {name: make_array((40, 40), np.dtype("f4"), seed) for seed, name in enumerate("ab")}
    layout.write(tmp_path, arrays)
    for path in (tmp_path / "d").iterdir():
        content = bytearray(path.read_bytes())
        start = content.find(arrays["b"].tobytes())
        if start >= 0:
            content[start + damaged] ^= 1
            path.write_bytes(content)
    ours = layout.open(tmp_path, arrays)
    assert bytes_of(ours.read("a")) == bytes_of({"a": arrays["a"]})
    with pytest.raises(CorruptCheckpointError, match="array 'b' cannot be read"):
        ours.read("ab")


def test_a_cut_data_file_names_an_array(tmp_path: Path, way: str) -> None:
    """Where a data file ends too early, the error names an array that would have been there."""
    layout = LAYOUTS["zarr2"]
    layout.write(tmp_path, {"w": make_array((40, 40), np.dtype("f4"))})
    ours = layout.open(tmp_path, ["w"])
    for path in (tmp_path / "d").iterdir():
        path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(CorruptCheckpointError, match="array 'w' cannot be read"):
        ours.read(["w"])


# ------------------------------------------------------------------ the index


@pytest.mark.parametrize("node_bytes", [300, 1000])
def test_an_index_of_many_nodes_is_read_whole(tmp_path: Path, node_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database whose index is a tree of nodes, which leave out what their keys have in common, has all its arrays."""
    forbid_one_by_one(monkeypatch)
    layout = LAYOUTS["zarr2, zstd"]
    config = {"max_decoded_node_bytes": node_bytes, "max_inline_value_bytes": 200}
    base = {"driver": "file", "path": f"{tmp_path}/"}
    ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}, context=_CONTEXT).result().write(
        "x", b""
    ).result()
    arrays = {f"params.block_{i}.kernel": make_array((i % 3, 10, 9), np.dtype("f4"), i) for i in range(40)}
    layout.write(tmp_path, arrays)
    assert_as_tensorstore_reads(layout, tmp_path, arrays)


def test_a_data_file_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files are found by their names, whatever characters those have."""
    forbid_one_by_one(monkeypatch)
    layout = LAYOUTS["zarr2"]
    base = {"driver": "file", "path": f"{tmp_path}/"}
    spec = {"driver": "ocdbt", "base": base, "value_data_prefix": "a b:c%20/d/"}
    value = make_array((40, 40), np.dtype("f4"))
    layout.write(tmp_path, {"w": value})
    store = ts.KvStore.open(spec, context=_CONTEXT).result()
    store.write("w/0.0", (value + 1).tobytes()).result()
    assert list((tmp_path / "a b:c%20" / "d").iterdir()) != []
    assert layout.open(tmp_path, ["w"]).read(["w"])["w"].tobytes() == (value + 1).tobytes()


# ------------------------------------------------------------------ work and memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensorstore's functions that were called."""
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(ts, "open", counted("open", ts.open))
    monkeypatch.setattr(ts.ocdbt, "dump", counted("dump", ts.ocdbt.dump))
    return made


@pytest.mark.parametrize("layout", ["zarr2, zstd", "zarr3, shards", "zarr3, zstd, chunks", "zarr2, files"])
def test_work_does_not_grow_with_the_leaves(layout: str, tmp_path: Path, calls: list[str]) -> None:
    """A hundred small arrays of two shapes take as few opens, and as few looks at the index, as ten."""
    counts = []
    for number in (10, 100):
        arrays = {f"w{i}": make_array((10, 20 + i % 2), np.dtype("f4"), i) for i in range(number)}
        LAYOUTS[layout].write(tmp_path / str(number), arrays)
        calls.clear()
        LAYOUTS[layout].open(tmp_path / str(number), arrays).read(arrays)
        counts.append(list(calls))
    assert counts[0] == counts[1]
    assert counts[0].count("open") == 4  # two for each kind: once for its metadata, once for all its arrays


@pytest.mark.parametrize("platform", ["with preadv", "without"])
@pytest.mark.parametrize("layout", ["zarr2", "zarr3", "zarr3, shards"])
def test_what_needs_no_decoding_is_not_opened(
    layout: str, platform: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large arrays that are not compressed take no open each, in parts as small as may be, on any platform."""
    if platform == "without":
        monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(foreign, "_SMALL_BYTES", 0)
    monkeypatch.setattr(direct, "_READ_BYTES", 100)
    arrays = {f"w{i}": make_array((10, 20), np.dtype("f4"), i) for i in range(12)}
    LAYOUTS[layout].write(tmp_path, arrays)
    calls.clear()
    assert bytes_of(LAYOUTS[layout].open(tmp_path, arrays).read(arrays)) == bytes_of(arrays)
    assert calls.count("open") == 1


def test_memory_is_aligned_and_nobody_elses(way: str, tmp_path: Path) -> None:
    """Arrays start at multiples of 64 bytes, may be written to, and share no memory with another read."""
    layout = LAYOUTS["zarr2, zstd"]
    arrays = {f"w{i}": make_array((3, i + 1), np.dtype("f2"), i) for i in range(20)}
    layout.write(tmp_path, arrays)
    ours = layout.open(tmp_path, arrays)
    found, again = ours.read(arrays), ours.read(arrays)
    for array in found.values():
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        array[...] = 0
    assert bytes_of(again) == bytes_of(arrays)


def test_one_array_keeps_little_alive(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays share memory only in pieces of a set size, so that one leaf keeps no more than that alive."""
    layout = LAYOUTS["zarr2, zstd"]
    arrays = {f"w{i}": make_array((10, 20), np.dtype("f4"), i) for i in range(12)}
    layout.write(tmp_path, arrays)
    monkeypatch.setattr(foreign, "_BATCH_BYTES", 2400)  # three arrays
    monkeypatch.setattr(foreign, "_PIECE_BYTES", 2560)
    found = layout.open(tmp_path, arrays).read(arrays)
    assert bytes_of(found) == bytes_of(arrays)
    assert len({id(owner_of(array)) for array in found.values()}) == 4


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
