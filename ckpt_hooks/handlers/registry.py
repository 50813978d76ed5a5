"""A registry of handlers for the items of a composite: by item and args class, or by args class alone."""

from __future__ import annotations

import os
from typing import Any

from ckpt_hooks.errors import HandlerExistsError, HandlerNotFoundError, InvalidArgumentError
from ckpt_hooks.handlers.base import (
    CheckpointArgs,
    get_handler_type,
    get_registered_handler_cls,
    recognize_handler,
    typestr_of,
)

__all__ = ["DefaultCheckpointHandlerRegistry", "build_handler", "handler_class_on_disk", "handler_on_disk"]

_Entry = tuple[str | None, type[CheckpointArgs]]


class DefaultCheckpointHandlerRegistry:
    """{(item or None, args class): handler}; an entry for None serves every item.

    >>> from ckpt_hooks import args
    >>> registry = DefaultCheckpointHandlerRegistry()
    >>> registry.add("config", args.JsonSave)
    >>> registry.has("config", args.JsonSave)
    True
    """

    def __init__(self, other: DefaultCheckpointHandlerRegistry | None = None) -> None:
        self._entries: dict[_Entry, Any] = dict(other._entries) if other else {}

    def add(self, item: str | None, args: Any, handler: Any = None) -> None:
        """Registers a handler, a handler class, or (None) the one that `args` is registered with.

        Raises ValueError where there is an entry already, where no handler is known for `args`, or where its
        class needs arguments to be built.
        """
        args_cls = args if isinstance(args, type) else type(args)
        if self.has(item, args_cls):
            raise HandlerExistsError(f"item {item!r} with {args_cls.__qualname__} has a handler already")
        handler = get_registered_handler_cls(args_cls) if handler is None else handler
        self._entries[item, args_cls] = build_handler(handler) if isinstance(handler, type) else handler

    def has(self, item: str | None, args: Any) -> bool:
        """Whether there is an entry for exactly this item and args class."""
        return (item, args if isinstance(args, type) else type(args)) in self._entries

    def get(self, item: str | None, args: Any) -> Any:
        """The handler for an item, or for every item. Raises KeyError where there is none."""
        args_cls = args if isinstance(args, type) else type(args)
        for key in ((item, args_cls), (None, args_cls)):
            if key in self._entries:
                return self._entries[key]
        raise HandlerNotFoundError(
            f"no handler is registered for item {item!r} with {args_cls.__qualname__}; registered are "
            f"{[(name, cls.__qualname__) for name, cls in self._entries]}"
        )

    def get_all_entries(self) -> dict[_Entry, Any]:
        """A copy of all entries."""
        return dict(self._entries)


def handler_on_disk(path: str, recorded: str | None) -> Any:
    """A new handler of the class on disk."""
    return build_handler(handler_class_on_disk(path, recorded))


def handler_class_on_disk(path: str, recorded: str | None) -> type:
    """The handler class of an item, or of a checkpoint without items, by its files or by its recorded name.

    Raises InvalidArgumentError where neither is of a registered one.
    """
    recognized = recognize_handler(path)
    if recognized is not None and not _is_known(recorded, besides=recognized):
        return recognized
    try:
        return get_handler_type(recorded or "")
    except HandlerNotFoundError as error:
        raise InvalidArgumentError(
            f'item "{os.path.basename(path)}" was found in the checkpoint, but could not be restored: {error} '
            "Name its args, or give a handler registry."
        ) from error


def _is_known(recorded: str | None, *, besides: type) -> bool:
    """Whether a recorded name is of a registered handler, and not one by which `besides` records itself too."""
    if recorded is None or recorded == typestr_of(besides, recorded=True):
        return False
    try:
        get_handler_type(recorded)
    except HandlerNotFoundError:
        return False
    return True


def build_handler(handler_cls: type) -> Any:
    """An instance of a handler class that needs no arguments; raises ValueError for others."""
    try:
        return handler_cls()
    except TypeError as error:
        raise InvalidArgumentError(
            f"{handler_cls.__qualname__} cannot be built without arguments ({error}); register an instance of it."
        ) from error
