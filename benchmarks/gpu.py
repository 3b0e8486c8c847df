"""Is it right on a GPU, and how fast is it: one command, one JSON. ``benchmarks/gpu.sh OUT.json`` runs it.

First what must be right, in seconds: packed rows against padded ones, bfloat16 against float32, both heads against a
softmax, sampling against ``model.generate``, a resumed training against one that ran through, FSDP2 against none, and
FlexAttention against dense masks. Then training steps, long prompts, reward models and sampling, in turns with TRL.
What is not done within ``--minutes`` is left out, and named. The exit status is 1 where something is wrong.

    python benchmarks/gpu.py out.json
    python benchmarks/gpu.py out.json --tiny         # the same path in minutes on a processor
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("llama", "gemma3", "qwen3")
LONG = [(70, 90, 60), (20, 150, 3), (140, 5, 44), (30, 8, 8)]
"""Tokens of (prompt, chosen, rejected): ragged, and two of them longer than a block of FlexAttention."""
TRAINING = {
    **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 4, "per_device_train_batch_size": 4},
    **{"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "bf16": False, "use_cpu": DEVICE == "cpu"},
    **{"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": DEVICE != "cpu"},
}


class Wrong(Exception):
    """A result is not what it must be."""


def near(found: Tensor, wanted: Tensor, bound: float) -> float:
    """The largest difference over 1 + the largest value.

    Raises:
        Wrong: it is above ``bound``.
    """
    apart = float((found.double() - wanted.double()).abs().max() / (1 + wanted.double().abs().max()))
    if not apart <= bound:
        raise Wrong(f"{apart:.2g} apart, where {bound:g} is allowed")
    return apart


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of two layers whose logits are not all near 0, with the same bfloat16 numbers in either type."""
    from madpo.models.load import load_model, resolve_model

    model = load_model(resolve_model(f"tiny-{family}"), dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(4 * weight.bfloat16())
    return model


def rows(lengths: list[tuple[int, int, int]] = LONG) -> dict[str, Tensor]:
    """Pairs of these lengths: chosen rows, then rejected ones, padded on the right."""
    draw = torch.Generator().manual_seed(0)
    sides: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for prompt, *completions in lengths:
        ids = torch.randint(5, 200, (prompt,), generator=draw)
        for side, count in zip(sides, completions, strict=True):
            side.append((ids, torch.randint(5, 200, (count,), generator=draw)))
    texts = [torch.cat(pair) for pair in (*sides[0], *sides[1])]
    masks = [torch.cat([torch.zeros_like(p), torch.ones_like(c)]) for p, c in (*sides[0], *sides[1])]
    pad = torch.nn.utils.rnn.pad_sequence
    found = {
        "input_ids": pad(texts, batch_first=True),
        "attention_mask": pad([torch.ones_like(text) for text in texts], batch_first=True),
        "completion_mask": pad(masks, batch_first=True),
    }
    return {name: value.to(DEVICE) for name, value in found.items()}


def scored(model: Any, *, pairs: bool, gradients: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probabilities of :func:`rows`, and the gradient of a weighted sum of them (0 without)."""
    from madpo.models.engine.logprobs import completion_logps

    model.requires_grad_(gradients).zero_grad()
    logps = completion_logps(model, **rows(), pairs=pairs).logps
    if not gradients:
        return logps, torch.zeros(1)
    (logps * torch.linspace(-2, 3, len(logps), device=logps.device)).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(found)


@contextmanager
def attention(kind: str) -> Iterator[None]:
    """Dense masks or FlexAttention, whatever the device."""
    from madpo.models.engine.packed_attention import ATTENTION

    os.environ[ATTENTION] = kind
    try:
        yield
    finally:
        del os.environ[ATTENTION]


def packed() -> dict[str, float]:
    """Packed rows give the values and gradients of padded ones, with dense masks, in float32."""
    found = {}
    with attention("dense"):
        for family in FAMILIES:
            model = tiny(family)
            values = [scored(model, pairs=pairs) for pairs in (True, False)]
            if not model._madpo_packs:
                raise Wrong(f"{family} is not packed")
            found[family] = near(values[0][0], values[1][0], 1e-4)
            found[f"{family}, gradient"] = near(values[0][1], values[1][1], 1e-3)
    return found


def flex() -> dict[str, float]:
    """FlexAttention, compiled, gives the values of dense masks in float32; gradients where the device has them."""
    found = {}
    for family in FAMILIES if DEVICE != "cpu" else FAMILIES[:1]:  # a C++ compiler takes half a minute for each
        model, values = tiny(family), []
        for kind in ("flex", "dense"):
            with attention(kind):
                values.append(scored(model, pairs=True, gradients=DEVICE != "cpu"))
        found[family] = near(values[0][0], values[1][0], 1e-4)
        found[f"{family}, gradient"] = near(values[0][1], values[1][1], 1e-3)
    return found


def half() -> dict[str, float]:
    """Log-probabilities in bfloat16 are those in float32 to a few hundredths of a nat a token."""
    found = {}
    tokens = rows()["completion_mask"].sum(1)
    for family in FAMILIES:
        kinds = (torch.bfloat16, torch.float32)
        logps, wanted = (scored(tiny(family, kind), pairs=True, gradients=False)[0] / tokens for kind in kinds)
        found[family] = near(logps, wanted, 0.05)
    return found


def heads() -> dict[str, float]:
    """Both heads give the log-probabilities and gradients of a softmax over all logits, in one tile and in many."""
    from madpo.models.engine.head import Head, token_logps

    draw = torch.Generator().manual_seed(0)
    table = torch.randn(9_001, 64, generator=draw).to(DEVICE)
    given = torch.randn(700, 64, generator=draw).to(DEVICE)
    labels = torch.randint(0, 9_001, (700,), generator=draw).to(DEVICE)
    found = {}
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        weight, states = table.to(dtype), given.to(dtype).requires_grad_()
        exact = states.detach().float().requires_grad_()
        wanted = (exact @ weight.float().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(wanted.sum(), exact)
        for name, trains, tile in (("frozen", False, None), ("frozen, tiles", False, 1_024), ("training", True, None)):
            head = Head(weight.clone().requires_grad_(trains), None, None, 1.0)
            logps = token_logps(states, head, labels, tile=tile).logps
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[kind] = near(logps, wanted, bound)
            found[f"{kind}, gradient"] = near(torch.autograd.grad(logps.sum(), states)[0], gradient, bound)
    return found


def sampling() -> dict[str, float]:
    """Greedy completions are those of ``model.generate``; samples do not depend on the batch."""
    from madpo.models.engine.sampling import generate

    model = tiny("llama")
    prompts = [[5 + i, 40, 7, 9 + i][: 2 + i % 3] for i in range(12)]
    how: dict[str, Any] = {"keys": range(12), "draw": 0, "seed": 0, "max_new_tokens": 24, "eos_token_ids": {2}}
    found = generate(model, prompts, **how, temperature=0.0, description="")
    for prompt, ours in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        if ours != theirs[0, len(prompt) :].tolist():
            raise Wrong(f"greedy from {prompt}: {ours} is not {theirs[0, len(prompt) :].tolist()}")
    drawn = [generate(model, prompts, **how, batch_size=size, description="") for size in (3, 12)]
    if drawn[0] != drawn[1]:
        raise Wrong("samples depend on the batch")
    return {"completions": float(len(found))}


def trained(folder: Path, *, stop: int = 4, resume: bool = False, **arguments: Any) -> Any:
    """A trainer after four steps of 4 pairs, or fewer, with a checkpoint every second step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from madpo import MADPO, PreferenceConfig, PreferenceTrainer
    from madpo.models.load import load_tokenizer, resolve_model

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step >= stop

    draw = torch.Generator().manual_seed(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = [{name: torch.randint(5, 200, (6,), generator=draw).tolist() for name in names} for _ in range(16)]
    torch.manual_seed(0)
    trainer = PreferenceTrainer(
        tiny("llama"),
        args=PreferenceConfig(output_dir=str(folder), **{**TRAINING, **arguments}),
        loss=MADPO(),
        train_dataset=Dataset.from_list([{**row, "reward_margin": 0.3 * i - 2} for i, row in enumerate(data)]),
        processing_class=load_tokenizer(resolve_model("tiny-llama")),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Stop()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def losses(trainer: Any) -> Tensor:
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def resuming() -> dict[str, float]:
    """A training that is stopped after two steps and goes on has the losses of one that ran through."""
    with tempfile.TemporaryDirectory() as out:
        whole = losses(trained(Path(out) / "whole"))
        trained(Path(out) / "parts", stop=2)
        parts = losses(trained(Path(out) / "parts", resume=True))
    return {"losses": near(parts, whole, 1e-5), "same bits": float(torch.equal(parts, whole))}


def sharding() -> dict[str, float]:
    """FSDP2 on one device has the losses of a training without it; in a process that torchrun starts."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        subprocess.run([*command, __file__, f"{out}/losses.json", "--sharded"], check=True)
        found = torch.tensor(json.loads(Path(out, "losses.json").read_text()))
        return {"losses": near(found, losses(trained(Path(out) / "plain")), 1e-4)}


def shard(out: Path) -> None:
    """The work of that process."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    if DEVICE == "cpu":  # accelerate keeps FSDP from processors, though torch can do it
        made, plugins = AcceleratorState.__init__, []

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            plugins.extend(plugin for plugin in (kwargs.get("fsdp_plugin"),) if plugin is not None)
            if plugins:
                self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

        AcceleratorState.__init__ = init
    wrapping = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
    trainer = trained(out.parent / "sharded", fsdp=True, fsdp_config=wrapping, save_strategy="no")
    if not all(isinstance(p, DTensor) for p in trainer.model.parameters()):
        raise Wrong("the parameters are not split")
    out.write_text(json.dumps(losses(trainer).tolist()))


CHECKS: dict[str, Callable[[], dict[str, float]]] = {
    "packed rows": packed,
    "bfloat16": half,
    "heads": heads,
    "sampling": sampling,
    "checkpoint and resume": resuming,
    "FSDP2 on one device": sharding,
    "FlexAttention": flex,
}


def table(small: bool) -> dict[str, list[str]]:
    """Name -> script and arguments: the paper's shape, a batch that fills the card, long prompts."""
    paper, long = ["--prompt", "20", "--completion", "176"], ["--prompt", "384", "--completion", "64"]
    if small:
        step = ["--model", "tiny-gemma3", "--prompt", "5", "--completion", "8", "--batch", "2", "--repeats", "2"]
        return {
            "step": ["train_step.py", *step, "--liger", "--default", "--weight-repeats", "2"],
            "reward model": ["reward_step.py", *step],
            "sampling": [
                *["generation.py", "--model", "tiny-gemma3", "--prompt", "5", "--completion", "8"],
                *["--prompts", "8", "--batches", "4", "8", "--repeats", "2"],
            ],
        }
    liger = ["--repeats", "20", "--liger"]
    smol = ["--model", "smollm2-135m-instruct", *long]
    return {
        "step": ["train_step.py", *paper, "--batch", "16", *liger, "--default", "--weight-repeats", "40"],
        "step, batch 64": ["train_step.py", *paper, "--batch", "64", *liger],
        "step, long prompts": ["train_step.py", *smol, "--batch", "16", *liger],
        "reward model, long prompts": ["reward_step.py", *smol, "--batch", "16", "--repeats", "20"],
        "sampling": ["generation.py", "--prompts", "512", "--batches", "32", "128", "512"],
    }


def checked() -> dict[str, Any]:
    found = {}
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            outcome: dict[str, Any] = {"right": True, "numbers": check()}
        except Exception as error:  # every other check is still made
            outcome = {"right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        found[name] = {**outcome, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name}: {'right' if outcome['right'] else outcome['error']} ({found[name]['seconds']} s)", flush=True)
    return found


def measured(small: bool, until: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (script, *arguments) in table(small).items():
        left = until - time.monotonic()
        with tempfile.TemporaryDirectory() as out:
            place = Path(out) / "out.json"
            try:
                command = [sys.executable, str(HERE / script), *arguments, "--json", str(place)]
                subprocess.run(command, check=True, timeout=max(left, 1))
                found[name] = json.loads(place.read_text())
            except subprocess.TimeoutExpired:
                found[name] = {"error": "no time was left"}
            except subprocess.CalledProcessError as error:
                found[name] = {"error": f"ended with {error.returncode}"}
        if "error" in found[name]:
            print(f"{name}: {found[name]['error']}", flush=True)
    return found


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "device": platform.processor() or platform.machine() if gpu is None else gpu.name,
        "memory": None if gpu is None else gpu.total_memory,
        "versions": {name: version(name) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models of two layers, on a processor too")
    parser.add_argument("--minutes", type=float, default=11.5)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sharded:
        return shard(options.out)
    if DEVICE == "cpu" and not options.tiny:
        raise SystemExit("there is no GPU; add --tiny, or measure the processor by make bench")
    until = time.monotonic() + 60 * options.minutes
    whole: dict[str, Any] = {"machine": machine(), "tiny": options.tiny}
    for part, make in (("checks", checked), ("speeds", lambda: measured(options.tiny, until))):
        whole[part] = make()
        options.out.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    bad = [name for part in ("checks", "speeds") for name, found in whole[part].items() if "error" in found]
    raise SystemExit(f"not right, or not measured: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
