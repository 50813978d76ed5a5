"""A hook with its state bound, for loops that call all their hooks in the same way: with the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckpt_hooks.errors import InvalidArgumentTypeError
from ckpt_hooks.graph_objects import is_graph_object
from ckpt_hooks.requested import check_names

__all__ = ["BoundHook"]


class BoundHook:
    """What `CheckpointHook.bind` returns: ``bound(step)`` is ``hook(step, state(), metrics=metrics(), ...)``.

    Its call has the signature of those of `clu.periodic_actions`, so that it may stand in one list with them.

    >>> import numpy as np, tempfile
    >>> from ckpt_hooks import CheckpointHook
    >>> state = {"w": np.zeros(2)}
    >>> with CheckpointHook(tempfile.mkdtemp(), every_n_steps=2) as hook:
    ...     hooks = [hook.bind(lambda: state, metrics=lambda: {"w": state["w"][0]})]
    ...     for step in range(1, 5):
    ...         state = {"w": state["w"] + 1}
    ...         print([bound(step) for bound in hooks], end=" ")
    ...     hook.wait()
    ...     print(hook.manager.restore(step=2)["w"])
    [False] [True] [False] [True] [2. 2.]
    """

    def __init__(
        self, hook: Callable[..., bool], state: Any, metrics: Any, metadata: Any, items: Mapping[str, Any]
    ) -> None:
        check_names(items)
        if not callable(state) and not is_graph_object(state):
            raise InvalidArgumentTypeError(
                "bind() takes a function that returns the state, as in bind(lambda: state); a "
                f"{type(state).__qualname__} given now would be saved at every step as it is now."
            )
        self._hook, self._items = hook, items
        self._state, self._metrics, self._metadata = state, metrics, metadata

    def __call__(self, step: int, t: float | None = None) -> bool:
        """Saves if a checkpoint is due; arguments, result and errors as of `CheckpointHook`; `t` is not used."""
        del t
        return self._hook(step, self, **self._items)

    def values(self) -> tuple[Any, Any, Any]:
        """(state, metrics, metadata) of this moment; asked for only where a checkpoint is due."""
        return _now(self._state), _now(self._metrics), _now(self._metadata)


def _now(value: Any) -> Any:
    return value() if callable(value) and not is_graph_object(value) else value
