"""The study's trainings as stages: ``fn(config, inputs, out) -> metrics``.

SFT and reward model are TRL's trainers; the policy is :class:`PreferenceTrainer`. All three train LoRA adapters. A
function imports the trainer that it runs: describing a study loads no TRL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from madpo.core.columns import ID_COLUMNS, REFERENCE_COLUMNS
from madpo.core.config import Frozen, added
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.progress import bar
from madpo.core.seeding import rng
from madpo.data.corpus import Corpus, load_corpus, sft_reviews
from madpo.losses import Loss
from madpo.models.engine.logprobs import completion_logps, install_completion_head, unwrapped
from madpo.models.hyperparameters import AdapterTraining, EarlyStopping
from madpo.models.load import load_model, load_tokenizer, merged, resolve_model, save_model
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training.margins import margin_metrics, margin_table, sequences
from madpo.training.settings import OnlineStage, PolicyTraining, RewardModelStage

if TYPE_CHECKING:
    from madpo.training.first_look import FirstLook

MARGINS, SCORES = "margins.parquet", "scores.parquet"


class FineTuning(AdapterTraining):
    """What both kinds of supervised fine-tuning share; the merged model starts every policy."""

    model: str
    reviews: int = Field(ge=1)
    """Texts to train on; of pairs at most, the first ones after those of ``early_stopping``."""
    seed: int = 0


class SFTStage(FineTuning):
    """Supervised fine-tuning on the corpus's last positive reviews."""

    corpus: Corpus
    max_tokens: int = Field(ge=2)
    """Texts are cut to this many tokens, the first token included; an end token only at a review's real end."""
    prompt_tokens: int = added(0, ge=0)
    """Tokens at the beginning of a text that are read and not scored."""
    early_stopping: EarlyStopping | None = added(None)
    """Its texts are the positive reviews before those that are trained on."""


