"""The durable commit: the only module that renames, removes, syncs or locks.

A checkpoint becomes real at one instant, the rename of its temporary directory, and only after every byte and
every directory entry in it is on the disk. After a power cut it is whole or not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import logging
import os
import shutil
import stat
import weakref
from collections.abc import Callable

from ckpt_hooks.errors import RunLockedError, explain_os_error
from ckpt_hooks.storage.lookup import is_directory, is_named, is_there, walk
from ckpt_hooks.storage.memory import seek_and_write
from ckpt_hooks.threads import run_parallel

__all__ = [
    "COMMIT_MARKER",
    "TMP_SUFFIX",
    "DirectoryLock",
    "make_directory",
    "make_parents",
    "move_aside",
    "move_to_replaced",
    "publish",
    "remove_replaced",
    "remove_dead_temporaries",
    "remove_tree",
    "rename",
    "replace_file",
    "sync_directory",
    "sync_file",
    "sync_tree",
    "write_all",
    "write_file",
]

COMMIT_MARKER = "commit_success.txt"  # Orbax's; what it says is nowhere trusted
TMP_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's: its readers skip every name that holds it
_REMOVED = ".removed"
_REPLACED = ".replaced"
_SYNC_THREADS = 4  # one journal commit of the file system serves all that wait for it
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------ files and directories


def make_directory(path: str, mode: int | None = None) -> None:
    """Makes a directory and, durably, the parents that it lacks; raises an error that names the path."""
    try:
        parent = os.path.dirname(path)
        if not is_directory(parent):
            make_parents(parent)
        os.mkdir(path)
        if mode is not None:
            os.chmod(path, mode)
    except OSError as error:
        raise explain_os_error(error, f"cannot make directory {path}") from error


def make_parents(path: str) -> None:
    """Makes a directory and its parents, where they are not there, so that a power cut leaves them."""
    path, missing = os.path.abspath(path), []
    while not is_directory(path):
        if is_named(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)  # another process may make it at the same time
        sync_file(os.path.dirname(folder))


def write_file(path: str, data: bytes | str) -> None:
    """Writes a file that `sync_tree` will make durable."""
    content = memoryview(data.encode() if isinstance(data, str) else data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, content, 0)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: memoryview, position: int) -> None:
    """Writes until everything is written: a write may be short where a disk is nearly full."""
    write = getattr(os, "pwrite", seek_and_write)
    rest, end = content, position
    while rest:
        written = write(descriptor, rest, end)
        if written == 0:
            raise OSError(errno.EIO, "the file system takes no more bytes, and does not say why")
        rest, end = rest[written:], end + written
    if _sync_file_range is not None:  # the system begins to bring it to the disk: less is left for `fsync`. Only a hint
        place = ctypes.c_int64(position), ctypes.c_int64(len(content))
        _sync_file_range(descriptor, *place, _SYNC_FILE_RANGE_WRITE)


_sync_file_range: Callable[..., int] | None
try:
    _sync_file_range = ctypes.CDLL(None).sync_file_range
except (AttributeError, OSError):  # only Linux has it
    _sync_file_range = None


def replace_file(path: str, data: bytes | str, *, durable: bool = True, scratch: str | None = None) -> None:
    """Replaces a file's content: a reader sees the old one or the new one.

    If `durable`, so it is after a power cut, and the new one stays; otherwise `sync_tree` has to follow. The new
    content is first in a temporary file beside the old one, or beside `scratch`.
    """
    temporary = f"{scratch or path}{TMP_SUFFIX}"
    try:
        write_file(temporary, data)
        if durable:
            sync_file(temporary)
        os.rename(temporary, path)
        if durable:
            sync_directory(os.path.dirname(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise explain_os_error(error, f"cannot write {path}") from error


# ------------------------------------------------------------------ durability


def sync_tree(directory: str, is_others: Callable[[str], bool] | None = None) -> None:
    """Makes every file and directory below `directory`, and itself, durable, but files that `is_others`."""
    paths = [directory]
    for folder, folders, files in walk(directory):
        paths += [os.path.join(folder, name) for name in (*folders, *files)]
    if is_others is not None:
        paths = list(itertools.filterfalse(is_others, paths))
    run_parallel([functools.partial(sync_file, path) for path in paths], _SYNC_THREADS)


def sync_file(path: str) -> None:
    """Makes a file's content, or a directory's names, durable."""
    # A failed fsync is never tried again: the kernel may have dropped the pages, and a second call would
    # report success for bytes that are lost. The save has failed.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


# Makes the names in a directory durable: without it a power cut may undo a rename.
sync_directory = sync_file


def rename(source: str, destination: str) -> None:
    """Renames inside a directory that `sync_tree` will make durable."""
    os.rename(source, destination)


def publish(temporary: str, final: str, *, replace: bool = False) -> None:
    """The commit: `temporary`, whole and durable, becomes `final`.

    With `replace`, a checkpoint that is there already stays until the new one has taken its place, and is
    removed after that. Where this raises, all is as it was before.
    """
    with contextlib.ExitStack() as undo:
        old = None
        if not replace or not is_named(final):
            os.rename(temporary, final)
            undo.callback(os.rename, final, temporary)
        elif _exchange(temporary, final):
            old = temporary
            undo.callback(_exchange, temporary, final)
        else:
            old = move_to_replaced(final)  # a crash after this: remove_dead_temporaries() puts it back
            undo.callback(os.rename, old, final)
            os.rename(temporary, final)
            undo.callback(os.rename, final, temporary)
        sync_directory(os.path.dirname(final))
        undo.pop_all()  # from here on the new one is the checkpoint
    if old is not None:
        remove_replaced(old)
    if _unremoved:
        _remove_again()


def remove_replaced(old: str) -> None:
    """Removes a checkpoint whose place another one has taken."""
    try:
        remove_tree(old)
    except OSError as error:
        # What is left behind does not make the new checkpoint a failure.
        _log.warning("cannot remove %s, which has been replaced: %s", old, error)


def move_to_replaced(final: str) -> str:
    """Renames a checkpoint that another one is about to replace, and returns where it is."""
    replaced = f"{final}{_REPLACED}{TMP_SUFFIX}"
    os.rename(final, replaced)
    return replaced


def _exchange(one: str, other: str) -> bool:
    """Swaps two names in one step (Linux); False where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(result == 0)


