"""Intervals cover what they should; closed forms of Wilson and of the calibration."""

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
    fit_temperature,
    paired_difference,
    proportion,
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
