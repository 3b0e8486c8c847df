"""Training steps of PreferenceTrainer against TRL's DPOTrainer: time, memory, and the share of the machine's peak.

Each contender has its own process; they take turns, step by step. Same model, same tokens of IMDB in the same order,
same LoRA, precision and batch, reference log-probabilities precomputed. TRL is tuned (no gradient checkpointing,
bfloat16 weights and autocast, no padding beyond the batch); ``--default`` times its defaults as well. Before anything
is timed, the losses of two steps are compared in float32. Prints the figures and writes JSON.

    python benchmarks/train_step.py --model gemma-3-270m --prompt 20 --completion 48 --batch 8 --json out.json
"""

import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from typing import Any

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


def pairs_of_reviews(path: Any, count: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """A review's beginning, its own continuation, and the continuation of another review; all of full length."""
    from madpo.data.corpus import PackagedIMDB, load_corpus
    from madpo.models.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    rows: list[list[int]] = []
    for text in load_corpus(PackagedIMDB())["text"]:
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= prompt + completion:
            rows.append(ids)
        if len(rows) == count + 1:
            break
    return [
        {
            "prompt_ids": rows[i][:prompt],
            "chosen_ids": rows[i][prompt : prompt + completion],
            "rejected_ids": rows[i + 1][prompt : prompt + completion],
            "reward_margin": 0.1 * (i % 40) - 1,
        }
        for i in range(count)
    ]


def pairs_on_paper(count: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """Pairs of these lengths for a model without weights, with the columns that need some."""
    ids = {"prompt_ids": [5] * prompt, "chosen_ids": [6] * completion, "rejected_ids": [7] * completion}
    numbers = {"reward_margin": 1.0, "ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0}
    return [{**ids, **numbers} for _ in range(count)]


def build(spec: dict[str, Any]) -> tuple[Any, float]:
    """A trainer ready to step, and the memory held with only its model loaded, MiB."""
    from contextlib import nullcontext

    import torch
    from datasets import Dataset
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl import DPOConfig, DPOTrainer

    from madpo.losses import MADPO
    from madpo.models.load import LoRA, load_model, load_tokenizer, resolve_model, small_tokenizer
    from madpo.models.on_paper import on_paper, paper_model
    from madpo.training import PreferenceConfig, PreferenceTrainer

    class TakesIds(DPOTrainer):
        """Stock TRL on the same token ids, with the reference columns that there are."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args):
            known = "ref_chosen_logps" in dataset.column_names
            return dataset if known else super()._precompute_ref_logps(dataset, *args)

    path = resolve_model(spec["model"])
    count, lengths = spec["batch"] * spec["batches"], (spec["prompt"], spec["completion"])
    dtype = getattr(torch, spec["dtype"])
    making: Any = nullcontext()
    if spec.get("paper"):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model, tokenizer, making = paper_model(path, dtype=dtype, mode=mode), small_tokenizer(), on_paper(mode)
        data = Dataset.from_list(pairs_on_paper(count, *lengths))
    else:
        model, tokenizer = load_model(path, dtype=dtype), load_tokenizer(path)
        data = Dataset.from_list(pairs_of_reviews(path, count, *lengths))
        for weight in model.parameters():  # the file's pages count as resident only once they are read
            weight.data = weight.data.clone()
    loaded = held()
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": spec["batch"],
        "bf16": dtype is torch.bfloat16,
        "use_cpu": not torch.accelerator.is_available(),
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1000,
    }
    if spec["name"] != "trl default":
        arguments |= {
            "activation_checkpointing": False,
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": spec["batch"],
        }
    if spec["name"] == "trl liger":
        arguments["use_liger_kernel"] = True
    ours = spec["name"] == "ours"
    cls, args_cls, extra = (
        (PreferenceTrainer, PreferenceConfig, {"loss": MADPO()}) if ours else (TakesIds, DPOConfig, {})
    )
    with making:
        built = cls(
            model,
            args=args_cls(**arguments),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=None if spec.get("full") else LoRA().peft_config("CAUSAL_LM", model),
            **extra,
        )
        return ready(built), loaded


def work(spec: dict[str, Any]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

    from madpo.losses import DPO, MADPO

    built, loaded = build(spec)
    rows = list(built.train_dataset)
    losses = {"dpo": DPO(), "madpo": MADPO()}
    forget_peak()

    def step(loss: str, index: int = 0) -> tuple[float, float]:
        if spec["name"] == "ours":
            built.loss = losses[loss]
        return timed_step(built, rows[index * spec["batch"] : (index + 1) * spec["batch"]])

    def operations() -> float:
        # torch leaves these out
        flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]
        register_flop_formula(torch.ops.mkldnn._linear_pointwise)(
            lambda x, weight, *_, **named: 2 * x[0] * x[1] * weight[0]
        )
        with FlopCounterMode(display=False) as counter:
            step("dpo")
        return float(counter.get_total_flops())

    def peak() -> float:
        """Floating-point operations per second of a large matrix product in the step's precision."""
        x = torch.randn(2048, 2048, device=built.accelerator.device).to(getattr(torch, spec["dtype"]))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            x @ x
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * 2048**3 / statistics.median(seconds)

    serve({"step": step, "operations": operations, "peak": peak, "memory": lambda: memory_above(loaded)})


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (normal) of ratios."""
    mean = statistics.fmean(ratios)
    half = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
    return mean, mean - half, mean + half


def median_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median of ratios and its 95 % interval (order statistics), which a few disturbed steps do not move."""
    from scipy.stats import quantile_test

    low, high = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    return statistics.median(ratios), float(low), float(high)


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument(
        "--weight-repeats", type=int, default=0, help="interleaved DPO and MADPO steps (40 for the claim)"
    )
    parser.add_argument("--default", action="store_true", help="also time TRL's defaults")
    parser.add_argument("--liger", action="store_true", help="also time tuned TRL with Liger's kernels, on a GPU")
    parser.add_argument("--ours-model", help="another model for ours only: a copy with a trimmed vocabulary")
    parser.add_argument("--unchecked", action="store_true", help="skip the float32 comparison")
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    import torch

    base = step_spec(options)
    # A trimmed copy has other tokens: its losses are not TRL's, which its exactness tests speak of.
    gap = None if options.unchecked or options.ours_model else same_losses(__file__, base, loss="dpo")
    dtype = base["dtype"]
    liger = options.liger and torch.cuda.is_available() and find_spec("liger_kernel") is not None
    if options.liger and not liger:
        print("Liger's kernels are left out: they need a GPU and the package liger-kernel")
    names = ["ours", "trl", *["trl liger"] * liger, *["trl default"] * options.default]
    models = {"ours": options.ours_model or options.model}
    workers = {
        name: Worker(__file__, {**base, "name": name, "model": models.get(name, options.model)}) for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for repeat in range(options.repeats + 1):
        for name in names if repeat % 2 else reversed(names):
            if name == "trl default" and repeat > 2:
                continue
            taken = workers[name].ask("step", loss="dpo")[1]
            if repeat:  # the first warms up
                seconds[name].append(taken)
            if name == "ours":
                peaks.append(workers["ours"].ask("peak"))
    memory = {name: workers[name].ask("memory") for name in names}
    operations = workers["ours"].ask("operations")
    for name in names[1:]:
        workers[name].close()
    weight = []
    for repeat in range(options.weight_repeats + 1):
        order = ("dpo", "madpo") if repeat % 2 else ("madpo", "dpo")
        taken = {loss: workers["ours"].ask("step", loss=loss)[1] for loss in order}
        if repeat:
            weight.append(taken["madpo"] / taken["dpo"])
    workers["ours"].close()

    print(f"{options.model}, {options.prompt} + {options.completion} tokens, batch {options.batch}, {dtype}:")
    if options.ours_model:
        print(f"  ours on {options.ours_model}, with as many of its own tokens")
    show_steps(seconds, memory, options.batch)
    ratio = show_ratio(seconds, memory)
    share = operations / statistics.median(seconds["ours"]) / statistics.median(peaks)
    peak = statistics.median(peaks) / 1e9
    print(f"  {operations / 1e9:.0f} GFLOP per step: {share:.0%} of a {peak:.0f} GFLOP/s product")
    if weight:
        mean, low, high = interval(weight)
        print(f"  MADPO step / DPO step {mean:.3f} x ({low:.3f} to {high:.3f}), {len(weight)} pairs of steps")
        middle, low, high = median_interval(weight)
        print(f"    its median {middle:.3f} x ({low:.3f} to {high:.3f})")
    write_steps(
        options,
        dtype=dtype,
        seconds=seconds,
        ratio=ratio,
        memory_mib=memory,
        operations=operations,
        peaks=peaks,
        share_of_peak=share,
        madpo_over_dpo=weight,
        float32_gap=gap,
    )


if __name__ == "__main__":
    main()
