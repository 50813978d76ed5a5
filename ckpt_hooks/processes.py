"""The processes of one run: who is primary, what each tells the others, and operation ids.

The only module that touches `jax.distributed`. Without it there is one process, and no JAX backend is
started: a reader of checkpoints needs no device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self

import jax

from ckpt_hooks.arguments import require_count, require_secs
from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, OtherProcessError

__all__ = [
    "ALONE",
    "MultiprocessingOptions",
    "Writers",
    "count",
    "forget",
    "found",
    "index",
    "leave",
    "next_operation_id",
    "operation_ids",
    "publish",
    "published",
    "reached_preemption_sync_point",
    "watches_preemption",
    "wait_for",
]

DEFAULT_BARRIER_TIMEOUT_SECS = 300.0

_askings = itertools.count(1)  # whether there is a preemption
_is_preempted = threading.Event()  # once there is: JAX's runtime says so at one asking alone, which is one hook's
_operation_ids: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiprocessingOptions:
    """Which processes take part in a checkpoint, and which of them commits it.

    Attributes:
      primary_host: the process that makes directories, writes metadata and commits; None makes every
        process primary, for storage that each process has for itself.
      active_processes: the processes that take part; None means all.
      barrier_sync_key_prefix: told apart from other checkpointers' barriers by this prefix.
      barrier_timeout_secs: how long a barrier waits for the last process before it raises BarrierTimeoutError, which
        names those that did not come. None: the `timeout_secs` of the checkpointer, manager or hook; 300 s where it
        has none. Choose it longer than processes differ in the time they take for a save, and shorter than a job may
        hang.

    Raises InvalidArgumentError for a primary that does not take part, and for a timeout that is not positive;
    InvalidArgumentTypeError for what is no number of a process, of seconds, or no string.

    >>> MultiprocessingOptions(barrier_timeout_secs=120).is_primary()
    True
    """

    primary_host: int | None = 0
    active_processes: frozenset[int] | set[int] | None = None
    barrier_sync_key_prefix: str | None = None
    barrier_timeout_secs: float | None = None

    def __post_init__(self) -> None:
        if self.barrier_timeout_secs is not None:
            require_secs(self.barrier_timeout_secs, "barrier_timeout_secs")
        if self.primary_host is not None:
            require_count(self.primary_host, "primary_host")
        prefix: object = self.barrier_sync_key_prefix
        if not isinstance(prefix, str | None):
            raise InvalidArgumentTypeError(f"barrier_sync_key_prefix is a string, or None; got {prefix!r}")
        active: Any = self.active_processes
        if active is not None and (isinstance(active, str | bytes) or not isinstance(active, Collection)):
            raise InvalidArgumentTypeError(f"active_processes is a set of process numbers, or None; got {active!r}")
        if active is not None and not active:
            raise InvalidArgumentError("active_processes is empty; give those that take part, or None for all")
        for process in active or ():
            require_count(process, "each of active_processes")
        if active is not None and self.primary_host is not None and self.primary_host not in active:
            raise InvalidArgumentError(
                f"primary_host={self.primary_host} is not one of active_processes={sorted(active)}; "
                "the primary must take part."
            )

    def is_primary(self) -> bool:
        """Whether this process commits."""
        return self.primary_host is None or index() == self.primary_host

    def check_membership(self) -> None:
        """Raises InvalidArgumentError in a process that `active_processes` leaves out, or for one that there is not."""
        named = {*(self.active_processes or ()), *(() if self.primary_host is None else (self.primary_host,))}
        if count() > 1 and not named <= set(range(count())):
            raise InvalidArgumentError(
                f"primary_host={self.primary_host} and active_processes={sorted(self.active_processes or ())} name "
                f"processes that there are not; there are {count()}, from 0."
            )
        if self.active_processes is not None and index() not in self.active_processes:
            raise InvalidArgumentError(
                f"process {index()} is not one of active_processes={sorted(self.active_processes)}; "
                "only those may call this checkpointer."
            )

    def members(self) -> frozenset[int]:
        """The processes that take part."""
        return frozenset(range(count()) if self.active_processes is None else self.active_processes)

    def writers(self) -> Writers:
        """Those that write the checkpoints of this process."""
        if count() == 1:
            return ALONE
        if self.primary_host is None:
            return Writers((index(),), is_local=True)
        return Writers(tuple(sorted(self.members(), key=lambda process: (process != self.primary_host, process))))

    def leader(self) -> int:
        """The process that answers for all at a barrier: the primary, or the first where all are."""
        return min(self.members()) if self.primary_host is None else self.primary_host

    def with_timeout(self, timeout_secs: float) -> Self:
        """The same, with this timeout where none was asked for."""
        require_secs(timeout_secs, "timeout_secs")
        return self if self.barrier_timeout_secs else dataclasses.replace(self, barrier_timeout_secs=timeout_secs)

    def group(self) -> str:
        """Tells subsets of processes apart, which count their operations by themselves; "" for all of them."""
        if self.active_processes is None:
            return ""
        return f"{len(self.active_processes)}of{zlib.crc32(repr(sorted(self.active_processes)).encode()):08x}."

    def key(self, name: str) -> str:
        """The name of a barrier, with the prefix that was asked for."""
        prefix = self.barrier_sync_key_prefix
        return name if prefix is None else f"{prefix}_{name}"


@dataclasses.dataclass(frozen=True)
class Writers:
    """The processes that write one checkpoint, in the order of their data files.

    Attributes:
      indexes: their numbers; the first one writes the index over all data files.
      is_local: whether it is this process alone, which writes what it holds of each array into storage of its own.
    """

    indexes: tuple[int, ...] = (0,)
    is_local: bool = False

    @functools.cached_property
    def ranks(self) -> Mapping[int, int]:
        """{process: its place among them}."""
        return {process: rank for rank, process in enumerate(self.indexes)}


ALONE = Writers()  # without `jax.distributed`


def index() -> int:
    """The number of this process, 0 without `jax.distributed`."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are, 1 without `jax.distributed`."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def operation_ids(options: MultiprocessingOptions) -> Iterator[int]:
    """Numbers that every process of a group counts alike, so that the barriers of two operations never mix."""
    return _operation_ids[options.key(options.group())]


