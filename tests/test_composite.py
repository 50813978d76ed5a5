"""`CompositeCheckpointHandler`: named items, each saved and restored by its own handler."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from etils import epath

from ckpt_hooks import (
    AtomicRenameTemporaryPath,
    CheckpointArgs,
    Checkpointer,
    CheckpointHandler,
    CompositeCheckpointHandler,
    CompositeOptions,
    DefaultCheckpointHandlerRegistry,
    FileOptions,
    JsonCheckpointHandler,
    StandardCheckpointHandler,
    args,
    errors,
    register_with_handler,
)
from ckpt_hooks.temporary_paths import NestedTemporaryPath

MARKER = "commit_success.txt"


class LabelHandler(CheckpointHandler):
    """Saves a text with the label that it was built with."""

    def __init__(self, label: str = "default") -> None:
        self.label = label
        self.closed = 0
        self.finalized: list[str] = []

    def save(self, directory: epath.Path, args: Any) -> None:
        (directory / "text").write_text(f"{self.label}:{args.text}")

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        return f"{self.label}<{(directory / 'text').read_text()}"

    def finalize(self, directory: epath.Path) -> None:
        self.finalized.append(directory.name)

    def close(self) -> None:
        self.closed += 1


@register_with_handler(LabelHandler, for_save=True)
@dataclasses.dataclass
class LabelSave(CheckpointArgs):
    text: str = ""


@register_with_handler(LabelHandler, for_restore=True)
@dataclasses.dataclass
class LabelRestore(CheckpointArgs):
    pass


class NeedyHandler(LabelHandler):
    """Cannot be built without an argument, and restores only with one."""

    def __init__(self, label: str) -> None:
        super().__init__(label)


@register_with_handler(NeedyHandler, for_save=True)
@dataclasses.dataclass
class NeedySave(CheckpointArgs):
    text: str = ""


@register_with_handler(NeedyHandler, for_restore=True)
@dataclasses.dataclass
class NeedyRestore(CheckpointArgs):
    why: str


class PickyHandler(LabelHandler):
    """Can be built, but its restore args cannot."""


@register_with_handler(PickyHandler, for_save=True)
@dataclasses.dataclass
class PickySave(CheckpointArgs):
    text: str = ""


@register_with_handler(PickyHandler, for_restore=True)
@dataclasses.dataclass
class PickyRestore(CheckpointArgs):
    why: str


class UnregisteredArgs(CheckpointArgs):
    text = "u"


def save(path: Path, handler: CompositeCheckpointHandler | None = None, /, **items: Any) -> None:
    Checkpointer(handler or CompositeCheckpointHandler()).save(path, args=args.Composite(**items))


def restore(path: Path, handler: CompositeCheckpointHandler | None = None, /, **items: Any) -> Any:
    return Checkpointer(handler or CompositeCheckpointHandler()).restore(path, args=args.Composite(**items))


# ------------------------------------------------------------------ the Composite object


def test_a_directory_that_was_never_saved_is_no_item(tmp_path: Path) -> None:
    """What somebody has copied into a checkpoint is neither restored nor described."""
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(a=args.StandardSave({"w": np.ones(3)})))
        shutil.copytree(tmp_path / "c" / "a", tmp_path / "c" / "b")
        assert sorted(checkpointer.restore(tmp_path / "c").keys()) == ["a"]
        assert sorted(checkpointer.metadata(tmp_path / "c").item_metadata.keys()) == ["a"]
        with pytest.raises(KeyError, match="no item 'b'"):
            checkpointer.restore(tmp_path / "c", args=args.Composite(b=args.StandardRestore()))


def test_composite_is_read_by_key_and_by_attribute() -> None:
    """Items are reached by key, by attribute and by `get`, listed, counted and iterated in their order."""
    items = args.Composite(b=2, a=1)
    assert (items["a"], items.b, items.get("a"), items.get("c"), items.get("c", 3)) == (1, 2, 1, None, 3)
    assert list(items) == list(items.keys()) == ["b", "a"]
    assert list(items.values()) == [2, 1]
    assert list(items.items()) == [("b", 2), ("a", 1)]
    assert len(items) == 2 and "a" in items and "c" not in items
    assert dict(**items) == {"b": 2, "a": 1}
    assert not args.Composite()


def test_missing_item_is_a_key_error() -> None:
    """An item that is not there is a KeyError that lists those that are, by key and by attribute."""
    items = args.Composite(a=1)
    with pytest.raises(KeyError, match="'a'"):
        items["b"]
    with pytest.raises(KeyError, match="'a'"):
        _ = items.b


def test_composite_cannot_be_changed() -> None:
    """Setting or deleting an item is refused."""
    items = args.Composite(a=1)
    for name in ("a", "b", "_items"):
        with pytest.raises(ValueError, match="read-only"):
            setattr(items, name, 2)
    with pytest.raises(TypeError):
        items["a"] = 2
    assert dict(items.items()) == {"a": 1}


def test_names_with_two_underscores_are_refused() -> None:
    """An item whose name starts with two underscores is a ValueError."""
    with pytest.raises(ValueError, match="__a"):
        args.Composite(__a=1)
    assert args.Composite(_a=1)._a == 1


@pytest.mark.parametrize("name", ["items", "keys", "values", "get"])
def test_no_name_is_reserved(tmp_path: Path, name: str) -> None:
    """An item may be called like a method: it is reached by key, saved and restored."""
    save(tmp_path / "c", **{name: LabelSave("x")})
    assert restore(tmp_path / "c")[name] == "default<default:x"


def test_composites_are_combined() -> None:
    """`&` keeps the items that the other names, `|` adds the other's, which win."""
    items = args.Composite(a=1, b=2)
    assert items & args.Composite(b=3, c=4) == args.Composite(b=2)
    assert items & ["a"] == args.Composite(a=1)
    assert items | args.Composite(b=3, c=4) == args.Composite(a=1, b=3, c=4)
    assert items | {"c": 4} == args.Composite(a=1, b=2, c=4)
    assert items == args.Composite(a=1, b=2)
    assert items != {"a": 1, "b": 2}


