"""Trainers of policies and reward models on a tiny model, for tests of what a trainer keeps and writes."""

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, RewardConfig

from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.models.load import load_classifier, load_tokenizer
from madpo.training.reward import RewardModelTrainer
from trainer_settings import QUIET

SETTINGS = {
    **QUIET,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 1,
}


def pairs(count=16, seed=0):
    generator = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict(
        {name: [generator.integers(5, 200, generator.integers(2, 9)).tolist() for _ in range(count)] for name in names}
    )


class IdsAsGiven(DPOTrainer):
    """Stock TRL without its tokenisation, so that both trainers see the same ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def build(folder, out, callbacks=(), loss=None, *, stock=False, **changes):
    """A trainer of a small adapter, ours or TRL's; ``changes`` are arguments, or datasets and parts of the trainer."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=changes.pop("lora_rank", 2),
        lora_dropout=changes.pop("lora_dropout", 0.1),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    parts = {
        "train_dataset": pairs(),
        "eval_dataset": pairs(8, seed=1),
        **{name: changes.pop(name) for name in ("eval_dataset", "train_dataset", "optimizers") if name in changes},
    }
    settings = {"output_dir": str(out), **SETTINGS, **changes}
    trainer, args = (
        (IdsAsGiven, DPOConfig(gradient_checkpointing=False, disable_dropout=False, **settings))
        if stock
        else (PreferenceTrainer, PreferenceConfig(**settings))
    )
    return trainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=args,
        processing_class=load_tokenizer(folder),
        peft_config=lora,
        callbacks=list(callbacks),
        **parts,
        **({} if stock else {"loss": loss or DPO()}),
    )


def weights(trainer):
    """Copies of what a trainer trains."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def reward_trainer(folder, out, callbacks=(), patience=2):
    torch.manual_seed(0)
    rows = pairs()
    data = Dataset.from_dict(
        {
            "pair_id": list(range(16)),
            "prompt_length": [len(ids) for ids in rows["prompt_ids"]],
            **{
                side: [[*p, *c] for p, c in zip(rows["prompt_ids"], rows[side], strict=True)]
                for side in ("chosen_ids", "rejected_ids")
            },
        }
    )
    trainer = RewardModelTrainer(
        load_classifier(folder, num_labels=1, new_head=True),
        RewardConfig(output_dir=str(out), max_length=None, eval_strategy="steps", eval_steps=1, **SETTINGS),
        train_dataset=data,
        eval_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]),
        patience=patience,
        callbacks=list(callbacks),
    )
    trainer.args.save_steps = 1
    trainer.state.save_steps = 1
    return trainer
