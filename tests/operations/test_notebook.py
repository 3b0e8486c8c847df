"""Reports in a notebook: tables, HTML, and the example of ``examples/`` from its first cell to its last."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.data import check
from madpo.operations.train_report import TrainReport
from practice_cases import text_pairs, write
from refusals import refused

NOTEBOOK = Path(__file__).parents[2] / "examples" / "pairs_to_policy.ipynb"


def displayed(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last is not None else None


@pytest.mark.slow
def test_every_cell_of_the_example_runs(llama, tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv("MODEL", str(llama))
    monkeypatch.setenv("WORK", str(tmp_path / "notebook"))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    shown = [displayed("".join(cell["source"]), names) for cell in cells if cell["cell_type"] == "code"]
    reports = [value for value in shown if isinstance(value, Report)]
    assert len(reports) == 6
    assert all(value._repr_html_().startswith("<pre>") for value in reports)
    assert len(names["log"]) > 3
    assert shown[-1]["train_loss"] > 0


def test_a_report_is_a_table_and_html(tmp_path):
    class Part(Frozen):
        size: Estimate
        word: str

    class Whole(Report):
        pairs: int
        share: Estimate
        side: Part
        parts: tuple[Part, ...]
        settings: dict[str, int]

        def text(self) -> str:
            return "a <b> report"

    part = Part(size=Estimate(1.0, 0.5, 1.5, 3), word="x")
    whole = Whole(pairs=3, share=Estimate(0.5, 0.2, 0.8, 3), side=part, parts=(part, part), settings={"seed": 7})
    frame = whole.frame()
    assert frame.loc["share"].tolist() == [0.5, 0.2, 0.8]
    assert frame["value"].to_dict() == {"pairs": 3, "share": 0.5, "side.size": 1.0}
    assert whole.frame("parts").to_dict("records")[1] == {"size": 1.0, "size.low": 0.5, "size.high": 1.5, "word": "x"}
    with refused(ConfigError, "'share'"):
        whole.frame("share")
    html = whole._repr_html_()
    assert "a &lt;b&gt; report" in html
    assert "side.size" in html


def test_findings_and_evaluations_are_tables(tmp_path):
    rows = text_pairs(6)
    report = check(write(tmp_path / "pairs.jsonl", [*rows, rows[0]]))
    table = report.frame("findings")
    assert table.loc[table["kind"] == "duplicate", "count"].item() >= 1
    assert "lengths.prompt.mean" in report.frame().index
    report = TrainReport(
        **{"pairs": 2, "eval_pairs": 1, "steps": 1, "loss": 0.5, "evaluation": {"eval_loss": 0.6}},
        **{"dropped": 0, "cut": 0, "data_digest": None, "model_digest": None},
    )
    assert report.frame().loc["evaluation.eval_loss", "value"] == 0.6
