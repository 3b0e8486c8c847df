"""Training steps of our reward trainer against TRL's RewardTrainer: time and memory.

Each contender has its own process; they take turns, step by step. Same model, same tokens of IMDB in the same order,
same LoRA, precision, batch and head. TRL runs without gradient checkpointing. Before anything is timed, the losses of
two steps are compared in float32. Prints the figures and writes JSON.

    python benchmarks/reward_step.py --model gemma-3-270m --prompt 20 --completion 48 --batch 8 --json out.json
"""

import json
import tempfile
from typing import Any

from train_step import pairs_of_reviews
from workers import (
    Worker,
    forget_peak,
    held,
    memory_above,
    ready,
    same_losses,
    serve,
    show_ratio,
    show_steps,
    step_options,
    step_spec,
    timed_step,
    write_steps,
)


def build(spec: dict[str, Any]) -> tuple[Any, float]:
    """A trainer ready to step, and the memory held with only its model loaded, MiB."""
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from madpo.models.hyperparameters import LoRA
    from madpo.models.load import load_classifier, load_tokenizer, placed, resolve_model
    from madpo.training.reward import RewardModelTrainer

    path = resolve_model(spec["model"])
    tokenizer = load_tokenizer(path)
    rows = pairs_of_reviews(path, spec["batch"] * spec["batches"], spec["prompt"], spec["completion"])
    data = Dataset.from_list(
        [
            {
                "pair_id": i,
                "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
                "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
                "prompt_length": spec["prompt"],
            }
            for i, row in enumerate(rows)
        ]
    )
    model = placed(load_classifier(path, num_labels=1, new_head=True, dtype=getattr(torch, spec["dtype"])))
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        for weight in model.parameters():  # the file's pages count as resident only once they are read
            weight.data = weight.data.clone()
        # The same head in both, small enough for rewards of about one log-odds.
        model.score.weight.copy_(1e-3 * torch.sin(torch.arange(model.score.weight.numel()))[None])
    loaded = held()
    arguments = RewardConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["batch"],
        bf16=spec["dtype"] == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1000,
    )
    trainer = (RewardModelTrainer if spec["name"] == "ours" else RewardTrainer)(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoRA().peft_config("SEQ_CLS", model),
    )
    return ready(trainer), loaded


def work(spec: dict[str, Any]) -> None:
    trainer, loaded = build(spec)
    rows = list(trainer.train_dataset)
    forget_peak()

    def step(index: int = 0) -> tuple[float, float]:
        return timed_step(trainer, rows[index * spec["batch"] : (index + 1) * spec["batch"]])

    serve({"step": step, "memory": lambda: memory_above(loaded)})


def main() -> None:
    options = step_options(__doc__).parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    base = step_spec(options)
    gap = same_losses(__file__, base)
    names = ["ours", "trl"]
    workers = {name: Worker(__file__, {**base, "name": name}) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats + 1):
        for name in names if repeat % 2 else reversed(names):
            taken = workers[name].ask("step")[1]
            if repeat:  # the first warms up
                seconds[name].append(taken)
    memory = {name: workers[name].ask("memory") for name in names}
    for worker in workers.values():
        worker.close()
    print(f"{options.model}, {options.prompt} + {options.completion} tokens, batch {options.batch}, {base['dtype']}:")
    show_steps(seconds, memory, options.batch)
    ratio = show_ratio(seconds, memory)
    write_steps(options, dtype=base["dtype"], seconds=seconds, ratio=ratio, memory_mib=memory, float32_gap=gap)


if __name__ == "__main__":
    main()
