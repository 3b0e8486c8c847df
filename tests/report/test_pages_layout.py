"""Every kind of page in headless Chromium: the answer on the first screen, no cut label, no scrolling sideways."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.losses.simulation import KNOWLEDGE
from madpo.operations.evaluation import EvaluateReport, Side, write_samples
from madpo.operations.inspection import inspect as inspect_data
from madpo.operations.reward_model import RewardReport, write_report
from madpo.operations.settings import EvaluateSettings, RewardSettings, VerifyAutoSettings
from madpo.operations.tuning.report import Diverged, Heldout, Trial, TuneReport, write_search
from madpo.operations.tuning.settings import TuneSettings
from madpo.operations.verify_auto import AVERAGED, REDUCED, ROWS, SEARCHED, cell_name, summed_up, write_gains
from madpo.report import rebuild_report
from madpo.report.command_pages import write_training_page
from madpo.rewards.margins import inspect
from practice_cases import write
from quick import quick
from report_cases import HOSTILE, LONG, make_study

PAGES = ("report", "margins", "reward", "training", "samples", "tune", "simulation", "own")
FIRST_SCREEN = 900  # pixels

# Text of a figure that reaches beyond it: [text, by how much].
CUT = """
return [...document.querySelectorAll('svg.figure text')].filter((t) => t.getClientRects().length).map((t) => {
  const view = t.ownerSVGElement.viewBox.baseVal, box = t.getBBox();
  const over = [-box.x, box.x + box.width - view.width, -box.y, box.y + box.height - view.height];
  return [t.textContent, Math.max(...over)];
}).filter((found) => found[1] > 1);
"""
# What is wider than its own place, or than the window.
SIDEWAYS = """
const places = [...document.querySelectorAll('.scroll')].filter((e) => e.clientWidth);
const wide = places.filter((e) => e.scrollWidth > e.clientWidth + 1);
return [...wide.map((e) => e.getAttribute('aria-label')),
        ...(document.documentElement.scrollWidth > window.innerWidth ? ['the page'] : [])];
