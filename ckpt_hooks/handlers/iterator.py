"""Iterators and other stateful objects: anything with ``get_state()`` and ``set_state(state)``.

Each process writes its own file, ``process_<i>-of-<n>.json``. A state is JSON with a few additions, each an object
with one key that starts with ``$``: bytes, tuples, NumPy arrays and scalars, and numbers that are not finite.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
from typing import Any

import jax
import numpy as np
from etils import epath

from ckpt_hooks import processes
from ckpt_hooks.errors import (
    CorruptCheckpointError,
    InvalidArgumentTypeError,
    NotSerializableError,
    StructureMismatchError,
)
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.handlers.json import JsonCheckpointHandler
from ckpt_hooks.storage import commit

__all__ = ["IteratorCheckpointHandler", "IteratorRestoreArgs", "IteratorSaveArgs", "is_stateful", "require_stateful"]

_PROCESS_FILE = re.compile(r"process_\d+-of-\d+\.json")  # also what Grain's Orbax handler writes
_SUMMARY_FILE = "metadata"  # where Orbax, which takes this for a JSON item, looks


def is_stateful(value: Any) -> bool:
    """Whether an object can be saved and restored in place."""
    return callable(getattr(value, "get_state", None)) and callable(getattr(value, "set_state", None))


def require_stateful(name: str, value: Any) -> Any:
    """The value. Raises InvalidArgumentTypeError for a keyword item that is not stateful."""
    if not is_stateful(value):
        raise InvalidArgumentTypeError(
            f"{name}=: keyword items are stateful objects with get_state() and set_state(state), such as data "
            f"iterators, or NNX modules; a {type(value).__qualname__} is not. A pytree belongs into the state, which "
            f'may be a dict: {{"train": state, "{name}": ...}}.'
        )
    return value


class IteratorCheckpointHandler(CheckpointHandler):
    """Saves what ``get_state()`` returns at the moment of the save, and gives it to ``set_state`` on restore."""

    def stage(self, args: IteratorSaveArgs) -> StagedSave:
        if not is_stateful(args.item):
            raise InvalidArgumentTypeError(
                f"an iterator item has get_state() and set_state(state); {type(args.item).__qualname__} has not. "
                "Pytrees belong into the state."
            )
        # The text is made here: the iterator may run ahead while the save is written.
        text = json.dumps(_encode(args.item.get_state(), "get_state()"))
        summary = json.dumps({"process_count": processes.count()})

        def write(directory: epath.Path) -> None:
            commit.write_file(os.path.join(directory, _file_name(processes.index())), text)
            if processes.index() == 0:
                commit.write_file(os.path.join(directory, _SUMMARY_FILE), summary)

        return StagedSave(write, nbytes=len(text))

    def save(self, directory: epath.Path, args: IteratorSaveArgs) -> None:
        self.stage(args).write(directory)

    def restore(self, directory: epath.Path, args: IteratorRestoreArgs | None = None) -> Any:
        """The object with its state set, or the bare state where no object is given."""
        state = _decode(self._read(os.fspath(directory)))
        if args is None or args.item is None:
            return state
        args.item.set_state(state)
        return args.item

    def _read(self, directory: str) -> Any:
        path = os.path.join(directory, _file_name(processes.index()))
        try:
            with open(path, "rb") as file:
                return json.loads(file.read())
        except FileNotFoundError:
            found = sorted(name for name in os.listdir(directory) if name.startswith("process_"))
            raise StructureMismatchError(
                f"{directory}: this is process {processes.index()} of {processes.count()}, and the iterator was saved "
                f"by other processes ({', '.join(found) or 'none'}). Restore with as many processes as saved it, or "
                "restore without the iterator and set its position yourself."
            ) from None
        except ValueError as error:
            raise CorruptCheckpointError(f"{path} is damaged: {error}") from error

    @classmethod
    def recorded_typestr(cls) -> str:
        # Orbax, which refuses a checkpoint with an item that it does not know, reads the summary as JSON.
        return JsonCheckpointHandler.typestr()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        return any(_PROCESS_FILE.fullmatch(name) for name in os.listdir(directory))


def _file_name(process: int) -> str:
    return f"process_{process}-of-{processes.count()}.json"


@register_with_handler(IteratorCheckpointHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class IteratorSaveArgs(CheckpointArgs):
    """Saves the state of `item`."""

    item: Any


@register_with_handler(IteratorCheckpointHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class IteratorRestoreArgs(CheckpointArgs):
    """Sets the saved state of `item`; None returns the bare state."""

    item: Any = None


# ------------------------------------------------------------------ JSON with additions


def _encode(value: Any, where: str) -> Any:
    match value:
        case np.generic() | np.ndarray() | jax.Array():  # first: a NumPy float64 is a Python float too
            return _encode_array(value, where)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": repr(value)}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: _encode(element, f"{where}[{key!r}]") for key, element in value.items()}
            pairs = [[_encode(k, where), _encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
            return {"$dict": pairs}
        case list():
            return [_encode(element, f"{where}[{i}]") for i, element in enumerate(value)]
        case tuple() if not hasattr(value, "_fields"):  # a named tuple would come back as a plain one
            return {"$tuple": [_encode(element, f"{where}[{i}]") for i, element in enumerate(value)]}
    raise NotSerializableError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}; the state of an iterator is made of "
        "numbers, strings, bytes, lists, tuples, dicts and NumPy arrays."
    )


def _encode_array(value: Any, where: str) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise NotSerializableError(f"{where} holds an array of dtype {array.dtype}")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    kind = "$scalar" if isinstance(value, np.generic) else "$array"
    return {kind: [array.dtype.str, list(array.shape), data]}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(element) for element in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("$float", text)]:
            return float(text)
        case [("$bytes", text)]:
            return base64.b64decode(text)
        case [("$tuple", elements)]:
            return tuple(_decode(element) for element in elements)
        case [("$dict", pairs)]:
            return {_decode(key): _decode(element) for key, element in pairs}
        case [("$array" | "$scalar" as kind, (dtype, shape, data))]:
            array = np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
            return array[()] if kind == "$scalar" else array
    return {key: _decode(element) for key, element in value.items()}
