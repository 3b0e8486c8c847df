"""The probe: exact against scikit-learn, margins that their own pairs did not make, and bounded work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from madpo.core.errors import DataError
from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.core.statistics import bootstrap_mean, proportion_of
from madpo.rewards import probe
from madpo.rewards.probe import PENALTIES, ProbeWeights, fit_probe
from refusals import refused

PAIRS, FEATURES = 60, 200


def made(pairs=PAIRS, features=FEATURES, seed=0, size=2.0):
    """Features of both sides, labelled by Bradley-Terry from a linear reward; (chosen, rejected, true margins)."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(10, features))
    sides = [
        (generator.normal(size=(pairs, 10)) @ mixing + generator.normal(size=(pairs, features))).astype(np.float32)
        for _ in range(2)
    ]
    true = (sides[0] - sides[1]) @ generator.normal(size=features)
    true *= size / true.std()
    swapped = generator.random(pairs) > 1 / (1 + np.exp(-true))
    chosen, rejected = (np.where(swapped[:, None], a, b) for a, b in (sides[::-1], sides))
    return chosen, rejected, np.where(swapped, -true, true)


def out_of_fold(chosen, rejected, fold):
    data = probe._Pairs(chosen, rejected, np.asarray(fold), "d")
    return probe._out_of_fold(data, data.paths())


def prompts(pairs=PAIRS):
    return [f"p{i // 2}" for i in range(pairs)]


