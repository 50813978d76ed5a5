"""Step metadata: what a checkpoint says of itself, who may write it, and what is refused."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import json
import math
import os
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_hooks import MetadataStore, StepMetadata, errors, metadata_store
from ckpt_hooks.metadata import METADATA_FILE, check_custom_metadata, read_step_metadata, to_json_numbers
from ckpt_hooks.storage import commit
from tests.faulty import delay, fail

FULL: dict[str, Any] = {
    "item_handlers": {"params": "some.Handler"},
    "metrics": {"loss": 0.5},
    "performance_metrics": {"secs": 1.5},
    "init_timestamp_nsecs": 1,
    "commit_timestamp_nsecs": 2,
    "custom_metadata": {"epoch": 3},
}
EMPTY: dict[str, Any] = {
    "item_handlers": None,
    "metrics": {},
    "performance_metrics": {},
    "init_timestamp_nsecs": None,
    "commit_timestamp_nsecs": None,
    "custom_metadata": {},
}


# ------------------------------------------------------------------ the schema


def test_all_fields_round_trip() -> None:
    """What `to_json` writes, `from_json` reads, field by field."""
    assert StepMetadata.from_json(FULL).to_json() == FULL
    assert StepMetadata.from_json({**FULL, "item_handlers": "some.Handler"}).item_handlers == "some.Handler"


def test_defaults_are_orbax_own() -> None:
    """Without anything, every field is there, null or empty as Orbax writes it."""
    assert StepMetadata().to_json() == EMPTY
    assert StepMetadata.from_json({}) == StepMetadata.from_json(EMPTY) == StepMetadata()


def test_item_metadata_are_never_written() -> None:
    """`item_metadata` is known in memory only."""
    metadata = StepMetadata(item_metadata={"w": np.zeros(2)})
    assert metadata.to_json() == EMPTY


def test_performance_metrics_are_floats() -> None:
    """Performance metrics that are no floats are dropped."""
    metadata = StepMetadata(performance_metrics={"secs": 1.5, "count": 3, "name": "x"})
    assert metadata.to_json()["performance_metrics"] == {"secs": 1.5}


def test_metadata_cannot_be_changed() -> None:
    """A StepMetadata is frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepMetadata().metrics = {}  # type: ignore[misc]


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_content_that_is_no_object(content: Any) -> None:
    """Anything but a JSON object is a ValueError."""
    with pytest.raises(ValueError, match="JSON object"):
        StepMetadata.from_json(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item_handlers", 3),
        ("item_handlers", ["a"]),
        ("metrics", [1]),
        ("performance_metrics", 1.5),
        ("init_timestamp_nsecs", "now"),
        ("init_timestamp_nsecs", 1.5),
        ("commit_timestamp_nsecs", True),
        ("custom_metadata", "text"),
    ],
)
def test_field_of_the_wrong_type(field: str, value: Any) -> None:
    """A field of the wrong type is a ValueError that names it."""
    with pytest.raises(ValueError, match=field):
        StepMetadata.from_json({**EMPTY, field: value})


def test_unknown_field_becomes_custom(caplog: pytest.LogCaptureFixture) -> None:
    """A field that nobody knows is taken as custom metadata, with a warning, where there are none."""
    metadata = StepMetadata.from_json({**EMPTY, "extra": 1})
    assert metadata.custom_metadata == {"extra": 1}
    assert "extra" in caplog.text


def test_unknown_field_beside_custom_metadata() -> None:
    """A field that nobody knows is a ValueError where there are custom metadata, as it is to Orbax."""
    with pytest.raises(ValueError, match="extra"):
        StepMetadata.from_json({**FULL, "extra": 1})


# ------------------------------------------------------------------ reading a checkpoint's


