"""The stand-ins for Python's file functions, which call the real ones and note what they did."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckpt_hooks.testing.files import open_recorded
from ckpt_hooks.testing.operations import ROOT, Create, Image, Operation, Remove, Rename, Resize, Sync, Write

__all__ = ["Recorder"]

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Recorder:
    """Stands in for the functions that change files: calls each one, and notes what it did."""

    def __init__(self, directory: str, image: Image, operations: list[Operation]) -> None:
        self._image = image  # what is there before the recording begins, filled here
        self._operations = operations
        self.lock = threading.RLock()  # held over call and note, so that the log has the order of the calls
        self._nodes: dict[tuple[int, int] | None, int] = {}  # {(device, inode): node}
        self._next_node = ROOT + 1
        self._adopt(directory, ROOT)

    def _adopt(self, path: str, node: int) -> None:
        """Takes what is there before the recording begins."""
        image = self._image
        self._nodes[_identity(os.lstat(path))] = node
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                image.files[node] = file.read()
            return
        entries = image.folders[node] = {}
        for name in sorted(os.listdir(path)):
            entries[name] = self._new_node()
            self._adopt(os.path.join(path, name), entries[name])

    def _new_node(self) -> int:
        self._next_node += 1
        return self._next_node - 1

    # -------------------------------------------------------------- installing

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        replaced = {name: getattr(os, name) for name in _OS_FUNCTIONS if hasattr(os, name)}
        replacements = {id(real): self._stand_in(name, real) for name, real in replaced.items()}
        replacements[id(open)] = self._stand_in("file", open)
        undo: list[tuple[dict[str, Any], str, Any]] = []
        real_getattr = ctypes.CDLL.__getattr__
        for module in list(sys.modules.values()):
            if isinstance(module, types.ModuleType):
                names = object.__getattribute__(module, "__dict__")  # which does not load a lazy module
                undo += [(names, name, value) for name, value in list(names.items()) if id(value) in replacements]
        ctypes.CDLL.__getattr__ = self._native(real_getattr)  # type: ignore[method-assign]
        try:
            for names, name, value in undo:
                names[name] = replacements[id(value)]
            yield
        finally:
            for names, name, value in undo:
                names[name] = value
            ctypes.CDLL.__getattr__ = real_getattr  # type: ignore[method-assign]

    def _stand_in(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_{_OS_FUNCTIONS.get(name, name)}")

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                return note(real, *args, **kwargs)

        return stand_in

    def _note(self, operation: Operation) -> None:
        self._operations.append(operation)

    # -------------------------------------------------------------- where?

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """(directory's node, name) of a path below the watched directory."""
        folder, name = os.path.split(os.fsdecode(path).rstrip("/"))
        try:
            identity = _identity(os.stat(folder or ".", dir_fd=dir_fd))
        except OSError:
            return None
        node = self._nodes.get(identity)
        return None if node is None else (node, name)

    def _node_of(self, file: Any) -> int | None:
        descriptor = file if isinstance(file, int) else file.fileno()
        return self._nodes.get(_identity(os.fstat(descriptor)))

    def _last_link(self, path: Any, dir_fd: int | None) -> tuple[int, int] | None:
        """The identity of what a removal of this name would free: its inode's number may soon be another file's."""
        try:
            found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return _identity(found) if found.st_nlink <= 1 or stat.S_ISDIR(found.st_mode) else None

    # -------------------------------------------------------------- files

    def _open(
        self, real: Callable[..., int], path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        place = self._place(path, dir_fd) if flags & _WRITES else None
        if place is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        try:
            size = os.stat(path, dir_fd=dir_fd).st_size
        except FileNotFoundError:
            size = None
        descriptor = real(path, flags, mode, dir_fd=dir_fd)
        if size is None:
            self._created(place, os.fstat(descriptor), is_directory=False)
        elif size and flags & os.O_TRUNC:
            self.resized(descriptor)
        return descriptor

    def _created(self, place: tuple[int, str], found: os.stat_result, *, is_directory: bool) -> None:
        node = self._nodes[_identity(found)] = self._new_node()
        self._note(Create(*place, node, is_directory))

    def _file(
        self,
        real: Callable[..., Any],
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        # An opener may open something else than `file` (tempfile does): whether it is ours is seen at each write.
        ours = self._node_of(file) is not None if isinstance(file, int) else bool(opener or self._place(file))
        if not ours or not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)

        def recorded_open(path: Any, flags: int) -> int:
            return os.open(path, flags, 0o666)  # which is replaced by ours

        return open_recorded(self, file, mode, buffering, encoding, errors, newline, closefd, opener or recorded_open)

    def written(self, file: Any, write: Callable[[], int], data: bytes, offset: int | None = None) -> int:
        """Calls `write`, and notes as much of `data` as it wrote, at `offset` or where the file is."""
        node = self._node_of(file)
        if node is None:
            return write()
        descriptor = file if isinstance(file, int) else file.fileno()
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_APPEND:
            offset = os.fstat(descriptor).st_size
        elif offset is None:
            offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        count = write()
        if count:
            self._note(Write(node, offset, data[:count]))
        if flags & os.O_DSYNC:
            self._note(Sync(node))
        return count

    def _write(self, real: Callable[..., int], fd: int, data: Any) -> int:
        return self.written(fd, lambda: real(fd, data), bytes(memoryview(data).cast("B")))

    def _writev(self, real: Callable[..., int], fd: int, buffers: Sequence[Any]) -> int:
        return self.written(fd, lambda: real(fd, buffers), _joined(buffers))

    def _pwrite(self, real: Callable[..., int], fd: int, data: Any, offset: int) -> int:
        return self.written(fd, lambda: real(fd, data, offset), bytes(memoryview(data).cast("B")), offset)

    def _pwritev(self, real: Callable[..., int], fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return self.written(fd, lambda: real(fd, buffers, offset, flags), _joined(buffers), offset)

    def _copied(self, real: Callable[..., int], first: int, second: int, *args: Any, **kwargs: Any) -> int:
        """sendfile(out, in, ...) and copy_file_range(in, out, ...): what they wrote is read back."""
        out = first if real.__name__ == "sendfile" else second
        node = self._node_of(out)
        offset = kwargs.get("offset_dst", args[2] if len(args) > 2 and real.__name__ != "sendfile" else None)
        if offset is None and node is not None:
            offset = os.lseek(out, 0, os.SEEK_CUR)
        count = real(first, second, *args, **kwargs)
        if node is not None and count:
            descriptor = os.open(f"/proc/self/fd/{out}", os.O_RDONLY)
            try:
                self._note(Write(node, offset or 0, os.pread(descriptor, count, offset or 0)))
            finally:
                os.close(descriptor)
        return count

    def _truncate(self, real: Callable[..., None], file: Any, length: int) -> None:
        real(file, length)
        self.resized(file)

    def _posix_fallocate(self, real: Callable[..., None], fd: int, offset: int, length: int) -> None:
        size = os.fstat(fd).st_size
        real(fd, offset, length)
        if offset + length > size:
            self.resized(fd)

    def resized(self, file: Any) -> None:
        """Notes the size that a file has now."""
        found = os.stat(file)
        node = self._nodes.get(_identity(found))
        if node is not None:
            self._note(Resize(node, found.st_size))

    # -------------------------------------------------------------- durability

    def _fsync(self, real: Callable[..., None], fd: Any) -> None:
        real(fd)
        node = self._node_of(fd)
        if node is not None:
            self._note(Sync(node))

    def _sync(self, real: Callable[..., None]) -> None:
        real()
        self._note(Sync(None))

    # -------------------------------------------------------------- names

    def _mkdir(self, real: Callable[..., None], path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        place = self._place(path, dir_fd)
        if place is not None:
            self._created(place, os.stat(path, dir_fd=dir_fd), is_directory=True)

    def _unlink(self, real: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        place, freed = self._place(path, dir_fd), self._last_link(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if place is not None:
            self._nodes.pop(freed, None)
            self._note(Remove(*place))

    def _rename(
        self,
        real: Callable[..., None],
        src: Any,
        dst: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        def call() -> None:
            real(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        self._renamed(call, (src, src_dir_fd), (dst, dst_dir_fd), exchange=False)

    def _renamed(
        self, call: Callable[[], object], source: tuple[Any, Any], target: tuple[Any, Any], *, exchange: bool
    ) -> None:
        old, new = self._place(*source), self._place(*target)
        freed = None if exchange else self._last_link(*target)
        call()
        if old == new:
            return
        self._nodes.pop(freed, None)
        if old is not None and new is not None:
            self._note(Rename(*old, *new, exchange))
        elif old is not None:
            self._note(Remove(*old))
        elif new is not None:
            self._appeared(*target, new)

    def _appeared(self, path: Any, dir_fd: int | None, place: tuple[int, str]) -> None:
        """What was renamed into the watched directory: as if it had been written there, without a sync."""
        found = os.stat(path, dir_fd=dir_fd)
        self._created(place, found, is_directory=stat.S_ISDIR(found.st_mode))
        if stat.S_ISDIR(found.st_mode):
            for name in sorted(os.listdir(path)):
                self._appeared(os.path.join(path, name), dir_fd, (self._nodes[_identity(found)], name))
        else:
            with open(path, "rb") as file:
                self._note(Write(self._nodes[_identity(found)], 0, file.read()))

    def _link(self, real: Callable[..., None], src: Any, dst: Any, **kwargs: Any) -> None:
        real(src, dst, **kwargs)
        place = self._place(dst, kwargs.get("dst_dir_fd"))
        node = self._nodes.get(_identity(os.stat(dst, dir_fd=kwargs.get("dst_dir_fd"))))
        if place is not None and node is not None:
            self._note(Create(*place, node, False))

    def _native(self, real_getattr: Callable[..., Any]) -> Callable[..., Any]:
        """`ctypes.CDLL.__getattr__` that gives a `renameat2` which is recorded."""

        def getattribute(library: ctypes.CDLL, name: str) -> Any:
            function = real_getattr(library, name)
            if name != "renameat2":
                return function
            vars(library).pop(name, None)  # ctypes keeps it there, and would not ask again

            def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> int:
                result = -1

                def call() -> None:
                    nonlocal result
                    result = function(old_fd, old, new_fd, new, flags)
                    if result != 0:
                        raise _RefusedError

                source, target = (
                    (path, None if fd == _AT_FDCWD else fd) for path, fd in ((old, old_fd), (new, new_fd))
                )
                with self.lock, contextlib.suppress(_RefusedError):
                    self._renamed(call, source, target, exchange=bool(flags & _RENAME_EXCHANGE))
                return result

            return renameat2

        return getattribute


class _RefusedError(Exception):
    """The kernel did not do it."""


_OS_FUNCTIONS = {  # {function of os: the method that stands in for it}
    "open": "open",
    "write": "write",
    "writev": "writev",
    "pwrite": "pwrite",
    "pwritev": "pwritev",
    "sendfile": "copied",
    "copy_file_range": "copied",
    "truncate": "truncate",
    "ftruncate": "truncate",
    "posix_fallocate": "posix_fallocate",
    "fsync": "fsync",
    "fdatasync": "fsync",
    "sync": "sync",
    "mkdir": "mkdir",
    "rmdir": "unlink",
    "unlink": "unlink",
    "remove": "unlink",
    "rename": "rename",
    "replace": "rename",
    "link": "link",
}


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _joined(buffers: Sequence[Any]) -> bytes:
    return b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
