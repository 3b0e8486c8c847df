"""The demonstration: its numbers are those of the simulation, its page says that it is one."""

import json

from madpo.core.metrics import Estimate
from madpo.losses.simulation import KNOWLEDGE
from madpo.operations.demo import METHODS, DemoReport, DemoSettings, demo
from madpo.report.simulation_page import SEES


def test_the_demo_writes_a_page_of_what_it_simulated(tmp_path) -> None:
    settings = DemoSettings(pairs=100, worlds=3)
    report = demo(tmp_path / "demo", settings)
    assert list(report.differences) == list(KNOWLEDGE) == list(SEES)
    assert all(list(found) == list(METHODS) for found in report.differences.values())
    record = json.loads((tmp_path / "demo" / "record.json").read_text())
    for kind, found in report.differences.items():
        for name, value in found.items():
            kept = record["metrics"].get(f"{kind}: {name} - dpo")
            assert (value is None and kept is None) or value == Estimate(**kept)
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "simulation" in page
    assert all(name in page and what in page for name, what in METHODS.values())
    assert demo(tmp_path / "demo", settings) == report, "a finished demo is read, not made again"


def test_verdicts_name_what_the_intervals_separate() -> None:
    far, near, below = Estimate(1.0, 0.5, 1.5, 9), Estimate(0.1, -0.1, 0.3, 9), Estimate(-1.0, -2.0, -0.5, 9)
    found = {"madpo": far, "soft_dpo": near, "fast": below, "auto": None}
    report = DemoReport(settings=DemoSettings(), differences={"good": found}, deciding={})
    said, kind, remarks = report.verdict("good")
    assert said.index(METHODS["madpo"][0]) < said.index(METHODS["fast"][0]), "above, then below"
    assert METHODS["soft_dpo"][0] not in said
    assert kind == "above"
    assert len(remarks) == 1
