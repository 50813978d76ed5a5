"""The directory of a run: which steps it holds, what they recorded, who may write to it.

``<directory>/<step>/`` is a checkpoint if its name is the step's integer and it was committed. Where there is none,
``<directory>/checkpoint_<step>`` is, as Flax wrote it: it is read, and set aside where the run goes back beyond it, but
never written, and neither counted nor removed by retention. Everything else in the directory is left alone.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ckpt_hooks.arguments import require_path
from ckpt_hooks.committed import is_committed
from ckpt_hooks.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    InvalidArgumentError,
    UnwritableDirectoryError,
    explain_os_error,
)
from ckpt_hooks.flax_runs import PREFIX, checkpoints_named_otherwise, flax_path, is_flax_checkpoint
from ckpt_hooks.handlers.json import JsonCheckpointHandler
from ckpt_hooks.handlers.pytree import StandardCheckpointHandler
from ckpt_hooks.listing import Listing, Names, is_one_checkpoint, is_run
from ckpt_hooks.metadata import METADATA_FILE, StepMetadata, read_step_metadata, to_json_numbers, to_orbax_metrics
from ckpt_hooks.reading import read_unchanged
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FILE, FileChecksums, array_problems
from ckpt_hooks.storage.lookup import content_of, is_directory, is_named, is_there, local_path

__all__ = ["METRICS_ITEM", "OvertakenError", "RunDirectory"]

METRICS_ITEM = "metrics"
_METRICS_FILE = f"{METRICS_ITEM}/{METRICS_ITEM}"  # where Orbax's CheckpointManager keeps its metrics

_MAX_LISTINGS = 100
_SHOWN = 5  # names, in an error
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class OvertakenError(Exception):
    """A step that was listed is gone, for a writer has newer ones: what was listed with it is out of date too."""


class RunDirectory:
    """Reading needs no lock and makes nothing; `lock` comes before the first change."""

    def __init__(self, directory: Any) -> None:
        self.path = local_path(require_path(directory, "the directory of a run"))
        if is_named(self.path) and not is_directory(self.path):
            raise UnwritableDirectoryError(
                f"{self.path} is {'a file' if is_there(self.path) else 'a link to nothing'}; a run is a directory of "
                "checkpoints. Choose another path."
            )
        if is_one_checkpoint(self.path):
            raise InvalidArgumentError(_not_a_run(self.path))
        self.rejected: dict[int, str] = {}  # steps that did not verify, with the reason
        self._rejected_inodes: dict[int, tuple[int, ...]] = {}
        # While the run is locked nobody else adds steps, so a save need not list the directory. Only so many are
        # verified as somebody has to know: `known` are the newest checkpoints, oldest first, empty only where there
        # is none; `older` are the steps below them that nobody has looked at, oldest first.
        self.known: collections.deque[int] = collections.deque()
        self.older: list[int] = []
        self.flax_newest = -1  # of Flax's own steps, when the directory was last listed
        self._listing = Listing(self.path)
        self.writer_lock: commit.DirectoryLock | None = None
        self._warned: set[str] = set()
        self.recorded: dict[int, Mapping[str, Any]] = {}  # what steps recorded, where it was asked for

    def step_path(self, step: int) -> str:
        """Where a step of ours is, or will be."""
        return os.path.join(self.path, str(step))

    def find(self, step: int) -> str:
        """Where a step is: Flax's, where there is none of ours."""
        path = self.step_path(step)
        if step <= self.flax_newest and not is_committed(path) and is_flax_checkpoint(flax_path(self.path, step)):
            return flax_path(self.path, step)
        return path

    # -------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """The committed steps, oldest first, without those that did not verify."""
        return self.anew_if_overtaken(lambda: list(self.newest_first()))[::-1]

    def newest_first(self) -> Iterator[int]:
        """`steps`, newest first; looks at each one's directory when it is its turn.

        Raises OvertakenError where it finds one gone; `anew_if_overtaken` is for that.
        """
        for step in self._listed_steps():
            if self.is_checkpoint(step):
                yield step
            elif step not in self.rejected and not is_named(self.find(step)):
                raise OvertakenError

    def _listed_steps(self) -> Sequence[int]:
        """Newest first, committed or not."""
        steps, flax_steps, _ = self._listing.names()
        self.flax_newest = max(flax_steps, default=-1)
        return sorted({*steps, *flax_steps}, reverse=True) if flax_steps else steps

    def hint_at_other_names(self) -> str:
        """The end of a sentence that says there is no checkpoint: which there are, under names that are no steps."""
        found = checkpoints_named_otherwise(self.path)
        if not found:
            return ""
        path = os.path.join(self.path, found[-1])
        return (
            f" that is named by its step, but {found[-_SHOWN:]}. They are read by their path, as in "
            f"ckpt_hooks.restore({path!r}), and a run begins with one by init_from={path!r}. To go on with one here, "
            "rename it to its step, an integer without zeros before it."
        )

    def anew_if_overtaken(self, look: Callable[[], _T]) -> _T:
        """What `look` finds in a listing none of whose steps a writer has removed in the meantime."""
        for _ in range(_MAX_LISTINGS):
            try:
                return look()
            except OvertakenError:
                continue
        raise CheckpointError(
            f"{self.path}: {_MAX_LISTINGS} times, a step was removed while it was read; keep more of them (`keep=`)"
        )

    def latest_step(self) -> int | None:
        """The newest of `steps`; looks at no more directories than it has to."""
        return self.anew_if_overtaken(lambda: next(self.newest_first(), None))

    def is_checkpoint(self, step: int) -> bool:
        """Whether the step is committed and has not been rejected."""
        path = self.find(step)
        if step in self.rejected:
            if self._rejected_inodes.get(step) == _inode(path):
                return False
            del self.rejected[step]  # somebody has put another one there
        committed = path != self.step_path(step) or is_committed(path)
        if not committed and path not in self._warned and is_named(path):
            self._warned.add(path)
            _log.warning("%s is not a checkpoint (it was never committed) and is ignored", path)
        return committed

    def require(self, step: int) -> str:
        """The path of a committed step; CheckpointNotFoundError names those there are."""
        path = self.step_path(step)
        if not is_committed(path):
            if is_flax_checkpoint(flax_path(self.path, step)):
                return flax_path(self.path, step)
            if not is_directory(path):
                raise CheckpointNotFoundError(f"{self.path} has no checkpoint of step {step}; there are {self.steps()}")
            if not is_named(path):  # a writer has removed it in between
                raise CheckpointNotFoundError(f"{self.path} has no checkpoint of step {step}")
            raise IncompleteCheckpointError(f"step {step} of {self.path} was never committed; there are {self.steps()}")
        return path

    def require_newer(self, step: int) -> None:
        """Raises InvalidArgumentError where there is a checkpoint at a step or above it."""
        newest = self.latest_step()  # as it is on the disk, where somebody may have removed some by hand
        if newest is not None and step <= newest:
            raise InvalidArgumentError(
                f"save at step {step}, but {self.path} has step {newest} already. Restore first and go on from "
                "there, choose another directory, or pass force=True to take the run back to this step."
            )

    def metadata(self, step: int) -> StepMetadata:
        """The verified metadata of a step."""
        path = self.require(step)
        return read_unchanged(path, lambda: _verified_metadata(path))

    def metrics(self, step: int) -> Mapping[str, Any]:
        """What was recorded at a step, by us or by Orbax; nothing where it cannot be read."""
        # Whoever holds the lock is the only one who records, and a reader never knows.
        recorded = self.recorded.get(step) if self.writer_lock is not None else None
        if recorded is not None:
            return recorded
        try:
            metadata = self.metadata(step)
            recorded = dict(metadata.metrics or metadata.custom_metadata.get("metrics") or {})
            recorded = recorded or self._orbax_metrics(step)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            _log.warning("the metrics of step %d cannot be read: %s", step, error)
            return {}
        # Another thread may have recorded more since they were read, and merges what comes next into what is known.
        return recorded if self.writer_lock is None else self.recorded.setdefault(step, recorded)

    def all_metrics(self) -> dict[int, Mapping[str, Any]]:
        """{step: what it recorded}, of every committed step."""

        def look() -> dict[int, Mapping[str, Any]]:
            recorded = {}
            for step in self.newest_first():
                recorded[step] = self.metrics(step)
                if not recorded[step] and not is_named(self.find(step)):
                    raise OvertakenError  # it recorded something, perhaps, and nobody can say any more what
            return recorded

        return self.anew_if_overtaken(look)

    def _orbax_metrics(self, step: int) -> Mapping[str, Any]:
        try:
            content = json.loads(content_of(os.path.join(self.step_path(step), _METRICS_FILE)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return _finite_or_named(content) if isinstance(content, dict) else {}

    def problems(self, step: int) -> list[str]:
        """Reads every byte of a step and names what is not as it was saved; for ours only."""
        path = self.require(step)
        try:
            checksums = FileChecksums.of_checkpoint(path, METADATA_FILE)
        except CorruptCheckpointError as error:
            return [str(error)]
        return [*(checksums.problems(path) if checksums else ()), *array_problems(path)]

    # -------------------------------------------------------------- writing

    def lock(self) -> None:
        """Makes the directory and becomes its one writer; clears up after writers that died.

        Raises RunLockedError where another writer lives, UnwritableDirectoryError where nobody may write.
        """
        if self.writer_lock is not None and self.writer_lock.is_of(self.path):
            return
        self.unlock()  # of a directory that has been removed or renamed, or in a process that was forked
        try:
            commit.make_parents(self.path)
        except OSError as error:
            raise explain_os_error(error, f"cannot make directory {self.path}") from error
        lock = commit.DirectoryLock(self.path)
        self.recorded.clear()  # until now, others may have recorded metrics
        try:
            self._clear_up()
        except BaseException:
            lock.release()  # at once: whoever keeps the error would keep the run locked
            raise
        self.writer_lock = lock  # not before: who cannot list a run does not take it for an empty one

    def _clear_up(self) -> None:
        names = self._listing.names()
        if any(commit.TMP_SUFFIX in name for name in names.others):
            for name in commit.remove_dead_temporaries(self.path):
                _log.info("removed %s, left in %s by a writer that died", name, self.path)
            names = self._listing.names()  # it may have put back a checkpoint
        self.take_stock(names)

    def unlock(self) -> None:
        if self.writer_lock is not None:
            self.writer_lock.release()
            self.writer_lock = None

    def take_stock(self, names: Names | None = None) -> None:
        """Begins anew with what is known of the run's steps, which is its newest one."""
        names = self._listing.names() if names is None else names
        self.older = list(reversed(names.steps))
        self.flax_newest = max(names.flax_steps, default=-1)
        self.known.clear()
        self.know(1)

    def know(self, number: int) -> None:
        """Makes the newest `number` checkpoints known, or all where there are fewer."""
        while self.older and len(self.known) < number:
            step = self.older.pop()
            if self.is_checkpoint(step):
                self.known.appendleft(step)

    def make_way(self, step: int) -> None:
        """Moves aside what is no checkpoint and is in the way of one: damaged steps, and a stray directory."""
        for rejected in list(self.rejected):
            if not self.is_checkpoint(rejected) and rejected in self.rejected:  # and nobody has put a whole one there
                self._set_aside(rejected, "damaged", self.find(rejected))
                del self.rejected[rejected]
        if is_named(self.step_path(step)) and not is_committed(self.step_path(step)):
            self._set_aside(step, "stray", self.step_path(step))

    def reject(self, reasons: Mapping[int, str]) -> None:
        """These steps do not verify: they are no checkpoints from now on, and `make_way` moves them aside."""
        self.rejected.update(reasons)
        self._rejected_inodes.update({step: _inode(self.find(step)) for step in reasons})
        if self.writer_lock is not None:
            self.take_stock()

    def roll_back(self, step: int) -> None:
        """Sets the checkpoints above `step` aside as ``<step>.rolled_back``."""
        newer = self.anew_if_overtaken(
            lambda: list(itertools.takewhile(lambda other: other > step, self.newest_first()))
        )
        try:
            for other in reversed(newer):  # until the last one has gone, the newest is what it was
                self._set_aside(other, "rolled_back", self.find(other))
            if self.find(step) == self.step_path(step):  # or Flax's of this step would be back when ours is gone
                self._set_aside(step, "rolled_back", flax_path(self.path, step))
        finally:
            self.take_stock()

    def _set_aside(self, step: int, label: str, path: str) -> None:
        # As ``<step>.<label>``, where nobody takes it for a checkpoint and nobody deletes it.
        self.recorded.pop(step, None)
        try:
            # Not as ``checkpoint_<step>.<label>``, which Flax would take for its newest.
            aside = commit.move_aside(path, label, beside=self.step_path(step))
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain_os_error(error, f"cannot set {path} aside") from error
        _log.warning("step %d was set aside as %s", step, aside)

    def remove(self, step: int) -> None:
        """Removes a step; a reader sees all of it or nothing."""
        self.recorded.pop(step, None)
        path = self._require_own(step)
        try:
            commit.remove_tree(path)
        except OSError as error:
            raise explain_os_error(error, f"cannot remove {path}") from error
        finally:
            self.take_stock()

    def _require_own(self, step: int) -> str:
        """The path of a step that may be changed."""
        if self.find(step) != self.step_path(step):
            raise InvalidArgumentError(
                f"step {step} of {self.path} is Flax's {PREFIX}{step}, which is only read: remove it yourself, or save "
                "its state anew, at a step above the newest or with force=True."
            )
        return self.step_path(step)

    def record_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to a committed step; a crash in between leaves the old ones or the new ones."""
        metadata = self.metadata(step)
        path = self._require_own(step)
        merged = {**self.metrics(step), **metrics}
        item_handlers = metadata.item_handlers
        changed = {}
        if not StandardCheckpointHandler.recognizes(os.path.join(path, METRICS_ITEM)):  # not a part of the state
            changed[_METRICS_FILE] = json.dumps(to_orbax_metrics(merged)).encode()
            if isinstance(item_handlers, Mapping):
                item_handlers = {**item_handlers, METRICS_ITEM: JsonCheckpointHandler.typestr()}
        content = {
            **metadata.to_json(),
            "item_handlers": item_handlers,
            "metrics": merged,
            "custom_metadata": {**metadata.custom_metadata, "metrics": merged},
        }
        changed[METADATA_FILE] = json.dumps(content).encode()
        self._replace_files(path, changed)
        self.recorded[step] = merged

    def _replace_files(self, path: str, changed: Mapping[str, bytes]) -> None:
        # The checksums accept old and new while the files change one by one, then only the new ones.
        checksums = FileChecksums.of_checkpoint(path, METADATA_FILE)
        # Beside the checkpoint, where the next writer removes what a dead one has left.
        replace_file = functools.partial(commit.replace_file, scratch=f"{path}.metrics")
        if checksums is not None:
            replace_file(os.path.join(path, FILE), checksums.accepting(changed).encode())
        for name, data in changed.items():
            folder = os.path.dirname(os.path.join(path, name))
            if not is_directory(folder):
                commit.make_directory(folder)
                commit.sync_directory(path)
            replace_file(os.path.join(path, name), data)
        if checksums is not None:
            replace_file(os.path.join(path, FILE), checksums.replacing(changed).encode())


def _not_a_run(path: str) -> str:
    above = list(itertools.islice(map(str, pathlib.Path(path).parents), 2))  # of a checkpoint, of an item in one
    run = next(filter(is_run, above), None)
    where = f"The run is {run}" if run else "Give the directory of a run, which holds checkpoints by their steps"
    return (
        f"{path} is one checkpoint, or a part of one, and no run. {where}; one checkpoint is read with "
        "ckpt_hooks.restore(path)."
    )


def _inode(path: str) -> tuple[int, ...]:
    """What tells a directory from another one that has taken its place; () where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _verified_metadata(path: str) -> StepMetadata:
    checksums = FileChecksums.of_checkpoint(path, METADATA_FILE)
    if checksums is not None:
        checksums.check(path, below="")
    return read_step_metadata(path) or StepMetadata()


def _finite_or_named(content: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax's metrics, which may be anything, as ours are: numbers, with names for those that are not finite."""
    numbers = {name: value for name, value in content.items() if isinstance(value, int | float)}
    return to_json_numbers(numbers)
