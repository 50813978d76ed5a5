"""Telemetry: what happened, how long it took and how many bytes it moved, through `jax.monitoring`.

Every name starts with ``/jax/ckpt_hooks/``; see ``docs/events.md`` for the list. A listener is registered
with ``jax.monitoring.register_event_listener`` and its siblings.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax.monitoring

__all__ = ["duration", "event", "phase", "scalar"]

_PREFIX = "/jax/ckpt_hooks/"


def event(name: str, **details: str | int) -> None:
    """Something happened."""
    jax.monitoring.record_event(_PREFIX + name, **details)


def duration(name: str, secs: float, **details: str | int) -> None:
    """Something took `secs` seconds."""
    jax.monitoring.record_event_duration_secs(_PREFIX + name, secs, **details)


def scalar(name: str, value: float, **details: str | int) -> None:
    """Something has a size."""
    jax.monitoring.record_scalar(_PREFIX + name, value, **details)


@contextlib.contextmanager
def phase(name: str, **details: str | int) -> Iterator[None]:
    """Times the block as ``<name>_duration_secs``, also when it raises."""
    start_secs = time.perf_counter()
    try:
        yield
    finally:
        duration(f"{name}_duration_secs", time.perf_counter() - start_secs, **details)
