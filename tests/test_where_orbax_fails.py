"""Where Orbax 0.12 loses data, stays silent or hangs, and this library does not: each defect shown, each promise kept.

The half of a test that is about Orbax keeps the table of the README true: where it fails, Orbax has mended
something.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckpt_hooks import (
    AsyncCheckpointer,
    BestN,
    Checkpointer,
    CheckpointHook,
    CheckpointManager,
    Preempted,
    StandardCheckpointHandler,
    args,
)
from ckpt_hooks.errors import (
    CorruptCheckpointError,
    DiskFullError,
    InvalidArgumentError,
    NameCollisionError,
    NotSerializableError,
    NoValidCheckpointError,
    RunLockedError,
    SaveFailedError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from tests.sameness import bits, typed_bits

REPOSITORY = Path(__file__).resolve().parents[1]


def state_of(value: float, size: int = 3) -> dict[str, Any]:
    return {"w": jnp.full(size, value)}


def ours_at(directory: Path, steps: range) -> CheckpointManager:
    """A manager of ours that has saved `steps`, with state_of(step)."""
    manager = CheckpointManager(directory, keep=None)
    for step in steps:
        manager.save(step, state_of(step))
    manager.wait()
    return manager


def theirs_at(directory: Path, steps: range, **options: Any) -> ocp.CheckpointManager:
    """A manager of Orbax's that has saved `steps`, with state_of(step)."""
    manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))
    for step in steps:
        manager.save(step, args=ocp.args.StandardSave(state_of(step)))
    manager.wait_until_finished()
    return manager


