"""`AsyncCheckpointer`: training goes on while one save is written, and no failure is ever lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ckpt_hooks import (
    ArrayOptions,
    AsyncCheckpointer,
    CheckpointArgs,
    Checkpointer,
    CheckpointHandler,
    CommitFileTemporaryPath,
    CompositeCheckpointHandler,
    IteratorCheckpointHandler,
    StandardCheckpointHandler,
    args,
    errors,
    metadata_store,
    register_with_handler,
)
from ckpt_hooks.handlers.base import StagedSave

Staging = Literal["copy", "view"]

PREFIX = "/jax/ckpt_hooks/"
DEADLINE_SECS = 60  # of what cannot take long unless it hangs


class GatedHandler(CheckpointHandler):
    """Saves a text; its writing waits until `gate` is set, and fails with `error` if there is one."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.writers: list[threading.Thread] = []

    def stage(self, args: Any) -> StagedSave:
        text = args.text

        def write(directory: epath.Path) -> None:
            self.writers.append(threading.current_thread())
            assert self.gate.wait(DEADLINE_SECS)
            if self.error is not None:
                raise self.error
            (directory / "text").write_text(text)

        return StagedSave(write)

    def save(self, directory: epath.Path, args: Any) -> None:
        self.stage(args).write(directory)

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        return (directory / "text").read_text()


@register_with_handler(GatedHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class GatedArgs(CheckpointArgs):
    text: str = ""


@pytest.fixture
def handler() -> GatedHandler:
    return GatedHandler()


@pytest.fixture
def checkpointer(handler: GatedHandler) -> Iterator[AsyncCheckpointer]:
    checkpointer = AsyncCheckpointer(handler)
    yield checkpointer
    handler.gate.set()
    checkpointer.close()


def fail_once(checkpointer: AsyncCheckpointer, path: Path) -> None:
    """Lets a save fail in the background, and waits until it has."""
    handler = checkpointer.handler
    handler.error = RuntimeError("the disk is on fire")
    checkpointer.save(path, "a")
    handler.writers[-1].join()
    handler.error = None


# ------------------------------------------------------------------ saving in the background


def test_save_returns_before_the_commit(tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer) -> None:
    """While the writing is held up, `save` has returned and there is no checkpoint; after it, there is."""
    handler.gate.clear()
    checkpointer.save(tmp_path / "c", "a")
    assert checkpointer.is_saving
    assert os.listdir(tmp_path) == ["c.orbax-checkpoint-tmp"]
    handler.gate.set()
    checkpointer.wait_until_finished()
    assert not checkpointer.is_saving
    assert os.listdir(tmp_path) == ["c"]


def test_writing_is_done_by_another_thread(
    tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer
) -> None:
    """The thread that calls `save` does not write; the one that does keeps the interpreter alive."""
    checkpointer.save(tmp_path / "c", "a")
    checkpointer.wait_until_finished()
    (writer,) = handler.writers
    assert writer is not threading.current_thread()
    assert not writer.daemon


def test_next_save_waits_for_the_one_before(
    tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer
) -> None:
    """A second save begins only when the first is committed."""
    handler.gate.clear()
    checkpointer.save(tmp_path / "1", "a")
    threading.Timer(0.5, handler.gate.set).start()
    checkpointer.save(tmp_path / "2", "b")
    assert (tmp_path / "1" / "commit_success.txt").exists()
    checkpointer.wait_until_finished()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_restore_waits(tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer) -> None:
    """`restore` of what is being saved waits for its commit."""
    handler.gate.clear()
    checkpointer.save(tmp_path / "c", "a")
    threading.Timer(0.05, handler.gate.set).start()
    assert checkpointer.restore(tmp_path / "c") == "a"


def test_close_waits(tmp_path: Path, handler: GatedHandler) -> None:
    """`close`, and so the end of a with block, waits for the commit."""
    with AsyncCheckpointer(handler) as checkpointer:
        handler.gate.clear()
        checkpointer.save(tmp_path / "c", "a")
        threading.Timer(0.05, handler.gate.set).start()
    assert os.listdir(tmp_path) == ["c"]


def test_refusals_come_at_once(tmp_path: Path) -> None:
    """What can be refused early is raised by `save` itself, as it is, with nothing written."""
    (tmp_path / "there").mkdir()
    with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
        with pytest.raises(errors.UnsupportedLeafError):
            checkpointer.save(tmp_path / "c", {"f": print})
        with pytest.raises(TypeError, match="custom_metadata"):
            checkpointer.save(tmp_path / "c", {"w": 1}, custom_metadata={"a": object()})
        with pytest.raises(errors.DestinationExistsError):
            checkpointer.save(tmp_path / "there", {"w": 1})
        checkpointer.wait_until_finished()
    with AsyncCheckpointer(CompositeCheckpointHandler()) as checkpointer, pytest.raises(ValueError, match="no items"):
        checkpointer.save(tmp_path / "c", args=args.Composite())
    assert os.listdir(tmp_path) == ["there"]


def test_directory_that_cannot_be_made_is_reported_at_once(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    """A temporary directory that cannot be made is an error of `save`, and nothing waits for ever."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        checkpointer.save(tmp_path / "file" / "c", "a")
    checkpointer.wait_until_finished()


@pytest.mark.parametrize("timeout_secs", [0, -1, -0.5])
def test_timeout_must_be_positive(timeout_secs: float) -> None:
    """A timeout that is not above zero is a ValueError that names it."""
    with pytest.raises(ValueError, match=r"^timeout_secs"):
        AsyncCheckpointer(StandardCheckpointHandler(), timeout_secs=timeout_secs)


def test_options_are_those_of_checkpointer(tmp_path: Path) -> None:
    """The options of `Checkpointer` hold here too, and a store may write in the background."""
    store = metadata_store(enable_write=True, blocking_write=False)
    options: dict[str, Any] = {
        "checkpoint_metadata_store": store,
        "temporary_path_class": CommitFileTemporaryPath,
    }
    with AsyncCheckpointer(StandardCheckpointHandler(), **options) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(2)}, custom_metadata={"epoch": 1})
        checkpointer.wait_until_finished()
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.custom_metadata == {"epoch": 1}
    assert metadata.init_timestamp_nsecs and metadata.commit_timestamp_nsecs


def test_a_background_store_of_orbax_is_waited_for_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of Orbax's that writes in the background has written everything before it is summed and renamed."""
    store = ocp.metadata.metadata_store(enable_write=True)
    update = store.update

    def update_slowly(file_path: Any, **fields: Any) -> None:
        store._single_thread_executor.submit(time.sleep, 0.3)
        update(file_path, **fields)

    monkeypatch.setattr(store, "update", update_slowly)
    with AsyncCheckpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(2)}, custom_metadata={"epoch": 1})
        assert checkpointer.restore(tmp_path / "c").keys() == {"w"}
        assert checkpointer.metadata(tmp_path / "c").custom_metadata == {"epoch": 1}


