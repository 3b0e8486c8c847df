"""The page of ``madpo inspect`` in a real browser: what its sliders show is what the library's weight says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import madpo
from madpo.core.seeding import rng
from madpo.operations.inspection import inspect as inspect_data
from practice_cases import read, write

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"><svg onload=alert(1)>",
    "\u2028{{data}} <!-- &amp; '\" \u202eabc",
    "<iframe src='javascript:document.title=1'></iframe><style>body{display:none}</style>",
]
TOP, CURVE, BARS = 20, 170, 120  # of the figure, in its own units: weight 2 is at the top, 0 at the bottom of the curve
COUNTS = """
return [...document.querySelectorAll("#weight .counts div")].map(
  (box) => ["dt", "dd"].map((name) => box.querySelector(name).innerText))
"""
HEIGHTS = "return [...document.querySelectorAll(arguments[0])].map((bar) => bar.getAttribute('height'))"


@pytest.fixture(scope="module")
def margins() -> np.ndarray:
    generator = rng(3, "test", "page")
    h = generator.normal(1.0, 3.0, 400)
    return np.where(generator.random(400) < 1 / (1 + np.exp(-np.abs(h))), np.abs(h), -np.abs(h))


@pytest.fixture(scope="module")
def page(margins: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    rows = [
        {"pair_id": i, "prompt": f"p{i} {HOSTILE[i % 4]}", "chosen": HOSTILE[(i + 1) % 4], "rejected": f"r{i}",
         "reward_margin": float(h)}
        for i, h in enumerate(margins)
    ]  # fmt: skip
    write(folder / "pairs.jsonl", rows)
    inspect_data(folder / "pairs.jsonl", margin_temperature=1.0, output=folder / "margins.html")
    return folder / "margins.html"


def settings(window: Chrome) -> dict[str, Any]:
    """The values of the sliders, as arguments of ``margin_weight``."""
    read = {key: float(window.find_element(By.ID, f"weight-{key}").get_property("value")) for key in ("tau", "c_max")}
    read["lam"] = float(window.find_element(By.ID, "weight-lam").get_property("value"))
    own = window.find_element(By.ID, "weight-own").is_selected()
    return {**read, "c_min": float(window.find_element(By.ID, "weight-c_min").get_property("value")) if own else None}


def shown(window: Chrome) -> dict[str, str]:
    return dict(window.execute_script(COUNTS))


def check(window: Chrome, margins: np.ndarray) -> dict[str, Any]:
    """Counts and curve agree with ``margin_weight`` at the sliders' values; returns those."""
    p = settings(window)
    h = torch.from_numpy(margins)
    w = madpo.margin_weight(h, **p)
    log = madpo.log_margin_weight(h, **p)
    found = {key.split(",")[0]: value for key, value in shown(window).items()}
    expected = {
        "amplified": int((log > 0).sum()),
        "dampened": int(((log < 0) & (h > 0)).sum()),
        "turned down": int(((log < 0) & (h < 0)).sum()),
        "unchanged": int((log == 0).sum()),
    }
    assert {key: int(found[key].split(" ")[0]) for key in expected} == expected
    assert float(found["mean weight"]) == pytest.approx(w.mean().item(), abs=5.1e-4)
    effective = (w.sum() ** 2 / (w**2).sum()).item()
    assert found["effective sample size"] == f"{effective:.0f} of {len(margins)}"
    path = window.find_element(By.CSS_SELECTOR, "#weight path.curve").get_attribute("d")
    points = np.array([[float(n) for n in point.split(" ")] for point in re.split("[ML]", path)[1:]])
    largest = max(np.abs(margins).max(), 1.15 * p["tau"]) * 1.04
    places = torch.linspace(-largest, largest, len(points), dtype=torch.float64)
    curve = madpo.margin_weight(places, **p).numpy()
    # The text has two decimals of a pixel.
    np.testing.assert_allclose(2 * (TOP + CURVE - points[:, 1]) / CURVE, curve, atol=2e-4)
    bins = np.clip(((margins + largest) / (2 * largest) * 60).astype(int), 0, 59)
    sums = [np.bincount(bins, minlength=60), np.bincount(bins, w.numpy(), minlength=60)]
    most = max(1, *sums[0], *sums[1])
    for name, values in zip(("pairs", "weighted"), sums, strict=True):
        heights = np.array(window.execute_script(HEIGHTS, f"#weight rect.{name}"), float) * most / BARS
        np.testing.assert_allclose(heights, values[sums[0] > 0], atol=1e-6)
    return p


