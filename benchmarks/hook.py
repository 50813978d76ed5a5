"""What a call of the hook costs at a step at which nothing is due.

    python -m benchmarks.hook

Each figure is the mean of a few thousand calls in a row. ``a function`` is a Python function that returns False: below
it no hook can be. ``orbax`` is the call that its users make at every step, ``CheckpointManager.save``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as orbax

from benchmarks.contestants import CONTROL, OURS
from benchmarks.options import empty_directory, parse
from benchmarks.report import Report
from benchmarks.timing import Measurement, alternate, seconds_of
from benchmarks.workloads import State
from ckpt_hooks import CheckpointHook

__all__ = ["main"]

_NEVER = 10**12  # a step that is not reached
_CALLS = 5000

Call = Callable[[int, State], object]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, argv, workloads=("tiny",))
    report = Report("hook", options)
    num_calls = 50 if options.tiny else _CALLS
    for workload in options.workloads:
        state = workload.make(options.scale)
        with empty_directory(options.directory) as directory, contextlib.ExitStack() as stack:
            runs = {
                name: functools.partial(_call, call, state, itertools.count(1), num_calls)
                for name, call in _calls(directory, stack).items()
            }
            measured = alternate(runs, options.rounds)
            report.add(f"{workload.name}: a call with nothing due", "us", measured["call"])
    report.close()


def _calls(directory: str, stack: contextlib.ExitStack) -> dict[str, Call]:
    def hook(name: str, **triggers: Any) -> Call:
        return stack.enter_context(CheckpointHook(os.path.join(directory, name), **triggers))

    return {
        OURS: hook("ours", every_n_steps=_NEVER),
        CONTROL: hook("control", every_n_steps=_NEVER),
        "ours, by the clock": hook("clock", every_secs=_NEVER),
        "orbax": _orbax_manager(os.path.join(directory, "orbax"), stack),
        "a function": _return_false,
    }


def _call(call: Call, state: State, steps: itertools.count[int], num_calls: int) -> Measurement:
    def loop() -> None:
        for step in itertools.islice(steps, num_calls):
            call(step, state)

    return {"call": 1e6 * seconds_of(loop) / num_calls}


def _orbax_manager(directory: str, stack: contextlib.ExitStack) -> Call:
    options = orbax.CheckpointManagerOptions(save_interval_steps=_NEVER)
    manager = stack.enter_context(orbax.CheckpointManager(directory, options=options))
    manager.save(0, args=orbax.args.StandardSave({"step": 0}))  # the first one it always saves
    manager.wait_until_finished()
    return lambda step, state: manager.save(step, args=orbax.args.StandardSave(state))


def _return_false(step: int, state: State) -> bool:
    del step, state
    return False


if __name__ == "__main__":
    main()