def python(code: str, *arguments: Any, timeout: float = 120, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a program; raises TimeoutExpired where it hangs."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------ one program for what would hang this one

ORBAX_FAILURES = """
import json, os, resource, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity

root = sys.argv[1]
os.chdir(root)
found = {}
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))


def error_of(call):
    try:
        call()
        return ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def save(path, tree, **options):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, tree, **options)
    checkpointer.wait_until_finished()


x = {"x": jnp.ones(3)}
found["zero_size"] = error_of(lambda: save(root + "/zero", {"x": np.zeros((0, 3))}))
found["bare"] = error_of(lambda: save(root + "/bare", jnp.ones(3)))
found["relative"] = error_of(lambda: save("relative", x))

save(root + "/forced", x)
events.clear()
found["force"] = error_of(lambda: save(root + "/forced", {"x": len}, force=True))
found["force_keeps_the_old"] = os.path.exists(root + "/forced")
found["failure_events"] = [name for name in events if "fail" in name or "error" in name]

blocking = ocp.Checkpointer(ocp.StandardCheckpointHandler())
bad = {"a": object()}
found["metadata"] = error_of(lambda: blocking.save(root + "/metadata", {"x": jnp.arange(3000.0)}, custom_metadata=bad))
found["metadata_leaves"] = os.path.exists(root + "/metadata.orbax-checkpoint-tmp/ocdbt.process_0")

open(root + "/file", "w").close()
threads = set(threading.enumerate())
found["no_directory"] = error_of(lambda: save(root + "/file/checkpoint", x))
found["waiting_threads"] = [t.name for t in threading.enumerate() if not t.daemon and t not in threads]

run = ocp.CheckpointManager(root + "/commit")
commit = atomicity.AtomicRenameTemporaryPath.finalize


async def fail_for_step_2(self, *args, **kwargs):
    if self.get_final().name == "2":
        raise OSError("no commit")
    return await commit(self, *args, **kwargs)


atomicity.AtomicRenameTemporaryPath.finalize = fail_for_step_2
run.save(1, args=ocp.args.StandardSave(x))
run.wait_until_finished()
found["commit_returns"] = run.save(2, args=ocp.args.StandardSave(x))
while any(thread.is_alive() for thread in threading.enumerate() if thread.name == "save_finalize"):
    time.sleep(0.01)
found["commit_latest"] = run.latest_step()
found["commit_check"] = error_of(run.check_for_errors)
found["commit_next"] = error_of(lambda: run.save(3, args=ocp.args.StandardSave(x)))
found["commit_steps"] = sorted(name for name in os.listdir(root + "/commit") if name.isdigit())

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
found["full"] = error_of(lambda: save(root + "/full", {"x": np.random.rand(100000)}))
found["full_leaves"] = os.path.exists(root + "/full.orbax-checkpoint-tmp")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

print(json.dumps(found))
sys.stdout.flush()
os._exit(0)  # or it would wait for the threads of the failed saves
"""


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Orbax does where saves fail, found out in a process of its own."""
    done = python(ORBAX_FAILURES, tmp_path_factory.mktemp("orbax"))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------ damage


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def flip_one_bit(path: Path, rng: random.Random) -> Callable[[], None]:
    """Flips a random bit of a file; returns what flips it back."""
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)

    def mend() -> None:
        path.write_bytes(content)

    return mend


def test_every_flipped_bit_is_found_by_us(tmp_path: Path) -> None:
    """One bit flipped anywhere in a checkpoint of ours is an error, or it changes nothing that is restored."""
    state = {"w": jnp.arange(700.0), "small": jnp.arange(5), "key": jax.random.key(1), "count": 3, "name": "x"}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"params": state, "step": 1}, metrics={"loss": 0.5}, metadata={"note": "x"})
    rng = random.Random(0)
    files = files_of(tmp_path / "1")
    silent = []
    with CheckpointManager(tmp_path) as manager:
        saved = bits(manager.restore())
        for number in range(200):
            path = files[number % len(files)]
            mend = flip_one_bit(path, rng)
            try:
                found = bits(manager.restore(step=1))
            except CorruptCheckpointError:
                found = saved
            if found != saved or (not manager.verify(1) and path.name != "commit_success.txt"):
                silent.append(str(path))
            mend()
        assert bits(manager.restore(step=1)) == saved
    assert silent == []


def test_flipped_bits_of_arrays_pass_orbax_without_a_word(tmp_path: Path) -> None:
    """A bit flipped in the bytes of an array reaches the training as a wrong value, where Orbax restores it."""
    state = {"w": jnp.asarray(np.random.default_rng(0).random(4000, np.float32))}  # noise does not compress
    checkpoint = tmp_path / "theirs"
    wrong = 0
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(checkpoint, state)
        theirs.wait_until_finished()
        data = max(files_of(checkpoint / "ocdbt.process_0"), key=lambda path: path.stat().st_size)
        rng = random.Random(0)
        for _ in range(10):
            mend = flip_one_bit(data, rng)
            try:
                wrong += bits(theirs.restore(checkpoint, state)) != bits(state)
            except Exception:
                pass  # zstd noticed
            mend()
    assert wrong > 0


def test_the_newest_checkpoint_that_verifies_is_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax names a damaged checkpoint as newest and gives up on it; ours says why and restores the one before it."""
    with theirs_at(tmp_path / "theirs", range(1, 4)):
        pass
    (tmp_path / "theirs" / "3" / "default" / "manifest.ocdbt").unlink()
    with ocp.CheckpointManager(tmp_path / "theirs") as theirs:
        assert theirs.latest_step() == 3
        with pytest.raises(ValueError, match="NOT_FOUND"):
            theirs.restore(None, args=ocp.args.StandardRestore(state_of(0)))

    with ours_at(tmp_path / "ours", range(1, 4)):
        pass
    (tmp_path / "ours" / "3" / "w" / "manifest.ocdbt").unlink()
    with CheckpointManager(tmp_path / "ours") as ours:
        assert bits(ours.restore(state_of(0))) == bits(state_of(2))
        assert "manifest.ocdbt" in caplog.text
        assert ours.latest_step() == 2


def test_a_run_without_a_valid_checkpoint_is_never_started_afresh(tmp_path: Path) -> None:
    """Where every checkpoint is damaged, the error has each one's reason."""
    with ours_at(tmp_path, range(1, 3)):
        pass
    for step in ("1", "2"):
        (tmp_path / step / "w" / "manifest.ocdbt").unlink()
    with CheckpointHook(tmp_path) as hook, pytest.raises(NoValidCheckpointError, match=r"(?s)step 2.*step 1"):
        hook.restore(state_of(0))


def test_a_stray_empty_directory_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax takes an empty `99` for the newest step and saves nothing below it; ours ignores it with one warning."""
    for name in ("theirs", "ours"):
        (tmp_path / name / "99").mkdir(parents=True)
    with theirs_at(tmp_path / "theirs", range(0)) as theirs:
        assert theirs.latest_step() == 99
        assert theirs.save(4, args=ocp.args.StandardSave(state_of(4))) is False

    caplog.clear()
    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(4, state_of(4))
        ours.wait()
        for _ in range(3):
            assert (ours.steps(), ours.latest_step()) == ([4], 4)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING and "99" in record.message]
    assert len(warnings) == 1


# ------------------------------------------------------------------ durability


class Journal:
    """The syncs and renames of this process, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.renames: list[tuple[str, str, int]] = []  # (from, to, number of syncs before it)
        fsync, rename = os.fsync, os.rename

        def journaled_fsync(descriptor: int) -> None:
            self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def journaled_rename(source: Any, target: Any, **options: Any) -> None:
            self.renames.append((os.fspath(source), os.fspath(target), len(self.synced)))
            rename(source, target, **options)

        monkeypatch.setattr(os, "fsync", journaled_fsync)
        monkeypatch.setattr(os, "fdatasync", journaled_fsync)
        monkeypatch.setattr(os, "rename", journaled_rename)


def test_everything_is_durable_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax never syncs the files that it writes itself; ours syncs each file and directory, then renames, then
    syncs the parent.
    """
    journal = Journal(monkeypatch)
    with theirs_at(tmp_path / "theirs", range(1, 2)):
        pass
    assert journal.synced == []  # what tensorstore syncs by itself is not all: the metadata is written in Python

    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, {"params": state_of(1, 3000), "step": 1}, metrics={"loss": 0.5})
    final = str(tmp_path / "ours" / "1")
    (commit,) = [entry for entry in journal.renames if entry[1] == final]
    temporary, _, before = commit
    durable = set(journal.synced[:before])
    for folder, _, names in os.walk(final):
        there = temporary + folder[len(final) :]
        assert there in durable
        for name in names:
            assert os.path.join(there, name) in durable
    assert str(tmp_path / "ours") in journal.synced[before:]


# ------------------------------------------------------------------ writers


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Two of Orbax's managers write into one run and know nothing of each other; our second one gets an error."""
    with theirs_at(tmp_path / "theirs", range(1, 2)) as one, ocp.CheckpointManager(tmp_path / "theirs") as other:
        assert one.save(2, args=ocp.args.StandardSave(state_of(2)))
        one.wait_until_finished()
        other.save(3, args=ocp.args.StandardSave(state_of(3)))
        other.wait_until_finished()
        assert one.latest_step() == 2  # the other's step 3 is unknown to it

    with ours_at(tmp_path / "ours", range(1, 2)), CheckpointManager(tmp_path / "ours") as second:
        assert second.steps() == [1]  # reading needs no lock
        with pytest.raises(RunLockedError, match="this process"):
            second.save(2, state_of(2))
    with CheckpointManager(tmp_path / "ours") as third:
        third.save(2, state_of(2))


def test_a_step_below_the_newest_is_an_error(tmp_path: Path) -> None:
    """Orbax drops a save at or below the newest step without a word; ours refuses it, or makes it the newest."""
    with theirs_at(tmp_path / "theirs", range(1, 4)) as theirs:
        assert theirs.save(2, args=ocp.args.StandardSave(state_of(9))) is False
    with ours_at(tmp_path / "ours", range(1, 4)) as ours:
        with pytest.raises(InvalidArgumentError, match="force=True"):
            ours.save(2, state_of(9))
        ours.save(2, state_of(9), force=True)
        ours.wait()
        assert ours.latest_step() == 2
        assert bits(ours.restore()) == bits(state_of(9))


# ------------------------------------------------------------------ saves that fail


def test_a_full_disk_does_not_stay_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orbax: dict[str, Any]) -> None:
    """Where a write fails, Orbax leaves its temporary directory; ours removes it, and the next save works."""
    assert "File too large" in orbax["full"]
    assert orbax["full_leaves"]
    pwrite = os.pwrite

    def no_room_for_arrays(descriptor: int, content: memoryview, offset: int) -> int:
        if len(content) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    with ours_at(tmp_path, range(1, 2)) as ours:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", no_room_for_arrays)
            ours.save(2, state_of(2, 3000))
            with pytest.raises(SaveFailedError, match="full") as caught:
                ours.wait()
            assert isinstance(caught.value.__cause__, DiskFullError)
        assert sorted(os.listdir(tmp_path)) == ["1"]
        ours.save(2, state_of(2, 3000))
        ours.wait()
        assert ours.latest_step() == 2


