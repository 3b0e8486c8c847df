"""MADPO's weight in numpy, and what it does to a set of margins; for reports, which load no torch."""

import math
from typing import NamedTuple

import numpy as np


class WeightParameters(NamedTuple):
    """Parameters of ``madpo.margin_weight``; the defaults are the paper's setting. ``c_min`` None is 1/c_max."""

    tau: float = 7.0
    c_max: float = 2.0
    c_min: float | None = None
    lam: float = 1.0


class WeightCounts(NamedTuple):
    """What a weight does to a set of margins. ``effective``: (sum w)^2 / sum w^2."""

    amplified: int
    dampened: int
    turned_down: int
    unchanged: int
    mean: float
    effective: float


def log_weight(margins: np.ndarray, p: WeightParameters) -> np.ndarray:
    """``madpo.log_margin_weight`` for float64 without torch, for figures (Eq. 4; a test holds them equal)."""
    low = 1 / p.c_max if p.c_min is None else p.c_min
    h = np.asarray(margins, dtype=np.float64)
    log_share = -np.logaddexp(0, math.log(p.c_max - 1) - math.log1p(-low) + p.lam * (np.abs(h) - p.tau))
    target = low * h + (p.c_max - low) * np.clip(h, None, 1e30) * np.exp(log_share)
    log = np.minimum(np.logaddexp(0, -h) - np.logaddexp(0, -target), math.log(2))
    return np.where(h > -p.tau, log, 0.0)


def coefficient_at_zero(p: WeightParameters) -> float:
    """c(0), the coefficient of a pair without a margin: just below c_max where tau is many 1/lam."""
    low = 1 / p.c_max if p.c_min is None else p.c_min
    return low + (p.c_max - low) / (1 + (p.c_max - 1) / (1 - low) * math.exp(-p.lam * p.tau))


def count_weights(margins: np.ndarray, parameters: WeightParameters) -> WeightCounts:
    """How many margins the weight amplifies, dampens, turns down; mean weight and effective sample size."""
    log = log_weight(margins, parameters)
    weights = np.exp(log)
    squares = float((weights**2).sum())
    return WeightCounts(
        amplified=int((log > 0).sum()),
        dampened=int(((log < 0) & (margins > 0)).sum()),
        turned_down=int(((log < 0) & (margins <= 0)).sum()),
        unchanged=int((log == 0).sum()),
        mean=float(weights.mean()) if len(weights) else 0.0,
        effective=float(weights.sum()) ** 2 / squares if squares else 0.0,
    )
