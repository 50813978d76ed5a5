"""Takes away each safety of the library in turn, and sees whether a test notices.

    python -m attacks.mutations                            # every mutation
    python -m attacks.mutations --list                     # what would be tried
    python -m attacks.mutations --only=commit.py --sample=10 --seed=1

Works on a copy of the repository. A mutation removes one thing, found in the syntax tree: a call that syncs, renames,
locks, waits or checks; a check whose answer becomes "all is well"; or an `if` that raises. The tests run once to see
which of them passes through which line, so that no module can be forgotten (`--passages` keeps that in a folder). Then,
for each mutation, those that pass there run until the first that fails; the one that noticed it in an earlier run goes
first, if it stands in what that run printed (`--known`). One that survives is a safety that nobody would miss: exit
code 1; but for those in `EQUIVALENT`, whose absence nobody could tell, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from attacks.forked import run_forked
from attacks.passages import Passage, Passages, read_passages, through
from attacks.trials import REPOSITORY, TEST_SECS, Copy, import_what_tests_need, record

__all__ = ["KNOWN", "Judge", "Mutation", "all_mutations", "mutations_of", "read_known"]

PACKAGE = "ckpt_hooks"
KNOWN = REPOSITORY / "docs" / "safeties.md"
_FEW = 30  # tests that run first, so that others need not even be imported
_PATIENCE_SECS = 150.0  # of tests for one mutation, by what they took when they were recorded
_QUICK_SECS, _SLOWER = 30.0, 10.0  # a test that took a second does not end if it takes 40
_SEES_SYNCS = re.compile("test_commit_order|test_attacks_power_loss")

# Calls without whose effect a crash, a power cut, a second writer or damage would do harm.
EFFECTS = frozenset(
    {
        *("fsync", "fdatasync", "sync_file", "sync_directory", "sync_tree", "run_parallel", "flock"),
        *("rename", "publish", "move_aside", "move_to_replaced", "remove_tree", "rmtree", "unlink", "discard"),
        *("barrier", "_barrier", "wait_until_finished", "wait", "lock", "release", "_release"),
        *(
            "check",
            "check_piece",
            "_check_pieces",
            "match",
            "check_destination",
            "check_step",
            "check_recorded",
            "check_custom_metadata",
        ),
        *("require_free_bytes", "require_finalized", "seal", "_write_marker", "make_way", "reject", "callback"),
    }
)
# Calls whose answer is taken for granted, and what that answer then is.
ANSWERS = {
    "is_committed": "True",
    "is_temporary": "False",
    "is_incomplete": "False",
    "_is_dead": "True",
    "_take_back": "False",
    "_exchange": "False",
    "is_gone": "False",
    "is_in_place": "True",
    "is_same": "True",
    "remove_dead_temporaries": "[]",
    "of_checkpoint": "None",
    "DirectoryLock": "__import__('types').SimpleNamespace(release=lambda: None)",
}
DURABILITY = frozenset({"fsync", "fdatasync", "sync_file", "sync_directory", "sync_tree"})
# `if ...: raise` in these files; elsewhere a guard protects an argument and not a checkpoint.
GUARDED = re.compile(
    r"storage/(?!foreign)|temporary_paths|checkpointer|manager|run|restoring|reading|loading|matching|threads|committed"
)


# {mutation: why nobody could tell that it is gone}
EQUIVALENT: dict[str, str] = {
    "run.py RunDirectory._replace_files: commit.sync_directory(path) -> pass": (
        "the metadata, which are replaced next, sync the same directory; until then the checksums accept either"
    ),
    "run.py RunDirectory.unlock: self.writer_lock.release() -> pass": "the lock is forgotten next, which releases it",
    "storage/commit.py _take_back: sync_directory(os.path.dirname(final)) -> pass": (
        "what a power cut undoes is done again at the next start"
    ),
}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One safety that is removed.

    Attributes:
      module: the file, relative to the package.
      place: the function it is in.
      code: what is removed, in one line.
      new: what stands there instead.
      start, end: where the old code is, in bytes.
      lines: where it is, in lines.
      at_work: the line that is reached where it makes a difference: of a guard, the one that raises.
      is_durable: whether only a power cut would show it.
    """

    module: str
    place: str
    code: str
    new: str
    start: int
    end: int
    lines: range
    at_work: int
    is_durable: bool = False

    def applied_to(self, source: bytes) -> bytes:
        """The source without that safety."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.module} {self.place}: {self.code} -> {self.new}"

    @property
    def row(self) -> str:
        """How a table begins its row."""
        code = self.code.replace("|", "\\|")
        return f"| {self.module} `{self.place}` | `{code}`"


def mutations_of(module: str, source: str) -> list[Mutation]:
    """Every mutation of a module.

    >>> source = "def save(path):\\n    if not path:\\n        raise ValueError\\n    sync_file(path)\\n"
    >>> for mutation in mutations_of("run.py", source):
    ...     print(mutation)
    run.py save: if not path: raise ValueError -> pass
    run.py save: sync_file(path) -> pass
    """
    return list(_Finder(module, source).find())


class _Finder:
    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source.encode()
        self._tree = ast.parse(source)
        self._line_starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def find(self) -> Iterator[Mutation]:
        yield from self._walk(self._tree, "module")

    def _walk(self, node: ast.AST, place: str) -> Iterator[Mutation]:
        for child in ast.iter_child_nodes(node):
            inside = place
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = child.name if place == "module" else f"{place}.{child.name}"
            yield from self._mutations_at(child, inside)
            yield from self._walk(child, inside)

    def _mutations_at(self, node: ast.AST, place: str) -> Iterator[Mutation]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = _called(node.value)
            if name in EFFECTS:
                yield self._mutation(node, place, "pass", is_durable=name in DURABILITY)
        if isinstance(node, ast.Call) and _called(node) in ANSWERS:
            yield self._mutation(node, place, ANSWERS[_called(node)])
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and GUARDED.match(self._module):
            # What follows an `elif` or `else` stays what it is.
            new = "pass" if not node.orelse else None
            if new is None:
                shown = f"if {ast.unparse(node.test)}: raise"
                yield self._mutation(node.test, place, "False", shown=shown, at_work=node.body[-1].lineno)
            else:
                yield self._mutation(node, place, new, at_work=node.body[-1].lineno)

    def _mutation(
        self,
        node: ast.expr | ast.stmt,
        place: str,
        new: str,
        *,
        is_durable: bool = False,
        shown: str = "",
        at_work: int | None = None,
    ) -> Mutation:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        if self._source[start:end].startswith(b"elif"):
            new = "elif False: pass"
        lines = range(node.lineno, node.end_lineno + 1)
        code = re.sub(r"\s+", " ", shown or ast.unparse(node))
        return Mutation(self._module, place, code[:90], new, start, end, lines, at_work or node.lineno, is_durable)


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


# ------------------------------------------------------------------ trying


def all_mutations(package: Path) -> list[Mutation]:
    """Every mutation of every module, but of the testing tools."""
    found: list[Mutation] = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).as_posix()
        if not module.startswith("testing") and module != "cli.py":
            found += mutations_of(module, path.read_text())
    return found


class Judge:
    """Which test notices that a safety is gone: of those that pass there, the quickest first.

    Args:
      copy: where it is removed.
      passages: which test passes through which line of that copy.
      known: {row of a mutation: the test that noticed it in an earlier run}, which is asked before all others.
    """

    def __init__(self, copy: Copy, passages: Passages, known: Mapping[str, str] | None = None) -> None:
        self._copy = copy
        self._passages = passages
        self._known = known or {}
        self._noticed = set[tuple[str, str]]()  # (module, file of tests)

    def killer(self, mutation: Mutation) -> str:
        """The test that fails without it; "" if none does."""
        source = (self._copy.folder / PACKAGE / mutation.module).read_bytes()
        tests = self._tests(mutation)
        few = [passage for passage in tests if passage.test == self._known.get(mutation.row)]
        with self._copy.changed(mutation.module, mutation.applied_to(source)):
            for batch in (few, tests[:_FEW], tests[_FEW:]):
                failed = self._first_failure(batch) if batch else ""
                if failed:
                    self._noticed.add((mutation.module, _file_of(failed)))
                    return failed
        return ""

    def _first_failure(self, batch: Passages) -> str:
        slowest_secs = max(passage.alone_secs for passage in batch)
        return self._copy.first_failure(
            [passage.test for passage in batch],
            test_secs=min(TEST_SECS, _QUICK_SECS + _SLOWER * slowest_secs),  # without a safety, some wait for ever
        )

    def _tests(self, mutation: Mutation) -> Passages:
        passing = through(self._passages, mutation.module, mutation.lines, mutation.at_work)
        # What a lost sync does, only a lost power shows; and who noticed one loss in a module may notice the next.
        passing.sort(key=lambda passage: not self._is_promising(mutation, passage))  # and the quicker ones first
        left_secs = _PATIENCE_SECS
        chosen: Passages = []
        begun = set()  # files whose fixtures have been paid for
        for passage in passing:
            file = _file_of(passage.test)
            took_secs = passage.took_secs + (0 if file in begun else passage.shared_secs)
            if took_secs < left_secs:
                left_secs -= took_secs
                begun.add(file)
                chosen.append(passage)
        return chosen

    def _is_promising(self, mutation: Mutation, passage: Passage) -> bool:
        if mutation.is_durable:
            return bool(_SEES_SYNCS.search(passage.test))
        return passage.alone_secs < 1 and (mutation.module, _file_of(passage.test)) in self._noticed


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def read_known(path: Path) -> dict[str, str]:
    """{row of a mutation: the test that noticed it}, from what an earlier run has printed."""
    rows = (line.rpartition(" | ") for line in path.read_text().splitlines() if "` | `" in line)
    return {row: told.removesuffix(" |").partition(" (")[0] for row, _, told in rows}


# ------------------------------------------------------------------ reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    parser.add_argument("--only", default="", help="only mutations with this text in their line")
    parser.add_argument("--sample", type=int, help="only so many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side (default: one a processor)")
    parser.add_argument("--passages", type=Path, help="where to keep, or find, which test passes through which line")
    parser.add_argument("--known", type=Path, default=KNOWN, help="what an earlier run has printed (%(default)s)")
    args = parser.parse_args()
    mutations = [mutation for mutation in all_mutations(REPOSITORY / PACKAGE) if args.only in str(mutation)]
    if args.sample is not None and args.sample < len(mutations):
        chosen = set(random.Random(args.seed).sample(range(len(mutations)), args.sample))
        mutations = [mutation for number, mutation in enumerate(mutations) if number in chosen]
    if args.list:
        print(*mutations, sep="\n")
        print(f"{len(mutations)} mutations")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        passages = _passages(args.passages, Path(folder), args.jobs)
        print("| place | removed | killed by |\n| --- | --- | --- |", flush=True)
        import_what_tests_need()
        begin_secs = time.monotonic()
        shares = [mutations[number :: args.jobs] for number in range(min(args.jobs, len(mutations)))]
        known = read_known(args.known)
        tasks = [functools.partial(_try_all, share, passages, known) for share in shares]
        verdicts = sum(run_forked(tasks), Counter[str]())
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    print(f"\n{len(mutations)} mutations in {time.monotonic() - begin_secs:.0f} s: {told}")
    return int(any(verdict.startswith("SURVIVED") for verdict in verdicts))


def _passages(kept: Path | None, scratch: Path, jobs: int) -> Passages:
    """Those that are kept there, or recorded now, which takes as long as the tests."""
    if kept is None:
        return record(scratch, jobs)
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix="recorded-", dir=scratch) as folder:
            record(Path(folder), jobs)
            shutil.copytree(Path(folder) / "passages", kept)
    return read_passages(kept)


def _try_all(mutations: list[Mutation], passages: Passages, known: Mapping[str, str]) -> Counter[str]:
    """How many had which verdict; prints a line for each."""
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutated-", ignore_cleanup_errors=True) as folder:
        copy = Copy(Path(folder))
        judge = Judge(copy, passages, known)
        asked = {known.get(mutation.row) for mutation in mutations} | {passage.test for passage in passages[:_FEW]}
        broken = copy.first_failure([passage.test for passage in passages if passage.test in asked])
        if broken:
            raise RuntimeError(f"{broken} fails though nothing has been removed")
        for mutation in mutations:
            reason = EQUIVALENT.get(str(mutation), "")
            killer = "" if reason else judge.killer(mutation)
            survived = "SURVIVED (durability)" if mutation.is_durable else "SURVIVED"
            verdict = "equivalent" if reason else "killed" if killer else survived
            verdicts[verdict] += 1
            told = killer or (f"equivalent: {reason}" if reason else survived)
            print(f"{mutation.row} | {told} |", flush=True)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