def test_a_write_beyond_a_limit_is_cleared_up(tmp_path: Path) -> None:
    """The same failure that Orbax was given, of the file system itself: nothing of it is left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with Checkpointer(StandardCheckpointHandler()) as ours, pytest.raises(OSError, match="too large"):
            ours.save(tmp_path / "full", {"x": np.random.default_rng(0).random(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot fit is refused at the call, and nothing is left of it."""
    space = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 1, space.f_frsize

    with ours_at(tmp_path, range(1, 2)) as ours:
        monkeypatch.setattr(os, "statvfs", lambda path: Full)
        with pytest.raises(DiskFullError, match="free"):
            ours.save(2, state_of(2, 3_000_000))
        assert os.listdir(tmp_path) == ["1"]


def test_a_directory_that_cannot_be_made_leaves_nothing_waiting(tmp_path: Path, orbax: dict[str, Any]) -> None:
    """Orbax reports it and leaves threads that hold up the exit for minutes; ours reports it, and that is all."""
    assert "NotADirectoryError" in orbax["no_directory"]
    assert orbax["waiting_threads"] != []

    (tmp_path / "file").touch()
    before = set(threading.enumerate())
    with AsyncCheckpointer(StandardCheckpointHandler()) as ours, pytest.raises(OSError, match="file"):
        ours.save(tmp_path / "file" / "checkpoint", state_of(1))
    assert set(threading.enumerate()) <= before


