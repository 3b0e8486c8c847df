"""What two processes and one must do alike; run by a launcher, by a fork, or by a test itself."""

import contextlib
import gc
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from losses_cases import EVERY_LOSS
from madpo import DPO, PreferenceConfig, PreferenceTrainer, processes
from madpo.cli import main
from madpo.losses import Custom
from madpo.models import load_tokenizer
from madpo.practice import scoring

BATCH = 8  # pairs per optimiser step, over all processes
PAIRS = 21  # two full steps and one of 5, of which the second process has one pair and repeats others
HELDOUT = 5
LIMIT = 12  # tokens; one pair has a prompt that leaves no room for completions
PART = 8  # pairs per part of `madpo score`
KINDS = (
    *("dpo", "ipo-sum", "rdpo", "simpo", "wpo", "madpo", "soft_madpo", "soft_dpo", "odpo", "rpo-sq", "omni_dpo"),
    *("beta_dpo", "beta_dpo-official", "alpha_dpo"),
)


def pairs(count, seed, *, positive=False):
    """Rows with every column that a loss may need; ODPO's offset is a logarithm and wants positive margins."""
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


def trainer_of(folder, out, loss, *, micro, accumulation, dropout=0.0, reference=True, **changes):
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
    train, heldout = (pairs(n, seed, positive=loss.kind == "odpo") for seed, n in enumerate((PAIRS, HELDOUT)))
    if not reference:
        train, heldout = train.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]), None
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=PreferenceConfig(output_dir=str(out), **{**settings, **changes}),
        loss=loss,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=load_tokenizer(folder),
        peft_config=lora,
    )


def cases():
    """Name -> (loss, micro-batches per step)."""
    own = Custom(target="madpo.losses:BetaDPO", parameters={"keep": 0.5})
    found = {name: (loss, 2) for name, loss in {**{n: EVERY_LOSS[n] for n in KINDS}, "custom": own}.items()}
    return found | {f"{name}, one micro-batch": (EVERY_LOSS[name], 1) for name in ("dpo", "beta_dpo", "alpha_dpo")}


def columns(folder: Path, out: Path) -> dict[str, list[float]]:
    """Reference columns of 21 pairs in batches of 4: six batches, the last of one pair."""
    trainer = trainer_of(folder, out / "columns", DPO(), micro=4, accumulation=1, reference=False)
    return {name: list(trainer.train_dataset[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")}


def score(out: Path, name: str) -> int:
    """``madpo score`` of ``out/pairs.jsonl``."""
    scoring.PART = PART
    place = ["--reward_model", str(out / "reward"), "--output_dir", str(out / name)]
    return main(["score", str(out / "pairs.jsonl"), *place])


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


def launched(folder: Path, out: Path) -> int:
    """What each process of a launch does, ending with a mistake that the second one alone meets."""
    found = {"columns": columns(folder, out), "trajectories": trajectories(folder, out, processes.count())}
    (out / f"{processes.rank()}.json").write_text(json.dumps(found))
    assert score(out, "scored") == score(out, "continued") == score(out, "scored") == 0
    if processes.rank() == 1:
        load = scoring.load_scorer

        def diverged(*args, **kwargs):
            scorer = load(*args, **kwargs)
            torch.nn.init.constant_(scorer.model.inner.score.weight, float("inf"))
            return scorer

        scoring.load_scorer = diverged
    return score(out, "diverged")


if __name__ == "__main__":
    raise SystemExit(launched(*map(Path, sys.argv[1:])))
