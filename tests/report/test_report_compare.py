"""Choices among settings, paired differences and rewards at equal KL, on samples whose answers are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claim_cases import PROMPT, Made, N, headline, in_second_seed, madpo, row, samples, tier_of, uneven_tier
from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, bootstrap_share, bootstrap_statistic, over_repetitions
from madpo.report.charts import Panel
from madpo.report.claims import claims
from madpo.report.collect import collect
from madpo.report.compare import (
    NOT_RUN,
    Comparison,
    base_beta,
    choose,
    difference,
    least_difference,
    selection_json,
    selections,
    settings_of,
)
from madpo.report.equal_kl import _interpolated, difference_at_its_kl, equal_kl, frontiers
from madpo.report.results import Row, Tier, measured, selecting_half
from madpo.report.study import choices_of
from madpo.report.study_charts import ablation_chart, frontier_chart, main_chart
from madpo.report.tables import UNEVEN, report_markdown_table, study_tables
from refusals import names
from report_cases import make_study, methods


def mean_of(row: Row) -> float:
    assert isinstance(row["oracle_reward"], Estimate)
    return row["oracle_reward"].mean


# The long table


def test_a_prompts_value_is_the_mean_of_its_samples_and_prompts_are_the_units() -> None:
    """Three samples a prompt, very different ones: the interval is that of the prompts' means."""
    spread = np.array([-3.0, 0.0, 3.0])
    one, other = row("DPO", 1.0, kind="dpo", seeds=1), madpo(7.0, 4.0, 1.5, seeds=1)
    tables = []
    for made in (one, other):
        given = made.samples
        tables += [
            samples(made.row.key, "seed0", given["reward"].to_numpy() + s, given["kl"].to_numpy() + s, k)
            for k, s in enumerate(spread)
        ]
    many = measured(Tier("high", [one.row, other.row], pd.concat(tables)))
    single = tier_of("high", [one, other])
    for before, after in zip(single.rows, many.rows, strict=True):
        for name in ("oracle_reward", "kl", "difference"):
            assert np.array(after[name]) == pytest.approx(np.array(before[name])) or after[name] is before[name] is None
    assert many.rows[0]["oracle_reward"].n == N  # type: ignore[union-attr]


def test_a_prompt_that_a_seed_did_not_answer_does_not_count() -> None:
    made = row("DPO", 1.0, kind="dpo")
    table = made.samples[(made.samples["seed"] == "seed0") | (made.samples["prompt_id"] >= 50)]
    tier = tier_of("high", [made._replace(samples=table)])
    assert tier.rows[0]["oracle_reward"].n == N - 50  # type: ignore[union-attr]
    kept = made.samples[made.samples["prompt_id"] >= 50]["reward"].mean()
    assert mean_of(tier.rows[0]) == pytest.approx(kept)


def test_a_seed_without_samples_leaves_the_records_number() -> None:
    made = row("DPO", 1.0, kind="dpo")
    made.row.values["oracle_reward"] = 7.0
    tier = tier_of("high", [made._replace(samples=made.samples[made.samples["seed"] == "seed0"])])
    assert tier.rows[0]["oracle_reward"] == 7.0


def test_a_text_is_repeated_where_another_prompt_got_it_too() -> None:
    made = row("DPO", 1.0, kind="dpo", seeds=1)
    own, again = made.samples, made.samples.assign(sample=1)
    assert tier_of("high", [made._replace(samples=pd.concat([own, again]))]).rows[0]["repeated"] == 0.0
    same = own.assign(text=own["text"].where(own["prompt_id"] >= 50, -1))
    assert tier_of("high", [made._replace(samples=same)]).rows[0]["repeated"] == pytest.approx(50 / N)


def test_wins_are_against_the_sft_models_answers_of_the_same_seed() -> None:
    sft, dpo = in_second_seed(row("SFT", 0.0, noise=0.0), reward=9.0), row("DPO", 1.0, kind="dpo", noise=0.0)
    tier = tier_of("high", [sft, dpo])
    assert tier.rows[1]["win_rate"].mean == 0.5  # type: ignore[union-attr]  # all of seed0, none of seed1
    first = sft._replace(row=replace(sft.row, seeds=("seed0",)), samples=sft.samples[sft.samples["seed"] == "seed0"])
    assert tier_of("high", [first, dpo]).rows[1]["win_rate"].mean == 1.0  # type: ignore[union-attr]


