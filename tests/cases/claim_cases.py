"""Rows of made-up studies whose means are known exactly, as the long table of their samples."""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from madpo.core.seeding import rng
from madpo.report.claims import Claim
from madpo.report.methods import SFT, method_of, rate_words
from madpo.report.results import Row, Tier, measured
from madpo.report.summary import opening, verdict

N = 200
PROMPT = rng(0, "prompts").normal(size=N)  # what makes a prompt easy, common to all methods


class Made(NamedTuple):
    """A row and its samples."""

    row: Row
    samples: pd.DataFrame


def row(
    name: str,
    level: float,
    *,
    kl: float = 5.0,
    noise: float = 0.2,
    seeds: int = 2,
    learning_rate: float | None = None,
    **settings: Any,
) -> Made:
    """A row whose mean reward is exactly ``level`` in every seed, and whose noise of its own is small."""
    places = {"group": "core", "pairs": "all", "margins": "in_sample", "trainer": "offline"}
    given = {place: settings.pop(place, default) for place, default in places.items()}
    key, loss = re.sub(r"[^a-z0-9]+", "-", name.lower()), {"beta": 0.1, **settings}
    frames = []
    for seed in range(seeds):
        own = rng(seed, "noise", name, str(level)).normal(size=N) * noise
        rewards = level + (PROMPT - PROMPT.mean()) + own - own.mean()
        frames.append(samples(key, f"seed{seed}", rewards, kl + 0.1 * PROMPT))
    method = SFT if name == SFT else method_of(key, name, loss, given["pairs"], given["margins"], given["trainer"])
    method += rate_words(learning_rate)
    given["learning_rate"] = learning_rate
    names = tuple(f"seed{seed}" for seed in range(seeds))
    values = {"distinct_2": 0.8, "ended": 0.1, "perplexity": 10.0}
    per_seed = dict.fromkeys(names, level)
    return Made(Row(key, name, method, loss, **given, seeds=names, per_seed=per_seed, values=values), pd.concat(frames))


def samples(key: str, seed: str, rewards: np.ndarray, kls: np.ndarray, sample: int = 0) -> pd.DataFrame:
    """Lines of the long table: one response to each prompt, all of different texts."""
    n = np.arange(len(rewards))
    columns = {"key": key, "seed": seed, "prompt_id": n, "sample": sample, "reward": rewards, "kl": kls}
    return pd.DataFrame(
        columns | {"tokens": 40.0, "text": pd.Series(n, dtype="Int64"), "prompt": None, "response": None}
    )


def in_second_seed(given: Made, reward: float = 0.0, kl: float = 0.0) -> Made:
    """The row with rewards and KLs that are larger in its second seed by so much."""
    second = given.samples["seed"] == "seed1"
    return given._replace(samples=given.samples.assign(
        reward=given.samples["reward"] + second * reward, kl=given.samples["kl"] + second * kl
    ))  # fmt: skip


def like(given: Made, other: Made) -> Made:
    """The row with the samples of another one, of the seeds that it has."""
    own = other.samples[other.samples["seed"].isin(given.row.seeds)]
    return given._replace(samples=own.assign(key=given.row.key))


def tier_of(name: str, made: list[Made], **more: Any) -> Tier:
    """A tier of such rows, measured as one that was read from a run."""
    table = pd.concat([one.samples for one in made]) if made else row("none", 0.0).samples.iloc[:0]
    return measured(Tier(name, [one.row for one in made], table, curves=pd.DataFrame({"name": []}), **more))


def without(tier: Tier, *names: str) -> Tier:
    """The tier without some of its rows."""
    return replace(tier, rows=[row for row in tier.rows if row.name not in names])


def madpo(tau: float, c: float, level: float, part: str = "full", **more: Any) -> Made:
    name = f"{ {'full': 'MADPO', 'amplify': 'Amp-Only', 'dampen': 'Reg-Only'}[part] } τ={tau:g} c={c:g}"
    return row(name, level, kind="madpo", tau=tau, c_max=c, c_min=None, lam=1.0, part=part, **more)


def by_key(found: list[Claim]) -> dict[str, Claim]:
    return {claim.key: claim for claim in found}


def uneven_tier() -> Tier:
    """DPO and MADPO with two seeds, the second lower by 1 and half as far; the other rows have only the first seed."""
    dpo = in_second_seed(row("DPO", 2.0, kl=8.0, kind="dpo"), reward=-1.0, kl=-4.0)
    ours = in_second_seed(madpo(7.0, 4.0, 2.1, kl=9.0), reward=-1.0, kl=-4.0)
    dampen = like(madpo(7.0, 4.0, 2.0, "dampen", seeds=1, group="ablation"), dpo)
    far = row("DPO β=0.03", 1.8, kl=14.0, kind="dpo", seeds=1, group="frontier", **{"beta": 0.03})
    near = row("DPO β=0.3", 1.5, kl=3.0, kind="dpo", seeds=1, group="frontier", **{"beta": 0.3})
    return tier_of("low", [dpo, ours, dampen, far, near], margins=np.array([-2.0, 0.5, 4.59]))


def headline(tiers: list[Tier]) -> list[str]:
    """What a study on these tiers says first."""
    return [opening(tiers), *(verdict(tier).text for tier in tiers if tier.policies)]