# ------------------------------------------------------------------ removal


def remove_tree(path: str) -> None:
    """Removes a checkpoint or a temporary directory; no reader ever sees a half-removed checkpoint."""
    doomed = None
    if TMP_SUFFIX not in os.path.basename(path):
        doomed = _unused(f"{path}{_REMOVED}", TMP_SUFFIX)
        os.rename(path, doomed)
        path = doomed
    try:
        if path is doomed:
            sync_directory(os.path.dirname(path))
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError:
        _unremoved.add(path)
        raise


_unremoved: set[str] = set()  # of what this process wanted to remove; tried again after every commit


def _remove_again() -> None:
    """A disk that failed may work again: what it kept must not fill it until the program ends."""
    for path in list(_unremoved):
        _unremoved.discard(path)
        try:
            # The name may be in use again: a temporary directory belongs to whoever holds its lock.
            if not stat.S_ISDIR(os.lstat(path).st_mode) or _is_dead(path):
                remove_tree(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            _unremoved.add(path)
            _log.warning("still cannot remove %s: %s", path, error)


def move_aside(path: str, label: str, beside: str = "") -> str:
    """Renames a checkpoint so that nobody takes it for one, to ``<beside>.<label>``; returns where it is now."""
    aside = _unused(f"{beside or path}.{label}", "")
    os.rename(path, aside)
    sync_directory(os.path.dirname(path))
    return aside


def _unused(stem: str, suffix: str) -> str:
    candidate, number = stem + suffix, 1
    while is_named(candidate):
        candidate, number = f"{stem}.{number}{suffix}", number + 1
    return candidate


def remove_dead_temporaries(directory: str) -> list[str]:
    """Removes what writers that no longer live have left in `directory`; a live writer's stay."""
    removed = []
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if TMP_SUFFIX in entry.name]
    for name in names:
        path = os.path.join(directory, name)
        try:
            if (is_directory(path) and not _is_dead(path)) or _take_back(path):
                continue
            remove_tree(path)
        except OSError as error:
            _log.warning("cannot remove %s, left by an earlier writer: %s", path, error)
            continue
        removed.append(name)
    return removed


def _take_back(path: str) -> bool:
    """Undoes a replacement whose writer died before the new checkpoint was one; whether there was any to undo."""
    final, replaced, _ = path.partition(f"{_REPLACED}{TMP_SUFFIX}")
    if not replaced or is_there(os.path.join(final, COMMIT_MARKER)):
        return False
    if is_named(final):
        if is_directory(final) and not _is_dead(final):
            return True
        remove_tree(final)  # half-written, in place
    os.rename(path, final)
    sync_directory(os.path.dirname(final))
    return True


def _is_dead(path: str) -> bool:
    try:
        DirectoryLock(path).release()
    except RunLockedError:
        return False
    return True


# ------------------------------------------------------------------ locks


class DirectoryLock:
    """An exclusive lock on a directory, which a process that has died cannot hold.

    Readers need no lock. Raises RunLockedError where another writer, of this or another process, holds it.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        _held_locks.add(self)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = True
            except OSError as error:
                is_free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
                if is_free:
                    _log.warning("%s: this file system has no locks (%s); make sure of one writer", path, error)
            holder = "another writer" if is_free else _lock_holder(self._descriptor)
            if not (is_free and self.is_of(path)):  # who had it before may have put another directory there, his own
                raise RunLockedError(
                    f"{path}: {holder} is writing here. Two writers would mix their "
                    "checkpoints: wait until it ends, close its manager or hook, or choose another directory. Reading "
                    "needs no lock."
                )
        except BaseException:
            self.release()  # at once: whoever keeps the error would keep the directory locked
            raise

    def is_of(self, path: str) -> bool:
        """Whether it is held, and what is at `path` now is still the directory that it was taken on."""
        try:
            return self._finalizer.alive and os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Gives the lock back; may be called twice."""
        self._finalizer()


_held_locks: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked data-loading worker that outlives its parent must not keep the run locked.
    for lock in list(_held_locks):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def _lock_holder(descriptor: int) -> str:
    """Who holds the lock, where the system tells."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks") as file:
            for row in file:
                fields = row.split()
                if place in fields and "FLOCK" in fields:
                    pid = int(fields[fields.index(place) - 1])
                    return "this process" if pid == os.getpid() else f"process {pid}"
    except (OSError, ValueError):
        pass
    return "another writer"