def test_more_responses_to_a_prompt_do_not_make_more_wins() -> None:
    """Each response against SFT's of the same number: the mean of eight would win nearly every prompt."""
    generator = rng(4, "wins")
    drawn = generator.normal([[0.0], [0.5]], size=(8, 2, N))
    made = [
        one._replace(
            samples=pd.concat([samples(one.row.key, "seed0", drawn[k, side], 0 * drawn[k, 0], k) for k in range(8)])
        )
        for side, one in enumerate((row("SFT", 0.0, seeds=1), row("DPO", 0.5, kind="dpo", seeds=1)))
    ]
    tier = tier_of("high", made)
    found = tier.rows[1]["win_rate"]
    wins = drawn[:, 1] > drawn[:, 0]
    assert found == pytest.approx(bootstrap_share(wins.mean(axis=0)))  # type: ignore[comparison-overlap]
    assert abs(found.mean - 0.638) < 0.03  # of normal differences with mean 0.5 and variance 2
    single = tier_of("high", [made[0], made[1]._replace(samples=made[1].samples.query("sample == 3"))])
    assert single.rows[1]["win_rate"].mean == pytest.approx(wins[3].mean())  # type: ignore[union-attr]


# Seeds


def test_only_seeds_that_both_sides_have_are_compared() -> None:
    """The second seed of one side is easier by 5, which is no difference between the methods."""
    two, one = in_second_seed(row("DPO", 1.0, kind="dpo"), reward=5.0), madpo(7.0, 4.0, 2.0, seeds=1)
    tier = tier_of("high", [two, one])
    dpo, ours = (choose(row.name, tier, [row]) for row in tier.rows)
    found = difference("x", [ours, dpo])
    assert found.value is not None
    assert found.value.mean == pytest.approx(1.0)
    assert (found.seeds, found.per_seed) == (1, {"seed0": pytest.approx(1.0)})
    assert difference("x", [ours, dpo, dpo, dpo]).value == found.value
    assert tier.rows[1]["difference"] == found.value


def test_levels_that_are_shown_together_are_over_the_same_seeds() -> None:
    tier = uneven_tier()
    assert mean_of(tier.rows[0]) == pytest.approx(1.5)  # over both seeds, and 2.0 in the first
    frontier, ablation = frontier_chart([tier], 0.1), ablation_chart([tier], 0.1)
    assert frontier is not None
    assert ablation is not None
    (panel,) = frontier.panels
    assert isinstance(panel, Panel)
    assert "seed0" in panel.title
    marks = next(series.marks for series in panel.series if series.name == "DPO")
    assert [mark.y for mark in marks] == pytest.approx([1.8, 2.0, 1.5])
    assert [mark.x for mark in marks] == pytest.approx([14.0, 8.0, 3.0], abs=0.1)
    (panel,) = ablation.panels
    assert isinstance(panel, Panel)
    assert {s.name: s.marks[0].x for s in panel.series if not s.published} == pytest.approx(
        {"DPO": 2.0, "Reg-Only": 2.0, "MADPO": 2.1}
    )
    first = tier_of("low", [in_second_seed(row("DPO", 2.0, kind="dpo"), reward=-1.0), madpo(7.0, 4.0, 2.1, seeds=1)])
    main = main_chart([first], choices_of([first], 0.1))
    assert main is not None
    (panel,) = main.panels
    assert isinstance(panel, Panel)
    assert "seed0" in panel.title
    levels = {s.name: s.marks[0].x for s in panel.series if not s.published and s.marks}
    assert levels == pytest.approx({"DPO": 2.0, "MADPO": 2.1})
    words = " ".join(headline([tier]))
    names(words, ("Low: MADPO τ=7 c=4", "1.60"), "Three", "3 of 5")
    assert "| DPO β=0.3 | seed0 | 1.50" in report_markdown_table(tier)
    assert UNEVEN in report_markdown_table(tier)
    even = replace(tier, rows=tier.rows[:2])
    assert "seeds" not in report_markdown_table(even).splitlines()[0]


