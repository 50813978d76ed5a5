"""The state of an iterator as text and back: JSON, with what JSON lacks (pure).

An addition is an object with one key that starts with ``$``: bytes, tuples, dicts with other keys than strings, NumPy
arrays and scalars, and numbers that are not finite. Bytes that are JSON themselves, such as the state of Grain's
`DataLoader`, are written as they are, so that Grain's own handler and ours read each other's files.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import jax
import numpy as np

from ckpt_hooks.errors import NotSerializableError

__all__ = ["is_json_text", "state_to_text", "text_to_state"]


def is_json_text(state: Any) -> bool:
    """Whether a state is bytes that are JSON already, of a kind that is told from ours.

    >>> is_json_text(b'{"next": 3}'), is_json_text(b"3, 4"), is_json_text({"next": 3})
    (True, False, False)
    """
    if not isinstance(state, bytes):
        return False
    try:
        return _bytes_in(json.loads(state)) is None
    except ValueError:
        return False


def state_to_text(state: Any) -> bytes:
    """What stands in the file. Raises NotSerializableError, which names the place, for what would not come back.

    >>> state_to_text({"seed": 1, "drawn": (2, b"3")})
    b'{"seed": 1, "drawn": {"$tuple": [2, {"$bytes": "Mw=="}]}}'
    >>> state_to_text(b'{"next": 3}')
    b'{"next": 3}'
    """
    return state if is_json_text(state) else json.dumps(_encode(state, "get_state()")).encode()


def text_to_state(text: bytes, *, was_bytes: bool) -> Any:
    """The state of a file's text; `was_bytes` says that text of a kind that both may have written was bytes.

    Raises ValueError where it is no JSON.
    """
    value = json.loads(text)
    return text if was_bytes and _bytes_in(value) is None else _decode(value)


def _bytes_in(value: Any) -> str | None:
    """What our own form of bytes holds."""
    return value["$bytes"] if isinstance(value, dict) and value.keys() == {"$bytes"} else None


def _encode(value: Any, where: str) -> Any:
    match value:
        case np.generic() | np.ndarray() | jax.Array():  # first: a NumPy float64 is a Python float too
            return _encode_array(value, where)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": repr(value)}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: _encode(element, f"{where}[{key!r}]") for key, element in value.items()}
            pairs = [[_encode(k, where), _encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
            return {"$dict": pairs}
        case list():
            return [_encode(element, f"{where}[{i}]") for i, element in enumerate(value)]
        case tuple() if not hasattr(value, "_fields"):  # a named tuple would come back as a plain one
            return {"$tuple": [_encode(element, f"{where}[{i}]") for i, element in enumerate(value)]}
    raise NotSerializableError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}; the state of an iterator is made of "
        "numbers, strings, bytes, lists, tuples, dicts and NumPy arrays."
    )


def _encode_array(value: Any, where: str) -> dict[str, Any]:
    try:
        array = np.asarray(value)
    except TypeError as error:  # a typed PRNG key
        raise NotSerializableError(f"{where} holds what is no array of numbers: {error}") from error
    if array.dtype.kind not in "biufc":
        raise NotSerializableError(f"{where} holds an array of dtype {array.dtype}")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    kind = "$scalar" if isinstance(value, np.generic) else "$array"
    return {kind: [array.dtype.str, list(array.shape), data]}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(element) for element in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("$float", text)]:
            return float(text)
        case [("$bytes", text)]:
            return base64.b64decode(text)
        case [("$tuple", elements)]:
            return tuple(_decode(element) for element in elements)
        case [("$dict", pairs)]:
            return {_decode(key): _decode(element) for key, element in pairs}
        case [("$array" | "$scalar" as kind, (dtype, shape, data))]:
            array = np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
            return array[()] if kind == "$scalar" else array
    return {key: _decode(element) for key, element in value.items()}