def test_a_failed_commit_is_raised_once_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orbax: dict[str, Any]
) -> None:
    """Orbax lists the step that failed, says that all is well, and loses the next save as well; ours raises at the
    next call and goes on.
    """
    assert orbax["commit_returns"] is True
    assert orbax["commit_latest"] == 2
    assert orbax["commit_check"] == ""
    assert "no commit" in orbax["commit_next"]
    assert orbax["commit_steps"] == ["1"]

    with ours_at(tmp_path, range(1, 2)) as ours:

        def no_commit(*_: Any, **__: Any) -> None:
            raise OSError("no commit")

        with monkeypatch.context() as patched:
            patched.setattr("ckpt_hooks.storage.commit.publish", no_commit)
            ours.save(2, state_of(2))
            with pytest.raises(SaveFailedError, match="no commit"):
                ours.wait()
        assert ours.latest_step() == 1
        ours.save(3, state_of(3))
        ours.wait()
        assert ours.steps() == [1, 3]
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


def test_a_failed_save_is_an_event_and_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, orbax: dict[str, Any]
) -> None:
    """Orbax has no event for a failed save; ours has one, and a log line with the step and the reason."""
    assert orbax["force"] != ""
    assert orbax["failure_events"] == []

    events: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_listener(listen)
    with CheckpointManager(tmp_path) as ours, pytest.raises(UnsupportedLeafError):
        ours.save(7, {"w": len})
    assert "/jax/ckpt_hooks/write/failure" in events
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any("/7" in message and "function" in message for message in errors)


