"""A study by madpo against the same study as a script on TRL and ``model.generate``, phase by phase.

Ours runs first: SFT, two responses to each prompt, a reward model, its margins, the reference, one policy (MADPO) and
one evaluation. The script then does the same work on the same texts, pairs and sizes, as its documentation suggests and
tuned (no gradient checkpointing, precomputed reference, no padding beyond a batch), with DPO's loss in MADPO's place.
Both use the same base model, precision and LoRA; with ``--script-model`` the script has another model, for example
the whole vocabulary of which ours has a part, as somebody without the cut would. Each side has its own process.
Seconds of processor time are reported next to wall seconds, since they hardly depend on what else the machine does.
Writes JSON.

    python benchmarks/study.py --model gemma-3-270m-imdb --json out.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers import Worker, serve

BATCH, LEARNING_RATE, GENERATED = 8, 2e-4, 48
SETTINGS = {
    "reward_model.kind": "trained",
    "reward_model.pooling": "mean",
    "reward_model.optimisation": "{ learning_rate = 3e-4, epochs = 2, batch_size = 8 }",
    "reward_model.eval_every": "15",
    "policy.optimisation": "{ learning_rate = 3e-4, epochs = 1, batch_size = 8 }",
    "vocabulary": "false",
}
PHASES = {
    "sft": "sft",
    "responses": "responses",
    "reward_model": "reward model",
    "margins": "margins",
    "reference": "reference",
    "policy": "policy",
    "evaluation": "evaluation",
}
"""First part of our step's name -> phase."""


class Clock:
    """Processor and wall seconds since the last look."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.look("")

    def look(self, phase: str) -> None:
        """Count what has passed for ``phase``."""
        now = [time.process_time(), time.perf_counter()]
        if phase:
            known = self.seconds.setdefault(phase, [0.0, 0.0])
            self.seconds[phase] = [a + b - c for a, b, c in zip(known, now, self._last, strict=True)]
        self._last = now


def experiment_of(model: str, settings: dict[str, str]) -> Any:
    """The quickstart with a trained reward model and the user's settings."""
    from madpo.core.config import find_experiment, load_config
    from madpo.study.experiment import Experiment

    wanted = [f"{name}={value}" for name, value in {**SETTINGS, "model": model, **settings}.items()]
    return load_config(find_experiment("quickstart"), Experiment, wanted)


def ours(model: str, root: str, settings: dict[str, str]) -> dict[str, list[float]]:
    from madpo.runner.executors import Inline
    from madpo.runner.run import run

    experiment = experiment_of(model, settings)
    clock = Clock()
    with Inline() as place:
        result = run(
            experiment.steps(),
            Path(root),
            place,
            only=["evaluation/*/madpo/*"],
            on_finished=lambda record: clock.look(PHASES.get(record.name.split("/")[0], "oracle and labels")),
        )
    if result.failed:
        raise SystemExit(f"steps failed: {', '.join(result.failed)}")
    return clock.seconds


