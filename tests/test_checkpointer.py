"""`Checkpointer`: one checkpoint, whole or not at all."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax.monitoring
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ckpt_hooks import (
    AsyncCheckpointer,
    AtomicRenameTemporaryPath,
    CheckpointArgs,
    Checkpointer,
    CheckpointHandler,
    CheckpointManager,
    CommitFileTemporaryPath,
    CompositeCheckpointHandler,
    FileOptions,
    JsonCheckpointHandler,
    MetadataStore,
    MultiprocessingOptions,
    StandardCheckpointHandler,
    TemporaryPath,
    args,
    errors,
    metadata_store,
    register_with_handler,
)
from ckpt_hooks.committed import is_temporary
from ckpt_hooks.storage import commit
from ckpt_hooks.storage.checksums import FileChecksums
from ckpt_hooks.temporary_paths import absolute_path
from tests.faulty import fail
from tests.sameness import bits

PREFIX = "/jax/ckpt_hooks/"
STANDARD_TYPESTR = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class NoteHandler(CheckpointHandler):
    """Saves a text, writes down what is asked of it, and fails where it is told to."""

    def __init__(self, log: list[str] | None = None, fails_in: str = "") -> None:
        self.log = [] if log is None else log
        self.fails_in = fails_in

    def _called(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails_in:
            raise RuntimeError(f"{name} fails")

    def save(self, directory: epath.Path, args: Any) -> None:
        (directory / "note").write_text(args.text)
        self._called("save")

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        self._called("restore")
        return (directory / "note").read_text() + args.suffix

    def finalize(self, directory: epath.Path) -> None:
        assert (directory / "note").exists()
        self._called("finalize")

    def close(self) -> None:
        self._called("close")


@register_with_handler(NoteHandler, for_save=True)
@dataclasses.dataclass
class NoteSave(CheckpointArgs):
    text: str
    unused: Any = None


@register_with_handler(NoteHandler, for_restore=True)
@dataclasses.dataclass
class NoteRestore(CheckpointArgs):
    suffix: str = ""


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is recorded under our prefix; of a barrier, the name before its number."""
    log: list[str] = []

    def on_event(event: str, **details: str | int) -> None:
        if event.startswith(PREFIX):
            log.append(event.removeprefix(PREFIX))

    def on_duration(event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith(PREFIX):
            key = str(details.get("key", ""))
            log.append(key.rpartition(".")[0] if key else event.removeprefix(PREFIX))

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    yield log
    jax.monitoring.unregister_event_listener(on_event)
    jax.monitoring.unregister_event_duration_listener(on_duration)


def read_step_file(path: Path) -> dict[str, Any]:
    content = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    assert isinstance(content, dict)
    return content


# ------------------------------------------------------------------ the constructor


def test_handler_is_the_one_that_was_given() -> None:
    """`handler` returns the very object that the checkpointer was made with."""
    handler = StandardCheckpointHandler()
    with Checkpointer(handler) as checkpointer:
        assert checkpointer.handler is handler


@pytest.mark.parametrize("make", [metadata_store, ocp.metadata.metadata_store], ids=["ours", "Orbax"])
def test_store_that_does_not_block_is_refused(make: Callable[..., Any]) -> None:
    """A synchronous checkpointer refuses a metadata store that writes in the background, also one of Orbax's."""
    store = make(enable_write=True, blocking_write=False)
    try:
        with pytest.raises(ValueError, match="blocks"):
            Checkpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store)
    finally:
        store.close()


def test_given_store_is_used(tmp_path: Path) -> None:
    """Step metadata go through the store that was given: a read-only one leaves no file."""
    store = metadata_store(enable_write=False)
    with Checkpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(2)})
        assert not (tmp_path / "c" / "_CHECKPOINT_METADATA").exists()


def test_process_that_takes_no_part_is_refused() -> None:
    """A process outside of `active_processes` cannot make a checkpointer."""
    options = MultiprocessingOptions(primary_host=1, active_processes={1})
    with pytest.raises(ValueError, match="active_processes"):
        Checkpointer(StandardCheckpointHandler(), multiprocessing_options=options)


def test_primary_must_take_part() -> None:
    """Options whose primary is not among the active processes are refused."""
    with pytest.raises(ValueError, match="primary_host"):
        MultiprocessingOptions(primary_host=0, active_processes={1})


def test_every_process_may_be_primary(tmp_path: Path) -> None:
    """`primary_host=None` makes this process primary, so it commits."""
    options = MultiprocessingOptions(primary_host=None, active_processes={0})
    with Checkpointer(NoteHandler(), multiprocessing_options=options) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        assert checkpointer.restore(tmp_path / "c") == "a"


def test_barrier_prefix_is_used(tmp_path: Path, log: list[str]) -> None:
    """`barrier_sync_key_prefix` is in front of the key of every barrier."""
    options = MultiprocessingOptions(barrier_sync_key_prefix="mine")
    with Checkpointer(NoteHandler(), multiprocessing_options=options) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
    barriers = [name for name in log if "Checkpointer:" in name]
    assert barriers and all(name.startswith("mine_Checkpointer:") for name in barriers)