def drag(window: Chrome, key: str, pixels: int) -> None:
    """Take a slider's knob with the mouse and move it."""
    slider = window.find_element(By.ID, f"weight-{key}")
    low, high, value = (float(slider.get_property(name)) for name in ("min", "max", "value"))
    window.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
    width = slider.size["width"]
    knob = 16
    start = (value - low) / (high - low) * (width - knob) + knob / 2 - width / 2
    actions = ActionChains(window, duration=50).move_to_element_with_offset(slider, round(start), 0).click_and_hold()
    actions.move_by_offset(pixels // 2, 0).move_by_offset(pixels - pixels // 2, 0).release().perform()


def test_sliders_show_what_the_weight_gives(window: Chrome, margins: np.ndarray) -> None:
    before = check(window, margins)
    assert before["c_min"] is None
    seen, curves = [shown(window)], [window.find_element(By.CSS_SELECTOR, "path.curve").get_attribute("d")]
    for key, pixels in (("tau", -90), ("c_max", 60), ("lam", 40)):
        drag(window, key, pixels)
        after = check(window, margins)
        assert abs(after[key] - before[key]) > 0.1, f"the mouse moved {key}"
        assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}
        before = after
        seen.append(shown(window))
        curves.append(window.find_element(By.CSS_SELECTOR, "path.curve").get_attribute("d"))
    assert len(set(curves)) == 4
    assert len({json.dumps(s) for s in seen}) == 4
    window.find_element(By.ID, "weight-own").click()
    window.find_element(By.ID, "weight-c_min").send_keys(Keys.HOME)
    assert check(window, margins)["c_min"] == 0.0
    window.find_element(By.ID, "weight-c_min").send_keys(Keys.ARROW_RIGHT * 5)
    assert check(window, margins)["c_min"] == pytest.approx(0.05)
    window.find_element(By.CSS_SELECTOR, "#weight button").click()
    assert check(window, margins)["c_min"] is None
    assert shown(window) == seen[0], "back to the values of the report"


def test_affected_pairs_follow_the_sliders(window: Chrome, margins: np.ndarray) -> None:
    for move in ((), (("tau", -120),), (("c_max", 50), ("lam", 60))):
        for key, pixels in move:
            drag(window, key, pixels)
        log = madpo.log_margin_weight(torch.from_numpy(margins), **settings(window)).numpy()
        note = window.find_element(By.ID, "affected-note").text
        expected = []
        for name, group in (
            ("turned down", (log <= -np.log(1.05)) & (margins <= 0)),
            ("amplified", log >= np.log(1.05)),
            ("dampened", (log <= -np.log(1.05)) & (margins > 0)),
        ):
            count = int(group.sum())
            assert bool(re.search(rf"\b{count} [a-z]+ {name}", note)) == (count > 0)
            expected += sorted(np.flatnonzero(group), key=lambda i: -abs(log[i]))[:6]
        cards = window.find_elements(By.CSS_SELECTOR, "#affected .card p.prompt")
        assert [int(re.match(r"pair (\d+) \(", card.text)[1]) for card in cards] == expected  # type: ignore[index]


def test_text_of_the_data_is_shown_as_text(window: Chrome, page: Path, margins: np.ndarray) -> None:
    given = {row["pair_id"]: row for row in read(page.parent / "pairs.jsonl")}
    window.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for place in ("#affected .card", "#suspects .card"):
        cards = window.find_elements(By.CSS_SELECTOR, place)
        assert cards
        for card in cards:
            prompt = card.find_element(By.CSS_SELECTOR, "p.prompt").get_property("textContent")
            row = given[int(re.match(r"pair (\d+) \(", prompt)[1])]  # type: ignore[index]
            assert row["prompt"] in prompt
            sides = [p.get_property("textContent") for p in card.find_elements(By.CSS_SELECTOR, ".answer p")]
            assert sides == [row["chosen"], row["rejected"]]
    assert window.title.startswith("Reward margins of"), "no script of the data has run"
    assert not window.find_elements(By.CSS_SELECTOR, "img, iframe, [onload], [onerror]")
    assert window.find_element(By.TAG_NAME, "body").is_displayed()
    assert len(window.find_elements(By.TAG_NAME, "style")) == 1
    loud = [entry for entry in window.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert not loud, "nothing was refused by the page's policy, and nothing failed"