def test_waiting_includes_what_a_background_store_was_given(tmp_path: Path) -> None:
    """What a user gave to a store that writes in the background is waited for, and its error is raised."""
    store = metadata_store(enable_write=True, blocking_write=False)
    with AsyncCheckpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        store.write(tmp_path / "nowhere" / "_CHECKPOINT_METADATA", {"metrics": {"loss": 0.5}})
        with pytest.raises(FileNotFoundError, match="nowhere"):
            checkpointer.wait_until_finished()
        checkpointer.wait_until_finished()
    store.close()


def test_events_tell_start_success_and_failure(
    tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer
) -> None:
    """A background save emits one start, and one success or one failure, and its barriers in order."""
    seen: list[str] = []

    def on_event(event: str, **details: str | int) -> None:
        seen.append(event.removeprefix(PREFIX))

    def on_duration(event: str, duration_secs: float, **details: str | int) -> None:
        if event == f"{PREFIX}barrier_duration_secs":
            seen.append(str(details["key"]).removeprefix("Checkpointer:").rpartition(".")[0])

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        checkpointer.save(tmp_path / "c", "a")
        checkpointer.wait_until_finished()
        begun = ["write/start", "save_start", "create_tmp_directory:pre", "create_tmp_directory:post"]
        assert seen == [*begun, "async_write_complete.c", "async_commit_complete.c", "write/success"]
        seen.clear()
        fail_once(checkpointer, tmp_path / "d")
        assert seen == [*begun, "write/failure"]
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
    with pytest.raises(errors.SaveFailedError):
        checkpointer.check_for_errors()


def test_a_listener_that_fails_hides_no_failure(
    tmp_path: Path, handler: GatedHandler, checkpointer: AsyncCheckpointer
) -> None:
    """A save has failed, and so does what is told of it: the next call raises the save's failure all the same."""

    def on_event(event: str, **details: str | int) -> None:
        if event.endswith("write/failure"):
            raise RuntimeError("the metrics server is gone")

    jax.monitoring.register_event_listener(on_event)
    try:
        fail_once(checkpointer, tmp_path / "c")
    finally:
        jax.monitoring.unregister_event_listener(on_event)
    with pytest.raises(errors.SaveFailedError, match="the disk is on fire"):
        checkpointer.wait_until_finished()
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ staging: the state at the time of the call


