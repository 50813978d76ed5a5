"""What is on the disk: its path, whether something is there, what is below it, and what is in a small file.

To `os.path.exists`, `os.walk` and their like a disk that fails looks like an empty one: here it is an error. A step
that one failing look-up calls absent would be passed over, or taken for damaged, or a run would begin afresh.

A small file is read whole and, within one restore, once: what a check has read is what is used afterwards.
"""

from __future__ import annotations

import contextvars
import errno
import functools
import os
import stat
from collections.abc import Iterator
from typing import Self

from etils import epath

from ckpt_hooks.errors import CorruptCheckpointError, InvalidArgumentError, explain_os_error

__all__ = [
    "ReadOnce",
    "blocks_of",
    "content_of",
    "is_directory",
    "is_file",
    "is_named",
    "is_there",
    "local_path",
    "open_to_read",
    "read_file",
    "walk",
]

_NOT_THERE_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG})

_BLOCK_BYTES = 64 << 10  # small enough for memory that need not be fetched from the system
_HELD_BLOCKS = 256  # a file of so many is read anew by whoever wants it

_held: contextvars.ContextVar[dict[str, list[bytes]] | None] = contextvars.ContextVar("held", default=None)

_Path = str | os.PathLike[str]


def local_path(path: str) -> str:
    """The absolute path, of which `etils.epath.Path` makes one too.

    Raises InvalidArgumentError for an address, such as that of a bucket.

    >>> local_path("/runs/../data"), local_path("/s3/data")
    ('/data', '//s3/data')
    """
    if "://" in path:
        raise InvalidArgumentError(f"{path}: only local and mounted directories can be used")
    absolute = os.path.abspath(path)
    # For epath, /s3/data is the address of a bucket, and "s3:" a directory here; behind two slashes, which are one to
    # the system, it is what is mounted at /s3.
    return f"/{absolute}" if _is_scheme(absolute.split("/", 2)[1]) else absolute


@functools.cache
def _is_scheme(name: str) -> bool:
    return bool(os.fspath(epath.Path(f"/{name}")) != f"/{name}")


def is_there(path: _Path) -> bool:
    """Whether there is something at a path; not so for a link to nothing.

    >>> is_there("/"), is_there("/no/such/file")
    (True, False)
    """
    return _mode(path) is not None


def is_named(path: _Path) -> bool:
    """Whether a path is taken, by a link to nothing too."""
    return _mode(path, follow_symlinks=False) is not None


def is_directory(path: _Path) -> bool:
    """Whether a path is a directory, or a link to one."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: _Path) -> bool:
    """Whether a path is a plain file, or a link to one; within `ReadOnce`, so is what has been read."""
    held = _held.get()
    if held is not None and path in held:
        return True
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: _Path, *, follow_symlinks: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow_symlinks).st_mode
    except ValueError:  # a zero byte in the path
        return None
    except OSError as error:
        if error.errno in _NOT_THERE_ERRNOS:
            return None
        raise explain_os_error(error, f"cannot look at {os.fspath(path)}") from error


def walk(directory: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, but what cannot be listed is an error.

    It would go without its checksum and its fsync, and the save be reported as durable.
    """
    with os.scandir(directory) as listed:
        entries = list(listed)
    folders = [entry.name for entry in entries if entry.is_dir()]
    links = {entry.name for entry in entries if entry.is_symlink()}
    yield directory, folders, [entry.name for entry in entries if not entry.is_dir()]
    for name in folders:  # but those that the caller has taken out of the list
        if name not in links:
            yield from walk(os.path.join(directory, name))


# ------------------------------------------------------------------ small files


class ReadOnce:
    """Within this context a thread reads each small file once."""

    def __enter__(self) -> Self:
        self._token = _held.set({})
        return self

    def __exit__(self, *error: object) -> None:
        _held.reset(self._token)


def read_file(path: str) -> bytes:
    """What is in a file of a checkpoint. Raises CorruptCheckpointError where it is missing."""
    try:
        return content_of(path)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None


def content_of(path: str) -> bytes:
    """What is in a file. Raises CorruptCheckpointError where it is a directory."""
    try:
        return b"".join(blocks_of(path))
    except IsADirectoryError:
        raise CorruptCheckpointError(f"{path} is a directory, and was saved as a file") from None


def blocks_of(path: str) -> Iterator[bytes]:
    """What is in a file, block by block; within `ReadOnce`, what was in it when it was first read."""
    held = _held.get()
    if held is not None and path in held:
        yield from held[path]
        return
    # Without a file object, which costs more than reading the small files that most of them are.
    descriptor = open_to_read(path)
    try:
        blocks: list[bytes] = []
        while block := os.read(descriptor, _BLOCK_BYTES):
            if held is not None and len(blocks) < _HELD_BLOCKS:
                blocks.append(block)
            yield block
        if held is not None and len(blocks) < _HELD_BLOCKS:
            held[path] = blocks
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def open_to_read(path: str) -> int:
    """Opens a file; a pipe in its place, which nobody may ever write to, is not waited for and reads as empty."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except BlockingIOError:  # leased to a file server, which now gives it back
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
