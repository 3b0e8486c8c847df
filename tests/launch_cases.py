"""What two processes and one must do alike; run by a launcher, by a fork, or by a test itself."""

import contextlib
import gc
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from losses_cases import EVERY_LOSS
from madpo import PreferenceConfig, PreferenceTrainer
from madpo.losses import Custom
from madpo.models import load_tokenizer

BATCH = 8  # pairs per optimiser step, over all processes
PAIRS = 21  # two full steps and one of 5, of which the second process has one pair and repeats others
HELDOUT = 5
LIMIT = 12  # tokens; one pair has a prompt that leaves no room for completions


def pairs(count, seed, *, positive=False):
    generator = np.random.default_rng(seed)

    def ids(low, high):
        return [int(i) for i in generator.integers(5, 200, generator.integers(low, high))]

    rows = [
        {
            "pair_id": 100 + i,
            "prompt_ids": ids(2, 5),
            "chosen_ids": ids(1, 7),
            "rejected_ids": ids(1, 7),
            "reward_margin": (abs if positive else float)(float(generator.normal(1, 3))),
            "chosen_score": float(generator.normal(6, 1)),
            "rejected_score": float(generator.normal(4, 1)),
            "weight": float(generator.choice([0.5, 1.0, 2.0])),
            # Apart from the policy: a log-ratio of pure rounding is not the same in batches of other lengths.
            "ref_chosen_logps": float(generator.normal(-25, 5)),
            "ref_rejected_logps": float(generator.normal(-25, 5)),
        }
        for i in range(count)
    ]
    rows[3]["prompt_ids"] = ids(LIMIT, LIMIT + 1)
    return Dataset.from_list(rows)


def trainer_of(folder, out, loss, *, micro, accumulation, dropout=0.0, **changes):
    settings = {
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": LIMIT,
        "token_metrics": "always",
        "adam_epsilon": 1e-5,  # a gradient that is rounding alone must not become a step of full length
    }
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=PreferenceConfig(output_dir=str(out), **{**settings, **changes}),
        loss=loss,
        train_dataset=pairs(PAIRS, 0, positive=loss.kind == "odpo"),  # whose offset is a logarithm
        eval_dataset=pairs(HELDOUT, 1, positive=loss.kind == "odpo"),
        processing_class=load_tokenizer(folder),
        peft_config=lora,
    )


def cases():
    """Name -> (loss, micro-batches per step)."""
    own = Custom(target="madpo.losses:BetaDPO", parameters={"keep": 0.5})
    found = {name: (loss, 2) for name, loss in {**EVERY_LOSS, "custom": own}.items()}
    return found | {f"{name}, one micro-batch": (EVERY_LOSS[name], 1) for name in ("dpo", "beta_dpo", "alpha_dpo")}


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def trajectories(folder: Path, out: Path, processes: int) -> dict:
    """Every case: the logged rows, the evaluation, the loss's statistics and the final weights."""
    found = {}
    gc.collect()
    gc.freeze()  # every trainer collects garbage, and would look through all libraries each time
    for name, (loss, accumulation) in cases().items():
        micro = BATCH // accumulation // processes
        trainer = trainer_of(folder, out / "trainer", loss, micro=micro, accumulation=accumulation)
        with contextlib.redirect_stdout(io.StringIO()):  # transformers prints every row
            trainer.train()
            evaluation = trainer.evaluate()
        clock = ("runtime", "per_second")
        rows = [{k: v for k, v in row.items() if not k.endswith(clock)} for row in trainer.state.log_history]
        found[name] = {
            "rows": rows,
            "evaluation": {k: v for k, v in evaluation.items() if not k.endswith(clock)},
            "state": {k: float(v) for k, v in trainer.loss_state.state_dict().items()},
            "weights": {k: v.flatten().tolist() for k, v in weights(trainer).items()},
        }
    gc.unfreeze()
    return found


if __name__ == "__main__":
    import sys

    here, to = map(Path, sys.argv[1:])
    result = trajectories(here, to, int(os.environ["WORLD_SIZE"]))
    (to / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
