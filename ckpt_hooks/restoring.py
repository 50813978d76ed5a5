"""One checkpoint of a run into a state: which items there are, and which part of the state each one is."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath

from ckpt_hooks import events, structure, train_state, tree
from ckpt_hooks.changes import EXACT, Changes
from ckpt_hooks.committed import is_temporary
from ckpt_hooks.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    HandlerNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    NameCollisionError,
    NoDeviceError,
    NoValidCheckpointError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.handlers.base import CheckpointArgs, get_handler_type, get_registered_args_cls, recognize_handler
from ckpt_hooks.handlers.composite import CompositeArgs, CompositeCheckpointHandler
from ckpt_hooks.handlers.iterator import IteratorRestoreArgs
from ckpt_hooks.handlers.orbax_items import ARRAY_NAME, OrbaxItemHandler, OrbaxItemRestoreArgs
from ckpt_hooks.handlers.pytree import StandardCheckpointHandler, StandardRestoreArgs
from ckpt_hooks.handlers.registry import handler_on_disk
from ckpt_hooks.metadata import METADATA_FILE, StepMetadata, read_step_metadata
from ckpt_hooks.reading import Watch, describe_checkpoint, read_checkpoint, read_unchanged
from ckpt_hooks.run import METRICS_ITEM, OvertakenError, RunDirectory
from ckpt_hooks.storage.checksums import FileChecksums
from ckpt_hooks.storage.lookup import is_directory

__all__ = [
    "Rejected",
    "find_problems",
    "nothing_left",
    "read_metadata",
    "read_newest",
    "read_or_reject",
    "restore_checkpoint",
]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

# What this process lacks says nothing of a checkpoint: memory, on the host or on a device, a device, a module.
_LACKING = (ImportError, MemoryError, NoDeviceError, jax.errors.JaxRuntimeError)
# Errors that another checkpoint would give as well, or that only the caller can mend: no reason to fall back.
_NOT_DAMAGE = (
    *_LACKING,
    HandlerNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    NameCollisionError,
    StructureMismatchError,
    UnsupportedLeafError,
)
_NOT_DAMAGE_ERRNOS = frozenset({errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM})
_FAULT_ERRNOS = frozenset({errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT})
_TREE_HANDLERS = (StandardCheckpointHandler, OrbaxItemHandler)  # which take a target
# The names under which Orbax (v0, v1) and we keep a state that is a single item.
_SINGLE_ITEMS = ("default", "pytree", train_state.WHOLE)


def read_newest(run: RunDirectory, read: Callable[[str], _T]) -> tuple[int, _T]:
    """(step, what `read` makes of its path) of the newest checkpoint that verifies; each rejected one is logged."""
    return run.anew_if_overtaken(lambda: _read_newest_listed(run, read))


def _read_newest_listed(run: RunDirectory, read: Callable[[str], _T]) -> tuple[int, _T]:
    rejected: dict[int, str] = {}
    for step in run.newest_first():
        path = run.find(step)
        with contextlib.closing(Watch(path)) as watch:
            if step != next((other for other in run.newest_first() if other not in rejected), None):
                raise OvertakenError  # so it may be another one that is watched, and not the newest when it came
            restored = read_or_reject(run, step, functools.partial(read, path), watch)
        if isinstance(restored, Rejected):
            rejected[step] = restored.reason
            continue
        run.reject(rejected)
        if rejected:
            _log.warning("step %d of %s is restored instead of %s", step, run.path, sorted(rejected))
        return step, restored
    raise nothing_left(run, rejected)


class Rejected(NamedTuple):
    """A checkpoint that does not verify."""

    reason: str


def read_or_reject(run: RunDirectory, step: int, read: Callable[[], _T], watch: Watch) -> _T | Rejected:
    """What `read` makes of a step, which `watch` has watched since it was the newest; a rejected one is logged.

    Raises OvertakenError where a writer has put another one in its place, and whatever `read` raises that is no damage.
    """
    try:
        restored = _once_more_after_a_fault(read, f"step {step} of {run.path}")
    except _NOT_DAMAGE:
        raise
    except Exception as error:  # another library's damage comes in every class
        if not watch.is_in_place():
            raise OvertakenError from error
        if isinstance(error, OSError) and error.errno in _NOT_DAMAGE_ERRNOS:
            raise
        reason = f"{type(error).__name__}: {error}"
        _log.error("step %d of %s is rejected: %s", step, run.path, reason)
        events.record_event(events.READ_REJECTED, step=step)
        return Rejected(reason)
    if not watch.is_gone() and not watch.is_in_place():
        raise OvertakenError  # what was read took the place of the newest, and newer ones may not have gone yet
    return restored


def _once_more_after_a_fault(read: Callable[[], _T], what: str) -> _T:
    # A disk or a network that fails once must not cost the run its newest step; what is damaged fails again.
    try:
        return read()
    except OSError as error:
        if error.errno not in _FAULT_ERRNOS:
            raise
        _log.warning("%s is read once more after %s", what, error)
        return read()


def nothing_left(run: RunDirectory, rejected: Mapping[int, str]) -> CheckpointError:
    """The error for a run in which there is nothing to restore, or nothing but what was rejected."""
    rejected = {**run.rejected, **rejected}  # an earlier call may have found some
    if not rejected:
        return CheckpointNotFoundError(f"{run.path} has no checkpoint{run.hint_at_other_names()}")
    reasons = "\n".join(f"  step {step}: {reason}" for step, reason in rejected.items())
    return NoValidCheckpointError(
        f"no checkpoint of {run.path} can be restored:\n{reasons}\nNothing was removed. To start "
        "afresh all the same, choose another directory."
    )


def find_problems(run: RunDirectory, step: int) -> list[str]:
    """What of a step is not as it was saved; of another library's, which has no checksums, what cannot be read.

    Of one process's own storage, it is that process's part which is verified. How many processes saved is no matter.
    """
    path = run.require(step)
    problems = run.problems(step)
    if not problems:
        try:
            restore_checkpoint(path)
        except StructureMismatchError:
            pass  # every byte that there is has been checked; what does not fit are this process and their number
        except _LACKING:
            raise
        except Exception as error:  # another library's damage comes in every class
            problems.append(f"{path}: {type(error).__name__}: {error}")
    return problems


def restore_checkpoint(
    path: str,
    like: Any = None,
    *,
    items: Iterable[str] | None = None,
    changes: Changes = EXACT,
    objects: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint at `path`, as `CheckpointManager.restore` says: (the state, {object: its saved state}).

    No object is touched: what sets their states does so when nothing can fail any more.
    """
    asked, selected = changes.selecting(items)

    def restore() -> tuple[Any, dict[str, Any]]:
        state, states = _restore(path, like, asked, selected, objects or {})
        return _Checkpoint(path).typed(state, is_whole=asked is None) if changes.typed else state, states

    return read_unchanged(path, restore)