def test_composite_is_copied_and_printed() -> None:
    """A Composite survives copy and pickle, and shows its items."""
    items = args.Composite(a=[1])
    assert copy.deepcopy(items) == copy.copy(items) == pickle.loads(pickle.dumps(items)) == items
    assert repr(items) == "Composite({'a': [1]})"


# ------------------------------------------------------------------ which handler


def test_registry_excludes_the_other_forms() -> None:
    """A handler registry together with item names, or with items and handlers, is a ValueError."""
    registry = DefaultCheckpointHandlerRegistry()
    with pytest.raises(ValueError, match="not both"):
        CompositeCheckpointHandler("a", handler_registry=registry)
    with pytest.raises(ValueError, match="not both"):
        CompositeCheckpointHandler(handler_registry=registry, a=LabelHandler())


def test_given_handler_is_used(tmp_path: Path) -> None:
    """An item is saved and restored by the handler that was given for it."""
    handler = CompositeCheckpointHandler("b", a=LabelHandler("mine"))
    save(tmp_path / "c", handler, a=LabelSave("x"), b=LabelSave("y"))
    restored = restore(tmp_path / "c", handler)
    assert restored == args.Composite(a="mine<mine:x", b="default<default:y")


def test_registry_goes_from_the_special_to_the_general(tmp_path: Path) -> None:
    """(item, args class) is asked first, (None, args class) second, the args class's own handler last."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add(None, LabelSave, LabelHandler("every"))
    registry.add("a", LabelSave, LabelHandler("only a"))
    handler = CompositeCheckpointHandler(handler_registry=registry)
    save(tmp_path / "c", handler, a=LabelSave("x"), b=LabelSave("y"), j=args.JsonSave(3))
    assert (tmp_path / "c" / "a" / "text").read_text() == "only a:x"
    assert (tmp_path / "c" / "b" / "text").read_text() == "every:y"
    assert json.loads((tmp_path / "c" / "j" / "metadata").read_text()) == 3


def test_registry_may_have_a_handler_for_each_args_class(tmp_path: Path) -> None:
    """An item's args of another class go to the handler that is registered for them, not to the one used before."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelSave, LabelHandler("label"))
    registry.add("a", args.JsonSave)
    handler = CompositeCheckpointHandler(handler_registry=registry)
    save(tmp_path / "1", handler, a=LabelSave("x"))
    save(tmp_path / "2", handler, a=args.JsonSave({"x": 1}))
    save(tmp_path / "3", handler, a=LabelSave("y"))
    assert os.listdir(tmp_path / "2" / "a") == unordered(["metadata", MARKER])
    assert (tmp_path / "3" / "a" / "text").read_text() == "label:y"


