"""What a preference training logs, and whether it moved its policy.

Logged are means over the pairs (or tokens) of a logging window, on all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from madpo.core.progress import say
from madpo.losses import LossInputs, LossOutput
from madpo.models.engine.logprobs import CompletionScores
from madpo.training.columns import HOST_ROWS
from madpo.training.padding_pairs import REPEATED
from madpo.training.resume import ExactResume

HARDLY = 0.01
"""Mean |beta * log-ratio margin|, nats, below which a policy has hardly moved: DPO's loss is within 0.005 of log 2."""
ROUNDING = 0.1
"""The same in half precision, at most: there rounding moves log-ratios after the first step already."""
GROWTH = 1.5
"""What learning adds at least: the last steps' statistic over that of the first steps."""
PART = 0.1
"""Share of the steps that is looked at, at either end."""


class Movement(TrainerCallback):  # type: ignore[misc]
    """Says at the end of a training that the policy hardly left its reference, where it did not.

    The statistic is the mean of |beta * (log-ratio of the chosen - log-ratio of the rejected)| over pairs. Absolute
    values, since pairs that move in opposite directions have moved. It is 0 in the first step, which is left out.

    Args:
        trainer: a preference trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._first: list[Tensor] = []
        self._last: list[Tensor] = []

    def note(self, pairs: LossInputs, real: Tensor) -> None:
        """Keep the sum and the count of a micro-batch. A loss without a reference has no log-ratios.

        Args:
            real: which pairs count, ``pairs``.
        """
        step, steps, loss = self.trainer.state.global_step, self.trainer.state.max_steps, self.trainer.loss
        first, last = step <= max(1, steps * PART), step >= steps * (1 - PART)
        if not loss.needs_reference or step == 0 or not (first or last):
            return
        margin = getattr(loss, "beta", 1.0) * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)
        size = torch.where(real, margin.detach().float().abs(), 0.0)
        sums = torch.stack([size.sum(), real.sum().float()])
        self._first += [sums] if first else []
        self._last += [sums] if last else []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first, self._last = [], []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._last:
            return
        zero = torch.zeros_like(self._last[0])
        sums = torch.stack([sum(self._first, zero), sum(self._last, zero)])
        (first, before), (last, after) = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        first, last = first / max(before, 1), last / max(after, 1)
        if not after or last >= max(HARDLY, min(GROWTH * first, ROUNDING)):
            return
        rate = f"{args.learning_rate:g}"
        if isinstance(self.trainer.model, PeftModel):
            rate += "; 1e-4 is usual for LoRA"
        say(
            f"The policy hardly moved: the mean |beta * log-ratio margin| is {last:.2g} over its last {int(after)} "
            f"pairs and was {first:.2g} over the first ones; raise learning_rate (it was {rate}), or train for more "
            "steps."
        )


class WindowMetrics(ExactResume):
    """Mixin: sums and counts are kept on the device, and reduced when they are logged."""

    loss: Any
    movement: Movement
    _metrics: Any
    _total_train_tokens: int

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means, gathered over processes in one go, to what is logged."""
        mode = "train" if self.model.training else "eval"
        means = self._window_means(mode)
        if "loss" in means:  # transformers' mean counts rows: pairs that do not count, and repeated ones, too
            logs[next((name for name in logs if name.endswith("_loss")), "eval_loss")] = means.pop("loss")
        means["num_tokens"] = float(self._total_train_tokens)
        logs.update({f"eval_{name}" if mode == "eval" else name: value for name, value in means.items()})
        super(DPOTrainer, self).log(logs, start_time)

    def _window_means(self, mode: str) -> dict[str, float]:
        """Means since the last call."""
        window = self._metrics[mode]
        names = sorted(window)
        if not names:
            return {}
        local = torch.stack([torch.stack(window[name]).sum(0) for name in names])
        window.clear()
        summed = self.accelerator.reduce(local, reduction="sum")
        means = {name: float(value) for name, value in zip(names, (summed[:, 0] / summed[:, 1]), strict=True)}
        if "weight/square" in means:
            square = means.pop("weight/square")
            means["weight/effective_share"] = means["weight/mean"] ** 2 / square if square > 0 else 0.0
        return means

    def _wants_token_metrics(self, mode: str) -> bool:
        when = getattr(self.args, "token_metrics", "always")
        if when == "logged" and mode == "train":
            every = self.state.logging_steps or 1
            return bool((self.state.global_step + 1) % every == 0)
        return bool(when != "never")

    @torch.no_grad()
    def _note(
        self, mode: str, inputs: dict[str, Any], scores: CompletionScores, pairs: LossInputs, output: LossOutput
    ) -> None:
        """Keep sums and counts on the device; ``log`` reduces them, so that a step waits for nothing."""
        real = ~inputs[REPEATED] if REPEATED in inputs else torch.ones_like(pairs.chosen_lengths, dtype=torch.bool)
        beta = getattr(self.loss, "beta", 1.0)
        # Not the difference of the two rewards where the loss reads a policy per token, or without the reference.
        margin = self.loss.implicit_margin(pairs)
        values = {
            "rewards/chosen": beta * pairs.chosen_log_ratio,
            "rewards/rejected": beta * pairs.rejected_log_ratio,
            "rewards/accuracies": (margin > 0).float(),
            "rewards/margins": margin,
            "logps/chosen": pairs.policy_chosen_logps,
            "logps/rejected": pairs.policy_rejected_logps,
            **output.metrics,
        }
        names = [name for name, value in values.items() if value.ndim]
        # One row per quantity, so that a few kernels serve all of them.
        table = torch.stack([values[name].detach().float().reshape(-1) for name in names])
        sums = torch.where(real, table, torch.zeros_like(table)).sum(1)
        pairs_of_each = torch.stack([sums, real.sum().to(sums.dtype).expand(len(names))], 1)
        scalars = {name: value.detach().float() for name, value in values.items() if not value.ndim}
        means = {name: torch.stack([value, torch.ones_like(value)]) for name, value in scalars.items()}
        for name, pair in (*zip(names, pairs_of_each, strict=True), *means.items()):
            self._metrics[mode][name].append(pair)
        both = torch.cat([real, real])
        if mode == "train":
            self.movement.note(pairs, real)
            host = inputs.get(HOST_ROWS)
            if host is not None and self.accelerator.num_processes == 1:
                tokens = host.attention_mask.sum()
            else:
                tokens = self.accelerator.reduce((inputs["attention_mask"] * both[:, None]).sum(), reduction="sum")
            self._total_train_tokens += int(tokens)
        if scores.entropy is None or scores.mean_logit is None or scores.top1 is None:
            return
        lengths = (scores.lengths * both).to(scores.entropy.dtype)
        half = len(lengths) // 2
        for name, value, rows in (
            ("entropy", scores.entropy, slice(None)),
            ("logits/chosen", scores.mean_logit, slice(None, half)),
            ("logits/rejected", scores.mean_logit, slice(half, None)),
            ("mean_token_accuracy", scores.top1, slice(None, half)),
        ):
            self._metrics[mode][name].append(torch.stack([(value * lengths)[rows].sum(), lengths[rows].sum()]).float())
