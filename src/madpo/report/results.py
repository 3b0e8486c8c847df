"""The evaluations of a run as one long table of samples, and per tier the methods that it compares.

A line of the table is one response: tier, key of the method, training seed, prompt, number of the sample, its reward,
its KL and its length. Prompts are the independent units: a prompt's value is the mean over its samples, then over
training seeds, and intervals of means are over prompts: they are about these trainings. All methods answer the same
prompts, so differences are paired; their intervals are over prompts and training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pandas as pd

from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, over_repetitions, share_of
from madpo.report.methods import OWN, SFT, rate_words
from madpo.runner.record import Record

BOOTSTRAP_SEED = 0  # of every interval that a run reports: the same records give the same numbers

# Value of a row -> (column of the samples, metric of the evaluation that takes its place where no samples are kept).
MEASURED = {
    **{"oracle_reward": ("reward", "oracle_reward"), "kl": ("kl", "kl"), "length": ("tokens", "length")},
    **{"heldout_accuracy": ("right", "heldout_accuracy"), "heldout_log_loss": ("log_loss", "heldout_log_loss")},
}

Value = Estimate | float | None
F = TypeVar("F", bound=Callable[..., Any])


def cached_on_tier(function: F) -> F:
    """A function of a tier and hashable arguments, cached for as long as the tier lives."""

    @wraps(function)
    def cached(tier: Tier, *args: Any) -> Any:
        key = function.__name__, *args
        if key not in tier.cache:
            tier.cache[key] = function(tier, *args)
        return tier.cache[key]

    return cast(F, cached)


@dataclass(frozen=True)
class Row:
    """A method of a tier at one setting.

    Attributes:
        key: its name in the steps ("madpo_t7"); name: how it is shown; method: what it is a setting of ("MADPO"), with
            the learning rate where it has its own.
        loss: the loss's settings, empty for SFT; where no loss trained it, the trainer's settings.
        group: the part of the study that the row belongs to, "" where the run names none.
        learning_rate: its own; None is that of the whole study.
        pairs, margins, trainer: what it was trained on ("all", "agreeing", "redrawn"; margins "in_sample" or
            "out_of_fold") and how ("offline", "rloo", ...).
        seeds: names of the training seeds; per_seed: seed -> mean oracle reward.
        values: ``oracle_reward`` in the oracle's unit; ``kl`` to the reference, summed nats per response; ``length``,
            tokens; ``distinct_1``, ``distinct_2``, share of different words and word pairs; ``ended``, share of
            responses with an end token; ``perplexity`` under the reference; ``repeated``, share of responses that
            another prompt got too; ``win_rate``, share of responses with a higher reward than SFT's to the same prompt
            with the same random numbers, ties count half;
            ``difference``, :func:`paired` difference of the reward to DPO, None for SFT and DPO;
            ``heldout_accuracy``, share of held-out pairs that are ordered as labelled; ``heldout_log_loss``, nats per
            pair, after one temperature; ``log_loss_difference``, paired difference of that to DPO's.
    """

    key: str
    name: str
    method: str
    loss: dict[str, Any]
    group: str = ""
    pairs: str = "all"
    margins: str = "in_sample"
    trainer: str = "offline"
    learning_rate: float | None = None
    seeds: tuple[str, ...] = ()
    per_seed: dict[str, float] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        return self.values.get(name)

    def mean(self, name: str) -> float:
        """The value without its interval; -inf where there is none."""
        return mean_of(self[name])

    @property
    def family(self) -> str:
        """The method, whatever the learning rate."""
        return self.method.removesuffix(rate_words(self.learning_rate))

    @property
    def beta(self) -> float | None:
        """The loss's beta, where it has one."""
        beta = self.loss.get("beta")
        return float(beta) if isinstance(beta, int | float) else None


