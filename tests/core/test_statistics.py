"""Intervals cover what they should; closed forms of Wilson and of the calibration."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit

from madpo.core.errors import DataError
from madpo.core.statistics import (
    bootstrap_mean,
    bootstrap_share,
    bootstrap_temperature,
    design_effect,
    fit_temperature,
    over_repetitions,
    paired_difference,
    proportion,
    proportion_of,
    share_of,
)
from refusals import refused


@pytest.mark.parametrize(("n", "lowest"), [(10, 0.88), (40, 0.91)])
def test_bootstrap_covers_the_mean_of_an_exponential(n: int, lowest: float) -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for trial in range(400):
        estimate = bootstrap_mean(generator.exponential(2.0, n), seed=trial)
        inside += estimate.low <= 2.0 <= estimate.high
    assert lowest <= inside / 400 <= 0.985


def test_bootstrap_covers_the_mean_of_a_normal_from_few_values() -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for trial in range(600):
        estimate = bootstrap_mean(generator.normal(1.0, 3.0, 8), seed=trial)
        inside += estimate.low <= 1.0 <= estimate.high
    assert 0.92 <= inside / 600 <= 0.975  # two standard errors of 0.95 are 0.018


def test_clusters_widen_the_interval_and_count_as_units() -> None:
    """Copies of a value add no information."""
    values = np.random.default_rng(0).normal(size=50)
    single = bootstrap_mean(values)
    copied = bootstrap_mean(np.repeat(values, 4), clusters=np.repeat(np.arange(50), 4))
    assert copied == pytest.approx(single)
    naive = bootstrap_mean(np.repeat(values, 4))
    assert (naive.high - naive.low) / (single.high - single.low) == pytest.approx(0.5, abs=0.06)


def test_cluster_labels_may_be_text_and_come_in_any_order() -> None:
    estimate = bootstrap_mean([1.0, 5.0, 3.0], clusters=["b", "a", "b"])
    assert estimate.n == 2
    assert estimate.mean == 3.0


def test_same_seed_same_interval_and_another_seed_nearly() -> None:
    values = np.random.default_rng(3).normal(size=100)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert bootstrap_mean(values, seed=1).low == pytest.approx(bootstrap_mean(values, seed=2).low, abs=0.03)


def test_one_value_and_equal_values_have_no_width() -> None:
    assert bootstrap_mean([2.5]) == (2.5, 2.5, 2.5, 1)
    assert bootstrap_mean([2.5, 2.5]) == (2.5, 2.5, 2.5, 2)


def test_pairing_removes_what_both_sides_share() -> None:
    generator = np.random.default_rng(4)
    shared = generator.normal(scale=10, size=200)
    estimate = paired_difference(shared + 0.5 + generator.normal(size=200), shared + generator.normal(size=200))
    assert estimate.low < 0.5 < estimate.high
    assert estimate.high - estimate.low < 0.5


def test_an_interval_ends_at_the_bounds_of_what_is_measured() -> None:
    losses = [0.1, 0.2, 0.1, 0.9]
    free, kept = bootstrap_mean(losses), bootstrap_mean(losses, lowest=0.0)
    assert free.low < 0 == kept.low
    assert kept._replace(low=free.low) == free
    assert bootstrap_share([0.5, 1.0, 1.0]).high == 1.0 < bootstrap_mean([0.5, 1.0, 1.0]).high


def test_repetitions_add_their_spread_at_the_degrees_of_freedom_of_both() -> None:
    units = bootstrap_mean(np.random.default_rng(6).exponential(size=30))
    for alike in ([1.0], [1.0, 1.0, 1.0]):
        assert over_repetitions(units, alike) == units, "nothing is known of their spread, or there is none"
    # Units without spread: Student's t of two and of three repetitions.
    flat = bootstrap_mean(np.full(30, 2.0))
    assert over_repetitions(flat, [1.0, 3.0]) == pytest.approx((2.0, 2.0 - 12.7062047, 2.0 + 12.7062047, 30))
    assert over_repetitions(flat, [1.0, 2.0, 3.0]).high == pytest.approx(2.0 + 4.3026527 / np.sqrt(3))
    # Equal squared errors of units and of two repetitions have 2 u at 4 / (1/29 + 1) degrees of freedom.
    error = (units.high - units.low) / 2 / 2.0452296
    both = over_repetitions(units, [-error, error])
    below, above = units.mean - units.low, units.high - units.mean
    for wide, side in ((both.mean - both.low, below), (both.high - both.mean, above)):
        assert wide == pytest.approx(2.8146135 * np.hypot(side / 2.0452296, error), rel=1e-6)
    assert above > below, "and skewness stays"
    assert both.high - both.mean > both.mean - both.low


def test_rows_alike_share_their_spread() -> None:
    flat = bootstrap_mean(np.full(30, 2.0))
    # Rows that move together say no more than one; the mean of their variances counts.
    together = over_repetitions(flat, [1.0, 3.0], [[5.0, 7.0], [0.0, 2.0]])
    assert together == pytest.approx(over_repetitions(flat, [1.0, 3.0]))
    # Two rows that move against one another have nothing in common, and one degree of freedom: again as one row.
    assert over_repetitions(flat, [1.0, 3.0], [[3.0, 1.0]]) == pytest.approx(together)
    # Three rows without a common part, variances 2, 2 and 8: their mean is 4, at 2 degrees of freedom.
    found = over_repetitions(flat, [1.0, 3.0], [[1.0, 3.0], [4.0, 0.0]])
    assert found.high - found.mean == pytest.approx(4.3026527 * np.sqrt(4.0 / 2))
    # Rows that agree with themselves take away from the spread of one that does not.
    calm = over_repetitions(flat, [1.0, 3.0], [[0.0, 0.0]] * 9)
    assert calm.high - calm.mean < 0.2 * (together.high - together.mean)
    assert over_repetitions(flat, [2.0], [[1.0], [5.0]]) == flat, "one repetition says nothing"
    # One repetition has the others' variance, 2, whole, where two have half of it.
    one = over_repetitions(flat, [2.0], [[5.0, 7.0], [0.0, 2.0]])
    assert one.high - one.mean == pytest.approx(12.7062047 * np.sqrt(2.0))


def test_rows_alike_make_two_repetitions_cover_and_the_interval_short() -> None:
    """Repetitions that vary three times as much as the units, of six rows less one base, which all of them share."""
    generator, trials, n, k = np.random.default_rng(8), 400, 24, 2
    inside, shorter = 0, []
    for trial in range(trials):
        x = generator.normal(size=(7, n, 1)) + generator.normal(size=(7, n, k)) + generator.normal(size=(7, 1, k))
        differences = (x[1:] - x[0]).mean(axis=1)
        over_units = bootstrap_mean((x[1] - x[0]).mean(axis=1), seed=trial % 4)
        single = over_repetitions(over_units, differences[0])
        found = over_repetitions(over_units, differences[0], differences[1:])
        inside += found.low <= 0 <= found.high
        shorter.append((found.high - found.low) / (single.high - single.low))
    assert 0.92 <= inside / trials <= 0.975
    assert np.median(shorter) < 0.7


@pytest.mark.slow
def test_one_repetition_covers_by_the_spread_of_other_rows() -> None:
    """A row with one training of five rows with two, whose trainings vary as much as the units' mean."""
    generator, trials, n = np.random.default_rng(9), 400, 24
    inside = np.zeros(2)
    for trial in range(trials):
        trainings = np.sqrt(2 / n) * generator.normal(size=(7, 1, 2))
        x = generator.normal(size=(7, n, 1)) + generator.normal(size=(7, n, 2)) + trainings
        over_units = bootstrap_mean((x[1] - x[0])[:, 0], seed=trial % 4)
        for which, others in enumerate(([], (x[2:] - x[0]).mean(axis=1))):
            found = over_repetitions(over_units, [over_units.mean], others)
            inside[which] += found.low <= 0 <= found.high
    assert inside[0] / trials < 0.9, "over units only it is too sure"
    assert 0.92 <= inside[1] / trials <= 0.98