def test_permission_mode_is_used(tmp_path: Path) -> None:
    """`path_permission_mode` is the mode of the checkpoint's directory, whatever the umask."""
    old = os.umask(0o077)
    try:
        with Checkpointer(NoteHandler(), file_options=FileOptions(path_permission_mode=0o751)) as checkpointer:
            checkpointer.save(tmp_path / "c", "a")
    finally:
        os.umask(old)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o751


def test_temporary_path_class_is_used(tmp_path: Path) -> None:
    """`temporary_path_class` decides how the commit is made, and where it is written before."""
    with Checkpointer(NoteHandler(), temporary_path_class=CommitFileTemporaryPath) as checkpointer:
        temporary = checkpointer.get_temporary_path(tmp_path / "c")
        assert isinstance(temporary, CommitFileTemporaryPath)
        checkpointer.save(tmp_path / "c", "a")
        assert checkpointer.restore(tmp_path / "c") == "a"
        (tmp_path / "c" / "commit_success.txt").unlink()
        with pytest.raises(errors.IncompleteCheckpointError):
            checkpointer.restore(tmp_path / "c")


class MovedPath(AtomicRenameTemporaryPath):
    """Commits without a word about what makes a checkpoint."""

    def finalize(self) -> None:
        self.get().rename(self.get_final())


class OwnPath(TemporaryPath):
    """Nothing of it is ours but the name."""

    def __init__(self, final: epath.Path) -> None:
        self._path, self._final_path = final.parent / f"{final.name}.orbax-checkpoint-tmp", final

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> Self:
        return cls(epath.Path(final_path))

    def create(self) -> epath.Path:
        self._path.mkdir()
        return self._path

    def get(self) -> epath.Path:
        return self._path

    def get_final(self) -> epath.Path:
        return self._final_path

    def finalize(self) -> None:
        self._path.rename(self._final_path)


class OrbaxStylePath(OwnPath):
    """Takes what Orbax gives, and no more."""

    @classmethod
    def from_final(  # type: ignore[override]
        cls, final_path: epath.Path, *, checkpoint_metadata_store: Any = None, file_options: Any = None
    ) -> Self:
        assert checkpoint_metadata_store is not None and file_options is not None
        return cls(final_path)


@pytest.mark.parametrize("path_class", [MovedPath, OwnPath, OrbaxStylePath])
@pytest.mark.parametrize("checkpointer_class", [Checkpointer, AsyncCheckpointer])
def test_a_commit_of_another_kind_is_whole(
    tmp_path: Path, checkpointer_class: type[Checkpointer], path_class: type[TemporaryPath]
) -> None:
    """A path class whose `finalize` is its own, and writes no metadata, makes checkpoints that are verified."""
    with checkpointer_class(StandardCheckpointHandler(), temporary_path_class=path_class) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(3)}, custom_metadata={"epoch": 1})
    found = read_step_file(tmp_path / "c")
    assert found["custom_metadata"] == {"epoch": 1} and "StandardCheckpointHandler" in found["item_handlers"]
    with Checkpointer(StandardCheckpointHandler()) as plain:
        np.testing.assert_array_equal(plain.restore(tmp_path / "c")["w"], np.arange(3))
        (tmp_path / "c" / "_METADATA").write_bytes(b"{}")
        with pytest.raises(errors.CorruptCheckpointError):
            plain.restore(tmp_path / "c")


class InPlacePath(CommitFileTemporaryPath):
    """Commits in place, in a way of its own."""

    def finalize(self) -> None:
        (self.get() / "commit_success.txt").write_text("")


@pytest.mark.parametrize("path_class", [InPlacePath, MovedPath, CommitFileTemporaryPath])
def test_what_fails_after_the_commit_does_not_remove_it(tmp_path: Path, path_class: type[TemporaryPath]) -> None:
    """A checkpoint that is there stays, in whatever way its path class has committed it."""
    with Checkpointer(StandardCheckpointHandler(), temporary_path_class=path_class) as checkpointer:
        final = checkpointer.get_temporary_path(tmp_path / "c").get_final()
        with pytest.raises(ZeroDivisionError):
            checkpointer.save_args(final, args.StandardSave({"w": np.arange(3)}), on_commit=lambda: 1 / 0)
        np.testing.assert_array_equal(checkpointer.restore(final)["w"], np.arange(3))


def test_a_path_class_of_ones_own_hides_no_error(tmp_path: Path) -> None:
    """What is there already is told, whatever the class has of ours."""
    (tmp_path / "c").mkdir()
    with (
        Checkpointer(NoteHandler(), temporary_path_class=OwnPath) as checkpointer,
        pytest.raises(errors.DestinationExistsError),
    ):
        checkpointer.save(tmp_path / "c", "a")


