"""What a preference training logs: means over the pairs (or tokens) of a logging window, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from madpo.losses import LossInputs, LossOutput
from madpo.models.engine.logprobs import CompletionScores
from madpo.training.columns import HOST_ROWS
from madpo.training.movement import Movement
from madpo.training.padding_pairs import REPEATED
from madpo.training.resume import ExactResume


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
        if mode == "train":
            self.movement.note(pairs, real)
        both = torch.cat([real, real])
        if mode == "train":
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
