"""Args classes and the handlers they are registered with; handlers that never registered any; users' own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from ckpt_hooks import (
    AsyncCheckpointer,
    CheckpointArgs,
    Checkpointer,
    CheckpointHandler,
    CompositeCheckpointHandler,
    IteratorCheckpointHandler,
    JsonCheckpointHandler,
    StandardCheckpointHandler,
    args,
    construct_checkpoint_args,
    errors,
    register_with_handler,
)
from ckpt_hooks.handlers.base import (
    StagedSave,
    get_handler_type,
    get_registered_args_cls,
    get_registered_handler_cls,
    has_registered_args,
)

DEADLINE_SECS = 60


class TextHandler(CheckpointHandler):
    """Saves a text while the caller waits."""

    def save(self, directory: epath.Path, args: Any) -> None:
        (directory / "text").write_text(args.text)

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        return (directory / "text").read_text()


@register_with_handler(TextHandler, for_save=True)
@dataclasses.dataclass
class TextSave(CheckpointArgs):
    text: str


@register_with_handler(TextHandler, for_restore=True)
@dataclasses.dataclass
class TextRestore(CheckpointArgs):
    pass


class FuturesHandler:
    """Saves as an asynchronous handler of Orbax's does, and derives from nothing of ours."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.finished = 0
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    async def async_save(self, directory: epath.Path, args: Any) -> list[concurrent.futures.Future[None]]:
        await asyncio.sleep(0)
        texts = list(args.texts)  # taken now
        return [self._pool.submit(self._write, directory, number, text) for number, text in enumerate(texts)]

    def _write(self, directory: epath.Path, number: int, text: str) -> None:
        assert self.gate.wait(DEADLINE_SECS)
        if self.error is not None and number == 0:
            raise self.error
        (directory / str(number)).write_text(text)
        self.finished += 1

    def save(self, directory: epath.Path, args: Any) -> None:
        raise AssertionError("an asynchronous handler is saved with async_save")

    def restore(self, directory: epath.Path, args: Any = None) -> list[str]:
        return [path.read_text() for path in sorted(directory.iterdir()) if path.name.isdigit()]

    def metadata(self, directory: epath.Path) -> None:
        return None

    def finalize(self, directory: epath.Path) -> None:
        assert self.finished > 0 or self.error is not None

    def close(self) -> None:
        self._pool.shutdown()


