"""Claims that are checked numerically, and the paper's claims on IPO (Section 2.4) and beta-DPO (Appendix B)."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from madpo.losses.adaptive import BetaDPO
from madpo.losses.base import LossInputs
from madpo.losses.direct import IPO


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


_CLAIMS = tomllib.loads((files("madpo.losses") / "theory.toml").read_text(encoding="utf-8"))


def checked(name: str, computed: str, deviation: float) -> Claim:
    """The row of a claim in ``theory.toml``; it holds where the deviation is at most the tolerance."""
    claim, found = _CLAIMS[name], float(deviation)
    tolerance, relied_on = float(claim["tolerance"]), claim.get("relied_on", True)
    return Claim(name, claim["statement"], computed, found, tolerance, found <= tolerance, relied_on)


def minimiser_of(loss: Callable[[Tensor, Tensor], Tensor], margins: np.ndarray) -> np.ndarray:
    """u* = beta h_theta where E(u) = sigma(h) L(h, u) + sigma(-h) L(-h, -u) is least, per margin; |u*| below 200.

    By bisection on the slope, so the expectation must be convex in u.

    Args:
        loss: L(h, u) per pair, for tensors of margins (log-odds) and of u.
        margins: h of the first response minus that of the second, log-odds.
    """
    h = torch.as_tensor(margins, dtype=torch.float64)
    sides = torch.cat([h, -h])  # each pair with its label either way
    low, high = torch.full_like(h, -200.0), torch.full_like(h, 200.0)
    for _ in range(60):  # 400 / 2^60: the precision of float64
        u = ((low + high) / 2).requires_grad_()
        expected = torch.sigmoid(sides) * loss(sides, torch.cat([u, -u]))
        (slope,) = torch.autograd.grad(expected.sum(), u)
        with torch.no_grad():
            low, high = torch.where(slope < 0, u, low), torch.where(slope < 0, high, u)
    result: np.ndarray = ((low + high) / 2).detach().numpy()
    return result


def inputs_of(h_theta: Tensor, margin: Tensor | None = None) -> LossInputs:
    """Pairs with this log-ratio margin, all of it in the chosen log-prob, and this reward margin."""
    zeros, ones = torch.zeros_like(h_theta), torch.ones(h_theta.shape, dtype=torch.long)
    return LossInputs(h_theta, zeros, zeros, zeros, ones, ones, reward_margin=margin)


def rivals() -> Iterator[Claim]:
    """The rows of both methods. The library relies on none of these sentences."""
    yield from _ipo()
    yield from _beta_dpo()


def _ipo() -> Iterator[Claim]:
    def loss(_: Tensor, u: Tensor) -> Tensor:
        return IPO(beta=0.1)(inputs_of(u / 0.1)).per_pair

    h = np.linspace(0, 12, 241)
    found = minimiser_of(loss, h)
    closed = 1 / (1 + np.exp(-h)) - 0.5
    yield checked(
        "Section 2.4, IPO's target",
        "minimiser of the expected loss over a Bradley-Terry label by bisection, margins 0 to 12: it is "
        f"sigma(h) - 1/2 (deviation {np.abs(found - closed).max():.1e}), which is 0 at h = 0 and reaches 1/2 at "
        "infinity; 1/2 is the target of a pair whose label is never drawn the other way",
        float(np.abs(found - 0.5).max()),
    )
    hard = (h > 0) & (h < 0.5)
    ratio = found[hard] / h[hard]
    yield checked(
        "Section 2.4, IPO on hard pairs",
        f"the largest minimiser / h below 1/2 is {ratio.max():.4f}: sigma(h) - 1/2 <= h/4, so IPO never amplifies",
        float(1 - ratio.min()),
    )


def _beta_dpo() -> Iterator[Claim]:
    means = np.linspace(-400, 50, 451)

    def least(form: str) -> float:
        version = BetaDPO.preset(form, filter=False)
        batches = [torch.tensor([mean - 1, mean + 1], dtype=torch.float64) for mean in means]
        state = version.init_state(0)
        return min(float(version.observe(batch, state).batch["beta"]) for batch in batches)

    lowest = {form: least(form) for form in ("madpo_text", "madpo_notebook", "official")}
    said = ", ".join(f"{value:.3g} ({form})" for form, value in lowest.items())
    computed = f"least beta over first batches of mean margin -400 to 50 nats, by version: {said}"
    yield checked("Appendix B, beta-DPO as written", computed, max(0.0, lowest["madpo_text"]))
    yield checked(
        "Appendix B, beta-DPO as published",
        f"{computed}; the official code takes at least 0.001",
        max(0.0, lowest["official"]),
    )
