"""Functions that are slow or fail, in the place of those that a test's subject calls."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

__all__ = ["delay", "fail"]


def delay(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, secs: float) -> None:
    """Each call of `owner.name` begins that much later."""
    call = getattr(owner, name)

    def late(*positional: Any, **keywords: Any) -> Any:
        time.sleep(secs)
        return call(*positional, **keywords)

    monkeypatch.setattr(owner, name, late)


def fail(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, times: int | None = None
) -> list[tuple[Any, ...]]:
    """Calls of `owner.name` fail with this errno, all or the next so many; the arguments of those that have failed."""
    call = getattr(owner, name)
    failed: list[tuple[Any, ...]] = []

    def failing(*positional: Any, **keywords: Any) -> Any:
        if times is not None and len(failed) >= times:
            return call(*positional, **keywords)
        failed.append(positional)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owner, name, failing)
    return failed
