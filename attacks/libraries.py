"""Who is attacked: this library and Orbax, behind the few methods that the operations use; and a control."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import shutil
from typing import Any, Protocol

__all__ = ["LIBRARIES", "Careless", "Library", "Orbax", "Ours", "Run"]


class Run(Protocol):
    """An open directory of checkpoints."""

    def save(self, step: int, state: Any, **options: Any) -> None:
        """May return before the commit."""

    def wait(self) -> None:
        """Until everything is committed; raises what failed."""

    def restore(self, step: int | None = None) -> tuple[int, Any]:
        """(the step, its state); the newest one for None."""

    def steps(self) -> list[int]: ...

    def close(self) -> None: ...


class Library(Protocol):
    """A way to open a run.

    Attributes:
      name: in the tables.
      has: what it can do besides saving and restoring.
      timeout_secs: after which it counts as hung.
    """

    name: str
    has: frozenset[str]
    timeout_secs: float

    def load(self) -> None:
        """Imports it, so that a fork has it."""

    def open(self, directory: str, *, keep: Any = None, async_save: bool = True) -> Run: ...


class Ours:
    """`ckpt_hooks.CheckpointManager`."""

    name = "ours"
    has = frozenset({"force", "fallback", "record_metrics", "rollback", "errors"})
    timeout_secs = 60.0

    def load(self) -> None:
        importlib.import_module("ckpt_hooks")

    def open(self, directory: str, *, keep: Any = None, async_save: bool = True) -> Run:
        return _OurRun(directory, keep, async_save)


class _OurRun:
    def __init__(self, directory: str, keep: Any, async_save: bool) -> None:
        from ckpt_hooks import CheckpointManager

        self.manager = CheckpointManager(directory, keep=keep, async_save=async_save)
        self.save = self.manager.save
        self.wait = self.manager.wait
        self.steps = self.manager.steps
        self.record_metrics = self.manager.record_metrics
        self.rollback = self.manager.rollback
        self.close = self.manager.close

    def restore(self, step: int | None = None) -> tuple[int, Any]:
        return self.manager.restore_with_step(step=step)


class Orbax:
    """`orbax.checkpoint.CheckpointManager`, told to clear up what dead writers left."""

    name = "orbax"
    has: frozenset[str] = frozenset()
    timeout_secs = 40.0

    def load(self) -> None:
        importlib.import_module("orbax.checkpoint")
        logging.disable(logging.WARNING)  # it warns in every process

    def open(self, directory: str, *, keep: Any = None, async_save: bool = True) -> Run:
        return _OrbaxRun(directory, keep, async_save)


class _OrbaxRun:
    def __init__(self, directory: str, keep: Any, async_save: bool) -> None:
        import orbax.checkpoint as orbax

        self._args = orbax.args
        options = orbax.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=async_save, cleanup_tmp_directories=True, create=True
        )
        self._manager = orbax.CheckpointManager(directory, options=options)
        self.wait = self._manager.wait_until_finished
        self.close = self._manager.close

    def save(self, step: int, state: Any, **options: Any) -> None:
        if not self._manager.save(step, args=self._args.StandardSave(state), **options):
            raise RuntimeError(f"save({step}) returned False: nothing was saved")

    def restore(self, step: int | None = None) -> tuple[int, Any]:
        number = self._manager.latest_step() if step is None else step
        if number is None:
            raise FileNotFoundError("there is no checkpoint")
        return number, self._manager.restore(number, args=self._args.StandardRestore())

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())


class Careless:
    """What is written in a hurry: pickle, straight to its place. An attack that finds nothing here finds nothing."""

    name = "careless"
    has = frozenset({"force"})
    timeout_secs = 60.0

    def load(self) -> None:
        pass

    def open(self, directory: str, *, keep: Any = None, async_save: bool = True) -> Run:
        return _CarelessRun(directory, keep)


class _CarelessRun:
    def __init__(self, directory: str, keep: int | None) -> None:
        self._directory, self._keep = directory, keep

    def save(self, step: int, state: Any, **options: Any) -> None:
        folder = os.path.join(self._directory, str(step))
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(os.path.join(folder, "state"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(descriptor, pickle.dumps(state))  # how much was written?
            os.fsync(descriptor)
        except OSError:
            pass
        finally:
            os.close(descriptor)
        for old in self.steps()[: -self._keep] if self._keep else ():
            shutil.rmtree(os.path.join(self._directory, str(old)))

    def wait(self) -> None:
        pass

    def restore(self, step: int | None = None) -> tuple[int, Any]:
        number = max(self.steps()) if step is None else step
        with open(os.path.join(self._directory, str(number), "state"), "rb") as file:
            return number, pickle.load(file)

    def steps(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(self._directory))

    def close(self) -> None:
        pass


LIBRARIES: dict[str, Library] = {library.name: library for library in (Ours(), Orbax(), Careless())}
