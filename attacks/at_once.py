"""Tiny files need no threads: starting one takes longer than reading all of them, a million times over."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from unittest import mock

__all__ = ["io_at_once"]

_IO_THREADS = "ckpt_hooks-io"


class _Thread(threading.Thread):
    """Of the library's own threads for reads and writes, `start` does the work itself."""

    def start(self) -> None:
        if self.name == _IO_THREADS:
            self.run()
        else:
            super().start()


@contextlib.contextmanager
def io_at_once() -> Iterator[None]:
    """Has the library read and write its pieces one after another. What is read and checked stays the same."""
    with mock.patch("threading.Thread", _Thread):
        yield
