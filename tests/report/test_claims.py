"""The verdicts of a report on made-up studies whose answers are known."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from claim_cases import by_key, in_second_seed, madpo, row, tier_of, uneven_tier, without
from madpo.core.metrics import Estimate
from madpo.report import published
from madpo.report.charts import PAPER, Chart, Mark, Panel, Series, WeightPanel, levels
from madpo.report.claims import BEYOND, BROKEN, HELD, OPEN, OWN, Claim, claims, counts, ties
from madpo.report.compare import NOT_RUN, Comparison, choose, difference
from madpo.report.drawing import save_charts
from madpo.report.results import Tier
from madpo.report.study import choices_of
from madpo.report.study_charts import ablation_chart, frontier_chart, main_chart, sensitivity_chart
from madpo.report.study_sections import claims_view, doubts
from madpo.report.summary import SIDES, doubtful, empty_cells, idle_parts, verdict, weights_from
from madpo.report.tables import study_tables, tex
from madpo.rewards.weight_counts import WeightParameters
from madpo.runner.record import Record
from refusals import names

SETTINGS = [(2.0, 2.0), (4.0, 2.0), (7.0, 2.0), (10.0, 2.0), (7.0, 3.0), (7.0, 4.0)]


def paper_tier(name: str) -> Tier:
    """A tier with exactly the paper's numbers, its beta-DPO's other settings lower than the published one."""
    table = published.TABLE_1
    rows = [
        row("DPO", table["DPO"][name][0], kind="dpo", noise=0.02),
        row("IPO", table["IPO"][name][0], kind="ipo", reduction="sum"),
        row("β-DPO m=0.6 p=0.8", table["β-DPO"][name][0], kind="beta_dpo", batch_scale=0.6, keep=0.8, noise=0.02),
        row("β-DPO m=0.6 p=0.4", table["β-DPO"][name][0] - 0.5, kind="beta_dpo", batch_scale=0.6, keep=0.4),
    ]
    for tau, c in SETTINGS:
        level = published.OVER_TAU[name][tau] if c == 2 else published.OVER_C[name][c]
        rows.append(madpo(tau, c, level, noise=0.02))
    for c, parts in published.ABLATION.items():
        rows.append(madpo(7.0, c, parts["Amp-Only"][name], "amplify", group="ablation", noise=0.02))
        rows.append(madpo(7.0, c, parts["Reg-Only"][name], "dampen", group="ablation", noise=0.02))
    return tier_of(name, rows)


@pytest.fixture(scope="module")
def paper() -> list[Tier]:
    return [paper_tier(name) for name in published.TIERS]


def test_the_papers_own_numbers_give_the_papers_own_claims(paper: list[Tier]) -> None:
    found = by_key(claims(paper))
    own = {key: claim.verdict for key, claim in found.items() if claim.section not in OWN}
    # Reg-Only at c = 4 is 0.01 below DPO on Medium, and 0.07 above at c = 2, which the choice finds.
    assert {key for key, verdict in own.items() if verdict == HELD} == set(own)
    assert len(own) == 20
    assert re.findall(r"\d+", counts([*found.values()])) == ["20", "5", "20", "0", "0", "0"], "of 20 in Section 5"
    assert re.findall(r"\d+", counts(claims([]))) == ["20", "5"]
    first = found["madpo-first-high"]
    assert [c.what for c in first.comparisons] == [f"MADPO minus {name}, High" for name in ("DPO", "IPO", "β-DPO")]
    assert first.comparisons[0].value is not None
    # Both are exact on all prompts; on the reporting half they differ from that only by their own noise.
    assert first.comparisons[0].value.mean == pytest.approx(2.23 - 1.62, abs=0.05)
    assert set(first.comparisons[0].per_seed) == {"seed0", "seed1"}


def test_the_opposite_is_said_too(paper: list[Tier]) -> None:
    turned = [tier_of(tier.name, [row("IPO", 3.0, kind="ipo")]) for tier in paper]
    both = [replace(t, rows=[*without(t, "IPO").rows, *i.rows]) for t, i in zip(paper, turned, strict=True)]
    tables = [pd.concat([t.samples[t.samples["key"] != "ipo"], i.samples]) for t, i in zip(paper, turned, strict=True)]
    found = by_key(claims([replace(t, samples=table) for t, table in zip(both, tables, strict=True)]))
    assert found["ipo-weakest"].verdict == BROKEN
    assert found["madpo-first-low"].verdict == BROKEN
    assert found["c-grows-low"].verdict == HELD
    view = claims_view(list(found.values()), turned, 2)
    (weakest,) = [v for v in view["sections"]["Main result"] if v["claim"].key == "ipo-weakest"]
    assert weakest["kind"] == "broken"
    assert weakest["closest"].bar.high < 0  # the least favourable difference
    assert view["made"].endswith("comparisons")
    assert view["seeds"] == 2


def test_what_is_not_there_is_not_run_and_what_is_partly_there_says_so() -> None:
    assert {claim.verdict for claim in claims([])} == {NOT_RUN}
    core = tier_of("high", [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 2.0)])
    found = by_key(claims([core]))
    assert found["madpo-first-high"].verdict == NOT_RUN  # IPO and β-DPO are missing
    assert found["madpo-first-high"].partly
    assert found["madpo-first-low"].verdict == NOT_RUN
    assert found["madpo-not-sensitive"].verdict == NOT_RUN  # one setting shows no sensitivity
    assert found["madpo-above-rdpo"].verdict == NOT_RUN
    assert "2 of 3" in found["madpo-first-high"].shown
    view = claims_view(list(found.values()), [core], 1)
    worse = tier_of("high", [row("DPO", 3.0, kind="dpo"), madpo(7.0, 4.0, 2.0)])
    broken = by_key(claims([worse]))["madpo-first-high"]
    assert broken.verdict == BROKEN  # one rival above it is enough, whatever the others do
    names(broken.shown, BROKEN, "2 of 3")
    assert any(found["madpo-above-rdpo"].text in text for text in view["absent"])
    assert view["seeds"] == 1


def test_a_tie_with_a_rival_is_said() -> None:
    rows = [
        row("DPO", 1.0, kind="dpo"),
        madpo(7.0, 4.0, 2.0),
        row("filtered", 2.0, kind="dpo", pairs="agreeing", noise=1.0),
        row("relabelled", 2.5, kind="dpo", pairs="redrawn"),
        row("DPO β=0.03", 1.99, kind="dpo", noise=1.0, group="frontier", **{"beta": 0.03}),
        row("rDPO", 1.2, kind="rdpo"),
        row("online", 2.0, kind="rloo", trainer="rloo"),
        row("best of 4", 1.8, kind="best_of_n", n=4, trainer="best_of_n"),
        row("MADPO, folds", 2.6, kind="madpo", tau=7.0, c_max=4.0, margins="out_of_fold"),
    ]
    tier = tier_of("high", rows)
    found = by_key(claims([tier]))
    assert found["madpo-above-dpo-on-agreeing-pairs"].verdict == OPEN
    assert found["madpo-above-dpo-on-re-drawn-labels"].verdict == BROKEN
    assert found["madpo-above-rdpo"].verdict == HELD
    assert found["madpo-above-dpo-best-beta"].verdict == OPEN
    assert found["madpo-above-best-of-n"].verdict == HELD  # MADPO with margins out of fold is another row
    words = ties(list(found.values()))
    for rival in ("agreeing", "best β", "re-drawn"):
        (said,) = (w for w in words if rival in w)
        names(said, "High")
    assert not [w for w in words if "rDPO" in w]
    assert [r.method for r in tier.rows] == [
        *(
            "DPO",
            "MADPO",
            "DPO on agreeing pairs",
            "DPO on re-drawn labels",
            "DPO",
            "rDPO",
            "RLOO",
            "Best of n",
            "MADPO, out-of-fold margins",
        )
    ]


def test_reward_models_near_chance_are_said_where_verdicts_are() -> None:
    def model(*estimates: Estimate) -> dict[str, Record]:
        return {
            f"seed{k}": Record.model_construct(metrics={"heldout_accuracy": value}) for k, value in enumerate(estimates)
        }

    coin, good = Estimate(0.52, 0.44, 0.6, 160), Estimate(0.72, 0.65, 0.78, 160)
    rows = [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 2.0), row("IPO", 0.1, kind="ipo"),
            row("β-DPO m=0.6 p=0.8", 0.5, kind="beta_dpo")]  # fmt: skip
    tiers = [tier_of(n, rows, reward_models=m) for n, m in (("high", model(good, coin)), ("low", model(good, good)))]
    said = weights_from(tiers)
    assert "High 72 % (65 % to 78 %), 52 % (44 % to 60 %); Low 72 % (65 % to 78 %)" in said[0]
    assert "High" in said[1]
    assert "Low" not in said[1]
    found = by_key(claims(tiers))
    assert doubtful(found["madpo-first-high"], tiers) == ["High"]
    assert doubtful(found["madpo-first-low"], tiers) == []
    assert doubtful(found["beta-dpo-above-dpo"], tiers) == []  # no weights in it
    view = claims_view(list(found.values()), tiers, 2)
    assert "High 72 %" in view["cautions"][0]
    remarks = {v["claim"].key: v["remarks"] for views in view["sections"].values() for v in views}
    assert any("High" in remark for remark in remarks["madpo-first-high"])
    assert remarks["madpo-first-low"] == []
    little = [tier_of("low", rows, reward_models=model(Estimate(0.57, 0.51, 0.62, 400)))]
    assert "Low" in weights_from(little)[1]
    assert weights_from([tier_of("low", rows)]) == []


def test_seeds_that_disagree_separate_nothing() -> None:
    value = Estimate(0.3, 0.2, 0.4, 100)
    assert Comparison("a", value, {"seed0": 0.7, "seed1": 0.1}).above
    assert not Comparison("a", value, {"seed0": 0.7, "seed1": -0.1}).above
    assert not Comparison("a", Estimate(0.3, 0.2, 0.4, 9)).above  # too few prompts
    assert Comparison("a", Estimate(-0.05, -0.08, -0.02, 99), bound=-0.1).above
    assert Comparison("a", Estimate(-0.3, -0.4, -0.2, 99), bound=-0.1).below
    claim = Claim("k", "s", "t", "r", "", (Comparison("a", value, {"seed0": 0.7, "seed1": -0.1}),))
    assert claim.verdict == OPEN
    optional = Comparison("b", Estimate(-0.3, -0.4, -0.2, 99), required=False)
    assert replace(claim, comparisons=(Comparison("a", value), optional)).verdict == BROKEN


def places(panel: Panel | WeightPanel, *, published: bool = False) -> dict[str, float]:
    """Name -> value of a panel of values one under the other, this run's or the paper's."""
    assert isinstance(panel, Panel)
    return {s.name.removesuffix(PAPER): s.marks[0].x for s in panel.series if s.published == published}


def test_figures_show_the_papers_and_the_runs_numbers(paper: list[Tier]) -> None:
    main = main_chart(paper, choices_of(paper, 0.1))
    assert main is not None
    for panel, tier in zip(main.panels, published.TIERS, strict=True):
        theirs = {name: published.TABLE_1[name][tier][0] for name in published.METHODS}
        assert places(panel).keys() == theirs.keys()
        assert places(panel)["DPO"] == pytest.approx(theirs["DPO"])
        assert places(panel, published=True) == theirs
    sensitivity = sensitivity_chart(paper, 0.1)
    assert sensitivity is not None
    over_tau, over_c = sensitivity.panels
    for panel, over in ((over_tau, published.OVER_TAU), (over_c, published.OVER_C)):
        assert isinstance(panel, Panel)
        drawn = {s.name: [(m.x, m.y) for m in s.marks] for s in panel.series}
        assert drawn["High"] == [pytest.approx(p) for p in over["high"].items()]
        assert drawn["High, the paper"] == [*over["high"].items()]
    ablation = ablation_chart(paper, 0.1)
    assert ablation is not None
    assert [p.title for p in ablation.panels[2:4]] == ["Low, c = 2, τ = 7", "High, c = 4, τ = 7"]
    assert places(ablation.panels[3])["Amp-Only"] == pytest.approx(2.20)
    assert sensitivity_chart([tier_of("high", [row("DPO", 1.0, kind="dpo")])], 0.1) is None
    assert frontier_chart(paper, 0.1) is not None


def test_tables_for_papers(paper: list[Tier]) -> None:
    tables = {t.name: t for t in study_tables(paper, choices_of(paper, 0.1), claims(paper), 0.1, {})}
    lines = tables["table1"].csv().splitlines()
    assert lines[0].startswith("tier,method,setting,settings,seeds,reward,reward_low,reward_high,reward_n,best_on_all")
    (dpo,) = [line for line in csv.reader(lines) if line[:2] == ["High", "DPO"]]
    assert dpo[2:5] == ["DPO", "1", "seed0, seed1"]
    assert float(dpo[5]) == pytest.approx(1.62)
    assert dpo[-2:] == ["1.62", "0.03"]
    latex = tables["table1"].latex()
    assert r"$\beta$-DPO" in latex
    assert latex.count(r"\\") == 13
    assert all(line.count("&") == 9 for line in latex.splitlines() if line.endswith(r"\\"))
    assert '"verdict": "held"' in tables["claims"].json()
    assert tex("a_b & 50 % $x$ {} \\ ~^#<>") == (
        r"a\_b \& 50 \% \$x\$ \{\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\textless{}\textgreater{}"
    )


def test_degeneration_is_noticed() -> None:
    plain = {"distinct_2": 0.8, "length": 40.0, "perplexity": 10.0, "repeated": 0.0}
    sft = replace(row("SFT", 0.0).row, values=plain)
    fine = replace(row("DPO", 1.0, kind="dpo").row, values=plain | {"perplexity": 12.0, "repeated": 0.05})
    broken = replace(fine, values={"distinct_2": 0.3, "length": 20.0, "perplexity": 31.0, "repeated": 0.2})
    assert doubts(fine, sft) == []
    assert doubts(sft, sft) == []
    assert len(doubts(broken, sft)) == 4


def test_figures_as_files(tmp_path: Path) -> None:
    hostile = "$x_{$ </script> \N{ARABIC LETTER MEEM} \ud800 _hidden"
    marks = (Mark(0.0, 1.0, 0.5, 1.5, -0.2, 0.2), Mark(1.0, -2.0))
    values = [("DPO", 0, Estimate(1.0, 0.5, 1.5, 9), 1.2), (hostile, 2, -1.0, None)]
    rows = levels("levels", "y", values, ("SFT", 0.0))
    lines = Panel(hostile, "x", "y", (Series(hostile, marks, 2), Series("β", marks[:1], 3)), reference=("r", 0.5))
    decades = Panel("log", "x", "y", (Series("a", (Mark(1e-5, 1.0), Mark(1e-3, 2.0)), 1, raw=True),), log=True)
    weights = WeightPanel("High", np.array([-3.0, 0.5, 9.0]), WeightParameters())
    charts = [Chart("first", "title", "caption", [rows, lines, decades]), Chart("second", hostile, "", [weights])]
    save_charts(charts, tmp_path / "a")
    save_charts(charts, tmp_path / "b")
    for name in ("first.svg", "second.svg"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert b"var(" not in content  # the palette is resolved
        assert b"<script" not in content
    words = " ".join(ElementTree.fromstring((tmp_path / "a" / "first.svg").read_bytes()).itertext())
    assert "</script> \N{ARABIC LETTER MEEM} \N{REPLACEMENT CHARACTER}" in words


def test_other_settings_of_the_parts_have_a_panel_without_the_papers_numbers() -> None:
    parts = [madpo(2.0, 2.0, 1.1, "amplify", group="ablation"), madpo(2.0, 2.0, 1.2, "dampen", group="ablation")]
    dpo = row("DPO", 1.0, kind="dpo")
    tier = tier_of("low", [dpo, *parts, madpo(7.0, 4.0, 1.4, "amplify")])
    chart = ablation_chart([tier, tier_of("high", [dpo])], 0.1)
    assert chart is not None
    assert [p.title for p in chart.panels] == ["Low, c = 4, τ = 7", "Low, c = 2, τ = 2"]  # High has no part
    own, other = chart.panels
    assert places(own, published=True)
    assert not places(other, published=True)
    assert places(other)["Reg-Only"] == pytest.approx(1.2)


def test_policies_that_answer_alike_show_nothing() -> None:
    """Without a margin beyond tau Reg-Only is DPO: "no worse than DPO" would hold of it whatever the method does."""
    tier = uneven_tier()
    sides = [choose("Reg-Only", tier, tier.rows[2:3]), choose("DPO", tier, tier.rows[:1])]
    found = difference("x", sides, bound=-0.1)
    assert found.value is not None
    assert (found.value.low, found.value.high, found.same) == (pytest.approx(0.0), pytest.approx(0.0), True)
    assert not found.above
    assert Claim("k", BEYOND, "t", "r", "", (found,)).verdict == OPEN
    (said,) = idle_parts([tier])
    names(said, "Low", "τ = 7", "4.59")
    assert not idle_parts([replace(tier, margins=np.array([8.0]))])
    assert not idle_parts([replace(tier, rows=tier.rows[:2])])


def test_a_verdict_says_what_it_stands_on() -> None:
    tier, high = uneven_tier(), tier_of("high", [row("DPO", 1.0, kind="dpo"), madpo(7.0, 4.0, 1.5)])
    found = by_key(claims([high, tier]))
    names(found["madpo-at-equal-kl"].shown, HELD, "Low", "one training")
    assert found["madpo-above-dpo-best-beta"].only == ("Low",)
    names(found["madpo-first-high"].shown, "2 of 3")
    assert found["madpo-above-rdpo"].shown == NOT_RUN


def test_no_interval_that_excludes_0_is_said_to_include_it() -> None:
    """The highest mean may be clearly below DPO on shared seeds, where the other has more seeds than DPO."""
    dpo = row("DPO", 2.0, kind="dpo", seeds=1)
    other = in_second_seed(row("IPO", 1.9, kind="ipo", noise=0.01), reward=1.0)
    found = verdict(tier_of("low", [dpo, other]))
    names(found.level, ("IPO", "2.40"))
    assert found.kind == "below"
    assert SIDES["open"] not in found.text


def test_a_failed_step_above_is_the_reason_of_an_empty_cell() -> None:
    tier = tier_of("low", [], missing=("DPO", "DPO, agreeing pairs"))
    rows = [
        {"name": "DPO", "key": "dpo"},
        {"name": "DPO, agreeing pairs", "key": "agreeing-pairs", "pairs": "agreeing"},
    ]
    for said in empty_cells([tier], rows, {"base": "failed: x"}).values():
        names(said, NOT_RUN, ("base", "failed"))
    found = empty_cells([tier], rows, {"agreeing/low/seed0": "failed: x"})
    assert found["low", "DPO"] == NOT_RUN
    names(found["low", rows[1]["name"]], NOT_RUN, ("agreeing/low/seed0", "failed"))