def test_a_setting_is_chosen_over_the_seeds_that_all_settings_have() -> None:
    """One setting's second seed is easier by 5, and has it above one that is better on the seed that both have."""
    lucky, better = in_second_seed(madpo(2.0, 2.0, 1.0), reward=5.0), madpo(7.0, 4.0, 2.0, seeds=1)
    tier = tier_of("high", [lucky, better])
    found = choose("MADPO", tier, tier.rows)
    assert found is not None
    assert (found.row.name, found.best.name) == (better.row.name, better.row.name)
    own = tier.cells(tier.rows[0])["seed0"]
    report = own[own.index.isin(tier.reporting)]
    assert found.candidates[lucky.row.key].reporting.mean == pytest.approx(report.mean())
    single = choose("MADPO", tier, tier.rows[:1])
    assert single is not None
    assert single.value == tier.rows[0]["oracle_reward"], "where nothing is compared, all seeds count"


# Choices


@pytest.mark.slow
def test_choosing_does_not_look_at_what_is_reported() -> None:
    """Settings that differ only in noise: the best of 30 on all prompts is flattered, the chosen one is not."""
    flattered, honest = [], []
    base = madpo(2.0, 2.0, 1.0, noise=0.0, seeds=1).row
    for trial in range(15):
        rows = [replace(base, name=str(k), key=str(k)) for k in range(30)]
        values = [1.0 + PROMPT - PROMPT.mean() + rng(trial, "noise", k).normal(size=N) for k in range(30)]
        table = pd.concat([samples(str(k), "seed0", v, v * 0) for k, v in enumerate(values)])
        tier = Tier("high", rows, table)
        choice = choose("MADPO", tier, rows)
        assert choice is not None
        assert isinstance(choice.value, Estimate)
        best = tier.cells(choice.best)["seed0"]
        flattered.append(best.mean() - 1.0)
        report = sorted(tier.reporting)
        assert choice.value.n == len(report)
        assert choice.value.mean == pytest.approx(np.mean(values[int(choice.row.key)][report]))
        honest.append(choice.value.mean - 1.0 - np.mean([PROMPT[i] - PROMPT.mean() for i in report]))
    assert np.mean(flattered) > 0.1
    assert abs(np.mean(honest)) < 3 * 0.1 / np.sqrt(15)  # each has a standard error of 1/sqrt(100)


def test_the_half_is_that_of_the_runs_own_choices() -> None:
    rows = [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 2.0), madpo(7.0, 2.0, 2.5)]
    tier = tier_of("high", rows, selection_seed=3)
    assert tier.reporting == set(range(N)) - selecting_half(range(N), 3)
    assert len(tier.reporting) == N // 2
    assert tier.reporting != tier_of("high", rows).reporting
    (choice,) = selections([tier], {"best": ["MADPO*"], "none": ["x"]})["best"]
    assert (choice.row.name, choice.settings) == ("MADPO τ=7 c=2", 2)
    first, second = tier.rows[1:]
    keys = {first.name: first.key, second.name: second.key, "MADPO τ=2 c=2": "later"}
    written = selection_json({"best": [choice]}, {"best": ["MADPO*"]}, keys, 3)
    of_tier = written["tiers"]["high"]["best"]
    assert (written["seed"], of_tier["best"], of_tier["missing"]) == (3, second.key, ["later"])
    own, half = of_tier["candidates"][second.key], tier.cells(second).mean(axis=1)
    selecting = half.index.isin(list(selecting_half(range(N), 3)))
    assert own["selecting"] == pytest.approx(half[selecting].mean())
    assert own["reporting"]["mean"] == pytest.approx(half[~selecting].mean())
    assert own["reporting"] == choice.value._asdict()  # type: ignore[union-attr]


def test_a_comparison_uses_the_reporting_half_only_where_something_was_chosen() -> None:
    tier = tier_of("high", [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 2.0), madpo(7.0, 2.0, 1.5)])
    dpo = choose("DPO", tier, tier.rows[:1])
    one = difference("x", [choose("MADPO", tier, tier.rows[1:2]), dpo])
    several = difference("x", [choose("MADPO", tier, tier.rows[1:]), dpo])
    assert one.value is not None
    assert several.value is not None
    assert (one.value.n, one.value.mean) == (N, pytest.approx(1.0))
    assert several.value.n == len(tier.reporting)
    assert difference("x", [None, dpo]).missing == NOT_RUN


# Equal KL

CURVE = [
    row("DPO β=0.3", 1.0, kl=2.0, kind="dpo", **{"beta": 0.3}),
    row("DPO", 2.0, kl=6.0, kind="dpo"),
    row("DPO β=0.03", 2.2, kl=10.0, kind="dpo", **{"beta": 0.03}),
]


