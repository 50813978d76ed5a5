"""Which handler serves which item of a run's checkpoints."""

from __future__ import annotations

from ckpt_hooks.handlers.json import JsonCheckpointHandler, JsonRestoreArgs, JsonSaveArgs
from ckpt_hooks.handlers.pytree import ArrayOptions, StandardCheckpointHandler, StandardSaveArgs
from ckpt_hooks.handlers.registry import DefaultCheckpointHandlerRegistry
from ckpt_hooks.run import METRICS_ITEM

__all__ = ["item_handlers"]


def item_handlers(array_options: ArrayOptions) -> DefaultCheckpointHandlerRegistry:
    """The metrics are JSON in a file of their own; everything else is by its args, with these options for arrays."""
    registry = DefaultCheckpointHandlerRegistry()
    handler = JsonCheckpointHandler(METRICS_ITEM)
    registry.add(METRICS_ITEM, JsonSaveArgs, handler)
    registry.add(METRICS_ITEM, JsonRestoreArgs, handler)
    # One handler for all parts of a state: what it may hold in memory is one bound.
    registry.add(None, StandardSaveArgs, StandardCheckpointHandler(array_options))
    return registry
