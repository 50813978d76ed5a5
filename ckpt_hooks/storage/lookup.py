"""`os.path.exists` and its like, to which a disk that fails looks like an empty one: here it is an error.

A step that one failing look-up calls absent would be passed over, or taken for damaged, or a run would begin afresh.
"""

from __future__ import annotations

import errno
import os
import stat

from ckpt_hooks.errors import explain_os_error

__all__ = ["is_directory", "is_file", "is_named", "is_there"]

_NOT_THERE_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG})

_Path = str | os.PathLike[str]


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
    """Whether a path is a plain file, or a link to one."""
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
