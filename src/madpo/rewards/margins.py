"""What a column of reward margins looks like, what MADPO's weight would do with it, and which tau to take.

No torch: the weight here is ``weight_counts.log_weight``, which a test holds equal to ``madpo.margin_weight``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, shortened
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.core.statistics import LOG_TEMPERATURES, fit_temperature, proportion_of
from madpo.data.findings import KINDS, unit_of_margins
from madpo.data.margins import SUSPICIOUS
from madpo.rewards.label_share import LabelShare, better_than_coin
from madpo.rewards.weight_counts import WeightParameters, count_weights, log_weight

SURE = math.log(0.999 / 0.001)  # logit(0.999) = 6.907, what the paper rounds to tau = 7
PAPER_SETTINGS = ((7.0, 2.0), (7.0, 3.0), (7.0, 4.0), (2.0, 2.0), (4.0, 2.0), (10.0, 2.0))  # (tau, c_max), its search
MILD = 2.0  # c_max that is recommended
ENOUGH = 0.7  # share of the pairs that the effective sample size must keep
BINS = 10
NOTHING_LEARNED = (
    "the margins explain these labels no better than a coin, so their reward model has learned nothing that these "
    "pairs show; train with --loss dpo, or get margins from another reward model or from more pairs"
)
SWAPPED = (
    "the margins contradict most of these labels: are chosen and rejected swapped, or is a lower score the better one?"
)
NOT_SHOWN = (
    "the reward model was trained on these pairs, so they cannot show what it has learned; madpo score --probe MODEL "
    "or --folds 5 gives margins out of fold"
)


class Setting(Frozen):
    """What the weight at one setting does to the margins; shares of all pairs, margins divided by the temperature."""

    tau: float
    c_max: float
    mean_weight: float
    effective_share: float
    """(sum w)^2 / (n sum w^2): 1 if all weights are equal."""
    amplified: float
    dampened: float
    turned_down: float


class Reliability(Frozen):
    """Pairs with |margin| in a range: how sure the reward model is, and how often it is right."""

    low: float
    high: float
    pairs: int
    predicted: float
    """Mean of sigma(|margin|)."""
    observed: Estimate
    """Share of pairs where the sign of the margin agrees with the label, with its interval over prompts."""


class Suspect(Frozen):
    """A pair whose label the reward model contradicts strongly."""

    pair_id: int
    reward_margin: float
    """As given."""
    probability: float
    """Probability of the label under the reward model, after the temperature."""
    weight: float
    """At the recommended setting, else at MADPO's defaults; 1 where the margin is at or below -tau."""
    place: str = ""
    """Its line or row in the data."""
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""

    @property
    def name(self) -> str:
        """The pair_id, and where it is."""
        return f"pair {self.pair_id}{self.place and f' ({self.place})'}"