def test_reading_what_is_there(tmp_path: Path) -> None:
    """The metadata of a checkpoint's directory are read from its file."""
    (tmp_path / METADATA_FILE).write_text(json.dumps(FULL))
    assert read_step_metadata(os.fspath(tmp_path)) == StepMetadata.from_json(FULL)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    """A directory without the file, a directory that is not there, and a file have no metadata."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert read_step_metadata(os.fspath(path)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": 3}', "\xff"])
def test_reading_damage(tmp_path: Path, content: str) -> None:
    """A damaged file is a CorruptCheckpointError that names it."""
    (tmp_path / METADATA_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(errors.CorruptCheckpointError, match=METADATA_FILE):
        read_step_metadata(os.fspath(tmp_path))


def test_a_directory_in_the_file_s_place_is_damage(tmp_path: Path) -> None:
    """Also a directory of that name, into which some copying program has turned the file."""
    (tmp_path / METADATA_FILE).mkdir()
    with pytest.raises(errors.CorruptCheckpointError, match=METADATA_FILE):
        read_step_metadata(os.fspath(tmp_path))


# ------------------------------------------------------------------ stores


@pytest.fixture(params=["blocking", "background"])
def store(request: pytest.FixtureRequest) -> Any:
    store = metadata_store(enable_write=True, blocking_write=request.param == "blocking")
    yield store
    store.close()


def test_store_writes_and_reads(tmp_path: Path, store: MetadataStore) -> None:
    """What was written is read back, once the store has finished; a second write replaces the first."""
    path = tmp_path / "m"
    store.write(path, {"a": 1, "b": 2})
    store.write(path, {"a": 3})
    store.wait_until_finished()
    assert store.read(path) == {"a": 3}
    assert os.listdir(tmp_path) == ["m"]


def test_update_replaces_whole_keys(tmp_path: Path, store: MetadataStore) -> None:
    """`update` replaces top-level keys, without merging what is in them, and keeps the others."""
    path = tmp_path / "m"
    store.write(path, {"a": {"x": 1}, "b": 2})
    store.update(path, a={"y": 1}, c=3)
    store.wait_until_finished()
    assert store.read(path) == {"a": {"y": 1}, "b": 2, "c": 3}


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3"])
def test_update_of_what_cannot_be_read(tmp_path: Path, store: MetadataStore, content: str | None) -> None:
    """`update` of a missing or damaged file makes one of just the new keys."""
    path = tmp_path / "m"
    if content is not None:
        path.write_text(content)
    store.update(path, a=1)
    store.wait_until_finished()
    assert store.read(path) == {"a": 1}


def test_update_on_a_failing_disk_loses_nothing(
    tmp_path: Path, store: MetadataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`update` raises, by the file's name, where the disk cannot read it: its other keys would be lost. They stay."""
    path = tmp_path / "m"
    store.write(path, {"a": 1})
    store.wait_until_finished()

    def update() -> None:
        store.update(path, b=2)
        store.wait_until_finished()

    with monkeypatch.context() as patched:
        fail(patched, os, "read", errno.EIO, times=1)
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            update()
    assert store.read(path) == {"a": 1}


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_read_of_what_cannot_be_read(tmp_path: Path, store: MetadataStore, content: str | None) -> None:
    """`read` of a missing, unreadable or damaged file, or of a directory, is None."""
    path = tmp_path / "m"
    if content is not None:
        path.write_text(content)
    assert store.read(path) is None
    assert store.read(tmp_path) is None


def test_file_without_a_directory_is_refused(store: MetadataStore) -> None:
    """A path without a named parent directory is a ValueError, now or when the store has finished."""
    with pytest.raises(ValueError, match="named directory"):
        _write_and_wait(store, "metadata")
    with pytest.raises(ValueError, match="named directory"):
        _write_and_wait(store, "/metadata")


def test_an_address_is_refused(store: MetadataStore) -> None:
    """What is not on a file system is a ValueError that says so, and no file of such a name is looked for."""
    with pytest.raises(ValueError, match=r"gs://bucket/7/m: .* local or mounted"):
        _write_and_wait(store, "gs://bucket/7/m")


def _write_and_wait(store: MetadataStore, path: str) -> None:
    store.write(path, {})
    store.wait_until_finished()


