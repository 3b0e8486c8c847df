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

With ``--paper`` the weights are fake tensors, so that a ``config.json`` of any size can be counted, and both sides take
the path of an NVIDIA GPU: our engine its tiles, products and FlexAttention, TRL its Triton kernels. Each of these
kernels is one operator of the bytes that it reads and writes. Without it, both are counted as they run here.

    python benchmarks/count.py --model gemma-3-270m --prompt 20 --completion 176 --batch 8 --json out.json
    python benchmarks/count.py --paper --model FOLDER --prompt 512 --completion 512 --batch 4 --dtype bfloat16
    python benchmarks/count.py --tiny                # a model of 18 narrow layers: operators and waits in seconds
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from train_step import build
from workers import Worker, serve, step_options, step_spec, write_steps

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "_unique2"}

FREE = {
    *("detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias"),
    *("empty_like", "new_empty", "new_empty_strided"),
}
"""Operators that launch nothing, as views do."""
HOPPER = (989e12, 3.35e12)
"""Dense bfloat16 operations and bytes of memory a second of an H100 SXM, as NVIDIA publishes them."""

# torch counts a product that is added in place as none.
flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch has formulas for GPUs' kernels only. Two products; five in the backward pass, which computes scores again.
# Causal kernels leave out the blocks above the diagonal.
flop_registry[_FUSED] = lambda q, k, v, dropout=0.0, causal=False, **named: _scores(q, k, 0.5 if causal else 1, 4)
flop_registry[_FUSED_BACKWARD] = lambda grad, q, k, v, out, lse, dropout, causal, **named: _scores(
    q, k, 0.5 if causal else 1, 10
)


def _scores(q: Tensor, k: Tensor, share: float, operations: int) -> int:
    return int(operations * q.numel() * k.shape[-2] * share)


# Kernels of GPUs on paper, where a processor has none: what they read, what they write, and their products.
def _on_paper(name: str, function: Callable[..., Any], formula: Callable[..., int] | None = None) -> Callable[..., Any]:
    found = torch.library.custom_op(f"paper::{name}", function, mutates_args=())
    found.register_fake(function)
    if formula is not None:
        flop_registry[getattr(torch.ops.paper, name)] = formula
    return found


def _fold(tile: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(rows[0])


def _of_logits(tile: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(tile)


def _flex(q: Tensor, k: Tensor, v: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _flex_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


FOLD, OF_LOGITS = _on_paper("fold", _fold), _on_paper("of_logits", _of_logits)
FLEX = _on_paper("flex", _flex, lambda q, k, v, share, **named: _scores(q, k, share, 4))
FLEX_BACKWARD = _on_paper(
    "flex_backward", _flex_backward, lambda grad, q, k, v, lse, delta, share, **named: _scores(q, k, share, 10)
)


class Launched:
    """A Triton kernel ``kernel[grid](tile, ...)`` as one operator."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Launched:
        return self

    def __call__(self, tile: Tensor, *rest: Any, **named: Any) -> None:
        self._kernel(tile, [value for value in rest if isinstance(value, Tensor)])


class Flex(torch.autograd.Function):
    """FlexAttention and its backward pass, with this share of blocks in which a token may look at another."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: float) -> Tensor:
        out, lse = FLEX(q, k, v, share)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.share = share
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *FLEX_BACKWARD(grad, q, k, v, lse, (out * grad).sum(-1), ctx.share), None


def block_share(prompt: int, completion: int) -> float:
    """The share of FlexAttention's blocks that are computed for pairs of such lengths."""
    from madpo.models.engine.packed_attention import PackedMask
    from madpo.models.engine.packing import pack

    ids = torch.ones(2, prompt + completion, dtype=torch.long)
    of_completion = (torch.arange(prompt + completion) >= prompt).long().expand_as(ids)
    mask = PackedMask(pack(ids, ids, of_completion), lambda group, head, query, key: key <= query)
    return 1 - float(mask.blocks.sparsity()) / 100


@contextmanager
def path_of_gpus(prompt: int, completion: int) -> Iterator[None]:
    """Both sides compute as on an NVIDIA GPU, where their code asks for one."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from madpo.models.engine import devices, packed_attention

    share = block_share(prompt, completion)

    def flex(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Any]:
        return Flex.apply(q, k, v, share), SimpleNamespace(lse=None)

    kernels = {
        "_use_triton": lambda device: True,
        "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
        "_forward_kernel": Launched(FOLD),
        "_backward_kernel": Launched(OF_LOGITS),
        "_addmm_fp32": lambda acc, a, b: torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc),
    }
    with (
        mock.patch.multiple(chunked_logprob, create=True, **kernels),
        mock.patch.object(utils, "_use_triton", return_value=True),
        mock.patch.object(devices, "kind", return_value="cuda"),
        mock.patch.object(packed_attention, "_compiled_flex", return_value=flex),
    ):
        yield


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
        if func.is_view or name in FREE:
            self.views += 1
            return out
        self.operators[name] += 1
        moved = sum(t.numel() * t.element_size() for t in [*read, *made])
        formula = flop_registry.get(func.overloadpacket)
        given = [value for value in args if not isinstance(value, torch.dtype)]  # of a product's result
        flops = 0 if formula is None else formula(*given, **(kwargs or {}), out_val=out)
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
        with ExitStack() as stack:
            if spec["paper"]:
                stack.enter_context(Answers())
                stack.enter_context(path_of_gpus(spec["prompt"], spec["completion"]))
            step(
                trainer, rows, lambda there: nullcontext()
            )  # decides what is decided once, and has the optimizer's state
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
            "common": dict(seen.operators.most_common(40)),
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
