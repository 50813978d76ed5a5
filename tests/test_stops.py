"""The way of a state to the disk is short, and stays so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.count_stops import save_stops


def test_a_save_passes_few_files_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of three small items passes at most 14 files and 94 functions of the library."""
    monkeypatch.delitem(sys.modules, "flax.nnx", raising=False)  # only with NNX loaded are its objects looked for
    stops = save_stops(str(tmp_path))
    files = {file for file, _ in stops}
    assert {"hook.py", "handlers/pytree.py", "storage/writer.py", "storage/commit.py"} <= files, "both threads are seen"
    assert len(files) <= 14, sorted(files)
    assert len(stops) <= 94, sorted(stops)