def test_get_temporary_path_says_where_a_save_goes(tmp_path: Path) -> None:
    """Who overrides it is asked by `save`."""

    class Elsewhere(Checkpointer):
        def get_temporary_path(self, directory: Any) -> TemporaryPath:
            return super().get_temporary_path(tmp_path / "elsewhere" / os.path.basename(directory))

    with Elsewhere(NoteHandler()) as checkpointer, pytest.raises(errors.CheckpointError, match="has not made"):
        checkpointer.save(tmp_path / "c", "a")


def test_a_commit_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    """A path class whose `finalize` forgets the checkpoint is named, and what it has written is removed."""

    class ForgetfulPath(AtomicRenameTemporaryPath):
        def finalize(self) -> None:
            pass

    says = r"ForgetfulPath\.finalize\(\) has not made the checkpoint"
    checkpointer = Checkpointer(NoteHandler(), temporary_path_class=ForgetfulPath)
    with checkpointer, pytest.raises(errors.CheckpointError, match=says):
        checkpointer.save(tmp_path / "c", "a")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ three forms of arguments


@pytest.mark.parametrize(
    ("positional", "keywords"),
    [
        ((), {"args": NoteSave("a")}),
        ((NoteSave("a"),), {}),
        (("a",), {}),
        (("a", 3), {}),
        ((), {"text": "a"}),
        (("a",), {"unused": 3}),
    ],
)
def test_save_takes_its_arguments_in_three_forms(
    tmp_path: Path, positional: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """An args object, positional arguments and keyword arguments save the same."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", *positional, **keywords)
        assert checkpointer.restore(tmp_path / "c") == "a"


@pytest.mark.parametrize(
    ("positional", "keywords", "expected"),
    [
        ((), {}, "a"),
        ((), {"args": NoteRestore("!")}, "a!"),
        ((NoteRestore("!"),), {}, "a!"),
        (("!",), {}, "a!"),
        ((), {"suffix": "!"}, "a!"),
    ],
)
def test_restore_takes_its_arguments_in_three_forms(
    tmp_path: Path, positional: tuple[Any, ...], keywords: dict[str, Any], expected: str
) -> None:
    """An args object, positional arguments and keyword arguments restore the same."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        assert checkpointer.restore(tmp_path / "c", *positional, **keywords) == expected


@pytest.mark.parametrize("call", [{"nonsense": 1}, {"text": "a", "text2": "b"}, {}])
def test_wrong_arguments_are_named(tmp_path: Path, call: dict[str, Any]) -> None:
    """Arguments that the args class does not take are a TypeError that shows what it takes."""
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(TypeError, match=r"NoteSave\(text"):
        checkpointer.save(tmp_path / "c", **call)
    assert os.listdir(tmp_path) == []


def test_the_destination_is_looked_at_before_the_arguments(tmp_path: Path) -> None:
    """Where something is there, or nothing, that is the error, and not that the arguments do not fit."""
    with Checkpointer(NoteHandler()) as checkpointer:
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpointer.restore(tmp_path / "c", nonsense=1)
        checkpointer.save(tmp_path / "c", "old")
        with pytest.raises(ValueError, match="already exists"):
            checkpointer.save(tmp_path / "c", nonsense=1)
        with pytest.raises(TypeError, match="nonsense"):
            checkpointer.save(tmp_path / "c", nonsense=1, force=True)
        assert checkpointer.restore(tmp_path / "c") == "old"


def test_args_of_another_handler_are_refused(tmp_path: Path) -> None:
    """Args that are registered with another handler are a TypeError, before anything is written."""
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(TypeError, match="StandardCheckpointHandler"):
        checkpointer.save(tmp_path / "c", args=args.StandardSave({"w": 1}))
    assert os.listdir(tmp_path) == []


class Unregistered(CheckpointArgs):
    text, suffix = "u", "!"


def test_args_that_nobody_registered_are_the_handlers_own(tmp_path: Path) -> None:
    """Args that are registered with no handler go as they are to a handler that has registered others."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=Unregistered())
        assert checkpointer.restore(tmp_path / "c", Unregistered()) == "u!"


class OldNoteHandler:
    def save(self, directory: epath.Path, text: str) -> None:
        (directory / "note").write_text(text)

    def restore(self, directory: epath.Path) -> str:
        return (directory / "note").read_text()


@pytest.mark.parametrize("handler", [OldNoteHandler, CompositeCheckpointHandler])
def test_args_that_nobody_registered_are_refused(tmp_path: Path, handler: type) -> None:
    """A handler without args classes cannot know them, nor can a composite: a ValueError says how to register them."""
    with Checkpointer(handler()) as checkpointer, pytest.raises(ValueError, match="register_with_handler"):
        checkpointer.save(tmp_path / "c", args=Unregistered())
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ the order of steps


def test_save_goes_in_order(tmp_path: Path, log: list[str]) -> None:
    """Barriers, handler calls and events of a save come in the order of the contract."""
    with Checkpointer(NoteHandler(log)) as checkpointer:
        log.clear()
        checkpointer.save(tmp_path / "c", "a")
        steps = [name for name in log if not name.endswith("_duration_secs")]
    assert steps == [
        "write/start",
        "Checkpointer:save_start",
        "Checkpointer:create_tmp_directory:pre",
        "Checkpointer:create_tmp_directory:post",
        "save",
        "Checkpointer:save",
        "finalize",
        "Checkpointer:finalize",
        "write/success",
    ]


def test_restore_goes_in_order(tmp_path: Path, log: list[str]) -> None:
    """A restore tells of its start, restores, tells of its success and passes its barrier."""
    with Checkpointer(NoteHandler(log)) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        log.clear()
        checkpointer.restore(tmp_path / "c")
        assert log == ["read/start", "restore", "read/success", "read/total_duration_secs", "Checkpointer:restore"]


def test_save_is_timed(tmp_path: Path, log: list[str]) -> None:
    """A save reports how long it took, in total and by phase."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
    phases = {f"write/{phase}_duration_secs" for phase in ("stage", "directory", "items", "commit", "total")}
    assert phases <= set(log)


def test_barriers_of_two_saves_never_mix(tmp_path: Path) -> None:
    """Every operation has barrier keys of its own."""
    keys: list[str] = []

    def on_duration(event: str, duration_secs: float, **details: str | int) -> None:
        if event == f"{PREFIX}barrier_duration_secs":
            keys.append(str(details["key"]))

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        with Checkpointer(NoteHandler()) as checkpointer:
            checkpointer.save(tmp_path / "1", "a")
            checkpointer.save(tmp_path / "2", "a")
            checkpointer.restore(tmp_path / "1")
            checkpointer.restore(tmp_path / "2")
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    assert len(keys) == 2 * 6
    assert len(set(keys)) == len(keys)


def test_operation_ids_are_shared(tmp_path: Path) -> None:
    """Every checkpointer of a process takes its operation ids from one counter."""
    with Checkpointer(NoteHandler()) as one, Checkpointer(NoteHandler()) as other:
        first = one.synchronize_next_awaitable_signal_operation_id()
        assert other.synchronize_next_awaitable_signal_operation_id() == first + 1
        one.save(tmp_path / "c", "a")
        assert other.synchronize_next_awaitable_signal_operation_id() == first + 3


@pytest.mark.parametrize("fails_in", ["save", "finalize"])
def test_failed_save_tells_and_leaves_nothing(
    tmp_path: Path, log: list[str], fails_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that fails emits an event, logs the path and the reason, and removes what it wrote."""
    with Checkpointer(NoteHandler(fails_in=fails_in)) as checkpointer:
        with pytest.raises(RuntimeError, match=f"{fails_in} fails"):
            checkpointer.save(tmp_path / "c", "a")
        assert os.listdir(tmp_path) == []
        assert "write/failure" in log
        assert "write/success" not in log
        assert str(tmp_path / "c") in caplog.text and f"{fails_in} fails" in caplog.text
        checkpointer.handler.fails_in = ""
        checkpointer.save(tmp_path / "c", "b")
        assert checkpointer.restore(tmp_path / "c") == "b"


@pytest.mark.parametrize("function", ["sync_tree", "publish", "sync_directory"])
def test_failed_sync_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Where a sync or the rename fails, the save fails and there is no checkpoint."""
    with Checkpointer(NoteHandler()) as checkpointer:
        with monkeypatch.context() as broken:
            fail(broken, commit, function, errno.EIO)
            with pytest.raises(OSError, match="Input/output error"):
                checkpointer.save(tmp_path / "c", "a")
        assert os.listdir(tmp_path) == []
        checkpointer.save(tmp_path / "c", "b")


def test_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up during a save is a DiskFullError, and the partial files are gone."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        with monkeypatch.context() as full:
            fail(full, commit, "write_file", errno.ENOSPC)
            with pytest.raises(errors.DiskFullError, match="free some space"):
                checkpointer.save(tmp_path / "c", {"w": np.arange(3)})
        assert os.listdir(tmp_path) == []
        checkpointer.save(tmp_path / "c", {"w": np.arange(3)})


def test_too_little_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that cannot fit is refused before a directory is made."""
    real = os.statvfs(tmp_path)
    almost_full = os.statvfs_result((*real[:3], 0, 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: almost_full)
    with Checkpointer(StandardCheckpointHandler()) as checkpointer, pytest.raises(errors.DiskFullError, match="free"):
        checkpointer.save(tmp_path / "parent" / "c", {"w": np.arange(3)})
    assert os.listdir(tmp_path) == []


def test_failed_restore_tells(tmp_path: Path, log: list[str]) -> None:
    """A restore that fails emits an event of failure and none of success."""
    with Checkpointer(NoteHandler(fails_in="restore")) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        with pytest.raises(RuntimeError, match="restore fails"):
            checkpointer.restore(tmp_path / "c")
    assert "read/failure" in log
    assert "read/success" not in log


# ------------------------------------------------------------------ the destination


def test_existing_destination_is_refused(tmp_path: Path) -> None:
    """A save to a checkpoint that is there is a ValueError, and leaves it as it is."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "old")
        with pytest.raises(errors.DestinationExistsError, match=r"already exists.*force=True") as caught:
            checkpointer.save(tmp_path / "c", "new")
        assert isinstance(caught.value, ValueError)
        assert checkpointer.restore(tmp_path / "c") == "old"
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("force", [False, True])
def test_destination_that_is_a_file_is_refused(tmp_path: Path, force: bool) -> None:
    """A file at the destination is never replaced, with or without force."""
    (tmp_path / "c").write_text("precious")
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(ValueError, match="is a file"):
        checkpointer.save(tmp_path / "c", "a", force=force)
    assert (tmp_path / "c").read_text() == "precious"
    assert os.listdir(tmp_path) == ["c"]


def test_parent_that_is_a_file_is_explained(tmp_path: Path) -> None:
    """A parent that is a file is an error that names the path and what to do."""
    (tmp_path / "parent").write_text("precious")
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(OSError, match=r"parent.*Choose|parent"):
        checkpointer.save(tmp_path / "parent" / "c", "a")
    assert (tmp_path / "parent").read_text() == "precious"


def test_parents_are_made(tmp_path: Path) -> None:
    """Parents of the destination that are missing are made."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "a" / "b" / "c", "a")
        assert checkpointer.restore(tmp_path / "a" / "b" / "c") == "a"


def test_relative_path_means_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is taken from the working directory at the time of the call."""
    monkeypatch.chdir(tmp_path)
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save("runs/c", {"w": np.arange(2)})
        assert (tmp_path / "runs" / "c" / "_METADATA").is_file()
        monkeypatch.chdir("runs")
        np.testing.assert_array_equal(checkpointer.restore("c")["w"], [0, 1])


@pytest.mark.parametrize("path", ["gs://bucket/c", "s3://bucket/c"])
def test_path_that_is_no_directory_is_refused(path: str) -> None:
    """A URL of an object store is refused by name."""
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(ValueError, match="://bucket/c"):
        checkpointer.save(path, "a")


@pytest.mark.parametrize("top", ["gs", "s3", "az", "runs"])
def test_a_directory_that_is_named_like_an_address_is_one(tmp_path: Path, top: str) -> None:
    """What is mounted at /s3 is no bucket: epath's own path of it is the address of one, and no directory here."""
    found = absolute_path(f"/{top}/runs")
    assert os.path.normpath(os.fspath(found)).lstrip("/") == f"{top}/runs" and "://" not in os.fspath(found)
    assert absolute_path(found) == found
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(errors.CheckpointNotFoundError, match=f"/{top}/"):
        checkpointer.restore(f"/{top}/runs/of/{tmp_path.name}")


def test_a_path_behind_two_slashes_is_the_same(tmp_path: Path) -> None:
    """A path that epath would take for an address is used with two slashes before it: a run is the same one there."""
    state = {"params": {"w": np.arange(3)}, "step": 1}
    with CheckpointManager(f"/{tmp_path}") as manager:
        manager.save(1, state)
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1]
        manager.save(2, state)
    with CheckpointManager(f"/{tmp_path}") as manager:
        assert manager.restore(step=2)["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1", "2"]


# ------------------------------------------------------------------ force


@pytest.mark.parametrize("kind", [AtomicRenameTemporaryPath, CommitFileTemporaryPath])
def test_force_replaces_a_checkpoint(tmp_path: Path, kind: Any) -> None:
    """With force the new checkpoint takes the place of the old one, of which nothing is left."""
    with Checkpointer(NoteHandler(), temporary_path_class=kind) as checkpointer:
        checkpointer.save(tmp_path / "c", "old")
        checkpointer.save(tmp_path / "c", "new", force=True)
        assert checkpointer.restore(tmp_path / "c") == "new"
    assert os.listdir(tmp_path) == ["c"]


def test_force_without_an_old_checkpoint(tmp_path: Path) -> None:
    """Force is no error where there is nothing, nor where there is an empty directory."""
    (tmp_path / "empty").mkdir()
    with Checkpointer(NoteHandler()) as checkpointer:
        for name in ("new", "empty"):
            checkpointer.save(tmp_path / name, "a", force=True)
            assert checkpointer.restore(tmp_path / name) == "a"


def test_old_one_stays_until_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a forced save runs, and when its bytes are being synced, the old checkpoint is at its place."""
    seen: list[str] = []
    sync_tree = commit.sync_tree

    def look(directory: str, is_others: Any = None) -> None:
        seen.append((tmp_path / "c" / "note").read_text())
        sync_tree(directory, is_others)

    monkeypatch.setattr(commit, "sync_tree", look)
    with Checkpointer(NoteHandler()) as checkpointer:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "note").write_text("old")
        (tmp_path / "c" / "_CHECKPOINT_METADATA").write_text("{}")
        (tmp_path / "c" / "commit_success.txt").write_text("")
        checkpointer.save(tmp_path / "c", "new", force=True)
    assert seen == ["old"]


@pytest.mark.parametrize("kind", [AtomicRenameTemporaryPath, CommitFileTemporaryPath])
@pytest.mark.parametrize("fails_in", ["save", "finalize", "sync"])
def test_failing_forced_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, fails_in: str
) -> None:
    """A forced save that fails at any point leaves the old checkpoint, and nothing that passes for another one."""
    with Checkpointer(NoteHandler(), temporary_path_class=kind) as checkpointer:
        checkpointer.save(tmp_path / "c", "old")
        checkpointer.handler.fails_in = fails_in
        with monkeypatch.context() as broken:
            if fails_in == "sync":
                fail(broken, commit, "sync_directory", errno.EIO)
            with pytest.raises((RuntimeError, OSError)):
                checkpointer.save(tmp_path / "c", "new", force=True)
        checkpointer.handler.fails_in = ""
        assert checkpointer.restore(tmp_path / "c") == "old"
    assert [name for name in os.listdir(tmp_path) if not is_temporary(name)] == ["c"]
    assert len(os.listdir(tmp_path)) == 1 or fails_in == "sync", "only what no sync has made safe to remove stays"


def test_force_keeps_an_old_checkpoint_that_has_no_marker(tmp_path: Path) -> None:
    """A checkpoint of an Orbax that wrote no marker also stays when a forced save in place fails."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "_METADATA").write_text("{}")
    handler = NoteHandler(fails_in="save")
    checkpointer = Checkpointer(handler, temporary_path_class=CommitFileTemporaryPath)
    with pytest.raises(RuntimeError, match="save fails"):
        checkpointer.save(tmp_path / "c", "new", force=True)
    assert os.listdir(tmp_path / "c") == ["_METADATA"]


def test_directory_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """Force does not remove a directory that holds something else than a checkpoint."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("precious")
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(ValueError, match="is no checkpoint"):
        checkpointer.save(tmp_path / "photos", "a", force=True)
    assert (tmp_path / "photos" / "1.jpg").read_text() == "precious"


# ------------------------------------------------------------------ custom metadata, step metadata


def test_custom_metadata_come_back(tmp_path: Path) -> None:
    """JSON of every kind in custom_metadata is read back by `metadata`."""
    custom = {"epoch": 3, "lr": 0.1, "tags": ["a", None], "nested": {"x": True}, "pair": (1, 2)}
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(2)}, custom_metadata=custom)
        assert checkpointer.metadata(tmp_path / "c").custom_metadata == {**custom, "pair": [1, 2]}


@pytest.mark.parametrize(
    ("custom", "error"),
    [
        ([("a", 1)], ValueError),
        ("text", ValueError),
        ({1: "a"}, ValueError),
        ({"a": np.arange(2)}, TypeError),
        ({"a": {"b": [1, {2}]}}, TypeError),
        ({"a": {1: "b"}}, TypeError),
        ({"a": b"bytes"}, TypeError),
    ],
)
def test_custom_metadata_that_are_not_json_are_refused_first(tmp_path: Path, custom: Any, error: type) -> None:
    """What JSON cannot hold in custom_metadata is refused before anything is written or asked of the handler."""
    handler = NoteHandler()
    with Checkpointer(handler) as checkpointer:
        with pytest.raises(error, match="custom_metadata"):
            checkpointer.save(tmp_path / "parent" / "c", "a", custom_metadata=custom)
        assert handler.log == []
    assert os.listdir(tmp_path) == []


def test_metadata_of_a_checkpoint(tmp_path: Path) -> None:
    """`metadata` has the shapes and dtypes of a pytree, its handler's name, and both times."""
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.zeros((2, 3), np.float32)})
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.item_metadata["w"].shape == (2, 3)
    assert metadata.item_metadata["w"].dtype == np.float32
    assert metadata.item_handlers == STANDARD_TYPESTR
    assert metadata.metrics == {} and metadata.performance_metrics == {} and metadata.custom_metadata == {}
    assert metadata.init_timestamp_nsecs is not None and metadata.commit_timestamp_nsecs is not None
    assert metadata.init_timestamp_nsecs <= metadata.commit_timestamp_nsecs