@pytest.mark.parametrize(("spread", "lowest", "highest"), [(0.0, 0.955, 0.995), (1.0, 0.91, 0.975)])
@pytest.mark.parametrize("k", [2, 5])
def test_an_interval_over_units_and_repetitions_covers_the_mean(
    k: int, spread: float, lowest: float, highest: float
) -> None:
    """Repetitions whose own spread is ``spread`` times the error over units; over units only, 1 would be 83 %."""
    generator, trials, n = np.random.default_rng(7), 400, 24
    repeated = spread * np.sqrt((1 + 1 / k) / n * k)
    inside = 0
    for trial in range(trials):
        x = generator.normal(size=(n, 1)) + generator.normal(size=(n, k)) + repeated * generator.normal(size=k)
        found = over_repetitions(bootstrap_mean(x.mean(axis=1), seed=trial % 4), x.mean(axis=0))
        inside += found.low <= 0 <= found.high
    assert lowest <= inside / trials <= highest


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_or_not_finite_is_refused(bad: list[float]) -> None:
    with pytest.raises(DataError):
        bootstrap_mean(bad)


def test_unequal_lengths_are_refused() -> None:
    with refused(DataError, ("2", "1")):
        paired_difference([1, 2], [1])
    with refused(DataError, "cluster"):
        bootstrap_mean([1, 2], clusters=[1])


