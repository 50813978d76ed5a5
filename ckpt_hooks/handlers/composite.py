"""A checkpoint of named items, each saved and restored by its own handler."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from etils import epath

from ckpt_hooks.committed import is_temporary
from ckpt_hooks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    HandlerNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    StructureMismatchError,
    UnsupportedLeafError,
)
from ckpt_hooks.handlers.base import (
    CheckpointArgs,
    CheckpointHandler,
    StagedSave,
    get_registered_args_cls,
    get_registered_handler_cls,
    has_registered_args,
    method_of,
    recognize_handler,
    register_with_handler,
)
from ckpt_hooks.handlers.legacy import recorded_name, unwrapped, wrap_legacy
from ckpt_hooks.handlers.registry import DefaultCheckpointHandlerRegistry, build_handler, handler_class_on_disk
from ckpt_hooks.metadata import METADATA_FILE, read_step_metadata
from ckpt_hooks.processes import MultiprocessingOptions
from ckpt_hooks.storage.checksums import FILE as CHECKSUMS_FILE
from ckpt_hooks.storage.checksums import FileChecksums
from ckpt_hooks.storage.commit import COMMIT_MARKER, TMP_SUFFIX
from ckpt_hooks.storage.lookup import is_directory
from ckpt_hooks.temporary_paths import FileOptions, NestedTemporaryPath, TemporaryPath, accepted_options
from ckpt_hooks.tree import METADATA_FILE as TREE_METADATA_FILE
from ckpt_hooks.tree import is_it

__all__ = ["CompositeArgs", "CompositeCheckpointHandler", "CompositeOptions", "CompositeResults"]

_TAKEN_NAMES = frozenset({".", "..", METADATA_FILE, CHECKSUMS_FILE, COMMIT_MARKER, TREE_METADATA_FILE})
_MAX_NAME_NBYTES = 255 - len(TMP_SUFFIX)  # in most file systems, with what is behind it until the commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositeOptions:
    """How the items' directories are made."""

    multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions()
    temporary_path_class: type[TemporaryPath] = NestedTemporaryPath
    file_options: FileOptions = FileOptions()


