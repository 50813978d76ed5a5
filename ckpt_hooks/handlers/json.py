"""JSON items: configurations, metrics, anything that `json` can hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any

from etils import epath

from ckpt_hooks.errors import CheckpointNotFoundError, CorruptCheckpointError, NotSerializableError
from ckpt_hooks.handlers.base import CheckpointArgs, CheckpointHandler, StagedSave, register_with_handler
from ckpt_hooks.metadata import METADATA_FILE
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FILE as CHECKSUMS_FILE
from ckpt_hooks.storage.lookup import content_of, is_file

__all__ = ["JsonCheckpointHandler", "JsonRestoreArgs", "JsonSaveArgs"]

_NOT_CONTENT = frozenset({METADATA_FILE, CHECKSUMS_FILE, commit.COMMIT_MARKER})


class JsonCheckpointHandler(CheckpointHandler):
    """Saves an object as one JSON file.

    Args:
      filename: the file's name in the item's directory.
    """

    def __init__(self, filename: str = "metadata") -> None:
        self._filename = filename
        self._is_primary = MultiprocessingOptions().is_primary()

    def take_part(self, options: MultiprocessingOptions) -> None:
        self._is_primary = options.is_primary()

    def stage(self, args: JsonSaveArgs) -> StagedSave:
        try:
            text = json.dumps(args.item)
        except (TypeError, ValueError) as error:
            raise NotSerializableError(f"this JSON item cannot be saved: {error}") from error

        return StagedSave(functools.partial(self._write, text), nbytes=len(text))

    def _write(self, text: str, directory: epath.Path) -> None:
        if self._is_primary:
            commit.write_file(os.path.join(directory, self._filename), text)

    def save(self, directory: epath.Path, args: JsonSaveArgs) -> None:
        self.stage(args).write(directory)

    def restore(self, directory: epath.Path, args: JsonRestoreArgs | None = None) -> Any:
        path = self._find(os.fspath(directory))
        content = content_of(path)
        try:
            return json.loads(content)
        except ValueError as error:
            raise CorruptCheckpointError(f"{path} is damaged: {error}") from error

    def _find(self, directory: str) -> str:
        """The file; a checkpoint that is read without its handler may have another name for it."""
        path = os.path.join(directory, self._filename)
        if is_file(path):
            return path
        if is_file(os.path.join(directory, METADATA_FILE)):  # a checkpoint that is a JSON item and nothing else
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries if entry.is_file() and entry.name not in _NOT_CONTENT]
            if len(names) == 1:
                return os.path.join(directory, names[0])
        same_name = os.path.join(directory, os.path.basename(directory))  # Orbax's metrics/metrics
        if is_file(same_name):
            return same_name
        raise CheckpointNotFoundError(f"{directory} holds no JSON item: it has no file {self._filename!r}")

    @classmethod
    def typestr(cls) -> str:
        # Orbax's own name, so that Orbax restores our checkpoints without being told how.
        return "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"


@register_with_handler(JsonCheckpointHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class JsonSaveArgs(CheckpointArgs):
    """Saves `item`, anything that `json.dumps` takes."""

    item: Any


@register_with_handler(JsonCheckpointHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class JsonRestoreArgs(CheckpointArgs):
    """Restores a JSON item; `item` is not used."""

    item: Any = None