@operation("train_sft/1")
def train_sft(config: SFTStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Fine-tune with LoRA and merge; writes ``out/model``. An input ``base`` takes the place of the named model.

    Raises:
        ConfigError: no text is longer than ``prompt_tokens``.
    """
    base = inputs["base"] / "model" if "base" in inputs else resolve_model(config.model)
    tokenizer = load_tokenizer(base)
    stopping = config.early_stopping.texts if config.early_stopping else 0
    texts = list(sft_reviews(load_corpus(config.corpus), config.reviews + stopping)["text"])
    rows = [row for text in texts[-config.reviews :] if (row := _scored(text, tokenizer, config)) is not None]
    if not rows:
        raise ConfigError(f"no review has more than prompt_tokens = {config.prompt_tokens} tokens; use fewer")
    held = [row for text in texts[:stopping] if (row := _scored(text, tokenizer, config))]
    return {"reviews": len(rows), **fit_sft(config, base, rows, held, out)}


class PairSFTStage(FineTuning):
    """Supervised fine-tuning on the chosen completions of training pairs."""

    score_prompt: bool = False
    early_stopping: EarlyStopping | None = None
    """Its texts are the first training pairs."""


@operation("train_sft_on_pairs/1")
def train_sft_on_pairs(config: PairSFTStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """As :func:`train_sft`, on what was preferred. Inputs: "pairs" and perhaps "base".

    Raises:
        ConfigError: no pair is left to train on.
    """
    base = inputs["base"] / "model" if "base" in inputs else resolve_model(config.model)
    pairs = read_pairs(inputs["pairs"], "train")
    rows = []
    for prompt, chosen in zip(pairs["prompt_ids"], pairs["chosen_ids"], strict=True):
        ids = [*map(int, prompt), *map(int, chosen)]
        first = 0 if config.score_prompt else len(prompt)
        rows.append({"input_ids": ids, "labels": [*[-100] * first, *ids[first:]]})
    stopping = config.early_stopping.texts if config.early_stopping else 0
    held, rows = rows[:stopping], rows[stopping:][: config.reviews]
    if not rows:
        raise ConfigError(f"sft.early_stopping.texts = {stopping} leaves none of {len(pairs)} pairs; use fewer")
    return {"pairs": len(rows), **fit_sft(config, base, rows, held, out)}


def fit_sft(
    config: SFTStage | PairSFTStage, base: Path | str, rows: list[Any], held: list[Any], out: Path
) -> dict[str, float]:
    """Fine-tune on rows of ``input_ids`` and ``labels``, and merge; ``held`` decides when to stop."""
    from madpo.training.run import run_training
    from madpo.training.sft import CompletionSFT, SFTConfig

    arguments = config.optimisation.arguments(out, config.seed)
    arguments.pop("disable_dropout")
    stopping = config.early_stopping
    if stopping is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": stopping.eval_every}
    model, tokenizer = load_model(base), load_tokenizer(base)
    trainer = CompletionSFT(
        model=model,
        args=SFTConfig(max_length=None, **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if stopping is None else Dataset.from_list(held),
        processing_class=tokenizer,
        peft_config=config.lora.peft_config("CAUSAL_LM", model),
    )
    install_completion_head(unwrapped(trainer.model))
    if stopping is not None:
        trainer.keep_best(stopping.patience)
    result = run_training(trainer, config, "SFT", out)
    stopped = {} if trainer.best is None else {"steps": trainer.take_best(), "stopping_loss": trainer.best.best}
    save_model(merged(trainer.model), out / "model", tokenizer)
    return {"loss": float(result.training_loss), **stopped}


def _scored(text: str, tokenizer: PreTrainedTokenizerBase, config: SFTStage) -> dict[str, list[int]] | None:
    """A text's tokens, and those that count in the loss; None where none of them does."""
    ids = [*tokenizer(text)["input_ids"]]
    ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    ids = ids[: config.max_tokens]
    if len(ids) <= config.prompt_tokens:
        return None
    return {"input_ids": ids, "labels": [*[-100] * config.prompt_tokens, *ids[config.prompt_tokens :]]}


@operation("train_reward_model/1")
def train_reward_model(config: RewardModelStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train on the tier's training pairs; writes ``out/adapter`` (with the head) and ``out/reward_model.json``."""
    from madpo.training.reward import fit_reward_model

    train, heldout = (read_pairs(inputs["pairs"], split) for split in ("train", "heldout"))
    stopping = heldout.iloc[: max(1, round(len(heldout) * config.stopping_share))]
    if config.folds is not None:
        train = train[fold_of_pairs(prompts_of(train).to_numpy(), config.folds, config.seed) != config.fold]
    steps = fit_reward_model(config, _sequences(train), _sequences(stopping), out, inputs.get("base"))
    reported = heldout.iloc[len(stopping) :] if len(stopping) < len(heldout) else heldout
    table = margin_table(RewardModel.load(out), reported)
    table.to_parquet(out / MARGINS, index=False)
    return {"steps": steps, **margin_metrics(table["reward_margin"].to_numpy(), prompts_of(reported))}


def fold_of_pairs(prompts: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of every training pair, 0 to folds - 1: equally many prompts (within one), by seed and set of ids.

    Args:
        prompts: [pairs], the id of each pair's prompt, in any order.
    """
    ids, inverse = np.unique(prompts, return_inverse=True)
    found = np.empty(len(ids), dtype=np.int64)
    found[rng(seed, "folds").permutation(len(ids))] = np.arange(len(ids)) % folds
    return found[inverse]


def _sequences(pairs: pd.DataFrame) -> Dataset:
    return Dataset.from_dict(sequences(pairs.to_dict("records")))


def reference_model(inputs: Mapping[str, Path]) -> Path | str:
    """The model of the input "reference": what a step made, or a model that the user names."""
    given = inputs["reference"]
    return made if (made := given / "model").is_dir() else resolve_model(str(given))


def read_pairs(folder: Path, split: str | None = None) -> pd.DataFrame:
    """The pairs of a step's folder, all or those of one split."""
    pairs = pd.read_parquet(folder / "pairs.parquet")
    return pairs if split is None else pairs[pairs["split"] == split]


def prompts_of(pairs: pd.DataFrame) -> pd.Series[int]:
    """The prompt of every pair; where a prompt has one pair, this has its id."""
    return pairs["prompt_id"] if "prompt_id" in pairs else pairs["pair_id"]


class ReferenceStage(Frozen):
    """Reference log-probabilities of the pairs of one part."""

    batch_size: int = Field(default=8, ge=1)
    """Pairs per forward pass; it decides the padding, and so the last digits."""
    micro_batch_size: int | None = Field(default=None, ge=1, exclude=True)
    """Fewer pairs per forward pass where memory is short, as in the policies' trainings, whose results count as the
    same."""
    split: Literal["train", "heldout"] = added("train")


@operation("reference_logps/1")
def reference_logps(config: ReferenceStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``reference.parquet``: pair_id, ref_chosen_logps, ref_rejected_logps (nats, summed)."""
    from madpo.training.reference import refuse_not_finite

    pairs = read_pairs(inputs["pairs"], config.split)
    reference_path = reference_model(inputs)
    size = min(config.micro_batch_size or config.batch_size, config.batch_size)
    model, tokenizer = load_model(reference_path).eval(), load_tokenizer(reference_path)
    chosen, rejected = pair_logps(model, tokenizer, pair_ids(pairs), size, "Reference log-probabilities")
    refuse_not_finite(dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True)), pairs["pair_id"].to_list())
    table = pd.DataFrame({"pair_id": pairs["pair_id"], REFERENCE_COLUMNS[0]: chosen, REFERENCE_COLUMNS[1]: rejected})
    table.to_parquet(out / "reference.parquet", index=False)
    return {
        "pairs": len(pairs),
        "mean_chosen_logps": float(chosen.mean()),
        "mean_rejected_logps": float(rejected.mean()),
    }


@torch.no_grad()
def pair_logps(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], batch_size: int, description: str
) -> NDArray[np.float64]:
    """Log-probabilities of both sides of each pair, nats, summed over the tokens of the side: [2, pairs]."""
    from madpo.training.columns import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    found: list[Tensor] = []
    with bar(description, len(rows)) as advance:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            triple = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "completion_mask"))
            logps = completion_logps(model, *triple, pairs=True).logps
            found.append(torch.stack(logps.double().chunk(2)))
            advance(found[-1].shape[1])
    table: NDArray[np.float64] = torch.cat(found, dim=1).cpu().numpy()
    return table


def pair_ids(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Pairs as the trainer takes them: pair_id, and the token ids of prompt and sides."""
    return [
        {"pair_id": p.pair_id, **{name: [int(i) for i in getattr(p, name)] for name in ID_COLUMNS}}
        for p in pairs.itertuples()
    ]


class PolicyStage(PolicyTraining):
    """A policy that is trained with one preference loss."""

    loss: Loss


@operation("train_policy/1")
def train_policy(config: PolicyStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train on the tier's training pairs from the reference; writes ``out/adapter``."""
    rows = training_rows(inputs)
    result = fit_policy(config, rows, reference_model(inputs), out)
    return {
        "pairs": len(rows),
        "steps": int(result.global_step),
        "loss": float(result.training_loss),
        "final_reward_margin": _last_tenth(out, "rewards/margins"),
    }


def training_rows(inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The training pairs as token ids, with their reference log-probabilities and what a reward model says of them.

    Inputs: "pairs", "logps", and where a loss reads them "margins" and "scores".
    """
    logps = pd.read_parquet(inputs["logps"] / "reference.parquet")
    pairs = read_pairs(inputs["pairs"], "train").merge(logps, on="pair_id", validate="one_to_one")
    columns = [*REFERENCE_COLUMNS]
    for role, file in (("margins", MARGINS), ("scores", SCORES)):
        if role in inputs:
            table = pd.read_parquet(inputs[role] / file)
            pairs = pairs.merge(table, on="pair_id", validate="one_to_one")
            columns += [str(name) for name in table if name != "pair_id"]
    return [{**ids, **{name: float(pairs[name].iloc[i]) for name in columns}} for i, ids in enumerate(pair_ids(pairs))]


def fit_policy(
    config: PolicyStage,
    rows: list[dict[str, Any]],
    reference: Path | str,
    out: Path,
    *,
    in_order: bool = False,
    first_look: FirstLook | None = None,
) -> Any:
    """Train on ``rows``, from the newest checkpoint in ``out``; writes ``out/adapter``.

    Args:
        in_order: take the rows in their order, in every epoch.
        first_look: gets the implicit margins of the first epoch.

    Returns:
        What the trainer says of the training.
    """
    from madpo.training import PreferenceConfig, PreferenceTrainer
    from madpo.training.run import run_training

    arguments = config.optimisation.arguments(out, config.seed)
    if in_order:
        arguments["train_sampling_strategy"] = "sequential"
    model = load_model(reference)
    trainer = PreferenceTrainer(
        model,
        args=PreferenceConfig(max_length=None, token_metrics="never", **arguments),
        loss=config.loss,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(reference),
        peft_config=config.lora.peft_config("CAUSAL_LM", model),
    )
    trainer.first_look = first_look
    result = run_training(trainer, config, config.method, out)
    trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
    return result


@operation("train_online/4")
def train_online(config: OnlineStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train on the policy's own responses to the training prompts; writes ``out/adapter``.

    Inputs: "pairs", "reference", "reward_model".
    """
    from madpo.training.online import fit_online

    pairs = read_pairs(inputs["pairs"], "train")
    prompts = {int(i): [int(t) for t in ids] for i, ids in zip(pairs["pair_id"], pairs["prompt_ids"], strict=True)}
    reward_model = RewardModel.load(inputs["reward_model"])

    def reward(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> Sequence[float]:
        return [float(value) for value in reward_model.score_responses(prompt_ids, response_ids)]

    reference_path = reference_model(inputs)
    trainer = fit_online(config, load_model(reference_path), load_tokenizer(reference_path), prompts, reward, out)
    trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
    return {
        "prompts": len(prompts),
        "steps": int(trainer.state.global_step),
        "final_reward": _last_tenth(out, "reward"),
        "final_kl_per_token": _last_tenth(out, "kl"),
    }


def _last_tenth(out: Path, name: str) -> float:
    rows = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    values = [row[name] for row in rows if name in row]
    return float(np.mean(values[-max(1, len(values) // 10) :]))
