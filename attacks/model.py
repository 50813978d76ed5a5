"""What a run must hold, as a dict: the model that `machine` compares the library with. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from attacks.history_check import Keep
from ckpt_hooks.errors import InvalidArgumentError, MetricNotFoundError

__all__ = ["Model", "Saved"]


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was saved: a number that no other save has, and the metric, if one was recorded."""

    stamp: int
    loss: float | None


class Model:
    """The checkpoints of a run, and what its manager knows of them.

    Attributes:
      saved: {step: what was saved} of every committed checkpoint, damaged or not.
      damaged: those of which a part of the params is not what was saved.
      rejected: those that this manager has found damaged; it does not list them, and its next save sets them aside.
      strays: directories by the name of a step that are no checkpoints.
      is_locked: whether the manager has become the run's writer.
    """

    def __init__(self, keep: Keep) -> None:
        self.saved: dict[int, Saved] = {}
        self.damaged: set[int] = set()
        self.rejected: set[int] = set()
        self.strays: set[int] = set()
        self.is_locked = False
        self.keep = keep

    def reopen(self, keep: Keep) -> None:
        """Another manager knows nothing of what was rejected."""
        self.keep = keep
        self.rejected = set()
        self.is_locked = False

    # -------------------------------------------------------------- asking

    def visible(self) -> Mapping[int, Saved]:
        """The checkpoints that the manager lists."""
        return {step: saved for step, saved in self.saved.items() if step not in self.rejected}

    def known(self, fresh: bool = False) -> set[int]:
        """The steps that a save without force has to be above."""
        return set(self.saved if fresh else self.visible())

    def newest_sound(self) -> int | None:
        """The newest checkpoint that verifies."""
        return max(self.visible().keys() - self.damaged, default=None)

    def best(self) -> int | None:
        """The step with the least finite loss; of equals, the newest."""
        finite = [
            (saved.loss, -step)
            for step, saved in self.visible().items()
            if saved.loss is not None and math.isfinite(saved.loss)
        ]
        return -min(finite)[1] if finite else None

    def refusal_of_save(self, step: int, loss: float | None, force: bool) -> type[Exception] | None:
        """Why a save must be refused."""
        visible = self.visible()
        if not force and visible and step <= max(visible):
            return InvalidArgumentError
        nobody_recorded = loss is None and all(saved.loss is None for saved in visible.values())
        if self.keep.best and len(visible) > self.keep.best and nobody_recorded:
            return MetricNotFoundError
        return None

    # -------------------------------------------------------------- changing

    def save(self, step: int, saved: Saved) -> None:
        """A committed save: it is the newest, what was damaged is set aside, and retention looks at the rest."""
        self.is_locked = True
        for rejected in list(self.rejected):  # `_drop` takes it out of there
            self._drop(rejected)
        self.rejected = set()
        self.strays.discard(step)
        self.damaged.discard(step)
        self.saved[step] = saved
        self.roll_back(step)
        self._retain()

    def roll_back(self, step: int) -> None:
        """The listed checkpoints above a step are set aside."""
        self.is_locked = True
        for newer in [other for other in self.visible() if other > step]:
            self._drop(newer)

    def delete(self, step: int) -> None:
        """A checkpoint is removed."""
        self.is_locked = True
        self._drop(step)

    def record(self, step: int, loss: float) -> None:
        """A metric arrives late, and retention looks again."""
        self.is_locked = True
        self.saved[step] = Saved(self.saved[step].stamp, loss)
        self._retain()

    def reject_above(self, step: int) -> None:
        """A restore fell back to `step`: what is newer has been rejected."""
        self.rejected |= {newer for newer in self.visible() if newer > step}

    def killed(self, step: int, saved: Saved, keep: Keep, listed: Sequence[int], *, has_committed: bool) -> None:
        """A writer with another retention was killed in a forced save; `listed` is what is there now.

        Either the save is as if it had not been, or it is there and the newer ones, and those that need not stay, may
        be gone, or not yet.
        """
        after = Model(keep)
        after.saved = dict(self.saved)
        after.save(step, saved)
        may_be_gone = self.saved.keys() - after.saved.keys() if has_committed else set()
        there = set(listed)
        assert there <= self.saved.keys() | ({step} if has_committed else set()), f"{listed}: some were never saved"
        assert self.saved.keys() - may_be_gone <= there, f"{listed} lacks some of {sorted(self.saved)}"
        if has_committed:
            self.saved[step] = saved
            self.damaged.discard(step)
            self.strays.discard(step)
        self.saved = {other: self.saved[other] for other in listed}
        self.damaged &= self.saved.keys()

    def _retain(self) -> None:
        visible = self.visible()
        recorded = {step: saved.loss for step, saved in visible.items()}
        if self.keep.best and all(loss is None for loss in recorded.values()):
            return  # what may turn out to be the best must not go
        losses = {step: math.nan if loss is None else loss for step, loss in recorded.items()}
        for step in visible.keys() - self.keep.kept(losses):
            self._drop(step)

    def _drop(self, step: int) -> None:
        self.saved.pop(step, None)
        self.damaged.discard(step)
        self.rejected.discard(step)
