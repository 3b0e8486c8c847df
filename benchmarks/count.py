"""What an accelerator would see of a training step, counted on a processor: ours against tuned TRL on the same batch.

A dispatch mode follows every aten operator of one step (forward, backward, clipping, optimizer) and counts

- operators, which an accelerator launches as kernels (views are counted apart: they launch none);
- waits: operators whose result the host must read from a tensor of the device (``item``, ``nonzero``, a boolean index,
  a size from ``bincount``). The batch and the model are on the device, and so is what is computed from them. Tensors
  that the host made for itself are not;
- bytes that the operators read and write, each operand once, without caches;
- floating-point operations of products and attention (torch's own formulas);
- the roofline: of every operator the longer of operations over ``--rate`` and bytes over ``--bandwidth``, summed. An
  estimate from below: launches, waits, small shapes and the share of its peak that a kernel reaches are not in it;
- bytes of saved tensors: what autograd keeps for the backward pass at the most, parameters left out.

With ``--paper`` the weights are fake tensors, so that a ``config.json`` of any size can be counted.

    python benchmarks/count.py --model gemma-3-270m --prompt 20 --completion 176 --batch 8 --json out.json
    python benchmarks/count.py --paper --model FOLDER --prompt 512 --completion 512 --batch 4 --dtype bfloat16
    python benchmarks/count.py --tiny                # a model of 18 narrow layers: operators and waits in seconds
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from train_step import build
from workers import Worker, serve, step_options, step_spec, write_steps

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "_unique2"}


HOPPER = (989e12, 3.35e12)
"""Dense bfloat16 operations and bytes of memory a second of an H100 SXM, as NVIDIA publishes them."""

# torch counts a product that is added in place as none.
flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch has formulas for GPUs' kernels only. Two products; five in the backward pass, which computes scores again.
flop_registry[_FUSED] = lambda q, k, *rest, **named: 4 * q.numel() * k.shape[-2]
flop_registry[_FUSED_BACKWARD] = lambda grad, q, k, *rest, **named: 10 * q.numel() * k.shape[-2]


class Counts(TorchDispatchMode):
    """Operators, waits, bytes, operations and roofline seconds of what runs inside.

    Args:
        device: tensors that are on the device at the start.
        rate, bandwidth: operations and bytes a second.
    """

    def __init__(self, device: list[Tensor], rate: float = HOPPER[0], bandwidth: float = HOPPER[1]) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.views = 0
        self.waits: Counter[str] = Counter()
        self.bytes = self.flops = 0
        self.seconds = 0.0
        self._rate, self._bandwidth = rate, bandwidth
        self._device = WeakIdKeyDictionary()
        for tensor in device:
            self._device[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace == "prim":  # the device of a tensor on paper
            return out
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
        moved = sum(t.numel() * t.element_size() for t in [*read, *made])
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        self.bytes += moved
        self.flops += flops
        self.seconds += max(flops / self._rate, moved / self._bandwidth)
        return out


def _caller() -> str:
    """The innermost line outside torch, as FILE:LINE."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "count.py" not in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "backward"


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd holds for the backward pass: storages once, parameters and what was there before not."""

    def __init__(self, known: list[Tensor]) -> None:
        seen = {t.untyped_storage()._cdata for t in known}
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
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
    from madpo.models.on_paper import Answers

    trainer, _ = build(spec)
    if spec["name"] == "ours":
        trainer.loss = MADPO()
    rows = list(trainer.train_dataset)[: spec["batch"]]

    kept: list[Any] = []

    @contextmanager
    def watched(there: list[Tensor]) -> Iterator[None]:
        kept[:] = Counts(there, spec["rate"], spec["bandwidth"]), Saved(there)
        with kept[0], kept[1]:
            yield

    def counts() -> dict[str, Any]:
        if not spec["paper"]:
            step(trainer, rows, lambda there: nullcontext())  # what is decided once per model is decided here
        with Answers() if spec["paper"] else nullcontext():
            step(trainer, rows, watched)
        seen, saved = kept
        return {
            "operators": sum(seen.operators.values()),
            "views": seen.views,
            "waits": dict(seen.waits),
            "bytes": seen.bytes,
            "flops": seen.flops,
            "seconds": seen.seconds,
            "saved": saved.bytes,
            "common": dict(seen.operators.most_common(12)),
        }

    serve({"counts": counts})


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 18 narrow layers in place of --model")
    parser.set_defaults(dtype="float32")
    parser.add_argument("--paper", action="store_true", help="weights without numbers: only config.json is read")
    parser.add_argument("--rate", type=float, default=HOPPER[0], help="operations a second; an H100's in bfloat16")
    parser.add_argument("--bandwidth", type=float, default=HOPPER[1], help="bytes a second; an H100's")
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    if options.tiny:
        options.model = tiny_model()
    own = {key: getattr(options, key) for key in ("paper", "rate", "bandwidth")}
    base = {**step_spec(options), **own}
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
        ("seconds", "ms, roofline", 1e-3),
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