def on_curve(kl: float, kls: list[float], rewards: list[float]) -> float:
    """The reward at a KL, by straight lines in its root; the prompts shift all KLs of ``row`` alike."""
    shift = 0.1 * PROMPT.mean()
    return float(np.interp(np.sqrt(kl + shift), np.sqrt(np.add(kls, shift)), rewards))


@pytest.mark.parametrize("start", [[], [row("SFT", 0.2, kl=0.0)]])
@pytest.mark.parametrize("kl", [4.0, 6.0, 8.0])
def test_equal_kl_interpolates_dpos_curve_in_the_root_of_kl(start: list[Made], kl: float) -> None:
    tier = tier_of("high", [*start, *CURVE, madpo(7.0, 4.0, 2.5, kl=kl)])
    *base, ours = tier.rows
    value = equal_kl("x", tier, choose("MADPO", tier, [ours])).value
    assert value is not None
    kls = [*(0.0 for _ in start), *(made.mean("kl") for made in base[len(start) :])]
    expected = np.interp(np.sqrt(ours.mean("kl")), np.sqrt(kls), [*(0.2 for _ in start), 1.0, 2.0, 2.2])
    assert value.mean == pytest.approx(2.5 - expected, abs=1e-9)
    assert value.low < value.mean < value.high


def test_the_curve_begins_at_the_sft_model() -> None:
    ours = madpo(7.0, 2.0, 2.5, kl=0.5)
    tier = tier_of("high", [*CURVE, ours])
    found = equal_kl("x", tier, choose("MADPO", tier, tier.rows[3:]))
    names(found.missing, "0.5 nats", ("2.0", "10.0"))
    tier = tier_of("high", [row("SFT", 0.2, kl=0.0), *CURVE, ours])
    assert equal_kl("x", tier, choose("MADPO", tier, tier.rows[4:])).value is not None


def test_two_curves_are_compared_over_the_distances_that_both_reach() -> None:
    # In the root of KL ours is 0.3 above DPO's line through the SFT model wherever both are.
    roots = {0.03: 3.0, 0.1: 2.0, 0.3: 1.0}
    dpo = [row(f"DPO {b}", r, kl=r * r, kind="dpo", **{"beta": b}) for b, r in roots.items()]
    ours = [
        row(f"ours {b}", 0.3 + r, kl=r * r, kind="madpo", tau=7.0, c_max=4.0, **{"beta": b})
        for b, r in ((0.03, 3.5), (0.1, 2.5), (0.3, 1.5))
    ]
    tier = tier_of("high", [row("SFT", 0.0, kl=0.0), *dpo, *ours])
    lines = frontiers(tier, 0.1)
    found = equal_kl("x", tier, choose("MADPO", tier, tier.rows[-3:-2]), line=lines["MADPO"])
    assert found.value is not None
    assert found.value.mean == pytest.approx(0.3, abs=0.02)
    other = equal_kl("x", tier, choose("DPO", tier, tier.rows[1:2]), base="MADPO", line=lines["DPO"])
    assert other.value is not None
    assert other.value.mean < -0.1
    (claim,) = [c for c in claims([tier]) if c.key == "madpo-at-equal-kl"]
    assert claim.made[0].value == found.value


def test_many_curves_at_once_are_numpys_own_interpolation() -> None:
    generator = rng(5, "curves")
    x, y = np.abs(generator.normal(size=(2, 50, 4)))
    grid = np.linspace(-0.5, 3, 9)[None]
    order = np.argsort(x, axis=1, kind="stable")
    expected = [np.interp(grid[0], a[o], b[o]) for a, b, o in zip(x, y, order, strict=True)]
    assert np.allclose(_interpolated(grid, x, y), expected)
    x[:, 3] = x[:, 1]  # two settings at one distance
    assert np.isfinite(_interpolated(grid, x, y)).all()
    assert np.allclose(_interpolated(grid, x[:, :1], y[:, :1]), y[:, :1])