class Gate:
    """Holds up the writing of a standard item, wherever it is, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        stage = StandardCheckpointHandler.stage

        def gated(handler: StandardCheckpointHandler, *positional: Any, **keywords: Any) -> StagedSave:
            staged = stage(handler, *positional, **keywords)

            def write(directory: epath.Path) -> None:
                assert self._open.wait(DEADLINE_SECS)
                staged.write(directory)

            return dataclasses.replace(staged, write=write)

        monkeypatch.setattr(StandardCheckpointHandler, "stage", gated)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.mark.parametrize("staging", ["copy", "view"])
def test_numpy_array_may_be_changed_after_save(tmp_path: Path, gate: Gate, staging: Staging) -> None:
    """A NumPy leaf that is changed in place right after `save` is saved as it was."""
    small, large = np.arange(3.0), np.ones((300, 100), np.float32)
    with AsyncCheckpointer(StandardCheckpointHandler(ArrayOptions(staging=staging))) as checkpointer:
        checkpointer.save(tmp_path / "c", {"small": small, "large": large, "part": large[::2, 1:]})
        small[:] = -1
        large[:] = -1
        gate.open()
        restored = checkpointer.restore(tmp_path / "c")
    np.testing.assert_array_equal(restored["small"], [0, 1, 2])
    np.testing.assert_array_equal(restored["large"], np.ones((300, 100)))
    np.testing.assert_array_equal(restored["part"], np.ones((150, 99)))


@pytest.mark.parametrize("size", [3, 1 << 18])
@pytest.mark.parametrize("staging", ["copy", "view"])
def test_donated_array_is_saved_as_it_was(tmp_path: Path, gate: Gate, size: int, staging: Staging) -> None:
    """The memory of a JAX array that is donated to the next step right after `save` is not what is saved."""

    def step(w: jax.Array) -> jax.Array:
        return w * 0 - 1

    donating_step = jax.jit(step, donate_argnums=0)
    w = jnp.arange(size, dtype=jnp.float32) + 0
    with AsyncCheckpointer(StandardCheckpointHandler(ArrayOptions(staging=staging))) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": w})
        for _ in range(5):
            w = donating_step(w)
        w.block_until_ready()
        gate.open()
        restored = checkpointer.restore(tmp_path / "c")
    np.testing.assert_array_equal(restored["w"], np.arange(size, dtype=np.float32))


@pytest.mark.parametrize("size", [3, 1 << 18])
@pytest.mark.parametrize("staging", ["copy", "view"])
def test_deleted_array_is_saved_as_it_was(tmp_path: Path, gate: Gate, size: int, staging: Staging) -> None:
    """A JAX array that is deleted right after `save`, and its memory used again, is saved as it was."""
    w = jnp.arange(size, dtype=jnp.float32) + 0
    with AsyncCheckpointer(StandardCheckpointHandler(ArrayOptions(staging=staging))) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": w})
        w.delete()
        reused = [(jnp.full((size,), -1.0) + 0).block_until_ready() for _ in range(4)]
        gate.open()
        restored = checkpointer.restore(tmp_path / "c")
    assert len(reused) == 4
    np.testing.assert_array_equal(restored["w"], np.arange(size, dtype=np.float32))


def test_dict_may_be_changed_after_save(tmp_path: Path, gate: Gate) -> None:
    """Keys added to the state's dict, and to the metadata's, right after `save` are not saved."""
    state: dict[str, Any] = {"w": np.arange(2), "inner": {"b": 1}}
    custom: dict[str, Any] = {"losses": [0.5], "nested": {"a": 1}}
    with AsyncCheckpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", state, custom_metadata=custom)
        state["inner"]["b"] = 2
        state["new"] = 3
        custom["losses"].append(0.4)
        custom["nested"]["a"] = 2
        custom["new"] = 3
        gate.open()
        restored = checkpointer.restore(tmp_path / "c")
        metadata = checkpointer.metadata(tmp_path / "c").custom_metadata
    assert restored["inner"]["b"] == 1
    assert "new" not in restored
    assert metadata == {"losses": [0.5], "nested": {"a": 1}}


class Counter:
    def __init__(self) -> None:
        self.state = {"position": 0, "seen": [0]}

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


def test_iterator_may_go_on_after_save(tmp_path: Path, gate: Gate) -> None:
    """An iterator that advances right after `save` is saved where it was."""
    counter = Counter()
    with AsyncCheckpointer(CompositeCheckpointHandler()) as checkpointer:
        items = args.Composite(data=args.IteratorSave(counter), w=args.StandardSave({"w": 1}))
        checkpointer.save(tmp_path / "c", args=items)
        counter.state["position"] = 5
        counter.state["seen"].append(5)  # type: ignore[attr-defined]
        gate.open()
        checkpointer.wait_until_finished()
    restored = Checkpointer(IteratorCheckpointHandler()).restore(tmp_path / "c" / "data")
    assert restored == {"position": 0, "seen": [0]}


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("call", ["wait", "check", "save", "restore", "metadata", "close"])
def test_failure_is_raised_once_by_the_next_call(tmp_path: Path, call: str) -> None:
    """A background failure is raised by the next call of any kind, with its cause, once; then all goes on."""
    checkpointer = AsyncCheckpointer(GatedHandler())
    checkpointer.save(tmp_path / "good", "a")
    checkpointer.wait_until_finished()
    fail_once(checkpointer, tmp_path / "bad")
    assert checkpointer.failure is not None
    calls = {
        "wait": checkpointer.wait_until_finished,
        "check": checkpointer.check_for_errors,
        "save": lambda: checkpointer.save(tmp_path / "next", "b"),
        "restore": lambda: checkpointer.restore(tmp_path / "good"),
        "metadata": lambda: checkpointer.metadata(tmp_path / "good"),
        "close": checkpointer.close,
    }
    with pytest.raises(errors.SaveFailedError, match=r"bad failed: the disk is on fire") as caught:
        calls[call]()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert checkpointer.failure is None
    checkpointer.check_for_errors()
    checkpointer.wait_until_finished()
    checkpointer.save(tmp_path / "after", "c")
    assert checkpointer.restore(tmp_path / "after") == "c"
    checkpointer.close()
    assert sorted(os.listdir(tmp_path)) == ["after", "good"]


def test_failed_save_can_be_repeated(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    """After a failure the same path can be saved to again."""
    fail_once(checkpointer, tmp_path / "c")
    with pytest.raises(errors.SaveFailedError):
        checkpointer.wait_until_finished()
    assert os.listdir(tmp_path) == []
    checkpointer.save(tmp_path / "c", "b")
    assert checkpointer.restore(tmp_path / "c") == "b"


def test_failed_forced_save_leaves_the_old_one(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    """A forced save that fails in the background leaves the old checkpoint."""
    checkpointer.save(tmp_path / "c", "old")
    checkpointer.wait_until_finished()
    handler = checkpointer.handler
    handler.error = RuntimeError("no")
    checkpointer.save(tmp_path / "c", "new", force=True)
    with pytest.raises(errors.SaveFailedError):
        checkpointer.wait_until_finished()
    assert checkpointer.restore(tmp_path / "c") == "old"


def test_failure_with_a_background_store_leaves_nothing(tmp_path: Path) -> None:
    """A failed save waits for its own metadata writes before it removes the directory they go to."""
    store = metadata_store(enable_write=True, blocking_write=False)
    checkpointer = AsyncCheckpointer(GatedHandler(), checkpoint_metadata_store=store)
    for number in range(5):
        fail_once(checkpointer, tmp_path / str(number))
        with pytest.raises(errors.SaveFailedError, match="on fire"):
            checkpointer.wait_until_finished()
    checkpointer.close()
    assert os.listdir(tmp_path) == []


def test_leaving_the_block_raises_a_failure(tmp_path: Path) -> None:
    """The end of a with block is a call too: it raises what failed in the background."""
    with pytest.raises(errors.SaveFailedError, match="on fire"), AsyncCheckpointer(GatedHandler()) as checkpointer:
        fail_once(checkpointer, tmp_path / "c")


# ------------------------------------------------------------------ the end of a program

# Imports once, then runs each body of `PROGRAMS` in a process of its own, to its end as Python makes it.
RUNNER = """
import atexit, json, os, signal, sys, threading, time
import numpy as np
from ckpt_hooks import AsyncCheckpointer, CheckpointArgs, CheckpointHandler, register_with_handler
from ckpt_hooks.handlers.base import StagedSave

