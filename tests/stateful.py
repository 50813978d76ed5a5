"""A stateful object to save beside a state."""

from __future__ import annotations


class Counter:
    """A stateful object, such as a data iterator."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]
