"""A probe: ridge-penalised logistic regression on features of a model that need no training of it.

The features of a response are states of the reference model, averaged over its tokens
(:mod:`madpo.models.engine.features`). With w for weights, r(x) = w . x is a Bradley-Terry reward:
P(chosen over rejected) = sigma(w . (x_chosen - x_rejected)). The weights minimise

    sum over pairs of -log sigma(w . d) + penalty / 2 |w|^2,    d = (x_chosen - x_rejected) / scale,

without an intercept, so that swapping the sides of a pair only changes a sign. ``scale`` is the root mean square of the
pairs' differences, feature by feature, times the root of the number of features: a pair then has |d| of about 1, and
penalties mean the same for every model. It reads no labels, so all folds share it.

The regressions of all folds at all penalties are solved together by accelerated gradient steps in the metric of the
curvature at zero (Boehning and Lindsay 1988; restarts of O'Donoghue and Candes 2015). Every step is one pass over the
pairs in blocks, which may come from a file that is mapped into memory. The metric takes the eigenvectors of a matrix of
pairs x pairs or of features x features, whichever is smaller. So with more pairs than features, memory hardly grows
with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from madpo.core.errors import DataError
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.core.statistics import OUT_OF_FOLD, bootstrap_mean, fit_temperature, proportion_of
from madpo.data.folds import folds_by_prompt
from madpo.rewards.margins import Reliability, reliability

Floats = NDArray[np.float64]

PENALTIES: Floats = np.logspace(-3, 5, 17)
"""From nearly none to one that leaves every margin near 0; the prior variance of a margin is about 1 / penalty."""
FOLDS = 5
STEPS = {np.float64: 300, np.float32: 60}
"""Passes over the pairs at most, by the numbers that the fit is computed in. Regressions that need more have a penalty
that is too weak for their pairs; to end here restrains them a little more."""
TOLERANCE = {np.float64: 1e-5, np.float32: 1e-4}
"""Length of the last step in the metric, per root of the number of pairs, by the numbers that the fit is computed in. A
pair's mean loss is then above the least by about the square of it."""
_BLOCK = 2048
"""Rows that are read at once."""
_EXACT = 2**22
"""Values in a table of differences, up to which the fit is computed in float64."""
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
        margins: reward of the chosen minus that of the rejected, log-odds, one per pair.
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
    """Penalty of the frozen probe."""
    fold_penalties: tuple[float, ...]
    accuracy: Estimate
    """Share of pairs with an out-of-fold margin above 0, with its interval over prompts; both intervals are as
    wide as :data:`madpo.core.statistics.OUT_OF_FOLD` says."""
    log_loss: Estimate
    """Log loss of the out-of-fold margins, nats per pair, with its interval; a coin's is 0.693."""
    temperature: float
    """What would calibrate the margins further; 1 means that they are log-odds."""
    calibrated_log_loss: float
    reliability: tuple[Reliability, ...]
    """Up to 10 bins of equally many pairs by |margin|."""

    def brief(self) -> str:
        """How good the margins are out of fold, in few words."""
        a, loss = self.accuracy, self.log_loss
        return (
            f"accuracy {a.mean:.1%}, {a.low:.1%} to {a.high:.1%}; log loss {loss.mean:.3f}, {loss.low:.3f} to "
            f"{loss.high:.3f}; a coin: 0.693"
        )

    def fit(self) -> list[str]:
        """What was fitted, and whether the features were worth it."""
        lines = [
            f"probe on {self.features:,} features, {self.pairs} pairs of {self.prompts} prompts in {self.folds} folds; "
            f"penalty {self.penalty:.3g}"
        ]
        if self.penalty == PENALTIES[-1]:
            lines.append("the strongest penalty won: these features say nothing about the labels")
        return lines

    def text(self) -> str:
        """The report for a person."""
        a, loss = self.accuracy, self.log_loss
        first, *others = self.fit()
        measured = (
            f"out of fold: accuracy {a.mean:.1%} (95 % interval {a.low:.1%} to {a.high:.1%}), log loss "
            f"{loss.mean:.3f} ({loss.low:.3f} to {loss.high:.3f}), {self.calibrated_log_loss:.3f} at temperature "
            f"{self.temperature:.3g} (a coin: 0.693)"
        )
        return "\n".join([first, measured, *others])


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
        seed: of the folds.
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
    data = _Pairs(chosen, rejected, np.array(folds_by_prompt(keys, folds, seed, name)), name)
    paths = data.paths()
    found = _out_of_fold(data, paths)
    best = int((found.counts @ found.losses).argmin())
    weights = ProbeWeights(np.ascontiguousarray(paths[:, -1, best]), data.centre(), float(PENALTIES[best]))
    margins = found.margins
    temperature, _, calibrated = fit_temperature(margins)
    report = ProbeReport(
        pairs=len(keys),
        prompts=distinct,
        features=len(paths),
        folds=folds,
        penalty=weights.penalty,
        fold_penalties=tuple(map(float, found.penalties)),
        accuracy=proportion_of(margins > 0, keys, inflation=OUT_OF_FOLD),
        log_loss=bootstrap_mean(
            np.logaddexp(0.0, -margins), seed=seed, clusters=keys, lowest=0.0, inflation=OUT_OF_FOLD
        ),
        temperature=temperature,
        calibrated_log_loss=calibrated,
        reliability=reliability(margins, prompts=keys)[0],
    )
    return FittedProbe(found, weights, report)


