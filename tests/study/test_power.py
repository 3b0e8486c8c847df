"""The least difference that a run can tell: closed forms, the two variances, and what --dry-run says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from madpo.core.config import find_experiment, load_config
from madpo.core.errors import ConfigError
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, over_repetitions
from madpo.study.experiment import Experiment
from madpo.study.power import ERRORS, Spread, detectable_lines, errors, spread
from refusals import names, refused
from report_cases import Study
from repository import ROOT


def test_the_closed_form() -> None:
    assert pytest.approx(1.959964 + 0.841621, abs=1e-6) == ERRORS
    best, worst = Spread(0.5, 2.0).detectable(160, 4)
    assert best == worst == pytest.approx(ERRORS * math.sqrt((0.5 + 0.5) / 160))
    # One response a prompt known: more responses may help by their root, or not at all.
    best, worst = Spread(None, 2.0).detectable(100, 16)
    assert (best, worst) == pytest.approx((ERRORS * math.sqrt(2) / 40, ERRORS * math.sqrt(2) / 10))
    # Seeds whose means do not differ ask for what one does, at Student's t of 99 degrees of freedom.
    assert errors(100, 2, 0.0) == pytest.approx(1.984217 + 0.841621, abs=5e-3)
    assert errors(100, 2, 1.0) > 2 * ERRORS > errors(100, 3, 1.0) > errors(100, 10, 1.0) > ERRORS


def test_the_two_variances_are_found() -> None:
    generator = rng(0, "power")
    prompts = generator.normal(scale=0.5, size=(4000, 1))
    values = pd.DataFrame(0.3 + prompts + generator.normal(scale=1.5, size=(4000, 3)))
    found = spread(values)
    assert found.between == pytest.approx(0.25, abs=0.05)
    assert found.within == pytest.approx(2.25, abs=0.1)
    assert spread(values[[0]]).between is None
    assert spread(values[[0]]).within == pytest.approx(2.5, abs=0.15)


@pytest.mark.parametrize(("seeds", "samples"), [(1, 4), (2, 1), (3, 2)])
def test_the_difference_is_found_in_four_of_five_runs(seeds: int, samples: int) -> None:
    generator = rng(1, "power")
    truth, _ = Spread(0.25, 2.25).detectable(40, samples, seeds)
    found = 0
    for trial in range(400):
        prompts, answers = generator.normal(size=(40, 1, 1)), generator.normal(size=(40, seeds, samples))
        values = (truth + 0.5 * prompts + 1.5 * answers).mean(axis=2)
        over_prompts = bootstrap_mean(values.mean(axis=1), seed=trial % 4)
        found += over_repetitions(over_prompts, values.mean(axis=0)).low > 0
    assert found / 400 == pytest.approx(0.8, abs=0.06)


def steps(*overrides):
    return load_config(find_experiment("laptop"), Experiment, overrides).steps()


def least(line: str) -> str:
    """The difference that the line says is the least: the first number with a fraction."""
    found = re.search(r"\d+\.\d+", line)
    assert found is not None
    return found[0]


def test_a_dry_run_says_it_from_finished_rows_and_from_a_pilot(tmp_path: Path) -> None:
    assert "--pilot" in detectable_lines(steps(), tmp_path)[0]
    with refused(ConfigError, tmp_path / "nothing"):
        detectable_lines(steps(), tmp_path, tmp_path / "nothing")
    made = ROOT / "docs" / "results" / "laptop"
    lines = detectable_lines(steps(), made)
    assert [line.split(":")[0] for line in lines[:3]] == ["High", "Medium", "Low"]
    names(lines[0], "160 prompts x 1 response x 2 seeds")
    more = detectable_lines(steps("evaluation.samples_per_prompt=12"), tmp_path, made)
    now, then = (float(least(line)) for line in (lines[2], more[2]))
    assert then < 0.6 * now
    names(lines[2], ("12 responses", f"{then:.2f}"))


def test_equal_answers_and_a_single_seed(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for name, shown in (("dpo", "DPO"), ("twin", "Twin")):
        study.evaluate(f"evaluation/low/{name}/seed0", shown, 1.0, 2.0, 0)
    study.write()
    lines = detectable_lines(steps(), tmp_path)
    assert " to " in lines[0], "one response a prompt gives a range"
    assert np.isfinite(float(least(lines[0])))