def unordered(names: list[str]) -> Any:
    class Unordered:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, list) and sorted(other) == sorted(names)

    return Unordered()


def test_registry_handler_needs_no_global_args(tmp_path: Path) -> None:
    """Args that are registered with no class can be used where the registry names a handler for them."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", UnregisteredArgs, LabelHandler("mine"))
    handler = CompositeCheckpointHandler(handler_registry=registry)
    save(tmp_path / "c", handler, a=UnregisteredArgs())
    assert (tmp_path / "c" / "a" / "text").read_text() == "mine:u"


def test_registry_is_asked_on_restore(tmp_path: Path) -> None:
    """With and without arguments, an item is restored by the handler that the registry has for it."""
    save(tmp_path / "c", a=LabelSave("x"))
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelRestore, LabelHandler("mine"))
    for items in ({}, {"a": LabelRestore()}, {"a": None}):
        handler = CompositeCheckpointHandler(handler_registry=registry)
        assert restore(tmp_path / "c", handler, **items).a == "mine<default:x"


@pytest.mark.parametrize("names", [(), ("a",)])
def test_first_use_pins_the_handler(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Once an item has been used with args of one handler, args of another one are a ValueError that names both."""
    handler = CompositeCheckpointHandler(*names)
    save(tmp_path / "1", handler, a=LabelSave("x"))
    pattern = "'a'.*JsonSaveArgs does not match with any registered handler.*LabelHandler"
    with pytest.raises(ValueError, match=pattern):
        save(tmp_path / "2", handler, a=args.JsonSave(1))
    with pytest.raises(ValueError, match="does not match with any registered handler"):
        restore(tmp_path / "1", handler, a=args.JsonRestore())
    assert os.listdir(tmp_path) == ["1"]
    save(tmp_path / "2", CompositeCheckpointHandler(*names), a=args.JsonSave(1))  # pinned in that instance only


def test_given_handler_is_pinned_from_the_start(tmp_path: Path) -> None:
    """Args of another handler than the one given for an item are a ValueError."""
    with pytest.raises(ValueError, match="does not match with any registered handler"):
        save(tmp_path / "c", CompositeCheckpointHandler(a=LabelHandler()), a=args.JsonSave(1))
    assert os.listdir(tmp_path) == []


def test_pinned_handler_is_one_instance(tmp_path: Path) -> None:
    """The handler that is built for an item is used again by later saves, finalizes each, and is closed once."""
    handler = LabelHandler("mine")
    with Checkpointer(CompositeCheckpointHandler(a=handler)) as checkpointer:
        for step in ("1", "2"):
            checkpointer.save(tmp_path / step, args.Composite(a=LabelSave("x")))
    assert handler.finalized == ["a.orbax-checkpoint-tmp"] * 2
    assert handler.closed == 1


