"""A claim that is checked numerically, and where a loss is least in expectation over a Bradley-Terry label."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Claim(NamedTuple):
    """One row of the check.

    Attributes:
        name: where the paper makes the claim.
        statement: the claim, in one sentence.
        computed: what was computed, with its numbers.
        deviation: the largest deviation from the claim.
        tolerance: the deviation up to which it counts as holding.
        holds: deviation at most tolerance.
        relied_on: the library builds on it; a failure is an error.
    """

    name: str
    statement: str
    computed: str
    deviation: float
    tolerance: float
    holds: bool
    relied_on: bool


def checked(
    name: str, statement: str, computed: str, deviation: float, tolerance: float, relied_on: bool = True
) -> Claim:
    """The row of a claim; it holds where the deviation is at most the tolerance."""
    holds = bool(deviation <= tolerance)
    return Claim(name, statement, computed, float(deviation), tolerance, holds, relied_on)


def minimiser_of(loss: Callable[[Tensor, Tensor], Tensor], margins: np.ndarray) -> np.ndarray:
    """u* = beta h_theta where E(u) = sigma(h) L(h, u) + sigma(-h) L(-h, -u) is least, per margin; |u*| below 200.

    By bisection on the slope, so the expectation must be convex in u.

    Args:
        loss: L(h, u) per pair, for tensors of margins (log-odds) and of u.
        margins: h of the first response less that of the second, log-odds.
    """
    h = torch.as_tensor(margins, dtype=torch.float64)
    low, high = torch.full_like(h, -200.0), torch.full_like(h, 200.0)
    for _ in range(60):  # 400 / 2^60: the precision of float64
        u = ((low + high) / 2).requires_grad_()
        expected = torch.sigmoid(h) * loss(h, u) + torch.sigmoid(-h) * loss(-h, -u)
        (slope,) = torch.autograd.grad(expected.sum(), u)
        with torch.no_grad():
            low, high = torch.where(slope < 0, u, low), torch.where(slope < 0, high, u)
    result: np.ndarray = ((low + high) / 2).detach().numpy()
    return result