class MarginReport(Report):
    """What :func:`inspect` found."""

    pairs: int
    mean: float
    median: float
    deviation: float
    smallest: float
    largest: float
    contradicted: Estimate
    """Share of pairs with a margin below 0, with its 95 % interval over prompts."""
    margin_temperature: float
    temperature_reason: str
    temperature_fitted: bool
    log_loss: float
    """Log loss of the margins as given, nats per pair; a coin's is 0.693."""
    calibrated_log_loss: float
    calibration_error: float
    """Mean over pairs of |observed - predicted| by bin, after the temperature."""
    reliability: tuple[Reliability, ...]
    settings: tuple[Setting, ...]
    """The paper's, then the recommended one where there is one."""
    tau: float | None
    c_max: float | None
    """Recommended; None where the margins do not explain these labels clearly better than a coin, or cannot show it."""
    reasons: tuple[str, ...]
    """Of the recommendation, or why there is none."""
    warnings: tuple[str, ...]
    suspects: tuple[Suspect, ...]
    share: LabelShare | None = None
    """The deciding number, where the data have DPO's implicit margins as well (column ``implicit_margin``)."""

    @property
    def calibration_chance(self) -> float:
        """The calibration error that calibrated margins of independent pairs have on average: the fewer pairs in a bin,
        the larger. By the mean of |x| of a normal x with the variance of the bin's number of right pairs."""
        bins = self.reliability
        return sum(math.sqrt(2 / math.pi * b.pairs * b.predicted * (1 - b.predicted)) for b in bins) / self.pairs

    @property
    def scaled(self) -> bool:
        """Whether the temperature means something: it was given, or fitted to margins that explain the labels."""
        return self.tau is not None or not self.temperature_fitted

    def advice(self) -> list[str]:
        """The recommendation and its reasons, or why there is none."""
        if self.tau is None:
            return [f"no recommendation: {self.reasons[0]}"]
        found = f"tau = {self.tau:.3g}, c_max = {self.c_max:g}, margin_temperature = {self.margin_temperature:.3g}"
        return [f"recommended: {found}", *self.reasons]

    def text(self) -> str:
        """The report for a person."""
        c = self.contradicted
        lines = [
            f"{self.pairs} margins: median {self.median:.3g}, mean {self.mean:.3g}, standard deviation "
            f"{self.deviation:.3g}, from {self.smallest:.3g} to {self.largest:.3g}",
            f"the reward model contradicts {c.mean:.1%} of the labels (95 % interval {c.low:.1%} to {c.high:.1%})",
            *([f"margin temperature {self.margin_temperature:.3g}: {self.temperature_reason}"] if self.scaled else []),
            f"log loss {self.log_loss:.3f}, {self.calibrated_log_loss:.3f} after the temperature (a coin: 0.693); "
            f"calibration error {self.calibration_error:.1%} (of calibrated margins by chance "
            f"{self.calibration_chance:.1%})",
            "weights of MADPO: amplified is above 1, dampened below 1, turned down where the label is contradicted "
            "(shares of the pairs); effective is the effective sample size",
            "   tau  c_max  mean weight  effective  amplified  dampened  turned down",
        ]
        for s in self.settings:
            mark = "  recommended" if self.tau is not None and s is self.settings[-1] else ""
            lines.append(
                f"{s.tau:6.2f}  {s.c_max:5.2f}  {s.mean_weight:11.3f}  {s.effective_share:9.1%}  {s.amplified:9.1%}  "
                f"{s.dampened:8.1%}  {s.turned_down:11.1%}{mark}"
            )
        first, *reasons = self.advice()
        lines += [first, *(f"    {reason}" for reason in reasons)]
        if self.share is not None:
            lines += self.share.text().splitlines()
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.suspects:
            lines.append("most suspicious pairs:")
        for suspect in self.suspects:
            texts = (suspect.prompt[-40:], shortened(suspect.chosen, 30), shortened(suspect.rejected, 30))
            shown = "  {!r}: {!r} over {!r}".format(*texts) if suspect.chosen else ""
            lines.append(f"    {suspect.name}: margin {suspect.reward_margin:.2f}, weight {suspect.weight:.2f}{shown}")
        return "\n".join(lines)


