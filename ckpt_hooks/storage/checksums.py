"""Checksums: what every byte of a checkpoint was when it was saved.

Two plain files, both XXH3-64, neither of which another reader of the format looks at:

``_ARRAY_CHECKSUMS``, in a pytree item, covers the data files, piece by piece (a piece is a run of small chunks, or a
part of a large one or of a node of the index), so that a restore checks only what it reads::

    one line of JSON   {"format": 1, "files": [["d/<name>", number of pieces, size of the file], ...]}
    then per piece     uint64 offset | uint64 length | uint64 XXH3-64        (little-endian, file by file)
    last 8 bytes       uint64 XXH3-64 of everything before

Where several processes write an item, each writes the table of its own data file: process 0 the one above, whose
line has a field more, ``"tables": <number of processes>``, and process 3 ``_ARRAY_CHECKSUMS.3``, with the places of its
chunks behind the pieces where they are compressed. Process 0 reads nothing else of the others. Where each process
stores its own part by itself, the line says whose it is: ``"part_of_process": 3``.

``_CHECKSUMS``, in the checkpoint's own directory, covers every other file of the checkpoint, the items'
``_ARRAY_CHECKSUMS`` among them, so that an item swapped in from another step does not pass. It is text, in the
manner of ``sha256sum``; a file that `record_metrics` is about to replace stands there twice, old and new, so
that a crash between the two leaves a checkpoint that still verifies::

    ckpt_hooks checksums 1
    <16 hex digits of XXH3-64> <size> <path relative to this directory>
    ...
    <16 hex digits of XXH3-64 of all lines before>
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from ckpt_hooks.errors import CorruptCheckpointError
from ckpt_hooks.storage.commit import COMMIT_MARKER
from ckpt_hooks.storage.lookup import blocks_of, content_of, is_directory, is_file, is_there, read_file, walk
from ckpt_hooks.storage.per_process import ARRAY_FILE, DATA_FOLDER, array_file, is_for_another

__all__ = [
    "ARRAY_FILE",
    "DATA_FOLDER",
    "FILE",
    "ArrayChecksums",
    "FileChecksums",
    "ItemChecksums",
    "PieceTable",
    "digest",
]

FILE = "_CHECKSUMS"
PIECE = np.dtype([("offset", "<u8"), ("nbytes", "<u8"), ("digest", "<u8")])
_TITLE = "ckpt_hooks checksums 1"

Pieces = npt.NDArray[np.void]
Digest = tuple[str, int]  # 16 hex digits, size in bytes

digest = xxhash.xxh3_64_intdigest


# ------------------------------------------------------------------ array checksums


@dataclasses.dataclass(frozen=True)
class ArrayChecksums:
    """One table: {path of a data file: (its pieces, size of the file)}, and how many tables the item has."""

    files: Mapping[str, tuple[Pieces, int]]
    num_tables: int = 1
    part_of_process: int | None = None  # whose part of a state the item is; None where it is a whole one
    places: bytes = b""  # of compressed chunks

    def encode(self) -> bytes:
        """The file ``_ARRAY_CHECKSUMS``."""
        table = [[path, len(pieces), nbytes] for path, (pieces, nbytes) in self.files.items()]
        fields = {"format": 1, "files": table} | ({"tables": self.num_tables} if self.num_tables > 1 else {})
        fields |= {} if self.part_of_process is None else {"part_of_process": self.part_of_process}
        head = json.dumps(fields).encode() + b"\n"
        body = head + b"".join(pieces.tobytes() for pieces, _ in self.files.values()) + self.places
        return body + struct.pack("<Q", digest(body))

    @classmethod
    def decode(cls, encoded: bytes, path: str = ARRAY_FILE) -> ArrayChecksums:
        """Raises CorruptCheckpointError when the file does not verify itself."""
        body, seal = encoded[:-8], encoded[-8:]
        if len(seal) < 8 or struct.unpack("<Q", seal)[0] != digest(body):
            raise CorruptCheckpointError(f"{path} fails its own checksum")
        head, _, rest = body.partition(b"\n")
        files = {}
        fields = json.loads(head)
        for name, num, nbytes in fields["files"]:
            pieces, rest = np.frombuffer(rest[: num * PIECE.itemsize], PIECE), rest[num * PIECE.itemsize :]
            files[name] = (pieces, nbytes)
        return cls(files, fields.get("tables", 1), fields.get("part_of_process"), rest)

    @classmethod
    def read(cls, directory: str, process: int = 0) -> ArrayChecksums:
        """The table of one of the processes that wrote an item.

        Raises CorruptCheckpointError where it is missing or does not verify itself.
        """
        path = os.path.join(directory, array_file(process))
        return cls.decode(read_file(path), path)

    def problems(self, directory: str) -> Iterator[str]:
        """Reads every data file and names each piece that is not what was saved."""
        for name, (pieces, nbytes) in self.files.items():
            path = os.path.join(directory, name)
            found_nbytes = os.path.getsize(path) if is_file(path) else None
            if found_nbytes != nbytes:
                yield f"{path}: {_size(found_nbytes)}, saved with {nbytes} bytes"
                continue
            with open(path, "rb", buffering=0) as file:
                for offset, length, saved in pieces.tolist():
                    if digest(os.pread(file.fileno(), length, offset)) != saved:
                        yield f"{path}: bytes {offset} to {offset + length} are not what was saved"


class ItemChecksums:
    """The pieces of the data files of an item; the table of a process is read when its data file is needed.

    Raises CorruptCheckpointError where a table is missing, or is not what was saved.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        first = ArrayChecksums.read(directory)
        self._files = dict(first.files)
        self._num_tables, self.part_of_process = first.num_tables, first.part_of_process
        self._checkpoint: FileChecksums | None = None

    def pieces(self, file: str) -> PieceTable:
        """Those of a data file."""
        if file not in self._files:
            self._files.update(self._of_other(file).files)
        if file not in self._files:
            raise CorruptCheckpointError(f"{self._directory}: the index refers to {file!r}, which no table knows")
        return PieceTable(self._files[file][0])

    def _of_other(self, file: str) -> ArrayChecksums:
        folder, _, name = file.rpartition("/")
        process = int(name, 16) if folder == DATA_FOLDER and _is_hex(name) else 0
        if not 0 < process < self._num_tables:
            return ArrayChecksums({})
        if self._checkpoint is None:
            self._checkpoint = FileChecksums.of_item(self._directory)
        self._checkpoint.check_file(self._directory, array_file(process))
        return ArrayChecksums.read(self._directory, process)