def _out_of_fold(data: _Pairs, paths: Floats) -> OutOfFold:
    """Margins of each fold by the regression of the others.

    The penalty of a fold is the best one on other folds, each by a regression that has seen neither fold: the labels of
    a fold choose nothing for its own margins. Only of two folds the other one's regression has seen it.
    """
    folds = len(data.counts)
    margins, chosen = (np.zeros((len(data.fold), len(PENALTIES))) for _ in range(2))
    centres = [data.centre(k) for k in range(folds)]
    losses = np.zeros((folds, folds, len(PENALTIES)))  # of a fold, by a regression without it and without another
    for rows, left, right in data.blocks():
        for j in np.unique(data.fold[rows]):
            own = data.fold[rows] == j
            for column, out in enumerate(data.left_out):
                if j in out:
                    found = (left[own] - right[own]) @ paths[:, column]
                    losses[j, sum(out) - j if len(out) > 1 else j] += np.logaddexp(0.0, -found).sum(0)
                    if len(out) == 1:
                        margins[rows][own] = found
                        chosen[rows][own] = (left[own] - centres[j]) @ paths[:, column]
    total, single = losses.sum(0), np.einsum("kkp->kp", losses)
    best = ((total if folds > 2 else single.sum(0)) - single).argmin(1)
    take = np.arange(len(margins)), best[data.fold]
    own, first = margins[take], chosen[take]
    # Equal sides have equal rewards, to the last bit.
    return OutOfFold(own, first, first - own, PENALTIES[best], single / data.counts[:, None], data.counts)