@pytest.mark.parametrize("place", [2, 6, 10])
@pytest.mark.parametrize("features", [20, FEATURES])
def test_weights_are_those_of_scikit_learn(place, features):
    chosen, rejected, _ = made(features=features)
    pairs = probe._Pairs(chosen, rejected, np.arange(PAIRS) % 2, "d")
    difference = chosen.astype(np.float64) - rejected
    scale = np.sqrt((difference**2).mean(0) * features)
    signs = np.where(np.arange(PAIRS) % 3, 1, -1)  # without an intercept the order of the sides does not matter
    fitted = LogisticRegression(C=1 / PENALTIES[place], fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = fitted.fit(difference / scale * signs[:, None], signs).coef_[0] / scale
    found = pairs.paths()[:, -1, place]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_margin_comes_from_the_other_folds_only():
    chosen, rejected, _ = made()
    fold = np.arange(PAIRS) % 4
    before = out_of_fold(chosen, rejected, fold)
    # Other labels in one fold: its own margins change their sign and nothing else.
    chosen[fold == 1], rejected[fold == 1] = rejected[fold == 1], chosen[fold == 1]
    after = out_of_fold(chosen, rejected, fold)
    assert before.penalties[1] == after.penalties[1]
    np.testing.assert_allclose(after.margins[fold == 1], -before.margins[fold == 1], rtol=1e-9)
    assert np.abs(after.margins[fold == 0] - before.margins[fold == 0]).max() > 1e-6
    # The same by hand: the weights of the others, at the penalty that the others chose, in the metric of all pairs.
    pairs = probe._Pairs(chosen, rejected, fold, "d")
    place = int(np.flatnonzero(after.penalties[2] == PENALTIES)[0])
    others = (chosen - rejected)[fold != 2] * pairs.inverse
    fitted = LogisticRegression(C=1 / PENALTIES[place], fit_intercept=False, tol=1e-10, max_iter=10_000)
    signs = np.where(np.arange(len(others)) % 2, 1, -1)
    weights = fitted.fit(others * signs[:, None], signs).coef_[0] * pairs.inverse
    np.testing.assert_allclose(
        after.margins[fold == 2], ((chosen - rejected) @ weights)[fold == 2], rtol=1e-3, atol=1e-4
    )


def test_margins_know_what_can_be_known_and_coins_give_none():
    chosen, rejected, true = made(400, size=4.0)
    found = fit_probe(chosen, rejected, prompts(400))
    assert np.corrcoef(found.margins, true)[0, 1] > 0.8
    assert found.report.accuracy.low > 0.7
    assert found.report.log_loss.high < 0.6
    assert 0.5 < found.report.temperature < 2
    coins = np.random.default_rng(1).random(400) < 0.5
    chosen, rejected = (np.where(coins[:, None], a, b) for a, b in ((chosen, rejected), (rejected, chosen)))
    nothing = fit_probe(chosen, rejected, prompts(400))
    assert nothing.report.log_loss.mean < np.log(2) + 0.02
    assert np.abs(nothing.margins).max() < np.abs(found.margins).max() / 4


@pytest.mark.slow
def test_intervals_of_coins_hold_one_half_and_their_margins_have_no_mean():
    """Labels that say nothing: each trains the probes that judge the others, so pairs are no independent judges."""
    means, inside = [], []
    for seed in range(100):
        names = [f"p{i}" for i in range(40)]
        found = fit_probe(*np.random.default_rng(seed).normal(size=(2, 40, 12)), names)
        means.append(found.margins.mean())  # -1/2 of it is what the log loss would flatter
        wide, narrow = found.report.accuracy, proportion_of(found.margins > 0)
        inside.append([one.low <= 0.5 <= one.high for one in (wide, narrow)])
        loss, plain = found.report.log_loss, bootstrap_mean(np.logaddexp(0, -found.margins), clusters=names)
        assert loss.high - loss.mean == pytest.approx(np.sqrt(2) * (plain.high - plain.mean))
    assert abs(np.mean(means)) < 2 * np.std(means) / 10
    assert np.mean(inside, axis=0)[1] < 0.93 <= np.mean(inside, axis=0)[0]


@settings(max_examples=8)
@given(st.integers(0, 2**20), st.sampled_from([1e-3, 1.0, 1e4]))
def test_units_order_and_swaps_leave_the_rewards(seed, unit):
    chosen, rejected, _ = made(24, 30, seed)
    names = prompts(24)
    found = fit_probe(chosen, rejected, names)
    np.testing.assert_allclose(found.out_of_fold.chosen - found.out_of_fold.rejected, found.margins, atol=1e-12)
    shift = np.random.default_rng(seed).normal(size=30).astype(np.float32)
    moved = fit_probe(chosen * np.float32(unit) + shift, rejected * np.float32(unit) + shift, names)
    if moved.weights.penalty == found.weights.penalty:
        scores = found.weights.rewards(chosen), moved.weights.rewards(chosen * np.float32(unit) + shift)
        np.testing.assert_allclose(*scores, rtol=0.02, atol=0.02 * np.abs(scores[0]).max())
    again = fit_probe(chosen, rejected, names)
    np.testing.assert_array_equal(again.margins, found.margins)
    np.testing.assert_array_equal(again.weights.weights, found.weights.weights)


def test_equal_sides_have_a_margin_of_exactly_zero_and_constant_features_no_weight():
    chosen, rejected, _ = made()
    rejected[7] = chosen[7]
    chosen[:, 3] = rejected[:, 3] = 5.0
    found = fit_probe(chosen, rejected, prompts())
    assert found.margins[7] == found.out_of_fold.chosen[7] - found.out_of_fold.rejected[7] == 0
    assert found.weights.weights[3] == 0
    assert np.isfinite(found.weights.weights).all()


@pytest.mark.parametrize("pairs", [150, 250])
def test_the_streamed_fit_is_the_direct_one(pairs, monkeypatch, tmp_path):
    """In blocks from a file, by either metric, in float32 or float64; against scikit-learn on the whole."""
    chosen, rejected, _ = made(pairs)
    direct = fit_probe(chosen, rejected, prompts(pairs))
    with FeatureWriter(tmp_path / "f.safetensors", pairs, FEATURES) as writer:
        for start in range(0, pairs, 40):
            writer.write(start, chosen[start : start + 40], rejected[start : start + 40])
    features = FeatureFile.read(tmp_path / "f.safetensors", pairs, FEATURES)
    monkeypatch.setattr(probe, "_BLOCK", 32)
    for exact in (2**22, 16):
        monkeypatch.setattr(probe, "_EXACT", exact)
        streamed = fit_probe(features.chosen, features.rejected, prompts(pairs))
        assert streamed.weights.penalty == direct.weights.penalty
        np.testing.assert_array_equal(streamed.out_of_fold.penalties, direct.out_of_fold.penalties)
        np.testing.assert_allclose(streamed.margins, direct.margins, rtol=2e-3, atol=2e-3)
    scaled = (chosen - rejected) * probe._Pairs(chosen, rejected, np.arange(pairs) % 2, "d").inverse
    signs = np.where(np.arange(pairs) % 2, 1, -1)
    fitted = LogisticRegression(C=1 / direct.weights.penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = scaled @ fitted.fit(scaled * signs[:, None], signs).coef_[0]
    found = direct.weights.rewards(chosen) - direct.weights.rewards(rejected)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_mistakes_are_named():
    chosen, rejected, _ = made()
    with refused(DataError, "prompt", "reward_margin"):
        fit_probe(chosen, rejected, ["a"] * PAIRS)
    with refused(DataError, "folds"):
        out_of_fold(chosen, rejected, [0] * PAIRS)
    rejected[11, 5] = np.nan
    with refused(DataError, "pair 11"):
        fit_probe(chosen, rejected, prompts())


def test_rewards_are_centred():
    weights = ProbeWeights(np.array([2.0, -1.0]), np.array([1.0, 1.0]), 1.0)
    np.testing.assert_array_equal(weights.rewards([[1, 1], [2, 1], [1, 2]]), [0, 2, -1])
