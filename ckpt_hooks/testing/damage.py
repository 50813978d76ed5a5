"""Damage to files, done and undone: what a bad disk, a bad copy or a bad hand does to a checkpoint.

Each function describes one damage; nothing happens until it strikes::

    with damage.flip_bit(path, 13):  # undone at the end
        with pytest.raises(CorruptCheckpointError):
            manager.restore(step=10)

    damage.truncate(path, 100).strike()  # for good

`damages` gives every damage of a directory, one after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Self, get_args

from ckpt_hooks.storage.lookup import walk

__all__ = [
    "Damage",
    "Kind",
    "copy_over",
    "damages",
    "damages_between",
    "flip_bit",
    "move",
    "remove",
    "swap",
    "truncate",
    "zero_sector",
]

Kind = Literal["bit", "sector", "truncate", "remove", "swap", "copy", "move"]

SECTOR_BYTES = 512
_ASIDE = ".struck"  # where a damage puts what it takes away


@dataclasses.dataclass
class Damage:
    """One damage; as a context manager, it strikes at the beginning and is undone at the end.

    Attributes:
      kind: one of `Kind`.
      path: of the file or directory that is struck.
      detail: where in it, or what with.
    """

    kind: Kind
    path: str
    detail: str
    _do: Callable[[], object]
    _undo: Callable[[], object]

    def strike(self) -> None:
        """Does the damage."""
        self._do()

    def undo(self) -> None:
        """Makes all as it was; only after `strike`."""
        self._undo()

    def __enter__(self) -> Self:
        self.strike()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


# ------------------------------------------------------------------ in a file


def flip_bit(path: Any, bit: int) -> Damage:
    """Flips one bit of a file, counted from the lowest bit of the first byte.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a"
    >>> _ = path.write_bytes(b"ab")
    >>> with flip_bit(path, 8):
    ...     print(path.read_bytes())
    b'ac'
    >>> path.read_bytes()
    b'ab'
    """
    name, (position, place) = os.fspath(path), divmod(bit, 8)

    def flip() -> None:
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            (byte,) = os.pread(descriptor, 1, position)
            os.pwrite(descriptor, bytes((byte ^ (1 << place),)), position)
        finally:
            os.close(descriptor)

    return Damage("bit", name, f"bit {place} of byte {position} flipped", flip, flip)


def zero_sector(path: Any, sector: int) -> Damage:
    """Fills a sector of 512 bytes with zeros, as a lost write leaves it."""
    name, start = os.fspath(path), sector * SECTOR_BYTES
    return _rewritten(
        "sector",
        name,
        f"bytes {start} to {start + SECTOR_BYTES} zeroed",
        lambda content: content[:start] + bytes(len(content[start : start + SECTOR_BYTES])) + content[start + 512 :],
    )


def truncate(path: Any, nbytes: int) -> Damage:
    """Cuts a file off after `nbytes`."""
    return _rewritten("truncate", os.fspath(path), f"cut off after {nbytes} bytes", lambda content: content[:nbytes])


def _rewritten(kind: Kind, path: str, detail: str, change: Callable[[bytes], bytes]) -> Damage:
    before: list[bytes] = []

    def strike() -> None:
        with open(path, "rb") as file:
            before[:] = [file.read()]
        _write(path, change(before[0]))

    return Damage(kind, path, detail, strike, lambda: _write(path, before[0]))


def _write(path: str, content: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:  # in place: it stays the same file
        file.write(content)
        file.truncate(len(content))


# ------------------------------------------------------------------ of whole files and directories


def remove(path: Any) -> Damage:
    """Takes a file or a directory away."""
    name = os.fspath(path)
    # Beside its directory's directory, where no reader looks for it.
    aside = _aside(name)
    return Damage("remove", name, "removed", lambda: os.rename(name, aside), lambda: os.rename(aside, name))


def swap(one: Any, other: Any) -> Damage:
    """Exchanges two files, or two directories.

    >>> import pathlib, tempfile
    >>> a, b = (pathlib.Path(tempfile.mkdtemp()) / name for name in "ab")
    >>> _ = a.write_text("A"), b.write_text("B")
    >>> with swap(a, b):
    ...     print(a.read_text(), b.read_text())
    B A
    """
    first, second = os.fspath(one), os.fspath(other)

    def exchange() -> None:
        aside = _aside(first)
        os.rename(first, aside)
        os.rename(second, first)
        os.rename(aside, second)

    return Damage("swap", first, f"exchanged with {second}", exchange, exchange)


def copy_over(source: Any, target: Any) -> Damage:
    """Puts a copy of a file or directory in the place of another one, or where there is nothing."""
    here, there = os.fspath(source), os.fspath(target)
    aside = _aside(there)

    def strike() -> None:
        if os.path.lexists(there):
            os.rename(there, aside)
        if os.path.isdir(here):
            shutil.copytree(here, there)
        else:
            shutil.copyfile(here, there)

    def undo() -> None:
        if os.path.isdir(there):
            shutil.rmtree(there)
        else:
            os.unlink(there)
        with contextlib.suppress(FileNotFoundError):
            os.rename(aside, there)

    return Damage("copy", there, f"replaced by a copy of {here}", strike, undo)


def move(path: Any, name: str) -> Damage:
    """Gives a file or directory another name."""
    here = os.fspath(path)
    there = os.path.join(os.path.dirname(here), name)
    return Damage("move", here, f"renamed to {name}", lambda: os.rename(here, there), lambda: os.rename(there, here))


def _aside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(os.path.dirname(folder), f".{name}{_ASIDE}")


# ------------------------------------------------------------------ all of them


def damages(
    directory: Any, kinds: Iterable[Kind] = get_args(Kind), *, paths: Iterable[str] = ("*",), stride: int = 1
) -> Iterator[Damage]:
    """Every damage of the files and directories below a directory, file by file.

    Bits and lengths are gone through one by one; swaps and copies through every pair of files, and of directories
    that stand side by side. Undo each damage before the next one is asked for.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"12"), (folder / "b").write_bytes(b"3")
    >>> [each.kind for each in damages(folder, ["truncate", "remove", "swap"], paths=("a",))]
    ['truncate', 'truncate', 'remove', 'swap']

    Args:
      directory: of a checkpoint.
      kinds: which damages.
      paths: patterns (`fnmatch`) of paths below `directory`; only what matches is struck.
      stride: only each n-th bit and length.
    """
    top, wanted, patterns = os.fspath(directory), set(kinds), tuple(paths)
    files, folders = _below(top)
    struck = [path for path in files if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)]
    for path in struck:
        yield from _within(os.path.join(top, path), wanted, stride)
        yield from _with_others(top, path, [other for other in files if other != path], wanted)
    for path in (path for path in folders if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)):
        siblings = [other for other in folders if os.path.dirname(other) == os.path.dirname(path) and other != path]
        yield from _whole(os.path.join(top, path), wanted)
        yield from _with_others(top, path, siblings, wanted)


def damages_between(
    directory: Any, other: Any, kinds: Iterable[Kind] = ("swap", "copy"), *, paths: Iterable[str] = ("*",)
) -> Iterator[Damage]:
    """Exchanges of each file and directory of one checkpoint with its counterpart in another, and copies from there."""
    here, there, wanted = os.fspath(directory), os.fspath(other), set(kinds)
    common = {*itertools.chain(*_below(here))} & {*itertools.chain(*_below(there))}
    for path in sorted(common):
        if any(fnmatch.fnmatch(path, pattern) for pattern in paths):
            one, counterpart = os.path.join(here, path), os.path.join(there, path)
            if "swap" in wanted:
                yield swap(one, counterpart)
            if "copy" in wanted:
                yield copy_over(counterpart, one)


def _within(path: str, kinds: set[Kind], stride: int) -> Iterator[Damage]:
    with open(path, "rb") as file:
        content = file.read()
    if "bit" in kinds:
        yield from (flip_bit(path, bit) for bit in range(0, 8 * len(content), stride))
    if "sector" in kinds:
        for start in range(0, len(content), SECTOR_BYTES):
            if any(content[start : start + SECTOR_BYTES]):
                yield zero_sector(path, start // SECTOR_BYTES)
    if "truncate" in kinds:
        yield from (truncate(path, nbytes) for nbytes in range(0, len(content), stride))
    yield from _whole(path, kinds)


def _whole(path: str, kinds: set[Kind]) -> Iterator[Damage]:
    if "remove" in kinds:
        yield remove(path)
    if "move" in kinds:
        yield move(path, f"{os.path.basename(path)}.renamed")


def _with_others(top: str, path: str, others: Iterable[str], kinds: set[Kind]) -> Iterator[Damage]:
    for other in others:
        if "swap" in kinds and path < other:
            yield swap(os.path.join(top, path), os.path.join(top, other))
        if "copy" in kinds:
            yield copy_over(os.path.join(top, other), os.path.join(top, path))


def _below(top: str) -> tuple[list[str], list[str]]:
    """The files and the directories below a directory, relative to it."""
    files, folders = [], []
    for folder, names, file_names in walk(top):
        here = os.path.relpath(folder, top)
        prefix = "" if here == "." else f"{here}/"
        folders += [prefix + name for name in names]
        files += [prefix + name for name in file_names]
    return sorted(files), sorted(folders)
