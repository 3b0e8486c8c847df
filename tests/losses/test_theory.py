"""The numerical check of the paper's claims: it passes, fails where the paper's wording does, and could fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from madpo.losses import margin_weight, theory, theory_rivals
from madpo.losses.theory import (
    HEADLINE,
    SETTINGS,
    Claim,
    Setting,
    lipschitz_constant,
    minimiser,
    verify_theory,
    weight_maximum,
)
from repository import ROOT, TESTS


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return verify_theory(seed=0)


def test_what_the_library_relies_on_holds(claims: list[Claim]) -> None:
    assert [claim.name for claim in claims if claim.relied_on and not claim.holds] == []
    assert sum(claim.relied_on for claim in claims) == 13


def test_the_sentences_that_do_not_hold(claims: list[Claim]) -> None:
    assert {claim.name for claim in claims if not claim.holds} == {
        "Section 4.1, text after Proposition 4.2",
        "Proposition 4.1, proof",
        "Section 3.1, large positive margins",
        "Section 3.1, small margins",
        "Lemma 1, proof",
        "Theorem 4.6, gamma",
        "Section 2.4, IPO's target",
        "Section 2.4, IPO on hard pairs",
        "Appendix B, beta-DPO as published",
    }


def test_rows_are_complete(claims: list[Claim]) -> None:
    for claim in claims:
        assert claim.holds == (claim.deviation <= claim.tolerance)
        assert claim.statement
        assert claim.computed
        assert isinstance(claim.deviation, float)
    assert len({claim.name for claim in claims}) == len(claims)


def test_a_broken_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = theory.log_margin_weight

    def wrong(margin: torch.Tensor, **settings: float) -> torch.Tensor:
        return true(margin, **settings) + 1e-3  # type: ignore[arg-type]

    monkeypatch.setattr("madpo.losses.madpo.log_margin_weight", wrong)
    monkeypatch.setattr(theory, "log_margin_weight", wrong)
    monkeypatch.setattr(theory, "SETTINGS", SETTINGS[:1])
    # A constant factor on every weight cancels in the minimiser, and shifts the closed form.
    failed = {claim.name for claim in theory._targets() if claim.relied_on and not claim.holds}
    assert failed == {"Proposition 4.2, closed form"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_lipschitz_constant_against_a_plain_scan(setting: Setting) -> None:
    h = torch.linspace(-setting.tau, setting.tau + 20, 400_001, dtype=torch.float64)
    w = margin_weight(h, **setting._asdict())
    scanned = float(((w[1:] - w[:-1]).abs() / (h[1:] - h[:-1])).max())
    constant = lipschitz_constant(*setting)
    assert scanned <= constant * (1 + 1e-9)
    assert scanned == pytest.approx(constant, rel=2e-3)


def test_lipschitz_constant_at_the_headline_setting_is_the_slope_at_minus_tau() -> None:
    # k' = 1 - lam tau (c_max - 1)(1 - c_min)/(c_max - c_min) there, and w' = (k' - 1) sigma(tau).
    tau, c_max, c_min, lam = HEADLINE
    slope = lam * tau * (c_max - 1) * (1 - c_min) / (c_max - c_min) / (1 + math.exp(-tau))
    assert lipschitz_constant(*HEADLINE) == pytest.approx(slope, rel=1e-9)


def test_weight_maximum_is_sharp_and_below_two() -> None:
    assert weight_maximum(*HEADLINE) == pytest.approx(1.4185, abs=5e-5)
    assert weight_maximum(50, 1e6, 0.5) == pytest.approx(2, abs=1e-4)
    assert weight_maximum(50, 1e6, 0.5) < 2


def test_minimiser_at_known_points() -> None:
    found = minimiser(HEADLINE, np.array([-7.0, -1.0, 0.0, 1.0, 7.0, 8.0]))
    assert found.tolist() == pytest.approx([-7, -3.963184, 0, 3.963184, 7, 7.989577], abs=1e-6)


def test_theory_imports_only_the_losses() -> None:
    import ast
    from pathlib import Path

    tree = ast.parse(Path(theory.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module for module in modules if module.startswith("madpo")}
    assert all(module == "madpo.core.seeding" or module.startswith("madpo.losses") for module in ours)


def test_the_method_page_names_tests_and_functions_that_exist() -> None:
    import re

    page = (ROOT / "docs" / "method.md").read_text()
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 15
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []
    assert [name for name in re.findall(r"`theory\.(\w+)`", page) if not hasattr(theory, name)] == []
    kinds = set(re.findall(r"^\| `(\w+)` \| (?!h \||beta h|from)", page, re.MULTILINE))
    from madpo.losses import LossAdapter

    members = LossAdapter.json_schema()["discriminator"]["mapping"]
    assert set(members) <= kinds


def test_ipo_never_amplifies() -> None:
    # Minimiser of sigma(h) (u - 1/2)^2 + sigma(-h) (u + 1/2)^2: half of tanh(h/2).
    found = {claim.name: claim for claim in theory_rivals.rivals()}
    assert found["Section 2.4, IPO's target"].deviation == pytest.approx(0.5, abs=1e-9)  # at h = 0
    hard = found["Section 2.4, IPO on hard pairs"]
    assert hard.deviation == pytest.approx(1 - (1 / (1 + math.exp(-0.45)) - 0.5) / 0.45, abs=1e-9)
    assert "0.2499" in hard.computed or "0.2500" in hard.computed


def test_beta_dpo_is_negative_as_written_and_not_as_published() -> None:
    found = {claim.name: claim for claim in theory_rivals.rivals()}
    written, published = found["Appendix B, beta-DPO as written"], found["Appendix B, beta-DPO as published"]
    assert written.holds
    assert "-23.9 (madpo_text)" in written.computed  # 0.1 (1 - 0.6 * 400)
    assert not published.holds
    assert published.deviation == 1e-3
