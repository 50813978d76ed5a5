"""Storage that fails at the n-th call, for tests of loops and handlers.

While `failing_storage` is active, the functions of `os` that change files, and `open`, look at what they are asked to
do below one directory, in every thread: in this library, in pathlib and shutil, in your code. Nothing is built into the
library for it. Calls that a C extension or ctypes makes by itself are not seen.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]  # `open`, written in terms of `os`
import builtins
import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

__all__ = ["FailingStorage", "SimulatedKill", "StorageCall", "failing_storage", "for_every_failure"]

Failure = OSError | Literal["kill"]

_EVERY_FAILURE: tuple[Failure, ...] = ("kill", OSError(errno.EIO, ""), OSError(errno.ENOSPC, ""))


class SimulatedKill(BaseException):
    """As if the process had been killed just before this call: it and no later one reaches the disk."""


@dataclasses.dataclass(frozen=True)
class StorageCall:
    """A call that changes a file or a name.

    Attributes:
      name: of the function in `os`.
      path: of the file, relative to the directory that is watched.
    """

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}({self.path})"


@dataclasses.dataclass
class FailingStorage:
    """What `failing_storage` saw.

    Attributes:
      calls: every call, in order; the n-th is ``calls[n - 1]``.
      failed: those that were refused.
    """

    calls: list[StorageCall] = dataclasses.field(default_factory=list)
    failed: list[StorageCall] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def failing_storage(
    directory: Any, *, at: int | None = None, error: Failure = "kill", sticky: bool = False
) -> Iterator[FailingStorage]:
    """Refuses the n-th call, counted over all threads, that changes a file or a name below `directory`.

    Args:
      directory: absolute or relative; it need not exist yet.
      at: which call, counted from 1; None only counts.
      error: an OSError of which each refused call raises its own, with its path; or "kill": the call and every later
        one raises `SimulatedKill`, so that also nothing is cleaned up, and the directory is as a SIGKILL just before
        the call would leave it. What the process holds, such as a run's lock, it still holds: close what you open.
      sticky: whether all later calls are refused as well.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> with failing_storage(run) as storage:
    ...     with open(f"{run}/a", "w") as file:
    ...         _ = file.write("text")
    ...     os.rename(f"{run}/a", f"{run}/b")
    >>> print(*storage.calls)
    open(a) write(a) rename(a)
    >>> with failing_storage(run, at=1, error=OSError(errno.ENOSPC, "")):
    ...     os.mkdir(f"{run}/c")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: '...c'
    """
    if at is not None and at < 1:
        raise ValueError(f"at= is the number of a call, counted from 1; got {at}")
    watch = _Watch(os.path.realpath(directory), at, error, sticky)
    with watch.patched():
        yield watch.seen


def for_every_failure(
    save: Callable[[str], object],
    check: Callable[[str, BaseException | None], object],
    directory: Any,
    *,
    before: Callable[[str], object] | None = None,
    errors: Sequence[Failure] = _EVERY_FAILURE,
) -> int:
    """Runs `save` once for every call that it makes and every error, that call being refused, and then `check`.

    Each error but "kill" is tried twice: at that call alone, and at all from there on.

    Args:
      save: gets the path of a directory and saves into it; closes what it opens.
      check: gets the same path when the fault is gone, and what `save` raised, or None; raises where something is
        not as it must be, such as an AssertionError because an earlier checkpoint does not restore.
      directory: where a new directory is made for each run.
      before: puts something into the directory first, undisturbed.
      errors: as `error` of `failing_storage`.

    Returns:
      How many runs there were.

    Raises:
      AssertionError: `check` raised; says after which failure, and has what it raised as ``__cause__``.

    >>> import numpy as np, tempfile
    >>> from ckpt_hooks import CheckpointManager
    >>> def save(directory, step=2):
    ...     with CheckpointManager(directory, async_save=False) as manager:
    ...         manager.save(step, {"w": np.full(3, step)})
    >>> def check(directory, failure):
    ...     step = int(CheckpointManager(directory).restore()["w"][0])
    ...     assert step == 2 or failure is not None
    >>> runs = for_every_failure(
    ...     save, check, tempfile.mkdtemp(), before=lambda directory: save(directory, 1), errors=["kill"]
    ... )
    >>> runs > 10
    True
    """
    runs = 0
    numbers = itertools.count()
    for error in errors:
        for sticky in (False,) if error == "kill" else (False, True):
            for at in itertools.count(1):
                place = os.path.join(os.path.realpath(directory), f"failure-{next(numbers)}")
                os.makedirs(place)
                if before is not None:
                    before(place)
                failure, storage = _run(save, place, at, error, sticky)
                if not storage.failed:
                    if failure is not None:
                        raise failure
                    break
                runs += 1
                try:
                    check(place, failure)
                except Exception as problem:
                    what = f"{_name(error)} at call {at}, {storage.failed[0]}{' and all later ones' if sticky else ''}"
                    raise AssertionError(f"{place}, after {what}: {type(problem).__name__}: {problem}") from problem
    return runs


def _name(error: Failure) -> str:
    return errno.errorcode.get(error.errno or 0, str(error)) if isinstance(error, OSError) else error


def _run(
    save: Callable[[str], object], place: str, at: int, error: Failure, sticky: bool
) -> tuple[BaseException | None, FailingStorage]:
    failure: BaseException | None = None
    with failing_storage(place, at=at, error=error, sticky=sticky) as storage:
        try:
            save(place)
        except (Exception, SimulatedKill) as raised:
            failure = raised
            # What the frames hold, such as a manager with its lock, must not live on in the traceback.
            traceback.clear_frames(raised.__traceback__)
    return failure, storage


# ------------------------------------------------------------------ the functions of os


def _path(args: Sequence[Any], options: dict[str, Any]) -> Any:
    return args[0] if args else options.get("path", options.get("src", options.get("fd")))


def _second(args: Sequence[Any], options: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else options.get("dst")


# {function: which of its arguments says what it changes}
_CHANGES: dict[str, Callable[[Sequence[Any], dict[str, Any]], Any]] = {
    **dict.fromkeys(("open", "write", "writev", "pwrite", "pwritev", "truncate", "ftruncate"), _path),
    **dict.fromkeys(("posix_fallocate", "fsync", "fdatasync", "sendfile", "fchmod", "chmod"), _path),
    **dict.fromkeys(("rename", "replace", "unlink", "remove", "rmdir", "mkdir"), _path),
    **dict.fromkeys(("link", "symlink", "copy_file_range"), _second),
}


class _Watch:
    """Stands before the functions while the context is active."""

    def __init__(self, directory: str, at: int | None, error: Failure, sticky: bool) -> None:
        self.seen = FailingStorage()
        self._directory, self._at, self._error = directory, at, error
        self._sticky = sticky or error == "kill"
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for name, argument in _CHANGES.items():
                if hasattr(os, name):
                    _replace(undo, os, name, self._watched(name, getattr(os, name), argument))
            opening = self._watched_open(builtins.open)
            _replace(undo, builtins, "open", opening)
            _replace(undo, io, "open", opening)
            yield

    def _watched(self, name: str, real: Callable[..., Any], argument: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def watched(*args: Any, **options: Any) -> Any:
            if name != "open" or (_second(args, options) or options.get("flags", 0)) & (os.O_CREAT | os.O_TRUNC):
                path = self._concerned(argument(args, options), options)
                if path is not None:
                    self._meet(StorageCall(name, path))
            return real(*args, **options)

        return watched

    def _watched_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def watched(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            writes = not set(mode).isdisjoint("wax+")
            # Python's own is in C, and NumPy writes past it as well; this one calls `os.open` and `os.write`.
            function = _pyio.open if writes and self._concerned(file, {}) is not None else real
            return function(file, mode, *args, **options)

        return watched

    def _concerned(self, where: Any, options: dict[str, Any]) -> str | None:
        """The path relative to the directory, of a path or a descriptor; None for what lies elsewhere."""
        if isinstance(where, int):
            path = _path_of(where)
        else:
            folder = next((options[key] for key in ("dir_fd", "src_dir_fd") if options.get(key) is not None), None)
            path = os.path.join(os.getcwd() if folder is None else _path_of(folder), os.fsdecode(where))
        path = os.path.normpath(path)
        # A link in the way, such as /tmp on some systems, leads to the same place.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if path != self._directory and not path.startswith(f"{self._directory}{os.sep}"):
            return None
        return os.path.relpath(path, self._directory)

    def _meet(self, call: StorageCall) -> None:
        with self._mutex:
            self.seen.calls.append(call)
            number = len(self.seen.calls)
            if self._at is None or number < self._at or (number > self._at and not self._sticky):
                return
            self.seen.failed.append(call)
        if isinstance(self._error, OSError):
            path = os.path.join(self._directory, call.path)
            raise OSError(self._error.errno, os.strerror(self._error.errno or 0), path)
        raise SimulatedKill(f"at call {number}, {call}")


def _replace(undo: contextlib.ExitStack, module: Any, name: str, function: Callable[..., Any]) -> None:
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, function)


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