class _Pairs:
    """Features of pairs by fold, with the sums that every fit needs, from one pass over them."""

    def __init__(self, chosen: Any, rejected: Any, fold: NDArray[np.int64], name: str) -> None:
        self.chosen, self.rejected, self.fold = chosen, rejected, fold
        self.counts = np.bincount(fold)
        if len(self.counts) < 2 or not self.counts.all():
            raise DataError(f"{name}: out-of-fold margins need at least two folds with pairs in each")
        width = chosen.shape[1]
        self.values, differences, squares = np.zeros((len(self.counts), width)), np.zeros(width), np.zeros(width)
        for rows, left, right in self.blocks():
            finite = (np.isfinite(left) & np.isfinite(right)).all(1)
            if not finite.all():
                bad = rows.start + int(np.flatnonzero(~finite)[0])
                raise DataError(
                    f"{name}: the model's states for pair {bad} are not finite; run it in bfloat16 or float32"
                )
            differences += ((left - right) ** 2).sum(0)
            squares += (left**2).sum(0) + (right**2).sum(0)
            self.values += (fold[rows] == np.arange(len(self.counts))[:, None]).astype(np.float64) @ (left + right)
        used = differences > _NOISE**2 * squares
        self.inverse = np.zeros(width)
        self.inverse[used] = 1 / np.sqrt(differences[used] / len(fold) * used.sum())
        folds = len(self.counts)
        two = {tuple(sorted((k, (k + step) % folds))) for k in range(folds) for step in (1, 2)} if folds > 2 else set()
        self.left_out: list[tuple[int, ...]] = [*((k,) for k in range(folds)), *sorted(two), ()]
        small = len(fold) * min(len(fold), width) <= _EXACT
        self.dtype: type[np.float64 | np.float32] = np.float64 if small else np.float32

    def blocks(self) -> Iterator[tuple[slice, Floats, Floats]]:
        """(rows, chosen, rejected) of all pairs in their order, float64."""
        for rows in _parts(len(self.fold)):
            yield rows, np.asarray(self.chosen[rows], np.float64), np.asarray(self.rejected[rows], np.float64)

    def differences(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """(rows, scaled differences) of all pairs in their order."""
        inverse = self.inverse.astype(self.dtype)
        for rows in _parts(len(self.fold)):
            yield rows, (self.chosen[rows] - self.rejected[rows]).astype(self.dtype, copy=False) * inverse

    def centre(self, fold: int | None = None) -> Floats:
        """Mean features of the responses outside ``fold``."""
        values, counts = self.values.sum(0), self.counts.sum()
        if fold is not None:
            values, counts = values - self.values[fold], counts - self.counts[fold]
        mean: Floats = values / (2 * counts)
        return mean

    def paths(self) -> Floats:
        """Weights by the folds that are left out (``left_out``) and penalty, ``features x sets x penalties``."""
        pairs, width = len(self.fold), len(self.inverse)
        keep = np.stack([~np.isin(self.fold, out) for out in self.left_out], axis=1).astype(np.float32)
        if pairs > width:
            size, vectors = _moments((block.T for _, block in self.differences()), width, self.dtype)
            found = _solve(self.differences, size / 4, vectors, keep, self.dtype)
        else:
            # The best weights are a combination of the differences: as many dimensions as there are pairs.
            differences = ((self.chosen[:, c] - self.rejected[:, c]) * self.inverse[c] for c in _parts(width))
            size, vectors = _moments(differences, pairs, np.float64)
            kept = size > 1e-10 * max(size[-1], 1e-300)
            root, vectors = np.sqrt(size[kept]), vectors[:, kept]
            inside = (vectors * root).astype(self.dtype)
            found = np.zeros((width, keep.shape[1] * len(PENALTIES)))
            solved = _solve(
                lambda: ((part, inside[part]) for part in _parts(pairs)),
                root**2 / 4,
                None,
                keep,
                self.dtype,
            )
            combined = (vectors / root) @ solved.reshape(len(root), -1)
            for rows, block in self.differences():
                found += block.T @ combined[rows]
            found = found.reshape(width, keep.shape[1], -1)
        scaled: Floats = self.inverse[:, None, None] * found
        return scaled


def _moments(parts: Iterable[NDArray[Any]], size: int, dtype: type) -> tuple[NDArray[Any], NDArray[Any]]:
    """Eigenvalues and eigenvectors of the sum of ``part @ part.T``; every part has ``size`` rows."""
    from scipy.linalg import eigh, get_blas_funcs

    total: NDArray[Any] = np.zeros((size, size), dtype=dtype, order="F")
    update = get_blas_funcs("syrk", (total,))  # in place, and the upper half only
    for part in parts:
        total = update(1.0, part, beta=1.0, c=total, overwrite_c=1)
    found: tuple[NDArray[Any], NDArray[Any]] = eigh(total, lower=False, overwrite_a=True, check_finite=False)
    return found


def _parts(count: int) -> Iterator[slice]:
    """Slices of up to ``_BLOCK`` rows, which cover all."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _solve(
    blocks: Callable[[], Iterator[tuple[slice, NDArray[Any]]]],
    curvature: NDArray[Any],
    vectors: NDArray[Any] | None,
    keep: NDArray[np.float32],
    dtype: type[np.float64 | np.float32],
) -> Floats:
    """Ridge logistic regressions on differences, all together, ``columns x sets x penalties``.

    Args:
        blocks: a pass over the differences, ``pairs x columns`` in parts.
        curvature, vectors: eigenvalues and eigenvectors of a quarter of all differences' second moments (summed), which
            bounds the curvature of every regression; None where the columns are the eigenvectors.
        keep: 1 where a pair belongs to a set, ``pairs x sets``.
        dtype: of the blocks.
    """
    sets, count = keep.shape[1], len(PENALTIES)
    which = np.repeat(np.arange(sets), count)
    penalty = np.tile(PENALTIES, sets)
    solution = np.zeros((len(curvature), sets * count))
    active = np.arange(sets * count)
    weights, ahead = solution.copy(), solution.copy()
    momentum = np.ones(sets * count)
    enough = TOLERANCE[dtype] * np.sqrt(len(keep))
    for _ in range(STEPS[dtype]):
        slope, point = penalty[active] * ahead, ahead.astype(dtype)
        for rows, block in blocks():
            pull = expit(-(block @ point)) * keep[rows][:, which[active]]
            slope -= block.T @ pull.astype(dtype, copy=False)
        inside = slope if vectors is None else vectors.T @ slope.astype(vectors.dtype)
        step = inside / (np.maximum(curvature, 0)[:, None] + penalty[active])
        size = np.sqrt(np.einsum("ij,ij->j", inside, step, dtype=np.float64))
        new = ahead - (step if vectors is None else vectors @ step.astype(vectors.dtype))
        moved = new - weights
        turned = np.einsum("ij,ij->j", slope, moved) > 0  # the momentum leads uphill: begin it anew
        momentum = np.where(turned, 1.0, momentum)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        weights, ahead = new, new + np.where(turned, 0.0, (momentum - 1) / following) * moved
        momentum = following
        done = size < enough
        solution[:, active] = weights
        weights, ahead, momentum, active = weights[:, ~done], ahead[:, ~done], momentum[~done], active[~done]
        if not len(active):
            break
    return solution.reshape(-1, sets, count)
