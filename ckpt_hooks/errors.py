"""Every error that this library raises on purpose, as one tree.

Each class is also the builtin that a caller would catch anyway, and each message says what was asked,
what was found and what to do::

    Exception
    └── CheckpointError
        ├── InvalidArgumentError        ValueError         a value that cannot be meant (step -1, trigger 0)
        ├── InvalidArgumentTypeError    TypeError          a value of the wrong type (step "7")
        ├── NotSerializableError        TypeError          metadata or metrics that are not JSON
        ├── UnsupportedLeafError        ValueError         a leaf that no checkpoint can hold, by path
        ├── NameCollisionError          ValueError         two leaves that would share one name on disk
        ├── DestinationExistsError      ValueError         something is already there
        ├── CheckpointNotFoundError     FileNotFoundError  no such checkpoint
        ├── IncompleteCheckpointError   ValueError         there, but never committed
        ├── ItemNotFoundError           KeyError           the checkpoint has no item of that name
        ├── HandlerNotFoundError        KeyError           no handler is registered for an item or args class
        ├── HandlerExistsError          ValueError         a handler is registered there already
        ├── MetricNotFoundError         KeyError           no checkpoint recorded that metric
        ├── ClassNotFoundError          ImportError        typed=True: a class that cannot be imported, or has changed
        ├── StructureMismatchError      ValueError         `like` and the checkpoint differ, leaf by leaf
        │   └── PartialCheckpointError                     it is the part of one process, and more is asked for
        ├── CorruptCheckpointError      ValueError         bytes that are not the ones that were saved
        │   └── NoValidCheckpointError                     every candidate of a run was rejected
        ├── UnwritableDirectoryError    OSError            the directory cannot be written
        ├── DiskFullError               OSError            not enough free space
        ├── StorageError                OSError            the file system failed (EIO, EINTR, ...)
        ├── RunLockedError              BlockingIOError    another live process writes to this run
        ├── BarrierTimeoutError         TimeoutError       a process did not arrive in time
        ├── OtherProcessError           RuntimeError       another process has failed; which and why
        ├── ProcessesDisagreeError      ValueError         processes that act together were not given the same
        ├── NoDeviceError               RuntimeError       JAX has no device to restore arrays onto
        ├── NotSharedError              FileNotFoundError  processes that share a checkpoint see different directories
        └── SaveFailedError             RuntimeError       a background save failed; see ``__cause__``

    SystemExit
    └── Preempted                       exit code 143      saved as asked by a signal; leaving
"""

from __future__ import annotations

import errno
import os
from typing import Any, Self

__all__ = [
    "BarrierTimeoutError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClassNotFoundError",
    "CorruptCheckpointError",
    "DestinationExistsError",
    "DiskFullError",
    "HandlerExistsError",
    "HandlerNotFoundError",
    "IncompleteCheckpointError",
    "InvalidArgumentError",
    "InvalidArgumentTypeError",
    "ItemNotFoundError",
    "MetricNotFoundError",
    "NameCollisionError",
    "NoDeviceError",
    "NoValidCheckpointError",
    "NotSerializableError",
    "NotSharedError",
    "OtherProcessError",
    "PartialCheckpointError",
    "Preempted",
    "ProcessesDisagreeError",
    "RunLockedError",
    "SaveFailedError",
    "StorageError",
    "StructureMismatchError",
    "UnsupportedLeafError",
    "UnwritableDirectoryError",
]


class CheckpointError(Exception):
    """The base of every error of this library."""


class InvalidArgumentError(CheckpointError, ValueError):
    """An argument has a value that cannot be meant."""


class InvalidArgumentTypeError(CheckpointError, TypeError):
    """An argument has a type that cannot be meant."""


class NotSerializableError(CheckpointError, TypeError):
    """Metadata or metrics hold something that JSON cannot."""


class UnsupportedLeafError(CheckpointError, ValueError):
    """A leaf of the state is of a kind that no checkpoint can hold."""


class NameCollisionError(CheckpointError, ValueError):
    """Two leaves would share one name on disk, so one of them would be lost."""


