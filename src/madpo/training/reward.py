"""TRL's reward trainer on our engine: Eq. 2's loss, each prompt computed once, and the best weights kept."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from madpo.core.errors import ConfigError
from madpo.models.engine import memory_efficient
from madpo.models.engine.logprobs import completion_states, unwrapped
from madpo.models.hyperparameters import Pooling
from madpo.models.load import load_classifier, load_tokenizer, resolve_model
from madpo.models.locate import lasting
from madpo.rewards.reward_model import completion_tokens, pooled
from madpo.runner.folder import final_folder
from madpo.training.best_weights import KeepsBest
from madpo.training.config import own_noise
from madpo.training.run import Page, run_training
from madpo.training.settings import RewardModelStage


@dataclass
class _WithPromptLengths(DataCollatorForPreference):  # type: ignore[misc]
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([example["prompt_length"] for example in examples])
        return {**super().torch_call(examples), "prompt_lengths": lengths.repeat(2)}


class RewardModelTrainer(KeepsBest, RewardTrainer):  # type: ignore[misc]
    """Minimises -log sigmoid(r(chosen) - r(rejected)), mean over pairs (Eq. 2), on token ids.

    Rows have ``pair_id``, ``chosen_ids`` and ``rejected_ids`` (prompt and completion together), and
    ``prompt_length``, the tokens of both that are the prompt's.

    Args:
        model: a sequence classifier with one output.
        pooling: which states the head reads; see :func:`madpo.rewards.reward_model.pooled`.
        patience: evaluations without improvement before the training stops.

    Raises:
        ConfigError: there are several processes, whose gradients nobody would add.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig,
        *,
        processing_class: Any,
        pooling: Pooling = "last",
        patience: int = 3,
        **settings: Any,
    ) -> None:
        model.score.float()
        collator = _WithPromptLengths(pad_token_id=processing_class.pad_token_id)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **settings)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"a reward model is trained in one process, and here are {self.accelerator.num_processes}; start it "
                "without accelerate launch or torchrun"
            )
        self.pooling = pooling
        memory_efficient.install(self.model)
        self.keep_best(patience)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int | None:
        """Pairs of the effective batch, over its micro-batches: what the sum of losses is divided by."""
        return sum(len(batch["input_ids"]) for batch in batch_samples) // 2 or None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """TRL's loss of our rewards, the mean over the pairs of the effective batch."""
        reader = partial(self._rewards, unwrapped(model), inputs.pop("prompt_lengths"))
        loss, outputs = super().compute_loss(reader, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            loss = loss * (len(inputs["input_ids"]) / 2 / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _rewards(
        self, model: Any, prompt_lengths: Tensor, input_ids: Tensor, attention_mask: Tensor, **ignored: Any
    ) -> SequenceClassifierOutput:
        """What TRL asks of its model: logits. Each prompt is computed once, and the pooling is ours."""
        inside = completion_tokens(attention_mask, prompt_lengths)
        # The model that accelerate prepared would bring its own; this one has been taken out of it.
        with self.accelerator.autocast(), own_noise(model, self.args):
            states = completion_states(model, input_ids, attention_mask, inside)
        # In float32, as RewardModel reads them, whatever precision the layers are computed in.
        return SequenceClassifierOutput(
            logits=model.score(pooled(states, attention_mask, self.pooling, prompt_lengths))
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "prompt_length"]


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
    about = {"base": lasting(config.model), "steps": steps}
    if made is not None:
        about["base_folder"] = os.path.relpath(base, final_folder(out))
    if config.pooling != "last":  # what a sequence classifier does unless it says otherwise
        about["pooling"] = config.pooling
    (out / "reward_model.json").write_text(json.dumps(about), encoding="utf-8")
    return steps
