"""From the records of a run to numbers that can be compared: per tier, the SFT model and every method.

Everything is paired by ``prompt_id``: all methods answered the same prompts. With several seeds a prompt's value is
its mean over the seeds, so intervals speak of prompts, and the values per seed stand beside them.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from madpo.errors import DataError
from madpo.records import Estimate, Metric, Record
from madpo.selection import BOOTSTRAP_SEED, selecting_half
from madpo.statistics import bootstrap_mean, paired_difference

SFT = "SFT"
TIERS = ("high", "medium", "low")  # the paper's order; other tiers follow in the order of the records
RESPONSE_DIGEST = "response_sha256"  # stands in samples whose texts were left out
MEASURED = ("oracle_reward", "kl", "tokens")
_EVALUATION = re.compile(r"evaluation/(?!sft/)(?P<tier>[^/]+)/(?P<method>[^/]+)/(?P<seed>[^/]+)")
# With several seeds these steps carry the seed's name, with one they do without.
_PER_SEED = r"{}/{}(?:/(?P<seed>[^/]+))?"

Value = Estimate | float | None


@dataclass(frozen=True)
class Row:
    """One line of a tier's table.

    Attributes:
        key: the method's name in the steps ("madpo_t7"); name: how it is shown.
        loss: the loss's settings, empty for SFT.
        seeds: names of the training seeds; per_seed: seed -> mean oracle reward.
        oracle_reward: the oracle's own unit; kl: summed nats per response against the reference; length: tokens;
            distinct_1, distinct_2: share of different words and word pairs; ended: share of responses with an end
            token; perplexity: of the responses under the reference; repeated: share of responses that another
            prompt got too;
            win_rate: share of prompts with a higher reward than SFT, ties count half.
        difference: paired difference of the reward to DPO; None for SFT and for DPO itself.
        group: the part of the study that the row belongs to, "" where the run names none.
        pairs, margins, trainer: what it was trained on ("all", "agreeing", "redrawn"; margins "in_sample" or
            "out_of_fold") and how ("offline", "rloo", ...). Where no loss trained it, ``loss`` has the trainer's
            settings.
        samples: per seed, prompt_id -> the prompt's first sample.
        rewards, kls: prompt_id -> mean over samples and seeds; only prompts that every seed answered.
        seed_rewards, seed_kls: the same of each seed alone.
    """

    key: str
    name: str
    loss: dict[str, Any]
    seeds: tuple[str, ...]
    per_seed: dict[str, float]
    oracle_reward: Value
    kl: Value
    length: Value
    distinct_2: Value
    ended: Value
    win_rate: Value
    difference: Estimate | None = None
    distinct_1: Value = None
    perplexity: Value = None
    repeated: Value = None
    group: str = ""
    pairs: str = "all"
    margins: str = "in_sample"
    trainer: str = "offline"
    samples: tuple[dict[int, dict[str, Any]], ...] = field(default=(), repr=False, compare=False)
    rewards: dict[int, float] = field(default_factory=dict, repr=False, compare=False)
    kls: dict[int, float] = field(default_factory=dict, repr=False, compare=False)
    seed_rewards: dict[str, dict[int, float]] = field(default_factory=dict, repr=False, compare=False)
    seed_kls: dict[str, dict[int, float]] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Tier:
    """A tier's methods, SFT first, and what its reward models say.

    ``reward_models`` go by seed ("" where there is one); ``margins`` (of the training pairs), ``heldout_margins``
    (those that measured the reward model), ``curves`` and ``reward_curve`` are those of the first seed.
    ``missing``: names of the experiment's methods that have no evaluation here.
    """

    name: str
    rows: list[Row]
    reward_models: dict[str, Record] = field(default_factory=dict)
    margins: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict, repr=False)
    heldout_margins: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    reward_curve: list[dict[str, float]] = field(default_factory=list, repr=False)
    missing: tuple[str, ...] = ()
    selection_seed: int = 0

    @cached_property
    def reporting(self) -> frozenset[int]:
        """The half of the held-out prompts that is reported where the other half has chosen among settings."""
        prompts = {i for row in self.rows for i in row.rewards}
        return frozenset(prompts - selecting_half(prompts, self.selection_seed))

    @property
    def label(self) -> str:
        """For people: "high" -> "High"."""
        return self.name.replace("_", " ").capitalize()

    @property
    def policies(self) -> list[Row]:
        """The rows but for SFT."""
        return [row for row in self.rows if row.name != SFT]

    @property
    def seeds(self) -> tuple[str, ...]:
        """Training seeds that some policy of the tier has."""
        return tuple(sorted({seed for row in self.policies for seed in row.seeds}))

    @property
    def uneven(self) -> bool:
        """Whether policies of the tier have unlike seeds, so that the means of two need not compare."""
        return any(set(row.seeds) != set(self.seeds) for row in self.policies)

    @property
    def baseline(self) -> Row | None:
        """Plain DPO, which differences refer to."""
        plain = [row for row in self.rows if row.loss.get("kind", row.key) == "dpo" and row.pairs == "all"]
        first = [row for row in plain if row.group in ("", "core")]
        return next((row for row in plain if row.key == "dpo"), next(iter([*first, *plain]), None))


def collect(
    root: Path,
    records: Mapping[str, Record],
    rows: Iterable[Mapping[str, Any]] = (),
    selection_seed: int = 0,
    tiers: Iterable[str] = (),
) -> list[Tier]:
    """Everything that the report shows, per tier. Tiers without an evaluated policy still show their margins.

    Args:
        root: the folder of the run.
        records: finished records by step name.
        rows: the experiment's methods with their groups, those that are not run yet among them.
        selection_seed: which half of the held-out prompts chooses.
        tiers: the experiment's tiers, those of which nothing is finished among them.
    """
    planned = {str(row["name"]): row for row in rows}
    sft = _by_seed(records, "evaluation", "sft")
    sft_row = _row(SFT.lower(), SFT, {}, {}, sft, root, None) if sft else None
    names = [m["tier"] for name in records if (m := _EVALUATION.fullmatch(name))]
    names += [name.split("/")[1] for name in records if name.startswith(("margins/", "reward_model/"))]
    names += tiers if records else ()
    order = sorted(dict.fromkeys(names), key=lambda name: TIERS.index(name) if name in TIERS else len(TIERS))
    found = (_tier(name, root, records, sft_row, planned) for name in order)
    return [replace(tier, selection_seed=selection_seed) for tier in found]


def _by_seed(records: Mapping[str, Record], kind: str, name: str) -> dict[str, Record]:
    pattern = re.compile(_PER_SEED.format(kind, re.escape(name)))
    return {m["seed"] or "": record for key, record in records.items() if (m := pattern.fullmatch(key))}


def _tier(
    name: str, root: Path, records: Mapping[str, Record], sft_row: Row | None, planned: Mapping[str, Any]
) -> Tier:
    groups: dict[str, dict[str, Record]] = {}
    for record in records.values():
        match = _EVALUATION.fullmatch(record.name)
        if match and match["tier"] == name:
            groups.setdefault(match["method"], {})[match["seed"]] = record
    rows = [] if sft_row is None else [sft_row]
    curves = {}
    for key, by_seed in groups.items():
        policy = next((p for seed in by_seed if (p := records.get(f"policy/{name}/{key}/{seed}"))), None)
        shown = _shown_name(key, [policy, *by_seed.values()])
        method = planned.get(shown, {})
        loss = (policy.config.get("loss") if policy else None) or _settings(method)
        rows.append(_row(key, shown, loss, method, by_seed, root, sft_row))
        if policy is not None:
            curves[shown] = _log(folder_of(root, policy) / "log.jsonl")
    place = {shown: position for position, shown in enumerate(planned)}
    rows.sort(key=lambda row: place.get(row.name, -1 if row.name == SFT else len(place)))  # as in the experiment
    reward_models = _by_seed(records, "reward_model", name)
    first = next(iter(reward_models.values()), None)
    tier = Tier(
        name,
        rows,
        reward_models,
        _margins(name, root, records),
        {row.name: curves[row.name] for row in rows if row.name in curves},
        heldout_margins=_heldout(root, first),
        reward_curve=_log(folder_of(root, first) / "log.jsonl") if first else [],
        missing=tuple(
            shown
            for shown, method in planned.items()
            if shown not in {row.name for row in rows} and name in (method.get("tiers") or (name,))
        ),
    )
    return replace(tier, rows=_with_differences(tier))


def _settings(method: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of a method, or what its trainer has in the place of one."""
    if method.get("loss"):
        return dict(method["loss"])
    online = method.get("online") or {}
    given = {"kind": method.get("trainer"), "beta": online.get("beta"), "n": method.get("n")}
    return {name: value for name, value in given.items() if value is not None}


