"""A probe: ridge-penalised logistic regression on features of a model that need no training of it.

The features of a response are states of the reference model, averaged over its tokens
(:mod:`madpo.models.engine.features`). With w for weights, r(x) = w . x is a Bradley-Terry reward:
P(chosen over rejected) = sigma(w . (x_chosen - x_rejected)). The weights minimise

    sum over pairs of -log sigma(w . d) + penalty / 2 |w|^2,    d = (x_chosen - x_rejected) / scale,

without an intercept, so that swapping the sides of a pair only changes a sign. ``scale`` is the root mean square of the
training pairs' differences, feature by feature, times the root of the number of features: a pair then has |d| of about
1, and penalties mean the same for every model.

There are thousands of features and often only hundreds of pairs. The best weights are a combination of the training
differences, so the problem is solved in their span, in as many dimensions as there are pairs. Of more than ``SPAN``
pairs, ``SPAN`` drawn by seed give the span. Rows are read in blocks: features may be a file mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from madpo.core.errors import DataError
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, fit_temperature, proportion
from madpo.data.folds import folds_by_prompt
from madpo.rewards.margins import Reliability, reliability

Floats = NDArray[np.float64]

PENALTIES: Floats = np.logspace(-3, 5, 17)
"""From nearly none to one that leaves every margin near 0; the prior variance of a margin is about 1 / penalty."""
FOLDS = 5
SPAN = 1024
"""Training pairs whose differences span the weights; up to so many pairs the solution is exact."""
_BLOCK = 2048
"""Rows that are read at once."""
_NOISE = 1e-5
"""A feature whose differences are smaller than this share of its values holds rounding errors only."""


@dataclass(frozen=True)
class ProbeWeights:
    """The reward function: r(x) = weights . (x - centre), log-odds.

    Attributes:
        weights: in units of the features, ``features``.
        centre: mean features of the training responses; it cancels in differences.
        penalty: of the fit.
    """

    weights: Floats
    centre: Floats
    penalty: float

    def rewards(self, features: Any) -> Floats:
        """One reward per row of ``features``, ``responses x features``."""
        return np.asarray(features, dtype=np.float64) @ self.weights - float(self.centre @ self.weights)


class OutOfFold(NamedTuple):
    """What regressions say of pairs that they have not seen, nor their prompts.

    Attributes:
        margins: reward of the chosen less that of the rejected, log-odds, one per pair.
        chosen, rejected: the rewards.
        penalties: of each fold.
        losses: mean held-out log loss, nats, ``folds x penalties``.
        counts: pairs of each fold.
    """

    margins: Floats
    chosen: Floats
    rejected: Floats
    penalties: Floats
    losses: Floats
    counts: NDArray[np.int64]


class ProbeReport(Report):
    """How good a probe is on pairs of prompts that it has not seen."""

    pairs: int
    prompts: int
    features: int
    folds: int
    penalty: float
    """Of the frozen probe."""
    fold_penalties: tuple[float, ...]
    accuracy: Estimate
    """Share of pairs with an out-of-fold margin above 0, with its Wilson interval."""
    log_loss: Estimate
    """Of the out-of-fold margins, nats per pair, with its interval over prompts; a coin's is 0.693."""
    temperature: float
    """What would calibrate the margins further; 1 means that they are log-odds."""
    calibrated_log_loss: float
    reliability: tuple[Reliability, ...]
    """Up to 10 bins of equally many pairs by |margin|."""

    def text(self) -> str:
        """The report for a person."""
        a, loss = self.accuracy, self.log_loss
        lines = [
            f"probe on {self.features:,} features, {self.pairs} pairs of {self.prompts} prompts in {self.folds} folds; "
            f"penalty {self.penalty:.3g}",
            f"out of fold: accuracy {a.mean:.1%} (95 % interval {a.low:.1%} to {a.high:.1%}), log loss "
            f"{loss.mean:.3f} ({loss.low:.3f} to {loss.high:.3f}), {self.calibrated_log_loss:.3f} at temperature "
            f"{self.temperature:.3g} (a coin: 0.693)",
        ]
        if self.penalty == PENALTIES[-1]:
            lines.append("the strongest penalty won: these features say nothing about the labels")
        return "\n".join(lines)


