"""The stage of an attack: a run with a few checkpoints, copied anew for each strike, and one operation on it."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from collections.abc import Callable, Sequence

from attacks.checks import Problem, look_again
from attacks.forks import Outcome, Tell, in_fork
from attacks.libraries import LIBRARIES, Library
from attacks.operations import OPERATIONS, Expected, Operation

__all__ = ["Scene", "scenes"]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One operation of one library on one kind of state.

    Attributes:
      template: the run as it is before, which stays as it is.
      run: the run that is struck.
    """

    library: Library
    name: str
    operation: Operation
    kind: str
    template: str
    run: str

    def set_up(self) -> None:
        """The run as it is before."""
        for path in (self.run, f"{self.run}.aside"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.template, self.run)

    def fork(self, function: Callable[[Tell], None]) -> Outcome:
        """`function` in a process of its own, which is taken for hung after the library's time."""
        return in_fork(function, timeout_secs=self.library.timeout_secs)

    def look_again(self, expected: Expected) -> list[Problem]:
        """What another process finds wrong with the run."""
        outcome = self.fork(
            lambda tell: tell(problems=look_again(self.library, self.run, expected, self.operation, self.kind))
        )
        problems = [(name, text) for name, text in outcome.last("problems", ())]
        return [*problems, *([("hung", outcome.problem)] if outcome.problem else [])]


def scenes(library_name: str, operations: Sequence[str], kinds: Sequence[str], directory: str) -> list[Scene]:
    """Each of the operations that a library has, on each kind of state; the runs are made below `directory`."""
    library = LIBRARIES[library_name]
    library.load()
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    made = []
    for name in operations:
        operation = OPERATIONS[name]
        if operation.needs and operation.needs not in library.has:
            continue
        for kind in kinds:
            place = os.path.join(directory, f"{name.replace(' ', '-')}-{kind}")
            made.append(Scene(library, name, operation, kind, f"{place}-before", place))
            _prepare(made[-1])
    return made


def _prepare(scene: Scene) -> None:
    def prepare(tell: Tell) -> None:
        scene.operation.prepare(scene.library, scene.template, scene.kind)
        tell(prepared=True)

    outcome = scene.fork(prepare)
    if not outcome.last("prepared"):
        raise RuntimeError(f"{scene.library.name} cannot prepare {scene.name!r}: {outcome.problem}")
