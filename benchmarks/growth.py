"""How the time of a training step grows with batch and completion length, and that of the head with the vocabulary.

python benchmarks/growth.py --model gemma-3-270m --dtype float32 --json out.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from workers import Worker


def head_seconds(model: str, rows: int = 384, repeats: int = 3) -> dict[int, float]:
    """Seconds of the completion head, gradient vectors included, over the first so many entries of the vocabulary."""
    import torch

    from madpo.models.engine.head import Head, token_logps
    from madpo.models.load import compute_dtype, load_model, resolve_model

    whole = Head.of(load_model(resolve_model(model), dtype=compute_dtype()).requires_grad_(False))
    vocabulary, width = whole.weight.shape
    hidden = torch.randn(rows, width).to(whole.weight.dtype).requires_grad_()
    found = {}
    for share in (8, 4, 2, 1):
        head = Head(whole.weight[: vocabulary // share], None, whole.softcap, whole.scale)
        labels = torch.randint(0, len(head.weight), (rows,), generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            token_logps(hidden, head, labels)
            seconds.append(time.perf_counter() - start)
        found[len(head.weight)] = statistics.median(seconds[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what commands use on this machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from madpo.models.load import compute_dtype

    dtype = options.dtype or str(compute_dtype()).removeprefix("torch.")
    base = {"model": options.model, "name": "ours", "dtype": dtype, "prompt": 20, "batches": 1}
    shapes = [(batch, 48) for batch in (2, 4, 8, 16)] + [(8, completion) for completion in (16, 96, 160, 256)]
    steps = {}
    for batch, completion in shapes:
        worker = Worker(
            str(Path(__file__).with_name("train_step.py")), {**base, "batch": batch, "completion": completion}
        )
        taken = [worker.ask("step", loss="dpo")[1] for _ in range(options.repeats + 1)][1:]
        worker.close()
        steps[f"{batch} pairs of 20 + {completion}"] = statistics.median(taken)
        print(f"  {batch:3} pairs of 20 + {completion:3} tokens: {statistics.median(taken):6.2f} s", flush=True)
    head = head_seconds(options.model)
    for entries, taken in head.items():
        print(f"  head, 384 tokens, {entries:7} entries: {taken:6.3f} s")
    if options.json:
        options.json.write_text(
            json.dumps({"model": options.model, "steps": steps, "head": head}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