def test_every_handler_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing closes what was given, registered or built, for a save or a restore, each once, whatever it served."""
    closed: list[LabelHandler] = []
    monkeypatch.setattr(LabelHandler, "close", lambda handler: closed.append(handler))
    save(tmp_path / "c", a=LabelSave(), b=LabelSave())

    given = LabelHandler("given")
    with Checkpointer(CompositeCheckpointHandler(a=given, c=given)) as checkpointer:
        for _ in range(2):
            assert checkpointer.restore(tmp_path / "c").keys() == {"a", "b"}  # builds one for b
    assert [handler.label for handler in closed] == ["given", "default"]

    closed.clear()
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelRestore, LabelHandler("restores"))
    registry.add("c", LabelSave, LabelHandler("unused"))
    with Checkpointer(CompositeCheckpointHandler(handler_registry=registry)) as checkpointer:
        checkpointer.save(tmp_path / "d", args.Composite(a=LabelSave()))  # builds one
        checkpointer.restore(tmp_path / "d", args.Composite(a=LabelRestore()))
    assert sorted(handler.label for handler in closed) == ["default", "restores", "unused"]


# ------------------------------------------------------------------ the registry


def test_registry_refuses_a_second_entry() -> None:
    """A second handler for one (item, args class) is a ValueError; another item, or every item, is not."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelSave)
    with pytest.raises(errors.HandlerExistsError, match="'a'") as caught:
        registry.add("a", LabelSave("x"), LabelHandler())
    assert isinstance(caught.value, ValueError)
    registry.add(None, LabelSave)
    registry.add("b", LabelSave)
    assert len(registry.get_all_entries()) == 3


def test_registry_finds_entries() -> None:
    """`has` is exact, `get` falls back to every item, and a missing entry is a KeyError that lists those there are."""
    mine, every = LabelHandler("mine"), LabelHandler("every")
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelSave, mine)
    assert registry.has("a", LabelSave) and registry.has("a", LabelSave("x"))
    assert not registry.has("b", LabelSave) and not registry.has(None, LabelSave)
    assert registry.get("a", LabelSave) is mine
    with pytest.raises(KeyError, match="LabelSave"):
        registry.get("b", LabelSave)
    registry.add(None, LabelSave, every)
    assert registry.get("a", LabelSave) is mine
    assert registry.get("b", LabelSave("x")) is every
    with pytest.raises(KeyError, match="LabelRestore"):
        registry.get("a", LabelRestore)


def test_registry_builds_handlers() -> None:
    """A handler class, or none, becomes an instance; one that cannot be built, or found, is a ValueError."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelSave)
    registry.add("b", LabelSave, LabelHandler)
    assert isinstance(registry.get("a", LabelSave), LabelHandler)
    assert isinstance(registry.get("b", LabelSave), LabelHandler)
    with pytest.raises(ValueError, match="NeedyHandler cannot be built"):
        registry.add("c", NeedySave)
    with pytest.raises(ValueError, match="not registered"):
        registry.add("c", UnregisteredArgs)
    assert registry.get_all_entries().keys() == {("a", LabelSave), ("b", LabelSave)}


def test_registry_is_copied() -> None:
    """A registry made from another one has its entries and does not change it; all entries are a copy too."""
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", LabelSave)
    other = DefaultCheckpointHandlerRegistry(registry)
    other.add("b", LabelSave)
    other.get_all_entries().clear()
    assert other.has("a", LabelSave) and other.has("b", LabelSave)
    assert not registry.has("b", LabelSave)


# ------------------------------------------------------------------ saving


def test_items_are_directories_with_markers(tmp_path: Path) -> None:
    """Each item is a directory with its own commit marker, beside the checkpoint's files; nothing temporary stays."""
    save(tmp_path / "c", tree=args.StandardSave({"w": 1}), config=args.JsonSave({}))
    assert os.listdir(tmp_path / "c") == unordered(["_CHECKPOINT_METADATA", "_CHECKSUMS", MARKER, "config", "tree"])
    for item in ("config", "tree"):
        assert (tmp_path / "c" / item / MARKER).read_text().startswith("Checkpoint commit was successful to ")


def test_items_are_temporary_while_they_are_written(tmp_path: Path) -> None:
    """While an item is written its directory has the temporary suffix, inside the checkpoint's."""
    seen: list[str] = []

    class Looking(LabelHandler):
        def save(self, directory: epath.Path, args: Any) -> None:
            seen.append(os.fspath(directory.relative_to(tmp_path)))
            super().save(directory, args)

    save(tmp_path / "c", CompositeCheckpointHandler(b=Looking(), a=Looking()), b=LabelSave(), a=LabelSave())
    assert seen == [f"c.orbax-checkpoint-tmp/{item}.orbax-checkpoint-tmp" for item in ("a", "b")]


