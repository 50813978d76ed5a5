"""Step metadata: the file ``_CHECKPOINT_METADATA`` of every checkpoint, and the stores that read and write it.

The file is one JSON object whose top-level keys are exactly the fields of `StepMetadata` without
`item_metadata`; Orbax refuses any other key, so everything of ours goes into `custom_metadata`.
"""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Set
from typing import Any

from ckpt_hooks.errors import (
    CorruptCheckpointError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotSerializableError,
)
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.lookup import content_of

__all__ = [
    "METADATA_FILE",
    "MetadataStore",
    "StepMetadata",
    "check_custom_metadata",
    "metadata_store",
    "read_step_metadata",
    "to_json_numbers",
    "to_orbax_metrics",
]

METADATA_FILE = "_CHECKPOINT_METADATA"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """What a checkpoint says of itself.

    Attributes:
      item_handlers: {item: name of its handler}, or one name where the checkpoint is not a composite.
      item_metadata: {item: what its handler tells of it}; for a pytree, shapes and dtypes. Never on disk.
      metrics: {name: a finite number, or "NaN", "Infinity", "-Infinity"}.
      performance_metrics: {name: float}.
      init_timestamp_nsecs: when the save began, in nanoseconds since 1970.
      commit_timestamp_nsecs: when it was committed; None while it is not.
      custom_metadata: {name: JSON}, the user's own.

    >>> StepMetadata.from_json({"custom_metadata": {"step": 3}}).custom_metadata
    {'step': 3}
    """

    item_handlers: Mapping[str, str] | str | None = None
    item_metadata: Any = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    performance_metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["item_metadata"]
        floats = {k: v for k, v in self.performance_metrics.items() if isinstance(v, float)}
        return {**fields, "performance_metrics": floats}

    @classmethod
    def from_json(cls, content: Any) -> StepMetadata:
        """Raises ValueError where a field has the wrong type, as Orbax does.

        A top-level key that is not a field is taken as custom metadata where there is none.
        """
        if not isinstance(content, dict):
            raise InvalidArgumentError(f"step metadata is a JSON object, found {type(content).__name__}")
        known = {name: content[name] for name in _FIELD_TYPES if content.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, _FIELD_TYPES[name]) or isinstance(value, bool):
                raise InvalidArgumentError(f"step metadata: {name} is {value!r}")
        unknown = {name: value for name, value in content.items() if name not in _FIELD_TYPES}
        if unknown and known.get("custom_metadata"):
            raise InvalidArgumentError(f"step metadata has unknown fields {sorted(unknown)} beside custom_metadata")
        if unknown:
            _log.warning("step metadata has unknown fields %s, taken as custom metadata", sorted(unknown))
            known["custom_metadata"] = unknown
        return cls(**known)


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "item_handlers": (str, dict),
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}


# ------------------------------------------------------------------ checking what users pass


def check_custom_metadata(metadata: Any, reserved: Set[str] = frozenset()) -> dict[str, Any]:
    """A copy of the metadata as plain dicts. Raises before anything is written for what JSON would refuse or change.

    A copy, since it may be written in the background, while the caller goes on appending to a list in it.

    InvalidArgumentError for something else than a mapping with string keys, or for a key that is `reserved`;
    NotSerializableError for a value that is not JSON, naming the place.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidArgumentError(f"custom_metadata is a dict with string keys, got {type(metadata).__name__}")
    for key in metadata:
        if not isinstance(key, str):
            raise InvalidArgumentError(f"custom_metadata: keys are strings, got {key!r}")
    taken = sorted(reserved & metadata.keys())
    if taken:
        raise InvalidArgumentError(f"metadata: {taken} are written by the library; choose other keys")
    try:
        return {key: _copy_json(element, f"custom_metadata[{key!r}]") for key, element in metadata.items()}
    except RecursionError:
        raise NotSerializableError("custom_metadata holds itself, or is nested too deeply for JSON") from None


def _copy_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_copy_json(element, f"{where}[{position}]") for position, element in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotSerializableError(f"{where}: JSON has only string keys, got {key!r}; it would be changed")
        return {key: _copy_json(element, f"{where}[{key!r}]") for key, element in value.items()}
    raise NotSerializableError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which is not JSON. Pass numbers, "
        "strings, lists and dicts (`float(x)`, `x.tolist()`); arrays belong into the state."
    )


def to_json_numbers(metrics: Any) -> dict[str, Any]:
    """{name: number} of metrics that are Python, NumPy or JAX scalars, or a `clu.metrics.Collection`.

    NaN and infinities become the strings "NaN", "Infinity", "-Infinity", which JSON can hold.

    >>> to_json_numbers({"loss": float("nan"), "steps": 3})
    {'loss': 'NaN', 'steps': 3}
    """
    if metrics is None:
        return {}
    given = metrics
    if not isinstance(metrics, Mapping | type) and hasattr(metrics, "compute"):
        metrics = metrics.compute()
    if not isinstance(metrics, Mapping):
        kind = f"the class {given.__qualname__} itself" if isinstance(given, type) else type(given).__name__
        raise InvalidArgumentTypeError(f"metrics are a dict of numbers or a clu.metrics.Collection, got {kind}")
    for name in metrics:
        if not isinstance(name, str):
            raise InvalidArgumentTypeError(f"metrics: names are strings, got {name!r}")
    return {name: _to_json_number(name, value) for name, value in metrics.items()}


def to_orbax_metrics(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The same metrics as Orbax writes them: its best_fn compares numbers, and a string would stop it."""
    return {name: float(value) if value in _NOT_FINITE else value for name, value in numbers.items()}