"""
OPEN = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


def margins_page(folder: Path) -> Path:
    h = rng(1, "margins").normal(1.0, 2.5, 300)
    rows = [
        {"pair_id": i, "prompt": f"p{i}", "chosen": "yes " * 30, "rejected": HOSTILE, "reward_margin": float(v)}
        for i, v in enumerate(h)
    ]
    write(folder / "pairs.jsonl", rows)
    inspect_data(folder / "pairs.jsonl", output=folder / "margins.html")
    return folder / "margins.html"


def reward_page(folder: Path) -> Path:
    log = [{"step": s, "loss": 0.7 - 0.002 * s} for s in range(1, 80)] + [
        {"step": s, "eval_loss": 0.6} for s in (20, 60)
    ]
    write(folder / "log.jsonl", log)
    found, share = inspect(rng(1, "margins").normal(1.0, 2.0, 300)), Estimate(0.67, 0.59, 0.74, 160)
    report = RewardReport(
        **dict.fromkeys(("data_digest", "eval_data", "model_digest", "adapter", "date", "temperature_interval")),
        **dict.fromkeys(("dropped", "stopping_pairs", "heldout_pairs", "steps"), 40),
        **{"data": "pairs.jsonl", "train_pairs": 400, "accuracy": share, "log_loss": 0.63, "log_loss_interval": share},
        **{"temperature": 1.0, "temperature_reason": "fitted", "calibrated_log_loss": 0.6},
        reliability=found.reliability,
        settings=RewardSettings(model=HOSTILE),
    )
    write_report(report, folder)
    return folder / "report.html"


def training_page(folder: Path) -> Path:
    steps = range(1, 120)
    log = [{"step": s, "loss": 0.69 - 0.002 * s, "rewards/margins": 0.01 * s, "weight/mean": 1.1} for s in steps]
    log += [{"step": s, "eval_loss": 0.68, "eval_rewards/margins": 0.1} for s in (40, 80)]
    write(folder / "log.jsonl", log)
    numbers = {"loss": "madpo", "training pairs": "1,400", "steps": "119", "mean loss": 0.571234}
    evaluation = {"eval_loss": 0.68123456, "eval_rewards/accuracies": 0.7123456, "eval_rewards/margins": 0.1}
    write_training_page(
        folder / "training.html",
        title=HOSTILE,
        says=["The policy has the lower loss on held-out pairs."],
        numbers=numbers,
        evaluation=evaluation,
        log=folder / "log.jsonl",
        settings=f"model = {LONG}",
        refresh=15,
    )
    return folder / "training.html"


def simulation_page(folder: Path) -> Path:
    gain = Estimate(0.0123456, -0.012, 0.034, 12)
    names = [f"{method} - {other}" for method in ROWS for other in ("dpo", SEARCHED, AVERAGED) if method != other]
    cell_of = dict.fromkeys([*names, "deciding", "label_share"], gain)
    cells = {cell_name(setting, kind): cell_of for setting in REDUCED for kind in KNOWLEDGE}
    write_gains(summed_up(VerifyAutoSettings(), cells), folder / "simulation.html")
    return folder / "simulation.html"


def own_page(folder: Path) -> Path:
    study = make_study(folder / "own", ("own",), seeds=1, groups=("core", "frontier"))
    study.experiment |= {"data": "pairs.jsonl", "judge": "probe"}
    for number, method in enumerate(study.methods):
        rows = rng(number, "heldout").normal(0.4, 1.0, 40)
        lines = [
            {"prompt_id": i, "sample": 0, "pair_id": i, "log_ratio_margin": h, "right": float(h > 0)}
            | {"log_loss": float(np.logaddexp(0, -h))}
            for i, h in enumerate(rows)
        ]
        place = study.add(f"heldout/own/method{number}/seed0", {}, {"method": method["name"]})
        write(place / "samples.jsonl", lines)
    return rebuild_report(study.write("Preference losses on pairs.jsonl"), figures=False)


def samples_page(folder: Path) -> Path:
    samples = [
        {
            **{"prompt_id": i, "prompt": [{"role": "user", "content": f"q{i} {LONG}"}] if i % 2 else HOSTILE},
            **{"response": f"The film was a wonderful {i} surprise and good.", "reference_response": HOSTILE},
            **{"reward": 1.0 + i, "reference_reward": 0.5, "ended": i > 0, "reference_ended": True},
        }
        for i in range(12)
    ]
    samples[3]["reference_response"] = "The film was a dreadful 3 surprise and good."
    estimate = Estimate(1.1, 0.9, 1.3, 12)
    side = Side(reward=estimate, length=estimate, distinct_1=0.4, distinct_2=0.5, ended_share=0.9)
    report = EvaluateReport(
        **dict.fromkeys(("prompts_digest", "policy_digest", "reference_digest", "reward_model_digest")),
        **{"policy": "policy", "reference": HOSTILE, "prompts": 12, "samples_per_prompt": 1},
        **{"win_rate": Estimate(0.7, 0.5, 0.8, 12), "reward_difference": estimate, "kl": estimate},
        **{"policy_side": side, "reference_side": side, "settings": EvaluateSettings(reward_model="rm")},
    )
    write_samples(report, samples, folder / "samples.html")
    return folder / "samples.html"


def tune_page(folder: Path) -> Path:
    def measured(value: float) -> Heldout:
        loss = Estimate(value, value - 2e-5, value + 2e-5, 150)
        return Heldout(accuracy=loss, log_loss=loss, temperature=1.1, raw_log_loss=loss, mean_margin=0.2)

    values = ({"loss.tau": tau, "args.learning_rate": rate} for tau, rate in ((2.0, 1e-5), (7.0, 1e-3)))
    space = {"loss.tau": {"values": [1.0, 2.0, 7.0]}, "args.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
    report = TuneReport(
        **{"data_digest": None, "pairs": 150, "dropped": 0, "criterion": "log_loss", "chosen": 1},
        trials=[Trial(number=i, values=v, heldout=measured(0.69316 - 1e-5 * i)) for i, v in enumerate(values)],
        baseline=Trial(number=-1, values={}, heldout=measured(0.6932)),
        advantage=Estimate(0.001, -0.001, 0.003, 150),
        settings=TuneSettings(model=HOSTILE, space=space),
        diverged=[Diverged(number=2, values={"loss.tau": 1.0}, reason=HOSTILE)],
    )
    write_search(folder, report)
    return folder / "tune.html"


@pytest.fixture(scope="module")
def pages(whole_page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = {"margins": margins_page, "reward": reward_page, "training": training_page}
    makers |= {"samples": samples_page, "tune": tune_page, "simulation": simulation_page, "own": own_page}
    return {"report": whole_page} | {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


def show(browser: Chrome, page: Path, width: int, height: int, scheme: str = "light") -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


@pytest.fixture
def screen(browser: Chrome) -> Iterator[Chrome]:
    """The browser, as it was afterwards."""
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def bottom(screen: Chrome, selector: str) -> float:
    box = screen.find_element(By.CSS_SELECTOR, selector).rect
    assert box["height"] > 0
    return float(box["y"] + box["height"])


def test_the_answer_is_on_the_first_screen(screen: Chrome, pages: dict[str, Path]) -> None:
    show(screen, pages["report"], 1280, FIRST_SCREEN)
    shown = screen.execute_script("return document.documentElement.scrollHeight")
    for selector in ("h1", ".question", "#figure1_main", ".tier:last-child .verdict", "#main table"):
        assert bottom(screen, selector) <= FIRST_SCREEN, selector
    assert len(screen.find_elements(By.CSS_SELECTOR, ".tier .verdict")) == 3
    assert shown < 6000, "the page as it opens"


@pytest.mark.parametrize(
    ("name", "selectors"),
    [
        ("margins", (".tiles", "#weight svg")),
        ("reward", (".tiles", "#reward_model")),
        ("samples", (".tiles", "[aria-label=Measured]")),
        ("tune", (".tiles", "#trials")),
        ("training", (".tiles", "#training")),
        ("simulation", ("#verdicts", "[aria-label='Methods over all cells']")),
        ("own", ("#figure1_main svg", "#main table")),
    ],
)
def test_a_commands_page_answers_on_the_first_screen(
    screen: Chrome, pages: dict[str, Path], name: str, selectors: tuple[str, ...]
) -> None:
    show(screen, pages[name], 1280, FIRST_SCREEN)
    for selector in ("h1", *selectors):
        assert bottom(screen, selector) <= FIRST_SCREEN, selector


SHOWN = [(name, width) for width in (1280, 390) for name in PAGES]


@pytest.mark.parametrize(
    ("name", "width"),
    quick(SHOWN, ("report", 1280), *((name, 390) for name in ("report", "margins", "training", "samples"))),
)
def test_nothing_is_cut_and_nothing_scrolls_sideways(
    screen: Chrome, pages: dict[str, Path], name: str, width: int
) -> None:
    show(screen, pages[name], width, 844)
    screen.execute_script(OPEN)
    assert not (cut := screen.execute_script(CUT)), cut
    assert screen.execute_script(SIDEWAYS) == []
    heights = screen.execute_script(
        "return [...document.querySelectorAll('svg.figure text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(size for size in heights if size) > 10, "pixels: readable"
    loud = [entry for entry in screen.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert not loud
    assert screen.title != "owned"


@pytest.mark.parametrize("name", quick(PAGES, "report", "samples"))
def test_dark_and_light_differ_and_are_readable(screen: Chrome, pages: dict[str, Path], name: str) -> None:
    def colour(selector: str, kind: str) -> np.ndarray:
        code = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        text = screen.execute_script(code, selector, kind)
        return np.array([float(v) for v in text.removeprefix("rgb(").rstrip(")").split(",")]) / 255

    grounds = []
    for scheme in ("light", "dark"):
        show(screen, pages[name], 1280, 900, scheme)
        ground = colour("body", "backgroundColor")
        grounds.append(tuple(ground))
        places = (("body", "color"), ("svg.figure .tick", "fill"), (".tile dt, .question, .aside", "color"))
        for selector, kind in places:
            assert contrast(colour(selector, kind), ground) > 4.5, (scheme, selector)
    assert len(set(grounds)) == 2


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """The contrast ratio of WCAG 2.1."""

    def luminance(rgb: np.ndarray) -> float:
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_samples_are_in_the_datas_order_and_their_differences_are_marked(
    screen: Chrome, pages: dict[str, Path]
) -> None:
    show(screen, pages["samples"], 1280, 900)
    cards = screen.find_elements(By.CSS_SELECTOR, "#samples-body .card")
    sides: list[Any] = [card.find_elements(By.CSS_SELECTOR, ".answer") for card in cards]
    firsts = [side[0].find_element(By.TAG_NAME, "p").text for side in sides]
    assert firsts == [f"The film was a wonderful {i} surprise and good." for i in range(8)]
    marks = [[m.text for m in side.find_elements(By.TAG_NAME, "mark")] for side in sides[3]]
    assert marks == [["wonderful"], ["dreadful"]]
    assert not cards[0].find_elements(By.TAG_NAME, "mark")  # nothing in common, so nothing worth a mark
    assert [("cut" in side[0].text) for side in sides[:2]] == [True, False], "one answer ended at the limit of tokens"
    assert sides[0][0].rect["y"] == sides[0][1].rect["y"], "two columns"
    assert sides[0][1].rect["x"] > sides[0][0].rect["x"] + sides[0][0].rect["width"]