def test_force_keeps_the_old_checkpoint_until_the_new_one_is_there(tmp_path: Path, orbax: dict[str, Any]) -> None:
    """Orbax deletes the old checkpoint before it writes the new one, which may fail; ours has the old one then."""
    assert "Unsupported type" in orbax["force"]
    assert orbax["force_keeps_the_old"] is False

    with Checkpointer(StandardCheckpointHandler()) as ours:
        ours.save(tmp_path / "forced", state_of(1))
        with pytest.raises(UnsupportedLeafError):
            ours.save(tmp_path / "forced", {"w": len}, force=True)
        assert bits(ours.restore(tmp_path / "forced")) == bits(state_of(1))
        ours.save(tmp_path / "forced", state_of(2), force=True)
        assert bits(ours.restore(tmp_path / "forced")) == bits(state_of(2))


def test_metadata_that_is_not_json_is_refused_first(tmp_path: Path, orbax: dict[str, Any]) -> None:
    """Orbax refuses it after all arrays are written, and leaves them; ours before anything is."""
    assert "TypeError" in orbax["metadata"]
    assert orbax["metadata_leaves"]

    with Checkpointer(StandardCheckpointHandler()) as ours:
        with pytest.raises(NotSerializableError, match="'a'"):
            ours.save(tmp_path / "metadata", state_of(1), custom_metadata={"a": object()})
        with pytest.raises(NotSerializableError), CheckpointManager(tmp_path / "run") as manager:
            manager.save(1, state_of(1), metadata={"a": object()})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ ends of programs

ASYNC_SAVE_AND_END = {
    "orbax": """
import sys, jax.numpy as jnp, orbax.checkpoint as ocp
manager = ocp.CheckpointManager(sys.argv[1])
manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
""",
    "ours": """
import sys, jax.numpy as jnp
from ckpt_hooks import CheckpointManager
manager = CheckpointManager(sys.argv[1])
manager.save(1, {"w": jnp.ones(3)})
""",
}


