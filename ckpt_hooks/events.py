"""Telemetry: what happened, how long it took and how many bytes it moved, through `jax.monitoring`.

Listen with ``jax.monitoring.register_event_listener`` and its siblings; ``docs/events.md`` says when each is sent.
"""

from jax.monitoring import record_event, record_scalar
from jax.monitoring import record_event_duration_secs as record_duration_secs

__all__ = ["record_duration_secs", "record_event", "record_scalar"]

_PREFIX = "/jax/ckpt_hooks/"

CHECKPOINTER_INIT = _PREFIX + "checkpointer/init"
ASYNC_CHECKPOINTER_INIT = _PREFIX + "async_checkpointer/init"
MANAGER_INIT = _PREFIX + "checkpoint_manager/init"

WRITE_START = _PREFIX + "write/start"
WRITE_SUCCESS = _PREFIX + "write/success"
WRITE_FAILURE = _PREFIX + "write/failure"
WRITE_STAGE_SECS = _PREFIX + "write/stage_duration_secs"
WRITE_DIRECTORY_SECS = _PREFIX + "write/directory_duration_secs"
WRITE_ITEMS_SECS = _PREFIX + "write/items_duration_secs"
WRITE_COMMIT_SECS = _PREFIX + "write/commit_duration_secs"
WRITE_BLOCKING_SECS = _PREFIX + "write/blocking_duration_secs"
WRITE_TOTAL_SECS = _PREFIX + "write/total_duration_secs"
WRITE_BYTES = _PREFIX + "write/bytes"

READ_START = _PREFIX + "read/start"
READ_SUCCESS = _PREFIX + "read/success"
READ_FAILURE = _PREFIX + "read/failure"
READ_REJECTED = _PREFIX + "read/rejected"
READ_DATA_SECS = _PREFIX + "read/data_duration_secs"
READ_TOTAL_SECS = _PREFIX + "read/total_duration_secs"
READ_BYTES = _PREFIX + "read/bytes"

BARRIER_SECS = _PREFIX + "barrier_duration_secs"