def _restore(
    path: str, like: Any, asked: list[str] | None, changes: Changes, objects: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    checkpoint = _Checkpoint(path, changes)
    if checkpoint.handler is not None and objects:
        raise ItemNotFoundError(f"{path} is one pytree without items, so it has no {[*objects]}; leave them out")
    if checkpoint.handler is not None or (not objects and checkpoint.is_outside(asked)):
        return checkpoint.restore_tree(like, asked), {}
    if checkpoint.single_item:
        checkpoint.changes = changes.below(checkpoint.single_item)
    whole = checkpoint.whole_item(like) if asked is None else None
    if like is None:
        names = checkpoint.restorable(objects) if asked is None else asked
        wanted_parts: dict[str, Any] = dict.fromkeys(names)
    elif whole is not None:
        wanted_parts = {whole: like}
    else:
        wanted_parts = checkpoint.parts_of(like, asked, objects)
    results = checkpoint.restore_items(wanted_parts, objects, with_target=like is not None)
    states = {name: results.pop(name) for name in objects}
    if like is None or asked is not None:
        return results, states
    if whole is not None:
        return results[whole], states
    return train_state.join(like, {**train_state.split(like), **results}), states


class _Checkpoint:
    """What there is in the directory of a checkpoint."""

    def __init__(self, path: str, changes: Changes = EXACT) -> None:
        self.path = path
        self.changes = changes
        self.handler = _handler_of_whole(path)
        if self.handler is not None:
            return
        with os.scandir(path) as entries:
            present = {entry.name for entry in entries if entry.is_dir() and not is_temporary(entry.name)}
        found = read_step_metadata(path)
        metadata = found or StepMetadata()
        recorded = metadata.item_handlers if isinstance(metadata.item_handlers, Mapping) else {}
        checksums = FileChecksums.of_checkpoint(path, METADATA_FILE)
        if found is None and checksums is None and not is_directory(path):
            # Its removal overtook the listing, which may have found a part of its items, or none: not an empty state.
            raise CheckpointNotFoundError(f"{path} was removed while it was read")
        if checksums is not None:
            # A directory that somebody has put here was never saved. Late metrics are not covered at once.
            present &= checksums.items() | recorded.keys() | {METRICS_ITEM}
        self.saved = present | recorded.keys() | (checksums.items() if checksums else set())
        self._recorded = recorded
        self._kinds = {name: _kind(handler) for name, handler in recorded.items()}
        maybe = {
            name for name in present if self._kinds.get(name) in (None, StandardCheckpointHandler, OrbaxItemHandler)
        }
        self.trees = {name for name in maybe if StandardCheckpointHandler.recognizes(os.path.join(path, name))}
        # An item that has lost its files counts as a tree if its handler was one: it is damage, not absence.
        self.trees |= {name for name, kind in self._kinds.items() if kind is StandardCheckpointHandler}

    def restore_tree(self, like: Any, asked: list[str] | None) -> Any:
        """The tree of a checkpoint that is one, or, as if it had items, the parts of it that are `asked` for."""
        if self.changes.typed and asked is not None:
            raise InvalidArgumentError(f"{self.path} is one pytree, which typed=True gives whole; leave items= out")
        changes = self.changes.within("") if asked is None else self.changes.of_whole_tree(asked)
        if asked is not None and like is not None:
            train_state.parts_of(like, asked)  # raises where there are none, before anything is read
        restored = self._read_tree(StandardRestoreArgs(like, changes=changes, typed=changes.typed))
        if asked is None:
            return restored
        return {name: restored[name] for name in asked} if like is None else train_state.parts_of(restored, asked)

    def _read_tree(self, args: StandardRestoreArgs) -> Any:
        path = epath.Path(self.path)
        if isinstance(self.handler, _TREE_HANDLERS):
            return read_checkpoint(self.handler, path, args)
        if self.handler is not None:
            return self._read_other(path, args)
        name = self.single_item
        return read_checkpoint(CompositeCheckpointHandler(name), path, CompositeArgs(**{name: args}))[name]

    def _read_other(self, path: epath.Path, args: StandardRestoreArgs) -> Any:
        if args.item is not None or (args.changes or EXACT).only:
            raise StructureMismatchError(
                f"{path} is no pytree: it was saved with {type(self.handler).__qualname__}. Restore it without `like` "
                "and items=."
            )
        _, restore_cls = get_registered_args_cls(self.handler)
        return read_checkpoint(self.handler, path, restore_cls())

    def restore_items(
        self, parts: Mapping[str, Any], objects: Mapping[str, Any], *, with_target: bool
    ) -> dict[str, Any]:
        """{item: its value}; of an item in `objects`, its bare state."""
        args: dict[str, CheckpointArgs | None] = {}
        saved_names = self.changes.saved_items(parts)
        for name, part in parts.items():
            args[saved_names[name]] = self._args(saved_names[name], part, with_target=with_target)
        for name in objects:
            args[name] = _object_args(objects[name], self.changes.within(name))
        handler = CompositeCheckpointHandler(*args)
        path = epath.Path(self.path)
        restored = read_checkpoint(handler, path, CompositeArgs(**args)) if args else CompositeArgs()
        results = {name: restored[saved_names.get(name, name)] for name in (*parts, *objects)}
        nothing = {
            name for name, saved in saved_names.items() if saved in self.trees and with_target and parts[name] is None
        }
        return {name: None if name in nothing else value for name, value in results.items()}

    def _args(self, name: str, part: Any, *, with_target: bool) -> CheckpointArgs | None:
        of_orbax = self._kinds.get(name) is OrbaxItemHandler
        if name in self.saved and name not in self.trees and not of_orbax:
            return None  # JSON, an iterator's state, somebody's own: by what the checkpoint says of it
        # To the handler None means no target; a target that is None holds as many leaves as an empty tuple.
        target = (() if part is None else part) if with_target else None
        args_cls = OrbaxItemRestoreArgs if of_orbax else StandardRestoreArgs
        return args_cls(target, changes=self.changes.within(name), typed=self.changes.typed and name in self.trees)

    def typed(self, restored: Any, *, is_whole: bool) -> Any:
        """What was restored without a target, in the type that the whole was saved in; its items have theirs."""
        if self.handler is not None or not is_whole:
            return restored
        directories = [os.path.join(self.path, name) for name in restored if name in self.trees]
        return structure.typed_state(directories, restored)

    def restorable(self, objects: Mapping[str, Any]) -> list[str]:
        """What a restore without a target returns: everything but the metrics, which are metadata."""
        metrics = {METRICS_ITEM} - self.trees
        names = self.saved - metrics - objects.keys()
        unknown = {name for name in names - self.trees if self._is_of_orbax_alone(name)}
        if unknown:
            text = f"{self.path}: items {sorted(unknown)} are of kinds that only Orbax can read"
            if unknown == names:
                raise HandlerNotFoundError(f"{text}, and there are no others; restore them with Orbax")
            _log.warning("%s, and are left out", text)
        return sorted(names - unknown)

    def _is_of_orbax_alone(self, name: str) -> bool:
        recorded = self._recorded.get(name, "")
        is_known = self._kinds.get(name) or recognize_handler(os.path.join(self.path, name))
        return recorded.startswith("orbax.") and not is_known

    @property
    def single_item(self) -> str:
        """The one item that is a tree, where its name says that it is all of a state; "" where there is none."""
        return next((name for name in self.trees if len(self.trees) == 1 and name in _SINGLE_ITEMS), "")

    def whole_item(self, like: Any) -> str | None:
        """The one item that all of `like` is, where the checkpoint has a single tree under a name of its own."""
        name = self.single_item
        if like is None or not name or train_state.split(like).keys() == {name}:
            return None
        return name

    def is_outside(self, asked: Iterable[str] | None) -> bool:
        """Whether what is asked for can only be parts of the one item that is all of the state."""
        return asked is not None and bool(self.single_item) and self.saved.isdisjoint(asked)

    def parts_of(self, like: Any, asked: list[str] | None, objects: Mapping[str, Any]) -> dict[str, Any]:
        """{item: the part of `like` that it is restored into}."""
        if not self.single_item:
            self.changes.require_renamed_items(self.saved)
        parts = train_state.split(like)
        wanted = parts if asked is None else train_state.parts_of(like, asked)
        saved = self.changes.saved_items(wanted)
        missing = [name for name, part in wanted.items() if saved[name] not in self.saved and _has_leaves(part)]
        if missing:
            self._check_missing(missing, wanted)
        unexpected = sorted(self.trees - set(saved.values()) - objects.keys()) if asked is None else []
        if unexpected and self.changes.unexpected == "error":
            raise StructureMismatchError(
                f"{self.path} has items {unexpected} that `like` lacks; `like` has {sorted(parts)}. Restore only what "
                f"you want with items={tuple(sorted(parts.keys() & self.trees))}, leave the others out with "
                'unexpected="ignore", or give them another name with rename={"saved item": "item of `like`"}.'
            )
        return {name: part for name, part in wanted.items() if saved[name] in self.saved}

    def _check_missing(self, missing: list[str], wanted: Mapping[str, Any]) -> None:
        if self.changes.missing == "error":
            meant = tree.is_it(missing[0], self.saved) or "."
            raise ItemNotFoundError(
                f"{self.path} has no item {missing}; there are {sorted(self.saved)}{meant} Restore the ones there are "
                'with items=(...), keep those of `like` with missing="keep", or '
                'rename={"saved item": "item of `like`"}.'
            )
        for name in missing:
            self.changes.within(name).wanted(tree.named_leaves(wanted[name]), {})  # raises where there is none to keep


def _has_leaves(part: Any) -> bool:
    return bool(jax.tree_util.tree_leaves(part))


def _object_args(value: Any, changes: Changes) -> CheckpointArgs:
    """A graph object is a tree by now; of a stateful one the bare state is read."""
    return (
        StandardRestoreArgs(value, changes=changes)
        if isinstance(value, train_state.PureState)
        else IteratorRestoreArgs(target=value)
    )


def _handler_of_whole(path: str) -> Any:
    """What reads a checkpoint that has no items; None for one that has."""
    is_tree = StandardCheckpointHandler.recognizes(path)
    if is_tree and not is_directory(os.path.join(path, ARRAY_NAME)):
        return StandardCheckpointHandler()
    recorded = (read_step_metadata(path) or StepMetadata()).item_handlers
    if isinstance(recorded, str):
        return handler_on_disk(path, recorded)
    return StandardCheckpointHandler() if is_tree else None


def _kind(recorded: str) -> type | None:
    """The class of a recorded handler; None where nobody here knows it."""
    try:
        return get_handler_type(recorded)
    except HandlerNotFoundError:
        return None


def read_metadata(path: str) -> StepMetadata:
    """The metadata of a checkpoint, with shapes and dtypes of its pytree items."""

    def describe() -> StepMetadata:
        return describe_checkpoint(_handler_of_whole(path) or CompositeCheckpointHandler(), epath.Path(path))

    return read_unchanged(path, describe)
