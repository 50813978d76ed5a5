"""A saved tree against the structure it is to be restored into: what fits, what does not, and how to say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks import tree
from ckpt_hooks.changes import Changes
from ckpt_hooks.devices import put_bound, put_free, weakly_typed
from ckpt_hooks.errors import StructureMismatchError
from ckpt_hooks.leaves import is_prng_key
from ckpt_hooks.shards import Parts, put_parts
from ckpt_hooks.storage.array_info import ArrayInfo

__all__ = ["SavedLeaf", "fit", "key_dtype", "match", "place_on_devices"]

_ARRAY_TYPES = frozenset({"jax.Array", "np.ndarray"})
_SHOWN = 8  # renamed leaves, in an error
_KINDS = {bool: "bool", int: "integer", float: "float", complex: "complex"}


class SavedLeaf(NamedTuple):
    """A leaf as the checkpoint has it; `info` is None for a string."""

    value_type: str
    info: ArrayInfo | None
    key_impl: str | None = None

    def __str__(self) -> str:
        if self.info is None:
            return "a string"
        if self.key_impl is not None:
            return f"PRNG key {self.key_impl}{list(self.info.shape[:-1])}"
        if self.value_type == "scalar":
            return f"a Python scalar ({self.info.dtype})"
        return f"{self.info.dtype}{list(self.info.shape)}"


def match(saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any], changes: Changes, *, item: str) -> list[str]:
    """The wanted leaves that need `fit`, all others being wanted just as they are saved.

    Raises StructureMismatchError that lists every leaf, wanted or saved, that does not fit.
    """
    problems = []
    is_convertible = True  # what has another type
    other = []
    absent = [name for name in saved if name not in wanted]
    unexpected = [] if changes.unexpected == "ignore" or changes.only else absent
    renamed = {}
    for name, value in wanted.items():
        leaf = saved.get(name)
        if leaf is not None and _is_same_array(leaf, value):
            continue
        if leaf is None:
            meant = tree.nearest(name, absent or saved)
            hint = f" (the checkpoint has {meant!r})" if meant else ""
            if meant in absent:
                renamed[changes.path(meant)] = changes.path(name)
            problems.append(f"missing     {_show(name)}: `like` wants {_describe(value)}, not saved{hint}")
            continue
        other.append(name)
        problem = _misfit(leaf, value, cast=bool(changes.cast))
        if problem:
            problems.append(problem.format(name=_show(name)))
            is_convertible &= _misfit(leaf, value, cast=True) is None
    problems += [f"unexpected  {_show(name)}: saved as {saved[name]}, not in `like`" for name in unexpected]
    if problems:
        raise _mismatch(item, problems, renamed, is_convertible)
    return other


def _mismatch(
    item: str, problems: Sequence[str], renamed: Mapping[str, str] | None = None, is_convertible: bool = True
) -> StructureMismatchError:
    return StructureMismatchError(
        f"{item}: the checkpoint does not fit the structure to restore into ({len(problems)} leaves):\n  "
        + "\n  ".join(problems)
        + "\nBuild `like` as it was when the checkpoint was saved, or accept what differs: "
        + _ways(problems, renamed or {}, is_convertible)
    )


def _ways(problems: Sequence[str], renamed: Mapping[str, str], is_convertible: bool) -> str:
    """The arguments that would accept the problems."""
    kinds = {problem.split(" ", 1)[0] for problem in problems}
    ways = {
        "missing": '`missing="keep"` keeps what `like` has',
        "unexpected": '`unexpected="ignore"` leaves saved leaves out',
        "retyped": "`cast=True` converts "
        + ("arrays of another dtype" if is_convertible else "only numbers into numbers, and no key into another kind"),
        "reshaped": "nothing converts another shape",
        "inexact": "a Python number or a wider dtype in `like` holds these numbers, and `cast=True` rounds them",
        "refused": "a plain number or string of the kind that was saved takes these",
        "cut": "jax_enable_x64 keeps all bits, and so does a NumPy array in `like`",
    }
    rename = [f"`rename={dict(renamed)}` if that is what has changed"] if renamed and len(renamed) <= _SHOWN else []
    return "; ".join([*rename, *(text for kind, text in ways.items() if kind in kinds)]) + "."


def _is_same_array(saved: SavedLeaf, like: Any) -> bool:
    """Whether a leaf is wanted just as it is saved, which nearly all are: the quick answer to `_misfit`."""
    info, dtype = saved.info, getattr(like, "dtype", None)
    return (
        info is not None
        and saved.value_type in _ARRAY_TYPES
        and saved.key_impl is None
        and dtype is not None  # which NumPy takes for float64
        and dtype == info.dtype
        and like.shape == info.shape
        and not isinstance(like, np.generic)
        and (dtype.isnative or isinstance(like, np.ndarray))
    )


def _show(name: str) -> str:
    return name or "(the item itself)"


def _misfit(saved: SavedLeaf, like: Any, *, cast: bool) -> str | None:
    """None where it fits, else a line with a place for the name."""
    if isinstance(like, str) or saved.info is None:
        if isinstance(like, str) and saved.info is None:
            return None
        return f"retyped     {{name}}: saved as {saved}, `like` wants {_describe(like)}"
    if is_prng_key(like) or saved.key_impl is not None:
        return _misfit_key(saved, like)
    number = _number_class(like)
    shape = () if number else getattr(like, "shape", None)
    if shape is None:
        return f"retyped     {{name}}: saved as {saved}, `like` has {_describe(like)}, which is no array"
    if tuple(shape) != saved.info.shape:
        return f"reshaped    {{name}}: saved as {saved}, `like` wants {_describe(like)}"
    if _same_type(saved, like) or (cast and _is_number(getattr(like, "dtype", np.dtype(number or object)))):
        return None
    return f"retyped     {{name}}: saved as {saved}, `like` wants {_describe(like)}"


def _misfit_key(saved: SavedLeaf, like: Any) -> str | None:
    if saved.key_impl is not None and is_prng_key(like):
        assert saved.info is not None
        if key_dtype(saved.key_impl) == like.dtype:
            if tuple(like.shape) == saved.info.shape[:-1]:
                return None
            return f"reshaped    {{name}}: saved as {saved}, `like` wants {_describe(like)}"
    return f"retyped     {{name}}: saved as {saved}, `like` wants {_describe(like)}"


def key_dtype(impl: str) -> Any:
    """The dtype of typed PRNG keys of an implementation, without making one."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _same_type(saved: SavedLeaf, like: Any) -> bool:
    assert saved.info is not None
    number = _number_class(like)
    if number:
        return _kind(saved.info.dtype) == _KINDS[number]
    if saved.value_type == "scalar":
        # A Python number has no width of its own; `fit` refuses it where it would change in value.
        return _kind(saved.info.dtype) == _kind(like.dtype)
    return bool(_native(saved.info.dtype) == _native(like.dtype))


