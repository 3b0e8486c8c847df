"""How much a label should count against a reward margin, decided by held-out labels.

Two teachers explain the held-out labels: the implicit margins of a policy that was trained on labels only, and the
margins of a reward model. The better one of them should have the larger share of the target that the next policy
learns (``label_share`` of :class:`madpo.losses.SoftDPO`). No torch.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from madpo.core.config import Frozen
from madpo.core.errors import DataError
from madpo.core.metrics import Estimate
from madpo.core.statistics import LOG_TEMPERATURES, bootstrap_mean, design_effect, fit_temperature

GRID = 101
AS_GOOD = 0.8
"""Where the label's share is above this with 97.5 % probability, plain DPO is as good."""
_BETTER_THAN_COIN = 2.71
"""5 % point, one-sided, of twice the log-likelihood that one fitted temperature gains on margins without a signal."""

Floats = NDArray[np.float64]


class LabelShare(Frozen):
    """What held-out labels say about margins and plain DPO."""

    mean: float
    """Posterior mean of the label's share: 1 is hard labels only, 0 is the margins only."""
    low: float
    high: float
    """The central 95 % of the posterior."""
    pairs: int
    margin_loss: float
    """Log loss of the reward margins on unseen labels after one temperature, nats per pair; a coin's is 0.693."""
    implicit_loss: float
    """The same of plain DPO's implicit margins."""
    difference: Estimate
    """The deciding number: ``margin_loss`` minus ``implicit_loss``, nats, with its interval over prompts. Below 0 the
    margins know more about the labels than plain DPO has learned."""

    def text(self) -> str:
        """The deciding number and the share, a line each."""
        d = self.difference
        return (
            f"log loss on unseen labels: margins {self.margin_loss:.3f}, plain DPO {self.implicit_loss:.3f}; "
            f"difference {d.mean:+.3f} (95 % interval {d.low:+.3f} to {d.high:+.3f} over {d.n} prompts; below 0 the "
            f"margins know more)\nlabel share {self.mean:.2f} (95 % {self.low:.2f} to {self.high:.2f})"
        )


def label_share(
    implicit: ArrayLike, margins: ArrayLike, *, prompts: ArrayLike | None = None, seed: int = 0
) -> LabelShare:
    """The label's share of the target, from held-out pairs that neither teacher was trained on.

    Args:
        implicit: plain DPO's implicit margins of the pairs, in any unit.
        margins: the reward margins of the same pairs, in any unit.
        prompts: one label per pair; pairs of one prompt are resampled together for the interval of the difference,
            and the posterior's log-likelihood is divided by the design effect of that difference. None: each pair has
            a prompt of its own.
        seed: of the resampling.

    Raises:
        DataError: no pairs, different numbers of them, or a margin that is not finite.
    """
    m0, m1 = np.asarray(implicit, dtype=np.float64).ravel(), np.asarray(margins, dtype=np.float64).ravel()
    if len(m0) != len(m1):
        raise DataError(f"there are {len(m0)} implicit margins but {len(m1)} reward margins; give one for each pair")
    # A temperature is looked for near 1.
    m0, m1 = (m / (float(np.sqrt(np.mean(np.square(m)))) or 1.0) if m.size else m for m in (m0, m1))
    losses = [np.logaddexp(0.0, -m / fit_temperature(m)[0]) for m in (m0, m1)]
    difference = losses[1] - losses[0]
    shares, density = posterior(m0, m1, design_effect(difference, prompts))
    # Between grid points the density is linear; its integral over each interval, summed.
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    low, high = np.interp([0.025, 0.975], mass / mass[-1], shares)
    return LabelShare(
        mean=float(np.trapezoid(shares * density, shares)),
        low=float(low),
        high=float(high),
        pairs=len(m0),
        margin_loss=float(losses[1].mean()),
        implicit_loss=float(losses[0].mean()),
        difference=bootstrap_mean(difference, seed=seed, clusters=prompts),
    )