@register_with_handler(FuturesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FuturesArgs(CheckpointArgs):
    texts: list[str] = dataclasses.field(default_factory=list)


class StagedHandler(CheckpointHandler):
    """Saves in our way: takes what it needs in `stage`, writes later."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def stage(self, args: Any) -> StagedSave:
        text = "".join(args.texts)

        def write(directory: epath.Path) -> None:
            assert self.gate.wait(DEADLINE_SECS)
            (directory / "text").write_text(text)

        return StagedSave(write, nbytes=len(text))

    def save(self, directory: epath.Path, args: Any) -> None:
        self.stage(args).write(directory)

    def restore(self, directory: epath.Path, args: Any = None) -> list[str]:
        return list((directory / "text").read_text())


@register_with_handler(StagedHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class StagedArgs(CheckpointArgs):
    texts: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------ registering


def test_registration_must_be_for_something() -> None:
    """Args that are registered neither to save nor to restore with are a ValueError."""
    with pytest.raises(ValueError, match="for_save"):
        register_with_handler(TextHandler)


@pytest.mark.parametrize("decorated", [dict, object(), lambda: None])
def test_only_args_classes_can_be_registered(decorated: Any) -> None:
    """What is no subclass of CheckpointArgs is a TypeError, and is not registered."""
    with pytest.raises(TypeError, match="CheckpointArgs"):
        register_with_handler(TextHandler, for_save=True)(decorated)
    assert get_registered_args_cls(TextHandler) == (TextSave, TextRestore)


def test_name_of_another_handler_is_refused() -> None:
    """Two different classes cannot have one handler name."""

    class Thief(TextHandler):
        @classmethod
        def typestr(cls) -> str:
            return TextHandler.typestr()

    with pytest.raises(ValueError, match="belongs to"):
        register_with_handler(Thief, for_save=True)
    assert get_handler_type(TextHandler.typestr()) is TextHandler


def test_class_that_is_defined_again_replaces_the_old_one() -> None:
    """A handler class that is created anew, as when a notebook's cell runs twice, takes over its name."""

    def define() -> type:
        class Cell(TextHandler):
            pass

        @register_with_handler(Cell, for_save=True, for_restore=True)
        @dataclasses.dataclass
        class CellArgs(CheckpointArgs):
            text: str = ""

        return Cell

    first, second = define(), define()
    assert first is not second
    assert get_handler_type(second.typestr()) is second  # type: ignore[attr-defined]


def test_handler_of_args() -> None:
    """An args class, and an object of it, lead to the handler class."""
    assert get_registered_handler_cls(TextSave) is TextHandler
    assert get_registered_handler_cls(TextRestore()) is TextHandler
    assert get_registered_handler_cls(args.StandardSave({})) is StandardCheckpointHandler
    assert get_registered_handler_cls(args.JsonRestore) is JsonCheckpointHandler
    assert get_registered_handler_cls(args.IteratorSave) is IteratorCheckpointHandler
    assert get_registered_handler_cls(args.Composite()) is CompositeCheckpointHandler


def test_handler_of_what_is_no_args() -> None:
    """What is no CheckpointArgs is a TypeError."""
    for value in (dict, {"w": 1}):
        with pytest.raises(TypeError, match="CheckpointArgs"):
            get_registered_handler_cls(value)  # type: ignore[arg-type]


def test_handler_of_args_that_are_not_registered() -> None:
    """An args class that was never registered is a ValueError that says how."""

    class Unregistered(CheckpointArgs):
        pass

    with pytest.raises(ValueError, match="register_with_handler"):
        get_registered_handler_cls(Unregistered)


def test_args_of_a_handler() -> None:
    """A handler, and its class, lead to the (save, restore) args classes."""
    assert get_registered_args_cls(TextHandler) == (TextSave, TextRestore)
    assert get_registered_args_cls(TextHandler()) == (TextSave, TextRestore)
    assert get_registered_args_cls(StagedHandler) == (StagedArgs, StagedArgs)
    assert has_registered_args(TextHandler())


def test_first_registration_is_the_one_for_positional_arguments() -> None:
    """Of several args classes of a handler, the one registered first is the one found."""

    @register_with_handler(TextHandler, for_save=True, for_restore=True)
    class Later(CheckpointArgs):
        pass

    assert get_registered_args_cls(TextHandler) == (TextSave, TextRestore)
    assert get_registered_handler_cls(Later) is TextHandler


@pytest.mark.parametrize("half", ["for_save", "for_restore"])
def test_handler_with_half_of_its_args(half: str) -> None:
    """A handler that can only be saved, or only be restored, is a ValueError that names what is missing."""

    class Half:
        pass

    @register_with_handler(Half, **{half: True})
    class HalfArgs(CheckpointArgs):
        pass

    with pytest.raises(ValueError, match="restore" if half == "for_save" else "save"):
        get_registered_args_cls(Half)
    assert not has_registered_args(Half)


# ------------------------------------------------------------------ names of handlers


@pytest.mark.parametrize(
    ("typestr", "expected"),
    [
        ("orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler", "Standard"),
        ("orbax.checkpoint.v0._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler", "Standard"),
        ("orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler", "Standard"),
        ("orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler", "Standard"),
        ("orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler", "Json"),
        ("orbax.checkpoint.experimental.v1._src.handlers.json_handler.MetricsHandler", "Json"),
    ],
)
def test_names_that_orbax_records_are_known(typestr: str, expected: str) -> None:
    """The names under which every version of Orbax records its handlers lead to ours."""
    assert get_handler_type(typestr).__name__ == f"{expected}CheckpointHandler"


def test_name_of_users_handler_is_its_qualified_name() -> None:
    """A handler without a name of its own is known by module and class, also one that derives from nothing."""
    assert TextHandler.typestr() == f"{__name__}.TextHandler"
    assert get_handler_type(f"{__name__}.TextHandler") is TextHandler
    assert get_handler_type(f"{__name__}.FuturesHandler") is FuturesHandler


@pytest.mark.parametrize("typestr", ["", "nobody.knows.Handler", "orbax.checkpoint.NoSuchHandler", "TextHandler"])
def test_name_that_nobody_knows(typestr: str) -> None:
    """A name that nobody registered is a KeyError that repeats it."""
    with pytest.raises(KeyError, match=typestr or "''"):
        get_handler_type(typestr)


# ------------------------------------------------------------------ constructing args


def test_args_object_is_taken_as_it_is() -> None:
    """The first CheckpointArgs among the arguments, then among the keywords, is the one used."""
    one, other = TextSave("1"), TextSave("2")
    handler = TextHandler()
    assert construct_checkpoint_args(handler, True, one) is one
    assert construct_checkpoint_args(handler, True, "x", one, args=other) is one
    assert construct_checkpoint_args(handler, True, anything=other) is other


def test_args_are_built_from_arguments() -> None:
    """Otherwise the save or the restore class of the handler is built from all arguments."""
    handler = TextHandler()
    assert construct_checkpoint_args(handler, True, "a") == TextSave("a")
    assert construct_checkpoint_args(handler, True, text="a") == TextSave("a")
    assert construct_checkpoint_args(handler, False) == TextRestore()
    built = construct_checkpoint_args(StandardCheckpointHandler(), False, {"w": 1}, cast=True)
    assert built == args.StandardRestore({"w": 1}, cast=True)


def test_arguments_that_do_not_fit() -> None:
    """Arguments that the class does not take are a TypeError that shows its signature."""
    with pytest.raises(TypeError, match=r"cannot save .*TextSave\(text"):
        construct_checkpoint_args(TextHandler(), True)
    with pytest.raises(TypeError, match=r"cannot restore .*TextRestore\(\)"):
        construct_checkpoint_args(TextHandler(), False, "a")


def test_error_of_an_args_class_comes_out() -> None:
    """A TypeError raised inside an args class is not mistaken for wrong arguments."""

    class Strict(TextHandler):
        pass

    @register_with_handler(Strict, for_save=True, for_restore=True)
    class StrictArgs(CheckpointArgs):
        def __init__(self, text: str) -> None:
            raise TypeError("from inside")

    with pytest.raises(TypeError, match=r"^from inside$"):
        construct_checkpoint_args(Strict(), True, "a")


# ------------------------------------------------------------------ handlers without args classes


class OldHandler:
    """A handler as they were before args classes: nothing but its own arguments."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def save(self, directory: epath.Path, text: str, *, ending: str = "") -> None:
        (directory / "old").write_text(text + ending)

    def restore(self, directory: epath.Path, prefix: str = "") -> str:
        return prefix + (directory / "old").read_text()


class OldHandlerWithMore(OldHandler):
    def metadata(self, directory: epath.Path) -> dict[str, int]:
        return {"length": len((directory / "old").read_text())}

    def finalize(self, directory: epath.Path) -> None:
        self.calls.append(f"finalize {sorted(path.name for path in directory.iterdir())}")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("kind", [Checkpointer, AsyncCheckpointer])
def test_legacy_handler_gets_its_own_arguments(tmp_path: Path, kind: type[Checkpointer]) -> None:
    """A handler that never registered args is called with the arguments of `save` and `restore`, unchanged."""
    handler = OldHandler()
    with kind(handler) as checkpointer:
        assert checkpointer.handler is handler
        checkpointer.save(tmp_path / "c", "text", ending="!")
        assert checkpointer.restore(tmp_path / "c") == "text!"
        assert checkpointer.restore(tmp_path / "c", "> ") == "> text!"
        assert checkpointer.restore(tmp_path / "c", prefix="> ") == "> text!"
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.item_handlers == f"{__name__}.OldHandler"
    assert metadata.item_metadata is None


class OldAsyncHandler(OldHandler):
    """An asynchronous handler of those days."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        super().__init__()
        self.gate, self.awaited = threading.Event(), threading.Event()
        self._pool = pool

    def save(self, directory: epath.Path, text: str, *, ending: str = "") -> None:
        self.calls.append("save")
        super().save(directory, text, ending=ending)

    async def async_save(self, directory: epath.Path, text: str, *, ending: str = "") -> list[Any]:
        self.calls.append("async_save")
        self._future = self._pool.submit(self._write, directory, text + ending)
        return [self]

    def result(self) -> None:
        """Of the future: it comes to its end once it is waited for, lest who does not wait be lucky."""
        assert self.gate.wait(DEADLINE_SECS)
        self.awaited.set()
        self._future.result()

    def _write(self, directory: epath.Path, text: str) -> None:
        assert self.awaited.wait(DEADLINE_SECS)
        super().save(directory, text)


def test_legacy_handler_saves_in_the_background_if_it_can(tmp_path: Path) -> None:
    """An `AsyncCheckpointer` calls `async_save` of a legacy handler, and its futures go on while the caller does."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, AsyncCheckpointer(OldAsyncHandler(pool)) as checkpointer:
        checkpointer.save(tmp_path / "c", "text", ending="!")
        assert os.listdir(tmp_path) == ["c.orbax-checkpoint-tmp"]
        checkpointer.handler.gate.set()
        assert checkpointer.restore(tmp_path / "c") == "text!"
        assert checkpointer.handler.calls == ["async_save"]


def test_legacy_handler_saves_in_the_foreground(tmp_path: Path) -> None:
    """A `Checkpointer` calls `save` of a legacy handler, also where it has `async_save`."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, Checkpointer(OldAsyncHandler(pool)) as checkpointer:
        checkpointer.save(tmp_path / "c", "text", ending="!")
        assert checkpointer.restore(tmp_path / "c") == "text!"
        assert checkpointer.handler.calls == ["save"]


def test_legacy_handler_takes_part_in_everything(tmp_path: Path) -> None:
    """`metadata`, `finalize` and `close` of a legacy handler are called where it has them."""
    handler = OldHandlerWithMore()
    with Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "c", "text")
        assert checkpointer.metadata(tmp_path / "c").item_metadata == {"length": 4}
    assert handler.calls == ["finalize ['_CHECKPOINT_METADATA', 'old']", "close"]