def test_a_program_may_end_right_after_a_save(tmp_path: Path) -> None:
    """An asynchronous save of Orbax's that the program does not wait for is lost; ours is committed."""
    try:
        python(ASYNC_SAVE_AND_END["orbax"], tmp_path / "theirs", timeout=20)
    except subprocess.TimeoutExpired:
        pass  # it hangs about as often as it exits with 0
    assert not (tmp_path / "theirs" / "1").exists()

    done = python(ASYNC_SAVE_AND_END["ours"], tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    with CheckpointManager(tmp_path / "ours") as ours:
        assert bits(ours.restore()) == bits({"w": jnp.ones(3)})


def test_a_save_that_fails_as_the_program_ends_is_no_success(tmp_path: Path) -> None:
    """Where the last save cannot be committed, the program says so and does not exit with 0."""
    no_commit = (
        "import ckpt_hooks.storage.commit as c\ndef fail(*_, **__): raise OSError('no commit')\nc.publish = fail\n"
    )
    done = python(no_commit + ASYNC_SAVE_AND_END["ours"], tmp_path)
    assert done.returncode == 1
    assert "no commit" in done.stderr


SIGTERM_DURING_TRAINING = {
    "orbax": """
import os, signal, sys, jax.numpy as jnp, orbax.checkpoint as ocp
manager = ocp.CheckpointManager(sys.argv[1], options=ocp.CheckpointManagerOptions(save_interval_steps=1000))
for step in range(1, 5):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(3, step)}))
""",
    "ours": """
import os, signal, sys, jax.numpy as jnp
from ckpt_hooks import CheckpointHook
with CheckpointHook(sys.argv[1], every_n_steps=1000) as hook:
    for step in range(1, 5):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        hook(step, {"w": jnp.full(3, step)})
""",
}


def test_sigterm_saves_and_leaves(tmp_path: Path) -> None:
    """In one process, a SIGTERM kills a program with Orbax's manager; ours saves the step, commits and leaves."""
    done = python(SIGTERM_DURING_TRAINING["orbax"], tmp_path / "theirs")
    assert done.returncode == -signal.SIGTERM
    assert not (tmp_path / "theirs" / "3").exists()

    done = python(SIGTERM_DURING_TRAINING["ours"], tmp_path / "ours")
    assert done.returncode == Preempted(3).code == 143, done.stderr
    with CheckpointManager(tmp_path / "ours") as ours:
        assert ours.steps() == [3]
        assert bits(ours.restore()) == bits({"w": jnp.full(3, 3)})


# ------------------------------------------------------------------ metrics and retention


def _by_loss(**options: Any) -> dict[str, Any]:
    return {"best_fn": lambda metrics: metrics["loss"], "best_mode": "min", **options}


def _save_losses(theirs: ocp.CheckpointManager, ours: CheckpointManager, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        theirs.save(step, args=ocp.args.StandardSave(state_of(step)), metrics={"loss": loss})
        ours.save(step, state_of(step), metrics={"loss": loss})
    theirs.wait_until_finished()
    ours.wait()


def test_the_newest_always_stays(tmp_path: Path) -> None:
    """With worsening metrics, Orbax's max_to_keep deletes the newest of five; ours keeps it beside the best."""
    theirs = theirs_at(tmp_path / "theirs", range(0), **_by_loss(max_to_keep=2))
    with theirs, CheckpointManager(tmp_path / "ours", keep=BestN(2, "loss")) as ours:
        _save_losses(theirs, ours, [1.0, 2.0, 3.0, 4.0, 5.0])
        assert sorted(theirs.all_steps()) == [1, 2]
        assert ours.steps() == [1, 2, 5]


def test_nan_never_ranks(tmp_path: Path) -> None:
    """One NaN makes Orbax delete the true best; for ours it is no value at all."""
    theirs = theirs_at(tmp_path / "theirs", range(0), **_by_loss(max_to_keep=1))
    with theirs, CheckpointManager(tmp_path / "ours", keep=BestN(1, "loss")) as ours:
        _save_losses(theirs, ours, [0.5, math.nan, 0.7])
        assert 1 not in theirs.all_steps()
        assert ours.steps() == [1, 3]
        assert ours.best_step() == 1


def test_metrics_are_always_recorded(tmp_path: Path) -> None:
    """Orbax drops metrics where no best_fn was given; ours has them without being asked."""
    with theirs_at(tmp_path / "theirs", range(0)) as theirs:
        theirs.save(1, args=ocp.args.StandardSave(state_of(1)), metrics={"loss": 0.5})
        theirs.wait_until_finished()
        assert theirs.metrics(1) is None
        assert not (tmp_path / "theirs" / "1" / "metrics").exists()
    with CheckpointManager(tmp_path / "ours") as ours:
        ours.save(1, state_of(1), metrics={"loss": 0.5})
        ours.wait()
        assert ours.metadata(1).metrics == {"loss": 0.5}
        assert ours.best_step("loss") == 1


# ------------------------------------------------------------------ what goes in, and what comes out


@pytest.fixture
def theirs() -> Iterator[ocp.StandardCheckpointer]:
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


@pytest.fixture
def ours() -> Iterator[Checkpointer]:
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        yield checkpointer


def test_names_that_collide_are_refused(tmp_path: Path, theirs: ocp.StandardCheckpointer, ours: Checkpointer) -> None:
    """Of two leaves whose names collide, Orbax restores one twice; ours refuses them before a byte is written."""
    state = {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)}
    theirs.save(tmp_path / "theirs", state)
    theirs.wait_until_finished()
    restored = theirs.restore(tmp_path / "theirs", state)
    assert bits(restored["a"]["b"]) == bits(restored["a.b"])
    with pytest.raises(NameCollisionError, match=r"a\.b"):
        ours.save(tmp_path / "ours", state)
    assert not (tmp_path / "ours").exists()


MISFITS: dict[str, tuple[Any, Any, Any]] = {  # (saved, the target, what Orbax makes of it)
    "dtype": (jnp.arange(3), jnp.zeros(3), jnp.arange(3.0)),
    "numpy shape": (np.arange(4.0), np.zeros(9), np.arange(4.0)),
    "kind of key": (
        jax.random.key(1, impl="rbg"),
        jax.random.key(0, impl="unsafe_rbg"),
        jax.random.key(1, impl="rbg"),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_target_that_does_not_fit_is_an_error(
    tmp_path: Path, theirs: ocp.StandardCheckpointer, ours: Checkpointer, misfit: str
) -> None:
    """Orbax casts, or ignores the target, without a word; ours lists the leaves that differ."""
    saved, target, made = ({"x": leaf} for leaf in MISFITS[misfit])
    theirs.save(tmp_path / "theirs", saved)
    theirs.wait_until_finished()
    assert typed_bits(theirs.restore(tmp_path / "theirs", target)) == typed_bits(made)

    ours.save(tmp_path / "ours", saved)
    for checkpoint in ("ours", "theirs"):
        with pytest.raises(StructureMismatchError, match="x"):
            ours.restore(tmp_path / checkpoint, target)


def test_a_cast_is_made_when_it_is_asked_for(tmp_path: Path, ours: Checkpointer) -> None:
    """cast=True converts what would have been an error."""
    ours.save(tmp_path / "ours", {"x": jnp.arange(3)})
    restored = ours.restore(tmp_path / "ours", args=args.StandardRestore({"x": jnp.zeros(3)}, cast=True))
    assert typed_bits(restored) == typed_bits({"x": jnp.arange(3.0)})


def test_what_orbax_cannot_save_is_saved(tmp_path: Path, ours: Checkpointer, orbax: dict[str, Any]) -> None:
    """Zero-size arrays and a bare array are errors for Orbax, and states like any other for ours."""
    assert "zero size" in orbax["zero_size"]
    assert "single arrays" in orbax["bare"]
    for name, state in {"empty": {"x": np.zeros((0, 3))}, "bare": jnp.ones(3)}.items():
        ours.save(tmp_path / name, state)
        assert typed_bits(ours.restore(tmp_path / name, state)) == typed_bits(state)


def test_relative_paths_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: Checkpointer, orbax: dict[str, Any]
) -> None:
    """A relative path is an error for Orbax; for ours it is where it was when it was given."""
    assert "absolute" in orbax["relative"]
    monkeypatch.chdir(tmp_path)
    ours.save("here", state_of(1))
    manager = CheckpointManager("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    manager.save(1, state_of(1))
    manager.close()
    assert bits(ours.restore("../here")) == bits(state_of(1))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "here", "run"]


SAVE_ON_EIGHT_DEVICES = """
import sys, jax, jax.numpy as jnp, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from ckpt_hooks import CheckpointManager
mesh = jax.make_mesh((8,), ("x",))
state = {"w": jax.device_put(jnp.arange(64.0), NamedSharding(mesh, PartitionSpec("x")))}
with CheckpointManager(sys.argv[1] + "/ours") as ours:
    ours.save(1, state)
with ocp.StandardCheckpointer() as theirs:
    theirs.save(sys.argv[1] + "/theirs", state)
"""


def test_a_checkpoint_of_more_devices_is_restored(tmp_path: Path, theirs: ocp.StandardCheckpointer) -> None:
    """What eight devices saved, Orbax cannot restore on one without being given shardings; ours needs none."""
    done = python(SAVE_ON_EIGHT_DEVICES, tmp_path, devices=8)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"topology|device|sharding"):
        theirs.restore(tmp_path / "theirs")
    expected = {"w": jnp.arange(64.0)}
    with CheckpointManager(tmp_path / "ours") as manager:
        assert bits(manager.restore()) == bits(expected)
        assert typed_bits(manager.restore({"w": jnp.zeros(64)})) == typed_bits(expected)
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        assert bits(checkpointer.restore(tmp_path / "theirs")) == bits(expected)


def test_a_copy_of_a_run_is_a_run(tmp_path: Path) -> None:
    """Checkpoints name no absolute path that counts: a copied or moved run restores."""
    with ours_at(tmp_path / "old", range(1, 3)):
        pass
    shutil.move(tmp_path / "old", tmp_path / "new")
    with CheckpointManager(tmp_path / "new") as ours:
        assert bits(ours.restore()) == bits(state_of(2))
