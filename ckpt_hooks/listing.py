"""The names in a run's directory, and the steps they stand for; listed anew only where they may have changed.

A name is added to a directory and its change time (ctime) set while the kernel holds the directory's lock, and a
listing takes that lock too. So a listing that begins when the clock of these times has passed the directory's
change time holds for as long as that stays the same: a later change gets a later time. Within the same tick, or
the same second where the disk records no more, it proves nothing, as with git's racily clean entries. (mtime would
not do: `rsync` and `tar` set it back.)

None of this holds where others change the directory behind this kernel: NFS answers from a cache, and a bucket
mounted through FUSE has directories whose times never change. There, every call lists.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from ckpt_hooks.flax_runs import PREFIX
from ckpt_hooks.metadata import METADATA_FILE
from ckpt_hooks.storage.commit import COMMIT_MARKER
from ckpt_hooks.storage.lookup import is_there
from ckpt_hooks.tree import METADATA_FILE as TREE_METADATA_FILE
from ckpt_hooks.tree import STRUCTURE_FILE

__all__ = ["Listing", "Names", "is_one_checkpoint", "is_run"]

# Types of file systems (statfs(2)) that only this kernel changes, with its own clock.
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xF2F52010,  # F2FS
        0x2FC12FC1,  # ZFS
        0x01021994,  # tmpfs
        0x794C7630,  # overlayfs, as in containers: changes go to its upper layer, whose times it shows
    }
)
_CLOCK_REALTIME_COARSE = 5  # the clock that change times are taken from; `time` has no name for it
_SECOND_NSECS = 1_000_000_000

_FLAX = PREFIX.encode()

_Stamp = tuple[int, int, int]  # (device, inode, change time in ns)


class Names(NamedTuple):
    """The names in a directory.

    Attributes:
      steps: those that are the integer of a step, newest first, committed or not.
      flax_steps: the integers in those that are as Flax calls its checkpoints, newest first.
      others: those that are no integer.
    """

    steps: Sequence[int] = ()
    flax_steps: Sequence[int] = ()
    others: Sequence[str] = ()


class Listing:
    """The names in one directory, as often as they are asked for."""

    def __init__(self, directory: str) -> None:
        self._directory = os.fsencode(directory)
        # One assignment, so that no other thread pairs an old listing with a new stamp.
        self._last: tuple[_Stamp | None, Names] = (None, Names())

    def names(self) -> Names:
        """As they are now; none where there is no directory."""
        try:
            stamp = _stamp_of(self._directory)
            last_stamp, names = self._last
            if stamp != last_stamp:
                is_reusable = _is_local(self._directory) and _is_over(stamp[2])  # asked before the listing begins
                names = _listed(self._directory)
                self._last = (stamp if is_reusable else None, names)
        except (FileNotFoundError, NotADirectoryError):
            return Names()
        return names


def is_run(path: str) -> bool:
    """Whether a directory holds steps, and not the items of one checkpoint, which may have numbers for names."""
    names = Listing(path).names()
    if not names.steps and not names.flax_steps:
        return False
    return not is_one_checkpoint(path) and not is_there(os.path.join(path, STRUCTURE_FILE))


def is_one_checkpoint(path: str) -> bool:
    """Whether a directory has files that only a checkpoint, or an item of one, has at its top."""
    return any(is_there(os.path.join(path, own)) for own in (COMMIT_MARKER, METADATA_FILE, TREE_METADATA_FILE))


def _listed(directory: bytes) -> Names:
    names = os.listdir(directory)
    # As bytes, because `bytes.isdigit` knows only ASCII: int("٢٠") is 20 too. "010" is not how a step is written.
    others = [os.fsdecode(name) for name in names if not name.isdigit()]
    begins = [name.removeprefix(_FLAX) for name in names if name.startswith(_FLAX)]
    return Names(_integers(names), _integers(begins) if begins else (), others)


def _integers(names: Sequence[bytes]) -> Sequence[int]:
    """Newest first."""
    steps = [int(name) for name in names if name.isdigit() and (name[0] != ord("0") or len(name) == 1)]
    steps.sort(reverse=True)
    return steps


def _stamp_of(directory: bytes) -> _Stamp:
    status = os.stat(directory)
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _is_over(change_nsecs: int) -> bool:
    """Whether every change from now on gets a time that is later than this one."""
    tick_nsecs = 0 if change_nsecs % _SECOND_NSECS else _SECOND_NSECS  # an old ext file system records seconds
    try:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) > change_nsecs + tick_nsecs
    except OSError:
        return False


def _is_local(directory: bytes) -> bool:
    try:
        statfs = ctypes.CDLL(None).statfs
    except (AttributeError, OSError):
        return False
    answer = (ctypes.c_ulong * 32)()  # twice a `struct statfs`, whose first word is the type
    return statfs(directory, answer) == 0 and answer[0] in _LOCAL
