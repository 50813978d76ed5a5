"""What the tests that count calls share: an action, watched call by call in all its threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["run_profiled"]


def run_profiled(action: Callable[[], object], note: Callable[[FrameType, str, Any], None]) -> None:
    """Runs `action`; `note` is told of each call in this thread and in those that it starts (`sys.setprofile`)."""
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
