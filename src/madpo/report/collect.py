"""From the records of a run to its tiers: which steps belong to which method, tier and training seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from madpo.core.columns import MARGIN
from madpo.core.metrics import Estimate, Metric
from madpo.report.methods import SFT, method_of, rate_words, spread
from madpo.report.results import MEASURED, Row, Tier, Value, measured
from madpo.report.sources import MEASURES, Sources
from madpo.runner.record import Record

TIERS = ("high", "medium", "low")  # the paper's order; other tiers follow in the order of the records
_EVALUATION = re.compile(r"(?:evaluation|heldout)/(?!sft/)(?P<tier>[^/]+)/(?P<method>[^/]+)/(?P<seed>[^/]+)")
# With several seeds these steps carry the seed's name, with one they do without.
_PER_SEED = r"{}/{}(?:/(?P<seed>[^/]+))?"
METRICS = {
    "distinct_1": "distinct_1",
    "distinct_2": "distinct_2",
    "ended": "ended_share",
    "perplexity": "reference_perplexity",
}


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

    Raises:
        DataError: a damaged file of a step, with its row.
    """
    planned = {str(row["name"]): row for row in rows}
    evaluations = {record.name: record for record in records.values() if record.name.startswith(MEASURES)}
    sources = Sources(root)
    samples = sources.samples(evaluations.values())
    names = [m["tier"] for name in evaluations if (m := _EVALUATION.fullmatch(name))]
    names += [name.split("/")[1] for name in records if name.startswith(("margins/", "reward_model/"))]
    names += tiers if records else ()
    order = sorted(dict.fromkeys(names), key=lambda name: TIERS.index(name) if name in TIERS else len(TIERS))
    return [_tier(name, sources, records, samples, planned, selection_seed) for name in order]


def _by_seed(records: Mapping[str, Record], kind: str, name: str) -> dict[str, Record]:
    pattern = re.compile(_PER_SEED.format(kind, re.escape(name)))
    return {m["seed"] or "": record for key, record in records.items() if (m := pattern.fullmatch(key))}


def _tier(
    name: str,
    sources: Sources,
    records: Mapping[str, Record],
    samples: pd.DataFrame,
    planned: Mapping[str, Mapping[str, Any]],
    selection_seed: int,
) -> Tier:
    groups: dict[str, dict[str, Record]] = {}
    if sft := _by_seed(records, "evaluation", "sft"):
        groups[SFT.lower()] = sft
    steps = {record.name: (SFT.lower(), seed) for seed, record in sft.items()}
    for record in records.values():
        match = _EVALUATION.fullmatch(record.name)
        if match and match["tier"] == name:
            key, seed = steps[record.name] = match["method"], match["seed"]
            other = groups.setdefault(key, {}).get(seed)  # of held-out pairs, where this is of responses
            metrics = record.metrics if other is None else {**other.metrics, **record.metrics}
            groups[key][seed] = record.model_copy(update={"metrics": metrics})
    rows, curves = [], []
    for key, by_seed in groups.items():
        policy = next((p for seed in by_seed if (p := records.get(f"policy/{name}/{key}/{seed}"))), None)
        row = _described(key, policy, by_seed, planned)
        rows.append(replace(row, values=_metrics(row, by_seed)))
        if policy is not None:
            curves.append(sources.log(policy).assign(name=row.name))
    places = {shown: position for position, shown in enumerate(planned)}
    rows.sort(key=lambda row: places.get(row.name, -1 if row.method == SFT else len(places)))  # as in the experiment
    own = samples[samples["step"].isin(list(steps))]
    own = own.assign(**{n: own["step"].map({s: place[i] for s, place in steps.items()}) for i, n in enumerate(_PLACE)})
    swept = own["temperature"].notna()
    models = _by_seed(records, "reward_model", name)
    first = next(iter(models.values()), None)
    margins = next(iter(_by_seed(records, "margins", name).values()), None)
    shown = {row.name for row in rows}
    return measured(
        Tier(
            name,
            rows,
            own[~swept],
            models,
            margins=_finite(sources.margins(margins, records), train=True)[MARGIN].to_numpy()
            if margins
            else np.empty(0),
            heldout_margins=_finite(sources.margins(first, records)) if first else pd.DataFrame(),
            curves=pd.concat(curves) if curves else pd.DataFrame({"name": []}),
            reward_curve=sources.log(first) if first else pd.DataFrame(),
            missing=tuple(n for n, m in planned.items() if n not in shown and name in (m.get("tiers") or (name,))),
            selection_seed=selection_seed,
            sweep=own[swept],
            probes=_by_seed(records, "probe", name),
        )
    )