@dataclass(frozen=True)
class FittedProbe:
    """A probe of some pairs: their out-of-fold margins, the frozen reward function of all of them, and a report."""

    out_of_fold: OutOfFold
    weights: ProbeWeights
    report: ProbeReport

    @property
    def margins(self) -> Floats:
        """Out-of-fold margins, log-odds, one per pair."""
        return self.out_of_fold.margins


def fit_probe(
    chosen: Any, rejected: Any, prompts: Sequence[str], *, folds: int = FOLDS, seed: int = 0, name: str = "the data"
) -> FittedProbe:
    """Fit a probe, and margins of its own pairs out of fold.

    Args:
        chosen, rejected: features of both sides, ``pairs x features``: arrays, or anything that gives rows as one.
        prompts: one per pair; pairs of one prompt share a fold.
        folds: at most; as many as there are prompts where these are fewer.
        seed: of the folds, and of the draw of ``SPAN`` pairs.
        name: of the data, for messages.

    Raises:
        DataError: fewer than two prompts, or a feature that is not finite.
    """
    keys = list(prompts)
    if (distinct := len(set(keys))) < 2:
        raise DataError(
            f"{name}: all pairs have one prompt, so no margin is out of fold; give the column reward_margin"
        )
    folds = min(folds, distinct)
    fold = np.array(folds_by_prompt(keys, folds, seed, name))
    data = _Pairs(chosen, rejected, fold, name)
    found = _out_of_fold(data, seed)
    best = int((found.counts @ found.losses).argmin())
    path = data.path(None, seed)
    weights = ProbeWeights(np.ascontiguousarray(path[:, best]), data.centre(), float(PENALTIES[best]))
    margins = found.margins
    temperature, _, calibrated = fit_temperature(margins)
    report = ProbeReport(
        pairs=len(keys),
        prompts=distinct,
        features=len(path),
        folds=folds,
        penalty=weights.penalty,
        fold_penalties=tuple(map(float, found.penalties)),
        accuracy=proportion(int((margins > 0).sum()), len(margins)),
        log_loss=bootstrap_mean(np.logaddexp(0.0, -margins), seed=seed, clusters=keys),
        temperature=temperature,
        calibrated_log_loss=calibrated,
        reliability=reliability(margins)[0],
    )
    return FittedProbe(found, weights, report)


def out_of_fold(chosen: Any, rejected: Any, fold: Sequence[int], *, seed: int = 0, name: str = "the data") -> OutOfFold:
    """Margins of each fold by a probe of the others.

    The penalty of a fold is the best one on the other folds, each held out in its turn: no fold chooses its own.

    Args:
        chosen, rejected: as in :func:`fit_probe`.
        fold: of each pair, from 0; the pairs of one prompt must share one.
        seed: of the draw of ``SPAN`` pairs.

    Raises:
        DataError: fewer than two folds, an empty one, or a feature that is not finite.
    """
    return _out_of_fold(_Pairs(chosen, rejected, np.asarray(fold), name), seed)


def _out_of_fold(data: _Pairs, seed: int) -> OutOfFold:
    folds = len(data.counts)
    shape = len(data.fold), len(PENALTIES)
    margins, chosen = np.zeros(shape), np.zeros(shape)
    for k in range(folds):
        path, centre = data.path(k, seed), data.centre(k)
        for rows, left, right in data.blocks(data.fold == k):
            margins[rows] = (left - right) @ path
            chosen[rows] = (left - centre) @ path
    losses = np.stack([np.logaddexp(0.0, -margins[data.fold == k]).mean(0) for k in range(folds)])
    total = data.counts @ losses
    best = np.array([(total - data.counts[k] * losses[k]).argmin() for k in range(folds)])
    take = np.arange(len(margins)), best[data.fold]
    own, first = margins[take], chosen[take]
    # Equal sides have equal rewards, to the last bit.
    return OutOfFold(own, first, first - own, PENALTIES[best], losses, data.counts)