class CompositeArgs(CheckpointArgs):
    """{item: what to save or how to restore it}; read-only, by key or by attribute.

    >>> items = CompositeArgs(params=1, step=2)
    >>> items.params, items["step"], sorted(items)
    (1, 2, ['params', 'step'])
    """

    _items: dict[str, Any]

    def __init__(self, /, **items: Any) -> None:
        for name in items:
            if name.startswith("__"):
                raise InvalidArgumentError(f"item names do not start with two underscores: {name!r}")
        self.__dict__["_items"] = items

    def __getitem__(self, name: str) -> Any:
        if name not in self._items:
            raise ItemNotFoundError(f"no item {name!r}; there are {sorted(self._items)}")
        return self._items[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # keeps copy, pickle and doctest from taking items for special methods
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise InvalidArgumentError(f"a Composite is read-only; build a new one to change {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompositeArgs) and self._items == other._items

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> CompositeArgs:
        return type(self)(**{name: value for name, value in self.items() if name in other})

    def __or__(self, other: Mapping[str, Any] | CompositeArgs) -> CompositeArgs:
        return type(self)(**{**self._items, **dict(other.items())})

    def __repr__(self) -> str:
        return f"Composite({self._items!r})"

    def get(self, name: str, default: Any = None) -> Any:
        return self._items.get(name, default)

    def keys(self) -> KeysView[str]:
        return self._items.keys()

    def values(self) -> ValuesView[Any]:
        return self._items.values()

    def items(self) -> ItemsView[str, Any]:
        return self._items.items()


CompositeResults = CompositeArgs


class CompositeCheckpointHandler(CheckpointHandler):
    """Saves each item into a directory of its own.

    Args:
      item_names: items whose handlers follow from the args they are first used with.
      composite_options: how directories are made.
      handler_registry: handlers by item and args class; not together with the other two forms.
      items_and_handlers: {item: handler}.

    The handler of an item is, in this order, the one given for it, the registry's for (item, args class), the
    registry's for (None, args class), and the one that the args class is registered with. The first use pins it.
    """

    needs_own_args = True

    def __init__(
        self,
        *item_names: str,
        composite_options: CompositeOptions | None = None,
        handler_registry: DefaultCheckpointHandlerRegistry | None = None,
        **items_and_handlers: Any,
    ) -> None:
        if handler_registry is not None and (item_names or items_and_handlers):
            raise InvalidArgumentError("give a handler_registry, or items and handlers, not both")
        self._use(composite_options or CompositeOptions())
        self._registry = handler_registry or DefaultCheckpointHandlerRegistry()
        self._registered_items = [name for name, _ in self._registry.get_all_entries()]
        given = {name: handler for name, handler in items_and_handlers.items() if handler is not None}
        self._handlers = {name: _Handler(wrap_legacy(handler)) for name, handler in given.items()}
        self._built: dict[tuple[str, type], Any] = {}  # handlers by item and class, where nobody gave one
        self._unfinished: dict[str, TemporaryPath] = {}

    def take_part(self, options: MultiprocessingOptions) -> None:
        self._use(dataclasses.replace(self._options, multiprocessing_options=options))
        for handler in self._all_handlers():
            method_of(handler, "take_part")(options)

    def _use(self, options: CompositeOptions) -> None:
        given = {"file_options": options.file_options, "multiprocessing_options": options.multiprocessing_options}
        self._options, self._path_options = options, accepted_options(options.temporary_path_class, given)

    # -------------------------------------------------------------- saving

    def stage(self, args: CompositeArgs) -> StagedSave:
        items = sorted(args.items())
        if not items:
            raise InvalidArgumentError("an empty Composite: there are no items to save")
        staged, recorded_names = {}, {}
        for name, item_args in items:
            handler = self._handlers.get(name)
            if handler is None or type(item_args) not in handler.args_classes:
                handler = self._pin(name, item_args)
            try:
                staged[name] = handler.stage(item_args)
            except Exception as error:
                if isinstance(error, UnsupportedLeafError):  # by its whole path, also where only the text is logged
                    error.args = (f"item {name!r}: {str(error).removeprefix('the state: ')}",)
                error.add_note(f"while taking item {name!r}")
                raise
            recorded_names[name] = staged[name].recorded_name or handler.recorded_name
        begin = functools.partial(self._begin_items, staged)
        return StagedSave(
            functools.partial(self._write_items, staged),
            begin,
            functools.partial(self._detach_items, staged),
            sum([item.nbytes for item in staged.values()]),
            item_handlers=recorded_names,
            claim="\n".join([f"{name}: {line}" for name, item in staged.items() for line in item.claim.splitlines()]),
        )

    def _begin_items(self, staged: Mapping[str, StagedSave], directory: epath.Path) -> None:
        self._unfinished = {}
        for name, item in staged.items():
            temporary = self._options.temporary_path_class.from_final(directory / name, **self._path_options)
            path = temporary.create()
            self._unfinished[name] = temporary
            if item.begin is not None:
                item.begin(path)

    def _detach_items(self, staged: Mapping[str, StagedSave], directory: epath.Path) -> None:
        del directory
        for name, item in staged.items():
            if item.detach is not None:
                item.detach(self._unfinished[name].get())

    def _write_items(self, staged: Mapping[str, StagedSave], directory: epath.Path) -> None:
        del directory
        errors = []
        for name, item in staged.items():
            try:
                item.write(self._unfinished[name].get())
            except BaseException as error:  # what the other items have begun must end before the files are removed
                errors.append(error)
        if errors:
            raise errors[0]

    def save(self, directory: epath.Path, args: CompositeArgs) -> None:
        staged = self.stage(args)
        assert staged.begin is not None
        staged.begin(directory)
        staged.write(directory)

    def finalize(self, directory: epath.Path) -> None:
        """Commits the items one after another, each with its own marker: as registered or given, then by first use."""
        if not self._unfinished:
            raise InvalidArgumentError("finalize() called before any items were saved")
        unfinished, self._unfinished = self._unfinished, {}
        order = dict.fromkeys([*self._registered_items, *self._handlers])  # each where it is first
        for name in [name for name in order if name in unfinished]:
            finalize = self._handlers[name].finalize
            if finalize is not None:
                finalize(unfinished[name].get())
            unfinished[name].finalize()

    # -------------------------------------------------------------- restoring

    def restore(self, directory: epath.Path, args: CompositeArgs | None = None) -> CompositeArgs:
        """The items asked for, or all of them."""
        recorded = self._recorded_handlers(directory, asks_for_all=not args)
        checksums = _checksums_of(directory, recorded)
        saved = sorted({*_present_items(directory, recorded, checksums), *(checksums.items() if checksums else ())})
        wanted = dict.fromkeys(saved) if args is None or not len(args) else dict(args.items())
        results = {}
        mismatches: list[StructureMismatchError] = []
        for name, item_args in wanted.items():
            if name not in saved and name not in recorded:
                raise ItemNotFoundError(f"{directory} has no item {name!r}; there are {saved}{is_it(name, saved)}")
            if not is_directory(directory / name):
                raise CorruptCheckpointError(f"{directory / name} is missing: the item was saved")
            if checksums is not None:
                checksums.check(os.fspath(directory), below=name)
            try:
                results[name] = self._restore_item(directory / name, item_args, recorded.get(name), bool(args))
            except StructureMismatchError as error:
                mismatches.append(error)  # every item's, so that one attempt tells all
        if len(mismatches) > 1:
            kinds = {type(error) for error in mismatches}
            raise (kinds.pop() if len(kinds) == 1 else StructureMismatchError)("\n".join(map(str, mismatches)))
        if mismatches:
            raise mismatches[0]
        return CompositeArgs(**results)

    def _restore_item(self, path: epath.Path, args: Any, recorded: str | None, asked: bool) -> Any:
        name = path.name
        if args is None:
            handler = self._known_handler(path, recorded, asked)
            _, restore_cls = get_registered_args_cls(handler)
            try:
                args = restore_cls()
            except TypeError as error:
                raise InvalidArgumentError(
                    f"item {name!r}: {restore_cls.__qualname__} cannot be built without arguments; name the item's args"
                ) from error
        elif not isinstance(args, CheckpointArgs):
            raise InvalidArgumentTypeError(f"item {name!r}: wrap the target in an args class; got {type(args)}")
        else:
            handler = self._pin(name, args).handler
        try:
            return handler.restore(path, args=args)
        except CheckpointNotFoundError as error:
            # The item's directory is there, so what lacks in it is damage.
            raise CorruptCheckpointError(str(error)) from error

    def _recorded_handlers(self, directory: epath.Path, *, asks_for_all: bool = True) -> Mapping[str, str]:
        metadata = read_step_metadata(os.fspath(directory))
        handlers = metadata.item_handlers if metadata else None
        if isinstance(handlers, str) and asks_for_all:
            raise InvalidArgumentError(
                f"{directory} is no composite: it was saved with {handlers}. Restore it with that handler, or with "
                "ckpt_hooks.restore."
            )
        return handlers if isinstance(handlers, Mapping) else {}

    def metadata(self, directory: epath.Path) -> CompositeArgs:
        """{item: what its handler tells}; None for an item whose handler is not known or tells nothing."""
        if not is_directory(directory):
            raise CheckpointNotFoundError(f"there is no checkpoint at {directory}")
        recorded = self._recorded_handlers(directory)
        present = _present_items(directory, recorded, _checksums_of(directory, recorded))
        return CompositeArgs(**{name: self._item_metadata(directory / name, recorded.get(name)) for name in present})

    def _item_metadata(self, path: epath.Path, recorded: str | None) -> Any:
        try:
            return method_of(self._known_handler(path, recorded, False), "metadata")(path)
        except (InvalidArgumentError, NotImplementedError):
            return None

    # -------------------------------------------------------------- handlers

    def _pin(self, name: str, args: Any) -> _Handler:
        """The handler of an item, checked and, at its first use, chosen."""
        _check_item(name, args)
        pinned = self._handlers.get(name)
        registered = self._registered_handler(name, args)  # for these very args, so it goes before what is pinned
        if pinned is None or registered not in (None, pinned.handler):
            handler = registered or self._build(name, get_registered_handler_cls(args))
            pinned = self._handlers[name] = _Handler(handler)
            method_of(handler, "take_part")(self._options.multiprocessing_options)
        if registered is None and type(args) not in pinned.args_classes:
            raise InvalidArgumentError(
                f"item {name!r}: {type(args).__qualname__} does not match with any registered handler; the item is "
                f"handled by {type(pinned.handler).__qualname__}"
            )
        return pinned

    def _registered_handler(self, name: str, args: CheckpointArgs) -> Any:
        try:
            return self._registry.get(name, args)
        except HandlerNotFoundError:
            return None  # the args class itself may have a handler

    def _known_handler(self, path: epath.Path, recorded: str | None, asked: bool) -> Any:
        """The handler of an item without args: the one it has, the registry's, or by its files or recorded name."""
        if path.name in self._handlers:
            return self._handlers[path.name].handler
        for (name, _), handler in self._registry.get_all_entries().items():
            if name == path.name:
                return handler
        if asked and recorded is None and not recognize_handler(os.fspath(path)):
            raise InvalidArgumentError(f"item {path.name!r}: give its args, since its handler is not known")
        return self._build(path.name, handler_class_on_disk(os.fspath(path), recorded))

    def _build(self, name: str, handler_cls: type) -> Any:
        """The handler of a class for an item, the same each time."""
        if (name, handler_cls) not in self._built:
            self._built[name, handler_cls] = build_handler(handler_cls)
        return self._built[name, handler_cls]

    def _all_handlers(self) -> list[Any]:
        """Each handler that was given, registered or built, once."""
        pinned = [pinned.handler for pinned in self._handlers.values()]
        registered = self._registry.get_all_entries().values()
        return list({id(unwrapped(h)): h for h in [*pinned, *registered, *self._built.values()]}.values())

    def close(self) -> None:
        for handler in self._all_handlers():
            method_of(handler, "close")()


class _Handler:
    """A handler with what every save asks of it, looked up once."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.stage = method_of(handler, "stage")
        self.args_classes = get_registered_args_cls(handler) if has_registered_args(handler) else ()
        self.recorded_name = recorded_name(handler)
        inherited = getattr(type(handler), "finalize", None) is CheckpointHandler.finalize
        self.finalize = None if inherited else getattr(handler, "finalize", None)


def _check_item(name: str, args: Any) -> None:
    if not _can_name_a_directory(name):
        shown = name if len(name) <= _MAX_NAME_NBYTES else f"{name[:20]}..."
        raise InvalidArgumentError(
            f"{shown!r} cannot be an item's name, which names a directory: at most {_MAX_NAME_NBYTES} bytes without a "
            "slash, and none of a checkpoint's own files. Put the state a level deeper, as in "
            f'{{"params": {{{shown!r}: ...}}}}.'
        )
    if args is None:
        raise InvalidArgumentError(f"item {name!r}: nothing to save was given (None)")
    if not isinstance(args, CheckpointArgs):
        raise InvalidArgumentTypeError(
            f"item {name!r}: wrap the value in an args class, such as args.StandardSave(x); got {type(args)}"
        )


def _can_name_a_directory(name: str) -> bool:
    if not name or "/" in name or "\0" in name or name in _TAKEN_NAMES or is_temporary(name):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_NBYTES
    except UnicodeEncodeError:  # half a character
        return False


def _checksums_of(directory: epath.Path, recorded: Mapping[str, str]) -> FileChecksums | None:
    """Those of a checkpoint; the items that a handler has saved by itself, or inside another item, have none here."""
    path = os.fspath(directory)
    return FileChecksums.of_checkpoint(path, METADATA_FILE) if recorded else FileChecksums.read(path)


def _present_items(directory: epath.Path, recorded: Mapping[str, str], checksums: FileChecksums | None) -> list[str]:
    """The directories that are items; in a checkpoint of ours, one that somebody has put there is none."""
    with os.scandir(directory) as entries:
        present = sorted(entry.name for entry in entries if entry.is_dir() and not is_temporary(entry.name))
    known = None if checksums is None else checksums.items() | recorded.keys()
    return [name for name in present if known is None or name in known]


register_with_handler(CompositeCheckpointHandler, for_save=True, for_restore=True)(CompositeArgs)