def test_legacy_handler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An error of a legacy handler is raised as it is, and nothing stays."""
    with Checkpointer(OldHandler()) as checkpointer, pytest.raises(TypeError, match="nonsense"):
        checkpointer.save(tmp_path / "c", "text", nonsense=1)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ users' own handlers


@pytest.fixture
def futures_handler() -> Iterator[FuturesHandler]:
    handler = FuturesHandler()
    yield handler
    handler.gate.set()
    handler.close()


@pytest.mark.parametrize("kind", [Checkpointer, AsyncCheckpointer])
@pytest.mark.parametrize(
    ("handler", "save_args", "expected"),
    [
        (TextHandler, TextSave("a"), "a"),
        (FuturesHandler, FuturesArgs(["a", "b"]), ["a", "b"]),
        (StagedHandler, StagedArgs(["a", "b"]), ["a", "b"]),
    ],
)
def test_users_handler_alone(
    tmp_path: Path, kind: type[Checkpointer], handler: Any, save_args: Any, expected: Any
) -> None:
    """Users' handlers of all three kinds save and restore with both checkpointers."""
    with kind(handler()) as checkpointer:
        checkpointer.save(tmp_path / "c", save_args)
        assert checkpointer.restore(tmp_path / "c") == expected


@pytest.mark.parametrize("kind", [Checkpointer, AsyncCheckpointer])
def test_users_handlers_in_a_composite(tmp_path: Path, kind: type[Checkpointer]) -> None:
    """Users' handlers of all three kinds save and restore together, by their args and by their recorded names."""
    items = args.Composite(
        text=TextSave("a"),
        futures=FuturesArgs(["b", "c"]),
        staged=StagedArgs(["d"]),
        tree=args.StandardSave({"w": np.arange(2)}),
    )
    with kind(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", items)
        named = checkpointer.restore(
            tmp_path / "c", args.Composite(text=TextRestore(), futures=FuturesArgs(), staged=StagedArgs())
        )
        assert dict(named.items()) == {"text": "a", "futures": ["b", "c"], "staged": ["d"]}
    with kind(CompositeCheckpointHandler()) as checkpointer:
        everything = checkpointer.restore(tmp_path / "c")
    assert (everything.text, everything.futures, everything.staged) == ("a", ["b", "c"], ["d"])
    np.testing.assert_array_equal(everything.tree["w"], [0, 1])


class BareHandler:
    """Has nothing but what a handler must have, and derives from nothing of ours."""

    def save(self, directory: epath.Path, args: Any) -> None:
        (directory / "text").write_text(args.text)

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        return (directory / "text").read_text()


@register_with_handler(BareHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class BareArgs(CheckpointArgs):
    text: str = ""


@pytest.mark.parametrize("kind", [Checkpointer, AsyncCheckpointer])
def test_a_handler_needs_only_save_and_restore(tmp_path: Path, kind: type[Checkpointer]) -> None:
    """A handler without `metadata`, `finalize` and `close` tells nothing and is not asked, alone or as an item."""
    with kind(BareHandler()) as checkpointer:
        checkpointer.save(tmp_path / "alone", BareArgs("a"))
        assert checkpointer.restore(tmp_path / "alone") == "a"
        assert checkpointer.metadata(tmp_path / "alone").item_metadata is None
    with kind(CompositeCheckpointHandler(given=BareHandler())) as checkpointer:
        checkpointer.save(tmp_path / "items", args.Composite(given=BareArgs("b"), found=BareArgs("c")))
        assert checkpointer.restore(tmp_path / "items") == args.Composite(given="b", found="c")
        assert checkpointer.metadata(tmp_path / "items").item_metadata == args.Composite(given=None, found=None)


def test_futures_are_waited_for_in_the_background(tmp_path: Path, futures_handler: FuturesHandler) -> None:
    """`save` returns while an asynchronous handler's futures still run; the commit waits for all of them."""
    futures_handler.gate.clear()
    with AsyncCheckpointer(futures_handler) as checkpointer:
        texts = ["a", "b", "c"]
        checkpointer.save(tmp_path / "c", texts)
        texts.clear()
        assert futures_handler.finished == 0
        assert os.listdir(tmp_path) == ["c.orbax-checkpoint-tmp"]
        futures_handler.gate.set()
        assert checkpointer.restore(tmp_path / "c") == ["a", "b", "c"]


def test_failing_future_fails_the_save_after_the_others(tmp_path: Path, futures_handler: FuturesHandler) -> None:
    """A future that fails fails the save, which first waits for the others, so that nothing is written later."""
    futures_handler.error = RuntimeError("no")
    with Checkpointer(futures_handler) as checkpointer:
        with pytest.raises(RuntimeError, match="no"):
            checkpointer.save(tmp_path / "c", ["a", "b", "c"])
        assert futures_handler.finished == 2
    assert os.listdir(tmp_path) == []


def test_async_save_may_return_nothing(tmp_path: Path) -> None:
    """An asynchronous handler that has written everything already may return None."""

    class Eager(TextHandler):
        async def async_save(self, directory: epath.Path, args: Any) -> None:
            (directory / "text").write_text(args.text)

    with AsyncCheckpointer(Eager()) as checkpointer:
        checkpointer.save(tmp_path / "c", "a")
        assert checkpointer.restore(tmp_path / "c") == "a"


def test_async_save_works_inside_an_event_loop(tmp_path: Path) -> None:
    """An asynchronous handler can be saved from a coroutine, as in a notebook, where a loop runs already."""

    async def cell() -> Any:
        with Checkpointer(FuturesHandler()) as checkpointer:
            checkpointer.save(tmp_path / "c", ["a"])
            return checkpointer.restore(tmp_path / "c")

    assert asyncio.run(cell()) == ["a"]


def test_subclass_of_a_standard_handler_restores_itself(tmp_path: Path) -> None:
    """An item saved by a user's subclass of one of our handlers is restored by that subclass, by its recorded name."""
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(tree=DoublingSave({"w": np.arange(3)})))
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(tmp_path / "c")
    np.testing.assert_array_equal(restored.tree["w"], [0, 2, 4])


class DoublingHandler(StandardCheckpointHandler):
    @classmethod
    def typestr(cls) -> str:
        return "tests.DoublingHandler"

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        return {name: 2 * value for name, value in super().restore(directory).items()}


@register_with_handler(DoublingHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class DoublingSave(args.StandardSave):
    pass


@register_with_handler(DoublingHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class DoublingRestore(args.StandardRestore):
    pass


def test_handler_that_nobody_imported_is_named(tmp_path: Path) -> None:
    """A restore without arguments of a handler that is not registered here is a ValueError that names it."""
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(text=TextSave("a")))
    metadata = tmp_path / "c" / "_CHECKPOINT_METADATA"
    text = metadata.read_text().replace("TextHandler", "TixtHandler")
    assert "TixtHandler" in text
    metadata.write_text(text)
    (tmp_path / "c" / "_CHECKSUMS").unlink()
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        with pytest.raises(ValueError, match=r"TixtHandler.*Name its args") as caught:
            checkpointer.restore(tmp_path / "c")
        assert isinstance(caught.value.__cause__, KeyError)
        assert isinstance(caught.value.__cause__, errors.HandlerNotFoundError)
        assert checkpointer.restore(tmp_path / "c", args.Composite(text=TextRestore())).text == "a"
