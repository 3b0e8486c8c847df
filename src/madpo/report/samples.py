"""The samples of a run for the page's browser, joined on the prompt; three of them are shown without scripts, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from madpo.report.results import Row, Tier

SHOWN = 200  # prompts per tier at most; all are in the steps' samples.jsonl
CHARACTERS = 4_000_000  # of responses on a page; with many methods fewer prompts are shown
STATIC = 3


def sample_data(tiers: Sequence[Tier]) -> dict[str, Any]:
    """Tier -> what its browser needs."""
    given = [tier for tier in tiers if len(tier.samples)]
    return {tier.label: tier_samples(tier, CHARACTERS // len(given)) for tier in given}


def tier_samples(tier: Tier, characters: int = CHARACTERS) -> dict[str, Any]:
    """Per prompt the first seed's first response of every method, in the order of the prompts."""
    first = {row.key: row.seeds[0] for row in tier.rows if row.seeds}
    of_first = tier.samples[tier.samples["seed"] == tier.samples["key"].map(first)]
    of_first = of_first.drop_duplicates(["key", "prompt_id"])
    answered = set(of_first["key"])
    methods = [row for row in tier.rows if row.key in answered]
    of = of_first.groupby("prompt_id")["key"].nunique().eq(len(methods))
    texts = of_first.dropna(subset=["response"]).pivot(index="prompt_id", columns="key")
    prompts: list[dict[str, Any]] = []
    keys = [row.key for row in methods]
    shown = texts.dropna(subset=[("response", key) for key in keys]) if len(texts) else texts
    for number, line in shown.iloc[:SHOWN].iterrows():
        responses = [str(line["response", key]) for key in keys]
        characters -= sum(map(len, responses))
        if characters < 0 and len(prompts) >= STATIC:
            break
        rewards = [round(float(line["reward", key]), 3) for key in keys]
        prompt = str(line["prompt", keys[0]] or "")
        prompts.append({"id": number, "prompt": prompt, "responses": responses, "rewards": rewards})
    return {
        "methods": [row.name for row in methods],
        "baseline": _position(methods),
        "prompts": prompts,
        "of": int(of.sum()),
    }


def _position(methods: Sequence[Row]) -> list[int]:
    """Which two methods face each other at first: MADPO and DPO where both are there."""
    names = [row.method for row in methods]
    last = len(names) - 1
    first = names.index("MADPO") if "MADPO" in names else last
    second = names.index("DPO") if "DPO" in names else 0
    return [first, second if second != first else (0 if first else last)]


def static_samples(tiers: Sequence[Tier]) -> list[dict[str, Any]]:
    """A few prompts of the first tier, each with its responses, which the browser of the page replaces."""
    for tier in tiers[:1]:
        data = tier_samples(tier)
        return static(data["methods"], data["prompts"])
    return []


def static(methods: Sequence[str], prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts, each with (method, reward, response)."""
    return [
        {"prompt": p["prompt"], "answers": list(zip(methods, p["rewards"], p["responses"], strict=True))}
        for p in prompts[:STATIC]
    ]
