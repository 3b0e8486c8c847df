"""Fitting a Bradley-Terry reward model with early stopping."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from trl import RewardConfig

from madpo.core.errors import ConfigError
from madpo.models.load import load_classifier, load_tokenizer, resolve_model
from madpo.models.locate import lasting
from madpo.runner.folder import final_folder
from madpo.training.reward import RewardModelTrainer
from madpo.training.run import Page, run_training
from madpo.training.settings import RewardModelStage


def fit_reward_model(
    config: RewardModelStage,
    train: Dataset,
    stopping: Dataset,
    out: Path,
    made: Path | None = None,
    page: Page | None = None,
) -> int:
    """Train on ``train`` until the loss on ``stopping`` no longer falls; the best weights are kept.

    Writes ``adapter`` (with the head), ``reward_model.json`` and ``log.jsonl``, which :meth:`RewardModel.load` reads.
    The checkpoints stay until :func:`forget_checkpoints`.

    Args:
        config: the base model and how it is trained; ``stopping_share`` has been applied by the caller.
        made: the step whose ``model`` takes the place of the one that ``config`` names; it stays where it is.
        train, stopping: ``chosen_ids`` and ``rejected_ids``, each prompt and completion together, and how many tokens
            are the prompt's (``prompt_length``).
        page: written while it runs.

    Returns:
        The optimiser step whose weights were kept.
    """
    base = resolve_model(config.model) if made is None else made / "model"
    tokenizer = load_tokenizer(base)
    model = load_classifier(base, num_labels=1, new_head=True)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(
            f"{config.model} ({type(model).__name__}) does not read its score off a token's state by one linear layer; "
            "give a causal language model"
        )
    with torch.no_grad():
        model.score.weight.zero_()  # states are large: a random head would begin with rewards of several log-odds
    trainer = RewardModelTrainer(
        model,
        RewardConfig(
            max_length=None,
            eval_strategy="steps",
            eval_steps=config.eval_every,
            **config.optimisation.arguments(out, config.seed),
        ),
        train_dataset=train,
        eval_dataset=stopping,
        processing_class=tokenizer,
        peft_config=config.lora.peft_config("SEQ_CLS", model),
        pooling=config.pooling,
        patience=config.patience,
    )
    run_training(trainer, config, "Reward model", out, page)
    steps = trainer.take_best()
    trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
    told = {"base": lasting(config.model), "steps": steps}
    if made is not None:
        told["base_folder"] = os.path.relpath(base, final_folder(out))
    if config.pooling != "last":  # what a sequence classifier does unless it says otherwise
        told["pooling"] = config.pooling
    (out / "reward_model.json").write_text(json.dumps(told), encoding="utf-8")
    return steps
