"""Which checkpoints stay: every policy, their union, and metrics that are not numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_hooks.errors import InvalidArgumentError, InvalidArgumentTypeError, MetricNotFoundError
from ckpt_hooks.retention import (
    BestN,
    EveryNSteps,
    LatestN,
    Mode,
    RetentionPolicy,
    best_step,
    check_policies,
    check_recorded,
    ranked,
    steps_to_keep,
)

values = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-100, 100), st.sampled_from(["NaN", "Infinity", None])
)
recorded: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}), st.fixed_dictionaries({"loss": values}), st.fixed_dictionaries({"other": values})
)
runs = st.dictionaries(st.integers(0, 500), recorded, max_size=20)
modes = st.sampled_from(["min", "max"])
counts = st.integers(1, 6)
policies = st.one_of(
    st.builds(LatestN, counts),
    st.builds(EveryNSteps, st.integers(1, 50)),
    st.builds(BestN, counts, st.just("loss"), modes),
)


def finite_losses(run: Mapping[int, Any]) -> dict[int, float]:
    numbers = {step: metrics.get("loss") for step, metrics in run.items()}
    return {s: v for s, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}


@given(runs, st.lists(policies, max_size=3))
def test_the_newest_always_stays_and_nothing_is_invented(run: dict[int, Any], chosen: list[RetentionPolicy]) -> None:
    """Whatever the policies, the newest step stays, and only steps that there are."""
    kept = steps_to_keep(chosen, run)
    assert kept <= run.keys()
    assert not run or max(run) in kept


@given(runs, policies, policies)
def test_each_of_several_policies_may_keep_a_step(
    run: dict[int, Any], one: RetentionPolicy, other: RetentionPolicy
) -> None:
    """With a list of policies, a step that any of them keeps stays."""
    assert steps_to_keep([one, other], run) == steps_to_keep([one], run) | steps_to_keep([other], run)


@given(runs, counts)
def test_latest_n_keeps_exactly_the_newest(run: dict[int, Any], n: int) -> None:
    """LatestN(n) keeps the n greatest steps and no other."""
    assert steps_to_keep([LatestN(n)], run) == set(sorted(run, reverse=True)[:n])


@given(runs, st.integers(1, 50))
def test_every_n_steps_keeps_multiples(run: dict[int, Any], n: int) -> None:
    """EveryNSteps(n) keeps the steps that n divides, and the newest."""
    expected = {step for step in run if step % n == 0} | ({max(run)} if run else set())
    assert steps_to_keep([EveryNSteps(n)], run) == expected


@given(runs, counts, modes)
def test_best_n_keeps_no_worse_than_it_drops(run: dict[int, Any], n: int, mode: Mode) -> None:
    """BestN keeps n finite values where there are so many, none of them worse than one that goes."""
    finite = finite_losses(run)
    kept = BestN(n, "loss", mode).keep(run) & finite.keys()
    assert len(kept) == min(n, len(finite))
    better = min if mode == "min" else max
    for step in finite.keys() - kept:
        assert all(better(finite[k], finite[step]) == finite[k] for k in kept)


@given(runs, modes)
def test_not_a_number_never_ranks(run: dict[int, Any], mode: Mode) -> None:
    """NaN, infinities, names of them and missing values never rank; everything finite does."""
    assert set(ranked(run, "loss", mode)) == finite_losses(run).keys()


def test_one_nan_does_not_cost_the_best() -> None:
    """A NaN recorded after the best one leaves the best one where it is."""
    run: dict[int, Any] = {10: {"loss": 0.1}, 20: {"loss": math.nan}, 30: {"loss": "NaN"}}
    assert steps_to_keep([BestN(1, "loss")], run) == {10, 30}
    assert best_step(run, "loss", "min") == 10
    assert best_step(run, "loss", "max") == 10


def test_of_equals_the_newer_is_best() -> None:
    """Of two equally good checkpoints the newer one is kept, in both modes."""
    run = {10: {"loss": 0.5}, 20: {"loss": 0.5}, 30: {"loss": 0.5}}
    for mode in ("min", "max"):
        assert ranked(run, "loss", mode) == [30, 20, 10]


def test_where_nobody_recorded_the_metric_yet_all_stay() -> None:
    """Before anybody has recorded the metric, BestN lets nothing go: any of them may turn out to be the best."""
    assert steps_to_keep([BestN(1, "loss")], {10: {}, 20: {}}) == {10, 20}


def test_where_no_value_is_finite_the_newest_stay() -> None:
    """A run that recorded nothing but NaN does not fill the disk: the newest n stay."""
    run: dict[int, Any] = {step: {"loss": "NaN"} for step in (10, 20, 30, 40)}
    assert steps_to_keep([BestN(2, "loss")], run) == {30, 40}


def test_numbers_too_large_for_a_float_are_ranked_or_left_out_but_no_crash() -> None:
    """An integer beyond the range of floats does not make retention fail."""
    run: dict[int, Any] = {10: {"loss": 10**400}, 20: {"loss": 1}}
    assert ranked(run, "loss", "min")[0] == 20


def test_best_step_of_an_empty_run_is_none() -> None:
    """Without checkpoints there is no best one, whatever the metric."""
    assert best_step({}, "loss", "min") is None


def test_best_step_without_a_finite_value_is_none() -> None:
    """Where the metric was recorded and is never finite, nothing is the best."""
    assert best_step({10: {"loss": "NaN"}}, "loss", "min") is None


def test_best_step_of_a_metric_nobody_recorded_names_what_is() -> None:
    """Asking for an unknown metric is a KeyError that names those that are recorded."""
    with pytest.raises(MetricNotFoundError, match=r"'accuracy'.*recorded are \['loss', 'top5'\]") as error:
        best_step({10: {"loss": 1.0}, 20: {"top5": 2.0}}, "accuracy", "max")
    assert isinstance(error.value, KeyError)


def test_choosing_by_a_metric_nobody_recorded_is_refused() -> None:
    """A policy that would have to choose by a metric that nobody recorded is refused, naming what is recorded."""
    with pytest.raises(MetricNotFoundError, match=r"BestN.*'accuracy'.*\['loss'\]"):
        check_recorded([BestN(1, "accuracy")], {10: {"loss": 1.0}, 20: {}}, {"loss": 0.5})


def test_a_metric_that_the_new_checkpoint_brings_is_recorded() -> None:
    """The metrics of the checkpoint about to be saved count as recorded, and so do any older one's."""
    check_recorded([BestN(1, "accuracy")], {10: {}, 20: {}}, {"accuracy": 0.5})
    check_recorded([BestN(1, "accuracy")], {10: {"accuracy": 1.0}, 20: {}}, {})


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (None, ()),
        (3, (LatestN(3),)),
        (np.int64(2), (LatestN(2),)),
        (LatestN(2), (LatestN(2),)),
        ([LatestN(2), EveryNSteps(10)], (LatestN(2), EveryNSteps(10))),
        ((BestN(1, "loss", "max"),), (BestN(1, "loss", "max"),)),
    ],
)
def test_keep_in_all_its_forms(keep: Any, expected: tuple[RetentionPolicy, ...]) -> None:
    """An int is LatestN, None keeps everything, a policy or a list of them is taken as it is."""
    assert check_policies(keep) == expected


