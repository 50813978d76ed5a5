"""The mutations: each safety in the source is found, taken away alone, and missed by a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import ckpt_hooks
from attacks.mutations import EFFECTS, EQUIVALENT, KNOWN, Judge, Mutation, all_mutations, mutations_of, read_known
from attacks.passages import Passage, Passages, through
from attacks.trials import Copy, record

PACKAGE = Path(ckpt_hooks.__file__).parent

SOURCE = """
class Reader:
    def read(self, path):
        if not is_committed(path):
            raise ValueError("é")
        elif self.broken:
            raise ValueError("it is broken")
        sync_file(path); os.rename(path, "new")
        lock = commit.DirectoryLock(path)
        return [
            checks.of_checkpoint(
                path
            )
        ]
"""
FOUND = {
    "run.py Reader.read: if not is_committed(path): raise -> False": "if False:",
    "run.py Reader.read: is_committed(path) -> True": "if not True:",
    "run.py Reader.read: if self.broken: raise ValueError('it is broken') -> elif False: pass": "elif False: pass\n",
    "run.py Reader.read: sync_file(path) -> pass": "pass; os.rename(",
    "run.py Reader.read: os.rename(path, 'new') -> pass": "sync_file(path); pass\n",
    "run.py Reader.read: commit.DirectoryLock(path) -> __import__('types').SimpleNamespace(release=lambda: None)": (
        "lock = __import__('types').SimpleNamespace(release=lambda: None)\n"
    ),
    "run.py Reader.read: checks.of_checkpoint(path) -> None": "return [\n            None\n        ]",
}


def test_every_kind_of_safety_is_found_in_the_syntax_tree() -> None:
    """Effects, answers and guards are found wherever they stand, and nothing else is."""
    assert [str(mutation) for mutation in mutations_of("run.py", SOURCE)] == list(FOUND)


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_a_mutation_changes_one_thing(number: int) -> None:
    """What is removed is gone, what stands around it is as it was, and Python reads the rest."""
    mutation = mutations_of("run.py", SOURCE)[number]
    changed = mutation.applied_to(SOURCE.encode()).decode()
    assert FOUND[str(mutation)] in changed
    rest = changed.replace(mutation.new, "", 1)
    assert len(rest.encode()) == len(SOURCE.encode()) - (mutation.end - mutation.start)
    compile(changed, "mutated", "exec")


def test_every_mutation_of_the_library_can_be_compiled() -> None:
    """Not one of them fails for its syntax, which any test would notice."""
    for mutation in all_mutations(PACKAGE):
        compile(mutation.applied_to((PACKAGE / mutation.module).read_bytes()), str(mutation), "exec")


def test_the_durable_commit_is_among_what_is_mutated() -> None:
    """The syncs, renames and locks of the library are found."""
    removed = {mutation.code.split("(")[0].rpartition(".")[2] for mutation in all_mutations(PACKAGE)}
    assert {"fsync", "sync_file", "sync_directory", "rename", "DirectoryLock", "flock", "check_piece"} <= removed
    assert removed & EFFECTS


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Passages:
    """Which test of the order of a commit passes through which line, in the processes that they start too."""
    return record(tmp_path_factory.mktemp("recorded"), 1, ["tests/test_commit_order.py", "tests/test_listing.py"])


def test_who_passes_there_is_asked_and_nobody_else(recorded: Passages) -> None:
    """The tests for a mutation are found by the lines that they pass through, in any module, the most telling first."""
    mutation = find("os.fsync(descriptor)")
    passing = through(recorded, mutation.module, mutation.lines, mutation.at_work)
    assert {passage.test for passage in passing} < {passage.test for passage in recorded}
    assert "tests/test_commit_order.py::test_an_asynchronous_save_too" in {passage.test for passage in passing}
    assert not through(recorded, mutation.module, range(100_000, 100_001), 100_000)


@pytest.mark.parametrize("code", ["os.fsync(descriptor)", "sync_directory(os.path.dirname(final))"])
def test_a_removed_safety_is_missed(tmp_path: Path, recorded: Passages, code: str) -> None:
    """A test fails without it, and the copy is as it was afterwards."""
    mutation = find(code)
    copy = Copy(tmp_path)
    path = tmp_path / "ckpt_hooks" / mutation.module
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert Judge(copy, recorded).killer(mutation).startswith("tests/test_commit_order.py::")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_safety_that_nobody_misses_survives(tmp_path: Path, recorded: Passages) -> None:
    """Where every test passes, none is named."""
    source = (PACKAGE / "listing.py").read_bytes()
    lines = range(1, source.count(b"\n"))
    nothing = Mutation("listing.py", "module", "", "# nothing\n", len(source), len(source), lines, 1)
    assert Judge(Copy(tmp_path), recorded).killer(nothing) == ""


def test_who_noticed_in_an_earlier_run_is_asked_first(tmp_path: Path) -> None:
    """What that run printed names the test, though quicker ones pass there too; the others are asked as well."""
    mutation = find("os.fsync(descriptor)")
    at = frozenset((mutation.module, line) for line in mutation.lines)
    passages = [Passage(f"tests/test_a.py::test_{number}", number, 0, at) for number in range(60)]
    told = tmp_path / "told"
    told.write_text(f"| place | removed | killed by |\n{mutation.row} | tests/test_a.py::test_9 (does not end) |\n")
    asked: list[list[str]] = []

    class Asked(Copy):
        def first_failure(self, tests: Sequence[str], test_secs: float = 0) -> str:
            del test_secs
            asked.append(list(tests))
            return ""

    Judge(Asked(tmp_path / "copy"), passages, read_known(told)).killer(mutation)
    assert asked[0] == ["tests/test_a.py::test_9"]
    assert asked[1][0] == "tests/test_a.py::test_0"


def test_what_is_said_to_be_equivalent_is_there() -> None:
    """A reason is given for mutations that there are, and for no others."""
    assert set(EQUIVALENT) <= {str(mutation) for mutation in all_mutations(PACKAGE)}


def test_the_table_of_safeties_names_what_there_is() -> None:
    """Each row of docs/safeties.md is a safety of the library as it is now, and the test that it names is there."""
    known = read_known(KNOWN)
    assert known
    rows = {mutation.row for mutation in all_mutations(PACKAGE)}
    assert [row for row in known if row not in rows] == []
    for test in known.values():
        if test.startswith("equivalent"):
            continue
        file, name = test.partition("[")[0].split("::")
        assert f"def {name}(" in (KNOWN.parents[1] / file).read_text(), test


def find(code: str) -> Mutation:
    return next(mutation for mutation in all_mutations(PACKAGE) if mutation.code.startswith(code))