class DestinationExistsError(CheckpointError, ValueError):
    """Something is already where the checkpoint should go."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class IncompleteCheckpointError(CheckpointError, ValueError):
    """The directory is there, but it was never committed."""


class _NamedKeyError(CheckpointError, KeyError):
    # KeyError prints the repr of its argument; a message for people must keep its line breaks.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ItemNotFoundError(_NamedKeyError):
    """The checkpoint has no item of that name."""


class HandlerNotFoundError(_NamedKeyError):
    """No handler is registered for that item or args class."""


class HandlerExistsError(CheckpointError, ValueError):
    """A handler is registered there already."""


class MetricNotFoundError(_NamedKeyError):
    """No checkpoint of the run recorded that metric."""


class ClassNotFoundError(CheckpointError, ImportError):
    """A class that the state was saved with cannot be imported by its name, or is another one now."""


class StructureMismatchError(CheckpointError, ValueError):
    """The checkpoint and the structure to restore into differ; the message lists every leaf."""


class PartialCheckpointError(StructureMismatchError):
    """The checkpoint is whole and is the part of one process (`primary_host=None`); what was asked for is in others."""

    @classmethod
    def of(cls, process: int, lacking: str) -> Self:
        """That a checkpoint is this process's part."""
        return cls(
            f"{lacking}. The checkpoint is whole, and is the part of process {process}: each saved its own "
            "(primary_host=None). Restore it into a target with the mesh and shardings that it was saved with, by the "
            "same processes."
        )


class CorruptCheckpointError(CheckpointError, ValueError):
    """What is on disk is not what was saved."""


class NoValidCheckpointError(CorruptCheckpointError):
    """Every checkpoint of the run was tried and rejected; the message has each one's reason."""


class UnwritableDirectoryError(CheckpointError, OSError):
    """The directory cannot be written."""


class DiskFullError(CheckpointError, OSError):
    """There is not enough free space for the checkpoint."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type[Self], tuple[str], dict[str, Any]]:
        return type(self), (str(self),), self.__dict__  # OSError's own would give both of its arguments to ours


class StorageError(CheckpointError, OSError):
    """The file system failed in the midst of an operation; `errno` says how."""

    def __str__(self) -> str:
        return str(self.args[-1])  # also of one that has come from another process as its text alone


class RunLockedError(CheckpointError, BlockingIOError):
    """Another live process is writing to this run."""


class BarrierTimeoutError(CheckpointError, TimeoutError):
    """At least one process did not arrive at a barrier in time."""


class OtherProcessError(CheckpointError, RuntimeError):
    """Another process of this save or restore has failed; the message says which and why."""


class ProcessesDisagreeError(CheckpointError, ValueError):
    """Processes that save or restore together were not given the same; the message names them."""


class NoDeviceError(CheckpointError, RuntimeError):
    """JAX has no device in this process, and arrays are to be restored onto one."""


class NotSharedError(CheckpointError, FileNotFoundError):
    """The directory of a checkpoint of several processes is not the same one for all of them."""


class SaveFailedError(CheckpointError, RuntimeError):
    """A save in the background failed; the reason is the ``__cause__``."""


class Preempted(SystemExit):
    """The process was asked to stop, the state has been saved and committed, and it is time to leave.

    Not caught, it ends the process with exit code 143, as a SIGTERM would have; `step` is the step that
    was saved.

    >>> Preempted(1200).code
    143
    """

    def __init__(self, step: int) -> None:
        super().__init__(143)
        self.step = step

    def __str__(self) -> str:
        return f"preempted: step {self.step} is saved"


def explain_os_error(error: OSError, doing: str) -> OSError:
    """The same failure, saying which path it concerns and what can be done about it."""
    if isinstance(error, CheckpointError | FileNotFoundError | FileExistsError) or error.errno is None:
        return error  # it says what it is about already
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"{doing}: the disk or quota is full ({error.strerror}). Nothing was committed and the partial "
            "files are removed; free some space, or keep fewer checkpoints (`keep=`)."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        reason = os.strerror(error.errno)
        return UnwritableDirectoryError(f"{doing}: {reason}. Choose a directory that this process may write.")
    reason = error.strerror or os.strerror(error.errno)
    place = f" at {error.filename}" if error.filename and str(error.filename) not in doing else ""
    message = f"{doing}: {reason}{place}. What was committed before is untouched; look at the disk."
    return StorageError(error.errno, message)
