"""From a batch of pairs to the number that is trained on: scores, the loss of every pair, and its mean over the step.

A loss returns one value per pair. The trainer owns the mean, over the whole effective batch: all micro-batches of a
step, on all processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from madpo.core.columns import PAIR_COLUMNS, REFERENCE_COLUMNS
from madpo.core.errors import ConfigError, DataError
from madpo.losses import LossConfig, LossInputs, LossState
from madpo.models.engine.logprobs import CompletionScores, completion_logps, unwrapped
from madpo.models.engine.packing import HostRows
from madpo.training.columns import HOST_ROWS
from madpo.training.config import own_noise
from madpo.training.first_look import FirstLook
from madpo.training.metrics import WindowMetrics
from madpo.training.padding_pairs import REPEATED, marked, observed
from madpo.training.reference_columns import ReferenceColumns

NO_METRICS = (
    "compute_metrics takes logits, which this trainer never builds; use the logged metrics, or evaluate with TRL's "
    "DPOTrainer"
)


class PairLoss(WindowMetrics, ReferenceColumns):
    """Mixin: ``compute_loss`` with any preference loss.

    Attributes:
        loss: the loss.
        loss_state: its running statistics after the last step.
        first_look: set before a training, it gets the implicit margins of the first epoch; pairs need an integer
            ``pair_id``.
    """

    # The loss is divided by the pairs of the effective batch, so the trainer must not divide once more.
    loss_is_scaled_for_ga = True
    loss: LossConfig
    loss_state: LossState
    first_look: FirstLook | None = None
    _observed: LossState | None = None  # for all pairs of a step, and where its next micro-batch begins
    _position = 0
    _weighted: bool

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Pairs of the effective batch, over micro-batches and processes: what the sum of losses is divided by."""
        if not batch_samples:
            return None
        count = torch.stack([_scored(batch).sum() for batch in batch_samples]).sum().to(device)
        total: Tensor = self.accelerator.gather(count).sum()
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CompletionScores]:
        """The mean of the loss over the pairs of the effective batch (this process's share of it)."""
        mode = "train" if self.model.training else "eval"
        inputs = self._with_reference(inputs)
        host: HostRows | None = inputs.get(HOST_ROWS)
        with _inputs_as_they_are(model), own_noise(model, self.args):
            scores = completion_logps(
                model,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["completion_mask"],
                pairs=True,
                log_sum_sq="chosen_log_sum_sq" in self.loss.needs,
                details=self._wants_token_metrics(mode),
                host=host,
            )
        pairs = self._loss_inputs(scores, inputs)
        state, kept_in_step = self._ready_state(pairs, inputs, mode)
        output = self.loss(pairs, state)
        if mode == "train" and output.state is not None:
            self.loss_state = output.state
        kept = _scored(inputs).to(output.per_pair.device)
        if output.kept is not None:
            kept = kept & output.kept
            num_items_in_batch = kept_in_step if num_items_in_batch is not None else None
        per_pair = torch.where(kept, output.per_pair, torch.zeros_like(output.per_pair))
        changed = None if host is None else host.differs(*(inputs[name] for name in vars(host)))
        if changed is not None:  # the packing is that of another batch; the check of the loss finds it
            per_pair = per_pair.masked_fill(changed, float("nan"))
        if self._weighted:
            per_pair = per_pair * pairs.required("weight")
        if mode == "eval":
            self._metrics[mode]["loss"].append(torch.stack([per_pair.detach().sum(), kept.sum()]).float())
        if num_items_in_batch is None:
            loss = per_pair.sum() / kept.sum().clamp(min=1)
        else:  # gradients are averaged over processes, the sum of losses is not
            loss = per_pair.sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        self._note(mode, inputs, scores, pairs, output)
        if self.first_look is not None and mode == "train" and (self.state.epoch or 0) < 1:
            margin = self.loss.implicit_margin(pairs)
            self.first_look.note(self.accelerator, inputs["pair_id"], margin, _scored(inputs))
        self._explain = functools.partial(self._loss_not_finite, inputs, pairs, output.per_pair.detach(), changed)
        return (loss, scores) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss: the head never builds the logits that ``compute_metrics`` would take."""
        if self.compute_metrics is not None:  # set after the trainer was made
            raise ConfigError(NO_METRICS)
        inputs = marked(inputs, self.accelerator, drop_last=self.args.dataloader_drop_last)
        return super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The micro-batches of a step; a loss with running statistics sees all of them before the first is used."""
        drop_last = self.args.dataloader_drop_last
        epoch = (marked(batch, self.accelerator, drop_last=drop_last) for batch in epoch_iterator)
        batches, count = super().get_batch_samples(epoch, num_batches, device)
        self._observed, self._position = None, 0
        if self.loss.stateful and len(batches) > 1:
            self._observed = self._observe(batches)
        return batches, count

    @torch.no_grad()
    def _observe(self, batches: list[dict[str, Tensor]]) -> LossState:
        """One more forward pass over the step, without gradients: what makes a step independent of its split."""
        self.model_wrapped.train()  # as the step itself will: the first of a resumed run is no first step
        statistics, counted = [], []
        for batch in map(self._with_reference, map(self._prepare_inputs, batches)):
            with self.compute_loss_context_manager(), own_noise(self.model_wrapped, self.args):
                rows = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
                scores = completion_logps(self.model_wrapped, *rows, pairs=True)
            statistics.append(self.accelerator.gather(self.loss.statistic(self._loss_inputs(scores, batch))))
            counted.append(self.accelerator.gather(_scored(batch)))
        return observed(self.loss, torch.cat(statistics), torch.cat(counted), self.loss_state)

    def _ready_state(
        self, pairs: LossInputs, inputs: dict[str, Tensor], mode: str
    ) -> tuple[LossState | None, Tensor | None]:
        """The state for this micro-batch's rows, and how many pairs of the whole step the loss keeps."""
        if not self.loss.stateful:
            return None, None
        count, rank = len(pairs.policy_chosen_logps), self.accelerator.process_index
        if mode == "train" and self._observed is not None:
            ready, start = self._observed, self._position
            self._position += count * self.accelerator.num_processes
        else:
            gathered = self.accelerator.gather(self.loss.statistic(pairs))
            counted = self.accelerator.gather(_scored(inputs))
            ready, start = observed(self.loss, gathered, counted, self.loss_state, training=mode == "train"), 0
        kept = ready.batch.get("kept")
        total = None if kept is None else kept.sum().to(pairs.policy_chosen_logps.device)
        return ready.rows(start + rank * count, start + (rank + 1) * count), total

    def _loss_inputs(self, scores: CompletionScores, inputs: dict[str, Tensor]) -> LossInputs:
        chosen, rejected = scores.logps.chunk(2)
        chosen_lengths, rejected_lengths = scores.lengths.chunk(2)
        if self.loss.needs_reference:
            reference = [inputs[name].to(chosen.dtype) for name in REFERENCE_COLUMNS]
        else:  # never read; zeros make the logged rewards those of a uniform reference
            reference = [torch.zeros_like(chosen), torch.zeros_like(rejected)]
        squares = (None, None) if scores.log_sum_sq is None else scores.log_sum_sq.chunk(2)
        return LossInputs(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            ref_chosen_logps=reference[0],
            ref_rejected_logps=reference[1],
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            chosen_log_sum_sq=squares[0],
            rejected_log_sum_sq=squares[1],
            **{name: inputs[name].to(chosen.dtype) for name in PAIR_COLUMNS if name in inputs},
            finite_columns=HOST_ROWS in inputs,  # our collator has made the batch, and checked its columns
        )

    def _loss_not_finite(
        self, inputs: dict[str, Any], pairs: LossInputs, per_pair: Tensor, changed: Tensor | None
    ) -> DataError:
        if changed is not None and bool(changed):
            return DataError(
                "a batch was changed after its collator had made it, and its packing belongs to the tokens before; "
                f"change tokens in the data_collator, or remove the key {HOST_ROWS!r} from the batch"
            )
        bad, value = ~torch.isfinite(per_pair), float(per_pair.sum())
        if "pair_id" in inputs:
            named = [pair for pair, wrong in zip(inputs["pair_id"], bad.tolist(), strict=True) if wrong]
            where = self.pairs_of([{"pair_id": named}])
        else:
            rows = torch.cat([bad, bad]).to(inputs["input_ids"].device)
            where = self.pairs_of([{name: inputs[name][rows] for name in ("input_ids", "attention_mask")}])
        reference = torch.cat([pairs.ref_chosen_logps, pairs.ref_rejected_logps])
        cause = None
        if not bool(torch.isfinite(reference).all()):
            cause = "the reference log-probabilities are not finite; compute the columns again, in bfloat16 or float32"
        return self.not_finite(f"the loss is {value}", where, cause)


def _scored(batch: dict[str, Tensor]) -> Tensor:
    """Pairs that count: both completions have a token to score (truncation can leave one without), no repeats."""
    lengths = (batch["completion_mask"][:, 1:] * batch["attention_mask"][:, 1:]).sum(-1)
    chosen, rejected = lengths.chunk(2)
    both = (chosen > 0) & (rejected > 0)
    return both & ~batch[REPEATED] if REPEATED in batch else both


@contextmanager
def _inputs_as_they_are(model: nn.Module) -> Iterator[None]:
    """Under autocast, spare PEFT's cast of each layer's input to float32, which autocast undoes at once."""
    inner = unwrapped(model)
    if not torch.is_autocast_enabled(next(inner.parameters()).device.type):
        yield
        return
    with disable_input_dtype_casting(inner):
        yield
