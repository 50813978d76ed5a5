"""What runs when an attack strikes, and what must be there afterwards.

States are numbered: state 3 is what step 3 was saved with, state 1002 what step 2 was saved with the second time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

from attacks.libraries import Library, Run
from attacks.states import differences, state_of

__all__ = ["OPERATIONS", "Expected", "Operation", "flip_a_bit", "step_of_state"]

Tell = Callable[..., None]
AGAIN = 1000  # added to a state's number where its step is saved once more
_METRIC = "accuracy"


def step_of_state(number: int) -> int:
    return number % AGAIN


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that a program does with a run.

    Attributes:
      act: does it; tells ``acknowledged=<state>`` as soon as a state counts as saved, and what it restored as
        ``restored=<step>`` and ``wrong=<its differences>``.
      before: the states that are saved first.
      attempts: the states that it saves.
      may_go: steps that it removes or sets aside.
      set_aside: of these, the ones that must then be there as ``<step>.rolled_back``.
      damaged: a step in which one bit is flipped beforehand.
      keep, async_save: how the run is opened.
      with_metrics: whether saves carry a metric.
      needs: what a library must have for it.
      restores: whether it restores the newest checkpoint.
      reads_only: whether it saves nothing.
    """

    act: Callable[[Run, str, Tell], None]
    before: tuple[int, ...] = (1, 2)
    attempts: tuple[int, ...] = ()
    may_go: frozenset[int] = frozenset()
    set_aside: frozenset[int] = frozenset()
    damaged: int | None = None
    keep: Any = None
    async_save: bool = True
    with_metrics: bool = False
    needs: str = ""
    restores: bool = False
    reads_only: bool = False

    def open(self, library: Library, directory: str) -> Run:
        keep = self.keep() if callable(self.keep) else self.keep
        return library.open(directory, keep=keep, async_save=self.async_save)

    def prepare(self, library: Library, directory: str, kind: str) -> None:
        """Makes the run that is there before."""
        run = self.open(library, directory)
        for number in self.before:
            run.save(number, state_of(number, kind), **self.options(number))
            run.wait()
        run.close()
        if self.damaged is not None:
            flip_a_bit(os.path.join(directory, str(self.damaged)))

    def options(self, number: int) -> dict[str, Any]:
        """Further arguments with which a state is saved."""
        return {"metrics": {_METRIC: 1 / number}} if self.with_metrics else {}

    def expected(self, acknowledged: Iterable[int]) -> Expected:
        """What must be there, given the states that were acknowledged."""
        return Expected.after(self, set(acknowledged))


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a run must hold.

    Attributes:
      states: {step: the states that it may hold}; a step that is not in here must not be there.
      required: steps that must be there.
      newest: steps that a restore without a step may give.
      aside: steps that must be there or be set aside, whole, if they were saved.
      damaged: a step that does not verify.
      next_step: one to save next.
      keeps_all: whether nothing is removed by retention.
      saved: steps that were saved for sure.
    """

    states: dict[int, set[int]]
    required: set[int]
    newest: set[int]
    aside: frozenset[int]
    damaged: int | None
    next_step: int
    keeps_all: bool
    saved: set[int]

    @classmethod
    def after(cls, operation: Operation, acknowledged: set[int]) -> Expected:
        states: dict[int, set[int]] = {}
        for number in (*operation.before, *operation.attempts):
            states.setdefault(step_of_state(number), set()).add(number)
        for number in acknowledged:
            if number >= AGAIN or number in operation.attempts:
                states[step_of_state(number)] = {number}
        steps_before = {step_of_state(number) for number in operation.before}
        saved = steps_before | {step_of_state(number) for number in acknowledged}
        required = saved - operation.may_go - {operation.damaged}
        newest = {step for step in states if step >= max(required)} - {operation.damaged}
        # Done for sure: what it sets aside is no longer the newest.
        if operation.set_aside and acknowledged:
            newest = required & {max(required)}
            states = {step: numbers for step, numbers in states.items() if step not in operation.set_aside}
        next_step = 1 + max(step_of_state(number) for number in (*operation.before, *operation.attempts))
        keeps_all = operation.keep is None
        return cls(states, required, newest, operation.set_aside, operation.damaged, next_step, keeps_all, saved)

    def after_reading_errors(self) -> Expected:
        """The same where a checkpoint that could not be read may have been taken for damaged, and set aside whole."""
        steps = frozenset(self.states) - {self.damaged}
        return dataclasses.replace(self, required=set(), newest=set(steps), aside=self.aside | steps)

    def and_next(self) -> Expected:
        """The same after `next_step` has been saved."""
        step = self.next_step
        return dataclasses.replace(
            self,
            states={**self.states, step: {step}},
            required=(self.required if self.keeps_all else set()) | {step},
            newest={step},
            next_step=step + 1,
        )


def flip_a_bit(checkpoint: str) -> None:
    """Damages a checkpoint: one bit in the middle of its largest file."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(checkpoint) for name in names]
    largest = max(files, key=os.path.getsize)
    with open(largest, "r+b") as file:
        file.seek(os.path.getsize(largest) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


# ------------------------------------------------------------------ the operations


def _save(number: int) -> Callable[[Run, str, Tell], None]:
    def act(run: Run, kind: str, tell: Tell) -> None:
        options = {"force": True} if number >= AGAIN else {}
        run.save(step_of_state(number), state_of(number, kind), **options)
        run.wait()
        tell(acknowledged=number)

    return act


def _save_twice(run: Run, kind: str, tell: Tell) -> None:
    run.save(3, state_of(3, kind))
    run.save(4, state_of(4, kind))
    tell(acknowledged=3)  # the second save waits for the first
    run.wait()
    tell(acknowledged=4)


def _restore(run: Run, kind: str, tell: Tell) -> None:
    step, state = run.restore()
    tell(restored=step, wrong=differences(state, step, kind))


def _fall_back_and_save(run: Run, kind: str, tell: Tell) -> None:
    _restore(run, kind, tell)
    _save(4)(run, kind, tell)


def _record_metrics(run: Any, kind: str, tell: Tell) -> None:
    del kind
    run.record_metrics(2, {_METRIC: 2.0})  # now the best, so that retention removes step 1
    tell(acknowledged=2)


def _rollback(run: Any, kind: str, tell: Tell) -> None:
    del kind
    run.rollback(1)
    tell(acknowledged=1)


def _newest_and_best() -> Any:
    from ckpt_hooks import BestN, LatestN

    return [LatestN(1), BestN(1, _METRIC, mode="max")]


OPERATIONS: dict[str, Operation] = {
    "save": Operation(_save(3), attempts=(3,), async_save=False),
    "async save": Operation(_save(3), attempts=(3,)),
    "second save": Operation(_save_twice, attempts=(3, 4)),
    "retention": Operation(_save(3), attempts=(3,), keep=2, may_go=frozenset({1})),
    "overwrite": Operation(
        _save(1002),
        before=(1, 2, 3),
        attempts=(1002,),
        may_go=frozenset({3}),
        set_aside=frozenset({3}),
        needs="force",
    ),
    "fallback": Operation(
        _fall_back_and_save, before=(1, 2, 3), attempts=(4,), damaged=3, restores=True, needs="fallback"
    ),
    "record_metrics": Operation(
        _record_metrics,
        keep=_newest_and_best,
        may_go=frozenset({1}),
        with_metrics=True,
        needs="record_metrics",
    ),
    "rollback": Operation(
        _rollback,
        before=(1, 2, 3),
        may_go=frozenset({2, 3}),
        set_aside=frozenset({2, 3}),
        needs="rollback",
    ),
    "restore": Operation(_restore, restores=True, reads_only=True),
}