class _Pairs:
    """Features of pairs by fold, with the sums that every fit needs, from one pass over them."""

    def __init__(self, chosen: Any, rejected: Any, fold: NDArray[np.int64], name: str) -> None:
        self.chosen, self.rejected, self.fold = chosen, rejected, fold
        self.counts = np.bincount(fold)
        if len(self.counts) < 2 or not self.counts.all():
            raise DataError(f"{name}: out-of-fold margins need at least two folds with pairs in each")
        shape = len(self.counts), chosen.shape[1]
        self.differences, self.squares, self.values = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for k in range(len(self.counts)):
            for rows, left, right in self.blocks(fold == k):
                if not (np.isfinite(left).all() and np.isfinite(right).all()):
                    bad = rows[~(np.isfinite(left) & np.isfinite(right)).all(1)][0]
                    raise DataError(
                        f"{name}: the model's states for pair {bad} are not finite; run it in bfloat16 or float32"
                    )
                self.differences[k] += ((left - right) ** 2).sum(0)
                self.squares[k] += (left**2).sum(0) + (right**2).sum(0)
                self.values[k] += left.sum(0) + right.sum(0)

    def blocks(self, mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Floats, Floats]]:
        """(rows, chosen, rejected) of the pairs in ``mask``, float64."""
        found = np.flatnonzero(mask)
        for start in range(0, len(found), _BLOCK):
            rows = found[start : start + _BLOCK]
            yield rows, np.asarray(self.chosen[rows], np.float64), np.asarray(self.rejected[rows], np.float64)

    def _others(self, sums: NDArray[Any], fold: int | None) -> Floats:
        rest: Floats = sums.sum(0) if fold is None else np.delete(sums, fold, axis=0).sum(0)
        return rest

    def centre(self, fold: int | None = None) -> Floats:
        """Mean features of the responses outside ``fold``."""
        return self._others(self.values, fold) / (2 * self._others(self.counts, fold))

    def path(self, fold: int | None, seed: int) -> Floats:
        """Weights by penalty, ``features x penalties``, of the pairs outside ``fold``."""
        count = int(self._others(self.counts, fold))
        squares, values = self._others(self.differences, fold), self._others(self.squares, fold)
        used = squares > _NOISE**2 * values
        inverse = np.zeros_like(squares)
        inverse[used] = 1 / np.sqrt(squares[used] / count * used.sum())
        train = np.ones(len(self.fold), dtype=bool) if fold is None else self.fold != fold
        drawn = train
        if count > SPAN:
            drawn = np.zeros_like(train)
            name = "all" if fold is None else fold
            drawn[rng(seed, "probe", "span", name).choice(np.flatnonzero(train), SPAN, replace=False)] = True
        spanning = np.concatenate([(left - right) * inverse for _, left, right in self.blocks(drawn)])
        size, vectors = np.linalg.eigh(spanning @ spanning.T)
        kept = size > 1e-10 * max(size[-1], 1e-300)
        root, vectors = np.sqrt(size[kept]), vectors[:, kept]
        if count <= SPAN:
            rows = vectors * root
            basis = None
        else:
            basis = spanning.T @ (vectors / root)
            single = basis.astype(np.float32)
            rows = np.concatenate(
                [((left - right) * inverse).astype(np.float32) @ single for _, left, right in self.blocks(train)]
            )
        found = _solve(rows)
        path: Floats = inverse[:, None] * (spanning.T @ (vectors / root @ found) if basis is None else basis @ found)
        return path


def _solve(rows: NDArray[Any]) -> Floats:
    """Weights by penalty, ``columns x penalties``, for differences ``rows`` with columns that hardly correlate.

    The strongest penalty comes first, and each solution begins at the one before. In the variables that make the
    curvature at zero the same in every direction, few steps are needed.
    """
    curvature = np.einsum("ij,ij->j", rows, rows, dtype=np.float64) / 4
    found = np.zeros((rows.shape[1], len(PENALTIES)))
    weights = found[:, 0]
    for place in reversed(range(len(PENALTIES))):
        penalty = float(PENALTIES[place])
        stretch = np.sqrt(curvature + penalty)

        def objective(x: Floats, penalty: float = penalty, stretch: Floats = stretch) -> tuple[float, Floats]:
            w = x / stretch
            margins = (rows @ w.astype(rows.dtype)).astype(np.float64)
            pull = (rows.T @ expit(-margins).astype(rows.dtype)).astype(np.float64)
            loss = np.logaddexp(0.0, -margins).sum() + penalty / 2 * float(w @ w)
            return float(loss), (penalty * w - pull) / stretch

        from scipy.optimize import minimize

        begin, tolerances = weights * stretch, {"maxiter": 500, "ftol": 1e-12, "gtol": 1e-6}
        weights = minimize(objective, begin, jac=True, method="L-BFGS-B", options=tolerances).x / stretch  # type: ignore[call-overload]
        found[:, place] = weights
    return found