@given(n=st.integers(1, 200), data=st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    """The bounds are the shares p at which (share - p)^2 = z^2 p (1 - p) / n."""
    k = data.draw(st.integers(0, 2 * n)) / 2  # ties count half
    estimate = proportion(k, n)
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
    for p in (estimate.low, estimate.high):
        assert (k / n - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-12)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_design_effect_counts_what_is_repeated(values: list[float], copies: int, random: random.Random) -> None:
    names = list(range(len(values)))
    random.shuffle(names)
    for mean in (None, 0.0):
        assert design_effect(values, names, mean=mean) == design_effect(values, None, mean=mean) == 1.0
    repeated = np.repeat(values, copies), np.repeat(names, copies)
    if np.square(values).sum() > 1e-9:
        assert design_effect(*repeated, mean=0.0) == pytest.approx(copies)
        assert design_effect(*repeated) >= copies * (1 - 1e-9) or copies == 1
    # Values that take each other back say more than their number, and count as that.
    assert design_effect([1.0, -1.0, 2.0, -2.0], [0, 0, 1, 1], mean=0.0) == 1.0
    assert design_effect([3.0, 3.0, 3.0, 4.0], [0, 0, 0, 0]) == 4, "one prompt is one unit"


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40))
def test_a_proportion_over_prompts_is_wilsons_where_each_has_one_pair(values: list[float]) -> None:
    expected = proportion(sum(values), len(values))
    assert proportion_of(values) == proportion_of(values, range(len(values))) == expected
    whole = [value for value in values if value != 0.5]
    if whole:
        assert share_of(whole, clusters=range(len(whole))) == share_of(whole) == proportion_of(whole)


@pytest.mark.parametrize("pairs", [1, 4, 9])
def test_the_interval_of_a_proportion_covers_it_over_prompts(pairs: int) -> None:
    """Pairs of a prompt are right together half of the time; over pairs it would cover 95, 76 and 57 %."""
    generator, inside, trials = np.random.default_rng(9), 0, 400
    prompts = np.repeat(np.arange(30), pairs)
    for _ in range(trials):
        shared = generator.random(30)[prompts]
        right = np.where(generator.random(len(prompts)) < 0.5, shared, generator.random(len(prompts))) < 0.7
        found = proportion_of(right, prompts)
        assert found.n == 30
        inside += found.low <= 0.7 <= found.high
    assert 0.92 <= inside / trials <= 0.985
    assert proportion_of(np.ones(len(prompts)), prompts) == proportion(30, 30), "all right: prompts count"


def test_wilson_golden_value_and_refusals() -> None:
    assert proportion(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178, 10), abs=1e-6)
    for k, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError):
            proportion(k, n)


@given(st.lists(st.floats(-20, 20).filter(lambda x: abs(x) > 0.01), min_size=2, max_size=30))
def test_temperature_is_the_stationary_point(margins: list[float]) -> None:
    """Inside the bounds the derivative in a = 1/t vanishes: the mean of h sigma(-a h) is 0."""
    h = np.array(margins)
    temperature, before, after = fit_temperature(h)
    assert after <= before
    slope = lambda a: float((h * expit(-a * h)).mean())  # noqa: E731
    low, high = np.exp(-6.0), np.exp(6.0)
    if slope(low) > 0 > slope(high):
        assert after <= np.logaddexp(0, -h * brentq(slope, low, high)).mean() + 1e-10
    else:
        assert np.log(temperature) == pytest.approx(-6.0 if slope(high) >= 0 else 6.0, abs=1e-6)


def test_temperature_is_recovered_from_overconfident_margins() -> None:
    generator = np.random.default_rng(5)
    true = generator.normal(scale=2.0, size=40_000)
    observed = np.where(generator.random(len(true)) < expit(true), true, -true)
    temperature, before, after = fit_temperature(3.0 * observed)
    assert temperature == pytest.approx(3.0, rel=0.05)
    assert after < before


def test_temperature_of_margins_without_information() -> None:
    assert fit_temperature([0.0, 0.0]) == (1.0, np.log(2), np.log(2))
    assert fit_temperature([1.0, 2.0])[0] == pytest.approx(np.exp(-6))
    assert fit_temperature([-1.0, -2.0])[0] == pytest.approx(np.exp(6))


def test_the_interval_of_a_temperature_covers_the_true_one() -> None:
    covered = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        true = generator.normal(0, 2, 150)
        h = 2.5 * np.where(generator.random(150) < 1 / (1 + np.exp(-true)), true, -true)
        found = bootstrap_temperature(h, seed=seed)
        assert found.mean == fit_temperature(h)[0]
        assert found.low < found.mean < found.high
        covered += found.low <= 2.5 <= found.high
    assert covered >= 16
    # Pairs of one prompt are drawn together: the same pairs twice are no further evidence.
    twice = bootstrap_temperature(np.tile(h, 2), seed=19, clusters=np.tile(np.arange(150), 2))
    assert twice.n == 150
    np.testing.assert_allclose(twice[:3], found[:3], rtol=1e-6)


def test_a_share_stays_between_nothing_and_all() -> None:
    values = [0.0] * 7 + [1.0]
    wide, share = bootstrap_mean(values), bootstrap_share(values)
    assert wide.low < 0 == share.low
    assert (share.mean, share.high, share.n) == (wide.mean, wide.high, 8)