def inspect(
    margins: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    pair_ids: Sequence[int] | None = None,
    margin_temperature: float | None = None,
    texts: Mapping[int, Mapping[str, str]] | None = None,
    trained_on: bool = False,
) -> MarginReport:
    """Look at reward margins before training with them.

    Args:
        margins: r(chosen) - r(rejected), one per pair, in the reward model's own unit.
        prompts: one label per pair; None: each pair has a prompt of its own.
        pair_ids: names of the pairs; their positions when left out.
        margin_temperature: what the margins are divided by to be log-odds. None fits it to these pairs, which is
            right only if the reward model was not trained on them.
        texts: place, prompt, chosen and rejected by position, for the suspicious pairs that have them.
        trained_on: the reward model was trained on these pairs, so that no temperature is fitted to them.

    The recommendation: tau = logit(0.999) of the calibrated margins, capped at the 99th percentile of their size (a
    tau beyond all margins would only amplify); c_max is 2, the mildest of the paper's search. There is none where the
    margins do not explain the labels better than a coin, by the test that ``auto`` decides by, and none of pairs that
    the reward model was trained on.

    Raises:
        DataError: no margins, or one that is not finite, with its position.
        ConfigError: a temperature that is not above 0.
    """
    h = _margins(margins)
    ids = list(range(len(h))) if pair_ids is None else [int(i) for i in pair_ids]
    if len(ids) != len(h):
        raise DataError(f"there are {len(h)} margins but {len(ids)} pair ids; give one for each")
    temperature, reason, fitted = _temperature(h, margin_temperature, trained_on=trained_on)
    calibrated = h / temperature
    learned, wrong = better_than_coin(h, prompts), proportion_of(h < 0, prompts)
    if recommended := learned and not trained_on:
        given, reasons, warnings = _recommend(calibrated)
    else:
        why = NOT_SHOWN if learned else SWAPPED if wrong.low > 0.5 else NOTHING_LEARNED
        given, reasons, warnings = WeightParameters(), [why], []
    bins, error = reliability(calibrated, prompts=prompts)
    warnings += _doubts(h, temperature, fitted=fitted, learned=learned)
    if trained_on:
        warnings.append("the reward model was trained on these pairs: all of this flatters it")
    most = SUSPICIOUS if learned or wrong.low > 0.5 else 0
    shown = [*PAPER_SETTINGS, *([(given.tau, given.c_max)] if recommended else [])]
    settings = [_setting(calibrated, *setting) for setting in shown]
    return MarginReport(
        pairs=len(h),
        mean=float(h.mean()),
        median=float(np.median(h)),
        deviation=float(h.std()),
        smallest=float(h.min()),
        largest=float(h.max()),
        contradicted=wrong,
        margin_temperature=temperature,
        temperature_reason=reason,
        temperature_fitted=fitted,
        log_loss=_log_loss(h),
        calibrated_log_loss=_log_loss(calibrated),
        calibration_error=error,
        reliability=bins,
        settings=tuple(settings),
        tau=given.tau if recommended else None,
        c_max=given.c_max if recommended else None,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        suspects=_suspects(h, calibrated, ids, given, texts or {}, most),
    )


def _suspects(
    h: NDArray[np.float64],
    calibrated: NDArray[np.float64],
    ids: Sequence[int],
    parameters: WeightParameters,
    texts: Mapping[int, Mapping[str, str]],
    most: int,
) -> tuple[Suspect, ...]:
    """The pairs with the most negative margins, at most so many."""
    order = np.argsort(h, kind="stable")[:most]
    worst = order[h[order] < 0]
    weights = np.exp(log_weight(calibrated[worst], parameters))
    return tuple(
        Suspect(
            pair_id=ids[i],
            reward_margin=float(h[i]),
            probability=float(np.exp(-np.logaddexp(0, -calibrated[i]))),
            weight=float(weight),
            **texts.get(int(i), {}),
        )
        for i, weight in zip(worst, weights, strict=True)
    )


def _margins(values: ArrayLike) -> NDArray[np.float64]:
    h = np.asarray(values, dtype=np.float64).ravel()
    if not len(h):
        raise DataError("there are no margins to inspect; score the pairs first")
    if not np.isfinite(h).all():
        row = int(np.flatnonzero(~np.isfinite(h))[0])
        raise DataError(f"reward_margin in row {row} is {h[row]}, but must be finite; score the pair again or drop it")
    # Differences of numbers near the largest float overflow, and no reward model gives such a margin.
    if np.abs(h).max() > 1e100:
        row = int(np.abs(h).argmax())
        raise DataError(f"reward_margin in row {row} is {h[row]}: no log-odds are that large; score the pair again")
    return h


def _temperature(h: NDArray[np.float64], given: float | None, *, trained_on: bool) -> tuple[float, str, bool]:
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise ConfigError(f"margin_temperature is {given}, but must be finite and above 0")
        return float(given), "as given", False
    if not h.any():
        return 1.0, "left at 1, since all margins are 0", False
    if trained_on:
        return (
            1.0,
            "left at 1, since the reward model was trained on these pairs, where it is surer than on others",
            False,
        )
    if (h >= 0).all():
        # Pairs in the order of their scores: no label can disagree, so any temperature near 0 looks best.
        return 1.0, "left at 1, since no margin is negative, so that a temperature near 0 would look best", False
    fitted = fit_temperature(h)[0]
    if fitted >= math.exp(LOG_TEMPERATURES[1]) * 0.999:
        return 1.0, "left at 1, since no temperature makes these margins better than a coin", False
    return (
        fitted,
        "fitted to these pairs, so that sigma(margin / temperature) is the share of labels it gets right",
        True,
    )