@dataclass(frozen=True, eq=False)
class Tier:
    """A tier's methods, SFT first, and what its reward models say.

    Attributes:
        samples: the long table of this tier's rows and of SFT, as of :meth:`madpo.report.sources.Sources.samples`, with
            ``key`` and ``seed``.
        reward_models: by seed ("" where there is one).
        margins: of the training pairs; heldout_margins: those that measured the reward model, with ``prompt_id``;
            reward_curve: its log. All of the first seed.
        curves: logs of the policies of the first seed, one line per logged step, with the row's ``name``.
        missing: names of the experiment's methods that have no evaluation here.
        selection_seed: which half of the held-out prompts chooses among settings.
        probes: by seed, where rows read a probe's margins next to the reward model's.
        sweep: samples at further decoding temperatures, as ``samples``, with ``temperature``.
    """

    name: str
    rows: list[Row]
    samples: pd.DataFrame
    reward_models: dict[str, Record] = field(default_factory=dict)
    margins: np.ndarray = field(default_factory=lambda: np.empty(0))
    heldout_margins: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    reward_curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    missing: tuple[str, ...] = ()
    selection_seed: int = 0
    sweep: pd.DataFrame = field(default_factory=pd.DataFrame)
    probes: dict[str, Record] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people: "high" -> "High"."""
        return "Your pairs" if self.name == OWN else self.name.replace("_", " ").capitalize()

    @property
    def reward(self) -> str:
        """What the reward of responses is called: a study has an oracle, and a user's own pairs have a judge."""
        return "judge's reward" if self.name == OWN else "oracle reward"

    @property
    def policies(self) -> list[Row]:
        """The rows except SFT."""
        return [row for row in self.rows if row.method != SFT]

    @property
    def sft(self) -> Row | None:
        """The row of the SFT model, which is the reference of all policies."""
        return next((row for row in self.rows if row.method == SFT), None)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Training seeds that some policy of the tier has."""
        return tuple(sorted({seed for row in self.policies for seed in row.seeds}))

    @property
    def uneven(self) -> bool:
        """Whether policies of the tier have different seeds, so that their means need not compare."""
        return any(set(row.seeds) != set(self.seeds) for row in self.policies)

    @property
    def baseline(self) -> Row | None:
        """Plain DPO, which differences refer to."""
        plain = [row for row in self.rows if row.loss.get("kind", row.key) == "dpo" and row.pairs == "all"]
        plain = [row for row in plain if row.learning_rate is None] or plain
        first = [row for row in plain if row.group in ("", "core")]
        return next((row for row in plain if row.key == "dpo"), next(iter([*first, *plain]), None))

    @cached_property
    def _means(self) -> dict[str, pd.DataFrame]:
        """Key of a row -> mean over a prompt's samples, by prompt and seed."""
        columns = [column for column, _ in MEASURED.values() if column in self.samples]
        cells = self.samples.groupby(["key", "prompt_id", "seed"])[columns].mean()
        return {
            str(key): cast(pd.DataFrame, own.droplevel("key").unstack("seed")).dropna(axis=1, how="all")
            for key, own in cells.dropna(how="all").groupby("key", sort=False)
        }

    def cells(self, row: Row, column: str = "reward") -> pd.DataFrame:
        """Prompts by training seeds: the mean over a prompt's samples, NaN where a seed did not answer."""
        return self._cells(row.key, row.seeds, column)

    def others(self, rows: Iterable[Row], column: str = "reward") -> list[pd.DataFrame]:
        """:meth:`cells` of the policies except these."""
        keys = {row.key for row in rows}
        return [self.cells(row, column) for row in self.policies if row.key not in keys]

    @cached_on_tier
    def _cells(self, key: str, seeds: tuple[str, ...], column: str) -> pd.DataFrame:
        means = self._means.get(key)
        if means is None or column not in means:
            return pd.DataFrame(columns=list(seeds), dtype=float)
        return cast(pd.DataFrame, means.xs(column, axis=1, level=0)).reindex(columns=list(seeds))

    @cached_property
    def cache(self) -> dict[tuple[Any, ...], Any]:
        """Results of functions that :func:`cached_on_tier` decorates."""
        return {}

    @cached_property
    def reporting(self) -> frozenset[int]:
        """The half of the held-out prompts that is reported where the other half has chosen among settings."""
        answered = self.samples.loc[self.samples["reward"].notna(), "prompt_id"]
        prompts = {int(i) for i in answered.unique()}
        return frozenset(prompts - selecting_half(prompts, self.selection_seed))

    def at_temperatures(self) -> dict[float, Tier]:
        """Temperature -> the tier as measured there, of the methods that have answers there; rising."""
        found = {}
        for temperature, samples in self.sweep.groupby("temperature") if len(self.sweep) else ():
            rows = [replace(row, values={}) for row in self.rows if row.key in set(samples["key"])]
            found[float(cast(float, temperature))] = measured(replace(self, rows=rows, samples=samples))
        return found

    def even(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with reward and KL over the training seeds that all of them have, so that their levels compare.

        Means over different seeds differ by what the seeds differ in. Where all rows have the same seeds, or none in
        common, they stay as they are.
        """
        seeds = shared_seeds(rows)
        if not seeds or all(set(row.seeds) == set(seeds) for row in rows):
            return list(rows)
        return [
            replace(
                row,
                seeds=tuple(seeds),
                per_seed={seed: row.per_seed[seed] for seed in seeds if seed in row.per_seed},
                values={
                    **row.values,
                    **{name: self.estimate(row, name, seeds) or row[name] for name in ("oracle_reward", "kl")},
                },
            )
            for row in rows
        ]

    def estimate(self, row: Row, name: str, seeds: Sequence[str] | None = None) -> Estimate | None:
        """A value with its interval over prompts, over the given training seeds or all; None without samples."""
        cells = self.cells(row, MEASURED[name][0])
        return _estimate(cells if seeds is None else cells[list(seeds)], name)


def over_shared_seeds(cells: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Prompts by sides: every side's mean over the training seeds that all sides have, and those seeds.

    A side of two seeds less one of the first seed would mix the seeds' difference into the methods'. Where no seed is
    common, every side has its own mean. Only prompts that all sides (and all their seeds) answered.

    Args:
        cells: prompts by training seeds, one table per side, as of :meth:`Tier.cells`.
    """
    seeds = sorted(set.intersection(*(set(side.columns) for side in cells))) if cells else []
    means = [(side[seeds] if seeds else side).mean(axis=1, skipna=False) for side in cells]
    return pd.concat(means, axis=1, keys=range(len(cells))).dropna().sort_index(), seeds


class Difference(NamedTuple):
    """A paired difference, of every training seed that all sides have, and the prompts by sides that it is over."""

    value: Estimate
    per_seed: dict[str, float]
    prompts: pd.DataFrame


def paired(
    cells: Sequence[pd.DataFrame], among: Collection[int] | None = None, alike: Sequence[pd.DataFrame] = ()
) -> Difference | None:
    """The first side minus the second by prompt, or of four (a - b) - (c - d); None on fewer than two prompts.

    Its interval holds prompts and training seeds (:func:`madpo.core.statistics.over_repetitions`); of one seed where no
    other trainings have more, or where no seed is common, it is over prompts only.

    Args:
        cells: as of :func:`over_shared_seeds`.
        among: the prompts that may count; None: all.
        alike: what other trainings have in the place of the first side; their differences vary from seed to seed as
            its own is taken to.
    """
    values, seeds = over_shared_seeds(cells)
    values = values if among is None else values[values.index.isin(list(among))]
    if len(values) < 2:
        return None
    signs = np.array([1.0, -1.0, -1.0, 1.0])[: len(cells)]

    def by_seed(first: pd.DataFrame, seeds: Sequence[str]) -> np.ndarray:
        sides = (side.reindex(values.index)[seeds].mean(skipna=False) for side in (first, *cells[1:]))
        return np.asarray(signs @ np.stack([*sides]))

    over_prompts = bootstrap_mean(values.to_numpy() @ signs, seed=BOOTSTRAP_SEED)
    if not seeds:
        return Difference(over_prompts, {}, values)
    own = by_seed(cells[0], seeds)
    wide = seeds if len(seeds) > 1 else sorted(set.intersection(*({*side.columns} for side in cells[1:])))
    others = [by_seed(other, wide) for other in alike if {*wide} <= {*other.columns}]
    value = over_repetitions(over_prompts, own, [other for other in others if np.isfinite(other).all()])
    return Difference(value, dict(zip(seeds, own.tolist(), strict=True)), values)


def shared_seeds(rows: Sequence[Row]) -> list[str]:
    """Training seeds that all rows have."""
    return sorted(set.intersection(*(set(row.seeds) for row in rows))) if rows else []


def mean_of(value: Value) -> float:
    """The value without its interval; -inf where there is none."""
    mean = value.mean if isinstance(value, Estimate) else value
    return float(mean) if mean is not None and np.isfinite(mean) else float("-inf")


def measured(tier: Tier) -> Tier:
    """The tier with what its samples say in the values of its rows."""
    rows = []
    for row in tier.rows:
        values = dict(row.values)
        for name in MEASURED:
            values[name] = tier.estimate(row, name) or values.get(name)
        own = tier.samples[(tier.samples["key"] == row.key) & tier.samples["text"].notna()]
        if len(own):
            prompts = own.groupby(["seed", "text"])["prompt_id"].transform("nunique")
            values["repeated"] = float((prompts > 1).groupby(own["seed"]).mean().mean())
        if row.method != SFT:
            values["win_rate"] = _win_rate(tier, row)
            values["difference"] = _difference(tier, row)
            values["log_loss_difference"] = _difference(tier, row, "log_loss")
        rows.append(replace(row, values=values))
    return replace(tier, rows=rows)


def against(sft: pd.DataFrame, seeds: Iterable[str]) -> pd.DataFrame:
    """The SFT model's values for these training seeds; its mean where it was not sampled with a seed's random numbers.

    It is one model, so its mean is right for every seed; the same random numbers only make differences less noisy.
    """
    mean = sft.mean(axis=1, skipna=False)
    return pd.DataFrame({seed: sft[seed] if seed in sft.columns else mean for seed in seeds})


def _win_rate(tier: Tier, row: Row) -> Estimate | None:
    if tier.sft is None:
        return None
    own, sft = (
        tier.samples[tier.samples["key"] == one.key].pivot_table("reward", "prompt_id", ["seed", "sample"])
        for one in (row, tier.sft)
    )
    mean, sampled = tier.cells(tier.sft).mean(axis=1, skipna=False), {at[0] for at in sft.columns}
    drawn = [at for at in own.columns if at in sft or at[0] not in sampled]
    wins = {at: np.sign(own[at] - sft.get(at, mean)) / 2 + 0.5 for at in drawn}
    return _estimate(pd.DataFrame(wins).T.groupby(level=0).mean().T, "win_rate") if wins else None


def _difference(tier: Tier, row: Row, column: str = "reward") -> Estimate | None:
    baseline = tier.baseline
    if baseline is None or row.key == baseline.key:
        return None
    found = paired([tier.cells(row, column), tier.cells(baseline, column)], alike=tier.others([row, baseline], column))
    return None if found is None else found.value


def _estimate(cells: pd.DataFrame, name: str) -> Estimate | None:
    # A prompt counts only where every seed answered it: otherwise seeds would weigh differently per prompt.
    values = cells.mean(axis=1, skipna=False).dropna().sort_index().to_numpy(dtype=float)
    if len(values) < 2:
        return None
    if name in ("heldout_accuracy", "win_rate"):
        return share_of(values, seed=BOOTSTRAP_SEED)
    return bootstrap_mean(values, seed=BOOTSTRAP_SEED, lowest=0.0 if name == "heldout_log_loss" else -np.inf)


class Candidate(NamedTuple):
    """One setting: the mean of its values on the half that selects, and its estimate on the half that reports."""

    selecting: float
    reporting: Estimate


def selecting_half(prompt_ids: Iterable[int], seed: int = 0) -> set[int]:
    """The prompts that select: half of them (the smaller half), at random by the seed and the set of ids."""
    ids = np.array(sorted(set(prompt_ids)), dtype=np.int64)
    return {int(i) for i in ids[rng(seed, "selection").permutation(len(ids))[: len(ids) // 2]]}


def select(values: pd.DataFrame, reporting: Collection[int]) -> dict[str, Candidate]:
    """What every setting has on either half of the prompts; empty where a half holds none of them.

    Args:
        values: prompts by settings (larger is better), without gaps.
        reporting: the prompts of the half that reports; the others select.
    """
    half = values.index.isin(list(reporting))
    if half.all() or not half.any():
        return {}
    means = values[~half].mean()
    return {
        str(key): Candidate(float(means[key]), bootstrap_mean(values.loc[half, key].to_numpy(), seed=BOOTSTRAP_SEED))
        for key in values.columns
    }