def test_a_difference_of_two_seeds_is_no_surer_than_the_seeds_let_it_be() -> None:
    """Both seeds are above DPO, by 0.1 and 0.9: over 200 prompts that is clear, over two trainings it is not."""
    dpo, ours = row("DPO", 1.0, kind="dpo"), in_second_seed(madpo(7.0, 4.0, 1.1), reward=0.8)
    tier = tier_of("high", [dpo, ours])
    found = difference("x", [choose(one.name, tier, [one]) for one in reversed(tier.rows)])
    assert found.value is not None
    assert found.per_seed == pytest.approx({"seed0": 0.1, "seed1": 0.9})
    cells = tier.cells(tier.rows[1]) - tier.cells(tier.rows[0])
    over_prompts = bootstrap_mean(cells.mean(axis=1).to_numpy())
    assert over_prompts.low > 0.4
    assert found.value == pytest.approx(over_repetitions(over_prompts, [0.1, 0.9]))
    assert found.value.low < 0
    assert not found.above
    assert tier.rows[1]["difference"] == found.value, "one difference has one interval on a page"
    first = tier_of("high", [dpo, madpo(7.0, 4.0, 1.1, seeds=1)])
    assert difference("x", [choose(one.name, first, [one]) for one in reversed(first.rows)]).above


def test_intervals_at_equal_kl_hold_the_seeds() -> None:
    """Seeds that disagree by 2 make the interval wide, however many prompts there are."""
    alike = [CURVE[0], CURVE[2], madpo(7.0, 4.0, 2.5, kl=4.0)]
    apart = [CURVE[0], CURVE[2], in_second_seed(madpo(7.0, 4.0, 2.5, kl=4.0), reward=-2.0)]
    widths = []
    for rows in (alike, apart):
        tier = tier_of("high", rows)
        value = equal_kl("x", tier, choose("MADPO", tier, tier.rows[2:])).value
        assert value is not None
        widths.append(value.high - value.low)
    assert widths[1] > 1.5
    assert widths[1] > 3 * widths[0]


def test_beyond_its_ends_a_curve_says_nothing() -> None:
    tier = tier_of("high", [*CURVE, madpo(7.0, 4.0, 2.5, kl=30.0)])
    choice = choose("MADPO", tier, tier.rows[3:])
    names(equal_kl("x", tier, choice).missing, ("MADPO", "30.0 nats"), ("DPO", "2.0", "10.0"))
    assert equal_kl("x", tier_of("high", CURVE[:1]), None).value is None
    assert [r.name for r in frontiers(tier, 0.1)["DPO"]] == ["DPO β=0.03", "DPO", "DPO β=0.3"]
    assert base_beta([tier]) == 0.1
    assert [r.name for r in settings_of(tier, "DPO", 0.1)] == ["DPO"]


def test_equal_kl_compares_over_the_seeds_that_all_rows_have() -> None:
    """The core has two seeds, the frontier one: the second seed's rewards and KLs, larger by far, say nothing."""
    ends = [
        row("DPO β=0.3", 1.0, kl=2.0, kind="dpo", seeds=1, **{"beta": 0.3}),
        row("DPO β=0.03", 2.2, kl=10.0, kind="dpo", seeds=1, **{"beta": 0.03}),
    ]
    dpo = in_second_seed(row("DPO", 2.0, kl=6.0, kind="dpo"), reward=-3.0, kl=20.0)
    ours = in_second_seed(madpo(7.0, 4.0, 2.5, kl=4.0), reward=5.0, kl=2.0)
    tier = tier_of("high", [dpo, ours, *ends])
    found = equal_kl("x", tier, choose("MADPO", tier, tier.rows[1:2]))
    assert found.value is not None
    expected = 2.5 - on_curve(4.0, [2.0, 6.0, 10.0], [1.0, 2.0, 2.2])
    assert found.value.mean == pytest.approx(expected, abs=1e-6)
    assert (found.seeds, found.per_seed) == (1, {"seed0": pytest.approx(expected)})