def planned_row(method: Mapping[str, Any]) -> Row:
    """A method of an experiment as a row without results."""
    return _row(str(method.get("key", "")), str(method["name"]), _settings(method), dict(method), {}, Path(), None)


def folder_of(root: Path, record: Record) -> Path:
    """Where a record's step worked."""
    return root / f"{record.name}-{record.identity[:8]}"


def _shown_name(key: str, records: Iterable[Record | None]) -> str:
    return next((str(r.config["method"]) for r in records if r is not None and r.config.get("method")), key)


def _row(
    key: str,
    name: str,
    loss: dict[str, Any],
    method: Mapping[str, Any],
    by_seed: dict[str, Record],
    root: Path,
    sft: Row | None,
) -> Row:
    answers = {seed: _samples(folder_of(root, record) / "samples.jsonl") for seed, record in by_seed.items()}
    metrics = [record.metrics for record in by_seed.values()]
    per_seed = {column: {seed: _per_prompt(a, column) for seed, a in answers.items()} for column in MEASURED}
    per_prompt = {column: _mean_over_seeds(list(values.values())) for column, values in per_seed.items()}
    rewards = per_seed["oracle_reward"]
    return Row(
        key=key,
        name=name,
        loss=loss,
        seeds=tuple(by_seed),
        per_seed={seed: _mean(record.metrics.get("oracle_reward")) for seed, record in by_seed.items()},
        oracle_reward=_estimate(per_prompt["oracle_reward"]) or _over_seeds(metrics, "oracle_reward"),
        kl=_estimate(per_prompt["kl"]) or _over_seeds(metrics, "kl"),
        length=_estimate(per_prompt["tokens"]) or _over_seeds(metrics, "length"),
        distinct_1=_over_seeds(metrics, "distinct_1"),
        distinct_2=_over_seeds(metrics, "distinct_2"),
        ended=_over_seeds(metrics, "ended_share"),
        perplexity=_over_seeds(metrics, "reference_perplexity"),
        repeated=_repeated(answers.values()),
        win_rate=_win_rate(rewards, sft),
        group=str(method.get("group", "")),
        pairs=str(method.get("pairs", "all")),
        margins=str(method.get("margins", "in_sample")),
        trainer=str(method.get("trainer", "offline")),
        samples=tuple({i: rows[0] for i, rows in a.items()} for a in answers.values()),
        rewards=per_prompt["oracle_reward"],
        kls=per_prompt["kl"],
        seed_rewards=rewards,
        seed_kls=per_seed["kl"],
    )


