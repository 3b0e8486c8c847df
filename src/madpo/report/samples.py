"""Samples for a page's browser; three of them are also shown without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from madpo.report.results import Tier

SHOWN = 200  # prompts per tier at most; all are in the steps' samples.jsonl
CHARACTERS = 4_000_000  # of responses on a page; with many methods fewer prompts are shown
STATIC = 3


def browsed(
    methods: Sequence[str],
    facing: Sequence[int],
    rows: Iterable[Mapping[str, Any]],
    of: int,
    characters: int = CHARACTERS,
) -> dict[str, Any]:
    """What the browser needs.

    Args:
        methods: names; facing: places of the two that face each other at first.
        rows: per prompt its id, the prompt, and per method responses, rewards, and perhaps notes.
        of: how many prompts there are in all; no more than so many ``characters`` of responses are kept.
    """
    prompts: list[Mapping[str, Any]] = []
    for row in rows:
        characters -= sum(map(len, row["responses"]))
        if characters < 0 and len(prompts) >= STATIC:
            break
        prompts.append({**row, "rewards": [round(float(reward), 3) for reward in row["rewards"]]})
    return {"methods": list(methods), "baseline": list(facing), "prompts": prompts, "of": of}


def static(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first prompts, each with (method, reward, response), which the browser replaces."""
    return [
        {"prompt": p["prompt"], "answers": list(zip(entry["methods"], p["rewards"], p["responses"], strict=True))}
        for p in entry["prompts"][:STATIC]
    ]


def sample_data(tiers: Sequence[Tier]) -> dict[str, dict[str, Any]]:
    """Tier -> per prompt the first seed's first response of every method, in the order of the prompts."""
    given = [tier for tier in tiers if tier.samples["reward"].notna().any()]
    return {tier.label: _of_tier(tier, CHARACTERS // len(given)) for tier in given}


def _of_tier(tier: Tier, characters: int) -> dict[str, Any]:
    first = {row.key: row.seeds[0] for row in tier.rows if row.seeds}
    judged = tier.samples[tier.samples["reward"].notna()]
    of_first = judged[judged["seed"] == judged["key"].map(first)]
    of_first = of_first.drop_duplicates(["key", "prompt_id"])
    methods = [row for row in tier.rows if row.key in set(of_first["key"])]
    keys, names = [row.key for row in methods], [row.method for row in methods]
    of = of_first.groupby("prompt_id")["key"].nunique().eq(len(methods))
    texts = of_first.dropna(subset=["response"]).pivot(index="prompt_id", columns="key")
    shown = texts.dropna(subset=[("response", key) for key in keys]) if len(texts) else texts
    rows = (
        {"id": number, "prompt": str(line["prompt", keys[0]] or "")}
        | {"responses": [str(line["response", key]) for key in keys], "rewards": [line["reward", key] for key in keys]}
        for number, line in shown.iloc[:SHOWN].iterrows()
    )
    # MADPO and DPO face each other, where both are there.
    one = names.index("MADPO") if "MADPO" in names else len(names) - 1
    other = names.index("DPO") if "DPO" in names else 0
    facing = one, other if other != one else (0 if one else len(names) - 1)
    return browsed([row.name for row in methods], facing, rows, int(of.sum()), characters)