def test_no_policy_keeps_everything() -> None:
    """keep=None lets nothing go."""
    assert steps_to_keep((), {1: {}, 2: {}}) == {1, 2}


@pytest.mark.parametrize("keep", ["3", 2.5, True, np.True_, [3], object(), {"loss": 1}, LatestN, [LatestN]])
def test_keep_of_another_type_is_refused(keep: Any) -> None:
    """What is neither a number nor a policy, as its class is none, is a TypeError that shows it and says what is."""
    with pytest.raises(InvalidArgumentTypeError, match="keep is a number, a policy"):
        check_policies(keep)


@pytest.mark.parametrize("keep", [0, -1, []])
def test_keep_of_nothing_is_refused(keep: Any) -> None:
    """Keeping no checkpoint, or fewer, is a ValueError."""
    with pytest.raises(InvalidArgumentError):
        check_policies(keep)


@pytest.mark.parametrize("policy", [LatestN, EveryNSteps])
@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_a_policy_of_no_number_is_refused(policy: type, n: Any, error: type[Exception]) -> None:
    """The number of a policy is a positive int."""
    with pytest.raises(error):
        policy(n)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((1, "loss", "best"), ValueError), ((1, 3), TypeError), ((1, None), TypeError), ((0, "loss"), ValueError)],
)
def test_best_n_without_sense_is_refused(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    """BestN wants a positive number, the metric's name, and a mode that is "min" or "max"."""
    with pytest.raises(error):
        BestN(*arguments)


def test_a_policy_of_ones_own_is_used() -> None:
    """Any object with `keep` is a policy."""

    class OddSteps:
        def keep(self, metrics: Mapping[int, Mapping[str, object]]) -> set[int]:
            return {step for step in metrics if step % 2}

    assert steps_to_keep(check_policies(OddSteps()), {1: {}, 2: {}, 3: {}, 4: {}}) == {1, 3, 4}


def test_a_policy_may_name_steps_that_are_still_to_come() -> None:
    """Of what a policy says, only steps that there are count."""

    class Milestones:
        def keep(self, metrics: Mapping[int, Mapping[str, object]]) -> set[int]:
            return {2, 1000}

    assert steps_to_keep(check_policies([LatestN(1), Milestones()]), {1: {}, 2: {}, 3: {}}) == {2, 3}


@pytest.mark.parametrize(
    ("result", "says"), [(None, "TypeError"), (ZeroDivisionError("by zero"), "ZeroDivisionError: by")]
)
def test_a_policy_that_fails_is_named(result: Any, says: str) -> None:
    """The error of a policy of the user's says that it was asked, and about which steps."""

    class Broken:
        def keep(self, metrics: Mapping[int, Mapping[str, object]]) -> set[int]:
            if isinstance(result, Exception):
                raise result
            return result

    with pytest.raises(InvalidArgumentError, match=rf"Broken.*steps \[1, 2\]: {says}"):
        steps_to_keep(check_policies(Broken()), {1: {}, 2: {}})
