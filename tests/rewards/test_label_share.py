"""The label's share of a target against brute force, and what moves it."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit

from madpo.core.errors import DataError
from madpo.core.statistics import fit_temperature
from madpo.rewards.label_share import better_than_coin, decide, label_share, posterior
from quick import quick
from refusals import refused


def labelled(pairs: int, *, quality: tuple[float, float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two margins of pairs with Bradley-Terry labels, each of the truth plus noise; chosen less rejected."""
    generator = np.random.default_rng(seed)
    truth = 2 * generator.standard_normal(pairs)
    sign = np.where(generator.random(pairs) < expit(truth), 1.0, -1.0)
    noisy = [sign * (q * truth + 2 * math.sqrt(1 - q * q) * generator.standard_normal(pairs)) for q in quality]
    return noisy[0], noisy[1]


def test_the_posterior_is_that_of_brute_force() -> None:
    m0, m1 = labelled(40, quality=(0.7, 0.8))
    shares, density = posterior(m0, m1)
    scale = [min(fit_temperature(m)[0], float(np.sqrt((m**2).mean()))) for m in (m0, m1)]

    def likelihood(share: float) -> float:
        mixed = share * m0 / scale[0] + (1 - share) * m1 / scale[1]
        found = minimize_scalar(lambda s: np.logaddexp(0, -math.exp(s) * mixed).sum(), bounds=(-6, 6), method="bounded")
        return math.exp(-float(found.fun))

    expected = np.array([likelihood(share) for share in shares])
    expected /= np.trapezoid(expected, shares)
    assert np.allclose(density, expected, rtol=1e-5)
    found = label_share(m0, m1)
    assert found.mean == pytest.approx(np.trapezoid(shares * expected, shares), abs=1e-6)
    fine = np.linspace(0, 1, 20_001)
    mass = np.cumsum(np.interp(fine, shares, expected))
    for tail, bound in ((0.025, found.low), (0.975, found.high)):
        assert bound == pytest.approx(fine[np.searchsorted(mass, tail * mass[-1])], abs=2e-3)


def test_the_better_teacher_gets_the_share() -> None:
    assert label_share(*labelled(400, quality=(0.2, 0.95))).high < 0.3
    assert label_share(*labelled(400, quality=(0.95, 0.2))).low > 0.7
    equal = label_share(*labelled(2000, quality=(0.6, 0.6)))
    assert equal.low < 0.5 < equal.high
    few = label_share(*labelled(6, quality=(0.6, 0.6)))
    assert abs(few.mean - 0.5) < 0.2
    assert few.high - few.low > 0.7


@pytest.mark.parametrize("silent", [0, 1])
def test_margins_without_a_signal_lose_the_share(silent: int) -> None:
    teachers = list(labelled(60, quality=(0.99, 0.99)))
    teachers[silent] = np.random.default_rng(1).standard_normal(60) * 1e-3
    found = label_share(*teachers)
    assert found.mean < 0.35 if silent == 0 else found.mean > 0.65


def test_exchanging_the_teachers_exchanges_the_shares() -> None:
    m0, m1 = labelled(50, quality=(0.5, 0.9))
    one, other = label_share(m0, m1), label_share(m1, m0)
    assert one.mean == pytest.approx(1 - other.mean, abs=1e-9)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert label_share(m0, m0).mean == pytest.approx(0.5)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=15, deadline=None)
def test_units_of_the_margins_do_not_matter(one: float, other: float) -> None:
    m0, m1 = labelled(30, quality=(0.7, 0.5))
    found, again = label_share(m0, m1), label_share(one * m0, other * m1 * 1e4)
    assert again.mean == pytest.approx(found.mean, abs=1e-4)
    assert again.difference.mean == pytest.approx(found.difference.mean, abs=1e-6)


def test_the_deciding_number_is_the_difference_of_calibrated_losses() -> None:
    m0, m1 = labelled(100, quality=(0.3, 0.9))
    found = label_share(m0, m1, prompts=np.repeat(np.arange(50), 2))
    assert found.implicit_loss == pytest.approx(fit_temperature(m0)[2])
    assert found.margin_loss == pytest.approx(fit_temperature(m1)[2])
    assert found.difference.mean == pytest.approx(found.margin_loss - found.implicit_loss)
    assert found.difference.low < found.difference.mean < found.difference.high < 0
    assert found.difference.n == 50