def _win_rate(rewards: Mapping[str, dict[int, float]], sft: Row | None) -> Estimate | None:
    if sft is None or not sft.rewards:
        return None
    # The SFT model's answers of the same seed, where it has them: they share the random numbers.
    won = []
    for seed, values in rewards.items():
        base = sft.seed_rewards.get(seed) or sft.rewards
        won.append({i: float(np.sign(value - base[i]) / 2 + 0.5) for i, value in values.items() if i in base})
    return _estimate(_mean_over_seeds(won))


def response_digest(row: Mapping[str, Any]) -> str:
    """What tells a sample's response from others: of its text, or written in the place of it; "" where neither is."""
    if "response" in row:
        return hashlib.sha256(str(row["response"]).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return str(row.get(RESPONSE_DIGEST, ""))


def _repeated(answers: Iterable[dict[int, list[dict[str, Any]]]]) -> float | None:
    """Share of a seed's responses that stand there more than once, word for word, mean over seeds."""
    shares = []
    for by_prompt in answers:
        texts = [found for rows in by_prompt.values() for row in rows if (found := response_digest(row))]
        if texts:
            counts = Counter(texts)
            shares.append(sum(n for n in counts.values() if n > 1) / len(texts))
    return float(np.mean(shares)) if shares else None


def over_shared_seeds(rows: Sequence[Row], *, kls: bool = False) -> list[dict[int, float]]:
    """Prompt id -> reward (or KL) of every row, as the mean over the training seeds that all of them have.

    A row of two seeds less one of the first seed alone would mix the seeds' difference into the methods'. Where no
    seed is common, or samples are not kept by seed, it is each row's own mean.
    """
    shared = shared_seeds(rows)
    if not shared or all(set(row.seed_rewards) == set(shared) for row in rows):
        return [row.kls if kls else row.rewards for row in rows]
    per_seed = [row.seed_kls if kls else row.seed_rewards for row in rows]
    return [_mean_over_seeds([values[seed] for seed in shared]) for values in per_seed]


def at_shared_seeds(rows: Sequence[Row]) -> list[Row]:
    """The rows with reward and KL over the training seeds that all of them have, so that their levels compare.

    Means over unlike seeds differ by what the seeds differ in. Where all rows have the same seeds, or none in common,
    they stay as they are.
    """
    shared = shared_seeds(rows)
    if not shared or all(set(row.seed_rewards) == set(shared) for row in rows):
        return list(rows)
    rewards, kls = over_shared_seeds(rows), over_shared_seeds(rows, kls=True)
    return [
        replace(
            row,
            seeds=tuple(shared),
            per_seed={seed: row.per_seed[seed] for seed in shared},
            oracle_reward=_estimate(own) or row.oracle_reward,
            kl=_estimate(far) or row.kl,
            rewards=own,
            kls=far,
            seed_rewards={seed: row.seed_rewards[seed] for seed in shared},
            seed_kls={seed: row.seed_kls[seed] for seed in shared},
        )
        for row, own, far in zip(rows, rewards, kls, strict=True)
    ]


def shared_seeds(rows: Sequence[Row]) -> list[str]:
    """Training seeds that all rows have samples of."""
    return sorted(set.intersection(*(set(row.seed_rewards) for row in rows))) if rows else []


def _with_differences(tier: Tier) -> list[Row]:
    baseline = tier.baseline
    if baseline is None:
        return tier.rows
    rows = []
    for row in tier.rows:
        own, base = over_shared_seeds([row, baseline])
        shared = sorted(own.keys() & base.keys())
        if row is baseline or row.name == SFT or len(shared) < 2:
            rows.append(row)
            continue
        pair = (np.array([own[i] for i in shared]), np.array([base[i] for i in shared]))
        rows.append(replace(row, difference=paired_difference(*pair, seed=BOOTSTRAP_SEED)))
    return rows


def _per_prompt(answers: Mapping[int, list[dict[str, Any]]], column: str) -> dict[int, float]:
    found = {i: [float(row[column]) for row in rows if column in row] for i, rows in answers.items()}
    return {i: float(np.mean(values)) for i, values in found.items() if values}


def _mean_over_seeds(per_seed: list[dict[int, float]]) -> dict[int, float]:
    # A prompt counts only where every seed answered it: otherwise seeds would weigh differently per prompt.
    if not per_seed:
        return {}
    shared = set.intersection(*(set(values) for values in per_seed))
    return {i: float(np.mean([values[i] for values in per_seed])) for i in sorted(shared)}


def _estimate(per_prompt: dict[int, float]) -> Estimate | None:
    return bootstrap_mean(np.array(list(per_prompt.values())), seed=BOOTSTRAP_SEED) if len(per_prompt) > 1 else None


def _over_seeds(metrics: list[dict[str, Metric]], name: str) -> Value:
    values = [m[name] for m in metrics if name in m]
    if not values:
        return None
    if len(values) == 1 and isinstance(values[0], Estimate):
        return values[0]
    return float(np.mean([_mean(value) for value in values]))


def _mean(value: Metric | None) -> float:
    return float("nan") if value is None else float(value.mean if isinstance(value, Estimate) else value)


def _samples(path: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in _json_lines(path, ("prompt_id", "oracle_reward")):
        found.setdefault(int(row["prompt_id"]), []).append(row)
    return found


def _log(path: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items() if isinstance(v, int | float)} for row in _json_lines(path, ("step",))]


def _json_lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or any(name not in row for name in needed):
                raise ValueError(f"{', '.join(needed)} must be there")
        except ValueError as error:
            raise DataError(f"{path} row {number}: {error}; delete the step's folder and run again") from None
        rows.append(row)
    return rows


def _margins(tier: str, root: Path, records: Mapping[str, Record]) -> np.ndarray:
    """Margins of the tier's training pairs (of all pairs where the split is not known)."""
    record = next(iter(_by_seed(records, "margins", tier).values()), None)
    if record is None or not (path := folder_of(root, record) / "margins.parquet").exists():
        return np.empty(0)
    table = pq.read_table(path)
    ids, margins = table["pair_id"].to_pylist(), table["reward_margin"].to_numpy()
    for upstream in records.values():
        pairs = folder_of(root, upstream) / "pairs.parquet"
        if upstream.identity in record.inputs.values() and pairs.exists():
            train = set(
                pq.read_table(pairs, columns=["pair_id"], filters=[("split", "==", "train")])["pair_id"].to_pylist()
            )
            margins = margins[[i in train for i in ids]]
            break
    return np.asarray(margins[np.isfinite(margins)], dtype=float)


def _heldout(root: Path, reward_model: Record | None) -> np.ndarray:
    """Margins of the held-out pairs that measured the reward model, chosen less rejected."""
    if reward_model is None or not (path := folder_of(root, reward_model) / "margins.parquet").exists():
        return np.empty(0)
    margins: np.ndarray = np.asarray(pq.read_table(path)["reward_margin"].to_numpy(), dtype=float)
    return np.asarray(margins[np.isfinite(margins)])
