"""Pages of what has hardly begun: no heading without content, no curve of one point."""

import json
import re

import pytest

from madpo.report import rebuild_report
from madpo.report.command_pages import main_measures, training_chart, write_training_page
from practice_cases import write
from report_cases import Study

EVALUATION = {"eval_loss": 0.61, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -40.0, "eval_strange": 2.0}


def test_a_comparison_that_stopped_shows_no_section_without_content(tmp_path):
    study = Study(tmp_path / "own", "core")
    study.experiment |= {"data": "pairs.jsonl", "judge": None}
    study.add("pairs/own", {"pairs": 60})
    study.unfinished("policy/own/dpo/seed0", "ConfigError: stopped")
    html = rebuild_report(study.write(), figures=False).read_text()
    assert re.findall(r"<summary><h2>(.*?)</h2>", html) == ["Provenance"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_course_has_two_points(tmp_path, steps):
    write(tmp_path / "log.jsonl", [{"step": step, "loss": 0.7 - 0.01 * step} for step in range(1, steps + 1)])
    chart = training_chart(tmp_path / "log.jsonl")
    assert (chart is not None) == (steps > 1)


def test_measures_are_named_in_words_and_all_are_kept(tmp_path):
    assert [(name, value) for name, _, value in main_measures(EVALUATION)] == [("Loss", 0.61), ("Accuracy", 0.75)]
    page = tmp_path / "report.html"
    how = {"title": "T", "says": [], "numbers": {}, "evaluation": EVALUATION, "settings": ""}
    write_training_page(page, log=tmp_path / "none.jsonl", **how)
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(), re.S)
    cells = [[re.sub(r"<[^>]+>|\s+", " ", c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r, re.S)] for r in rows]
    assert [row[-1] for row in cells[1:]] == list(EVALUATION)
    assert [name for name, *_ in cells[1:] if "/" in name] == []
    assert json.dumps(cells[-1][0]) == '"strange"', "what has no words keeps its name"
