"""What the report says where rows have unlike seeds, answer alike, or were run on a part of the tiers."""

from dataclasses import replace

import numpy as np
import pytest

from claim_cases import N, by_key, in_second_seed, madpo, row
from madpo.records import Estimate
from madpo.report.charts import Panel, ablation_chart, frontier_chart
from madpo.report.claims import BEYOND, OPEN, Claim, claims
from madpo.report.families import choose, less
from madpo.report.frontier import frontiers, less_dpo
from madpo.report.sections import equal_kl_html
from madpo.report.standing import empty_cells, idle_parts
from madpo.report.tables import study_tables
from madpo.results import Row, Tier
from madpo.summary import headline, report_markdown_table


def uneven_tier() -> Tier:
    """DPO and MADPO with two seeds, the second lower by 1 and half as far; the other rows have the first seed alone."""
    dpo = in_second_seed(row("DPO", 2.0, kl=8.0, kind="dpo"), reward=-1.0, kl=-4.0)
    ours = in_second_seed(madpo(7.0, 4.0, 2.1, kl=9.0), reward=-1.0, kl=-4.0)
    dampen = replace(madpo(7.0, 4.0, 2.0, "dampen", seeds=1, group="ablation"), kls=dpo.seed_kls["seed0"])
    dampen = replace(dampen, rewards=dpo.seed_rewards["seed0"], seed_rewards={"seed0": dpo.seed_rewards["seed0"]})
    far = row("DPO β=0.03", 1.8, kl=14.0, kind="dpo", seeds=1, group="frontier", **{"beta": 0.03})
    near = row("DPO β=0.3", 1.5, kl=3.0, kind="dpo", seeds=1, group="frontier", **{"beta": 0.3})
    return Tier("low", [dpo, ours, dampen, far, near], margins=np.array([-2.0, 0.5, 4.59]))


def test_levels_that_stand_together_are_over_the_same_seeds() -> None:
    tier = uneven_tier()
    assert mean_of(tier.rows[0]) == pytest.approx(1.5)  # over both seeds, and 2.0 in the first
    line = frontiers(tier, 0.1)["DPO"]
    assert [mean_of(r) for r in line] == pytest.approx([1.8, 2.0, 1.5])
    assert [r.kl.mean for r in line if isinstance(r.kl, Estimate)] == pytest.approx([14.0, 8.0, 3.0], abs=0.1)
    assert {r.seeds for r in line} == {("seed0",)}
    frontier, ablation = frontier_chart([tier], 0.1), ablation_chart([tier], 0.1)
    assert frontier is not None
    assert ablation is not None
    assert [p.title for p in frontier.panels] == ["Low, seed0 alone"]
    (panel,) = ablation.panels
    assert isinstance(panel, Panel)
    assert panel.categories == ("Low, seed0 alone",)
    bars = {s.name: [m.y for m in s.marks] for s in panel.series if not s.published}
    assert bars["DPO"] == pytest.approx([2.0])
    assert bars["Reg-Only"] == pytest.approx([2.0])
    words = " ".join(headline([tier]))
    assert "Low: MADPO τ=7 c=4 has the highest mean oracle reward, 1.60" in words
    assert "Three settings of fewer seeds are not ranked here." in words
    assert "(3 of 5 trainings have fewer)" in words
    assert "| DPO β=0.3 | seed0 | 1.50" in report_markdown_table(tier)
    assert "unlike training seeds" in report_markdown_table(tier)
    even = Tier("low", tier.rows[:2])
    assert "seeds" not in report_markdown_table(even).splitlines()[0]


def test_every_setting_is_laid_beside_dpos_curve_at_its_own_distance() -> None:
    tier = uneven_tier()
    found = {row.name: less_dpo(tier, row) for line in frontiers(tier, 0.1).values() for row in line}
    ours = found["MADPO τ=7 c=4"].value
    assert ours is not None
    # In the first seed DPO earns 2.0 at 8 nats and 1.8 at 14, so 1.967 at MADPO's 9.
    assert ours.mean == pytest.approx(2.1 - (2.0 - 0.2 / 6), abs=0.01)
    assert found["DPO"].value is None
    (table,) = [t for t in study_tables([tier], {}, [], 0.1, {}) if t.name == "frontier"]
    assert [line[-1] for line in table.rows if line[1] == "MADPO"] == [ours]
    html = equal_kl_html([tier], 0.1)
    assert "Low: MADPO τ=7 c=4" in html
    assert "seed0 +0.13" in html
    assert "Low: DPO" not in html
    assert equal_kl_html([Tier("low", tier.rows[:2])], 0.1) == ""


