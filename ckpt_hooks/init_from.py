"""Where a run's first state comes from: the parameters of another run, as fine-tuning starts with them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from ckpt_hooks import train_state
from ckpt_hooks.agreement import Together
from ckpt_hooks.arguments import require_path
from ckpt_hooks.changes import Changes
from ckpt_hooks.errors import CheckpointNotFoundError, InvalidArgumentError, InvalidArgumentTypeError, ItemNotFoundError
from ckpt_hooks.flax_runs import is_flax_checkpoint
from ckpt_hooks.graph_objects import is_graph_object, split
from ckpt_hooks.listing import is_run
from ckpt_hooks.manager import CheckpointManager
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.requested import RestoreRequest
from ckpt_hooks.storage.lookup import local_path

__all__ = ["InitFrom"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Parts of a state that come from another run when this one has no checkpoint yet.

    Attributes:
      directory: a run, or one checkpoint (``runs/base/1000``), whoever wrote it; also a msgpack file of Flax's.
      items: which items, or paths below them as in `CheckpointManager.restore`; everything else stays as it was made.
      step: of a run: a step, "best", or None for the newest that verifies.
      cast, missing, unexpected, rename: how they may differ, as in `CheckpointManager.restore`.

    >>> import numpy as np, tempfile
    >>> base = tempfile.mkdtemp()
    >>> with CheckpointManager(base) as manager:
    ...     manager.save(7, {"params": {"w": np.ones(2)}, "step": 7})
    >>> InitFrom(base).fill({"params": {"w": np.zeros(2)}, "step": 0})
    {'params': {'w': array([1., 1.])}, 'step': 0}
    """

    directory: Any
    items: Iterable[str] = ("params",)
    step: int | Literal["latest", "best"] | None = None
    cast: Any = False
    missing: Literal["error", "keep"] = "error"
    unexpected: Literal["error", "ignore"] = "error"
    rename: Any = None

    def __post_init__(self) -> None:
        # So that a mistake is told at the start of the program.
        if not isinstance(self.directory, str | os.PathLike):
            raise InvalidArgumentTypeError(f"init_from= is a run, a checkpoint or an InitFrom; got {self.directory!r}")
        require_path(self.directory, "init_from=")
        if isinstance(self.items, Iterator):
            object.__setattr__(self, "items", tuple(self.items))  # or nothing would be left of it after this look
        self._changes().selecting(self.items)
        # As the run's own directory, whatever directory the program changes to.
        object.__setattr__(self, "directory", local_path(os.fspath(self.directory)))

    def _changes(self) -> Changes:
        return Changes.checked(self.cast, self.missing, self.unexpected, self.rename, has_target=True)

    def fill(self, state: Any, processes: MultiprocessingOptions | None = None) -> Any:
        """The state with these items as they were saved there; of several `processes`, all have to call it.

        Raises CheckpointNotFoundError where there is nothing, and what `CheckpointManager.restore` raises.
        """
        path = self.directory
        self._require_parts(state)
        is_one = is_flax_checkpoint(path) and not is_run(path)
        read = self._from_checkpoint if is_one else self._from_run
        parts = read(path, state, processes or MultiprocessingOptions())
        whole = {**split(state), **parts}
        return whole[train_state.WHOLE] if is_graph_object(state) else train_state.join(state, whole)

    def _require_parts(self, state: Any) -> None:
        asked, _ = self._changes().selecting(self.items)
        parts = sorted(split(state))
        absent = [name for name in asked or () if name not in parts]
        if absent:
            raise ItemNotFoundError(
                f"init_from: the state has no part {absent}; it has {parts}. Name those that begin as they are in "
                f"{self.directory}: InitFrom({str(self.directory)!r}, items=({parts[0]!r},))."
            )

    def _from_checkpoint(self, path: str, state: Any, processes: MultiprocessingOptions) -> Any:
        if self.step is not None:
            raise InvalidArgumentError(f"init_from: {path} is a checkpoint, so step={self.step!r} has no meaning")
        request = RestoreRequest(state, items=self.items, changes=self._changes(), objects={})
        with Together(processes, "reads what a run begins with"):
            restored = request.read(path)
        parts = request.deliver(*restored)
        _log.info("%s begin as they are in %s", sorted(parts), path)
        return parts

    def _from_run(self, path: str, state: Any, processes: MultiprocessingOptions) -> Any:
        with CheckpointManager(path, multiprocessing_options=processes) as manager:
            if manager.is_empty():
                raise CheckpointNotFoundError(f"init_from: {path} has no checkpoint to begin with")
            found, parts = manager.restore_with_step(state, step=self.step, items=self.items, changes=self._changes())
        _log.info("%s begin as they were at step %d of %s", sorted(parts), found, path)
        return parts
