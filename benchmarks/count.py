"""What an accelerator would see of a training step, counted on a processor: ours against tuned TRL on the same batch.

A dispatch mode follows every aten operator of one step (forward, backward, clipping, optimizer) and counts

- operators, which an accelerator launches as kernels (views are counted apart: they launch none);
- waits: operators whose result the host must read from a tensor of the device (``item``, ``nonzero``, a boolean index,
  a size from ``bincount``). The batch and the model are on the device, and so is what is computed from them. Tensors
  that the host made for itself are not;
- bytes that the operators read and write, each operand once, without caches;
- floating-point operations of products and attention (torch's own counter);
- bytes of saved tensors: what autograd keeps for the backward pass at the most, parameters left out.

    python benchmarks/count.py --model gemma-3-270m --prompt 20 --completion 176 --batch 8 --json out.json
    python benchmarks/count.py --tiny                # a model of 18 narrow layers: operators and waits in seconds
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from train_step import build
from workers import Worker, serve, step_options, step_spec, write_steps

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "_unique2"}


class Counts(TorchDispatchMode):
    """Operators, waits and bytes of what runs inside.

    Args:
        device: tensors that are on the device at the start.
    """

    def __init__(self, device: list[Tensor]) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.views = 0
        self.waits: Counter[str] = Counter()
        self.bytes = 0
        self._device = WeakIdKeyDictionary()
        for tensor in device:
            self._device[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t in self._device for t in read):
            return out  # the host's own
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._device[tensor] = True
        name = func.overloadpacket.__name__
        if name in WAITS or (name in ("index", "index_put_") and any(t.dtype == torch.bool for t in read[1:])):
            self.waits[f"{name} in {_caller()}"] += 1
        if func.is_view or name in ("detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias"):
            self.views += 1
            return out
        self.operators[name] += 1
        self.bytes += sum(t.numel() * t.element_size() for t in [*read, *made])
        return out


def _caller() -> str:
    """The innermost line outside torch, as FILE:LINE."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "count.py" not in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "backward"


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd holds for the backward pass: storages once, parameters and what was there before not."""

    def __init__(self, known: list[Tensor]) -> None:
        seen = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def counted(trainer: Any, rows: list[dict[str, Any]]) -> Counts:
    """The counts of a step of a trainer that :func:`workers.ready` made ready."""
    kept: list[Counts] = []

    def around(there: list[Tensor]) -> Counts:
        kept.append(Counts(there))
        return kept[-1]

    for _ in range(2):  # what is decided once per model is decided in the first
        step(trainer, rows, around)
    return kept[-1]


def step(trainer: Any, rows: list[dict[str, Any]], around: Any) -> float:
    """The loss of one training step inside the context that ``around`` makes of the tensors on the device."""
    batch = trainer.data_collator(rows)
    # A processor moves nothing. Tensors that an accelerator would get are copies here, so that they are its own.
    inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in trainer._prepare_inputs(batch).items()}
    model = trainer.accelerator.unwrap_model(trainer.model)
    there = [*model.parameters(), *model.buffers(), *(v for v in inputs.values() if isinstance(v, Tensor))]
    count = torch.tensor(len(rows))
    with around([*there, count]):
        loss = trainer.training_step(trainer.model, inputs, count)
        if trainer.args.max_grad_norm:
            norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer._get_grad_norm(trainer.model, grad_norm=norm)
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return float(loss)


def tiny_model() -> str:
    """A folder with 18 narrow layers of Gemma 3: as many operators as the packaged model, in seconds."""
    import tempfile

    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from madpo.models.load import build_tiny

    folder = tempfile.mkdtemp()
    build_tiny("gemma3", Path(folder), seed=0)
    config = Gemma3TextConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 18, (["sliding_attention"] * 5 + ["full_attention"]) * 3
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def work(spec: dict[str, Any]) -> None:
    """Serve the counts of one contender."""
    from madpo.losses import MADPO

    trainer, _ = build(spec)
    if spec["name"] == "ours":
        trainer.loss = MADPO()
    rows = list(trainer.train_dataset)[: spec["batch"]]

    def counts() -> dict[str, Any]:
        from contextlib import nullcontext

        step(trainer, rows, lambda there: nullcontext())  # what is decided once per model is decided here
        kept: list[Any] = []

        def around(make: Any) -> Any:
            def enter(there: list[Tensor]) -> Any:
                kept.append(make(there))
                return kept[-1]

            return enter

        step(trainer, rows, around(Counts))
        step(trainer, rows, around(Saved))
        step(trainer, rows, around(lambda there: FlopCounterMode(display=False)))
        seen, saved, flops = kept
        return {
            "operators": sum(seen.operators.values()),
            "views": seen.views,
            "waits": dict(seen.waits),
            "bytes": seen.bytes,
            "flops": flops.get_total_flops(),
            "saved": saved.bytes,
            "common": dict(seen.operators.most_common(12)),
        }

    serve({"counts": counts})


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 18 narrow layers in place of --model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    if options.tiny:
        options.model = tiny_model()
    base = {**step_spec(options), "dtype": options.dtype}
    found = {}
    for name in ("ours", "trl"):
        worker = Worker(__file__, {**base, "name": name})
        found[name] = worker.ask("counts")
        worker.close()
    print(f"{'':24}{'ours':>12}{'TRL':>12}{'ours / TRL':>12}")
    rows = {name: {**c, "waits": sum(c["waits"].values())} for name, c in found.items()}
    for key, unit, scale in (
        ("operators", "", 1),
        ("views", "", 1),
        ("waits", "", 1),
        ("bytes", "GB", 1e9),
        ("flops", "GFLOP", 1e9),
        ("saved", "MiB", 2**20),
    ):
        a, b = (rows[name][key] / scale for name in ("ours", "trl"))
        print(f"{key + ' ' + unit:24}{a:12,.4g}{b:12,.4g}{a / b if b else float('nan'):12.2f}")
    for name, c in found.items():
        print(f"\nwaits of {name}:")
        for place, times in sorted(c["waits"].items(), key=lambda item: -item[1]):
            print(f"  {times:4} {place}")
    write_steps(options, **found)


if __name__ == "__main__":
    main()