def _native(dtype: Any) -> Any:
    """The dtype in this machine's order of bytes, in which Orbax saves every array."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _dtype_of(like: Any) -> Any:
    """The dtype of what takes the place of `like`: JAX has arrays in this machine's order of bytes alone."""
    return like.dtype if _stays_on_host(like) else _native(like.dtype)


def _number_class(value: Any) -> type | None:
    """Which of Python's numbers a value is, also one of a derived class, such as an IntEnum; None for what is none."""
    kind = type(value)
    if kind in _KINDS:
        return kind
    if isinstance(value, np.generic):  # NumPy's float64 is a float too, and has a dtype
        return None
    return next((number for number in _KINDS if issubclass(kind, number)), None)


def _is_number(dtype: Any) -> bool:
    """Whether an array of this dtype holds numbers or booleans, and no objects, texts or dates."""
    return bool(jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_))


def _kind(dtype: Any) -> str:
    for kind, parent in (("bool", np.bool_), ("integer", np.integer), ("complex", np.complexfloating)):
        if jnp.issubdtype(dtype, parent):
            return kind
    return "float"


def _describe(value: Any) -> str:
    if _number_class(value) or isinstance(value, str):
        return f"a Python {type(value).__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return _qualified(type(value))


def _qualified(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# ------------------------------------------------------------------ values


class _UnfitError(Exception):
    """A value for which there is no place in `like`; the text is a line of the error that lists all of them."""


def fit(
    found: dict[str, Any], leaves: Mapping[str, SavedLeaf], likes: Mapping[str, Any], *, cast: bool, item: str
) -> dict[str, Any]:
    """The values that were found of the leaves which `match` has let pass, each as its place in `like` wants it.

    Raises StructureMismatchError that lists every leaf whose value cannot stand there.
    """
    fitted, problems = {}, []
    for name, value in found.items():
        try:
            fitted[name] = _fit(name, leaves[name], value, likes[name], cast=cast)
        except _UnfitError as error:
            problems.append(str(error))
    if problems:
        raise _mismatch(item, problems)
    return fitted


def _fit(name: str, saved: SavedLeaf, host: Any, like: Any, *, cast: bool) -> Any:
    """A Python number, a NumPy array, a string, a key."""
    if isinstance(host, Parts):
        if saved.key_impl is not None:
            return dataclasses.replace(host, shape=like.shape, dtype=like.dtype, key_impl=saved.key_impl)
        arrays = [_fit(name, saved, array, like, cast=cast) for array in host.arrays]
        return dataclasses.replace(host, arrays=arrays, dtype=_dtype_of(like))
    if saved.info is None:
        return _instance(name, str, type(like), host)
    if saved.key_impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(host), impl=saved.key_impl)
    number = _number_class(like)
    if number:
        return _instance(name, number, type(like), host.item())
    dtype = _dtype_of(like)
    if host.dtype == dtype:
        return host[()] if isinstance(like, np.generic) else host
    converted = host.astype(dtype)
    if not cast and saved.value_type == "scalar" and not _is_same_number(converted.item(), host.item()):
        raise _UnfitError(
            f"inexact     {_show(name)}: the saved Python number {host.item()!r} has no exact {like.dtype}, "
            "which `like` wants"
        )
    return converted[()] if isinstance(like, np.generic) else converted