@pytest.mark.parametrize("sft_seeds", [1, 2])
def test_every_seed_has_a_curve_of_the_settings_that_it_has(sft_seeds: int) -> None:
    """In the second seed the rewards are lower by 1, and DPO's curve has no setting at 6 nats and none beyond 10."""
    sft = row("SFT", 0.0, kl=0.0, seeds=sft_seeds)
    both = [
        in_second_seed(row(f"DPO {beta}", reward, kl=kl, kind="dpo", **{"beta": beta}), reward=-1.0)
        for beta, reward, kl in ((0.1, 2.2, 10.0), (0.3, 1.0, 2.0))
    ]
    first = [
        row("DPO far", 4.0, kl=20.0, kind="dpo", seeds=1, **{"beta": 0.03}),
        row("DPO between", 2.0, kl=6.0, kind="dpo", seeds=1, **{"beta": 0.2}),
    ]
    for kl, reached in ((4.0, {"seed0", "seed1"}), (15.0, {"seed0"})):
        ours = in_second_seed(madpo(7.0, 4.0, 2.5, kl=kl), reward=-0.5)
        tier = tier_of("high", [sft, ours, *both, *first])
        found = difference_at_its_kl(tier, tier.rows[1])
        curve = on_curve(kl, [2.0, 6.0, 10.0, 20.0], [1.0, 2.0, 2.2, 4.0]), on_curve(kl, [2.0, 10.0], [0.0, 1.2])
        expected = {seed: 2.5 - at - 0.5 * k for k, (seed, at) in enumerate(zip(SEEDS, curve, strict=True))}
        expected = {seed: value for seed, value in expected.items() if seed in reached}
        assert found.per_seed == pytest.approx(expected, abs=1e-6)
        assert found.value is not None
        assert found.value.mean == pytest.approx(np.mean([*expected.values()]), abs=1e-6)
        assert set(found.left_out) == set(SEEDS) - reached
        assert found.seeds == len(reached)
    names(found.left_out["seed1"], ("MADPO", "15.0 nats"), ("DPO", "10.0"))


SEEDS = "seed0", "seed1"

LEVELS = st.tuples(st.floats(-2, 2), st.floats(1, 20), st.sets(st.integers(0, 2), min_size=1))


@settings(max_examples=15)
@given(
    ours=LEVELS,
    theirs=st.lists(LEVELS, min_size=2, max_size=4, unique_by=lambda at: at[1]),
    shifts=st.lists(st.floats(0, 3), min_size=3, max_size=3),
)
def test_equal_kl_is_the_mean_over_seeds_of_numpys_interpolation(ours: Any, theirs: Any, shifts: list[float]) -> None:
    """Rows of any training seeds, which move all rewards and KLs: in each seed the curve of the rows that have it."""
    made = [
        row("SFT", 0.1, kl=0.0, seeds=1),
        *(made_with(f"DPO {k}", at, shifts, beta=k + 1.0) for k, at in enumerate(theirs)),
    ]
    tier = tier_of("high", [*made, made_with("ours", ours, shifts, kind="madpo")])
    start = made[0].samples["reward"].mean()
    expected = {}
    for seed in sorted(f"seed{k}" for k in ours[2]):
        points = [(0.0, start)]
        for one in made[1:]:
            own = one.samples[one.samples["seed"] == seed]
            points += [(own["kl"].mean() ** 0.5, own["reward"].mean())] if len(own) else []
        own = tier.samples[(tier.samples["key"] == "ours") & (tier.samples["seed"] == seed)]
        at = own["kl"].mean() ** 0.5
        if len(points) > 2 and at <= max(points)[0]:
            expected[seed] = own["reward"].mean() - np.interp(at, *zip(*sorted(points), strict=True))
    found = difference_at_its_kl(tier, tier.rows[-1])
    assert found.per_seed == pytest.approx(expected, abs=1e-9)
    assert (found.value is None) == (not expected)
    if found.value is not None:
        assert found.value.mean == pytest.approx(np.mean([*expected.values()]), abs=1e-9)
        assert found.value.low <= found.value.mean <= found.value.high
        assert set(found.left_out) == set(tier.rows[-1].seeds) - set(expected)


def made_with(name: str, at: tuple[float, float, set[int]], shifts: list[float], **loss: Any) -> Made:
    """A row at a reward and a KL that has some of three training seeds, each of which moves both."""
    level, kl, kept = at
    whole = row(name, level, kl=kl, seeds=3, **{"kind": "dpo", **loss})
    seeds = tuple(f"seed{k}" for k in sorted(kept))
    moved = whole.samples["seed"].map({f"seed{k}": shift for k, shift in enumerate(shifts)})
    table = whole.samples.assign(reward=whole.samples["reward"] - moved, kl=whole.samples["kl"] + moved)
    return Made(replace(whole.row, seeds=seeds), table[table["seed"].isin(seeds)])


def test_a_frontier_of_one_seed_is_compared_as_in_a_study_of_one_seed(tmp_path: Path) -> None:
    tiers = []
    for name, seeds in (("two", 2), ("one", 1)):
        study = make_study(tmp_path / name, ("high",), seeds, frontier_seeds=1, groups=("core", "frontier"))
        tiers += collect(study.root, study.records, methods())
    two, one = (equal_kl("x", t, choose("MADPO", t, settings_of(t, "MADPO", 0.1)[:1])) for t in tiers)
    assert two.value is not None
    assert two.value is not None
    assert one.value is not None
    assert (two.value.mean, two.seeds) == (one.value.mean, 1)


