"""``madpo train --dry_run``: the memory of a training step, before a weight is loaded.

The trainer itself takes steps on paper (:mod:`madpo.models.on_paper`), with the arguments, the loss and the adapter of
the training. What it cannot see is scratch space inside operators, and on an accelerator what its allocator holds back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from madpo.core.columns import ID_COLUMNS, NUMBERS
from madpo.core.errors import ConfigError
from madpo.core.progress import LIBRARIES, memory_text
from madpo.data import load_preferences
from madpo.losses import DPO
from madpo.models.load import compute_dtype, small_tokenizer
from madpo.models.locate import load_tokenizer, resolve_model
from madpo.models.on_paper import Answers, LiveBytes, on_paper, paper_model
from madpo.operations.policy import chosen_dtype, trainer_arguments, trainer_of
from madpo.operations.train_settings import Auto, TrainSettings
from madpo.training import PreferenceConfig, PreferenceTrainer

MOST = 64
"""Pairs of the largest micro-batch that is tried; of data with fewer pairs it is all of them."""
HELD_BACK = 0.2
"""What a process on a processor keeps of freed blocks, as a share of what a step needs above the weights: 0 to 0.17
was measured in float32 (docs/performance.md)."""
_NUMBERS: dict[str, Any] = {name: 1.0 for name in NUMBERS if name != "weight"}
"""What a loss may read of a pair."""


class StepMemory(NamedTuple):
    """Bytes of a training step from the second on, when the optimizer has its state.

    Attributes:
        weights: of the model and its adapter.
        gradients, optimizer: of what trains.
        saved: what the forward pass keeps for the backward pass.
        peak: the most at one time, all of these included.
    """

    pairs: int
    weights: int
    gradients: int
    optimizer: int
    saved: int
    peak: int

    @property
    def held(self) -> int:
        """What a process on a processor holds at most."""
        return int(self.peak + HELD_BACK * (self.peak - self.weights))


class MemoryPlan(NamedTuple):
    """A step's memory, and the largest micro-batch that leaves room for the libraries; 0 where none does.

    Attributes:
        tried: pairs of the largest micro-batch that was looked at.
    """

    step: StepMemory
    lengths: tuple[int, int]
    memory: int
    largest: int
    tried: int

    def text(self) -> str:
        """For a person."""
        step = self.step
        parts = {"weights": step.weights, "gradients": step.gradients, "optimizer": step.optimizer, "saved": step.saved}
        shown = ", ".join(f"{name} {memory_text(size)}" for name, size in parts.items())
        fits = f"micro-batches of up to {self.largest} such pairs fit" if self.largest else "not one such pair fits"
        if self.largest == self.tried:
            fits = f"a micro-batch of {self.tried} such pairs fits (more were not tried)"
        return (
            f"A step of {step.pairs} pairs, the longest of {self.lengths[0]} + {self.lengths[1]} tokens, needs "
            f"{memory_text(step.peak)} at its peak ({shown} for the backward pass); a process on a "
            f"processor keeps freed blocks as well and holds up to {memory_text(step.held)}.\n"
            f"With {memory_text(LIBRARIES)} for the libraries, {fits} into {memory_text(self.memory)}."
        )


def memory_plan(
    data: str | Path,
    settings: TrainSettings,
    *,
    lengths: tuple[int, int] | None = None,
    memory: int | None = None,
) -> MemoryPlan:
    """What a step on the longest pairs needs, on the device of this machine.

    Args:
        settings: of the training; ``settings.model`` may be a folder that has only a ``config.json``.
        lengths: tokens of the prompt and of each completion in place of those of ``data``, which is then not read.
        memory: bytes that the step must fit into, of an accelerator; None is what this machine has, where a
            processor's freed blocks count as well.

    Raises:
        ConfigError: the model cannot be put on paper.
    """
    if settings.qlora:
        raise ConfigError("weights of 4 bits cannot be put on paper; leave out --qlora, or --dry_run")
    if isinstance(settings.loss, Auto):
        settings = settings.model_copy(update={"loss": DPO(beta=settings.loss.beta)})
    base = resolve_model(settings.model)
    with tempfile.TemporaryDirectory() as out:
        args = trainer_arguments(settings, Path(out), evaluated=True)
        if lengths is None:
            tokenizer, reading = load_tokenizer(base), settings.reading
            rows = load_preferences(
                data, columns=reading, tokenizer=tokenizer, max_length=args.max_length, truncation=settings.truncation
            )
            rows = sorted(rows, key=lambda row: -sum(len(row[name]) for name in ID_COLUMNS))
        else:
            prompt, completion = lengths
            ids = {"prompt_ids": [1] * prompt, "chosen_ids": [1] * completion, "rejected_ids": [2] * completion}
            rows = [{"pair_id": 0, **ids}]
        if args.pair_weights:
            rows = [{"weight": 1.0, **row} for row in rows]
        need = cache(steps_of(_on_paper(settings, args, base, rows[0]), rows))
        here = memory is None and not torch.cuda.is_available()
        room = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
        step, memory = need(int(args.per_device_train_batch_size)), memory or room
        tried = MOST if lengths is not None else min(MOST, len(rows))
        largest = _largest(lambda pairs: (need(pairs).held if here else need(pairs).peak) + LIBRARIES, memory, tried)
    longest = rows[0]
    completion = max(len(longest["chosen_ids"]), len(longest["rejected_ids"]))
    return MemoryPlan(step, (len(longest["prompt_ids"]), completion), memory, largest, tried)


def _on_paper(
    settings: TrainSettings, args: PreferenceConfig, base: Path | str, row: dict[str, Any]
) -> PreferenceTrainer:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = paper_model(base, dtype=chosen_dtype(settings) or compute_dtype(), mode=mode)
    with on_paper(mode):
        trainer = trainer_of(settings, args, model, small_tokenizer(), [_NUMBERS | row], [])
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    return trainer


def steps_of(trainer: PreferenceTrainer, rows: Sequence[dict[str, Any]]) -> Callable[[int], StepMemory]:
    """A function that takes a step on the given number of the first ``rows`` and says what it held.

    Args:
        trainer: on paper or not, with its optimizer.
        rows: token ids.
    """
    parameters = list(trainer.model.parameters())
    live = LiveBytes([*parameters, *trainer.model.buffers()])
    weights = live.now

    def step(pairs: int) -> StepMemory:
        batch = trainer.data_collator([_NUMBERS | row for row in islice(cycle(rows), pairs)])
        batch, count = trainer._prepare_inputs(batch), torch.tensor(pairs, device=trainer.args.device)
        trainer.model.train()
        with Answers(), live:  # type: ignore[no-untyped-call]
            live.peak = before = live.now
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
            saved = live.now - before
            trainer.accelerator.backward(loss)
            trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
            trainer.optimizer.step()
            states = tree_leaves([*trainer.optimizer.state.values()])
            gradients, optimizer = (
                sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
                for tensors in ([p.grad for p in parameters], states)
            )
            trainer.optimizer.zero_grad()
        return StepMemory(pairs, weights, gradients, optimizer, saved, live.peak)

    step(1)  # the optimizer makes its state in the first step
    return step


def _largest(need: Callable[[int], float], memory: float, most: int) -> int:
    """The most pairs, up to ``most``, whose need fits; it is nearly linear, so that a line finds them in few steps."""
    low, high, guess = 0, most + 1, min(2, most)
    while high - low > 1:
        low, high = (guess, high) if need(guess) <= memory else (low, guess)
        slope = (need(guess) - need(1)) / max(guess - 1, 1) or 1.0
        guess = min(max(1 + int((memory - need(1)) / slope), low + 1), high - 1)
    return low
