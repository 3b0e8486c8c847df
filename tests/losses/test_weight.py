"""The weight of MADPO: golden tables, its properties for every float, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from madpo.core.errors import ConfigError, DataError
from madpo.losses import log_margin_weight, margin_coefficient, margin_weight
from refusals import refused

SETTINGS = [(4, 0.25, 7), (2, 0.5, 7), (2, 0.5, 2), (2, 0, 2)]
# margin, then c and w of each setting
GOLDEN = """
0      3.986371 1.000000 1.997269 1.000000 1.680479 1.000000 1.761594 1.000000
0.5    3.977583 1.413129 1.995503 1.173757 1.537158 1.097603 1.635149 1.114484
1      3.963184 1.342371 1.992600 1.203759 1.364175 1.089430 1.462117 1.110522
2      3.901583 1.134872 1.980055 1.114099 1.000000 1.000000 1.000000 1.000000
3      3.744019 1.049773 1.946995 1.046745 0.733044 0.944988 0.537883 0.875436
5      2.682946 1.006736 1.680479 1.006512 0.536433 0.942273 0.094852 0.620544
6      1.767286 1.002454 1.364175 1.002199 0.513612 0.958500 0.035972 0.555123
7      1.000000 1.000000 1.000000 1.000000 0.505036 0.972560 0.013386 0.523885
9      0.372725 0.966372 0.595068 0.995423 0.500684 0.989202 0.001822 0.504162
12     0.256306 0.955884 0.505036 0.997678 0.500034 0.997535 0.000091 0.500275
-0.5   3.977583 0.318866 1.995503 0.713522 1.537158 0.839079 1.635149 0.811247
-1     3.963184 0.069339 1.992600 0.446127 1.364175 0.756903 1.462117 0.699571
-2     3.901583 0.003425 1.980055 0.156913 1.000000 1.000000 1.000000 1.000000
-3     3.744019 0.000279 1.946995 0.061097 0.733044 1.000000 0.537883 1.000000
-5     2.682946 0.000223 1.680479 0.033510 0.536433 1.000000 0.094852 1.000000
-6.99  1.006018 0.958843 1.003339 0.976952 0.505087 1.000000 0.013519 1.000000
-7     1.000000 1.000000 1.000000 1.000000 0.505036 1.000000 0.013386 1.000000
-50    0.250000 1.000000 0.500000 1.000000 0.500000 1.000000 0.000000 1.000000
"""
# margin, then the minimiser beta h* of the expected loss for each setting
TARGETS = """
0.5   1.988792  0.997752  0.768579  0.817574
1     3.963184  1.992600  1.364175  1.462117
2     7.803167  3.960110  2.000000  2.000000
3    11.232058  5.840984  2.943417  2.866966
4    13.508878  7.456658  3.929658  3.692203
5    13.414731  8.402395  4.940539  4.522842
6    10.603718  8.185052  5.957615  5.411434
7     7.000000  7.000000  6.972177  6.353517
8     7.989577  7.997501  7.982451  7.326774
10    9.949574  9.995376  9.993347  9.310246
14   13.970599 13.999098 13.999089 13.306940
"""
HEADLINE = {"tau": 7.0, "c_max": 4.0}


def table(text: str) -> list[list[float]]:
    return [[float(cell) for cell in line.split()] for line in text.strip().splitlines()]


@pytest.mark.parametrize("row", table(GOLDEN), ids=lambda row: str(row[0]))
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_golden_coefficient_and_weight(row: list[float], kind: torch.dtype) -> None:
    h = torch.tensor([row[0]], dtype=kind)
    near = {"abs": 5.1e-7} if kind == torch.float64 else {"abs": 2e-6}
    for (c_max, c_min, tau), c, w in zip(SETTINGS, row[1::2], row[2::2], strict=True):
        assert margin_coefficient(h, tau=tau, c_max=c_max, c_min=c_min).item() == pytest.approx(c, **near)
        assert margin_weight(h, tau=tau, c_max=c_max, c_min=c_min).item() == pytest.approx(w, **near)


@pytest.mark.parametrize("row", table(TARGETS), ids=lambda row: str(row[0]))
def test_golden_target_by_direct_minimisation(row: list[float]) -> None:
    h = row[0]
    for (c_max, c_min, tau), target in zip(SETTINGS, row[1:], strict=True):
        weight = margin_weight(torch.tensor([h, -h], dtype=torch.float64), tau=tau, c_max=c_max, c_min=c_min)
        agree = weight[0].item() / (1 + math.exp(-h))
        differ = weight[1].item() / (1 + math.exp(h))
        # The expected loss is convex in u: halve the interval in which its slope changes sign.
        low, high = -60.0, 60.0
        for _ in range(80):
            u = (low + high) / 2
            slope = -agree / (1 + math.exp(u)) + differ / (1 + math.exp(-u))
            low, high = (u, high) if slope < 0 else (low, u)
        assert u == pytest.approx(target, abs=5.1e-7)


@pytest.mark.parametrize(("c_max", "peak", "at"), [(4, 13.830, 4.478), (2, 8.473, 5.331)])
def test_the_target_is_not_monotone(c_max: float, peak: float, at: float) -> None:
    # A pair with a true margin of 5 is pushed further apart than one with a margin of 7.
    h = torch.linspace(0, 7, 7001, dtype=torch.float64)
    target = margin_coefficient(h, tau=7, c_max=c_max) * h
    assert float(target.max()) == pytest.approx(peak, abs=5.1e-4)
    assert float(h[target.argmax()]) == pytest.approx(at, abs=1.1e-3)
    assert float(target[-1]) == pytest.approx(7)


# Properties.

margins64 = st.floats(allow_nan=False, allow_infinity=False)
parameters = st.fixed_dictionaries(
    {
        "tau": st.floats(1e-6, 1e6),
        "c_max": st.floats(1, 1e6, exclude_min=True),
        "c_min": st.one_of(st.none(), st.floats(0, 0.9999)),
        "lam": st.floats(1e-6, 1e6),
    }
)
ordinary = st.fixed_dictionaries(
    {
        "tau": st.floats(0.1, 20),
        "c_max": st.floats(1.01, 10),
        "c_min": st.one_of(st.none(), st.floats(0, 0.99)),
        "lam": st.floats(0.1, 10),
    }
)


@given(
    h=margins64,
    parameters=parameters,
    kind=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    part=st.sampled_from(["full", "amplify", "dampen"]),
)
@example(h=-89.0, parameters=HEADLINE, kind=torch.float32, part="full")
@example(h=-1.7e308, parameters=HEADLINE, kind=torch.float64, part="full")
@example(h=1.7e308, parameters=HEADLINE, kind=torch.float64, part="full")
@example(h=5e-324, parameters=HEADLINE, kind=torch.float64, part="full")
@example(h=3e38, parameters={"tau": 1.0, "c_max": 3.0, "c_min": 0.0}, kind=torch.float32, part="full")
@example(h=1e-3, parameters={"tau": 100.0, "c_max": 100.0, "lam": 1.0}, kind=torch.float32, part="full")
def test_finite_between_0_and_2_for_every_float(
    h: float, parameters: dict[str, float | None], kind: torch.dtype, part: str
) -> None:
    limit = torch.finfo(kind).max
    margin = torch.tensor([max(-limit, min(limit, h))], dtype=torch.float64).to(kind)
    assert torch.isfinite(log_margin_weight(margin, part=part, **parameters)).all()  # type: ignore[arg-type]
    # A slope of (c_max - 1)/2 can leave the range of float16: the gradient is looked at as float32.
    margin = (margin if kind == torch.float64 else margin.float()).requires_grad_()
    log_weight = log_margin_weight(margin, part=part, **parameters)  # type: ignore[arg-type]
    weight = margin_weight(margin, part=part, **parameters)  # type: ignore[arg-type]
    assert torch.isfinite(log_weight).all()
    assert log_weight.item() < math.log(2)
    assert 0 <= weight.item() <= 2
    for value in (log_weight, weight):
        (gradient,) = torch.autograd.grad(value.sum(), margin, retain_graph=True)
        assert torch.isfinite(gradient).all()


@given(share=st.floats(-0.999, 0.999), parameters=ordinary)
def test_under_a_calibrated_margin_the_mean_weight_is_one(share: float, parameters: dict[str, float | None]) -> None:
    assert parameters["tau"] is not None
    m = torch.tensor([share, -share], dtype=torch.float64) * parameters["tau"]
    weight = margin_weight(m, **parameters)  # type: ignore[arg-type]
    assert float((torch.sigmoid(m) * weight).sum()) == pytest.approx(1, abs=1e-12)


@given(parameters=ordinary, beyond=st.floats(1, 50))
def test_fixed_points_and_the_range_of_the_coefficient(parameters: dict[str, float | None], beyond: float) -> None:
    tau = parameters["tau"]
    assert tau is not None
    h = torch.tensor([0, tau, -tau, -tau * beyond, -tau * (1 + 1e-9)], dtype=torch.float64)
    weight = margin_weight(h, **parameters)  # type: ignore[arg-type]
    assert weight.tolist() == pytest.approx([1] * 5, abs=1e-12)
    assert weight[2:].tolist() == [1, 1, 1]
    grid = torch.linspace(-3 * tau, 3 * tau, 101, dtype=torch.float64)
    c = margin_coefficient(grid, **parameters)  # type: ignore[arg-type]
    c_max = parameters["c_max"]
    assert c_max is not None
    c_min = 1 / c_max if parameters.get("c_min") is None else parameters["c_min"]
    assert c_min is not None
    assert (c >= c_min * (1 - 1e-14)).all()
    assert (c <= c_max * (1 + 1e-14)).all()  # up to rounding
    inside, outside = grid.abs() < tau * (1 - 1e-9), grid.abs() > tau * (1 + 1e-9)
    assert (c[inside] >= 1 - 1e-14).all()
    assert (c[outside] <= 1 + 1e-14).all()


@given(parameters=ordinary)
def test_continuous_at_minus_tau(parameters: dict[str, float | None]) -> None:
    tau = parameters["tau"]
    assert tau is not None
    step = 1e-9
    above = margin_weight(torch.tensor([-tau + step], dtype=torch.float64), **parameters)  # type: ignore[arg-type]
    # |w'| is below c_max (1 + lam tau): the change over 1e-9 is of that size, not a jump.
    assert abs(float(above) - 1) < step * 2 * 10 * (1 + 10 * tau)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_every_half_precision_number(kind: torch.dtype) -> None:
    bits = torch.from_numpy(np.arange(-(2**15), 2**15, dtype=np.int16)).view(kind)
    h = bits[torch.isfinite(bits)].clone().requires_grad_()
    for c_max, c_min, tau in SETTINGS:
        log_weight = log_margin_weight(h, tau=tau, c_max=c_max, c_min=c_min)
        assert torch.isfinite(log_weight).all()
        assert (log_weight < math.log(2)).all()
        assert (log_weight[h.detach() < 0] <= 0).all()
        (gradient,) = torch.autograd.grad(log_weight.sum(), h)
        assert torch.isfinite(gradient).all()


def test_the_weight_is_what_the_formula_says_where_the_formula_can_be_evaluated() -> None:
    h = torch.linspace(-6.999, 30, 999, dtype=torch.float64)
    c = 0.25 + 3.75 / (1 + 3 / 0.75 * torch.exp(h.abs() - 7))
    naive = (1 / (1 + torch.exp(-c * h))) / (1 / (1 + torch.exp(-h)))
    assert torch.allclose(margin_weight(h, **HEADLINE), naive, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("c_max", "c_min", "tau", "top", "at", "low", "low_at", "beyond"),
    [
        (4, 0.25, 7, 1.4185, 0.58, 7.4e-5, -4.13, 0.9488),
        (3, 1 / 3, 7, 1.3318, 0.69, 1.3e-3, -4.28, 0.9774),
        (2, 0.5, 7, 1.2061, 0.88, 0.0291, -4.48, 0.9952),
        (2, 0.5, 4, 1.1875, 0.85, 0.2708, -2.29, 0.9750),
        (2, 0.5, 2, 1.1029, 0.67, 0.7546, -1.09, 0.9320),
        (2, 0, 2, 1.1229, 0.71, 0.6919, -1.16, 0.5),
    ],
)
def test_extremes_of_the_weight(
    c_max: float, c_min: float, tau: float, top: float, at: float, low: float, low_at: float, beyond: float
) -> None:
    h = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
    w = margin_weight(h, tau=tau, c_max=c_max, c_min=c_min)
    assert float(w.max()) == pytest.approx(top, abs=5.1e-5)
    assert float(h[w.argmax()]) == pytest.approx(at, abs=5.1e-3)
    negative = (h < 0) & (h > -tau)
    assert float(w[negative].min()) == pytest.approx(low, rel=0.02)
    assert float(h[negative][w[negative].argmin()]) == pytest.approx(low_at, abs=6e-3)
    assert float(w[h > tau].min()) == pytest.approx(beyond, abs=5.1e-5)


def test_parts_take_one_side_of_tau_each() -> None:
    h = torch.linspace(-20, 20, 401, dtype=torch.float64)
    full, amplify, dampen = (
        margin_weight(h, part=part, **HEADLINE)  # type: ignore[arg-type]
        for part in ("full", "amplify", "dampen")
    )
    inside = h.abs() < 7
    assert torch.equal(amplify, torch.where(inside, full, torch.ones_like(h)))
    assert torch.equal(dampen, torch.where(inside, torch.ones_like(h), full))


def test_shapes_types_and_integers() -> None:
    assert margin_weight(torch.zeros(2, 3, dtype=torch.bfloat16), **HEADLINE).dtype == torch.float32
    assert margin_weight(torch.zeros(2, 3, dtype=torch.float64), **HEADLINE).shape == (2, 3)
    assert margin_weight(torch.zeros(0), **HEADLINE).shape == (0,)
    whole = margin_weight(torch.tensor([-1, 0, 3]), **HEADLINE)
    assert torch.equal(whole, margin_weight(torch.tensor([-1.0, 0.0, 3.0]), **HEADLINE))


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("tau", 0, "0"),
        ("tau", math.inf, "0"),
        ("c_max", 1, "1"),
        ("c_max", math.nan, "1"),
        ("c_min", 1, "[0, 1)"),
        ("c_min", -0.1, "[0, 1)"),
        ("lam", 0, "0"),
        ("part", "both", "'full', 'amplify', 'dampen'"),
    ],
)
def test_bad_parameters(name: str, value: object, bound: str) -> None:
    with refused(ConfigError, (f"{name} is {value!r}", bound)):
        margin_weight(torch.zeros(1), **{**HEADLINE, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_margins_are_named_by_row(bad: float) -> None:
    with refused(DataError, ("reward_margin", "row 2", bad)):
        margin_weight(torch.tensor([0.0, 1.0, bad, bad]), **HEADLINE)
    with refused(DataError, ("row 0", bad)):
        margin_coefficient(torch.tensor([bad]), **HEADLINE)