def test_other_rows_say_how_much_trainings_differ() -> None:
    """The method's two seeds disagree by 1, and four other methods' agree: its interval is shorter for them."""
    ours = in_second_seed(madpo(7.0, 4.0, 2.5, kl=4.0), reward=-1.0)
    calm = [row(f"other {k}", 2.0, kl=4.0 + k, kind="ipo", **{"beta": k + 1.0}) for k in range(4)]
    for differ in (lambda t: difference_at_its_kl(t, t.rows[2]).value, lambda t: t.rows[2]["difference"]):
        single, among = (differ(tier_of("high", [CURVE[0], CURVE[2], ours, *others])) for others in ([], calm))
        assert single.mean == pytest.approx(among.mean)
        assert among.high - among.low < 0.5 * (single.high - single.low)
    single, among = (
        difference("x", [choose("MADPO", t, [t.rows[2]]), choose("DPO", t, [t.rows[0]])])
        for t in (tier_of("high", [CURVE[0], CURVE[2], ours, *others]) for others in ([], calm))
    )
    assert single.per_seed == among.per_seed
    assert among.value.high - among.value.low < 0.5 * (single.value.high - single.value.low)  # type: ignore[union-attr]


def test_equal_kl_reports_what_each_seed_says() -> None:
    ours = in_second_seed(madpo(7.0, 4.0, 2.5, kl=4.0), reward=-2.0, kl=4.0)
    tier = tier_of("high", [CURVE[0], CURVE[2], ours])
    found = equal_kl("x", tier, choose("MADPO", tier, tier.rows[2:]))
    assert found.value is not None
    first, second = (on_curve(kl, [2.0, 10.0], [1.0, 2.2]) for kl in (4.0, 8.0))
    assert found.value.mean == pytest.approx(1.5 - (first + second) / 2, abs=1e-6)
    assert found.per_seed == pytest.approx({"seed0": 2.5 - first, "seed1": 0.5 - second}, abs=1e-6)
    assert found.seeds == 2
    assert not found.below, "the seeds disagree"
    far = tier_of("high", [CURVE[0], CURVE[2], in_second_seed(madpo(7.0, 4.0, 2.5, kl=4.0), kl=7.0)])
    beyond = equal_kl("x", far, choose("MADPO", far, far.rows[2:]))
    assert set(beyond.per_seed) == {"seed0"}
    names(beyond.left_out["seed1"], ("MADPO", "11.0 nats"), ("DPO", "2.0", "10.0"))


def test_every_setting_is_compared_with_dpos_curve_at_its_own_distance() -> None:
    tier = uneven_tier()
    found = {row.name: difference_at_its_kl(tier, row) for line in frontiers(tier, 0.1).values() for row in line}
    ours = found["MADPO τ=7 c=4"].value
    assert ours is not None
    # In the first seed DPO earns 2.0 at 8 nats and 1.8 at 14, so 1.967 at MADPO's 9.
    assert ours.mean == pytest.approx(2.1 - (2.0 - 0.2 / 6), abs=0.01)
    assert found["DPO"].value is None
    (table,) = [t for t in study_tables([tier], {}, [], 0.1, {}) if t.name == "frontier"]
    assert [line["less_dpo_at_equal_kl"] for line in table.rows if line["method"] == "MADPO"] == [ours]


HALF = [
    row("DPO lr=5e-05 β=0.3", 1.1, kl=2.0, kind="dpo", learning_rate=5e-5, **{"beta": 0.3}),
    row("DPO lr=5e-05", 2.3, kl=6.0, kind="dpo", learning_rate=5e-5),
]


