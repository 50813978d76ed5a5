"""What `open` returns while a recording runs: Python's own file objects, each write of which is noted."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["open_recorded"]


class Recorder(Protocol):
    """Who notes what is written."""

    lock: Any

    def written(self, file: Any, write: Callable[[], int], data: bytes, offset: int | None = None) -> int:
        """Calls `write`, and notes as much of `data` as it wrote."""

    def resized(self, file: Any) -> None:
        """Notes the size that a file has now."""


def open_recorded(
    recorder: Recorder,
    file: Any,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
    closefd: bool,
    opener: Any,
) -> Any:
    """A file that is open for writing, as `open` gives it."""
    raw = _RecordedFile(recorder, file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if "b" in mode and buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
    if "b" in mode:
        return _Binary(buffered)
    return io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)


class _RecordedFile(io.FileIO):
    """A raw file, each write of which is noted."""

    def __init__(self, recorder: Recorder, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd, opener)
        self._recorder = recorder

    def write(self, data: Any) -> int:
        content = bytes(memoryview(data).cast("B"))
        with self._recorder.lock:
            return self._recorder.written(self, lambda: super(_RecordedFile, self).write(data), content)

    def truncate(self, size: int | None = None) -> int:
        with self._recorder.lock:
            result = super().truncate(size)
            self._recorder.resized(self.fileno())
        return result


class _Binary:
    """A buffered file that NumPy does not take for one: it would write to the descriptor by itself."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Binary:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)
