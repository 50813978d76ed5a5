"""Arguments that several classes have: paths, counts, seconds, options. They are checked before anything is read."""

from __future__ import annotations

import math
import numbers
import os
import re
from typing import Any, TypeVar

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError

__all__ = ["given_or_new", "require_count", "require_path", "require_secs"]

_T = TypeVar("_T")


def require_path(path: Any, what: str) -> str:
    """A path as text, with ``~`` expanded.

    Raises InvalidArgumentTypeError for what is none, and InvalidArgumentError for "", which would be the working
    directory and is, most often, an option that nobody has set.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InvalidArgumentTypeError(f"{what} is a path, as a str or a pathlib.Path; got {path!r}")
    if not text:
        raise InvalidArgumentError(f'{what} is "", which names no directory; for the working directory, give "."')
    return os.path.expanduser(text)


def require_count(count: Any, what: str, *, at_least: int = 0) -> int:
    """An integer, also one of NumPy's. Raises InvalidArgumentTypeError, and InvalidArgumentError for one too small.

    >>> require_count(2, "num_ahead")
    2
    """
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise InvalidArgumentTypeError(f"{what} is an int; got {count!r} ({type(count).__name__})")
    if count < at_least:
        raise InvalidArgumentError(f"{what} is at least {at_least}; got {count}")
    return int(count)


def require_secs(secs: Any, what: str) -> None:
    """Raises InvalidArgumentTypeError for what is no number, and InvalidArgumentError for one that bounds no wait."""
    if isinstance(secs, bool) or not isinstance(secs, numbers.Real):
        raise InvalidArgumentTypeError(f"{what} is a number of seconds; got {secs!r} ({type(secs).__name__})")
    if not 0 < float(secs) < math.inf:
        raise InvalidArgumentError(f"{what} is a positive number of seconds; got {secs!r}")


def given_or_new(options: Any, kind: type[_T]) -> _T:
    """Options, or the default ones where there are None. Raises InvalidArgumentTypeError for another kind."""
    if options is None:
        return kind()
    if not isinstance(options, kind):
        argument = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()  # FileOptions is given as file_options
        raise InvalidArgumentTypeError(f"{argument} is a {kind.__name__}, or None; got {options!r}")
    return options
