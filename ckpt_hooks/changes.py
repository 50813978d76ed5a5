"""How what was saved may differ from what it is restored into: in part, renamed, in another dtype, with gaps.

A path has slashes between its keys and begins with the item: ``params/encoder/kernel``. Inside an item the keys stand
with dots between them, as they do in the checkpoint. A dot or a slash within a key, as Haiku's ``mlp/~/linear_0`` has,
counts as one between keys.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks import tree
from ckpt_hooks.errors import (
    InvalidArgumentError,
    InvalidArgumentTypeError,
    ItemNotFoundError,
    NameCollisionError,
    StructureMismatchError,
)

__all__ = ["EXACT", "Changes", "is_floating"]

Rename = Mapping[str, str] | Callable[[str], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What may differ; all paths begin with an item, until `within` has made them those of one.

    Attributes:
      cast: whether dtypes are converted to those of `like`; or a dtype, to which every floating-point array is.
      missing: whether a leaf that was not saved is an error or keeps the value that it has in `like`.
      unexpected: whether a saved leaf that `like` lacks is an error or is left out.
      rename: {saved path, or the beginning of several: the path in `like`}, or a function of paths.
      only: the paths to restore, or patterns (``*``, ``?``, ``[...]``) of them; none for all. A path also stands for
        all below it.
      typed: whether, where there is no `like`, the types of the state come back.

    >>> changes = Changes(rename={"params/old": "params/new"}).within("params")
    >>> changes.renamed(["old.kernel", "other"])
    {'new.kernel': 'old.kernel', 'other': 'other'}
    """

    cast: Any = False
    missing: Literal["error", "keep"] = "error"
    unexpected: Literal["error", "ignore"] = "error"
    rename: Rename | None = None
    only: tuple[str, ...] = ()
    typed: bool = False
    item: str = ""

    @classmethod
    def checked(
        cls, cast: Any, missing: Any, unexpected: Any, rename: Any, typed: bool = False, *, has_target: bool
    ) -> Self:
        """Raises InvalidArgumentError for what is none, or needs a `like` where there is none."""
        if missing not in ("error", "keep"):
            raise InvalidArgumentError(f'missing= is "error" or "keep", got {missing!r}')
        if unexpected not in ("error", "ignore"):
            raise InvalidArgumentError(f'unexpected= is "error" or "ignore", got {unexpected!r}')
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise InvalidArgumentError(f"rename= is a dict of paths or a function of a path, got {rename!r}")
        if not has_target and (missing, unexpected, rename) != ("error", "error", None):
            raise InvalidArgumentError("missing=, unexpected= and rename= say how to fit `like`, and none was given")
        if isinstance(rename, Mapping):
            rename = {_without_end(old): _without_end(new) for old, new in rename.items()}
        for old, new in rename.items() if isinstance(rename, Mapping) else ():
            if not (isinstance(old, str) and isinstance(new, str) and old and new):
                raise InvalidArgumentError(f"rename= has paths as in 'params/dense', got {old!r}: {new!r}")
            if ("/" in old) != ("/" in new) or ("/" in old and old.split("/")[0] != new.split("/")[0]):
                raise InvalidArgumentError(
                    f"rename={{{old!r}: {new!r}}}: a leaf stays in its item. Rename a whole item by its name alone."
                )
        if not isinstance(cast, bool):
            try:
                cast = np.dtype(cast)
            except TypeError as error:
                raise InvalidArgumentError(f"cast= is True, False or a dtype, got {cast!r}") from error
            if not jnp.issubdtype(cast, jnp.floating):
                raise InvalidArgumentError(f"cast={cast}: only floating-point arrays are converted to a given dtype")
        if typed and has_target:
            raise InvalidArgumentError(
                "typed=True is for a restore without `like`; it has its own types, so leave one out"
            )
        return cls(cast=cast, missing=missing, unexpected=unexpected, rename=rename, typed=typed)

    def selecting(self, paths: Iterable[Any] | None) -> tuple[list[str] | None, Changes]:
        """The items that `paths` are in (None for all), and these changes with what of them is asked for."""
        if paths is None:
            return None, self
        if isinstance(paths, str):
            raise InvalidArgumentError(f'items= is a list of names, as in items=("{paths}",)')
        if not isinstance(paths, Iterable):
            raise InvalidArgumentTypeError(f"items= is a list of names or paths, which are strings; got {paths!r}")
        paths = list(paths)
        wrong = [path for path in paths if not isinstance(path, str)]
        if wrong:
            raise InvalidArgumentError(f"items= is a list of names or paths, which are strings; got {wrong}")
        paths = [path.rstrip("/") or path for path in paths]
        names = list(dict.fromkeys(path.split("/")[0] for path in paths))
        whole = {path for path in paths if "/" not in path}
        only = tuple(path for path in paths if path.split("/")[0] not in whole)
        if self.typed and only:
            raise InvalidArgumentError(f"typed=True gives whole items back, not parts of them: {only}")
        return names, dataclasses.replace(self, only=only)

    def within(self, item: str) -> Changes:
        """Those of one item, whose paths no longer begin with it; ``""`` for a checkpoint without items."""
        begin = f"{item}/" if item else ""

        def inner(paths: Iterable[str]) -> list[str]:
            return [path for path in paths if path.startswith(begin) and (not begin or "/" in path)]

        rename = self.rename
        if isinstance(rename, Mapping):
            rename = {_name(old, begin): _name(rename[old], begin) for old in inner(rename)}
        only = tuple(_name(path, begin) for path in inner(self.only))
        return dataclasses.replace(self, rename=rename or None, only=only, item=item)

    def below(self, item: str) -> Changes:
        """These, where there is only this one item, so that paths in `rename` need not begin with it."""
        if not isinstance(self.rename, Mapping):
            return self
        begin = {old: "" if f"{old}/".startswith(f"{item}/") else f"{item}/" for old in self.rename}
        rename = {begin[old] + old: begin[old] + new for old, new in self.rename.items()}
        return dataclasses.replace(self, rename=rename)

    def of_whole_tree(self, asked: Iterable[str]) -> Changes:
        """Those of a tree whose top keys are taken for items, of which these are asked for."""
        parts = {path.split("/")[0] for path in self.only}
        changes = self.within("")
        return dataclasses.replace(changes, only=(*changes.only, *(name for name in asked if name not in parts)))

    def saved_items(self, names: Iterable[str]) -> dict[str, str]:
        """{name: the name under which the item was saved}."""
        renamed = self.rename if isinstance(self.rename, Mapping) else {}
        old_of = {new: old for old, new in renamed.items() if "/" not in old}
        # What was renamed away is no longer there under its own name.
        return {name: old_of.get(name, "" if name in old_of.values() else name) for name in names}

    def require_renamed_items(self, saved: Iterable[str]) -> None:
        """Raises InvalidArgumentError where `rename` has a path in an item that was not saved."""
        known = sorted(saved)
        for old in self.rename if isinstance(self.rename, Mapping) else ():
            item = old.split("/")[0]
            if item not in known:
                meant = tree.nearest(item, known)
                hint = f"; is it {'/'.join([meant, *old.split('/')[1:]])!r}?" if meant else "."
                raise InvalidArgumentError(
                    f"rename=: nothing is saved at {old!r}{hint} A path begins with its item, which is one of {known}."
                )

    # -------------------------------------------------------------- one item

    @property
    def has_new_names(self) -> bool:
        """Whether leaves may have other names than they were saved under."""
        return self.rename is not None

    @functools.cached_property
    def is_exact(self) -> bool:
        """Whether nothing may differ but what `cast=True` allows."""
        return self == dataclasses.replace(EXACT, cast=bool(self.cast is True), item=self.item)

    def renamed(self, saved: Iterable[str], wanted: Collection[str] = ()) -> dict[str, str]:
        """{name: saved name}, of the names that are `wanted` as they are written there.

        Raises NameCollisionError, and InvalidArgumentError for what renames nothing.
        """
        if self.rename is None:
            return {name: name for name in saved}
        known = list(saved)
        new_names = self._by_function(self.rename, known) if callable(self.rename) else self._by_table(known)
        slashed = {_dotted(name): name for name in wanted if "/" in name}
        if slashed:
            new_names = [new if new in wanted else slashed.get(_dotted(new), new) for new in new_names]
        found: dict[str, str] = {}
        for old, new in zip(known, new_names, strict=True):
            if new in found:
                raise NameCollisionError(
                    f"rename= makes {self.path(new)} of {self.path(found[new])} and {self.path(old)}"
                )
            found[new] = old
        return found

    def _by_function(self, rename: Callable[[str], str], names: Sequence[str]) -> list[str]:
        renamed = []
        for name in names:
            path = self.path(name)
            try:
                new: object = rename(path)
            except Exception as error:  # the caller's own, which must not be taken for damage of the checkpoint
                raise InvalidArgumentError(
                    f"rename=: the function fails for {path!r}: {type(error).__name__}: {error}"
                ) from error
            begin = f"{self.item}/" if self.item else ""
            if not isinstance(new, str) or (new != path and not new.startswith(begin)):
                raise InvalidArgumentError(f"rename=: {path!r} became {new!r}; a leaf stays in its item {self.item!r}")
            renamed.append(name if new == path else _name(new, begin))
        return renamed

    def _by_table(self, names: Sequence[str]) -> list[str]:
        assert isinstance(self.rename, Mapping)
        renamed, used = [], set()
        for name in names:
            parts = [old for old in self.rename if _is_at(_dotted(name), old)]
            longest = max(parts, key=len, default=None)  # the most specific one
            used.add(longest)
            renamed.append(name if longest is None else self.rename[longest] + name[len(longest) :])
        for old in self.rename.keys() - used:
            meant = tree.nearest(old, _places(names))
            hint = f"; is it {self.path(meant)!r}?" if meant else ""
            raise InvalidArgumentError(f"rename=: nothing is saved at {self.path(old)!r}{hint}")
        return renamed

    def selects(self, name: str) -> bool:
        """Whether a leaf is asked for."""
        return not self.only or any(_matches(name, pattern) for pattern in self.only)

    def require_some(self, names: Iterable[str]) -> None:
        """Raises ItemNotFoundError unless each of `only` selects at least one of the names."""
        known = list(names)
        for pattern in self.only:
            if not any(_matches(name, pattern) for name in known):
                meant = tree.nearest(pattern, _places(known))
                hint = f"; is it {self.path(meant)!r}?" if meant else f"; there are {len(known)} leaves"
                raise ItemNotFoundError(f"items=: nothing is saved at {self.path(pattern)!r}{hint}")

    def wanted(self, targets: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of `like` that are restored; all others keep their values."""
        chosen = {name: leaf for name, leaf in targets.items() if self.selects(name)}
        if self.missing == "keep":
            empty = [name for name in chosen if name not in saved and isinstance(chosen[name], jax.ShapeDtypeStruct)]
            if empty:
                paths = ", ".join(map(self.path, empty))
                raise StructureMismatchError(
                    f'missing="keep": {paths} was not saved, and is a jax.ShapeDtypeStruct in `like`, which has no '
                    "value to keep. Give an array there; instead of restore_or_init(f), that is restore(f())."
                )
            chosen = {name: leaf for name, leaf in chosen.items() if name in saved}
        if isinstance(self.cast, np.dtype):
            return {name: _retyped(leaf, self.cast) for name, leaf in chosen.items()}
        return chosen

    def path(self, name: str) -> str:
        """How the user calls a leaf."""
        inner = name.replace(".", "/")
        return f"{self.item}/{inner}" if self.item and inner else inner or self.item


EXACT = Changes()


def _name(path: str, begin: str) -> str:
    return _dotted(path[len(begin) :])


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _places(names: Iterable[str]) -> list[str]:
    """Where something is saved: the leaves and what they are in."""
    places: dict[str, None] = {}
    for name in names:
        keys = _dotted(name).split(".")
        places |= dict.fromkeys(".".join(keys[:count]) for count in range(1, len(keys) + 1))
    return list(places)


def _without_end(path: Any) -> Any:
    return path.rstrip("/") if isinstance(path, str) else path


def _is_at(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _matches(name: str, pattern: str) -> bool:
    """Whether a leaf is at the place that a pattern names, or below it; brackets may also be those of a key."""
    dotted = _dotted(name)
    return (
        _is_at(dotted, pattern) or fnmatch.fnmatchcase(dotted, pattern) or fnmatch.fnmatchcase(dotted, f"{pattern}.*")
    )


def is_floating(dtype: Any) -> bool:
    """Whether a dtype is one of the floating-point types, bfloat16 and the like among them."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _retyped(leaf: Any, dtype: np.dtype) -> Any:
    """The leaf of `like` with another dtype, if it is a floating-point array."""
    if not hasattr(leaf, "shape") or not is_floating(getattr(leaf, "dtype", np.dtype(object))):
        return leaf
    if isinstance(leaf, np.ndarray):
        return np.broadcast_to(np.zeros((), dtype), leaf.shape)  # its values are not looked at
    if isinstance(leaf, np.generic):
        return np.zeros((), dtype)[()]
    is_bound = getattr(leaf, "committed", True)
    sharding = leaf.sharding if is_bound else None
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]
