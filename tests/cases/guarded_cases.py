"""Short trainings on a tiny model, whose numbers a test then spoils."""

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.models.load import LoRA, load_tokenizer
from trainer_settings import QUIET

SETTINGS = {
    **QUIET,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
}


def pairs(count=8, *, tokens=(2, 9), **columns):
    generator = np.random.default_rng(3)

    def draw(low, high):
        return [generator.integers(5, 200, generator.integers(low, high)).tolist() for _ in range(count)]

    rows = {"prompt_ids": draw(2, 6), "chosen_ids": draw(*tokens), "rejected_ids": draw(*tokens)}
    reference = {name: (-10 - generator.random(count)).tolist() for name in ("ref_chosen_logps", "ref_rejected_logps")}
    scores = {"chosen_score": [2.0] * count, "rejected_score": [1.0] * count}
    return Dataset.from_dict(
        {"pair_id": list(range(100, 100 + count)), **rows, **reference, **scores, "reward_margin": [1.0] * count}
        | columns
    )


class At(TrainerCallback):
    """Does something to the model after a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.what(model)


def build(folder, out, loss=None, data=None, *, peft=True, dtype=torch.float32, callback=None, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PreferenceTrainer(
        model,
        args=PreferenceConfig(output_dir=str(out), **{**SETTINGS, **changes}),
        loss=loss or DPO(),
        train_dataset=pairs() if data is None else data,
        processing_class=load_tokenizer(folder),
        peft_config=LoRA(rank=4, alpha=8).peft_config("CAUSAL_LM", model) if peft else None,
        callbacks=[callback] if callback else None,
    )