@pytest.mark.parametrize("kind", [AtomicRenameTemporaryPath, None])
def test_options_of_the_items_directories(tmp_path: Path, kind: Any) -> None:
    """The items' directories have the permission mode asked for, and are committed in the way asked for."""
    options: dict[str, Any] = {"file_options": FileOptions(path_permission_mode=0o750)}
    if kind is not None:
        options["temporary_path_class"] = kind
    handler = CompositeCheckpointHandler(composite_options=CompositeOptions(**options))
    old = os.umask(0o077)
    try:
        save(tmp_path / "c", handler, a=LabelSave("x"))
    finally:
        os.umask(old)
    assert (tmp_path / "c" / "a").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    assert restore(tmp_path / "c").a == "default<default:x"


def test_a_path_class_of_the_items_takes_what_it_takes(tmp_path: Path) -> None:
    """One whose `from_final` knows no `multiprocessing_options`, as Orbax's do not, is not given them."""

    class OrbaxStyle(NestedTemporaryPath):
        @classmethod
        def from_final(cls, final_path: Any, *, file_options: Any = None) -> Self:  # type: ignore[override]
            return super().from_final(final_path, file_options=file_options)

    handler = CompositeCheckpointHandler(composite_options=CompositeOptions(temporary_path_class=OrbaxStyle))
    save(tmp_path / "c", handler, a=LabelSave("x"))
    assert restore(tmp_path / "c").a == "default<default:x"


@pytest.mark.parametrize("items", [{}, {"a": None}, {"a": 3}, {"a": {"w": 1}}, {"a": UnregisteredArgs()}])
def test_what_cannot_be_saved_is_refused_first(tmp_path: Path, items: dict[str, Any]) -> None:
    """No items, None, a bare value, and args without a handler are refused before anything is written."""
    error = TypeError if items.get("a") in (3, {"w": 1}) else ValueError
    with pytest.raises(error, match=r"'a'|no items|UnregisteredArgs"):
        save(tmp_path / "c", **items)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["given", "registered"])
def test_items_are_committed_in_the_order_of_the_registry(tmp_path: Path, form: str) -> None:
    """Items are committed in the order in which handlers are given or registered, and the others as first used."""
    committed = []

    class Noting(NestedTemporaryPath):
        def finalize(self) -> None:
            committed.append(self.get_final().name)
            super().finalize()

    options = CompositeOptions(temporary_path_class=Noting)
    if form == "given":
        handler = CompositeCheckpointHandler(
            "x", "w", composite_options=options, z=LabelHandler("1"), b=LabelHandler("2")
        )
    else:
        registry = DefaultCheckpointHandlerRegistry()
        registry.add("z", LabelSave, LabelHandler("1"))
        registry.add("b", LabelSave, LabelHandler("2"))
        registry.add(None, LabelSave, LabelHandler("3"))
        handler = CompositeCheckpointHandler(composite_options=options, handler_registry=registry)
    save(tmp_path / "1", handler, x=LabelSave())
    save(tmp_path / "2", handler, **{name: LabelSave() for name in ("a", "b", "w", "x", "z")})
    assert committed == ["x", "z", "b", "x", "a", "w"]


