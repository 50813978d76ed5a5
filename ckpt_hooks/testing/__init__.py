"""What users test their own loops and handlers with.

`failing_storage` and `for_every_failure`: storage that fails at the n-th call. `record` and `crash_states`: what a
power loss may leave of a save. `damage`: flipped bits, lost sectors, missing files. `zoo`: nasty states, and what has
to be refused. `assert_same`: two states, to the last bit.
"""

from ckpt_hooks.testing import damage, zoo
from ckpt_hooks.testing.comparing import assert_same, differences
from ckpt_hooks.testing.crash import CrashState, crash_states
from ckpt_hooks.testing.failures import (
    FailingStorage,
    SimulatedKill,
    StorageCall,
    failing_storage,
    for_every_failure,
)
from ckpt_hooks.testing.operations import Scratch
from ckpt_hooks.testing.recording import IncompleteRecordingError, Recording, record

__all__ = [
    "CrashState",
    "FailingStorage",
    "IncompleteRecordingError",
    "Recording",
    "Scratch",
    "SimulatedKill",
    "StorageCall",
    "assert_same",
    "crash_states",
    "damage",
    "differences",
    "failing_storage",
    "for_every_failure",
    "record",
    "zoo",
]