_PLACE = ("key", "seed")


def _finite(margins: pd.DataFrame, *, train: bool = False) -> pd.DataFrame:
    """The finite margins; with ``train`` those of training pairs, or all where the split is not known."""
    known = margins[margins["train"].fillna(True).astype(bool)] if train else margins
    found: pd.DataFrame = known[np.isfinite(known[MARGIN].astype(float))]
    return found


def _described(
    key: str, policy: Record | None, by_seed: Mapping[str, Record], planned: Mapping[str, Mapping[str, Any]]
) -> Row:
    if key == SFT.lower():
        name = str(next(iter(by_seed.values())).config.get("method", SFT))
        return Row(key, name, SFT, {}, seeds=tuple(by_seed), per_seed=_rewards(by_seed))
    given = [r for r in (policy, *by_seed.values()) if r is not None]
    name = next((str(r.config["method"]) for r in given if r.config.get("method")), key)
    row = planned_row({**planned.get(name, {}), "name": name, "key": key})
    if policy is not None and (loss := spread(policy.config.get("loss") or {})):
        method = method_of(key, name, loss, row.pairs, row.margins, row.trainer)
        row = replace(row, loss=loss, method=method + rate_words(row.learning_rate))
    return replace(row, seeds=tuple(by_seed), per_seed=_rewards(by_seed))


def planned_row(method: Mapping[str, Any]) -> Row:
    """A method of an experiment as a row without results."""
    online = method.get("auto") or method.get("online") or {}
    trained = {"kind": method.get("trainer"), "beta": online.get("beta"), "n": method.get("n")}
    trained |= {"label_share": online.get("label_share")}
    loss = spread(method.get("loss") or {name: value for name, value in trained.items() if value is not None})
    key, name = str(method.get("key", "")), str(method["name"])
    texts = ("pairs", "all"), ("margins", "in_sample"), ("trainer", "offline")
    pairs, margins, trainer = (str(method.get(what, default)) for what, default in texts)
    rate = method.get("learning_rate")
    shown = method_of(key, name, loss, pairs, margins, trainer) + rate_words(rate)
    return Row(key, name, shown, loss, str(method.get("group", "")), pairs, margins, trainer, rate)


def _rewards(by_seed: Mapping[str, Record]) -> dict[str, float]:
    given = {seed: record.metrics.get("oracle_reward") for seed, record in by_seed.items()}
    return {seed: _plain(reward) for seed, reward in given.items() if reward is not None}


def _metrics(row: Row, by_seed: Mapping[str, Record]) -> dict[str, Value]:
    wanted = METRICS | {name: metric for name, (_, metric) in MEASURED.items()}
    found: dict[str, Value] = {}
    for name, metric in wanted.items():
        values = [record.metrics[metric] for record in by_seed.values() if metric in record.metrics]
        if len(values) == 1 and isinstance(values[0], Estimate):
            found[name] = values[0]
        elif values:
            found[name] = float(np.mean([_plain(value) for value in values]))
    return found


def _plain(value: Metric | None) -> float:
    return float("nan") if value is None else float(value.mean if isinstance(value, Estimate) else value)
