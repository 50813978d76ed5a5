"""Checkpoints for JAX and Flax training loops: whole or not there, checked when read, as fast as the disk.

Example::

    from ckpt_hooks import CheckpointHook

    with CheckpointHook("runs/digits", every_n_steps=1000) as hook:
        state = hook.restore(state)  # newest checkpoint that verifies, or `state` itself
        for step in range(hook.start_step, num_steps):
            state, loss = train_step(state, batch(step))
            hook(step + 1, state, metrics={"loss": loss})  # saves when due; on SIGTERM saves at once and leaves
"""

from ckpt_hooks import args, errors
from ckpt_hooks.checkpointer import AsyncCheckpointer, Checkpointer
from ckpt_hooks.data import RunAhead, ShuffledIndices
from ckpt_hooks.errors import Preempted
from ckpt_hooks.handlers.base import (
    CheckpointArgs,
    CheckpointHandler,
    StagedSave,
    construct_checkpoint_args,
    register_with_handler,
)
from ckpt_hooks.handlers.composite import CompositeCheckpointHandler, CompositeOptions
from ckpt_hooks.handlers.iterator import IteratorCheckpointHandler
from ckpt_hooks.handlers.json import JsonCheckpointHandler
from ckpt_hooks.handlers.pytree import ArrayOptions, StandardCheckpointHandler
from ckpt_hooks.handlers.registry import DefaultCheckpointHandlerRegistry
from ckpt_hooks.hook import CheckpointHook
from ckpt_hooks.init_from import InitFrom
from ckpt_hooks.manager import CheckpointManager
from ckpt_hooks.metadata import MetadataStore, StepMetadata, metadata_store
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.requested import restore
from ckpt_hooks.retention import BestN, EveryNSteps, LatestN
from ckpt_hooks.temporary_paths import (
    AtomicRenameTemporaryPath,
    CommitFileTemporaryPath,
    FileOptions,
    TemporaryPath,
)

__version__ = "0.1.0"

__all__ = [
    "ArrayOptions",
    "AsyncCheckpointer",
    "AtomicRenameTemporaryPath",
    "BestN",
    "CheckpointArgs",
    "CheckpointHandler",
    "CheckpointHook",
    "CheckpointManager",
    "Checkpointer",
    "CommitFileTemporaryPath",
    "CompositeCheckpointHandler",
    "CompositeOptions",
    "DefaultCheckpointHandlerRegistry",
    "EveryNSteps",
    "FileOptions",
    "InitFrom",
    "IteratorCheckpointHandler",
    "JsonCheckpointHandler",
    "LatestN",
    "MetadataStore",
    "MultiprocessingOptions",
    "Preempted",
    "RunAhead",
    "ShuffledIndices",
    "StagedSave",
    "StandardCheckpointHandler",
    "StepMetadata",
    "TemporaryPath",
    "args",
    "construct_checkpoint_args",
    "errors",
    "metadata_store",
    "register_with_handler",
    "restore",
]
