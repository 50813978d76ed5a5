"""What a power loss may leave of recorded operations: the states that a file system is allowed to be in.

A power loss after any operation keeps what an fsync has made durable. Everything else may be there or not:

- **content**: a file's is durable once that file was synced. Writes after that may be lost, kept, or torn into
  sectors of 512 bytes or pages of 4096, in any order; the new size may be there without the data (zeros).
- **names**: a directory's entries are durable once that directory was synced. Changes after that are kept or lost
  one by one, whatever else they were made before or after; only changes of the same name keep their order. A rename
  within one directory happens as a whole or not at all, as on every journaling file system.
- **a file's name is not its content**: syncing a file does not make its name durable, nor the other way round.

These are the states that POSIX leaves open (`model="posix"`). `model="journal"` gives those among them that a file
system with an ordered journal (ext4, XFS) leaves: changes of names are on the disk up to some moment, in the order in
which they were made, and contents are torn by pages. A random choice among the many of the first model would hardly
ever meet them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import xxhash

from ckpt_hooks.testing.choices import Chooser, choose
from ckpt_hooks.testing.operations import (
    ROOT,
    Create,
    Image,
    Mark,
    Remove,
    Rename,
    Resize,
    Sync,
    Tree,
    Write,
    changed,
)
from ckpt_hooks.testing.recording import Recording

__all__ = ["CrashState", "Model", "crash_states"]

Model = Literal["posix", "journal"]

SECTOR_BYTES = 512
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class CrashState:
    """What may be on the disk after a power loss.

    Attributes:
      tree: {path: content of a file, None for a directory}, below the recorded directory.
      cut: how many operations had been carried out.
      marks: what had been reported by then (`Recording.mark`).
      model: of the file system.
      lost: how many of the changes that were not durable are not, or only in part, on the disk.
      digest: of the tree; the same for equal trees.
    """

    tree: Tree
    cut: int
    marks: tuple[str, ...]
    model: Model
    lost: int
    digest: int


def crash_states(
    recording: Recording,
    *,
    per_cut: int = 20,
    seed: int = 0,
    models: tuple[Model, ...] = ("posix", "journal"),
    cuts: Iterator[int] | range | None = None,
) -> Iterator[CrashState]:
    """The states that a power loss may leave, at every place of a log; the same ones for the same seed.

    Where a model has at most `per_cut` states at a place, all of them; otherwise as many chosen at random. None
    is given twice with the same marks.

    >>> import tempfile
    >>> from ckpt_hooks.testing import record
    >>> with tempfile.TemporaryDirectory() as directory, record(directory) as log:
    ...     with open(f"{directory}/a", "wb") as file:
    ...         _ = file.write(b"new")
    >>> [dict(state.tree) for state in crash_states(log, models=("posix",))]
    [{}, {'a': b''}, {'a': b'new'}, {'a': b'\\x00\\x00\\x00'}]

    Args:
      recording: from `record`.
      per_cut: how many states of each model at each place.
      seed: of the choice.
      models: "posix", "journal", or both.
      cuts: after how many operations the power goes; everywhere by default.
    """
    seen: set[tuple[int, int]] = set()
    wanted = None if cuts is None else set(cuts)
    for cut, disk in enumerate(_disks(recording)):
        if wanted is not None and cut not in wanted:
            continue
        for model in models:
            build = disk.state_of_posix if model == "posix" else disk.state_of_journal
            rng = random.Random(f"{seed} {cut} {model}")
            for tree, lost in choose(build, per_cut, rng):
                digest = digest_of(tree)
                if (digest, len(disk.marks)) not in seen:
                    seen.add((digest, len(disk.marks)))
                    yield CrashState(tree, cut, tuple(disk.marks), model, lost, digest)


def digest_of(tree: Tree) -> int:
    """The same number for equal trees."""
    state = xxhash.xxh3_64()
    for path, content in sorted(tree.items()):
        state.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        state.update(content or b"")
    return state.intdigest()


# ------------------------------------------------------------------ what is durable


@dataclasses.dataclass(frozen=True)
class _Change:
    """A change of the names in one directory that happens as a whole."""

    position: int  # in the log
    names: Mapping[str, int | None]


class _Disk:
    """What is durable after some operations, and what is not yet."""

    def __init__(self, base: Image) -> None:
        self.memory = base.copy()  # as the process sees it
        self.durable = base.copy()
        self.contents: dict[int, list[Write | Resize]] = {}  # per file, since its last sync
        self.changes: dict[int, list[_Change]] = {}  # per directory, since its last sync
        self.marks: list[str] = []
        self._touched: dict[int, int] = {}  # {node: position of the last operation on it}
        self._journaled = -1  # changes of names up to here are durable in an ordered journal

    def apply(self, position: int, operation: Any) -> None:
        match operation:
            case Mark(label):
                self.marks.append(label)
                return
            case Sync(node):
                self._sync(node)
                return
            case Write(node) | Resize(node):
                self.contents.setdefault(node, []).append(operation)
                self._touched[node] = position
            case Create() | Rename() | Remove():
                self._change_names(position, operation)
        self.memory.apply(operation)

    def _change_names(self, position: int, operation: Create | Rename | Remove) -> None:
        for folder, names in self.memory.entries_after(operation):
            self.changes.setdefault(folder, []).append(_Change(position, names))
            self._touched[folder] = position
        if isinstance(operation, Create):
            self._touched[operation.node] = position
            # A new node is empty as long as nothing in it is durable.
            if operation.is_directory:
                self.durable.folders.setdefault(operation.node, {})
            else:
                self.durable.files.setdefault(operation.node, b"")

    def _sync(self, node: int | None) -> None:
        if node is None:
            for pending in [*self.contents, *self.changes]:
                self._sync(pending)
            return
        self._journaled = max(self._journaled, self._touched.get(node, -1))
        if self.contents.pop(node, None):
            self.durable.files[node] = self.memory.files[node]
        if self.changes.pop(node, None):
            self.durable.folders[node] = dict(self.memory.folders[node])

    # -------------------------------------------------------------- states

    def state_of_posix(self, chooser: Chooser) -> tuple[Tree, int]:
        """(tree, what is lost) where each change of a name is kept or lost by itself."""
        lost = 0

        def entries_of(folder: int) -> dict[str, int]:
            nonlocal lost
            entries = self.durable.folders[folder]
            if folder not in self.changes:
                return entries
            entries, dropped = dict(entries), set[str]()
            for change in self.changes[folder]:
                # What was done later to a name whose change is lost cannot be there without it.
                if dropped.isdisjoint(change.names) and chooser.keeps():
                    _rename_in(entries, change.names)
                else:
                    dropped |= change.names.keys()
                    lost += 1
            return entries

        return self._build(entries_of, chooser, SECTOR_BYTES), lost + chooser.lost

    def state_of_journal(self, chooser: Chooser) -> tuple[Tree, int]:
        """(tree, what is lost) where changes of names are on the disk up to some moment."""
        pending = sorted({change.position for changes in self.changes.values() for change in changes})
        open_ones = [position for position in pending if position > self._journaled]
        end = [self._journaled, *open_ones][len(open_ones) - chooser.pick(len(open_ones) + 1)]

        def entries_of(folder: int) -> dict[str, int]:
            entries = dict(self.durable.folders[folder])
            for change in self.changes.get(folder, ()):
                if change.position <= end:
                    _rename_in(entries, change.names)
            return entries

        lost = sum(position > end for position in open_ones)
        return self._build(entries_of, chooser, PAGE_BYTES), lost + chooser.lost

    def _build(self, entries_of: Callable[[int], dict[str, int]], chooser: Chooser, block_bytes: int) -> Tree:
        tree: dict[str, bytes | None] = {}

        def walk(folder: int, prefix: str) -> None:
            for name, node in entries_of(folder).items():
                if node in self.durable.folders:
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                elif node in self.contents:
                    tree[prefix + name] = self._content(node, chooser, block_bytes)
                else:
                    tree[prefix + name] = self.durable.files[node]

        walk(ROOT, "")
        return tree

    def _content(self, node: int, chooser: Chooser, block_bytes: int) -> bytes:
        """What a file that has not been synced since its last change may hold."""
        before, after = self.durable.files[node], self.memory.files[node]
        match chooser.way():
            case 0:
                return after
            case 1:
                return before
            case 2:
                return before[: len(after)].ljust(len(after), b"\0")
            case 3:
                return self._torn(node, chooser, block_bytes)
            case _:
                blocks = -(-len(after) // block_bytes)
                return after[: chooser.pick(max(1, blocks)) * block_bytes]

    def _torn(self, node: int, chooser: Chooser, block_bytes: int) -> bytes:
        content = self.durable.files[node]
        for operation in self.contents[node]:
            if isinstance(operation, Resize):
                content = changed(content, operation)
                continue
            start, end = operation.offset, operation.offset + len(operation.data)
            content = content.ljust(end, b"\0")
            while start < end:
                stop = min(end, (start // block_bytes + 1) * block_bytes)
                if chooser.keeps():
                    piece = operation.data[start - operation.offset : stop - operation.offset]
                    content = content[:start] + piece + content[stop:]
                start = stop
        return content


def _rename_in(entries: dict[str, int], names: Mapping[str, int | None]) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _disks(recording: Recording) -> Iterator[_Disk]:
    """The disk before each operation and after the last; always the same object."""
    disk = _Disk(recording.base)
    yield disk
    for position, operation in enumerate(recording.operations):
        disk.apply(position, operation)
        yield disk
