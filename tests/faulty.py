"""Functions that are slow or fail, in the place of those that a test's subject calls."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

__all__ = ["delay", "fail_reads"]


def delay(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, secs: float) -> None:
    """Each call of `owner.name` begins that much later."""
    call = getattr(owner, name)

    def late(*positional: Any, **keywords: Any) -> Any:
        time.sleep(secs)
        return call(*positional, **keywords)

    monkeypatch.setattr(owner, name, late)


def fail_reads(monkeypatch: pytest.MonkeyPatch, code: int, times: int, function: str = "preadv") -> None:
    """The next so many calls of this function of `os` fail with this errno."""
    read, faults = getattr(os, function), iter(range(times))

    def failing(*arguments: Any) -> Any:
        if next(faults, None) is not None:
            raise OSError(code, os.strerror(code))
        return read(*arguments)

    monkeypatch.setattr(os, function, failing)
