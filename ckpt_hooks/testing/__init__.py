"""What users test their own handlers and loops with.

`record` and `crash_states`: what a power loss may leave of a save. `damage`: flipped bits, lost sectors, missing files.
"""

from ckpt_hooks.testing import damage
from ckpt_hooks.testing.crash import CrashState, crash_states
from ckpt_hooks.testing.operations import Scratch
from ckpt_hooks.testing.recording import IncompleteRecordingError, Recording, record

__all__ = ["CrashState", "IncompleteRecordingError", "Recording", "Scratch", "crash_states", "damage", "record"]
