"""What users test their own loops and handlers with."""

from ckpt_hooks.testing.failures import (
    FailingStorage,
    SimulatedKill,
    StorageCall,
    failing_storage,
    for_every_failure,
)

__all__ = ["FailingStorage", "SimulatedKill", "StorageCall", "failing_storage", "for_every_failure"]