class MemoryStore(MetadataStore):
    """Keeps step metadata in memory, by the name of the checkpoint."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def write(self, file_path: Any, metadata: Any) -> None:
        self.kept[Path(file_path).parent.name.partition(".")[0]] = dict(metadata)

    def update(self, file_path: Any, **fields: Any) -> None:
        self.write(file_path, {**(self.read(file_path) or {}), **fields})

    def read(self, file_path: Any) -> dict[str, Any] | None:
        return self.kept.get(Path(file_path).parent.name.partition(".")[0])


def test_given_store_is_asked_for_the_metadata(tmp_path: Path) -> None:
    """What a store of the user's keeps elsewhere comes back from it, and what it does not have from the file."""
    Checkpointer(StandardCheckpointHandler()).save(tmp_path / "a", {"w": 1}, custom_metadata={"epoch": 1})
    store = MemoryStore()
    with Checkpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        checkpointer.save(tmp_path / "b", {"w": 1}, custom_metadata={"epoch": 2})
        assert not (tmp_path / "b" / "_CHECKPOINT_METADATA").exists()
        assert [checkpointer.metadata(tmp_path / name).custom_metadata for name in "ab"] == [{"epoch": 1}, {"epoch": 2}]
        assert checkpointer.metadata(tmp_path / "b").item_handlers == STANDARD_TYPESTR


