"""What the paper says of IPO (Section 2.4) and of beta-DPO (Appendix B), checked on their losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from madpo.losses.adaptive import BetaDPO
from madpo.losses.base import LossInputs
from madpo.losses.direct import IPO
from madpo.losses.expected import Claim, checked, minimiser_of


def rivals() -> Iterator[Claim]:
    """The rows of both methods. The library relies on none of these sentences."""
    yield from _ipo()
    yield from _beta_dpo()


def _ipo(beta: float = 0.1) -> Iterator[Claim]:
    def loss(_: Tensor, u: Tensor) -> Tensor:
        zeros, ones = torch.zeros_like(u), torch.ones(u.shape, dtype=torch.long)
        return IPO(beta=beta)(LossInputs(u / beta, zeros, zeros, zeros, ones, ones)).per_pair

    h = np.linspace(0, 12, 241)
    found = minimiser_of(loss, h)
    closed = 1 / (1 + np.exp(-h)) - 0.5
    yield checked(
        "Section 2.4, IPO's target",
        "IPO sets the same target beta h_theta = 1/2 for every pair",
        "minimiser of the expected loss over a Bradley-Terry label by bisection, margins 0 to 12: it is "
        f"sigma(h) - 1/2 (deviation {np.abs(found - closed).max():.1e}), which is 0 at h = 0 and reaches 1/2 at "
        "infinity; 1/2 is the target of a pair whose label is never drawn the other way",
        float(np.abs(found - 0.5).max()),
        1e-6,
        relied_on=False,
    )
    hard = h[(h > 0) & (h < 0.5)]
    ratio = minimiser_of(loss, hard) / hard
    yield checked(
        "Section 2.4, IPO on hard pairs",
        "for h < 1/2 the target of IPO is above h, which amplifies the signal",
        f"the largest minimiser / h below 1/2 is {ratio.max():.4f}: sigma(h) - 1/2 <= h/4, so IPO never amplifies",
        float(1 - ratio.min()),
        0.0,
        relied_on=False,
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
    told = f"least beta over first batches of mean margin -400 to 50 nats, by version: {said}"
    yield checked(
        "Appendix B, beta-DPO as written",
        "beta_batch = beta (1 + m (mean h - h_0)) can become negative",
        told,
        max(0.0, lowest["madpo_text"]),
        0.0,
        relied_on=False,
    )
    yield checked(
        "Appendix B, beta-DPO as published",
        "beta-DPO's temperature can become negative",
        f"{told}; the official code takes at least 0.001",
        max(0.0, lowest["official"]),
        0.0,
        relied_on=False,
    )