def _to_json_number(name: str, value: Any) -> float | int | str:
    if not isinstance(value, bool | int | float):
        try:
            if getattr(value, "size", 1) != 1 or not hasattr(value, "item"):
                raise TypeError("not a scalar")
            value = value.item()
            if not isinstance(value, bool | int | float):
                raise TypeError("not a real number")
        except TypeError as error:
            raise NotSerializableError(
                f"metrics[{name!r}]: a metric is one real number, got {type(value).__name__} "
                f"{getattr(value, 'shape', value)!r} ({error}); reduce it first (`.mean()`)."
            ) from None
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


# ------------------------------------------------------------------ stores


class MetadataStore(abc.ABC):
    """Reads and writes metadata files; a reader sees an old file or a new one, never a part of one."""

    def is_blocking_writer(self) -> bool:
        """Whether `write` and `update` return only when the file is there."""
        return True

    @abc.abstractmethod
    def write(self, file_path: Any, metadata: Mapping[str, Any]) -> None:
        """Replaces the file. Raises ValueError where `file_path` is an address, or is not in a named directory."""

    @abc.abstractmethod
    def update(self, file_path: Any, **fields: Any) -> None:
        """Replaces whole top-level keys of the file; a missing or damaged one becomes just these.

        Raises OSError where the file cannot be read: what else stands in it would be lost.
        """

    def read(self, file_path: Any) -> dict[str, Any] | None:
        """The file's content; None where it is missing, unreadable or not a JSON object."""
        try:
            return _content(file_path)
        except OSError as error:
            _log.warning("cannot read %s: %s", file_path, error)
            return None

    def wait_until_finished(self) -> None:
        """Waits for what has been asked for; raises the first error."""

    def close(self) -> None:
        """Waits and gives up the worker; only a non-blocking writer needs it."""


def _content(file_path: Any) -> dict[str, Any] | None:
    try:
        content = json.loads(content_of(os.fspath(file_path)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("cannot read %s: %s", file_path, error)
        return None
    return content if isinstance(content, dict) else None


class _ReadOnlyStore(MetadataStore):
    """Ignores writes without a word: for the processes that are not primary."""

    def write(self, file_path: Any, metadata: Mapping[str, Any]) -> None:
        del file_path, metadata

    def update(self, file_path: Any, **fields: Any) -> None:
        del file_path, fields


class _BlockingStore(MetadataStore):
    def __init__(self) -> None:
        self._lock = threading.RLock()  # a read-modify-write of two threads must not lose one

    def write(self, file_path: Any, metadata: Mapping[str, Any]) -> None:
        path = os.fspath(file_path)
        if "://" in path or not os.path.basename(os.path.dirname(path)):
            raise InvalidArgumentError(f"{path}: a metadata file stands in a named directory, local or mounted")
        with self._lock:
            commit.replace_file(path, json.dumps(metadata), durable=False)

    def update(self, file_path: Any, **fields: Any) -> None:
        with self._lock:
            self.write(file_path, {**(_content(file_path) or {}), **fields})


class _BackgroundStore(_BlockingStore):
    def __init__(self) -> None:
        super().__init__()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "ckpt_hooks-metadata")
        self._pending: list[concurrent.futures.Future[None]] = []

    def is_blocking_writer(self) -> bool:
        return False

    def write(self, file_path: Any, metadata: Mapping[str, Any]) -> None:
        self._submit(super().write, file_path, dict(metadata))

    def update(self, file_path: Any, **fields: Any) -> None:
        self._submit(self._update_now, file_path, fields)

    def _submit(self, task: Callable[..., None], *args: Any) -> None:
        try:
            self._pending.append(self._worker.submit(task, *args))
        except RuntimeError:  # the interpreter is ending: its pools take nothing new
            self.wait_until_finished()
            task(*args)

    def _update_now(self, file_path: Any, fields: Mapping[str, Any]) -> None:
        with self._lock:
            super().write(file_path, {**(_content(file_path) or {}), **fields})

    def wait_until_finished(self) -> None:
        pending, self._pending = self._pending, []
        concurrent.futures.wait(pending)  # all of them: after an error, none may write into what is being removed
        for future in pending:
            future.result()

    def close(self) -> None:
        try:
            self.wait_until_finished()
        finally:
            self._worker.shutdown()


_blocking_store = _BlockingStore()
_read_only_store = _ReadOnlyStore()


def metadata_store(enable_write: bool, blocking_write: bool = False) -> MetadataStore:
    """A store: the process's one blocking writer, its one reader, or a new background writer to be closed.

    >>> metadata_store(enable_write=True, blocking_write=True).is_blocking_writer()
    True
    """
    if not enable_write:
        return _read_only_store
    return _blocking_store if blocking_write else _BackgroundStore()


def read_step_metadata(directory: str) -> StepMetadata | None:
    """The metadata of the checkpoint in `directory`, None where it has no such file.

    Raises CorruptCheckpointError where the file is damaged.
    """
    path = os.path.join(directory, METADATA_FILE)
    try:
        return StepMetadata.from_json(json.loads(content_of(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CorruptCheckpointError:
        raise
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
