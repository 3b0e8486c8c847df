"""The memory of a training step on paper (``madpo train --dry_run``) against the measured one, above the model.

The measured process gives freed blocks back at once, so that what is compared is what the step needs; with
``--held`` it keeps them as processes do.

python benchmarks/memory.py --model gemma-3-270m --prompt 20 --completion 48 --batch 8 --json out.json
"""

import json
from pathlib import Path
from typing import Any

from workers import Worker, serve, step_options, step_spec, write_steps

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc, which else holds freed blocks."""


def work(spec: dict[str, Any]) -> None:
    """Serve what a step needs on paper, MiB above the model."""
    from madpo.operations.memory_plan import memory_plan
    from madpo.operations.train_settings import TrainSettings

    def paper() -> float:
        arguments = {"per_device_train_batch_size": spec["batch"], "bf16": spec["dtype"] == "bfloat16"}
        how = {"model": spec["model"], "dtype": spec["dtype"], "full": spec["full"], "args": arguments}
        settings = TrainSettings(loss={"kind": "dpo"}, **how)
        step = memory_plan("", settings, lengths=(spec["prompt"], spec["completion"]), memory=1).step
        adapter = 0 if spec["full"] else step.gradients  # which are as large as it
        return (step.peak - (step.weights - adapter)) / 2**20

    serve({"paper": paper})


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--held", action="store_true", help="leave glibc its own thresholds")
    parser.add_argument("--full", action="store_true", help="train all weights")
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    spec = {**step_spec(options), "name": "ours", "full": options.full}
    worker = Worker(str(Path(__file__).with_name("train_step.py")), spec, **({} if options.held else RETURNED))
    for _ in range(options.repeats):
        worker.ask("step", loss="dpo")
    measured = worker.ask("memory")
    worker.close()
    worker = Worker(__file__, spec)
    paper = worker.ask("paper")
    worker.close()
    shape = f"{options.model}, {options.prompt} + {options.completion} tokens, batch {options.batch}, {spec['dtype']}"
    print(f"{shape}: {paper:.0f} MiB on paper, {measured:.0f} measured, {paper / measured - 1:+.1%}")
    write_steps(options, dtype=spec["dtype"], paper_mib=paper, measured_mib=measured)


if __name__ == "__main__":
    main()
