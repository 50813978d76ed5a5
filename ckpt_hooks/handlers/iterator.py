"""Iterators and other stateful objects: anything with ``get_state()`` and ``set_state(state)``.

Each process writes its own file, ``process_<i>-of-<n>.json``, as Grain's handler for Orbax does. Where another number
of processes restores, an object that can divide the work anew is given the states of all of them: one with
``set_states(states)``, or an iterator of Grain's `ElasticIterator`, of which all states are the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from etils import epath

from ckpt_hooks import processes
from ckpt_hooks.errors import CorruptCheckpointError, InvalidArgumentTypeError, StructureMismatchError
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.handlers.iterator_state import state_to_text, text_to_state
from ckpt_hooks.handlers.json import JsonCheckpointHandler
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.lookup import content_of
from ckpt_hooks.storage.per_process import PROCESS_FILE, process_file

__all__ = [
    "IteratorCheckpointHandler",
    "IteratorRestoreArgs",
    "IteratorSaveArgs",
    "StatesOfAll",
    "can_divide_anew",
    "is_stateful",
    "require_stateful",
    "set_saved_state",
]

_SUMMARY_FILE = "metadata"  # where Orbax, which takes this for a JSON item, looks
_GRAIN_ELASTIC = "grain._src.python.dataset.elastic_iterator"


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


class StatesOfAll(list[Any]):
    """The states of all processes that saved, in their order, where their number is not today's."""


def can_divide_anew(value: Any) -> bool:
    """Whether an object accepts the states of another number of processes than there are now."""
    return callable(getattr(value, "set_states", None)) or type(value).__module__ == _GRAIN_ELASTIC


def set_saved_state(value: Any, state: Any) -> None:
    """Gives an object the state that was read for it."""
    if not isinstance(state, StatesOfAll):
        value.set_state(state)
    elif callable(getattr(value, "set_states", None)):
        value.set_states(list(state))
    else:
        value.set_state(state[0])  # checked when it was read: they are all the same


class IteratorCheckpointHandler(CheckpointHandler):
    """Saves what ``get_state()`` returns at the moment of the save, and gives it to ``set_state`` on restore."""

    def __init__(self) -> None:
        self._is_primary = processes.MultiprocessingOptions().is_primary()

    def take_part(self, options: processes.MultiprocessingOptions) -> None:
        self._is_primary = options.is_primary()

    def stage(self, args: IteratorSaveArgs) -> StagedSave:
        if not is_stateful(args.item):
            raise InvalidArgumentTypeError(
                f"an iterator item has get_state() and set_state(state); {type(args.item).__qualname__} has not. "
                "Pytrees belong into the state."
            )
        # The text is made here: the iterator may run ahead while the save is written.
        state = args.item.get_state()
        text = state_to_text(state)
        kind = {"state": "bytes"} if text is state else {}
        summary = json.dumps({"process_count": processes.count(), **kind})

        def write(directory: epath.Path) -> None:
            commit.write_file(os.path.join(directory, process_file(processes.index(), processes.count())), text)
            if self._is_primary:
                commit.write_file(os.path.join(directory, _SUMMARY_FILE), summary)

        return StagedSave(write, nbytes=len(text), claim="the state of an object")  # which each process has to give

    def save(self, directory: epath.Path, args: IteratorSaveArgs) -> None:
        self.stage(args).write(directory)

    def restore(self, directory: epath.Path, args: IteratorRestoreArgs | None = None) -> Any:
        """The object with its state set, or the bare state where no object is given."""
        item, target = (None, None) if args is None else (args.item, args.target)
        state = _read(os.fspath(directory), target if item is None else item)
        if item is None:
            return state
        set_saved_state(item, state)
        return item

    @classmethod
    def recorded_typestr(cls) -> str:
        # Orbax, which refuses a checkpoint with an item that it does not know, reads the summary as JSON.
        return JsonCheckpointHandler.typestr()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        return any(PROCESS_FILE.fullmatch(name) for name in os.listdir(directory))


# ------------------------------------------------------------------ reading


def _read(directory: str, target: Any) -> Any:
    """The state of this process, or of all where their number has changed and `target` can divide them anew."""
    was_bytes = _were_bytes(directory, target)
    try:
        return _read_file(directory, process_file(processes.index(), processes.count()), was_bytes)
    except FileNotFoundError:
        names = sorted(name for name in os.listdir(directory) if name.startswith("process_"))
    counts = {int(found[2]) for name in names if (found := PROCESS_FILE.fullmatch(name))}
    complete = [count for count in counts if {process_file(i, count) for i in range(count)} <= set(names)]
    if not can_divide_anew(target) or len(complete) != 1:
        raise _explained(directory, names)
    files = [process_file(process, complete[0]) for process in range(complete[0])]
    states = StatesOfAll(_read_file(directory, name, was_bytes) for name in files)
    if not hasattr(target, "set_states") and any(state != states[0] for state in states):
        raise StructureMismatchError(
            f"{directory}: the {len(states)} processes that saved were not at the same position ({states[0]}, but also "
            f"{next(state for state in states if state != states[0])}), so {processes.count()} cannot go on from it."
        )
    return states


def _were_bytes(directory: str, target: Any) -> bool:
    """Whether the states are bytes; Grain's handler writes no summary, so the object's own state says it."""
    try:
        summary = content_of(os.path.join(directory, _SUMMARY_FILE))
        return bool(json.loads(summary).get("state") == "bytes")
    except (FileNotFoundError, ValueError, AttributeError):
        return is_stateful(target) and isinstance(target.get_state(), bytes)


def _read_file(directory: str, name: str, was_bytes: bool) -> Any:
    path = os.path.join(directory, name)
    text = content_of(path)
    try:
        return text_to_state(text, was_bytes=was_bytes)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error


def _explained(directory: str, found: list[str]) -> StructureMismatchError:
    return StructureMismatchError(
        f"{directory}: this is process {processes.index()} of {processes.count()}, and the iterator was saved by other "
        f"processes ({', '.join(found) or 'none'}). Restore with as many processes as saved it; or use one that divides"
        " its work anew (with set_states(states): `ckpt_hooks.ShuffledIndices`, Grain's ElasticIterator, yours); or "
        "restore without the iterator and set its position yourself."
    )


# ------------------------------------------------------------------ args


@register_with_handler(IteratorCheckpointHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class IteratorSaveArgs(CheckpointArgs):
    """Saves the state of `item`."""

    item: Any


@register_with_handler(IteratorCheckpointHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class IteratorRestoreArgs(CheckpointArgs):
    """Sets the saved state of `item`; None returns the bare state, as `target` (untouched) will want it set."""

    item: Any = None
    target: Any = None