def test_a_method_is_compared_with_the_learning_rate_of_dpo_that_leaves_it_least() -> None:
    """Above the curve at the study's rate by 0.1 and below the one at half of it by 0.2: it is not above DPO."""
    ours = madpo(7.0, 4.0, 2.1, kl=6.0)
    sft = row("SFT", 0.2, kl=0.0)
    tier = tier_of("high", [sft, *CURVE, *HALF, ours])
    assert [r.family for r in tier.policies] == ["DPO"] * 5 + ["MADPO"]
    assert tier.baseline == tier.rows[2]
    found = difference_at_its_kl(tier, tier.rows[-1])
    assert found.value is not None
    assert (found.value.mean, found.against) == (pytest.approx(-0.2, abs=1e-9), "DPO, learning rate 5e-05")
    assert found.below
    without = difference_at_its_kl(tier_of("high", [sft, *CURVE, ours]), tier.rows[-1])
    assert (without.above, without.against) == (True, "")
    # The other rate is a rival of DPO by itself, and is never compared with its own curve.
    half = difference_at_its_kl(tier, tier.rows[5])
    assert half.value is not None
    assert (half.value.mean, half.against) == (pytest.approx(0.3, abs=1e-9), "")
    keys = {claim.key: claim.verdict for claim in claims([tier])}
    assert keys["madpo-at-equal-kl"] == "did not hold"
    assert keys["dpo-learning-rate-5e-05-at-equal-kl"] == "held"


def test_one_seed_where_no_other_row_reaches_the_curve() -> None:
    """Nothing is known of the trainings' spread, and the interval is over prompts."""
    ours, far = madpo(7.0, 4.0, 2.5, kl=4.0, seeds=1), row("IPO", 2.0, kl=30.0, kind="ipo", seeds=1)
    values = [difference_at_its_kl(tier_of("high", [*CURVE, ours, *more]), tier.rows[3]).value
              for more in ([], [far]) for tier in [tier_of("high", [*CURVE, ours])]]  # fmt: skip
    assert values[0] is not None
    assert values[0] == values[1]


def test_a_curve_that_does_not_reach_so_far_is_named() -> None:
    far = madpo(7.0, 4.0, 3.0, kl=9.0)
    tier = tier_of("high", [row("SFT", 0.2, kl=0.0), *CURVE, *HALF, far])
    found = difference_at_its_kl(tier, tier.rows[-1])
    assert found.value is not None
    assert found.against == "DPO"
    names(found.left_out["DPO, learning rate 5e-05"], ("9.0 nats", "6.0"))


def test_of_several_curves_a_loss_is_said_before_what_is_open_and_this_before_a_gain() -> None:
    """One training of a wide interval hides no curve that the method is clearly below; and every curve must agree."""
    above = Comparison("x", Estimate(0.5, 0.1, 0.9, 40), {"seed0": 0.5}, against="above")
    wide = Comparison("x", Estimate(0.2, -0.5, 0.9, 40), {"seed0": 0.2}, against="wide")
    near = Comparison("x", Estimate(0.01, -0.1, 0.12, 40), {"seed0": 0.01}, against="near")
    below = Comparison("x", Estimate(-0.1, -0.19, -0.01, 40), {"seed0": -0.1}, against="below")
    apart = Comparison("x", Estimate(0.6, 0.2, 1.0, 40), {"seed0": 1.3, "seed1": -0.1}, against="apart")
    none = Comparison("x", missing="it does not reach so far", against="none")
    assert least_difference([wide, above, below, near]).against == "below"
    assert least_difference([wide, above, near]).against == "near"
    found = least_difference([above, apart, none])
    assert (found.against, found.above, found.left_out) == ("apart", False, {"none": "it does not reach so far"})
    assert least_difference([replace(above, value=Estimate(0.7, 0.3, 1.1, 40)), above]).value == above.value
    assert least_difference([none]) == replace(none, against="")


def test_a_statistic_of_few_units_covers() -> None:
    """The height above a line between two settings, of ten prompts; without a stretch intervals hold 90 %."""
    generator, inside = rng(2, "x"), 0
    for trial in range(300):
        values = generator.normal(size=(10, 1)) + generator.normal([2.0, 1.0, 3.0, 0.5], 0.4, size=(10, 4))
        found = bootstrap_statistic(values, lambda means: means[:, 0] - means[:, 1:3] @ [0.5, 0.5], seed=trial % 5)
        inside += found.low <= 0.0 <= found.high
    assert 0.92 <= inside / 300 <= 0.98


def test_a_statistic_of_means_has_the_interval_of_its_mean() -> None:
    values = rng(1, "x").normal(size=(400, 2))
    both = bootstrap_statistic(values, lambda means: means[:, 0] - means[:, 1], seed=3)
    plain = bootstrap_mean(values[:, 0] - values[:, 1], seed=3)
    assert both.mean == pytest.approx(plain.mean)
    assert both.low == pytest.approx(plain.low)
    assert both.high == pytest.approx(plain.high, abs=0.01)
