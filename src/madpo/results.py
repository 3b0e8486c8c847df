"""From the records of a run to numbers that can be compared: per tier, the SFT model and every method.

Everything is paired by ``prompt_id``: all methods answered the same prompts. With several seeds a prompt's value is
its mean over the seeds, so intervals speak of prompts, and the values per seed stand beside them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from madpo.errors import DataError
from madpo.records import Estimate, Metric, Record
from madpo.statistics import bootstrap_mean, paired_difference

SFT = "SFT"
TIERS = ("high", "medium", "low")  # the paper's order; other tiers follow in the order of the records
SEED = 0  # of the bootstrap draws: the same records give the same page
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
            distinct_2: share of different word pairs; ended: share of responses with an end token;
            win_rate: share of prompts with a higher reward than SFT, ties count half.
        difference: paired difference of the reward to DPO; None for SFT and for DPO itself.
        samples: per seed, prompt_id -> sample.
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
    samples: tuple[dict[int, dict[str, Any]], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Tier:
    """A tier's methods, SFT first, and what its reward models say.

    ``reward_models`` go by seed ("" where there is one); ``margins`` and ``curves`` are those of the first seed.
    """

    name: str
    rows: list[Row]
    reward_models: dict[str, Record] = field(default_factory=dict)
    margins: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """For people: "high" -> "High"."""
        return self.name.replace("_", " ").capitalize()

    @property
    def baseline(self) -> Row | None:
        """Plain DPO, which differences refer to."""
        plain = [row for row in self.rows if row.loss.get("kind", row.key) == "dpo"]
        return next((row for row in plain if row.key == "dpo"), plain[0] if plain else None)


def collect(root: Path, records: Mapping[str, Record]) -> list[Tier]:
    """Everything that the report shows, per tier. Tiers without an evaluated policy still show their margins."""
    sft = _by_seed(records, "evaluation", "sft")
    sft_row = _row(SFT.lower(), SFT, {}, sft, root, None) if sft else None
    names = [m["tier"] for name in records if (m := _EVALUATION.fullmatch(name))]
    names += [name.split("/")[1] for name in records if name.startswith(("margins/", "reward_model/"))]
    order = sorted(dict.fromkeys(names), key=lambda name: TIERS.index(name) if name in TIERS else len(TIERS))
    return [_tier(name, root, records, sft_row) for name in order]


def _by_seed(records: Mapping[str, Record], kind: str, name: str) -> dict[str, Record]:
    pattern = re.compile(_PER_SEED.format(kind, re.escape(name)))
    return {m["seed"] or "": record for key, record in records.items() if (m := pattern.fullmatch(key))}


def _tier(name: str, root: Path, records: Mapping[str, Record], sft_row: Row | None) -> Tier:
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
        rows.append(_row(key, shown, policy.config.get("loss", {}) if policy else {}, by_seed, root, sft_row))
        if policy is not None:
            curves[shown] = _log(folder_of(root, policy) / "log.jsonl")
    tier = Tier(name, rows, _by_seed(records, "reward_model", name), _margins(name, root, records), curves)
    return replace(tier, rows=_with_differences(tier))


def folder_of(root: Path, record: Record) -> Path:
    """Where a record's step worked."""
    return root / f"{record.name}-{record.identity[:8]}"


def _shown_name(key: str, records: Iterable[Record | None]) -> str:
    return next((str(r.config["method"]) for r in records if r is not None and r.config.get("method")), key)


def _row(key: str, name: str, loss: dict[str, Any], by_seed: dict[str, Record], root: Path, sft: Row | None) -> Row:
    samples = tuple(_samples(folder_of(root, record) / "samples.jsonl") for record in by_seed.values())
    metrics = [record.metrics for record in by_seed.values()]
    per_prompt = {column: _per_prompt(samples, column) for column in ("oracle_reward", "kl", "tokens")}
    win_rate = None
    if sft is not None and sft.samples and samples:
        # The SFT model's answers of the same seed, where it has them: they share the random numbers.
        own = dict(zip(sft.seeds, sft.samples, strict=True))
        base = [_per_prompt([own[seed]] if seed in own else sft.samples, "oracle_reward") for seed in by_seed]
        won = [
            {i: float(np.sign(v["oracle_reward"] - b[i]) / 2 + 0.5) for i, v in sample.items() if i in b}
            for sample, b in zip(samples, base, strict=True)
        ]
        win_rate = _estimate(_mean_over_seeds(won))
    return Row(
        key=key,
        name=name,
        loss=loss,
        seeds=tuple(by_seed),
        per_seed={seed: _mean(record.metrics.get("oracle_reward")) for seed, record in by_seed.items()},
        oracle_reward=_estimate(per_prompt["oracle_reward"]) or _over_seeds(metrics, "oracle_reward"),
        kl=_estimate(per_prompt["kl"]) or _over_seeds(metrics, "kl"),
        length=_estimate(per_prompt["tokens"]) or _over_seeds(metrics, "length"),
        distinct_2=_over_seeds(metrics, "distinct_2"),
        ended=_over_seeds(metrics, "ended_share"),
        win_rate=win_rate,
        samples=samples,
    )


def _with_differences(tier: Tier) -> list[Row]:
    baseline = tier.baseline
    if baseline is None:
        return tier.rows
    base = _per_prompt(baseline.samples, "oracle_reward")
    rows = []
    for row in tier.rows:
        own = _per_prompt(row.samples, "oracle_reward")
        shared = sorted(own.keys() & base.keys())
        if row is baseline or row.name == SFT or len(shared) < 2:
            rows.append(row)
            continue
        pair = (np.array([own[i] for i in shared]), np.array([base[i] for i in shared]))
        rows.append(replace(row, difference=paired_difference(*pair, seed=SEED)))
    return rows


def _per_prompt(samples: Iterable[dict[int, dict[str, Any]]], column: str) -> dict[int, float]:
    return _mean_over_seeds([{i: float(v[column]) for i, v in s.items() if column in v} for s in samples])


def _mean_over_seeds(per_seed: list[dict[int, float]]) -> dict[int, float]:
    # A prompt counts only where every seed answered it: otherwise seeds would weigh differently per prompt.
    if not per_seed:
        return {}
    shared = set.intersection(*(set(values) for values in per_seed))
    return {i: float(np.mean([values[i] for values in per_seed])) for i in sorted(shared)}


def _estimate(per_prompt: dict[int, float]) -> Estimate | None:
    return bootstrap_mean(np.array(list(per_prompt.values())), seed=SEED) if len(per_prompt) > 1 else None


def _over_seeds(metrics: list[dict[str, Metric]], name: str) -> Value:
    values = [m[name] for m in metrics if name in m]
    if not values:
        return None
    if len(values) == 1 and isinstance(values[0], Estimate):
        return values[0]
    return float(np.mean([_mean(value) for value in values]))


def _mean(value: Metric | None) -> float:
    return float("nan") if value is None else float(value.mean if isinstance(value, Estimate) else value)


def _samples(path: Path) -> dict[int, dict[str, Any]]:
    return {int(row["prompt_id"]): row for row in _json_lines(path, ("prompt_id", "oracle_reward"))}


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
