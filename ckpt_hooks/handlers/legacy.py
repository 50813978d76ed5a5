"""Handlers that never registered args classes: their own arguments are carried through unchanged."""

from __future__ import annotations

from typing import Any

from etils import epath

from ckpt_hooks.errors import InvalidArgumentTypeError
from ckpt_hooks.handlers.base import (
    AsyncSave,
    CheckpointArgs,
    CheckpointHandler,
    StagedSave,
    has_registered_args,
    method_of,
    register_with_handler,
    typestr_of,
)

__all__ = ["LegacyHandler", "recorded_name", "unwrapped", "wrap_legacy"]


class LegacyHandler(CheckpointHandler):
    """Gives a handler whose methods take ``(directory, *args, **kwargs)`` the contract of today's."""

    needs_own_args = True

    def __init__(self, handler: Any) -> None:
        self.wrapped = handler

    def save(self, directory: epath.Path, args: LegacyArgs) -> None:
        self.wrapped.save(directory, *args.args, **args.kwargs)

    def restore(self, directory: epath.Path, args: LegacyArgs | None = None) -> Any:
        args = args or LegacyArgs()
        return self.wrapped.restore(directory, *args.args, **args.kwargs)

    def stage(self, args: LegacyArgs) -> StagedSave:
        if not hasattr(self.wrapped, "async_save"):
            return StagedSave(write=lambda directory: None, begin=lambda directory: self.save(directory, args))
        begun = AsyncSave()

        def write(directory: epath.Path) -> None:
            if begun.has_started:
                begun.wait()
            else:
                self.save(directory, args)

        def detach(directory: epath.Path) -> None:  # only where training goes on
            begun.start(self.wrapped.async_save(directory, *args.args, **args.kwargs))

        return StagedSave(write, detach=detach)

    def metadata(self, directory: epath.Path) -> Any:
        return method_of(self.wrapped, "metadata")(directory)

    def finalize(self, directory: epath.Path) -> None:
        method_of(self.wrapped, "finalize")(directory)

    def close(self) -> None:
        method_of(self.wrapped, "close")()


class LegacyArgs(CheckpointArgs):
    """Arguments as they were given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


register_with_handler(LegacyHandler, for_save=True, for_restore=True)(LegacyArgs)


def wrap_legacy(handler: Any) -> Any:
    """The handler itself where it registered args classes, else wrapped.

    Raises InvalidArgumentTypeError for what is no handler.
    """
    if isinstance(handler, type) or not (hasattr(handler, "save") or hasattr(handler, "restore")):
        raise InvalidArgumentTypeError(f"a handler is an object, as StandardCheckpointHandler() is; got {handler!r}")
    return handler if has_registered_args(handler) else LegacyHandler(handler)


def unwrapped(handler: Any) -> Any:
    """The handler as it was given."""
    return handler.wrapped if isinstance(handler, LegacyHandler) else handler


def recorded_name(handler: Any) -> str:
    """The name under which a checkpoint records a handler."""
    return typestr_of(unwrapped(handler), recorded=True)