def script(model: str, root: str, settings: dict[str, str], own_model: str) -> dict[str, list[float]]:
    """What a careful user writes on TRL, with the model ``own_model`` on our texts and pairs."""
    import pandas as pd
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from madpo.data.corpus import load_corpus, sft_reviews
    from madpo.models.hyperparameters import LoRA
    from madpo.models.load import compute_dtype, load_tokenizer, resolve_model

    class TakesIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    e = experiment_of(model, settings)
    place, dtype = resolve_model(own_model), compute_dtype()
    tokenizer, known = load_tokenizer(place), load_tokenizer(resolve_model(model))
    reviews = list(sft_reviews(load_corpus(e.corpus), e.sft.reviews)["text"])
    pairs = pd.read_parquet(next(Path(root).glob("pairs/*/*/pairs.parquet")))
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):  # the same tokens by name, as ids of the script's model
        pairs[name] = [tokenizer.convert_tokens_to_ids(known.convert_ids_to_tokens(list(ids))) for ids in pairs[name]]
    prompts = list(pairs["prompt_ids"])
    length = e.responses.prompt_tokens + e.responses.max_new_tokens
    tuned = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 2 * BATCH,
        "bf16": dtype is torch.bfloat16,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }

    def causal(path: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    def lora(kind: str, base: Any) -> Any:
        return LoRA().peft_config(kind, base)

    def sides(part: pd.DataFrame) -> Dataset:
        ids = {
            side: [[*p, *r] for p, r in zip(part["prompt_ids"], part[f"{side}_ids"], strict=True)]
            for side in ("chosen", "rejected")
        }
        return Dataset.from_dict({f"{side}_ids": rows for side, rows in ids.items()})

    @torch.inference_mode()
    def generated(policy: Any, wanted_prompts: list[list[int]], samples: int) -> list[list[int]]:
        policy.eval()
        found = []
        for start in range(0, len(wanted_prompts), GENERATED // samples):
            ids = torch.tensor(wanted_prompts[start : start + GENERATED // samples])
            out = policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=e.responses.max_new_tokens,
                num_return_sequences=samples,
                pad_token_id=tokenizer.pad_token_id,
            )
            found += out.tolist()
        return found

    @torch.inference_mode()
    def scored(model: Any, rows: list[list[int]], whole: bool) -> list[torch.Tensor]:
        found = []
        for start in range(0, len(rows), 2 * BATCH):
            batch = tokenizer.pad({"input_ids": rows[start : start + 2 * BATCH]}, return_tensors="pt")
            logits = model(**batch).logits
            found.append(logits[:, e.responses.prompt_tokens - 1 : -1].float().log_softmax(-1) if whole else logits)
        return found

    clock = Clock()
    model = causal(place)
    trainer: Any = SFTTrainer(
        model,
        args=SFTConfig(max_length=length, learning_rate=LEARNING_RATE, num_train_epochs=1, **tuned),
        train_dataset=Dataset.from_dict({"text": reviews}),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM", model),
    )
    trainer.train()
    sft = tempfile.mkdtemp()
    trainer.model.merge_and_unload().save_pretrained(sft)
    clock.look("sft")

    generated(causal(sft), prompts, 2)
    clock.look("responses")

    train, held = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    classifier = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=dtype)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    rm, settings_rm = e.reward_model, e.reward_model.optimisation
    assert settings_rm is not None
    trainer = RewardTrainer(
        classifier,
        args=RewardConfig(
            max_length=None,
            learning_rate=settings_rm.learning_rate,
            num_train_epochs=settings_rm.epochs,
            eval_strategy="steps",
            eval_steps=rm.eval_every,
            **tuned,
        ),
        train_dataset=sides(train),
        eval_dataset=sides(held),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS", classifier),
    )
    trainer.train()
    clock.look("reward model")
    trainer.model.eval()
    for side in ("chosen_ids", "rejected_ids"):
        scored(trainer.model, sides(pairs)[side], whole=False)
    clock.look("margins")

    model = causal(sft)
    trainer = TakesIds(
        model,
        args=DPOConfig(
            max_length=None,
            learning_rate=e.policy.optimisation.learning_rate,
            num_train_epochs=e.policy.optimisation.epochs,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=BATCH,
            **tuned,
        ),
        train_dataset=Dataset.from_dict({n: list(train[n]) for n in ("prompt_ids", "chosen_ids", "rejected_ids")}),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM", model),
    )
    clock.look("reference")  # computed when the trainer is built
    trainer.train()
    trainer.save_model(policy := tempfile.mkdtemp())
    clock.look("policy")

    reference = causal(sft)
    model = PeftModel.from_pretrained(causal(sft), policy)
    asked = list(held["prompt_ids"])[: e.evaluation.prompts]
    texts = generated(model, asked, 1)
    for new, old in zip(scored(model, texts, whole=True), scored(reference, texts, whole=True), strict=True):
        (new.exp() * (new - old)).sum(-1)
    clock.look("evaluation")
    return clock.seconds


def work(spec: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(0)
    sides: dict[str, Callable[..., dict[str, list[float]]]] = {"ours": ours, "script": script}
    serve({"study": sides[spec["name"]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m-imdb", help="of both sides")
    parser.add_argument("--script-model", help="of the script, if another one")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the experiment, NAME=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    root = tempfile.mkdtemp()
    settings = dict(word.split("=", 1) for word in options.set)
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("ours", "script"):
        worker = Worker(__file__, {"name": name})
        own = {"own_model": options.script_model or options.model} if name == "script" else {}
        found[name] = worker.ask("study", model=options.model, root=root, settings=settings, **own)
        worker.close()
    phases = [phase for phase in PHASES.values() if phase in found["script"]]
    models = {"ours": options.model, "script": options.script_model or options.model}
    print(f"{models['ours']} and {models['script']}, processor seconds (wall seconds), ours and the script:")
    rows = {phase: [found[name][phase] for name in found] for phase in phases}
    rows["all"] = [[sum(found[name][phase][k] for phase in phases) for k in (0, 1)] for name in found]
    for phase, (mine, theirs) in rows.items():
        line = f"  {phase:12} {mine[0]:7.1f} ({mine[1]:.1f})  {theirs[0]:7.1f} ({theirs[1]:.1f})"
        print(f"{line}  {theirs[0] / mine[0]:.2f} x")
    if options.json:
        options.json.write_text(json.dumps({"models": models, "settings": settings, "seconds": rows}, indent=1))


if __name__ == "__main__":
    main()