class Decision(NamedTuple):
    """What ``auto`` does with the margins.

    Attributes:
        found: what the held-out labels say.
        share: the label's share of the second training's target.
        why: "margins": they add to the labels. "coin": they explain labels no better than a coin, and the share is 1.
            "ordered": none of the data's margins is negative, and the share is 1. "labels": the share is above
            :data:`AS_GOOD` with 97.5 % probability. Plain DPO is as good in the last three.
    """

    found: LabelShare
    share: float
    why: Literal["margins", "coin", "ordered", "labels"]


def decide(
    implicit: ArrayLike,
    margins: ArrayLike,
    every: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    every_prompts: ArrayLike | None = None,
    given: bool = False,
    seed: int = 0,
) -> Decision:
    """The label's share that ``auto`` takes, and why.

    Args:
        implicit, margins, prompts, seed: as for :func:`label_share`.
        every: margins of all pairs, those that decide among them, each from a reward model that has not seen it.
        every_prompts: of these pairs, as ``prompts``.
        given: the margins are the data's own, which may have ordered the pairs: see :func:`ordered`.
    """
    found = label_share(implicit, margins, prompts=prompts, seed=seed)
    if not better_than_coin(every, every_prompts):
        return Decision(found, 1.0, "coin")
    if given and ordered(every):
        return Decision(found, 1.0, "ordered")
    return Decision(found, found.mean, "labels" if found.low > AS_GOOD else "margins")


def posterior(implicit: Floats, margins: Floats, effect: float = 1.0) -> tuple[Floats, Floats]:
    """Posterior density of the label's share a over a grid of [0, 1], under a flat prior: (shares, densities).

    The likelihood of the labels is the product of sigma(t (a m0 + (1 - a) m1)) with t profiled out. m0 and m1 are the
    two margins, each divided by its fitted temperature, or by its root mean square where that is smaller. The second
    rule is for margins without a signal: their temperature has no end, and divided by it they would not disturb the
    other margins at any share.

    Args:
        effect: how many pairs say as much as one, by which the log-likelihood is divided.
    """
    shares = np.linspace(0.0, 1.0, GRID)
    m0, m1 = _scaled(implicit), _scaled(margins)
    mixed = shares[:, None] * m0 + (1 - shares)[:, None] * m1
    low, high = (np.full(GRID, bound) for bound in LOG_TEMPERATURES)
    for _ in range(40):  # the loss is convex in t: halve the interval of log t by the sign of its slope
        middle = (low + high) / 2
        falls = (mixed * np.exp(-np.logaddexp(0.0, np.exp(middle)[:, None] * mixed))).sum(1) > 0
        low, high = np.where(falls, middle, low), np.where(falls, high, middle)
    log_likelihood = -np.logaddexp(0.0, -np.exp(low)[:, None] * mixed).sum(1) / effect
    density = np.exp(log_likelihood - log_likelihood.max())
    return shares, density / np.trapezoid(density, shares)


def ordered(margins: ArrayLike) -> bool:
    """Whether no margin is negative, as where a reward model ordered the pairs that it scored, or where margins are
    strengths of preference. The labels then say nothing of the margins: every temperature down to 0 fits them better.
    """
    return bool((np.asarray(margins, dtype=np.float64) >= 0).all())


def better_than_coin(margins: ArrayLike, prompts: ArrayLike | None = None) -> bool:
    """Whether margins explain labels that their reward model has not seen clearly better than a coin (5 % level).

    A likelihood ratio test of one temperature. Prompts are its units: the ratio is divided by the design effect of the
    margins, whose mean is 0 where they have no signal (the score of the test; Rotnitzky and Jewell 1990).

    Args:
        prompts: one label per pair; None: each pair has a prompt of its own.
    """
    h = np.asarray(margins, dtype=np.float64).ravel()
    ratio = 2 * len(h) * (math.log(2) - fit_temperature(h)[2])
    return bool(ratio / design_effect(h, prompts, mean=0.0) > _BETTER_THAN_COIN)


def _scaled(margins: Floats) -> Floats:
    size = float(np.sqrt(np.mean(np.square(margins))))
    return margins / min(fit_temperature(margins)[0], size) if size > 0 else margins
