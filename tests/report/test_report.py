"""The report of a made-up run whose numbers are known."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from claim_cases import headline
from madpo.core.errors import ConfigError, DataError
from madpo.core.metrics import Estimate
from madpo.report import build_report, rebuild_report
from madpo.report.charts import Chart, Mark, Panel, Series
from madpo.report.collect import collect
from madpo.report.drawing import draw
from madpo.report.numbers import one
from madpo.report.pages import STYLES, part
from madpo.report.sources import folder_of
from madpo.report.summary import SIDES, cautions, verdict
from madpo.report.tables import report_markdown_table
from madpo.rewards.weight_counts import WeightParameters, count_weights, log_weight
from madpo.runner.record import Record
from practice_cases import write
from refusals import names, refused

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 \u202e 'quoted\" <img src=x onerror=alert(2)>"
ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645"
LONG = "supercalifragilistic" * 40
N = 40
REWARDS = {"sft": 0.0, "dpo": 1.0, "madpo": 1.5, "near": 1.02}


def make_run(root: Path, *, seeds: int = 1, title: str = HOSTILE) -> dict[str, Record]:
    """Two tiers. Rewards are a common prompt effect, the method's level and a little noise of its own."""
    records: dict[str, Record] = {}

    def add(name: str, metrics: dict[str, Any], config: Any = None, inputs: Any = None) -> Path:
        identity = f"{len(records):064x}"[::-1]
        provenance = {"seconds": 12.5, "host": HOSTILE, "started": "2026-01-01T00:00:00Z", "madpo": "0", "argv": []}
        record = Record(
            name=name, identity=identity, operation="f/1", config=config or {}, inputs=inputs or {},
            metrics=metrics, libraries={"torch": "2.13.0"}, threads=2, provenance=provenance,
        )  # fmt: skip
        records[name] = record
        folder = folder_of(root, record)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(record.model_dump_json())
        return folder

    def evaluate(name: str, method: str, seed: int) -> None:
        generator = np.random.default_rng([seed, sum(map(ord, method))])
        common = np.random.default_rng(9).normal(size=N)
        noise = generator.normal(size=N) * 0.1
        noise -= noise.mean()
        rewards = REWARDS[method] + common - common.mean() + noise
        folder = add(
            name, {"distinct_2": 0.7, "ended_share": 0.25, "oracle_reward": Estimate(*[float(rewards.mean())] * 3, N)}
        )
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for i in reversed(range(N)):
                text = {0: HOSTILE, 1: ARABIC, 2: LONG}.get(i, f"{method} answers prompt {i}")
                row = {
                    "prompt_id": i,
                    "prompt": f"prompt {i} {HOSTILE if i == 0 else ''}",
                    "response": text,
                    "tokens": 20 + i % 3,
                    "ended": True,
                    "oracle_reward": float(rewards[i]),
                    "kl": 10.0 * REWARDS[method],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    add("sft", {"loss": 3.0})
    evaluate("evaluation/sft", "sft", 0)
    for number, tier in enumerate(("low", "high")):
        pairs = add(f"pairs/{tier}", {"pairs": 6})
        ids = pa.array([5, 4, 3, 2, 1, 0])
        pq.write_table(pa.table({"pair_id": ids, "split": ["heldout", *["train"] * 5]}), pairs / "pairs.parquet")
        add(
            f"reward_model/{tier}",
            {"heldout_accuracy": Estimate(0.8125, 0.75, 0.86, 160), "heldout_log_loss": 0.451, "temperature": 1.21},
        )
        margins = add(f"margins/{tier}", {"pairs": 6}, inputs={"pairs": records[f"pairs/{tier}"].identity})
        values = pa.array([1.0, 3.0, -1.0, -9.0, 0.0, 99.0])  # pair 5 is held out
        pq.write_table(pa.table({"pair_id": pa.array(range(6)), "reward_margin": values}), margins / "margins.parquet")
        for method in ("dpo", "madpo", "near"):
            for seed in range(seeds):
                loss = {"kind": method, "beta": 0.1}
                if method == "madpo":
                    loss |= {"tau": 2.0, "c_max": 4.0, "c_min": None, "lam": 1.0}
                name = {"dpo": "DPO", "madpo": "MADPO", "near": HOSTILE}[method]
                folder = add(f"policy/{tier}/{method}/seed{seed}", {}, {"method": name, "loss": loss})
                log = [
                    {"step": s, "loss": 0.7 / s + number, "rewards/margins": 0.1 * s, "epoch": 1} for s in range(1, 9)
                ]
                write(folder / "log.jsonl", log)
                evaluate(f"evaluation/{tier}/{method}/seed{seed}", method, seed)
    listing = {
        n: {"folder": str(folder_of(root, r).relative_to(root)), "identity": r.identity} for n, r in records.items()
    }
    (root / "run.json").write_text(json.dumps({"about": {"title": title, "experiment": {"x": 1}}, "steps": listing}))
    return records


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Record], str]:
    root = tmp_path_factory.mktemp("run")
    records = make_run(root, seeds=2)
    path = build_report(root, records, HOSTILE, {"policy": {"note": HOSTILE}}, figures=False)
    assert path == root / "report.html"
    return root, records, path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts, and what each script holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        place = {"script": self.scripts, "style": self.styles}.get(self.open[-1] if self.open else "", self.texts)
        place.append(data)