def _is_hex(text: str) -> bool:
    return bool(text) and set(text) <= set("0123456789abcdef")


class PieceTable:
    """The pieces of one data file in columns, in the order of their offsets.

    Attributes:
      starts, ends: where each piece lies.
      digests: what each one was.
      end: where the last one ends.
    """

    def __init__(self, pieces: Pieces) -> None:
        rows: list[tuple[int, int, int]] = pieces.tolist()
        self.starts = [offset for offset, _, _ in rows]
        self.ends = [offset + nbytes for offset, nbytes, _ in rows]
        self.digests = [saved for _, _, saved in rows]
        self.end = self.ends[-1] if rows else 0

    def covering(self, offset: int, end: int, path: str) -> range:
        """The pieces that a range of the file lies in; an error where they leave a hole in it."""
        first = bisect.bisect_right(self.starts, offset) - 1
        last = bisect.bisect_left(self.starts, end) - 1
        covered = 0 <= first <= last and end <= self.ends[last]
        if not covered or any(self.ends[number] != self.starts[number + 1] for number in range(first, last)):
            raise CorruptCheckpointError(f"{path}: no checksum covers the bytes from {offset} to {end}")
        return range(first, last + 1)

    def nbytes(self, pieces: range) -> int:
        """The length of neighbouring pieces."""
        return self.ends[pieces.stop - 1] - self.starts[pieces.start] if pieces else 0

    def runs(self, pieces: range, nbytes: int) -> Iterator[range]:
        """Neighbouring pieces, as many at a time as have no more than so many bytes, but at least one."""
        begin = pieces.start
        for number in pieces:
            if number > begin and self.ends[number] - self.starts[begin] > nbytes:
                yield range(begin, number)
                begin = number
        if pieces:
            yield range(begin, pieces.stop)