def test_reader_never_sees_a_part(tmp_path: Path, store: MetadataStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way leaves the old file, and nothing else."""
    path = tmp_path / "m"
    store.write(path, {"a": 1})
    store.wait_until_finished()

    def write_half(name: str, data: bytes | str) -> None:
        with open(name, "w") as file:
            file.write(str(data)[:3])
        raise OSError("half way")

    monkeypatch.setattr(commit, "write_file", write_half)
    with pytest.raises(OSError, match="half way"):
        _write_and_wait(store, os.fspath(path))
    assert store.read(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["m"]


def test_updates_of_many_threads_are_all_kept(tmp_path: Path, store: MetadataStore) -> None:
    """Updates of one file from several threads do not lose each other's keys."""
    path = tmp_path / "m"
    threads = [threading.Thread(target=store.update, args=(path,), kwargs={f"k{n}": n}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.wait_until_finished()
    assert store.read(path) == {f"k{n}": n for n in range(8)}


def test_arguments_may_be_given_by_position(tmp_path: Path) -> None:
    """A store and step metadata take what they have names for in the order of those names as well."""
    assert metadata_store(True, True) is metadata_store(enable_write=True, blocking_write=True)
    fields: Any = ({"a": "handler"}, None, {"loss": 0.1}, {"secs": 1.5}, 1, 2, {"step": 3})
    names = [field.name for field in dataclasses.fields(StepMetadata)]
    assert StepMetadata(*fields) == StepMetadata(**dict(zip(names, fields, strict=True)))


def test_kinds_of_stores() -> None:
    """The blocking writer and the reader are one object each in a process, a background writer is a new one."""
    blocking = metadata_store(enable_write=True, blocking_write=True)
    assert blocking is metadata_store(enable_write=True, blocking_write=True)
    assert blocking.is_blocking_writer()
    reader = metadata_store(enable_write=False)
    assert reader is metadata_store(enable_write=False, blocking_write=True)
    one, other = metadata_store(enable_write=True), metadata_store(enable_write=True)
    assert one is not other and not one.is_blocking_writer()
    one.close()
    other.close()


def test_reader_ignores_writes(tmp_path: Path) -> None:
    """A store that may not write reads, and ignores writes without a word."""
    (tmp_path / "m").write_text('{"a": 1}')
    reader = metadata_store(enable_write=False)
    reader.write(tmp_path / "m", {"a": 2})
    reader.update(tmp_path / "m", a=2)
    reader.write(tmp_path / "new", {})
    reader.wait_until_finished()
    reader.close()
    assert reader.read(tmp_path / "m") == {"a": 1}
    assert os.listdir(tmp_path) == ["m"]


def test_background_store_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A background store writes in another thread, what was passed at the time of the call, in order."""
    gate = threading.Event()
    replace_file = commit.replace_file

    def slowly(*positional: Any, **keywords: Any) -> None:
        assert gate.wait(60)
        replace_file(*positional, **keywords)

    monkeypatch.setattr(commit, "replace_file", slowly)
    store = metadata_store(enable_write=True)
    content = {"a": 1}
    store.write(tmp_path / "m", {"old": 0})
    store.write(tmp_path / "m", content)  # waits in the queue while the first one is held up
    store.update(tmp_path / "m", b=2)
    content["a"] = 3
    assert os.listdir(tmp_path) == []
    gate.set()
    store.close()
    assert store.read(tmp_path / "m") == {"a": 1, "b": 2}


def test_failure_in_the_background_is_raised_when_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting raises the first error, once, after everything that was asked for has ended."""
    delay(monkeypatch, commit, "replace_file", secs=0.2)
    store = metadata_store(enable_write=True)
    store.write(tmp_path / "missing" / "m", {})
    store.write(tmp_path / "m", {"a": 1})
    with pytest.raises(FileNotFoundError):
        store.wait_until_finished()
    assert store.read(tmp_path / "m") == {"a": 1}
    store.wait_until_finished()
    store.close()


def test_closing_raises_what_failed_in_the_background(tmp_path: Path) -> None:
    """A failure that nobody has waited for is not lost with the store."""
    store = metadata_store(enable_write=True)
    store.write(tmp_path / "missing" / "m", {})
    with pytest.raises(FileNotFoundError):
        store.close()


def test_while_the_interpreter_ends_order_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can no longer be handed to the background is done at once, but after what is still being written there."""
    is_refused = threading.Event()

    class SlowPath(type(tmp_path)):  # type: ignore[misc]
        def __fspath__(self) -> str:
            assert is_refused.wait(60)
            time.sleep(0.2)
            return str(self)

    def refuse(*positional: Any) -> None:
        is_refused.set()
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    store = metadata_store(enable_write=True)
    store.write(SlowPath(tmp_path / "m"), {"a": 1})
    with monkeypatch.context() as ending:
        ending.setattr(concurrent.futures.ThreadPoolExecutor, "submit", refuse)
        store.update(tmp_path / "m", b=2)
    assert store.read(tmp_path / "m") == {"a": 1, "b": 2}
    store.close()


# ------------------------------------------------------------------ custom metadata


def test_custom_metadata_are_copied() -> None:
    """The checked metadata are plain dicts and lists of their own."""
    inner = {"losses": [0.5]}
    frozen = types.MappingProxyType({"inner": inner, "pair": (1, None), "flag": True, "name": "x"})
    checked = check_custom_metadata(frozen)
    inner["losses"].append(0.4)
    assert checked == {"inner": {"losses": [0.5]}, "pair": [1, None], "flag": True, "name": "x"}
    assert json.loads(json.dumps(checked)) == checked


def test_no_custom_metadata_are_empty() -> None:
    """None means no custom metadata."""
    assert check_custom_metadata(None) == {}


@pytest.mark.parametrize("value", [[], "text", 3, [("a", 1)]])
def test_custom_metadata_are_a_dict(value: Any) -> None:
    """Anything but a mapping is a ValueError."""
    with pytest.raises(ValueError, match="dict"):
        check_custom_metadata(value)


def test_keys_of_custom_metadata_are_strings() -> None:
    """A top-level key that is no string is a ValueError that shows it."""
    with pytest.raises(ValueError, match="keys are strings, got 3"):
        check_custom_metadata({3: 1})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float32(1), r"\['a'\] is a numpy.float32"),
        (np.arange(2), r"\['a'\] is a numpy.ndarray"),
        (jnp.zeros(()), r"\['a'\] is a jax"),
        ([1, {"b": {1}}], r"\['a'\]\[1\]\['b'\] is a builtins.set"),
        ({"b": {4: 1}}, r"\['a'\]\['b'\]: .*got 4"),
        (b"x", r"\['a'\] is a builtins.bytes"),
        (1j, r"\['a'\] is a builtins.complex"),
    ],
)
def test_what_is_not_json_is_named(value: Any, where: str) -> None:
    """A value that JSON cannot hold, or would change, is a TypeError that names the place."""
    with pytest.raises(TypeError, match=where):
        check_custom_metadata({"a": value})


# ------------------------------------------------------------------ metrics


def test_metrics_of_every_kind_become_numbers() -> None:
    """Python, NumPy and JAX scalars, also in arrays of one element, become plain JSON numbers."""
    metrics = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "numpy": np.float32(0.5),
        "double": np.float64(0.5),
        "array": np.array([2]),
        "jax": jnp.asarray(0.5),
        "bfloat16": jnp.asarray(0.5, jnp.bfloat16),
        "flag": np.bool_(True),
    }
    numbers = to_json_numbers(metrics)
    assert json.loads(json.dumps(numbers)) == {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "numpy": 0.5,
        "double": 0.5,
        "array": 2,
        "jax": 0.5,
        "bfloat16": 0.5,
        "flag": True,
    }


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (np.float32("nan"), "NaN")]
)
def test_metrics_that_are_not_finite_are_named(value: Any, name: str) -> None:
    """A NaN or an infinity becomes a string that strict JSON can hold."""
    assert to_json_numbers({"loss": value}) == {"loss": name}


def test_collection_of_metrics_is_computed() -> None:
    """Anything with `compute()`, as a clu.metrics.Collection, is computed first; None is no metrics."""

    class Collection:
        def compute(self) -> dict[str, Any]:
            return {"loss": jnp.asarray(0.5)}

    assert to_json_numbers(Collection()) == {"loss": 0.5}
    assert to_json_numbers(None) == {}


@pytest.mark.parametrize("value", [np.arange(2), jnp.zeros((2, 2)), "text", None, 1j, np.complex64(1), [1.0], {"a": 1}])
def test_metric_that_is_no_number_is_named(value: Any) -> None:
    """What is not one real number is a TypeError that names the metric."""
    with pytest.raises(TypeError, match="'loss'"):
        to_json_numbers({"loss": value})


@pytest.mark.parametrize("metrics", [[0.5], 0.5, "loss", {3: 0.5}])
def test_metrics_are_named_numbers(metrics: Any) -> None:
    """Anything but {string: number} is a TypeError."""
    with pytest.raises(TypeError, match="metrics"):
        to_json_numbers(metrics)