def _setting(h: NDArray[np.float64], tau: float, c_max: float) -> Setting:
    counts = count_weights(h, WeightParameters(tau=tau, c_max=c_max))
    shares = {name: getattr(counts, name) / len(h) for name in ("amplified", "dampened", "turned_down")}
    effective = counts.effective / len(h)
    return Setting(tau=tau, c_max=c_max, mean_weight=counts.mean, effective_share=effective, **shares)


def _recommend(h: NDArray[np.float64]) -> tuple[WeightParameters, list[str], list[str]]:
    """(tau and c_max, reasons, warnings) for calibrated margins."""
    warnings: list[str] = []
    ceiling = float(np.percentile(np.abs(h), 99))
    if ceiling < SURE:
        tau = ceiling
        why = f"99 % of |margin / temperature| are below tau = {tau:.3g}, which is below logit(0.999) = {SURE:.3g}"
    else:
        tau = SURE
        why = f"from tau = logit(0.999) = {tau:.3g} on, the reward model is as good as sure"
    kept = _setting(h, tau, MILD).effective_share
    if kept < ENOUGH:
        warnings.append(
            f"even c_max = 2 leaves an effective sample size of {kept:.2f} n: too many pairs are turned down; "
            "train a better reward model, or take DPO"
        )
    return (
        WeightParameters(tau=tau, c_max=MILD),
        [why, f"the mildest of the paper's search is c_max = {MILD:g} (effective sample size {kept:.2f} n)"],
        warnings,
    )


def reliability(
    h: NDArray[np.float64], most: int = BINS, *, prompts: ArrayLike | None = None
) -> tuple[tuple[Reliability, ...], float]:
    """Bins of equally many pairs by |margin| (log-odds, chosen minus rejected), and the mean gap; ties share a bin.

    At most ``most`` bins. ``prompts`` as for :func:`inspect`.
    """
    labels = None if prompts is None else np.asarray(prompts)
    size = np.abs(h)
    edges = np.unique(np.quantile(size, np.linspace(0, 1, most + 1)))
    bin_index = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(0, len(edges) - 2))
    # A margin of exactly 0 takes no side: half right.
    right = np.where(h > 0, 1.0, np.where(h < 0, 0.0, 0.5))
    bins = []
    gap = 0.0
    for k in range(max(1, len(edges) - 1)):
        inside = bin_index == k
        n = int(inside.sum())
        if not n:
            continue
        predicted = float(np.exp(-np.logaddexp(0, -size[inside])).mean())
        gap += abs(float(right[inside].sum()) - n * predicted)
        bins.append(
            Reliability(
                low=float(size[inside].min()),
                high=float(size[inside].max()),
                pairs=n,
                predicted=predicted,
                observed=proportion_of(right[inside], None if labels is None else labels[inside]),
            )
        )
    return tuple(bins), gap / len(h)


def _doubts(h: NDArray[np.float64], temperature: float, *, fitted: bool, learned: bool) -> list[str]:
    doubts = []
    if learned and not 0.5 <= temperature <= 2:  # else it means nothing
        doubts.append(f"the margins are not log-odds; train with margin_temperature = {temperature:.3g}")
    if np.ptp(h) == 0:
        doubts.append("all margins are the same, so every pair gets the same weight; MADPO is DPO here")
    if (h >= 0).all() and h.any():
        doubts.append("no margin is negative: were these pairs ordered by the reward model that scored them?")
    if (kind := unit_of_margins(len(h), float(h.min()), float(h.max()))) is not None:
        doubts.append("; ".join(KINDS[kind]))
    if fitted and learned and len(h) < 200:
        doubts.append(f"{len(h)} pairs are too few to fit a temperature to; measure it on more held-out pairs")
    return doubts


def _log_loss(h: NDArray[np.float64]) -> float:
    return float(np.logaddexp(0.0, -h).mean())