def test_finalize_without_items() -> None:
    """`finalize` before any save is a ValueError."""
    with pytest.raises(ValueError, match=r"finalize\(\) called before any items were saved"):
        CompositeCheckpointHandler().finalize(epath.Path("/nowhere"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a.orbax-checkpoint-tmp", "a\0b", "x" * 240, "ü" * 120, "\ud800"]
)
def test_name_that_is_no_directory_of_its_own(tmp_path: Path, name: str) -> None:
    """A name that would leave the checkpoint, or pass for something temporary, is a ValueError."""
    with pytest.raises(ValueError, match="cannot be an item's name"):
        save(tmp_path / "c", **{name: LabelSave()})
    assert os.listdir(tmp_path) == []


def test_item_that_cannot_be_taken_is_named(tmp_path: Path) -> None:
    """The error of a handler that refuses its item says which item it was."""
    with pytest.raises(TypeError) as caught:
        save(tmp_path / "c", good=LabelSave(), bad=args.JsonSave(b"bytes"))
    assert "while taking item 'bad'" in caught.value.__notes__
    assert os.listdir(tmp_path) == []


def test_save_after_a_failed_one(tmp_path: Path) -> None:
    """A save that failed half way leaves nothing in the handler that the next one would finalize or record."""

    class Failing(LabelHandler):
        def save(self, directory: epath.Path, args: Any) -> None:
            if args.text == "bad":
                raise RuntimeError("no")
            super().save(directory, args)

    handler = CompositeCheckpointHandler(b=Failing())
    with pytest.raises(RuntimeError, match="no"):
        save(tmp_path / "c", handler, a=LabelSave("x"), b=LabelSave("bad"))
    assert os.listdir(tmp_path) == []
    save(tmp_path / "c", handler, b=LabelSave("good"))
    assert restore(tmp_path / "c", b=LabelRestore()) == args.Composite(b="default<default:good")
    assert not (tmp_path / "c" / "a").exists()
    recorded = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert recorded == {"b": f"{__name__}.test_save_after_a_failed_one.<locals>.Failing"}


# ------------------------------------------------------------------ restoring


@pytest.mark.parametrize("form", ["nothing", "empty", "none"])
def test_everything_is_restored_by_default(tmp_path: Path, form: str) -> None:
    """No arguments, an empty Composite and None restore every item, by the names of their handlers."""
    save(tmp_path / "c", tree=args.StandardSave({"w": np.arange(2)}), config=args.JsonSave([1]), text=LabelSave("x"))
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        if form == "nothing":
            restored = checkpointer.restore(tmp_path / "c")
        elif form == "empty":
            restored = checkpointer.restore(tmp_path / "c", args=args.Composite())
        else:
            restored = CompositeCheckpointHandler().restore(epath.Path(tmp_path / "c"), None)
    assert restored.keys() == {"tree", "config", "text"}
    assert (restored.config, restored.text) == ([1], "default<default:x")
    np.testing.assert_array_equal(restored.tree["w"], [0, 1])


def test_only_what_is_asked_for_is_restored(tmp_path: Path) -> None:
    """Items that are not named are not read: damage of theirs does not matter."""
    save(tmp_path / "c", a=LabelSave("x"), b=LabelSave("y"))
    (tmp_path / "c" / "b" / "text").write_text("damage!!")
    assert restore(tmp_path / "c", a=LabelRestore()) == args.Composite(a="default<default:x")
    with pytest.raises(errors.CorruptCheckpointError, match="b/text"):
        restore(tmp_path / "c")


def test_missing_item_lists_those_there_are(tmp_path: Path) -> None:
    """An item that was never saved is a KeyError that lists what was."""
    save(tmp_path / "c", a=LabelSave("x"), b=args.JsonSave(1))
    with pytest.raises(KeyError, match=r"no item 'z'.*\['a', 'b'\]"):
        restore(tmp_path / "c", z=LabelRestore())


def test_lost_item_is_damage(tmp_path: Path) -> None:
    """An item that was saved and whose directory is gone is a CorruptCheckpointError, asked for or not."""
    save(tmp_path / "c", a=LabelSave("x"), b=args.JsonSave(1))
    for path in (tmp_path / "c" / "b").iterdir():
        path.unlink()
    (tmp_path / "c" / "b").rmdir()
    for items in ({}, {"b": args.JsonRestore()}):
        with pytest.raises(errors.CorruptCheckpointError, match="b is missing"):
            restore(tmp_path / "c", **items)


def test_none_means_the_handler_that_is_known(tmp_path: Path) -> None:
    """None for an item restores it by the handler given, used before, or recorded in the checkpoint."""
    save(tmp_path / "c", a=LabelSave("x"), b=args.JsonSave(1))
    assert restore(tmp_path / "c", a=None) == args.Composite(a="default<default:x")
    given = CompositeCheckpointHandler(a=LabelHandler("mine"))
    assert restore(tmp_path / "c", given, a=None) == args.Composite(a="mine<default:x")
    used = CompositeCheckpointHandler()
    restore(tmp_path / "c", used, a=LabelRestore())
    assert restore(tmp_path / "c", used, a=None, b=None) == args.Composite(a="default<default:x", b=1)


@pytest.mark.parametrize("items", [{}, {"a": None}])
def test_item_of_an_unknown_handler(tmp_path: Path, items: dict[str, Any]) -> None:
    """An item whose handler nothing tells is a ValueError that names the item and what to do."""
    (tmp_path / "c" / "a").mkdir(parents=True)
    (tmp_path / "c" / "a" / "text").write_text("x")
    with pytest.raises(ValueError, match=r"a.*(Name its args|give its args)"):
        restore(tmp_path / "c", **items)
    assert restore(tmp_path / "c", a=LabelRestore()).a == "default<x"


def test_item_whose_restore_args_need_something(tmp_path: Path) -> None:
    """A handler, or restore args, that cannot be built without arguments are a ValueError that names them."""
    handler = CompositeCheckpointHandler(needy=NeedyHandler("mine"))
    save(tmp_path / "needy", handler, needy=NeedySave("x"))
    save(tmp_path / "picky", picky=PickySave("x"))
    with pytest.raises(ValueError, match="NeedyHandler cannot be built"):
        restore(tmp_path / "needy")
    with pytest.raises(ValueError, match="NeedyRestore cannot be built"):
        restore(tmp_path / "needy", handler)
    with pytest.raises(ValueError, match="'picky': PickyRestore cannot be built"):
        restore(tmp_path / "picky")
    assert restore(tmp_path / "picky", picky=PickyRestore("because")).picky == "default<default:x"


def test_bare_target_is_a_type_error(tmp_path: Path) -> None:
    """A target that is not wrapped in args is a TypeError that names the item."""
    save(tmp_path / "c", a=args.StandardSave({"w": 1}))
    with pytest.raises(TypeError, match="'a'"):
        restore(tmp_path / "c", a={"w": 0})


def test_plain_files_are_no_items(tmp_path: Path) -> None:
    """Files beside the items, and temporary directories, are neither restored nor described."""
    save(tmp_path / "c", a=LabelSave("x"))
    (tmp_path / "c" / "notes.txt").write_text("mine")
    (tmp_path / "c" / "b.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        assert checkpointer.restore(tmp_path / "c").keys() == {"a"}
        assert checkpointer.metadata(tmp_path / "c").item_metadata.keys() == {"a"}


def test_what_a_handler_has_saved_by_itself_it_restores(tmp_path: Path) -> None:
    """Without a checkpointer, and so without checksums, a handler restores and describes what it has finalized."""
    handler = CompositeCheckpointHandler()
    handler.save(epath.Path(tmp_path), args.Composite(a=args.StandardSave({"w": np.arange(3)}), b=args.JsonSave(1)))
    handler.finalize(epath.Path(tmp_path))
    restored = handler.restore(epath.Path(tmp_path))
    np.testing.assert_array_equal(restored.a["w"], np.arange(3))
    assert restored.b == 1
    assert handler.restore(epath.Path(tmp_path), args.Composite(b=args.JsonRestore())) == args.Composite(b=1)
    assert handler.metadata(epath.Path(tmp_path)).a["w"].shape == (3,)


def test_an_item_may_be_a_composite(tmp_path: Path) -> None:
    """The items of a composite inside another are saved, restored and described."""
    save(tmp_path / "c", inner=args.Composite(a=args.StandardSave({"w": np.arange(3)}), b=args.JsonSave(1)))
    wanted = args.Composite(a=args.StandardRestore(), b=args.JsonRestore())
    restored = restore(tmp_path / "c", inner=wanted).inner
    np.testing.assert_array_equal(restored.a["w"], np.arange(3))
    assert restored.b == 1
    metadata = Checkpointer(CompositeCheckpointHandler()).metadata(tmp_path / "c").item_metadata
    assert metadata.inner.a["w"].shape == (3,)


def test_damage_in_a_composite_inside_another_is_noticed(tmp_path: Path) -> None:
    """The checksums of a checkpoint cover the items inside its items."""
    save(tmp_path / "c", inner=args.Composite(b=args.JsonSave(1)))
    (tmp_path / "c" / "inner" / "b" / "metadata").write_text("2")
    with pytest.raises(errors.CorruptCheckpointError, match="inner/b"):
        restore(tmp_path / "c", inner=args.Composite(b=args.JsonRestore()))


def test_a_checkpoint_that_has_lost_its_checksums_is_damaged(tmp_path: Path) -> None:
    """Without them, a checkpoint of ours is not taken for what a handler has saved by itself."""
    save(tmp_path / "c", a=args.StandardSave({"w": np.arange(3)}))
    (tmp_path / "c" / "_CHECKSUMS").unlink()
    for call in (restore, lambda path: Checkpointer(CompositeCheckpointHandler()).metadata(path)):
        with pytest.raises(errors.CorruptCheckpointError, match="_CHECKSUMS is missing"):
            call(tmp_path / "c")


def test_swapped_item_is_noticed(tmp_path: Path) -> None:
    """A whole item swapped in from another checkpoint is a CorruptCheckpointError."""
    for step in ("1", "2"):
        save(tmp_path / step, a=args.StandardSave({"w": np.arange(int(step))}))
    (tmp_path / "1" / "a").rename(tmp_path / "a")
    (tmp_path / "2" / "a").rename(tmp_path / "1" / "a")
    with pytest.raises(errors.CorruptCheckpointError):
        restore(tmp_path / "1")


# ------------------------------------------------------------------ metadata


def test_metadata_of_items(tmp_path: Path) -> None:
    """`metadata` has, by item, what each handler tells, and None of a handler that tells nothing."""
    save(tmp_path / "c", tree=args.StandardSave({"w": np.zeros((2, 3))}), text=LabelSave("x"))
    with Checkpointer(CompositeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.item_metadata.tree["w"].shape == (2, 3)
    assert metadata.item_metadata.text is None
    assert isinstance(metadata.item_handlers, dict) and metadata.item_handlers.keys() == {"tree", "text"}


def test_metadata_of_an_unknown_item_is_none(tmp_path: Path) -> None:
    """An item whose handler nothing tells is described as None."""
    (tmp_path / "c" / "a").mkdir(parents=True)
    assert CompositeCheckpointHandler().metadata(epath.Path(tmp_path / "c")) == args.Composite(a=None)


def test_metadata_of_what_is_not_there(tmp_path: Path) -> None:
    """Metadata of a directory that is not there are a FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        CompositeCheckpointHandler().metadata(epath.Path(tmp_path / "c"))


def test_metadata_of_what_is_no_composite(tmp_path: Path) -> None:
    """Metadata, as a composite, of a checkpoint that is none are a ValueError that says what it is."""
    Checkpointer(StandardCheckpointHandler()).save(tmp_path / "c", {"w": 1})
    with pytest.raises(ValueError, match=r"no composite.*StandardCheckpointHandler"):
        Checkpointer(CompositeCheckpointHandler()).metadata(tmp_path / "c")


def test_handler_with_its_own_file_name(tmp_path: Path) -> None:
    """A JSON handler with a file name of its own saves there, as Orbax keeps metrics, and anyone finds it."""
    save(tmp_path / "c", CompositeCheckpointHandler(metrics=JsonCheckpointHandler("metrics")), metrics=args.JsonSave(1))
    assert (tmp_path / "c" / "metrics" / "metrics").read_text() == "1"
    assert restore(tmp_path / "c").metrics == 1
