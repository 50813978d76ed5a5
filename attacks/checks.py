"""What is demanded of a run after an attack, whatever the attack was."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from attacks.libraries import Library, Run
from attacks.operations import Expected, Operation, step_of_state
from attacks.states import differences, state_of, step_of

__all__ = ["CLASSES", "Problem", "go_on", "left_over", "look", "look_again"]

Problem = tuple[str, str]  # (one of CLASSES, what is wrong)

CLASSES = {
    "lost": "a checkpoint that was acknowledged is not there, or does not restore",
    "torn": "a checkpoint that was being saved or removed is listed, and does not restore",
    "wrong": "a restore gave values that were not saved, or of another step",
    "refused": "a restore of the newest checkpoint gave none, or one older than the last that was acknowledged",
    "afresh": "a restore said that there is no checkpoint, so that a program would begin anew",
    "stuck": "the next save failed",
    "left over": "after the next save, something lies there that is no checkpoint",
    "silent": "a save whose bytes or names could not be written was acknowledged",
    "late": "a restore raised once, and then gave the checkpoint: the failure of an earlier save came out of it",
    "unclear": "an error that does not say which checkpoint and why, or is not of the library's own",
    "hung": "the operation or what came after it did not end, or crashed",
}


def look(run: Run, expected: Expected, operation: Operation, kind: str) -> Iterator[Problem]:
    """Restores every step, and the newest; each must be one that was saved, and none may be missing."""
    steps = run.steps()
    for step in sorted(expected.required - set(steps)):
        yield "lost", f"step {step} is not there; there are {steps}"
    for step in steps:
        if step not in expected.states:
            yield "wrong", f"step {step} is there"
        elif step != expected.damaged:
            yield from _look_at(run, step, expected, kind)
    try:
        step, state = run.restore()
    except Exception as error:
        yield "refused", f"restore(): {_text(error)}"
        return
    if step not in expected.newest:
        yield "refused", f"restore() gave step {step}, not one of {sorted(expected.newest)}"
    yield from _wrong(step, state, expected, kind)
    if operation.with_metrics:
        yield from _look_at_metrics(run)


def _look_at(run: Run, step: int, expected: Expected, kind: str) -> Iterator[Problem]:
    try:
        number, state = run.restore(step)
    except Exception as error:
        if _restores(run, step):
            yield "late", f"restore({step}): {_text(error)}"
            return
        yield "lost" if step in expected.required | expected.aside else "torn", f"restore({step}): {_text(error)}"
        return
    yield from _wrong(number, state, expected, kind)


def _restores(run: Run, step: int) -> bool:
    try:
        run.restore(step)
    except Exception:
        return False
    return True


def _wrong(step: int, state: Any, expected: Expected, kind: str) -> Iterator[Problem]:
    claimed = step_of(state)
    if claimed is None or claimed not in expected.states.get(step, ()):
        yield "wrong", f"step {step} has state {claimed}, not one of {expected.states.get(step)}"
    else:
        for difference in differences(state, claimed, kind):
            yield "wrong", f"step {step}, {difference}"


def _look_at_metrics(run: Any) -> Iterator[Problem]:
    for step in run.steps():
        if not run.manager.metadata(step).metrics:
            yield "lost", f"the metrics of step {step}"


def go_on(run: Run, step: int, operation: Operation, kind: str) -> Iterator[Problem]:
    """The next save must work, and be the newest then."""
    try:
        run.save(step, state_of(step, kind), **operation.options(step))
        run.wait()
    except Exception as error:
        yield "stuck", f"save({step}): {_text(error)}"
        return
    try:
        number, state = run.restore()
    except Exception as error:
        yield "refused", f"restore() after the next save: {_text(error)}"
        return
    if number != step:
        yield "refused", f"restore() after the save of step {step} gave step {number}"
    for difference in differences(state, step_of_state(number), kind):
        yield "wrong", f"step {number} after the next save, {difference}"


def look_again(library: Library, directory: str, expected: Expected, operation: Operation, kind: str) -> list[Problem]:
    """All of it with the run opened anew, as the next process does."""
    try:
        run = operation.open(library, directory)
    except Exception as error:
        return [("refused", f"opening the run: {_text(error)}")]
    problems = [*look(run, expected, operation, kind), *go_on(run, expected.next_step, operation, kind)]
    steps = run.steps()
    try:
        run.close()
    except Exception as error:
        problems.append(("stuck", f"close(): {_text(error)}"))
    return [*problems, *left_over(library, directory, steps, expected, kind)]


def left_over(library: Library, directory: str, steps: list[int], expected: Expected, kind: str) -> Iterator[Problem]:
    """Only checkpoints may be there, and what was set aside on purpose, which must be whole."""
    asides = {f"{step}.{label}": step for step in expected.aside for label in ("rolled_back", "damaged")}
    allowed = {*map(str, steps), *asides, f"{expected.damaged}.damaged"}
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            place = os.path.relpath(os.path.join(folder, name), directory)
            if (folder == directory and name not in allowed) or "tmp" in name:
                yield "left over", place
    present = {step: name for name, step in asides.items() if os.path.isdir(os.path.join(directory, name))}
    for step in sorted(expected.saved & expected.aside - set(steps) - present.keys()):
        yield "lost", f"step {step} is neither there nor set aside"
    for step, name in present.items():
        yield from _look_aside(library, directory, name, step, expected, kind)


def _look_aside(
    library: Library, directory: str, name: str, step: int, expected: Expected, kind: str
) -> Iterator[Problem]:
    """What was set aside is whole: renamed back, it restores."""
    there, back = os.path.join(directory, name), os.path.join(f"{directory}.aside", str(step))
    os.makedirs(f"{directory}.aside", exist_ok=True)
    os.rename(there, back)
    run = library.open(os.path.dirname(back))
    yield from _look_at(run, step, dataclasses.replace(expected, states={step: {step}}), kind)
    run.close()
    os.rename(back, there)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
