"""Whether the directory that the primary has made is the one that this process sees: several machines often have
directories of the same name that are not the same.
"""

from __future__ import annotations

import os
import time

from ckpt_hooks.errors import NotSharedError
from ckpt_hooks.storage.lookup import is_directory

__all__ = ["require_shared", "token_of"]

_SEEN_WITHIN_SECS = 10.0  # a network file system may show a new directory late
_PAUSE_SECS = 0.02


def token_of(path: str) -> str:
    """What tells this file from one of the same name elsewhere: what is in it, and when that was written."""
    try:
        with open(path, "rb") as file:
            return file.read().decode()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def require_shared(directory: str, name: str, token: str) -> None:
    """Raises NotSharedError where this process does not find in `directory` what the primary has written there."""
    deadline_secs = time.monotonic() + _SEEN_WITHIN_SECS
    while True:
        if is_directory(directory) and token_of(os.path.join(directory, name)) == token:
            return
        if time.monotonic() > deadline_secs:
            break
        _look_anew(directory)
        time.sleep(_PAUSE_SECS)
    found = "has another content here" if is_directory(directory) else "is not there"
    raise NotSharedError(
        f"the primary process has made {directory}, and in this process it {found}, {_SEEN_WITHIN_SECS:g} s later: the "
        "directory is not shared. Choose one on storage that all processes see, or give each its own with "
        "MultiprocessingOptions(primary_host=None)."
    )


def _look_anew(directory: str) -> None:
    """Makes a client of a network file system forget that the directory was not there."""
    try:
        os.listdir(os.path.dirname(directory))
    except OSError:
        pass  # which is what will be told
