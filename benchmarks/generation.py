"""Sampling completions with madpo.models.engine.sampling against ``model.generate``, in turns, each in its own process.

Same model, precision and prompts (the beginnings of IMDB reviews), temperature 1, no truncation of the law, all
completions of full length in both. ``model.generate`` runs at its best batch size of those given. Prints tokens per
second and the ratio, and writes JSON.

``--samples 12`` draws so many completions of every prompt: ours with the prompt's keys and values shared against ours
one draw after another, and ``model.generate`` with ``num_return_sequences``.

    python benchmarks/generation.py --model gemma-3-270m --prompts 128 --repeats 3 --json out.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from workers import Worker, serve


def work(spec: dict[str, Any]) -> None:
    import torch
    from train_step import pairs_of_reviews
    from transformers import DynamicCache

    from madpo.models.engine import sampling as generation
    from madpo.models.load import compute_dtype, load_model, resolve_model

    path = resolve_model(spec["model"])
    model = load_model(path, dtype=compute_dtype()).eval()
    prompts = [row["prompt_ids"] for row in pairs_of_reviews(path, spec["prompts"], spec["prompt"], 1)]

    if spec["name"] == "copying":
        generation.growing_cache = lambda model: DynamicCache(config=model.config)

    samples = spec["samples"]

    def ours(count: int, batch: int) -> float:
        shared = spec["name"] != "one by one"
        start = time.perf_counter()
        found = [
            generation.generate(
                model,
                prompts[:count],
                keys=range(count),
                draw=draw,
                seed=0,
                max_new_tokens=spec["completion"],
                eos_token_ids=set(),
                samples=samples if shared else 1,
                batch_size=batch,
                description="",
            )
            for draw in range(1 if shared else samples)
        ]
        return sum(len(ids) for drawn in found for ids in drawn) / (time.perf_counter() - start)

    @torch.inference_mode()
    def stock(count: int, batch: int) -> float:
        start = time.perf_counter()
        tokens = 0
        size = max(1, batch // samples)
        for first in range(0, min(count, len(prompts)), size):
            ids = torch.tensor(prompts[first : min(first + size, count)], device=model.device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=spec["completion"],
                min_new_tokens=spec["completion"],
                num_return_sequences=samples,
            )
            tokens += len(out[:, ids.shape[1] :].flatten().tolist())
        return tokens / (time.perf_counter() - start)

    serve({"tokens_per_second": stock if spec["name"] == "stock" else ours})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--completion", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="tried for model.generate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copying", action="store_true", help="a third contender: ours with the cache of transformers")
    parser.add_argument("--samples", type=int, default=1, help="completions of every prompt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    base = {key: getattr(options, key) for key in ("model", "prompt", "completion", "prompts", "samples")}
    names = ("ours", "stock", *["copying"] * options.copying, *["one by one"] * (options.samples > 1))
    workers = {name: Worker(__file__, {**base, "name": name}) for name in names}
    tried = {batch: workers["stock"].ask("tokens_per_second", count=batch, batch=batch) for batch in options.batches}
    best = max(tried, key=lambda batch: tried[batch])
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        if name != "stock":
            workers[name].ask("tokens_per_second", count=8, batch=8)  # warms up
    for _ in range(options.repeats):
        for name in names:
            batch = best if name == "stock" else 128
            found[name].append(workers[name].ask("tokens_per_second", count=options.prompts, batch=batch))
    for worker in workers.values():
        worker.close()
    ratios = {
        name: statistics.median(a / b for a, b in zip(found["ours"], found[name], strict=True)) for name in names[1:]
    }
    each = f"{options.prompts} prompts, {options.samples} each"
    print(f"{options.model}, {options.prompt} + {options.completion} tokens, {each}:")
    print(f"  model.generate by batch size: { ({b: round(r) for b, r in tried.items()}) } tokens/s; best {best}")
    for name, values in found.items():
        print(f"  {name:10} {statistics.median(values):6.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    said = {
        "stock": "model.generate",
        "copying": "ours with the cache of transformers",
        "one by one": "ours, one draw by one",
    }
    for name, ratio in ratios.items():
        print(f"  ours / {said[name]} {ratio:.2f} x")
    if options.json:
        result = {
            "options": {**base, "batches": options.batches},
            "tokens_per_second": found,
            "tried": tried,
            "ratio": ratios["stock"],
            "ratios": ratios,
        }
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
