"""Takes away each safety of the library in turn, and sees whether a test notices.

    python -m attacks.mutations                            # every mutation
    python -m attacks.mutations --list                     # what would be tried
    python -m attacks.mutations --only=commit.py --sample=10 --seed=1

Works on a copy of the repository. A mutation removes one thing, found in the syntax tree: a call that syncs, renames,
locks, waits or checks; a check whose answer becomes "all is well"; or an `if` that raises. Then the tests of that
module run until the first that fails. One that survives is a safety that nobody would miss: exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Mutation", "mutations_of", "try_mutation"]

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "ckpt_hooks"
COPIED = ("ckpt_hooks", "tests", "attacks", "benchmarks", "examples", "configs", "docs")
COPIED_FILES = ("pyproject.toml", "README.md", "ARCHITECTURE.md", "CHANGELOG.md")
TIMEOUT_SECS = 300

# Calls without whose effect a crash, a power cut, a second writer or damage would do harm.
EFFECTS = frozenset(
    {
        *("fsync", "fdatasync", "sync_file", "sync_directory", "sync_tree", "run_parallel", "flock"),
        *("rename", "publish", "move_aside", "move_to_replaced", "remove_tree", "rmtree", "unlink", "discard"),
        *("barrier", "_barrier", "wait_until_finished", "wait", "lock", "release", "_release"),
        *(
            "check",
            "check_piece",
            "match",
            "check_destination",
            "check_step",
            "check_recorded",
            "check_custom_metadata",
        ),
        *("require_free_bytes", "require_finalized", "_seal", "_write_marker", "make_way", "reject", "callback"),
    }
)
# Calls whose answer is taken for granted, and what that answer then is.
ANSWERS = {
    "is_committed": "True",
    "is_temporary": "False",
    "_is_incomplete": "False",
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
GUARDED = re.compile(r"storage/(?!foreign)|temporary_paths|checkpointer|manager|run|restoring|reading|loading|matching")

# {module: the tests that are about it, the likeliest first}; the rest of the list is tried for every module.
TESTS = {
    "storage/commit.py": [
        "storage",
        "commit_order",
        "temporary_paths",
        "checkpointer",
        "attacks_power_loss",
        "bad_input",
    ],
    "storage/checksums.py": ["storage", "bad_input", "manager", "where_orbax_fails"],
    "storage/reader.py": ["storage", "bad_input"],
    "storage/writer.py": ["storage", "bad_input", "checkpointer"],
    "storage/ocdbt.py": ["storage", "orbax_reads_ours", "we_read_orbax"],
    "storage/layout.py": ["storage"],
    "temporary_paths.py": [
        "temporary_paths",
        "commit_order",
        "checkpointer",
        "reading_while_written",
        "attacks_power_loss",
    ],
    "checkpointer.py": ["checkpointer", "async_checkpointer", "temporary_paths", "hook"],
    "manager.py": ["manager", "readers_of_a_run", "retention", "hook", "commit_order"],
    "run.py": ["manager", "readers_of_a_run", "commit_order", "bad_input"],
    "restoring.py": ["reading_while_written", "manager", "train_state", "bad_input", "we_read_orbax"],
    "reading.py": ["reading_while_written", "safeties", "checkpointer", "bad_input"],
    "metadata.py": ["metadata", "async_checkpointer"],
    "matching.py": ["train_state"],
    "loading.py": ["train_state", "storage", "bad_input", "we_read_orbax"],
    "leaves.py": ["train_state", "zoo"],
    "tree.py": ["train_state", "zoo"],
    "handlers/composite.py": ["composite", "bad_input"],
    "handlers/pytree.py": ["train_state", "async_checkpointer", "storage"],
    "hook.py": ["hook", "preemption"],
    "processes.py": ["checkpointer"],
}
FOR_ALL = ["safeties", "manager", "attacks_histories", "attacks_machine"]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One safety that is removed.

    Attributes:
      module: the file, relative to the package.
      place: the function it is in.
      code: what is removed, in one line.
      new: what stands there instead.
      start, end: where the old code is, in bytes.
      is_durable: whether only a power cut would show it.
    """

    module: str
    place: str
    code: str
    new: str
    start: int
    end: int
    is_durable: bool = False

    def applied_to(self, source: bytes) -> bytes:
        """The source without that safety."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.module} {self.place}: {self.code} -> {self.new}"


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
                yield self._mutation(node.test, place, "False", shown=f"if {ast.unparse(node.test)}: raise")
            else:
                yield self._mutation(node, place, new)

    def _mutation(
        self, node: ast.expr | ast.stmt, place: str, new: str, *, is_durable: bool = False, shown: str = ""
    ) -> Mutation:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        if self._source[start:end].startswith(b"elif"):
            new = "elif False: pass"
        code = re.sub(r"\s+", " ", shown or ast.unparse(node))
        return Mutation(self._module, place, code[:90], new, start, end, is_durable)


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


def copy_repository(target: Path) -> None:
    """What the tests need, where it can be changed."""
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED_FILES:
        shutil.copy(REPOSITORY / name, target / name)


def try_mutation(mutation: Mutation, copy: Path) -> str:
    """Which test fails without that safety; "" if none does."""
    path = copy / PACKAGE / mutation.module
    source = path.read_bytes()
    try:
        path.write_bytes(mutation.applied_to(source))
        for name in _test_files(mutation, copy):
            failed = _run_tests(copy, name)
            if failed:
                return failed
    finally:
        path.write_bytes(source)
    return ""


def _test_files(mutation: Mutation, copy: Path) -> list[str]:
    names = dict.fromkeys([*TESTS.get(mutation.module, ()), *FOR_ALL])
    return [f"tests/test_{name}.py" for name in names if (copy / "tests" / f"test_{name}.py").exists()]


def _run_tests(copy: Path, test_file: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", test_file]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        process = subprocess.Popen(
            [*command, f"--basetemp={scratch}/tests"],
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECS)
        except subprocess.TimeoutExpired:
            return f"{test_file} (does not end)"
        finally:
            if process.poll() is None:  # also where somebody interrupts the sweep
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    if process.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1] if failed else f"{test_file} (exit code {process.returncode})"


# ------------------------------------------------------------------ reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    parser.add_argument("--only", default="", help="only mutations with this text in their line")
    parser.add_argument("--sample", type=int, help="only so many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
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
        copy_repository(Path(folder))
        return _try_all(mutations, Path(folder))


def _try_all(mutations: list[Mutation], copy: Path) -> int:
    verdicts: Counter[str] = Counter()
    begin_secs = time.monotonic()
    print("| place | removed | killed by |\n| --- | --- | --- |", flush=True)
    for mutation in mutations:
        killer = try_mutation(mutation, copy)
        verdict = "killed" if killer else "SURVIVED (durability)" if mutation.is_durable else "SURVIVED"
        verdicts[verdict] += 1
        code = mutation.code.replace("|", "\\|")
        print(f"| {mutation.module} `{mutation.place}` | `{code}` | {killer or verdict} |", flush=True)
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    print(f"\n{len(mutations)} mutations in {time.monotonic() - begin_secs:.0f} s: {told}")
    return int(verdicts["killed"] < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
