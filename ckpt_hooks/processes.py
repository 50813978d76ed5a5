"""The processes of one run: who is primary, what each tells the others, and operation ids.

The only module that touches `jax.distributed`. Without it there is one process, and no JAX backend is
started: a reader of checkpoints needs no device.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax

from ckpt_hooks.errors import InvalidArgumentError

__all__ = [
    "MultiprocessingOptions",
    "count",
    "decide_on_primary",
    "index",
    "next_operation_id",
    "publish",
    "published",
    "reached_preemption_sync_point",
    "wait_for",
]

DEFAULT_BARRIER_TIMEOUT_SECS = 300.0

operation_ids = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiprocessingOptions:
    """Which processes take part in a checkpoint, and which of them commits it.

    Attributes:
      primary_host: the process that makes directories, writes metadata and commits; None makes every
        process primary, for storage that each process has for itself.
      active_processes: the processes that take part; None means all.
      barrier_sync_key_prefix: told apart from other checkpointers' barriers by this prefix.

    >>> MultiprocessingOptions().is_primary()
    True
    """

    primary_host: int | None = 0
    active_processes: frozenset[int] | set[int] | None = None
    barrier_sync_key_prefix: str | None = None

    def __post_init__(self) -> None:
        active = self.active_processes
        if active is not None and self.primary_host is not None and self.primary_host not in active:
            raise InvalidArgumentError(
                f"primary_host={self.primary_host} is not one of active_processes={sorted(active)}; "
                "the primary must take part."
            )

    def is_primary(self) -> bool:
        """Whether this process commits."""
        return self.primary_host is None or index() == self.primary_host

    def check_membership(self) -> None:
        """Raises InvalidArgumentError in a process that `active_processes` leaves out."""
        if self.active_processes is not None and index() not in self.active_processes:
            raise InvalidArgumentError(
                f"process {index()} is not one of active_processes={sorted(self.active_processes)}; "
                "only those may call this checkpointer."
            )

    def members(self) -> frozenset[int]:
        """The processes that take part."""
        return frozenset(range(count()) if self.active_processes is None else self.active_processes)

    def key(self, name: str) -> str:
        """The name of a barrier, with the prefix that was asked for."""
        prefix = self.barrier_sync_key_prefix
        return name if prefix is None else f"{prefix}_{name}"


def index() -> int:
    """The number of this process, 0 without `jax.distributed`."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are, 1 without `jax.distributed`."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def next_operation_id() -> int:
    """A number that every process counts alike, so that the barriers of two saves never mix."""
    return next(operation_ids)


def _client() -> Any:
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None, "asked only where there are several processes"
    return client


def publish(key: str, value: str) -> None:
    """Puts a line where every process can read it."""
    _client().key_value_set(key, value, allow_overwrite=True)


def published(folder: str) -> dict[str, str]:
    """{key below `folder`, which ends with a slash: line} of what was published there."""
    return {key.removeprefix(folder): value for key, value in _client().key_value_dir_get(folder)}


def wait_for(key: str, timeout_secs: float) -> str | None:
    """A published line, as soon as it is there; None where it is not there in time."""
    try:
        return str(_client().blocking_key_value_get(key, max(1, int(timeout_secs * 1000))))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def decide_on_primary(key: str, answer: bool, timeout_secs: float = DEFAULT_BARRIER_TIMEOUT_SECS) -> bool:
    """Process 0's answer to a question that clocks would answer differently on each process."""
    name = f"ckpt_hooks/{key}"
    if index() == 0:
        publish(name, str(int(answer)))
        return answer
    return bool(int(_client().blocking_key_value_get(name, int(timeout_secs * 1000))))


def reached_preemption_sync_point(step: int) -> bool:
    """Whether JAX's runtime, having been told of a preemption, wants all processes to save at this step."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))
