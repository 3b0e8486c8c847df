"""``auto`` as a row of a study: two trainings, the label's share from the first one's first look at its pairs, and the
average of both policies.

The command is :mod:`madpo.operations.auto`; what both do is in :mod:`madpo.operations.averaging`.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from madpo.core.config import added, part
from madpo.core.metrics import Metrics
from madpo.core.storage import write_atomically
from madpo.losses import DPO, Loss, SoftDPO
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.operations.averaging import averaged_adapter, second_seed, second_target
from madpo.operations.study_training import (
    PolicyStage,
    fit_policy,
    prompts_of,
    read_pairs,
    reference_model,
    training_rows,
)
from madpo.runner.operation import operation
from madpo.training.settings import AutoSettings, PolicyTraining

FIRST, SECOND, DECISION = "dpo", "mixed", "decision.json"


class AutoStage(PolicyTraining):
    """A policy that is the average of DPO's and of a second one, whose target mixes labels and margins."""

    settings: AutoSettings
    given: bool = added(False)
    """The margins are the data's own, which may have ordered the pairs."""


@operation("train_auto_policy/5")
def train_auto_policy(config: AutoStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train twice and average; writes ``out/adapter`` and ``out/decision.json``.

    Without a fixed ``label_share``, what the first training says of pairs before it is trained on them decides the
    share. At 1 the result is the average of two DPO policies of different seeds.
    Inputs: "pairs", "logps", "reference" and, unless the share is fixed at 1, "margins".
    """
    from madpo.training.first_look import FirstLook, in_halves

    rows, reference, fixed = training_rows(inputs), reference_model(inputs), config.settings.label_share
    pairs = read_pairs(inputs["pairs"])
    prompts = dict(zip(pairs["pair_id"], prompts_of(pairs), strict=True))
    beta = config.settings.beta
    path = out / DECISION
    if not path.is_file():  # else a run before this one came further
        look = FirstLook() if fixed is None else None
        first = rows if look is None else in_halves(rows, [prompts[row["pair_id"]] for row in rows], config.seed)
        dpo, noting = _policy(config, DPO(beta=beta), config.seed), look is not None
        result = fit_policy(dpo, first, reference, out / FIRST, in_order=noting, first_look=look)
        found: dict[str, Any] = {"steps": int(result.global_step), "label_share": fixed, "temperature": 1.0}
        if look is not None:
            found |= _decided(look.deciding(prompts), rows, prompts, config)
        write_atomically(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
        del result
        gc.collect()  # the trainer's model is in a cycle
    decision = json.loads(path.read_bytes())
    share = decision["label_share"]
    mixed: Loss = SoftDPO(beta=beta, margin_temperature=decision["temperature"], label_share=share)
    loss = mixed if "margins" in inputs else DPO(beta=beta)
    result = fit_policy(_policy(config, loss, second_seed(config.seed)), rows, reference, out / SECOND)
    averaged = averaged_adapter(reference, out / FIRST / "adapter", out / SECOND / "adapter", dtype=None)
    averaged.save_pretrained(out / "adapter", safe_serialization=True)
    (out / SECOND / "log.jsonl").replace(out / "log.jsonl")
    for name in (FIRST, SECOND):
        shutil.rmtree(out / name / CHECKPOINTS, ignore_errors=True)
    numbers = {name: value for name, value in decision.items() if isinstance(value, int | float)}
    return {**numbers, "pairs": len(rows), "steps": decision["steps"] + int(result.global_step)}


def _policy(config: AutoStage, loss: Loss, seed: int) -> PolicyStage:
    return PolicyStage(**{**dict(part(config, PolicyTraining)), "loss": loss, "seed": seed})


def _decided(
    implicit: Mapping[int, float], rows: list[dict[str, Any]], prompts: Mapping[int, int], config: AutoStage
) -> dict[str, Any]:
    every = pd.DataFrame(rows).set_index("pair_id")
    every["prompt"] = every.index.map(prompts)
    look = every.loc[[*implicit]].assign(implicit_margin=[*implicit.values()])
    (found, share, why), temperature = second_target(look, every, given=config.given, seed=config.seed)
    difference = found.difference
    return {
        "label_share": share,
        "temperature": temperature,
        "decided_on_pairs": found.pairs,
        "margin_log_loss": found.margin_loss,
        "implicit_log_loss": found.implicit_loss,
        "log_loss_difference": difference.mean,
        "log_loss_difference_low": difference.low,
        "log_loss_difference_high": difference.high,
        "label_share_low": found.low,
        "label_share_high": found.high,
        "advises_dpo": int(why != "margins"),
    }