@pytest.mark.parametrize("margins", [np.zeros(5), np.ones(5), -np.ones(5), np.array([3.0])])
def test_edges_stay_finite(margins: np.ndarray) -> None:
    for pair in ((margins, np.arange(len(margins)) - 1.5), (margins, margins)):
        found = label_share(*pair)
        assert 0 <= found.low <= found.mean <= found.high <= 1


def test_a_coin_is_no_better_than_a_coin() -> None:
    coin = np.random.default_rng(0).standard_normal((200, 100))
    assert np.mean([better_than_coin(row) for row in coin]) < 0.1
    assert better_than_coin(labelled(100, quality=(0.9, 0.9))[0])
    assert not better_than_coin(-np.abs(coin[0]))


def best_against(others: int, prompts: int, signal: float, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The best of some responses against each other one, as preference data often are: (margins, prompts)."""
    margin = generator.standard_normal((prompts, others + 1))
    order = np.argsort(-(signal * margin + generator.gumbel(size=margin.shape)), axis=1)
    ordered = np.take_along_axis(margin, order, 1)
    return (ordered[:, :1] - ordered[:, 1:]).ravel(), np.repeat(np.arange(prompts), others)


@pytest.mark.parametrize(("others", "over_pairs"), quick([(1, 0.03), (4, 0.11), (9, 0.17)], (4, 0.11)))
def test_five_per_cent_of_silent_margins_pass_whatever_the_pairs_of_a_prompt(others: int, over_pairs: float) -> None:
    generator = np.random.default_rng(0)
    drawn = [best_against(others, 30, 0.0, generator) for _ in range(300)]
    assert 0.02 <= np.mean([better_than_coin(*pair) for pair in drawn]) <= 0.085
    assert np.mean([better_than_coin(margins) for margins, _ in drawn]) >= over_pairs
    loud = [best_against(others, 30, 1.2, generator) for _ in range(40)]
    assert np.mean([better_than_coin(*pair) for pair in loud]) >= 0.9


@given(st.randoms(use_true_random=False), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_prompts_with_one_pair_change_no_bit_and_copies_say_nothing_new(random: random.Random, copies: int) -> None:
    m0, m1 = labelled(200, quality=(0.6, 0.6), seed=random.randrange(100))
    names = list(range(200))
    random.shuffle(names)
    single, named = label_share(m0, m1), label_share(m0, m1, prompts=names)
    fields = ("mean", "low", "high", "margin_loss", "implicit_loss")
    assert [getattr(single, name) for name in fields] == [getattr(named, name) for name in fields]
    assert better_than_coin(m0, names) == better_than_coin(m0)
    again = label_share(*(np.repeat(m, copies) for m in (m0, m1)), prompts=np.repeat(names, copies))
    assert [again.mean, again.low, again.high] == pytest.approx([single.mean, single.low, single.high], abs=6e-3)
    assert again.difference.mean == pytest.approx(single.difference.mean)
    few = m1[:20]
    repeated = np.repeat(few, copies), np.repeat(names[:20], copies)
    assert better_than_coin(*repeated) == better_than_coin(few)


@pytest.mark.parametrize("margins", [np.full(40, 1.0), np.abs(np.random.default_rng(0).normal(size=40)), np.arange(40)])
def test_margins_that_may_have_made_the_labels_do_not_count_against_them(margins: np.ndarray) -> None:
    implicit = np.random.default_rng(1).normal(0.3, 1.0, 40)
    found = decide(implicit, margins, margins, given=True)
    assert (found.share, found.why) == (1.0, "ordered")
    assert decide(implicit, margins, margins).why == "margins", "a probe that has not seen the labels may be right"
    once = np.where(np.arange(40) == 7, -0.1, margins)
    assert decide(implicit, once, once, given=True).why == "margins"
    assert decide(implicit, 0 * once, 0 * once, given=True).why == "coin"


def test_mistakes_are_named() -> None:
    with refused(DataError, ("3 implicit", "2 reward")):
        label_share([1, 2, 3], [1, 2])
    with pytest.raises(DataError):
        label_share([], [])
    with pytest.raises(DataError):
        label_share([1, math.nan], [1, 2])