def test_numbers_are_the_runs_own(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    root, records, text = run_folder
    high, low = collect(root, records)
    assert (high.name, low.name) == ("high", "low")
    assert [row.key for row in high.rows] == ["sft", "dpo", "madpo", "near"]
    by_key = {row.key: row for row in high.rows}
    for key, level in REWARDS.items():
        reward = by_key[key]["oracle_reward"]
        assert isinstance(reward, Estimate)
        assert reward.mean == pytest.approx(level, abs=1e-12)
        assert reward.n == N
        assert reward.low < level < reward.high
        assert by_key[key].mean("kl") == pytest.approx(10 * level)
    assert by_key["sft"]["difference"] is None
    assert by_key["dpo"]["difference"] is None
    gap = by_key["madpo"]["difference"]
    assert gap is not None
    assert gap.mean == pytest.approx(0.5)
    assert 0.4 < gap.low < gap.high < 0.6  # pairing removes the prompts' own spread
    assert by_key["madpo"].mean("win_rate") == 1.0
    assert by_key["madpo"].per_seed == pytest.approx({"seed0": 1.5, "seed1": 1.5})
    assert sorted(high.margins) == [-9.0, -1.0, 0.0, 1.0, 3.0]  # training pairs only, joined on pair_id
    for shown in ("0.45", "81 %", "1.21", "75 % to 86 %", "+0.50"):
        assert shown in text


def test_the_headline_claims_what_the_numbers_carry(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    root, records, _ = run_folder
    tiers = collect(root, records)
    words = " ".join([*headline(tiers), cautions(tiers)])
    names(words, ("High: MADPO", "1.50"), SIDES["above"], ("KL", "15.0", "10.0"), f"{N} held-out")
    assert "Two" in cautions(tiers)


def test_the_headline_does_not_overclaim(tmp_path: Path) -> None:
    records = make_run(tmp_path)
    few = {name: record for name, record in records.items() if "madpo" not in name}
    near = collect(tmp_path, few)[0].rows[-1]["difference"]
    assert isinstance(near, Estimate)
    words = " ".join(headline(collect(tmp_path, few)))
    assert (SIDES["open"] in words) == (near.low <= 0 <= near.high)
    only_dpo = {name: record for name, record in few.items() if "near" not in name}
    tiers = collect(tmp_path, only_dpo)
    words = " ".join([*headline(tiers), cautions(tiers)])
    assert not [side for side in SIDES.values() if side in words]
    assert "One" in cautions(tiers)
    worse = []
    for tier in collect(tmp_path, records):
        rows = [replace(r, values={**r.values, "oracle_reward": 9.0}) if r.key == "sft" else r for r in tier.rows]
        worse.append(replace(tier, rows=rows))
    assert [verdict(tier).kind for tier in worse if tier.policies] == ["below"] * 2
    assert all("9.00" in said for said in headline(worse)[1:]), "the level of the SFT model"
    assert len(headline([])) == 1


def test_nothing_from_data_becomes_markup(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    _, _, text = run_folder
    page = Page(text)
    assert not page.open
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert not [k for _, attributes in page.tags for k in attributes if k.startswith("on") or k == "style"]
    assert "alert(1)" in "".join(page.texts)  # it is there, as text
    data = json.loads(page.scripts[0])
    responses = data["samples"]["High"]["prompts"][0]["responses"]
    assert responses == [HOSTILE] * 4
    assert data["samples"]["High"]["prompts"][1]["responses"][0] == ARABIC
    assert data["weights"]["weight-high"]["margins"] == [-9.0, -1.0, 0.0, 1.0, 3.0]
    assert data["weights"]["weight-high"]["parameters"] == {"tau": 2.0, "c_max": 4.0, "c_min": None, "lam": 1.0}
    assert data["samples"]["High"]["baseline"] == [2, 1]


def test_the_page_needs_no_other_file(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    _, _, text = run_folder
    page = Page(text)
    outside = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"'<]*", text)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # the name of SVG, not an address that is loaded
    assert not [tag for tag, attributes in page.tags if "src" in attributes or tag in ("link", "iframe", "base")]
    assert all(a["href"].startswith("#") for tag, a in page.tags if tag == "a" and a["href"])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert page.styles[0] == "".join(part(name) for name in STYLES)
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def pairs_by_weight(words: str) -> list[str]:
    """How many training pairs there are, and how many are amplified, dampened and turned down."""
    found = re.search(r"(\d+)[a-z ]* (\d+)[a-z ]* amplified\D* (\d+) dampened\D* (\d+) ", words)
    assert found is not None
    return list(found.groups())


def test_it_says_something_without_scripts(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    _, _, text = run_folder
    page = Page(text)
    words = " ".join(page.texts)
    figures = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(figures) >= 8
    assert all(a.get("aria-label") for a in figures)
    assert pairs_by_weight(words) == ["5", "1", "1", "1"]
    assert "prompt 3" not in words
    assert "prompt 2" in words
    assert len([1 for tag, a in page.tags if tag == "th" and a.get("scope") in ("row", "col")]) > 20


def test_tables_next_to_the_page(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    root, records, _ = run_folder
    data = json.loads((root / "results.json").read_text())
    methods = {m["key"]: m for m in data["tiers"]["high"]["methods"]}
    assert methods["madpo"]["oracle_reward"]["mean"] == pytest.approx(1.5)
    assert methods["madpo"]["difference"]["n"] == N
    assert data["tiers"]["high"]["reward_models"]["seed"]["heldout_accuracy"]["mean"] == 0.8125
    rows = list(csv.DictReader((root / "tables" / "methods.csv").read_text().splitlines()))
    (row,) = [r for r in rows if (r["tier"], r["method"]) == ("High", "MADPO")]
    assert float(row["oracle_reward"]) == pytest.approx(1.5)
    assert row["oracle_reward_n"] == str(N)
    table = report_markdown_table(collect(root, records)[0])
    assert "| MADPO | 1.50 (" in table
    assert len({line.count(" | ") for line in table.splitlines()}) == 1


def test_the_same_records_give_the_same_page(run_folder: tuple[Path, dict[str, Record], str]) -> None:
    root, records, text = run_folder
    build_report(root, records, HOSTILE, {"policy": {"note": HOSTILE}}, figures=False)
    assert (root / "report.html").read_text(encoding="utf-8") == text


def test_rebuild_reads_the_runs_own_list(tmp_path: Path) -> None:
    make_run(tmp_path, title="run.json")
    text = rebuild_report(tmp_path, figures=False).read_text(encoding="utf-8")
    assert "<title>run.json</title>" in text
    with refused(ConfigError, tmp_path):
        rebuild_report(tmp_path / "other")


def test_an_unfinished_run_has_a_page_too(tmp_path: Path) -> None:
    records = make_run(tmp_path)
    for keep in ([], ["margins/high"], ["evaluation/sft"], ["evaluation/high/dpo/seed0"], ["reward_model/low"]):
        text = build_report(tmp_path, {name: records[name] for name in keep}, "t", {}, figures=False).read_text()
        assert not Page(text).open


def test_steps_that_carry_the_seeds_name(tmp_path: Path) -> None:
    records = make_run(tmp_path, seeds=2)
    single = collect(tmp_path, records)
    renamed = {}
    for name, record in records.items():
        if name.startswith(("evaluation/sft", "margins/", "reward_model/")):
            for seed in ("seed0", "seed1"):
                shutil.copytree(folder_of(tmp_path, record), tmp_path / f"{name}/{seed}-{record.identity[:8]}")
                renamed[f"{name}/{seed}"] = record.model_copy(update={"name": f"{name}/{seed}"})
        else:
            renamed[name] = record
    several = collect(tmp_path, renamed)
    assert [tier.name for tier in several] == ["high", "low"]
    assert list(several[0].reward_models) == ["seed0", "seed1"]
    assert several[0].rows[0].seeds == ("seed0", "seed1")
    assert several[0].rows[1:] == single[0].rows[1:]
    assert several[0].margins.tolist() == single[0].margins.tolist()
    assert "High seed1" in build_report(tmp_path, renamed, "t", {}, figures=False).read_text()


def test_metrics_are_enough(tmp_path: Path) -> None:
    records = make_run(tmp_path)
    for path in tmp_path.rglob("samples.jsonl"):
        path.unlink()
    build_report(tmp_path, records, "t", {}, figures=False)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["tiers"]["high"]["methods"][2]["oracle_reward"]["mean"] == pytest.approx(1.5)


def test_a_damaged_sample_names_its_row(tmp_path: Path) -> None:
    records = make_run(tmp_path)
    path = folder_of(tmp_path, records["evaluation/sft"]) / "samples.jsonl"
    path.write_text('{"prompt_id": 1, "oracle_reward": 2}\n{"prompt_id": 2\n')
    with refused(DataError, "samples.jsonl", "row 2"):
        build_report(tmp_path, records, "t", {}, figures=False)


GRID = [
    (tau, c_max, c_min, lam)
    for tau in (0.5, 2.0, 7.0, 12.0)
    for c_max in (1.0001, 2.0, 4.0)
    for c_min in (None, 0.0, 0.6)
    for lam in (0.1, 1.0, 5.0)
]
MARGINS = [-1e6, -800.0, -90.0, -7.0, -6.999, -3.0, -1.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 2.0, 6.9, 7.0, 30.0, 800.0, 1e6]


@pytest.fixture(scope="module")
def library_weights() -> list[list[float]]:
    import torch

    from madpo.losses import log_margin_weight

    h = torch.tensor(MARGINS, dtype=torch.float64)
    return [log_margin_weight(h, tau=t, c_max=c, c_min=m, lam=s).tolist() for t, c, m, s in GRID]


def test_the_figures_weight_is_the_librarys(library_weights: list[list[float]]) -> None:
    for parameters, expected in zip(GRID, library_weights, strict=True):
        found = log_weight(np.array(MARGINS), WeightParameters(*parameters))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def node(code: str, given: object) -> Any:
    path = shutil.which("node")
    if path is None:
        pytest.skip("node is not on the PATH, so the page's script cannot be run")
    program = f"{part('weight.js')}\nconst given = JSON.parse(require('fs').readFileSync(0));\n{code}"
    done = subprocess.run([path, "-e", program], input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_pages_weight_is_the_librarys(library_weights: list[list[float]]) -> None:
    given = {"grid": [WeightParameters(*p)._asdict() for p in GRID], "margins": MARGINS}
    code = "console.log(JSON.stringify(given.grid.map((p) => given.margins.map((h) => MadpoWeight.logWeight(h, p)))));"
    np.testing.assert_allclose(node(code, given), library_weights, rtol=1e-12, atol=1e-14)


def test_the_pages_counts_are_the_figures() -> None:
    margins = np.random.default_rng(3).normal(1, 4, size=500).round(4)
    parameters = WeightParameters(tau=3.0, c_max=4.0)
    given = {"margins": margins.tolist(), "p": parameters._asdict()}
    found = node("console.log(JSON.stringify(MadpoWeight.summary(given.margins, given.p)));", given)
    expected = count_weights(margins, parameters)
    assert expected.amplified + expected.dampened + expected.turned_down + expected.unchanged == 500
    assert [found["amplified"], found["dampened"], found["turned_down"], found["unchanged"]] == list(expected[:4])
    assert [found["mean"], found["effective"]] == pytest.approx(list(expected[4:]))
    assert 1 <= expected.effective <= 500


def test_margins_are_shown_as_the_loss_reads_them(tmp_path: Path) -> None:
    records = make_run(tmp_path)
    policy = records["policy/high/madpo/seed0"]
    loss = {**policy.config["loss"], "margin_temperature": 2.0}
    records[policy.name] = policy.model_copy(update={"config": {**policy.config, "loss": loss}})
    page = Page(build_report(tmp_path, records, "t", {}, figures=False).read_text())
    assert json.loads(page.scripts[0])["weights"]["weight-high"]["margins"] == [-4.5, -0.5, 0.0, 0.5, 1.5]
    assert pairs_by_weight(" ".join(page.texts)) == ["5", "2", "0", "1"]


@pytest.mark.parametrize(
    ("value", "how", "text"),
    [
        (0.0, "number", "0.00"),
        (0.0004, "number", "0.0004"),
        (-1.234, "number", "\N{MINUS SIGN}1.23"),
        (0.5, "signed", "+0.50"),
        (0.456, "share", "46 %"),
        (float("nan"), "number", "\N{EN DASH}"),
    ],
)
def test_numbers_as_people_read_them(value: float, how: str, text: str) -> None:
    assert one(value, how) == text


def test_counts_of_known_margins() -> None:
    counts = count_weights(np.array([1.0, 3.0, -1.0, -9.0, 0.0]), WeightParameters(tau=2.0, c_max=4.0))
    assert tuple(counts[:4]) == (1, 1, 1, 2)


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [1e-300, 2e-300], [-1e12, 1e12]])
@pytest.mark.parametrize("categories", [(), ("a", HOSTILE, "c")])
def test_figures_of_odd_ranges_are_finite(values: list[float], categories: tuple[str, ...]) -> None:
    places = [(value, float(i)) if categories else (float(i), value) for i, value in enumerate(values)]
    marks = tuple(Mark(x, y, says=HOSTILE) for x, y in places)
    panel = Panel(HOSTILE, HOSTILE, "y", (Series(HOSTILE, marks, 0),), categories)
    (svg,) = draw(Chart("name", "title", "", [panel])).panels
    assert "nan" not in svg
    assert "inf" not in svg
    assert "<script" not in svg
    assert "<img" not in svg
