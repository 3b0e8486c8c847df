"""``madpo train`` with no loss named: DPO, and what reward margins add to it where labels say that they do.

1. Reward margins of all pairs: the column ``reward_margin``, or a probe of the reference's hidden states, out of fold.
   One temperature makes them log-odds.
2. Plain DPO. What it says of the pairs of half of the prompts before it is trained on them, and the reward margins,
   explain those pairs' labels: their difference in log loss is the deciding number, and the posterior of
   ``label_share`` follows from the same labels.
3. A second training with the mixed target of :class:`madpo.losses.SoftDPO`, with another seed.
4. The average of the two policies.

Each training is the operation of ``madpo train``, so an interruption continues inside it, and several processes share
it. The leading one averages.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from peft import PeftModel
from peft.helpers import rescale_adapter_scale

from madpo.core import processes
from madpo.core.columns import MARGIN
from madpo.core.errors import DataError
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import say
from madpo.core.seeding import rng
from madpo.core.statistics import design_effect
from madpo.data import load_preferences
from madpo.data.folds import PromptNumbers, prompt_key, prompt_keys
from madpo.data.templates import Clock
from madpo.data.tokens import Encoder
from madpo.losses import SoftDPO
from madpo.models.adapters import adapter_text
from madpo.models.engine.responses import divergence, refuse_end_tokens, respond
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.load import load_model, load_tokenizer, merged, resolve_model, save_model
from madpo.operations.averaging import (
    STRENGTHS,
    Reached,
    averaged_adapter,
    can_average,
    save_average,
    second_seed,
    second_target,
    strength_for,
)
from madpo.operations.export import GGUF, refuse_unconvertible, write_gguf
from madpo.operations.inputs import Row, split_by_prompt, started_clock
from madpo.operations.policy import (
    FIRST_LOOK,
    HELDOUT,
    MARGINS,
    MEMORY_REMEDY,
    chosen_dtype,
    train_pairs,
    train_unnoted,
    trainer_arguments,
)
from madpo.operations.preconditions import first_pair, require_columns
from madpo.operations.responses import ends_of_responses
from madpo.operations.running import load_report, run_in_folder
from madpo.operations.settings import Sampling
from madpo.operations.study_training import pair_logps
from madpo.operations.train_report import TrainReport, write_report
from madpo.operations.train_settings import Auto, TrainSettings
from madpo.operations.verify_auto import FAST_SHARE
from madpo.rewards.label_share import AS_GOOD, LabelShare, better_than_coin, ordered
from madpo.rewards.margins import inspect
from madpo.runner.operation import operation

DPO_FOLDER, MIXED_FOLDER = "dpo", "mixed"
_KEPT = ("adapter", "model", "report.json", "log.jsonl", "report.html", HELDOUT, FIRST_LOOK, MARGINS, "dropped.jsonl")


class AutoReport(TrainReport):
    """What ``auto`` did. ``steps`` counts both trainings; ``loss`` is the second one's."""

    margins: str
    """Where the margins came from."""
    margin_temperature: float
    label_share: float
    """Of the second training's target; 1 is plain DPO, 0 the margins only."""
    share: LabelShare | None
    """The posterior and the deciding number; None with ``fast``."""
    advice: Literal["auto", "dpo"]
    reason: str
    """Of the advice, one sentence."""
    averaged: bool
    strength: float = 1.0
    kl: Estimate | None = None
    """KL(policy || reference) per response, nats, at this strength; None where none was asked for."""

    def drawn(self) -> list[str]:
        """That the curves are those of the second training."""
        return ["the curves are those of the second training, held-out numbers those of the average"] * self.averaged

    def decision(self) -> list[str]:
        """The deciding number and the advice, in sentences."""
        lines = [self.reason, f"margins from {self.margins}, temperature {self.margin_temperature:.3g}"]
        if self.share is not None and self.reason != REASONS["ordered"]:
            lines += f"{self.share.text()}; {self.label_share:.2f} is used".splitlines()
        if self.kl is not None:
            lines.append(
                f"adapter's strength {self.strength:.3g}: KL {self.kl.mean:.3g} nats ({self.kl.low:.3g} to "
                f"{self.kl.high:.3g})"
            )
        return lines


