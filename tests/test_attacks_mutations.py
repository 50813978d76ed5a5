"""The mutations: each safety in the source is found, taken away alone, and missed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckpt_hooks
from attacks.mutations import EFFECTS, TESTS, Mutation, all_mutations, copy_repository, mutations_of, try_mutation

PACKAGE = Path(ckpt_hooks.__file__).parent
TESTS_FOLDER = Path(__file__).parent

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


def test_the_tests_that_are_to_notice_exist() -> None:
    """The table names modules and test files that there are."""
    assert not [module for module in TESTS if not (PACKAGE / module).exists()]
    later = {"attacks_power_loss"}
    names = {name for tests in TESTS.values() for name in tests} - later
    assert not [name for name in names if not (TESTS_FOLDER / f"test_{name}.py").exists()]


@pytest.mark.long
@pytest.mark.parametrize("code", ["os.fsync(descriptor)", "os.rename(path, doomed)", "if found != saved: raise"])
def test_a_removed_safety_is_missed(tmp_path: Path, code: str) -> None:
    """A test fails without it, and the copy is as it was afterwards."""
    mutation = find(code)
    copy_repository(tmp_path)
    path = tmp_path / "ckpt_hooks" / mutation.module
    before = path.read_bytes()
    assert try_mutation(mutation, tmp_path).startswith("tests/test_")
    assert path.read_bytes() == before


def find(code: str) -> Mutation:
    return next(mutation for mutation in all_mutations(PACKAGE) if mutation.code.startswith(code))
