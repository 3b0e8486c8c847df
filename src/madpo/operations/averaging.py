"""The steps of ``auto``, for ``madpo train`` and for a row of a study: what the second training learns, the average of
both policies, and the strength at which an adapter has a given KL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from peft import PeftModel

from madpo.core.columns import MARGIN
from madpo.core.metrics import Estimate
from madpo.core.seeding import derived_seed
from madpo.core.statistics import bootstrap_mean
from madpo.models.load import compute_dtype, load_model, save_model
from madpo.models.locate import load_tokenizer
from madpo.models.packaged import quiet_transformers
from madpo.models.weights import with_adapter
from madpo.rewards.label_share import Decision, decide
from madpo.rewards.margins import inspect

STRENGTHS = (0.1, 4.0)
"""Range of an adapter's strengths in which one with the wanted KL is looked for."""
_CLOSE = 0.1
"""A KL within this share of the wanted one is near enough, as it is itself measured on samples."""


def second_seed(seed: int) -> int:
    """The seed of the second training."""
    return derived_seed(seed, "auto", "second training") % 2**31


def second_target(look: pd.DataFrame, every: pd.DataFrame, *, given: bool, seed: int) -> tuple[Decision, float]:
    """The label's share of the second training's target, and the temperature of its margins.

    Args:
        look: prompt, implicit_margin and reward_margin of pairs that DPO had not been trained on.
        every: prompt and reward_margin of all training pairs.
        given, seed: as for :func:`madpo.rewards.label_share.decide`.
    """
    prompts = {"prompts": look["prompt"], "every_prompts": every["prompt"]}
    decision = decide(look["implicit_margin"], look[MARGIN], every[MARGIN], given=given, seed=seed, **prompts)
    return decision, inspect(every[MARGIN]).margin_temperature


def can_average(adapter: Path) -> bool:
    """Whether PEFT can average adapters of this kind; it cannot where experts' weights are adapted."""
    return not json.loads((adapter / "adapter_config.json").read_bytes()).get("target_parameters")


def averaged_adapter(base: Path | str, first: Path, second: Path, *, dtype: torch.dtype | None) -> PeftModel:
    """The base model with one adapter whose update is the mean of two adapters' updates, exactly.

    Its rank is the sum of the two ranks. The mean of the factors A and B would not be the mean of the updates B A.

    Args:
        dtype: of the base model's weights; the adapter is float32. None is :func:`madpo.models.load.compute_dtype`.
    """
    from madpo.training.saving import sort_sets

    with quiet_transformers():
        # In float32, since PEFT gives the new adapter the base's dtype, and would round the two factors to it.
        model, _ = with_adapter(load_model(base, dtype=torch.float32), first, "first")
        model, _ = with_adapter(model, second, "second")
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "default", combination_type="cat")
        model.set_adapter("default")
        for name in ("first", "second"):
            model.delete_adapter(name)
    sort_sets(model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype or compute_dtype())
    return model.eval()


@torch.no_grad()
def save_average(first: Path, second: Path, out: Path) -> None:
    """Save the model whose weights are the means of two models' weights, taken in float32, in the first one's dtype."""
    model, other = load_model(first, dtype="auto"), load_model(second, dtype="auto")
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.copy_(torch.lerp(mine.float(), theirs.float(), 0.5))
    save_model(model, out, load_tokenizer(first))


class Reached(NamedTuple):
    """The strength of an adapter, the KL(policy || reference) per response there (nats), and whether it is near."""

    strength: float
    kl: Estimate
    near: bool


def strength_for(kl: float, measure: Callable[[float], Sequence[float]], *, seed: int) -> Reached:
    """The strength at which an adapter has a wanted KL to the reference, or comes nearest to it.

    The KL grows like the square of a small strength, so the search is in logarithms: a step along the square, then
    secants.

    Args:
        kl: wanted mean, nats.
        measure: strength -> KL of each response.
        seed: of the interval's resampling.
    """
    tried: dict[float, Estimate] = {}

    def look(strength: float) -> float:
        tried[strength] = bootstrap_mean(measure(strength), seed=seed)
        return _log_ratio(tried[strength], kl)

    x, slope = 0.0, 2.0
    error = look(1.0)
    for _ in range(5):
        if abs(error) <= _CLOSE:
            break
        low, high = map(math.log, STRENGTHS)
        step = min(high, max(low, x - error / slope))
        if math.isclose(step, x, abs_tol=1e-3):
            break
        before, x = (x, error), step
        error = look(math.exp(x))
        slope = min(4.0, max(0.5, (error - before[1]) / (x - before[0])))
    nearest = min(tried, key=lambda s: abs(_log_ratio(tried[s], kl)))
    found = tried[nearest]
    return Reached(nearest, found, abs(_log_ratio(found, kl)) <= 3 * _CLOSE)


def _log_ratio(found: Estimate, wanted: float) -> float:
    return math.log(max(found.mean, 1e-12) / wanted)
