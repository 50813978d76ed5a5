"""Which checkpoints stay. Pure: steps and metrics in, the steps to keep out.

A checkpoint stays if any policy keeps it; the newest always does.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, MetricNotFoundError
from ckpt_hooks.triggers import check_step

__all__ = [
    "BestN",
    "EveryNSteps",
    "LatestN",
    "Retention",
    "RetentionPolicy",
    "best_step",
    "check_policies",
    "steps_to_keep",
]

Mode = Literal["min", "max"]
Metrics = Mapping[str, object]


class RetentionPolicy(Protocol):
    """Decides which of the steps of a run stay."""

    def keep(self, metrics: Mapping[int, Metrics]) -> set[int]:
        """The steps to keep, of those in `metrics`: {step: what was recorded at it}."""


@dataclasses.dataclass(frozen=True)
class LatestN:
    """Keeps the `n` newest.

    >>> sorted(LatestN(2).keep({10: {}, 20: {}, 30: {}}))
    [20, 30]
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive(self.n, "LatestN(n)")

    def keep(self, metrics: Mapping[int, Metrics]) -> set[int]:
        return set(sorted(metrics)[-self.n :])


@dataclasses.dataclass(frozen=True)
class BestN:
    """Keeps the `n` best by a recorded metric; of equals, the newer. NaN and infinity never rank.

    Where nothing that was recorded ranks, it keeps the `n` newest.

    >>> sorted(BestN(1, "loss").keep({10: {"loss": 0.2}, 20: {"loss": "NaN"}, 30: {"loss": 0.5}}))
    [10]
    """

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _check_positive(self.n, "BestN(n)")
        _check_metric(self.metric, self.mode)

    def keep(self, metrics: Mapping[int, Metrics]) -> set[int]:
        best = ranked(metrics, self.metric, self.mode) or sorted(metrics, reverse=True)
        return set(best[: self.n])