@operation("train_auto/12")
def train_auto(settings: TrainSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind ``madpo train`` with no loss named."""
    assert isinstance(settings.loss, Auto)
    data, state, eval_data = str(inputs["data"]), out / CHECKPOINTS, inputs.get("eval_data")
    if (first := first_pair(data, settings.reading)) is None:
        raise DataError(f"{data}: no row has two different scores, so there is no pair; score the completions first")
    probed = MARGIN not in first.numbers
    if eval_data is not None and (held := first_pair(eval_data, settings.reading)) is not None:
        require_columns([held.numbers], settings.loss, str(eval_data), probed=probed)
    source = "a probe of the reference's hidden states, out of fold" if probed else f"the column {MARGIN}"
    if not probed:  # of a probe the trainer says how good it is
        say(f"Margins come from {source}.")
    clock = started_clock(state, settings.date)
    base = resolve_model(settings.model)
    if settings.export == "gguf":
        refuse_unconvertible(base)
    if settings.loss.kl is not None:
        refuse_end_tokens(base)
    Encoder(load_tokenizer(base), clock).encode([first], lambda number: f"{data}, row {number}")
    shared = settings.model_copy(update={"date": clock.now if clock.read else None, "merge": False, "export": None})
    seed = int(settings.args.get("seed", 42))
    work = _Work(shared, settings.loss, data, eval_data, probed, state, seed, clock)
    report = AutoReport(**_trained(work), margins=source)
    args = trainer_arguments(settings, out, evaluated=report.eval_pairs > 0)

    def finish() -> None:
        final = _finish(work, report, settings, out)
        write_report(out, data, eval_data, settings, args, final, clock)

    processes.on_main_process(finish)
    metrics: Metrics = {"pairs": report.pairs, "steps": report.steps, "label_share": report.label_share}
    if report.share is not None:
        metrics |= {"deciding": report.share.difference, "advice": report.advice}
    return metrics


class _Work(NamedTuple):
    """What both trainings share.

    Attributes:
        settings: of the trainings, but for their loss and seed.
        probed: a probe gives the margins, which the data do not have.
    """

    settings: TrainSettings
    auto: Auto
    data: str
    eval_data: Path | None
    probed: bool
    state: Path
    seed: int
    clock: Clock

    def train(self, name: str, seed: int, *, temperature: float = 1.0, share: float = 1.0) -> TrainReport:
        """Train with all pairs that are not held out, and a target that mixes labels and margins.

        Two trainings have their rows in one order, so that the reference of the first is that of the second. The first
        takes them in this order, and notes what it says of pairs before it is trained on them.
        """
        args, first = {**self.settings.args, "seed": seed}, name == DPO_FOLDER
        if "data_seed" in args:
            args["data_seed"] = seed
        if first:
            args.setdefault("train_sampling_strategy", "sequential")
        # With label_share 1 the loss is DPO; it reads the margins, so that a probe's are there for the decision.
        loss = SoftDPO(beta=self.auto.beta, margin_temperature=temperature, label_share=share)
        changes = {"loss": loss, "args": args, "split_seed": self.seed, "probe": self.probed}
        how = self.settings.model_copy(update={**changes, "first_look": not self.auto.fast})
        inputs = {"data": self.data, "eval_data": self.eval_data, "model": self.settings.model}
        fn = train_pairs if first or self.auto.fast else train_unnoted
        folder = run_in_folder(fn, how, inputs, self.state / name, memory=MEMORY_REMEDY)
        gc.collect()  # the trainer's model is in a cycle
        return load_report(folder / "report.json", TrainReport)

    def rows(self, base: Path | str, *, trained: bool = False) -> list[Row]:
        """Pairs that the trainings held out, or ``trained`` on; all pairs where they held out none."""
        settings = self.settings
        rows = load_preferences(
            self.data if trained else self.eval_data or self.data,
            columns=settings.reading,
            tokenizer=load_tokenizer(base),
            max_length=trainer_arguments(settings, self.state, evaluated=True).max_length,
            truncation=settings.truncation,
            clock=self.clock,
        )
        if settings.eval_share and not self.eval_data:
            rows = split_by_prompt(rows, settings.eval_share, self.seed, self.data)[0 if trained else 1]
        return rows

    def given_margins(self) -> pd.DataFrame:
        """Margins and prompts of the training pairs before any training, of data with margins."""
        rows = self.rows(resolve_model(self.settings.model), trained=True)
        keys = prompt_keys([row["prompt"] for row in rows])
        return pd.DataFrame({MARGIN: [row[MARGIN] for row in rows], "prompt": keys})


def _table(path: Path) -> pd.DataFrame:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return pd.DataFrame(rows, columns=["prompt", "implicit_margin", MARGIN])


COIN = "the margins explain labels not clearly better than a coin: take plain DPO"
REASONS = {
    "fast": f"one training, with the fixed label share {FAST_SHARE:g}",
    "margins": "the margins add to the labels: the result is the average of both policies",
    "chance": COIN,
    "coin": f"{COIN}, and both trainings take labels only",
    "ordered": f"no {MARGIN} is negative, as where the margins made the labels, so these labels cannot judge them: "
    "take plain DPO, and the training takes labels only",
    "labels": f"the label's share is above {AS_GOOD:g} with 97.5 % probability: take plain DPO",
}
"""Of the advice, by why it is given."""


def _trained(work: _Work) -> dict[str, Any]:
    """Both trainings, or with ``fast`` one, and what decides between them: fields of :class:`AutoReport`."""
    found: LabelShare | None = None
    why, steps, seed = "", 0, work.seed
    if work.auto.fast:
        # A probe's margins are log-odds as they are, and not known before the training.
        known = None if work.probed else work.given_margins()
        temperature = 1.0 if known is None else inspect(known[MARGIN]).margin_temperature
        if known is not None and not better_than_coin(known[MARGIN], known["prompt"]):
            why = "chance"
        elif known is not None and ordered(known[MARGIN]):
            why = "ordered"
        share = 1.0 if why else FAST_SHARE
    else:
        steps = work.train(DPO_FOLDER, seed).steps
        look, every = (_table(work.state / DPO_FOLDER / name) for name in (FIRST_LOOK, MARGINS))
        if look.empty:
            prompts = every["prompt"].nunique()
            raise DataError(
                f"{work.data}: the training pairs have {prompts} different prompt{'s' * (prompts != 1)}, too few to "
                "judge a policy by pairs whose prompt it has not seen; give more prompts, or name a loss, such as "
                "--loss dpo"
            )
        (found, share, why), temperature = second_target(look, every, given=not work.probed, seed=seed)
        seed = second_seed(seed)
    report = work.train(MIXED_FOLDER, seed, temperature=temperature, share=share)
    if not why:  # of a probe that the one training has fitted
        known = _table(work.state / MIXED_FOLDER / MARGINS) if known is None else known
        why = "fast" if better_than_coin(known[MARGIN], known["prompt"]) else "chance"
    return {
        **report.model_dump(),
        "steps": steps + report.steps,
        "margin_temperature": temperature,
        "label_share": share,
        "share": found,
        "advice": "auto" if why in ("fast", "margins") else "dpo",
        "reason": REASONS[why],
        "averaged": found is not None,
    }


def _finish(work: _Work, report: AutoReport, settings: TrainSettings, out: Path) -> AutoReport:
    """Write the final policy, and keep those that it was made from."""
    kind = "model" if settings.full else "adapter"
    first, second = (work.state / folder / kind for folder in (DPO_FOLDER, MIXED_FOLDER))
    average = report.averaged and (settings.full or can_average(second))
    changes: dict[str, Any] = {}
    if report.averaged and not average:
        say("PEFT cannot average adapters of experts' weights, so the second training's policy is the result.")
        changes["averaged"] = False
    if average:
        changes = _average(work, settings, (first, second), out, evaluated=report.eval_pairs > 0)
    else:
        shutil.copytree(second, out / kind, dirs_exist_ok=True)
        if settings.merges:
            model = load_model(resolve_model(settings.model), dtype=chosen_dtype(settings), adapter=second)
            save_model(merged(model), out / "merged", load_tokenizer(second))
    if settings.export == "gguf":
        write_gguf(out / ("model" if settings.full else "merged"), out / GGUF)
    shutil.copyfile(work.state / MIXED_FOLDER / "log.jsonl", out / "log.jsonl")
    for folder in (DPO_FOLDER, MIXED_FOLDER):
        for name in _KEPT:
            source, target = work.state / folder / name, out / folder / name
            if source.is_dir() and (folder == DPO_FOLDER or average):
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return report.model_copy(update=changes)


def _average(
    work: _Work, settings: TrainSettings, parts: tuple[Path, Path], out: Path, *, evaluated: bool
) -> dict[str, Any]:
    """Write the average, of adapters at the strength that has the wanted KL; returns what changes in the report."""
    base, tokenizer, dtype = resolve_model(settings.model), load_tokenizer(parts[1]), chosen_dtype(settings)
    rows = work.rows(base) if evaluated or work.auto.kl is not None else []
    if settings.full:
        save_average(*parts, out / "model")
        models = (load_model(place, dtype=dtype) for place in (out / "model", base))
        return _evaluation(work, rows, *models) if evaluated else {}
    model = averaged_adapter(base, *parts, dtype=dtype)
    changes: dict[str, Any] = {}
    if work.auto.kl is not None:
        reached = _at_kl(work, model, base, rows)
        config = model.peft_config["default"]
        config.lora_alpha *= reached.strength  # as loading it will scale the update
        for layer in model.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(reached.strength)
        changes = {"strength": reached.strength, "kl": reached.kl}
    if evaluated:
        changes |= _evaluation(work, rows, model)
    changes["adapter"] = adapter_text(model)
    model.save_pretrained(str(out / "adapter"), safe_serialization=True)
    tokenizer.save_pretrained(out / "adapter")
    if settings.merges:
        save_model(merged(model), out / "merged", tokenizer)
    return changes


def _evaluation(work: _Work, rows: list[Row], model: Any, reference: Any = None) -> dict[str, Any]:
    """The average on held-out pairs, as fields of the report; an adapter's reference is the model without it."""
    size = int(work.settings.args.get("per_device_eval_batch_size", 8))
    tokenizer, description = load_tokenizer(resolve_model(work.settings.model)), "The average: held-out pairs"
    logps = pair_logps(model.eval(), tokenizer, rows, size, description)
    with nullcontext() if reference is not None else model.disable_adapter():
        reference_logps = pair_logps((reference or model).eval(), tokenizer, rows, size, f"{description}, reference")
    chosen, rejected = work.auto.beta * (logps - reference_logps)
    margins = chosen - rejected
    evaluation = {
        "eval_loss": float(np.logaddexp(0.0, -margins).mean()),
        "eval_rewards/chosen": float(chosen.mean()),
        "eval_rewards/rejected": float(rejected.mean()),
        "eval_rewards/accuracies": float((margins > 0).mean()),
        "eval_rewards/margins": float(margins.mean()),
    }
    prompts = [*map(PromptNumbers(), (row["prompt"] for row in rows))]
    return {"evaluation": evaluation, "eval_effect": design_effect(margins > 0, prompts)}


def _at_kl(work: _Work, model: PeftModel, base: Path | str, rows: list[Row]) -> Reached:
    wanted, tokenizer = work.auto.kl, load_tokenizer(base)
    assert wanted is not None
    different = [*{prompt_key(row["prompt"]): row for row in rows}.values()]
    drawn = rng(work.seed, "auto", "prompts of the KL").permutation(len(different))
    chosen = [different[k] for k in drawn[: work.auto.kl_prompts]]
    reference = load_model(base, dtype=chosen_dtype(work.settings))
    ends = ends_of_responses(tokenizer, [row["prompt"] for row in chosen], reference)
    how = Sampling(seed=work.seed, max_new_tokens=work.auto.kl_tokens)
    prompts, keys = [list(row["prompt_ids"]) for row in chosen], [int(row["pair_id"]) for row in chosen]
    how_drawn: dict[str, Any] = {"keys": keys, "draw": 0, "ends": ends, "description": "Responses for the KL"}
    batches = {"pad": tokenizer.pad_token_id, "batch_size": how.batch_size}

    def measure(strength: float) -> list[float]:
        with rescale_adapter_scale(model, strength):
            responses = [response.ids for response in respond(model, tokenizer, prompts, how, **how_drawn)[0]]
            kl: list[float] = divergence(model, reference, prompts, responses, **batches).kl.tolist()
        return kl

    reached = strength_for(wanted, measure, seed=work.seed)
    if not reached.near:
        low, high = STRENGTHS
        say(
            f"No strength of the adapter from {low:g} to {high:g} has a KL of {wanted:g} nats; the nearest is taken. A "
            "smaller beta or a larger learning rate goes further."
        )
    return reached
