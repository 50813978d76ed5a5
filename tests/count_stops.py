"""Counts the files and functions of ours that a state passes on its way from ``hook(step, state)`` to bytes.

Run it with ``python -m tests.count_stops``. It counts every Python function of the library that is called between
the call of the hook and the commit, in both threads, in a save after the first (the plan is cached, the directory
is locked), and prints them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ckpt_hooks
from ckpt_hooks import CheckpointHook
from tests.profiled import run_profiled

PACKAGE = os.path.dirname(ckpt_hooks.__file__)
Code = tuple[str, str]  # (file, function)


def called_in(action: Callable[[], object]) -> set[Code]:
    """The functions of the library that run in `action`, and in the threads that it starts."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        del argument
        if event == "call":
            seen.add(frame.f_code)

    run_profiled(action, note)
    names = {(code.co_filename, code.co_qualname) for code in seen}
    # A lambda, comprehension or closure is a part of the function that it stands in.
    return {
        (os.path.relpath(file, PACKAGE), name.split(".<locals>")[0])
        for file, name in names
        if file.startswith(PACKAGE) and not name.endswith("<module>")
    }


def save_stops(directory: str) -> set[Code]:
    """What the third save of a state with three small items passes."""
    params = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.int32(0)}
    jax.block_until_ready(state)
    with CheckpointHook(directory, every_n_steps=1) as hook:
        for step in (1, 2):
            hook(step, state, metrics={"loss": 0.5})
            hook.wait()

        def third() -> None:
            hook(3, state, metrics={"loss": 0.5})
            hook.wait()

        return called_in(third)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        stops = save_stops(directory)
    files = sorted({file for file, _ in stops})
    for file in files:
        print(f"{file:28}", *sorted(name for path, name in stops if path == file))
    print(f"{len(files)} files, {len(stops)} functions")


if __name__ == "__main__":
    main()