def check_piece(path: str, offset: int, data: memoryview, saved: int) -> None:
    """Raises CorruptCheckpointError unless `data` is what was saved at `offset` of a data file."""
    found = digest(data)
    if found != saved:
        where = f"{path}: bytes {offset} to {offset + len(data)} are not what was saved"
        raise CorruptCheckpointError(f"{where}: checksum {found:016x}, saved as {saved:016x}")


# ------------------------------------------------------------------ file checksums


@dataclasses.dataclass(frozen=True)
class FileChecksums:
    """The accepted checksums of each file of a checkpoint: {path: ((digest, size), ...)}."""

    files: Mapping[str, tuple[Digest, ...]]

    @classmethod
    def of_directory(cls, directory: str) -> FileChecksums:
        """Reads and sums every file below `directory` that no ``_ARRAY_CHECKSUMS`` covers."""
        files: dict[str, tuple[Digest, ...]] = {}
        for folder, folders, names in walk(directory):
            if ARRAY_FILE in names:
                folders.remove(DATA_FOLDER)  # the array table covers its files; walk() does not go there now
            here = folder[len(directory) + 1 :]
            for name in names:
                path = f"{here}/{name}" if here else name
                # What a commit marker says is nowhere trusted, so a damaged one does no harm.
                if path != FILE and name != COMMIT_MARKER:
                    files[path] = (_digest_of(blocks_of(f"{directory}/{path}")),)
        return cls(files)

    @classmethod
    def read(cls, directory: str) -> FileChecksums | None:
        """The file in `directory`; None where there is none (somebody else's checkpoint).

        Raises CorruptCheckpointError when it does not verify itself.
        """
        path = os.path.join(directory, FILE)
        try:
            return cls.decode(content_of(path), path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def of_checkpoint(cls, directory: str, metadata_file: str) -> FileChecksums | None:
        """`read`, where a checkpoint of ours that has lost the file does not pass for somebody else's.

        Ours is told by an array table in an item, or beside the step metadata; an item that is read by itself
        has neither.
        """
        checksums = cls.read(directory)
        if checksums is None and is_directory(directory):
            with os.scandir(directory) as entries:
                folders = [entry.path for entry in entries if entry.is_dir()]
            if is_there(os.path.join(directory, metadata_file)):
                folders.append(directory)
            if any(is_there(os.path.join(folder, ARRAY_FILE)) for folder in folders):
                raise CorruptCheckpointError(f"{os.path.join(directory, FILE)} is missing")
        return checksums

    @classmethod
    def of_item(cls, directory: str) -> FileChecksums:
        """Those of the files in an item's directory, by their names there; none where it is no part of a checkpoint."""
        alone = cls.read(directory)
        if alone is not None:
            return alone
        parent, name = os.path.split(directory)
        checkpoint = cls.read(parent) or cls({})
        prefix = f"{name}/"
        return cls({p.removeprefix(prefix): known for p, known in checkpoint.files.items() if p.startswith(prefix)})

    def encode(self) -> bytes:
        """The file ``_CHECKSUMS``."""
        rows = [
            f"{hexdigest} {nbytes} {json.dumps(path)}\n"
            for path, accepted in sorted(self.files.items())
            for hexdigest, nbytes in accepted
        ]
        body = "".join((f"{_TITLE}\n", *rows)).encode()
        return body + f"{digest(body):016x}\n".encode()

    @classmethod
    def decode(cls, encoded: bytes, path: str = FILE) -> FileChecksums:
        """Raises CorruptCheckpointError when the file does not verify itself."""
        body, seal = encoded[:-17], encoded[-17:]
        if seal != f"{digest(body):016x}\n".encode() or not body.startswith(_TITLE.encode()):
            raise CorruptCheckpointError(f"{path} fails its own checksum")
        files: dict[str, tuple[Digest, ...]] = {}
        for row in body.decode().splitlines()[1:]:
            hexdigest, nbytes, quoted = row.split(" ", 2)
            name = json.loads(quoted) if "\\" in quoted else quoted[1:-1]
            files[name] = (*files.get(name, ()), (hexdigest, int(nbytes)))
        return cls(files)

    def accepting(self, changed: Mapping[str, bytes]) -> FileChecksums:
        """These checksums, with the new content of some files accepted beside the old one."""
        # A file that is new is in none of the two until it is there: a listed file that is missing is damage.
        known = {path: data for path, data in changed.items() if path in self.files}
        added = {path: (*self.files[path], _digest_of([data])) for path, data in known.items()}
        return FileChecksums({**self.files, **added})

    def replacing(self, changed: Mapping[str, bytes]) -> FileChecksums:
        """These checksums, with the new content of some files accepted instead of the old one."""
        return FileChecksums({**self.files, **{path: (_digest_of([d]),) for path, d in changed.items()}})

    def items(self) -> set[str]:
        """The names of the sub-directories that hold a covered file."""
        return {path.split("/", 1)[0] for path in self.files if "/" in path}

    def problems(self, directory: str, below: str | None = None) -> Iterator[str]:
        """Names each covered file that is missing or not what was saved.

        `below` limits it to one item, ``""`` to the checkpoint's own plain files.
        """
        for path, accepted in self.files.items():
            item = path.split("/", 1)[0] if "/" in path else ""
            if below is not None and item != below:
                continue
            problem = _problem(f"{directory}/{path}", accepted)
            if problem:
                yield problem

    def check(self, directory: str, below: str | None = None) -> None:
        """Checks what a restore by this process reads in any case.

        Raises CorruptCheckpointError that lists every problem.
        """
        common = {path: accepted for path, accepted in self.files.items() if not is_for_another(path)}
        problems = list(FileChecksums(common).problems(directory, below))
        if problems:
            raise CorruptCheckpointError("; ".join(problems))

    def check_file(self, directory: str, path: str) -> None:
        """Raises CorruptCheckpointError where a file that is covered is not what was saved."""
        problem = _problem(os.path.join(directory, path), self.files[path]) if path in self.files else None
        if problem:
            raise CorruptCheckpointError(problem)


def array_problems(directory: str) -> Iterator[str]:
    """Reads every data file below `directory` and names each piece that is not what was saved."""
    for folder, _, names in walk(directory) if is_directory(directory) else ():  # it may be one file of Flax's
        if ARRAY_FILE in names:
            try:
                for process in range(ArrayChecksums.read(folder).num_tables):
                    yield from ArrayChecksums.read(folder, process).problems(folder)
            except CorruptCheckpointError as error:
                yield f"{folder}: {error}"


def _problem(path: str, accepted: Sequence[Digest]) -> str | None:
    try:
        found = _digest_of(blocks_of(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        found = None
    if found in accepted:
        return None
    if found is None or found[1] not in [nbytes for _, nbytes in accepted]:
        return f"{path}: {_size(found and found[1])}, saved with {accepted[-1][1]} bytes"
    return f"{path}: checksum {found[0]}, saved as {accepted[-1][0]}"


def _size(nbytes: int | None) -> str:
    return "missing" if nbytes is None else f"{nbytes} bytes"


def _digest_of(blocks: Iterable[bytes]) -> Digest:
    state, nbytes = xxhash.xxh3_64(), 0
    for block in blocks:
        state.update(block)
        nbytes += len(block)
    return f"{state.intdigest():016x}", nbytes
