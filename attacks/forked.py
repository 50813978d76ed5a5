"""Tasks side by side, each in a process that inherits what it needs."""

from __future__ import annotations

import functools
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

__all__ = ["run_forked"]

_T = TypeVar("_T")


def run_forked(tasks: Sequence[Callable[[], _T]]) -> list[_T]:
    """What the tasks return, in their order; a single one runs here. Raises where one of them has raised."""
    if len(tasks) == 1:
        return [tasks[0]()]
    context = multiprocessing.get_context("fork")  # a task need not be picklable then, only what it returns
    ends = []
    for task in tasks:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=functools.partial(_run, task, theirs))
        process.start()
        theirs.close()
        ends.append((process, ours))
    answers = []
    for process, ours in ends:
        answers.append(_answer(ours))
        process.join()
    failures = [failure for _, failure in answers if failure]
    if failures:
        raise RuntimeError(f"a process of the attack failed:\n{failures[0]}")
    return [result for result, _ in answers]  # type: ignore[misc]


def _run(task: Callable[[], _T], end: Connection) -> None:
    try:
        end.send((task(), ""))
    except BaseException:
        end.send((None, traceback.format_exc()))


def _answer(end: Connection) -> tuple[_T | None, str]:
    try:
        result, failure = end.recv()
    except EOFError:
        return None, "it ended without a word"
    return result, failure
