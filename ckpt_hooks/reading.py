"""Reading one committed checkpoint with a handler: verified, timed, reported."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import Any

from etils import epath

from ckpt_hooks import events
from ckpt_hooks.handlers.base import CheckpointArgs
from ckpt_hooks.handlers.composite import CompositeCheckpointHandler
from ckpt_hooks.metadata import METADATA_FILE, StepMetadata, read_step_metadata
from ckpt_hooks.storage.checksums import FileChecksums

__all__ = ["describe_checkpoint", "read_checkpoint"]

_log = logging.getLogger(__name__)


def read_checkpoint(handler: Any, path: epath.Path, args: CheckpointArgs) -> Any:
    """What `handler` restores from `path`. Raises CorruptCheckpointError where the bytes are not what was saved."""
    start_secs = time.perf_counter()
    events.record_event(events.READ_START)
    try:
        checksums = FileChecksums.of_checkpoint(os.fspath(path), METADATA_FILE)
        if checksums is not None:
            # A composite checks each item that it restores; the others need not be whole.
            composite = isinstance(handler, CompositeCheckpointHandler)
            checksums.check(os.fspath(path), below="" if composite else None)
        restored = handler.restore(path, args=args)
    except BaseException:
        events.record_event(events.READ_FAILURE)
        raise
    events.record_event(events.READ_SUCCESS)
    events.record_duration_secs(events.READ_TOTAL_SECS, time.perf_counter() - start_secs)
    return restored


def describe_checkpoint(handler: Any, path: epath.Path) -> StepMetadata:
    """The step metadata of `path`, with what `handler` tells of its items."""
    metadata = read_step_metadata(os.fspath(path)) or StepMetadata()
    try:
        items = handler.metadata(path)
    except (FileNotFoundError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(handler, CompositeCheckpointHandler):
            raise
        _log.warning("%s: no item metadata: %s", path, error)
        items = None
    return dataclasses.replace(metadata, item_metadata=items)
