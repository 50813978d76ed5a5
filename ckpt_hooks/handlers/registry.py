"""A registry of handlers for the items of a composite: by item and args class, or by args class alone."""

from __future__ import annotations

from typing import Any

from ckpt_hooks.errors import HandlerExistsError, HandlerNotFoundError, InvalidArgumentError
from ckpt_hooks.handlers.base import CheckpointArgs, get_registered_handler_cls

__all__ = ["DefaultCheckpointHandlerRegistry"]

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


def build_handler(handler_cls: type) -> Any:
    """An instance of a handler class that needs no arguments; raises ValueError for others."""
    try:
        return handler_cls()
    except TypeError as error:
        raise InvalidArgumentError(
            f"{handler_cls.__qualname__} cannot be built without arguments ({error}); register an instance of it."
        ) from error
