"""The contract of a handler, and the registry that ties args classes to handlers.

A handler saves and restores one kind of item; an args class says what to do with one item of that kind. A save
has two halves, so that training can go on between them: `CheckpointHandler.stage` takes what it needs from the
state, and the `StagedSave` that it returns writes it, possibly in another thread.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

from ckpt_hooks.errors import HandlerNotFoundError, InvalidArgumentError, InvalidArgumentTypeError
from ckpt_hooks.processes import MultiprocessingOptions

__all__ = [
    "AsyncSave",
    "CheckpointArgs",
    "CheckpointHandler",
    "StagedSave",
    "args_for_handler",
    "construct_checkpoint_args",
    "get_handler_type",
    "get_registered_args_cls",
    "get_registered_handler_cls",
    "has_registered_args",
    "method_of",
    "recognize_handler",
    "register_with_handler",
    "typestr_of",
]


class CheckpointArgs:
    """What to save or how to restore one item; subclass it (as a dataclass) for a handler of your own."""


@dataclasses.dataclass(frozen=True)
class StagedSave:
    """The rest of a save, once the state has been taken.

    Attributes:
      write: writes the item into a directory; may run in another thread, while training goes on.
      begin: runs first, before training goes on; for handlers that cannot take the state without a directory.
      detach: runs after `begin` where training will go on before `write` ends: copies what the caller may change
        (or writes some of it, into the item's directory). A save in the foreground does without it, and so without
        the copies.
      nbytes: how many bytes `write` will write, as far as known.
      recorded_name: by which a composite records the item's handler, where the handler's own name does not do.
      item_handlers: of a composite, {item: the name by which its handler is recorded}.
      claim: what every process of a save has to have alike, in words; empty where there is one process.
    """

    write: Callable[[epath.Path], None]
    begin: Callable[[epath.Path], None] | None = None
    detach: Callable[[epath.Path], None] | None = None
    nbytes: int = 0
    recorded_name: str | None = None
    item_handlers: Mapping[str, str] | None = None
    claim: str = ""


class CheckpointHandler(abc.ABC):
    """Saves and restores one kind of item.

    A subclass defines `save` and `restore`, and registers its args classes with `register_with_handler`. To
    let training go on while it writes, it overrides `stage`; or, as Orbax's handlers do, it defines
    ``async def async_save(directory, args)`` that returns futures.

    See ``docs/handlers.md`` for one that can be run.

    Attributes:
      needs_own_args: whether it takes registered args only.
    """

    needs_own_args = False

    @abc.abstractmethod
    def save(self, directory: epath.Path, args: Any) -> None:
        """Writes the item into `directory`, which exists and is empty."""

    @abc.abstractmethod
    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """Reads the item from `directory`."""

    def stage(self, args: Any) -> StagedSave:
        """Takes what `args` wants saved. Refuses here, before anything is written, what cannot be saved."""
        return _stage_by_saving(self, args)

    def metadata(self, directory: epath.Path) -> Any:
        """What there is to know of the saved item without reading it."""
        raise NotImplementedError(f"{type(self).__name__} describes no metadata")

    def finalize(self, directory: epath.Path) -> None:
        """Called in the primary process, when every process has written."""

    def take_part(self, options: MultiprocessingOptions) -> None:
        """Called by the checkpointer that will use this handler: which processes save together, which one commits."""

    def close(self) -> None:
        """Called when the checkpointer is closed."""

    @classmethod
    def typestr(cls) -> str:
        """The handler's name in the registry."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @classmethod
    def recorded_typestr(cls) -> str:
        """The name by which a checkpoint records its handler, for whoever restores it without naming one."""
        return cls.typestr()

    @classmethod
    def recognizes(cls, directory: str) -> bool:
        """Whether the files of an item, whatever its recorded name, are of this handler."""
        del directory
        return False


# ------------------------------------------------------------------ what a handler need not define


def method_of(handler: Any, name: str) -> Any:
    """A method of a handler; of one that does not derive from `CheckpointHandler` and lacks it, what that one does."""
    return getattr(handler, name, None) or functools.partial(getattr(CheckpointHandler, name), handler)


def _stage_by_saving(handler: Any, args: Any) -> StagedSave:
    async_save = getattr(handler, "async_save", None)
    if async_save is None:
        return StagedSave(write=_nothing, begin=lambda directory: handler.save(directory, args=args))
    begun = AsyncSave()
    return StagedSave(
        write=lambda directory: begun.wait(), begin=lambda directory: begun.start(async_save(directory, args=args))
    )


def _nothing(directory: epath.Path) -> None:
    del directory


class AsyncSave:
    """What the `async_save` of a handler has begun.

    Attributes:
      has_started: whether it was called.
    """

    has_started = False

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs `async_save` itself."""
        self.has_started = True
        self._futures = _run(coroutine) or ()

    def wait(self) -> None:
        """Waits for all of its futures; raises the first error."""
        errors = []
        for future in self._futures:
            try:
                future.result()
            except Exception as error:  # the others must not write on into a directory that is being removed
                errors.append(error)
        if errors:
            raise errors[0]


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


# ------------------------------------------------------------------ the registry

_T = TypeVar("_T")
_A = TypeVar("_A", bound=type[CheckpointArgs])

_handler_of_args: dict[type[CheckpointArgs], type] = {}
_save_args_of: dict[type, type[CheckpointArgs]] = {}
_restore_args_of: dict[type, type[CheckpointArgs]] = {}
_handler_of_typestr: dict[str, type] = {}


def typestr_of(handler: Any, *, recorded: bool = False) -> str:
    """The name of a handler (or its class), also of one that does not derive from ours."""
    kind = handler if isinstance(handler, type) else type(handler)
    named = getattr(handler, "recorded_typestr", None) if recorded else None
    named = named or getattr(handler, "typestr", None)
    return str(named()) if named is not None else f"{kind.__module__}.{kind.__qualname__}"


def register_with_handler(handler_cls: type, for_save: bool = False, for_restore: bool = False) -> Callable[[_A], _A]:
    """Decorates an args class: this is what `handler_cls` takes to save, to restore, or both.

    Raises ValueError where neither is asked for or another class has the handler's name already, TypeError
    where the decorated class is no CheckpointArgs.

    >>> class LabelsHandler(CheckpointHandler):
    ...     def save(self, directory, args): (directory / "labels").write_text(args.labels)
    ...     def restore(self, directory, args=None): return (directory / "labels").read_text()
    >>> @register_with_handler(LabelsHandler, for_save=True, for_restore=True)
    ... @dataclasses.dataclass
    ... class LabelsArgs(CheckpointArgs):
    ...     labels: str = ""
    >>> get_registered_handler_cls(LabelsArgs("a b")) is LabelsHandler
    True
    """
    if not for_save and not for_restore:
        raise InvalidArgumentError(f"register {handler_cls.__name__} for_save, for_restore, or both")
    name = typestr_of(handler_cls)
    known = _handler_of_typestr.get(name, handler_cls)
    if _qualified(known) != _qualified(handler_cls):
        raise InvalidArgumentError(f"the handler name {name!r} belongs to {_qualified(known)} already")

    def register(args_cls: _A) -> _A:
        kind: object = args_cls
        if not isinstance(kind, type) or not issubclass(kind, CheckpointArgs):
            raise InvalidArgumentTypeError(f"{args_cls!r} is registered with a handler, but is no CheckpointArgs")
        _handler_of_typestr[name] = handler_cls
        _handler_of_args[args_cls] = handler_cls
        if for_save:
            _save_args_of.setdefault(handler_cls, args_cls)
        if for_restore:
            _restore_args_of.setdefault(handler_cls, args_cls)
        return args_cls

    return register


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _nearest(kind: type, registry: Mapping[type, _T]) -> _T | None:
    """What is registered for a class, or for the first one that it inherits from."""
    for cls in kind.__mro__:
        if cls in registry:
            return registry[cls]
    return None


def get_registered_handler_cls(args: CheckpointArgs | type[CheckpointArgs]) -> type:
    """The handler of an args class or object. TypeError for something else, ValueError where there is none."""
    args_cls = args if isinstance(args, type) else type(args)
    if not issubclass(args_cls, CheckpointArgs):
        raise InvalidArgumentTypeError(f"{args_cls!r} is no CheckpointArgs; wrap the value, as in args.StandardSave(x)")
    handler_cls = _nearest(args_cls, _handler_of_args)
    if handler_cls is None:
        raise InvalidArgumentError(f"{args_cls.__qualname__} is not registered: decorate it with register_with_handler")
    return handler_cls


def get_registered_args_cls(handler: Any) -> tuple[type[CheckpointArgs], type[CheckpointArgs]]:
    """The (save, restore) args classes of a handler. Raises ValueError where one of them is missing."""
    kind = handler if isinstance(handler, type) else type(handler)
    save_cls, restore_cls = _nearest(kind, _save_args_of), _nearest(kind, _restore_args_of)
    if save_cls is None or restore_cls is None:
        missing = "save" if save_cls is None else "restore"
        raise InvalidArgumentError(f"{kind.__qualname__} has no registered args class to {missing} with")
    return save_cls, restore_cls


def has_registered_args(handler: Any) -> bool:
    """Whether a handler has args classes to save and to restore with."""
    try:
        get_registered_args_cls(handler)
    except InvalidArgumentError:
        return False
    return True


# Orbax's names for what these handlers read: it has several, of which only the last part is stable.
_ALIASES = {
    "PyTreeCheckpointHandler": "StandardCheckpointHandler",
    "PyTreeHandler": "StandardCheckpointHandler",
    "MetricsHandler": "JsonCheckpointHandler",
    "JsonHandler": "JsonCheckpointHandler",
    "JaxRandomKeyCheckpointHandler": "ArrayCheckpointHandler",
    "NumpyRandomKeyCheckpointHandler": "ArrayCheckpointHandler",
}


def get_handler_type(typestr: str) -> type:
    """The handler class of a recorded name, Orbax's included. Raises KeyError where nobody knows it."""
    if typestr in _handler_of_typestr:
        return _handler_of_typestr[typestr]
    last = typestr.rpartition(".")[2]
    if typestr.startswith("orbax."):
        for known, handler_cls in _handler_of_typestr.items():
            if known.rpartition(".")[2] == _ALIASES.get(last, last):
                return handler_cls
    raise HandlerNotFoundError(
        f"no handler is registered as {typestr!r}. Import the module that defines it, or name the item's args."
    )


def recognize_handler(directory: str) -> type | None:
    """The handler class that knows an item by its files, None where none does."""
    for handler_cls in _handler_of_typestr.values():
        if getattr(handler_cls, "recognizes", lambda directory: False)(directory):
            return handler_cls
    return None


def construct_checkpoint_args(handler: Any, for_save: bool, *args: Any, **kwargs: Any) -> CheckpointArgs:
    """The args object of a call in any of its three forms.

    The first CheckpointArgs among `args`, then among `kwargs`, is taken as it is; otherwise the class that
    `handler` registered is built from all of them.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, CheckpointArgs):
            return value
    save_cls, restore_cls = get_registered_args_cls(handler)
    args_cls = save_cls if for_save else restore_cls
    try:
        return args_cls(*args, **kwargs)
    except TypeError as error:
        if _binds(args_cls, *args, **kwargs):
            raise
        verb = "save" if for_save else "restore"
        raise InvalidArgumentTypeError(
            f"{type(handler).__qualname__} cannot {verb} with these arguments: {error}; it takes "
            f"{args_cls.__qualname__}{_signature_of(args_cls)}"
        ) from None


def _binds(args_cls: type, *args: Any, **kwargs: Any) -> bool:
    try:
        _signature_of(args_cls).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature_of: Callable[[type], inspect.Signature] = functools.cache(inspect.signature)


def args_for_handler(handler: Any, for_save: bool, *args: Any, **kwargs: Any) -> CheckpointArgs:
    """`construct_checkpoint_args`, where an args object of another handler is an error.

    One that is registered with no handler is left to this one, as Orbax does, unless it `needs_own_args`.
    """
    constructed = construct_checkpoint_args(handler, for_save, *args, **kwargs)
    if _nearest(type(constructed), _handler_of_args) is None and not getattr(handler, "needs_own_args", False):
        return constructed
    expected = get_registered_handler_cls(constructed)
    if not isinstance(handler, expected):
        raise InvalidArgumentTypeError(
            f"{type(constructed).__qualname__} is for {expected.__qualname__}, and this checkpointer has a "
            f"{type(handler).__qualname__}"
        )
    return constructed
