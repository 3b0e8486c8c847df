"""Training steps of PreferenceTrainer against TRL's DPOTrainer, interleaved in one process.

Same model, tokens, order, LoRA, precision and precomputed reference; TRL tuned (no gradient checkpointing, reference
precomputed, no padding beyond the batch). Before anything is timed, the losses of both are compared in float32 on the
first batch. Prints pairs per second of each and the ratio, and writes JSON.

    python benchmarks/train_step.py --model gemma-3-270m --prompt 20 --completion 48 --batch 8 --repeats 5
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from madpo.losses import DPO, MADPO
from madpo.models import LoRA, compute_dtype, load_model, load_tokenizer, resolve_model
from madpo.training import PreferenceConfig, PreferenceTrainer


class TakesIds(DPOTrainer):
    """Stock TRL on the same token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def random_pairs(count: int, prompt: int, completion: int, vocabulary: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, vocabulary, (length,), generator=generator).tolist()

    rows = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
        for _ in range(count)
    ]
    return Dataset.from_list([{**row, "reward_margin": 0.1 * (i % 40) - 1} for i, row in enumerate(rows)])


def trainer(cls, args_cls, path, data, batch, dtype, **extra):
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "bf16": dtype is torch.bfloat16,
        "use_cpu": not torch.accelerator.is_available(),
        "activation_checkpointing": False,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": batch,
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1000,
        "disable_dropout": True,
    }
    built = cls(
        load_model(path, dtype=dtype),
        args=args_cls(**arguments),
        train_dataset=data,
        processing_class=load_tokenizer(path),
        peft_config=LoRA().peft_config("CAUSAL_LM"),
        **extra,
    )
    built.remove_callback(PrinterCallback)
    built.create_optimizer()
    built.model, built.optimizer = built.accelerator.prepare(built.model, built.optimizer)
    built.model_wrapped = built.model
    built.current_gradient_accumulation_steps = 1
    return built


def step(built, rows) -> tuple[float, float]:
    """One optimiser step; its loss and its seconds."""
    batch = built._prepare_inputs(built.data_collator(rows))
    count = torch.tensor(len(rows), device=built.accelerator.device)
    start = time.perf_counter()
    loss = built.training_step(built.model, batch, count)
    built.optimizer.step()
    built.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(loss), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--completion", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = resolve_model(options.model)
    vocabulary = load_model(path).get_input_embeddings().weight.shape[0]
    data = random_pairs(options.batch * 2, options.prompt, options.completion, vocabulary)

    exact = {}
    for name, cls, args_cls, extra in (
        ("ours", PreferenceTrainer, PreferenceConfig, {"loss": DPO()}),
        ("trl", TakesIds, DPOConfig, {}),
    ):
        built = trainer(cls, args_cls, path, data.select(range(options.batch)), options.batch, torch.float32, **extra)
        rows = list(built.train_dataset)
        exact[name] = [step(built, rows)[0] for _ in range(2)]
        del built
    gap = max(abs(a - b) / abs(b) for a, b in zip(exact["ours"], exact["trl"], strict=True))
    print(f"float32 losses of two steps: ours {exact['ours']}, TRL {exact['trl']}, relative gap {gap:.1e}")
    if gap > 1e-5:
        raise SystemExit("the losses differ: nothing is timed")

    dtype = compute_dtype()
    contenders = {
        "trl": trainer(TakesIds, DPOConfig, path, data, options.batch, dtype),
        "dpo": trainer(PreferenceTrainer, PreferenceConfig, path, data, options.batch, dtype, loss=DPO()),
        "madpo": trainer(PreferenceTrainer, PreferenceConfig, path, data, options.batch, dtype, loss=MADPO()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    batches = {name: list(built.train_dataset)[: options.batch] for name, built in contenders.items()}
    for repeat in range(options.repeats + 1):
        for name, built in contenders.items():
            _, taken = step(built, batches[name])
            if repeat:  # the first warms up
                seconds[name].append(taken)
    rate = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(t / o for t, o in zip(seconds["trl"], seconds["dpo"], strict=True))
    madpo = statistics.median(m / d for m, d in zip(seconds["madpo"], seconds["dpo"], strict=True))
    print(f"{options.model}, {options.prompt} + {options.completion} tokens, batch {options.batch}, {dtype}:")
    for name, value in rate.items():
        print(f"  {name:6} {value:6.2f} pairs/s  (steps of {min(seconds[name]):.2f} to {max(seconds[name]):.2f} s)")
    print(f"  ours / TRL {ratio:.2f} x   MADPO step / DPO step {madpo:.3f} x")
    if options.json:
        result = {"options": {**vars(options), "json": None}, "seconds": seconds, "ratio": ratio, "float32_gap": gap}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
