"""The samples of a run for the page's browser, joined on the prompt, and three of them for who has no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from madpo.report.families import family_of
from madpo.report.markup import nothing
from madpo.results import Row, Tier
from madpo.summary import one

SHOWN = 200  # prompts per tier at most; all are in the steps' samples.jsonl
CHARACTERS = 4_000_000  # of responses on a page; with many methods fewer prompts are shown
STATIC = 3


def sample_data(tiers: Sequence[Tier]) -> dict[str, Any]:
    """Tier -> what its browser needs."""
    given = [tier for tier in tiers if any(row.samples for row in tier.rows)]
    return {tier.label: tier_samples(tier, CHARACTERS // len(given)) for tier in given}


def tier_samples(tier: Tier, characters: int = CHARACTERS) -> dict[str, Any]:
    """Per prompt the first seed's first response of every method."""
    methods = [row for row in tier.rows if row.samples and row.samples[0]]
    shared = sorted(set.intersection(*(set(row.samples[0]) for row in methods))) if methods else []
    prompts: list[dict[str, Any]] = []
    with_text = [i for i in shared if all("response" in row.samples[0][i] for row in methods)]
    for i in with_text[:SHOWN]:
        of_prompt = [row.samples[0][i] for row in methods]
        responses = [str(sample.get("response", "")) for sample in of_prompt]
        characters -= sum(map(len, responses))
        if characters < 0 and len(prompts) >= STATIC:
            break
        rewards = [round(float(sample["oracle_reward"]), 3) for sample in of_prompt]
        prompt = str(of_prompt[0].get("prompt", ""))
        prompts.append({"id": i, "prompt": prompt, "responses": responses, "rewards": rewards})
    return {
        "methods": [row.name for row in methods],
        "baseline": _position(methods),
        "prompts": prompts,
        "of": len(shared),
    }


def _position(methods: Sequence[Row]) -> list[int]:
    """Which two methods face each other at first: MADPO and DPO where both are there."""
    families = [family_of(row) for row in methods]
    last = len(families) - 1
    first = families.index("MADPO") if "MADPO" in families else last
    second = families.index("DPO") if "DPO" in families else 0
    return [first, second if second != first else (0 if first else last)]


def static_samples(tiers: Sequence[Tier]) -> str:
    """A few cards of the first tier, which the browser replaces."""
    for tier in tiers[:1]:
        data = tier_samples(tier)
        cards = [_card(data["methods"], prompt) for prompt in data["prompts"][:STATIC]]
        if cards:
            return "".join(cards)
    return nothing("There are no samples.")


def _card(methods: Sequence[str], prompt: dict[str, Any]) -> str:
    answers = "".join(
        f'<div class="answer"><h4 dir="auto">{escape(name)} <span>{one(reward)}</span></h4>'
        f'<p dir="auto">{escape(response)}</p></div>'
        for name, response, reward in zip(methods, prompt["responses"], prompt["rewards"], strict=True)
    )
    return f'<article class="card"><p class="prompt" dir="auto">{escape(prompt["prompt"])}</p>{answers}</article>'
