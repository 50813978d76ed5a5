"""What a process may do to a directory tree, as plain values, and the tree that comes of it.

Files and directories are nodes with a number of their own, so that a rename of a directory leaves what is in it
alone. Node 0 is the directory that is watched.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping

from ckpt_hooks.storage.lookup import walk

__all__ = [
    "ROOT",
    "Create",
    "Image",
    "Mark",
    "Operation",
    "Remove",
    "Rename",
    "Resize",
    "Scratch",
    "Sync",
    "Tree",
    "Write",
    "read_tree",
]

ROOT = 0

Tree = Mapping[str, bytes | None]  # {path below the directory: content of a file, None for a directory}


@dataclasses.dataclass(frozen=True)
class Create:
    """A name for a node: a new file or directory, or one more link to a file."""

    folder: int
    name: str
    node: int
    is_directory: bool


@dataclasses.dataclass(frozen=True)
class Write:
    """Bytes at an offset of a file."""

    node: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Resize:
    """A file's new size; what is new in it is zero."""

    node: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Rename:
    """An entry under another name, or two entries that change places."""

    folder: int
    name: str
    to_folder: int
    to_name: str
    exchange: bool = False


@dataclasses.dataclass(frozen=True)
class Remove:
    """An entry that is gone."""

    folder: int
    name: str


@dataclasses.dataclass(frozen=True)
class Sync:
    """An fsync of a file or directory; of everything (`os.sync`) where `node` is None."""

    node: int | None


@dataclasses.dataclass(frozen=True)
class Mark:
    """No change: the place in the log at which something was reported, such as "saved step 7"."""

    label: str


Operation = Create | Write | Resize | Rename | Remove | Sync | Mark


class Image:
    """A directory tree: the content of each file, the entries of each directory.

    >>> image = Image()
    >>> for operation in (Create(ROOT, "a", 1, False), Write(1, 2, b"xy"), Rename(ROOT, "a", ROOT, "b")):
    ...     image.apply(operation)
    >>> image.tree()
    {'b': b'\\x00\\x00xy'}
    """

    def __init__(self) -> None:
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}

    def copy(self) -> Image:
        """An image that changes by itself."""
        copied = Image()
        copied.files = dict(self.files)
        copied.folders = {node: dict(entries) for node, entries in self.folders.items()}
        return copied

    def apply(self, operation: Operation) -> None:
        """Carries an operation out."""
        match operation:
            case Create(folder, name, node, is_directory):
                self.folders[folder][name] = node
                if is_directory:
                    self.folders.setdefault(node, {})
                else:
                    self.files.setdefault(node, b"")
            case Write() | Resize():
                self.files[operation.node] = changed(self.files[operation.node], operation)
            case Rename() | Remove():
                for folder, entries in self.entries_after(operation):
                    for name, found in entries.items():
                        if found is None:
                            self.folders[folder].pop(name, None)
                        else:
                            self.folders[folder][name] = found

    def entries_after(self, operation: Create | Rename | Remove) -> Iterator[tuple[int, dict[str, int | None]]]:
        """(directory, {name: node, None where the name is gone}) of each directory that an operation changes."""
        match operation:
            case Create(folder, name, node):
                yield folder, {name: node}
            case Remove(folder, name):
                yield folder, {name: None}
            case Rename(folder, name, to_folder, to_name, exchange):
                moved = self.folders[folder][name]
                left = self.folders[to_folder][to_name] if exchange else None
                if folder == to_folder:
                    yield folder, {name: left, to_name: moved} if name != to_name else {name: moved}
                else:
                    yield to_folder, {to_name: moved}
                    yield folder, {name: left}

    def tree(self) -> dict[str, bytes | None]:
        """{path: content}, every directory before what is in it."""
        return dict(self._walk(ROOT, ""))

    def _walk(self, folder: int, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        for name, node in sorted(self.folders[folder].items()):
            if node in self.folders:
                yield prefix + name, None
                yield from self._walk(node, f"{prefix}{name}/")
            else:
                yield prefix + name, self.files[node]


def changed(content: bytes, operation: Write | Resize) -> bytes:
    """The content of a file after a write or a change of its size."""
    if isinstance(operation, Resize):
        return content[: operation.nbytes].ljust(operation.nbytes, b"\0")
    before = content[: operation.offset].ljust(operation.offset, b"\0")
    return before + operation.data + content[operation.offset + len(operation.data) :]


def read_tree(directory: str) -> dict[str, bytes | None]:
    """The files and directories below a directory, as `Image.tree` gives them."""
    found: dict[str, bytes | None] = {}
    for folder, folders, files in walk(directory):
        here = os.path.relpath(folder, directory)
        prefix = "" if here == "." else f"{here}/"
        found |= {prefix + name: None for name in folders}
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                found[prefix + name] = file.read()
    return found


class Scratch:
    """A directory that shows one tree after another; only what differs is written.

    >>> import tempfile
    >>> scratch = Scratch(tempfile.mkdtemp())
    >>> scratch.show({"run": None, "run/a": b"1"})
    >>> read_tree(scratch.path)
    {'run': None, 'run/a': b'1'}
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._shown: dict[str, bytes | None] = {}
        self._dirty = True

    def show(self, tree: Tree) -> None:
        """Makes the directory what the tree says. What reads it must not change it, or say so (`changed`)."""
        if self._dirty:
            shutil.rmtree(self.path, ignore_errors=True)
            os.makedirs(self.path)
            self._shown, self._dirty = {}, False
        gone = [path for path in self._shown if path not in tree or (self._shown[path] is None) != (tree[path] is None)]
        for path in sorted(gone, reverse=True):  # what is in a directory before the directory
            full = os.path.join(self.path, path)
            if self._shown.pop(path) is None:
                os.rmdir(full)
            else:
                os.unlink(full)
        for path in sorted(tree):
            content = tree[path]
            if path in self._shown and self._shown[path] == content:
                continue
            full = os.path.join(self.path, path)
            if content is None:
                os.mkdir(full)
            else:
                with open(full, "wb", buffering=0) as file:
                    file.write(content)
        self._shown = dict(tree)

    def changed(self) -> None:
        """Somebody has written to the directory: the next `show` begins anew."""
        self._dirty = True