def next_operation_id(options: MultiprocessingOptions) -> int:
    """The next of them."""
    return next(operation_ids(options))


@contextlib.contextmanager
def _service() -> Iterator[Any]:
    """A client of the coordination service, whose end is another process's end and not a failure of the file system.

    Raises OtherProcessError where nothing answers.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None, "asked only where there are several processes"
    try:
        yield client
    except jax.errors.JaxRuntimeError as error:
        if "UNAVAILABLE" not in str(error):
            raise
        raise OtherProcessError(
            "the coordination service of jax.distributed does not answer any more. It runs in process 0: look at its "
            "log, since it died or its network is gone, and start all processes anew."
        ) from error


def publish(key: str, value: str) -> None:
    """Puts a line where every process can read it."""
    with _service() as client:
        client.key_value_set(key, value, allow_overwrite=True)


def published(folder: str) -> dict[str, str]:
    """{key below `folder`, which ends with a slash: line} of what was published there."""
    with _service() as client:
        return {key.removeprefix(folder): value for key, value in client.key_value_dir_get(folder)}


def found(key: str) -> str | None:
    """One published line, or None; where there are thousands in its folder, `published` brings them all."""
    with _service() as client:
        return _line_unless("NOT_FOUND", client.key_value_try_get, key)


def wait_for(key: str, timeout_secs: float) -> str | None:
    """A published line, as soon as it is there; None where it is not there in time."""
    with _service() as client:
        return _line_unless("DEADLINE_EXCEEDED", client.blocking_key_value_get, key, max(1, int(timeout_secs * 1000)))


def _line_unless(status: str, get: Callable[..., Any], *arguments: Any) -> str | None:
    try:
        return str(get(*arguments))
    except jax.errors.JaxRuntimeError as error:
        if status in str(error):
            return None
        raise


def forget(folder: str) -> None:
    """Removes what was published below `folder`."""
    with _service() as client:
        client.key_value_delete(folder)


def leave(folder: str, num_members: int) -> None:
    """Called once by each member that will read nothing below `folder` any more; the last one removes it."""
    with _service() as client:
        left = client.key_value_increment(f"{folder}/left", 1)
    if left == num_members:
        forget(folder)


def watches_preemption() -> bool:
    """Whether JAX's runtime listens for SIGTERM, and tells all processes."""
    from jax._src import distributed

    return distributed.global_state.preemption_sync_manager is not None


def reached_preemption_sync_point() -> bool:
    """Whether JAX's runtime, having been told of a preemption, wants all processes to stop here.

    What it counts are the askings of this process, not steps: it names one asking above all that have been, and a step
    that a loop jumps over would never come. So every process has to ask equally often. Once reached, it stays so: each
    of several hooks is told when it asks next, which is at the same place in all processes.
    """
    from jax.experimental import multihost_utils

    if not _is_preempted.is_set() and multihost_utils.reached_preemption_sync_point(next(_askings)):
        _is_preempted.set()
    return _is_preempted.is_set()
