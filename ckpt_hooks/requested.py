"""What one restore is asked for; and `restore`, which reads one checkpoint at a path, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax

from ckpt_hooks import tree
from ckpt_hooks.arguments import require_path
from ckpt_hooks.changes import Changes
from ckpt_hooks.committed import is_committed
from ckpt_hooks.errors import CheckpointNotFoundError, IncompleteCheckpointError, InvalidArgumentError
from ckpt_hooks.graph_objects import GraphObjects
from ckpt_hooks.handlers.iterator import require_stateful, set_saved_state
from ckpt_hooks.listing import is_run
from ckpt_hooks.restoring import restore_checkpoint
from ckpt_hooks.shards import on_devices
from ckpt_hooks.storage.lookup import is_directory, is_file, local_path

__all__ = ["RestoreRequest", "check_names", "restore"]


# What the calls that save and restore call their own arguments: an object of that name would be taken for one.
_RESERVED = frozenset(
    {"cast", "changes", "force", "items", "like", "metadata", "metrics", "missing", "rename", "state", "step", "typed"}
    | {"unexpected"}
)


def check_names(objects: Iterable[str]) -> None:
    """Raises InvalidArgumentError for a keyword that cannot be the name of an object, neither now nor at a restore."""
    taken = sorted(_RESERVED.intersection(objects))
    if taken:
        raise InvalidArgumentError(
            f"{taken[0]}=: no object can have this name, which is that of an argument of another call. Rename the "
            "keyword; or, if the argument was meant, see which call has it: a step is chosen with "
            "hook.manager.restore(state, step=...) or hook.manager.rollback(step), force=True is for hook.save."
        )


class RestoreRequest:
    """A target, or none, what of it is wanted, and objects whose saved states are set in place.

    Raises InvalidArgumentError and InvalidArgumentTypeError for what cannot be restored into, before anything is read.
    """

    def __init__(self, like: Any, *, items: Iterable[str] | None, changes: Changes, objects: Mapping[str, Any]) -> None:
        check_names(objects)
        if isinstance(items, Iterator):
            items = tuple(items)  # or nothing would be left of it for the next older checkpoint
        changes.selecting(items)  # raises for what are no paths
        self._taken = GraphObjects(like, objects)
        self._taken.check()
        _check_shardings(self._taken.state)
        for name, value in self._taken.others.items():
            require_stateful(name, value)
        self._items, self._changes = items, changes

    def read(self, path: str) -> tuple[Any, dict[str, Any]]:
        """(the state, {object: its saved state}) of the checkpoint at `path`; nothing is changed yet."""
        taken = self._taken
        return restore_checkpoint(path, taken.state, items=self._items, changes=self._changes, objects=taken.items)

    def deliver(self, restored: Any, states: Mapping[str, Any]) -> Any:
        """Sets what is updated in place, and returns the state; for when nothing can fail any more."""
        for name, value in self._taken.others.items():
            set_saved_state(value, states[name])
        return self._taken.update(restored, states)


def _check_shardings(like: Any) -> None:
    """Raises InvalidArgumentError for a sharding that its leaf cannot have: no fault of the checkpoint."""
    try:
        leaves = jax.tree_util.tree_leaves(like)
    except (TypeError, ValueError):  # what JAX cannot flatten has its own error
        return
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        try:
            if leaf.sharding is not None:
                sharding = on_devices(leaf.sharding)
                sharding.shard_shape(leaf.shape)
                _ = sharding.device_set  # which an abstract mesh has not
        except (TypeError, ValueError) as error:
            path, _ = jax.tree_util.tree_leaves_with_path(like)[number]
            name = "/".join(map(tree.key_text, path)) or "the state"
            raise InvalidArgumentError(f"`like`: {name} cannot be sharded so: {error}") from error


def restore(
    path: Any,
    like: Any = None,
    *,
    items: Iterable[str] | None = None,
    cast: Any = False,
    missing: Literal["error", "keep"] = "error",
    unexpected: Literal["error", "ignore"] = "error",
    rename: Any = None,
    typed: bool = False,
    **objects: Any,
) -> Any:
    """Restores the one checkpoint at `path`: a step of a run, what a `Checkpointer`, Orbax or Flax wrote.

    For a run, with its newest checkpoint and fallback, there is `CheckpointManager`.

    Args:
      path: a checkpoint's directory, or a msgpack file of `flax.training.checkpoints`.
      like, items, cast, missing, unexpected, rename, typed, objects: as in `CheckpointManager.restore`. Where a
        checkpoint is one tree without items, the keys at its top stand for them.

    Raises:
      CheckpointNotFoundError: (FileNotFoundError) there is none.
      InvalidArgumentError: (ValueError) `path` is a run, among others.
      IncompleteCheckpointError, CorruptCheckpointError, StructureMismatchError: (ValueError).
      ItemNotFoundError: (KeyError) an item was not saved.

    >>> import numpy as np, tempfile
    >>> from flax import serialization
    >>> path = tempfile.mkdtemp() + "/weights.msgpack"
    >>> with open(path, "wb") as file:
    ...     _ = file.write(serialization.to_bytes({"params": {"w": np.ones(2)}, "step": 7}))
    >>> restore(path)
    {'params': {'w': array([1., 1.])}, 'step': 7}
    >>> restore(path, {"params": {"w": np.zeros(2)}}, items=["params"])
    {'params': {'w': array([1., 1.])}}
    """
    changes = Changes.checked(cast, missing, unexpected, rename, typed, has_target=like is not None)
    request = RestoreRequest(like, items=items, changes=changes, objects=objects)
    return request.deliver(*request.read(_require_checkpoint(path)))


def _require_checkpoint(path: Any) -> str:
    absolute = local_path(require_path(path, "the path of a checkpoint"))
    if is_file(absolute):  # of msgpack
        return absolute
    if is_run(absolute):
        raise InvalidArgumentError(
            f"{absolute} is a run: restore its newest checkpoint with CheckpointManager, or name one of its steps"
        )
    if not is_directory(absolute):
        raise CheckpointNotFoundError(f"there is no checkpoint at {absolute}")
    if not is_committed(absolute):
        raise IncompleteCheckpointError(f"{absolute} is no checkpoint, or one that was never committed")
    return absolute