def _instance(name: str, plain: type, kind: type, value: Any) -> Any:
    """A number or string of the class that `like` has there: `plain`, or what is derived from it, as an enum is."""
    try:
        made = plain(value)
        if kind is plain:
            return made
        instance = kind(made)
    except Exception as error:  # a class of the user's may raise whatever it likes
        raise _UnfitError(
            f"refused     {_show(name)}: saved as {value!r:.80}, which is no {_qualified(kind)}: {error}"
        ) from error
    if instance != made and made == made:
        raise _UnfitError(
            f"refused     {_show(name)}: saved as {value!r:.80}, of which {_qualified(kind)} makes {instance!r:.80}"
        )
    return instance


def _is_same_number(one: Any, other: Any) -> bool:
    """Whether two numbers are equal; a NaN is equal to a NaN here."""
    pairs = ((one.real, other.real), (one.imag, other.imag))
    return all(a == b or (a != a and b != b) for a, b in pairs)


def place_on_devices(names: Sequence[str], values: list[Any], like: Sequence[Any], *, item: str) -> None:
    """Turns host values into JAX arrays where `like` has JAX arrays or abstract ones, in three batched transfers.

    An array that was bound to its devices goes back there; one that was free to move stays free, since JAX
    refuses to mix a bound scalar with arrays that are sharded elsewhere.

    Raises StructureMismatchError that lists every leaf that JAX would cut to fewer bits.
    """
    free: list[int] = []
    bound: list[int] = []
    spread: list[int] = []
    weak: set[int] = set()
    shardings: list[jax.sharding.Sharding] = []
    cut: list[str] = []
    kept_widths: set[Any] = set()  # most leaves share a few dtypes
    is_array: dict[type, bool] = {kind: issubclass(kind, jax.Array) for kind in set(map(type, like))}
    for number, leaf in enumerate(like):
        kind = type(leaf)
        if not is_array[kind] and kind is not jax.ShapeDtypeStruct and _stays_on_host(leaf):
            continue
        if leaf.dtype not in kept_widths:
            if not _width_is_kept(_native(leaf.dtype)):
                cut.append(_cut(names[number], _native(leaf.dtype)))
                continue
            kept_widths.add(leaf.dtype)
        if getattr(leaf, "weak_type", False):
            weak.add(number)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or (is_array[kind] and not leaf.committed):
            free.append(number)
        elif type(values[number]) is Parts:
            spread.append(number)
        else:
            bound.append(number)
            shardings.append(sharding)
    if cut:
        raise _mismatch(item, cut)
    placed = (
        put_free([values[number] for number in free], [number in weak for number in free] if weak else ()),
        put_bound(
            [values[number] for number in bound], shardings, [number in weak for number in bound] if weak else ()
        ),
        put_parts([values[number] for number in spread]),
    )
    for numbers, arrays in zip((free, bound, spread), placed, strict=True):
        for number, array in zip(numbers, arrays, strict=True):
            values[number] = array
    for number in weak.intersection(spread):
        values[number] = weakly_typed(values[number])


def _stays_on_host(like: Any) -> bool:
    return isinstance(like, np.ndarray | np.generic) or not hasattr(like, "dtype")


def _width_is_kept(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype) and dtype.itemsize < 8:  # as nearly all are: quicker
        return True
    return jnp.issubdtype(dtype, jax.dtypes.extended) or jax.dtypes.canonicalize_dtype(dtype) == dtype


def _cut(name: str, dtype: Any) -> str:
    narrower = jax.dtypes.canonicalize_dtype(dtype)
    return f"cut         {_show(name)}: `like` wants a JAX array of {dtype}, which JAX would cut to {narrower}"