class Slow(CheckpointHandler):
    def stage(self, args):
        def write(directory):
            time.sleep(0.3)  # the main thread is over by now
            if args.fails:
                raise RuntimeError("the disk is on fire")
            (directory / "text").write_text("all of it")
        return StagedSave(write)
    def save(self, directory, args): self.stage(args).write(directory)
    def restore(self, directory, args=None): return (directory / "text").read_text()

@register_with_handler(Slow, for_save=True, for_restore=True)
class SlowArgs(CheckpointArgs):
    def __init__(self, fails=False): self.fails = fails

processes = {}
for name, body in json.load(sys.stdin).items():
    process = os.fork()
    if process == 0:
        break
    processes[process] = name
else:
    for process, name in processes.items():
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with open(f"{name}.code", "w") as file:
            file.write(str(code))
    sys.exit()

for stream, ending in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{name}.{ending}", os.O_CREAT | os.O_WRONLY, 0o666), stream)
path = f"{name}/c"
checkpointer = AsyncCheckpointer(Slow())
exec(body)
"""

PROGRAMS = {
    "ends": "checkpointer.save(path)",
    "exit 0": "checkpointer.save(path); sys.exit(0)",
    "exit 7": "checkpointer.save(path); sys.exit(7)",
    "forgets": "checkpointer.save(path); del checkpointer",
    "raises": "checkpointer.save(path); raise ValueError('of the training')",
    "interrupted": "checkpointer.save(path); signal.raise_signal(signal.SIGINT)",
    "at exit": "atexit.register(lambda: checkpointer.save(path))",
    "fails and ends": "checkpointer.save(path, True)",
    "fails and exits": "checkpointer.save(path, True); sys.exit(0)",
    "fails and forgets": "checkpointer.save(path, True); del checkpointer",
    "fails and is told": """