@dataclasses.dataclass(frozen=True)
class EveryNSteps:
    """Keeps each step that `n` divides.

    >>> sorted(EveryNSteps(20).keep({10: {}, 20: {}, 30: {}}))
    [20]
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive(self.n, "EveryNSteps(n)")

    def keep(self, metrics: Mapping[int, Metrics]) -> set[int]:
        return {step for step in metrics if step % self.n == 0}


class Retention:
    """What the policies of a run say, with what they need to know in order to say it.

    A policy that counts (`LatestN`, `EveryNSteps`) says of a step that is no longer among the `newest` whether it
    stays for good, so that it need be asked only once. Any other wants the metrics of every step.

    Attributes:
      policies: none where everything stays.
      newest: how many of the newest stay whatever they recorded; at least one.
      ranks: whether there is a policy that does not only count.
    """

    def __init__(self, keep: object) -> None:
        self.policies = check_policies(keep)
        # By their very types: a subclass may have a `keep` of its own.
        latest = [policy for policy in self.policies if type(policy) is LatestN]
        every = [policy for policy in self.policies if type(policy) is EveryNSteps]
        others = [policy for policy in self.policies if type(policy) not in (LatestN, EveryNSteps)]
        self.newest = max((policy.n for policy in latest), default=1)
        self.ranks = bool(others)
        self._every = [policy.n for policy in every]
        self._choosing = (LatestN(self.newest), *others)

    def stays_for_good(self, step: int) -> bool:
        """Whether the step stays whichever others there are."""
        return not self.policies or any(step % n == 0 for n in self._every)

    def ranking(self, metric: str | None, mode: Mode | None) -> tuple[str, Mode]:
        """What to rank by: what is given, and otherwise what the first `BestN` says."""
        policy = next((policy for policy in self.policies if isinstance(policy, BestN)), None)
        if metric is None and policy is None:
            raise InvalidArgumentError(
                'best_step() of what? Give a metric (best_step("loss")), or a BestN policy in keep='
            )
        if policy is not None and metric in (None, policy.metric):
            metric, mode = policy.metric, mode or policy.mode
        return str(metric), mode or "min"

    def choose(self, metrics: Mapping[int, Metrics]) -> set[int]:
        """The steps that stay because of how they compare with the others in `metrics`."""
        return steps_to_keep(self._choosing, metrics)


def check_policies(keep: object) -> tuple[RetentionPolicy, ...]:
    """`keep` as policies: an int is `LatestN`, None keeps everything."""
    if keep is None:
        return ()
    if isinstance(keep, numbers.Integral) and not isinstance(keep, bool):
        return (LatestN(int(keep)),)
    policies = tuple(keep) if isinstance(keep, list | tuple) else (keep,)
    for policy in policies:
        if isinstance(policy, type) or not callable(getattr(policy, "keep", None)):
            raise InvalidArgumentTypeError(
                f"keep is a number, a policy such as LatestN(3), or a list of policies; got {policy!r}"
            )
    if not policies:
        raise InvalidArgumentError("keep=[] would keep nothing; give a policy, or None to keep everything")
    return policies


def steps_to_keep(policies: Iterable[RetentionPolicy], metrics: Mapping[int, Metrics]) -> set[int]:
    """The steps that stay, of those in `metrics`."""
    policies = tuple(policies)
    if not policies or not metrics:
        return set(metrics)
    kept = {max(metrics)}
    for policy in policies:
        kept |= _kept_by(policy, metrics)
        if isinstance(policy, BestN) and not any(policy.metric in recorded for recorded in metrics.values()):
            # Nobody has recorded the metric yet: what may turn out to be the best must not go.
            return set(metrics)
    return kept


def _kept_by(policy: RetentionPolicy, metrics: Mapping[int, Metrics]) -> set[int]:
    try:
        return policy.keep(metrics) & metrics.keys()  # one of the user's may name steps that are still to come
    except Exception as error:
        raise InvalidArgumentError(
            f"keep has {policy!r}, whose keep() cannot choose among the steps {sorted(metrics)}: "
            f"{type(error).__name__}: {error}. Every checkpoint that is there stays."
        ) from error


def check_recorded(policies: Iterable[RetentionPolicy], metrics: Mapping[int, Metrics], new: Metrics) -> None:
    """Raises MetricNotFoundError once a policy would have to choose by a metric that nobody recorded."""
    for policy in policies:
        if isinstance(policy, BestN) and len(metrics) > policy.n:
            _require_metric(policy.metric, [*metrics.values(), new], f"keep has {policy}")


def ranked(metrics: Mapping[int, Metrics], metric: str, mode: Mode) -> list[int]:
    """The steps that recorded a finite value, best first; of equals, the newer first."""
    sign = 1 if mode == "min" else -1
    values = {step: recorded.get(metric) for step, recorded in metrics.items()}
    finite = {step: value for step, value in values.items() if isinstance(value, int | float) and _is_finite(value)}
    return sorted(finite, key=lambda step: (sign * finite[step], -step))


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # isfinite() fails for an int beyond the range of floats


def best_step(metrics: Mapping[int, Metrics], metric: str, mode: Mode) -> int | None:
    """The best step; None for a run without checkpoints, and where no value is finite."""
    _check_metric(metric, mode)
    if not metrics:
        return None
    _require_metric(metric, metrics.values(), f"best_step({metric!r})")
    steps = ranked(metrics, metric, mode)
    return steps[0] if steps else None


def _require_metric(metric: str, recorded: Iterable[Metrics], asked: str) -> None:
    recorded = list(recorded)
    if not any(metric in metrics for metrics in recorded):
        names: Sequence[str] = sorted({name for metrics in recorded for name in metrics})
        raise MetricNotFoundError(
            f"{asked}, and no checkpoint of this run recorded {metric!r}; recorded are {names}. Pass it in "
            "metrics=, or add it later with record_metrics(step, ...)."
        )


def _check_positive(n: object, what: str) -> None:
    if check_step(n, f"n of {what}") == 0:
        raise InvalidArgumentError(f"{what} keeps at least one; got 0 (keep=None keeps everything)")


def _check_metric(metric: object, mode: object) -> None:
    if not isinstance(metric, str):
        raise InvalidArgumentTypeError(f"a metric's name is a string, got {metric!r}")
    if mode not in ("min", "max"):
        raise InvalidArgumentError(f"mode is 'min' or 'max', got {mode!r}")
