"""Rows of made-up studies whose means are known exactly."""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from madpo.report.claims import Claim
from madpo.results import Row
from madpo.seeding import rng
from madpo.statistics import bootstrap_mean

N = 200
PROMPT = rng(0, "prompts").normal(size=N)  # what makes a prompt easy, common to all methods


def row(name: str, level: float, *, kl: float = 5.0, noise: float = 0.2, seeds: int = 2, **settings: Any) -> Row:
    """A row whose mean reward is exactly ``level`` in every seed, and whose noise of its own is small."""
    places = {"group": "core", "pairs": "all", "margins": "in_sample", "trainer": "offline"}
    given = {name: settings.pop(name, default) for name, default in places.items()}
    per_seed: dict[str, dict[int, float]] = {}
    for seed in range(seeds):
        own = rng(seed, "noise", name, str(level)).normal(size=N) * noise
        values = level + (PROMPT - PROMPT.mean()) + own - own.mean()
        per_seed[f"seed{seed}"] = dict(enumerate(map(float, values)))
    rewards = {i: float(np.mean([values[i] for values in per_seed.values()])) for i in range(N)}
    kls = {i: kl + 0.1 * float(PROMPT[i]) for i in range(N)}
    seed_kls = dict.fromkeys(per_seed, kls)
    return Row(
        key=re.sub(r"[^a-z0-9]+", "-", name.lower()),
        name=name,
        loss={"beta": 0.1, **settings},
        seeds=tuple(per_seed),
        per_seed=dict.fromkeys(per_seed, level),
        oracle_reward=bootstrap_mean(list(rewards.values())),
        kl=bootstrap_mean(list(kls.values())),
        length=40.0,
        distinct_2=0.8,
        ended=0.1,
        win_rate=None,
        rewards=rewards,
        kls=kls,
        seed_rewards=per_seed,
        seed_kls=seed_kls,
        **given,
    )


def in_second_seed(given: Row, reward: float = 0.0, kl: float = 0.0) -> Row:
    """The row with rewards and KLs that are larger in its second seed by so much."""
    rewards = {**given.seed_rewards, "seed1": {i: v + reward for i, v in given.seed_rewards["seed1"].items()}}
    kls = {**given.seed_kls, "seed1": {i: v + kl for i, v in given.seed_kls["seed1"].items()}}
    means = {i: (rewards["seed0"][i] + rewards["seed1"][i]) / 2 for i in range(N)}
    return replace(
        given,
        seed_rewards=rewards,
        seed_kls=kls,
        rewards=means,
        kls={i: (kls["seed0"][i] + kls["seed1"][i]) / 2 for i in range(N)},
        oracle_reward=bootstrap_mean(list(means.values())),
    )


def madpo(tau: float, c: float, level: float, part: str = "full", **more: Any) -> Row:
    name = f"{ {'full': 'MADPO', 'amplify': 'Amp-Only', 'dampen': 'Reg-Only'}[part] } τ={tau:g} c={c:g}"
    return row(name, level, kind="madpo", tau=tau, c_max=c, c_min=None, lam=1.0, part=part, **more)


def by_key(found: list[Claim]) -> dict[str, Claim]:
    return {claim.key: claim for claim in found}
