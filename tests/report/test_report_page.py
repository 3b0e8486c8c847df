"""The page of a whole study in a real browser, and of studies that are not finished."""

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from madpo.report import rebuild_report
from madpo.report.summary import SIDES
from practice_cases import read
from refusals import names
from report_cases import ARABIC, HOSTILE, LONG, PROMPTS, Study, make_study


@pytest.fixture
def page(whole_page: Path) -> Path:
    return whole_page


def press(window: Chrome, button: WebElement) -> None:
    """A click of the mouse, once the page has stopped scrolling to it."""
    window.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()


def claims_of(root: Path) -> dict[str, dict[str, Any]]:
    data = json.loads((root / "results.json").read_text(encoding="utf-8"))
    return {claim["key"]: claim for claim in data["claims"]}


@pytest.fixture(autouse=True)
def opened(request: pytest.FixtureRequest) -> None:
    """What is folded away is opened, where a test has a window."""
    if "window" in request.fixturenames:
        window: Chrome = request.getfixturevalue("window")
        window.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")


def test_every_figure_is_drawn_and_nothing_complains(window: Chrome) -> None:
    names = "figure1_main figure2_sensitivity figure3_ablation frontier training_loss training_margins calibration"
    for name in [*names.split(), "reward_model_training", "training_loss_sensitivity"]:
        figures = window.find_elements(By.CSS_SELECTOR, f"#{name} svg.figure")
        assert figures, name
        for figure in figures:
            assert figure.get_attribute("role") == "img"
            assert len(figure.get_attribute("aria-label") or "") > 20
            assert figure.find_elements(By.CSS_SELECTOR, ".dot, .line"), name
            assert figure.rect["width"] > 300
    assert len(window.find_elements(By.CSS_SELECTOR, "#figure1_main .dot:not(.published)")) == 3 * 5
    assert len(window.find_elements(By.CSS_SELECTOR, "#training_loss svg.figure")) == 4  # a panel per core method
    assert len(window.find_elements(By.CSS_SELECTOR, ".weight svg.figure")) == 3
    assert len(window.find_elements(By.CSS_SELECTOR, ".weight input[type=range]")) >= 9
    loud = [entry for entry in window.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert not loud, "nothing was refused by the page's policy, and nothing failed"


def test_text_of_the_data_is_shown_as_text(window: Chrome) -> None:
    assert window.title != "owned"
    assert not window.find_elements(By.CSS_SELECTOR, "img, iframe, [onload], [onerror]")
    assert len(window.find_elements(By.TAG_NAME, "style")) == 1
    assert window.find_element(By.TAG_NAME, "h1").get_property("textContent") == HOSTILE
    cards = window.find_elements(By.CSS_SELECTOR, "#samples-body .card")
    for card, text in zip(cards, (HOSTILE, ARABIC, LONG), strict=False):
        assert [p.get_property("textContent") for p in card.find_elements(By.CSS_SELECTOR, ".answer p")] == [text] * 2
        assert all(p.get_attribute("dir") == "auto" for p in card.find_elements(By.CSS_SELECTOR, "p"))
    assert window.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_samples_are_searched_and_sorted(window: Chrome, whole_study: Study) -> None:
    tier, left, right, order = (Select(e) for e in window.find_elements(By.CSS_SELECTOR, ".picker select"))
    assert [o.text for o in tier.options] == ["High", "Medium", "Low"]
    assert (left.first_selected_option.text, right.first_selected_option.text) == ("MADPO τ=7 c=4", "DPO")

    def rewards(name: str) -> dict[int, float]:
        number = [m["name"] for m in whole_study.experiment["method"]].index(name)
        folder = next(whole_study.root.glob(f"evaluation/high/method{number}/seed0-*"))
        rows = read(folder / "samples.jsonl")
        return {row["prompt_id"]: round(row["oracle_reward"], 3) for row in sorted(rows, key=lambda r: r["prompt_id"])}

    def shown() -> list[int]:
        prompts = window.find_elements(By.CSS_SELECTOR, "#samples-body .card p.prompt")
        return [int(str(p.get_property("textContent")).split()[1]) for p in prompts]

    ours, theirs = rewards("MADPO τ=7 c=4"), rewards("IPO")
    assert order.first_selected_option.text == "as in the data"
    assert shown() == sorted(ours)[:8]
    right.select_by_visible_text("IPO")
    order.select_by_value("down")
    ahead = sorted(ours, key=lambda i: theirs[i] - ours[i])
    assert shown() == ahead[:8]
    order.select_by_value("up")
    behind = sorted(ours, key=lambda i: ours[i] - theirs[i])
    assert shown() == behind[:8]
    press(window, window.find_element(By.CSS_SELECTOR, "#samples-body > button"))
    assert shown() == behind[:24]
    search = window.find_element(By.CSS_SELECTOR, ".picker input[type=search]")
    search.send_keys("ANSWERS number 17")
    assert shown() == [17]
    status = window.find_element(By.CSS_SELECTOR, "#samples-body [role=status]")
    assert status.text.startswith("1 prompts")
    search.send_keys(Keys.CONTROL, "a", Keys.NULL, "no such words")
    assert shown() == []
    search.clear()
    search.send_keys("answers")
    assert status.text.startswith(f"{PROMPTS - 3} prompts")


def test_tables_sort_by_a_click_or_a_key(window: Chrome) -> None:
    table = window.find_element(By.CSS_SELECTOR, "#results table.sortable")
    button = table.find_elements(By.CSS_SELECTOR, "thead th")[1].find_element(By.TAG_NAME, "button")

    def column() -> list[float]:
        cells = table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(2) b")
        return [float(str(cell.get_property("textContent")).replace("\N{MINUS SIGN}", "-")) for cell in cells]

    before = column()
    press(window, button)
    assert column() == sorted(before, reverse=True) != before
    button.send_keys(Keys.ENTER)
    assert column() == sorted(before)
    head = table.find_elements(By.CSS_SELECTOR, "thead th")[1]
    assert head.get_attribute("aria-sort") == "ascending"


def test_claims_and_missing_steps_are_on_the_page(window: Chrome, whole_study: Study) -> None:
    claims = claims_of(whole_study.root)
    assert claims["madpo-first-high"]["verdict"] == "held"
    assert claims["ipo-weakest"]["verdict"] == "held"
    assert claims["c-grows-medium"]["verdict"] == "held"
    assert claims["madpo-above-dpo-on-agreeing-pairs"]["verdict"] == "not separated"
    assert claims["beta-dpo-peaks-on-medium"]["verdict"] == "not separated"
    cards = window.find_elements(By.CSS_SELECTOR, ".claim")
    assert len(cards) == sum(claim["verdict"] != "not run" for claim in claims.values())
    total = len(whole_study.listing)
    assert window.find_element(By.CSS_SELECTOR, ".state").text == f"{total - 2} of {total} steps done, 1 failed"
    notes = window.find_element(By.CSS_SELECTOR, ".notes").text
    names(notes, ("agreeing", "High, Medium, Low"))
    verdicts = [one.text for one in window.find_elements(By.CSS_SELECTOR, ".tier .verdict")]
    assert [SIDES["above"] in text for text in verdicts] == [True] * 3
    failed = window.find_element(By.CSS_SELECTOR, "[aria-label='Failed steps']")
    assert "<b>full</b>" in failed.text
    differences = window.find_element(By.CSS_SELECTOR, "[aria-label='Differences']").text
    assert "pairs, train 30 10000" in differences.replace("\n", " ")


def test_a_part_of_a_study_has_a_useful_report(tmp_path: Path) -> None:
    study = make_study(tmp_path, tiers=("high",), seeds=1)
    for name in [n for n in study.listing if n.split("/")[0] in ("policy", "evaluation") and "method" in n]:
        if int(name.split("/")[2].removeprefix("method")) > 3:
            entry = study.listing.pop(name)
            study.records.pop(name)
            (study.root / entry["folder"] / "record.json").unlink()
            study.listing[name] = entry
    study.write("a part")
    text = rebuild_report(study.root, figures=False).read_text(encoding="utf-8")
    claims = claims_of(study.root)
    assert claims["madpo-first-high"]["verdict"] == "held"
    assert claims["madpo-first-low"]["verdict"] == "not run"
    assert claims["c-grows-high"]["verdict"] == "not run"
    assert claims["ipo-weakest"]["verdict"] == "not run"  # two tiers of three are missing
    assert claims["ipo-weakest"]["partly"]
    summary = json.loads((study.root / "results.json").read_text())["summary"]
    names(summary[0], (f"{len(study.listing)} steps", len(study.records)))
    names(text, "held, with one", "6 of 9", "13 methods")