checkpointer.save(path, True)
try:
    checkpointer.close()
except RuntimeError:
    print("dealt with")
""",
    "interrupted while waiting": """
checkpointer.save(path)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    checkpointer.wait_until_finished()
except KeyboardInterrupt:
    print("interrupted, committed:", os.path.exists(path))
checkpointer.wait_until_finished()
print(checkpointer.restore(path))
""",
    "interrupted while waiting, and ends": """
checkpointer.save(path)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
checkpointer.wait_until_finished()
""",
}


@dataclasses.dataclass
class Ended:
    """How a program ended, and what it left."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def is_saved(self) -> bool:
        path = self.folder / "c"
        whole = (path / "commit_success.txt").exists() and (path / "text").read_text() == "all of it"
        return whole and os.listdir(self.folder) == ["c"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("programs")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", RUNNER]
    subprocess.run(
        command, input=json.dumps(PROGRAMS), env=environment, cwd=folder, text=True, timeout=DEADLINE_SECS, check=True
    )
    results = {}
    for name in PROGRAMS:
        out, err, code = ((folder / f"{name}.{ending}").read_text() for ending in ("out", "err", "code"))
        results[name] = Ended(folder / name, int(code), out, err)
    return results


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("ends", 0),
        ("exit 0", 0),
        ("exit 7", 7),
        ("forgets", 0),
        ("raises", 1),
        ("interrupted", -signal.SIGINT),
        ("at exit", 0),
        ("interrupted while waiting, and ends", -signal.SIGINT),
    ],
)
def test_program_that_ends_right_after_a_save_commits_it(ended: dict[str, Ended], program: str, code: int) -> None:
    """However Python ends a program right after an asynchronous save, the save is committed first."""
    assert ended[program].code == code, ended[program].err
    assert ended[program].is_saved


@pytest.mark.parametrize("program", ["fails and ends", "fails and exits", "fails and forgets"])
def test_program_whose_last_save_fails_says_so(ended: dict[str, Ended], program: str) -> None:
    """A program whose last save fails ends with a code that is not 0 and a message that names path and reason."""
    done = ended[program]
    assert done.code == 1
    message = f"ckpt_hooks: the background save of {done.folder / 'c'} failed: the disk is on fire"
    assert message in done.err.splitlines()
    assert os.listdir(done.folder) == []


def test_failure_that_was_told_does_not_end_the_program_badly(ended: dict[str, Ended]) -> None:
    """A failure that was raised and dealt with does not change the exit code."""
    done = ended["fails and is told"]
    assert (done.code, done.out) == (0, "dealt with\n"), done.err


def test_interrupt_does_not_lose_the_save(ended: dict[str, Ended]) -> None:
    """Ctrl-C while the main thread waits for a save ends the wait, not the save, for which one can wait again."""
    done = ended["interrupted while waiting"]
    assert (done.code, done.out) == (0, "interrupted, committed: False\nall of it\n"), done.err
    assert done.is_saved
