"""The names in a run's directory: never older than the question, and listed no oftener than needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt_hooks import listing
from ckpt_hooks.listing import Listing

LONG_AGO_NSECS = 1_700_000_000_123_456_789


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The directories that have been listed, one entry each time."""
    listed: list[bytes] = []
    listdir = os.listdir

    def note(directory: bytes) -> list[bytes]:
        listed.append(directory)
        return listdir(directory)

    monkeypatch.setattr(os, "listdir", note)
    return listed


def wait_for_the_next_tick(directory: Path) -> None:
    while not listing._is_over(directory.stat().st_ctime_ns):
        time.sleep(0.001)


def freeze(monkeypatch: pytest.MonkeyPatch, change_nsecs: int, now_nsecs: int) -> None:
    """From now on, every directory has this change time whatever happens to it, and so late it is."""
    monkeypatch.setattr(listing, "_stamp_of", lambda directory: (1, 2, change_nsecs))
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: now_nsecs)


def test_only_a_steps_integer_is_a_step(tmp_path: Path) -> None:
    """A step is written in ASCII digits without a leading zero; all else that is no integer is another name."""
    for name in ("0", "7", "10", "00", "010", "٢٠", "1٢", "²", "1_0", "+1", " 1", "8.damaged", "config.json"):
        (tmp_path / name).mkdir()
    names = Listing(str(tmp_path)).names()
    assert names.steps == [10, 7, 0]
    assert sorted(names.others) == sorted(["٢٠", "1٢", "²", "1_0", "+1", " 1", "8.damaged", "config.json"])


def test_names_that_are_no_text_are_other_names(tmp_path: Path) -> None:
    """A name that is no UTF-8 does not keep anybody from the others."""
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    (tmp_path / "3").mkdir()
    names = Listing(str(tmp_path)).names()
    assert (names.steps, names.others) == ([3], [os.fsdecode(b"\xff\xfe")])


def test_without_a_directory_there_are_no_names(tmp_path: Path) -> None:
    """What is absent, or is no directory any more, has no names; once it is there, it has."""
    there = Listing(str(tmp_path / "run"))
    assert there.names().steps == ()
    (tmp_path / "run" / "5").mkdir(parents=True)
    assert there.names().steps == [5]
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    assert there.names().steps == ()


def test_an_unchanged_directory_is_listed_once(tmp_path: Path, listings: list[bytes]) -> None:
    """On a local disk, a directory that has not changed since the last listing is not listed again."""
    if not listing._is_local(os.fsencode(tmp_path)):
        pytest.skip("not a local disk: every call lists")
    (tmp_path / "5").mkdir()
    wait_for_the_next_tick(tmp_path)
    there = Listing(str(tmp_path))
    assert [there.names().steps for _ in range(5)] == [[5]] * 5
    assert len(listings) == 1
    (tmp_path / "6").mkdir()
    assert there.names().steps == [6, 5]
    assert len(listings) == 2


@pytest.mark.parametrize(
    ("change_nsecs", "now_nsecs"),
    [
        (LONG_AGO_NSECS, LONG_AGO_NSECS),  # within a tick of the clock
        (LONG_AGO_NSECS, LONG_AGO_NSECS - 1),  # the clock was set back
        (1_700_000_000_000_000_000, 1_700_000_000_900_000_000),  # the disk records seconds
    ],
)
def test_a_change_within_the_same_tick_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change_nsecs: int, now_nsecs: int
) -> None:
    """A listing made while the directory's change time may still be given again is not trusted."""
    freeze(monkeypatch, change_nsecs, now_nsecs)
    there = Listing(str(tmp_path))
    for step in range(3):
        (tmp_path / str(step)).mkdir()
        assert there.names().steps[0] == step


def test_a_change_where_directories_have_no_times_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another machine may change the directory, as in a mounted bucket, its change time is not trusted."""
    freeze(monkeypatch, LONG_AGO_NSECS, time.time_ns())
    monkeypatch.setattr(listing, "_is_local", lambda directory: False)
    there = Listing(str(tmp_path))
    for step in range(3):
        (tmp_path / str(step)).mkdir()
        assert there.names().steps[0] == step


def test_the_kernels_own_files_are_no_local_disk() -> None:
    """A file system of a type that is not known is not taken for one that keeps change times."""
    assert not listing._is_local(b"/proc")
    assert not listing._is_local(b"/no/such/directory")


def test_a_change_whose_time_is_set_back_is_seen(tmp_path: Path) -> None:
    """A copy that restores the directory's modification time, as rsync does, is seen all the same."""
    (tmp_path / "1").mkdir()
    wait_for_the_next_tick(tmp_path)
    there, before = Listing(str(tmp_path)), tmp_path.stat()
    assert there.names().steps == [1]
    (tmp_path / "2").mkdir()
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert there.names().steps == [2, 1]


def test_another_directory_of_the_same_name_is_seen(tmp_path: Path) -> None:
    """A run that was replaced by another one is listed anew."""
    for run, step in (("run", "1"), ("other", "2")):
        (tmp_path / run / step).mkdir(parents=True)
    wait_for_the_next_tick(tmp_path / "other")
    there = Listing(str(tmp_path / "run"))
    assert there.names().steps == [1]
    os.rename(tmp_path / "run", tmp_path / "old")
    os.rename(tmp_path / "other", tmp_path / "run")
    assert there.names().steps == [2]


WRITER = """
import os, sys
for line in sys.stdin:
    os.mkdir(os.path.join(sys.argv[1], line.strip()))
    print("made", flush=True)
"""


def test_what_another_process_adds_is_seen_at_once(tmp_path: Path) -> None:
    """A step that another process adds between two calls is seen by the second, however little time is between."""
    there = Listing(str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for step in range(300):
            writer.stdin.write(f"{step}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "made\n"
            assert there.names().steps[0] == step
        writer.stdin.close()