@pytest.mark.parametrize("make", [metadata_store, ocp.metadata.metadata_store], ids=["ours", "Orbax"])
def test_damaged_metadata_are_no_empty_ones(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Step metadata that cannot be read are told, also where the store that was given says nothing of it."""
    store = make(enable_write=True, blocking_write=True)
    with Checkpointer(StandardCheckpointHandler(), checkpoint_metadata_store=store) as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": 1})
        (tmp_path / "c" / "_CHECKPOINT_METADATA").write_text("{")
        with pytest.raises(errors.CorruptCheckpointError, match="_CHECKPOINT_METADATA"):
            checkpointer.metadata(tmp_path / "c")


def test_handler_without_metadata_is_no_error(tmp_path: Path) -> None:
    """Where the handler describes no metadata, the rest of the step metadata is there and its part is None."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a", custom_metadata={"epoch": 1})
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.item_metadata is None
    assert metadata.custom_metadata == {"epoch": 1}


@pytest.mark.parametrize("error", [FileNotFoundError, NotImplementedError, ValueError, TypeError])
def test_handler_whose_metadata_fail_is_no_error(tmp_path: Path, error: type[Exception]) -> None:
    """The errors that Orbax forgives a handler's `metadata` are logged, not raised."""

    class Failing(NoteHandler):
        def metadata(self, directory: epath.Path) -> Any:
            raise error("no idea")

    with Checkpointer(Failing()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        assert checkpointer.metadata(tmp_path / "c").item_metadata is None


def test_initial_metadata_are_there_while_writing(tmp_path: Path) -> None:
    """When the handler writes, the step metadata hold the time of the beginning and nothing else."""
    seen: list[dict[str, Any]] = []

    class Looking(NoteHandler):
        def save(self, directory: epath.Path, args: Any) -> None:
            seen.append(read_step_file(Path(os.fspath(directory))))
            super().save(directory, args)

    with Checkpointer(Looking()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a", custom_metadata={"epoch": 1})
    (initial,) = seen
    assert isinstance(initial["init_timestamp_nsecs"], int)
    assert initial["commit_timestamp_nsecs"] is None
    assert initial["item_handlers"] is None and initial["custom_metadata"] == {}


def test_step_metadata_have_exactly_orbax_fields(tmp_path: Path) -> None:
    """The metadata file has Orbax's six top-level keys and no other."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a", custom_metadata={"epoch": 1})
    assert set(read_step_file(tmp_path / "c")) == {
        "item_handlers",
        "metrics",
        "performance_metrics",
        "init_timestamp_nsecs",
        "commit_timestamp_nsecs",
        "custom_metadata",
    }


@pytest.mark.parametrize(
    ("handler", "value", "typestr"),
    [
        (StandardCheckpointHandler(), {"w": 1}, STANDARD_TYPESTR),
        (
            JsonCheckpointHandler(),
            {"a": 1},
            "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
        ),
        (NoteHandler(), "a", f"{__name__}.NoteHandler"),
    ],
)
def test_handler_is_recorded_by_name(tmp_path: Path, handler: Any, value: Any, typestr: str) -> None:
    """The recorded name of a handler is Orbax's where Orbax has it, else the class's own."""
    with Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "c", value)
    assert read_step_file(tmp_path / "c")["item_handlers"] == typestr


def test_handlers_of_a_composite_are_recorded_by_item(tmp_path: Path) -> None:
    """A composite records {item: name of its handler}."""
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=args.Composite(note=NoteSave("a"), tree=args.StandardSave({"w": 1})))
    recorded = read_step_file(tmp_path / "c")["item_handlers"]
    assert recorded == {"note": f"{__name__}.NoteHandler", "tree": STANDARD_TYPESTR}


# ------------------------------------------------------------------ what is not there


def test_missing_checkpoint(tmp_path: Path) -> None:
    """A path where there is nothing is a FileNotFoundError, for `restore` and for `metadata`."""
    with Checkpointer(NoteHandler()) as checkpointer:
        for ask in (checkpointer.restore, checkpointer.metadata):
            with pytest.raises(FileNotFoundError, match="no checkpoint"):
                ask(tmp_path / "c")
    assert os.listdir(tmp_path) == []


def test_file_is_no_checkpoint(tmp_path: Path) -> None:
    """A path that is a file is a FileNotFoundError."""
    (tmp_path / "c").write_text("")
    with Checkpointer(NoteHandler()) as checkpointer, pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpointer.restore(tmp_path / "c")


def test_incomplete_checkpoint(tmp_path: Path) -> None:
    """A directory that was never committed is a ValueError that says so, for `restore` and for `metadata`."""
    with Checkpointer(NoteHandler()) as checkpointer:
        temporary = checkpointer.get_temporary_path(tmp_path / "c")
        (temporary.create() / "note").write_text("a")
        for ask in (checkpointer.restore, checkpointer.metadata):
            with pytest.raises(ValueError, match="Found incomplete checkpoint"):
                ask(tmp_path / "c.orbax-checkpoint-tmp")
        (tmp_path / "c.orbax-checkpoint-tmp").rename(tmp_path / "d")  # as by a copy: no marker, no commit time
        with pytest.raises(ValueError, match="Found incomplete checkpoint"):
            checkpointer.restore(tmp_path / "d")


def test_damage_outside_of_the_arrays_is_found(tmp_path: Path) -> None:
    """A changed byte in any file that a handler wrote is a CorruptCheckpointError."""
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        (tmp_path / "c" / "note").write_text("b")
        with pytest.raises(errors.CorruptCheckpointError, match="note"):
            checkpointer.restore(tmp_path / "c")


def test_what_was_checked_is_what_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that becomes another one between the check and its use is not read again."""
    state = {"w": np.arange(300.0), "note": "as it was saved"}
    with Checkpointer(StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        check = FileChecksums.check

        def check_and_damage(checksums: FileChecksums, directory: str, below: str | None = None) -> None:
            check(checksums, directory, below)
            for name in checksums.files:
                (Path(directory) / name).write_bytes(b"damaged")

        with monkeypatch.context() as patch:
            patch.setattr(FileChecksums, "check", check_and_damage)
            restored = checkpointer.restore(tmp_path / "c")
        assert bits(restored) == bits(state)
        with pytest.raises(errors.CorruptCheckpointError, match="_METADATA"):
            checkpointer.restore(tmp_path / "c")


# ------------------------------------------------------------------ temporary paths


def test_temporary_path_is_only_a_name(tmp_path: Path) -> None:
    """`get_temporary_path` makes nothing, and names the same path every time."""
    with Checkpointer(NoteHandler()) as checkpointer:
        temporary = checkpointer.get_temporary_path(tmp_path / "c")
        assert isinstance(temporary, AtomicRenameTemporaryPath)
        assert os.fspath(temporary.get_final()) == os.fspath(tmp_path / "c")
        with pytest.raises(ValueError, match="create"):
            temporary.get()
    assert os.listdir(tmp_path) == []


def test_temporary_path_can_be_created_and_finalized(tmp_path: Path, log: list[str]) -> None:
    """`create_temporary_path` makes the directory between its two barriers; `finalize` makes it the checkpoint."""
    with Checkpointer(NoteHandler()) as checkpointer:
        temporary = checkpointer.get_temporary_path(tmp_path / "c")
        log.clear()
        path = asyncio.run(checkpointer.create_temporary_path(temporary))
        assert log == ["Checkpointer:create_tmp_directory:pre", "Checkpointer:create_tmp_directory:post"]
        assert path == temporary.get() and path.is_dir()
        assert path.name == "c.orbax-checkpoint-tmp"
        (path / "note").write_text("by hand")
        temporary.finalize()
        assert checkpointer.restore(tmp_path / "c") == "by hand"
    assert os.listdir(tmp_path) == ["c"]


def test_what_a_dead_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A temporary directory of the same name that nobody holds is removed by the next save."""
    stale = tmp_path / "c.orbax-checkpoint-tmp"
    stale.mkdir()
    (stale / "garbage").write_text("x")
    with Checkpointer(NoteHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
    assert os.listdir(tmp_path) == ["c"]
    assert not (tmp_path / "c" / "garbage").exists()


# ------------------------------------------------------------------ closing


def test_close_closes_the_handler() -> None:
    """`close` closes the handler."""
    handler = NoteHandler()
    Checkpointer(handler).close()
    assert handler.log == ["close"]


def test_close_closes_the_store() -> None:
    """`close` closes the metadata store that was given."""
    closed: list[str] = []

    class Store(MetadataStore):
        def write(self, file_path: Any, metadata: Any) -> None:
            del file_path, metadata

        def update(self, file_path: Any, **fields: Any) -> None:
            del file_path, fields

        def close(self) -> None:
            closed.append("store")

    Checkpointer(NoteHandler(), checkpoint_metadata_store=Store()).close()
    assert closed == ["store"]


def test_leaving_the_block_closes(tmp_path: Path) -> None:
    """The context manager closes, also when the block raises, whose error comes out."""
    handler = NoteHandler(fails_in="save")
    with pytest.raises(RuntimeError, match="save fails"), Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
    assert handler.log == ["save", "close"]