def test_other_settings_of_the_parts_have_a_panel_without_the_papers_numbers() -> None:
    parts = [madpo(2.0, 2.0, 1.1, "amplify", group="ablation"), madpo(2.0, 2.0, 1.2, "dampen", group="ablation")]
    tier = Tier("low", [row("DPO", 1.0, kind="dpo"), *parts, madpo(7.0, 4.0, 1.4, "amplify")])
    chart = ablation_chart([tier, Tier("high", tier.rows[:1])], 0.1)
    assert chart is not None
    assert [p.title for p in chart.panels] == ["c = 4, τ = 7", "c = 2, τ = 2"]
    other = chart.panels[1]
    assert isinstance(other, Panel)
    assert other.categories == ("Low",)  # High has no part
    assert not [s for s in other.series if s.published]
    assert {s.name: [m.y for m in s.marks] for s in other.series}["Reg-Only"] == pytest.approx([1.2])


def test_policies_that_answer_alike_show_nothing() -> None:
    """Without a margin beyond tau Reg-Only is DPO: "no worse than DPO" would hold of it whatever the method does."""
    tier = uneven_tier()
    found = less(choose("Reg-Only", tier, tier.rows[2:3]), choose("DPO", tier, tier.rows[:1]), "x", bound=-0.1)
    assert found.value is not None
    assert (found.value.low, found.value.high, found.same) == (0.0, 0.0, True)
    assert not found.above
    assert Claim("k", BEYOND, "t", "r", "", (found,)).verdict == OPEN
    (said,) = idle_parts([tier])
    assert "On Low no margin" in said
    assert "reaches τ = 7, the largest is 4.59" in said
    assert not idle_parts([replace(tier, margins=np.array([8.0]))])
    assert not idle_parts([Tier("low", tier.rows[:2], margins=tier.margins)])


def test_a_verdict_says_what_it_stands_on() -> None:
    tier, high = uneven_tier(), Tier("high", [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 1.5)])
    found = by_key(claims([high, tier]))
    assert found["madpo-at-equal-kl"].shown == "held, on Low alone, with one training of each"
    assert found["madpo-above-dpo-best-beta"].only == ("Low",)
    assert found["madpo-first-high"].shown == "not run in full, 2 of 3 comparisons are missing"
    assert found["madpo-above-rdpo"].shown == "not run"


def test_no_interval_that_excludes_0_is_said_to_include_it() -> None:
    """The highest mean may be clearly below DPO on shared seeds, where the other has more seeds than DPO."""
    dpo, other = row("DPO", 2.0, kind="dpo", seeds=1), row("IPO", 2.5, kind="ipo")
    worse = Estimate(-0.1, -0.12, -0.08, N)
    words = " ".join(headline([Tier("low", [dpo, replace(other, difference=worse)])]))
    assert "an interval that excludes 0" in words
    assert "includes 0" not in words


def test_a_failed_step_above_is_the_reason_of_an_empty_cell() -> None:
    tier = Tier("low", [], missing=("DPO", "DPO, agreeing pairs"))
    rows = [
        {"name": "DPO", "key": "dpo"},
        {"name": "DPO, agreeing pairs", "key": "agreeing-pairs", "pairs": "agreeing"},
    ]
    assert set(empty_cells([tier], rows, {"base": "failed: x"}).values()) == {"not run: base failed"}
    found = empty_cells([tier], rows, {"agreeing/low/seed0": "failed: x"})
    assert found == {("low", "DPO"): "not run", ("low", "DPO, agreeing pairs"): "not run: agreeing/low/seed0 failed"}


def mean_of(given: Row) -> float:
    assert isinstance(given.oracle_reward, Estimate)
    return given.oracle_reward.mean
