"""A drop-in for TRL's ``DPOTrainer`` with any preference loss and the fast log-probability engine.

TRL's losses are branches of one private method that averages inside, so this trainer brings its own
``compute_loss`` and collator and inherits the rest: tokenising, chat templates, PEFT, accelerate, DeepSpeed, FSDP,
checkpoints, callbacks and loggers. The loss returns one value per pair; the trainer owns the mean, over the whole
effective batch: all micro-batches of a step, on all processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import AutoProcessor, TrainerCallback
from transformers.trainer_utils import PredictionOutput
from trl import DPOConfig, DPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from madpo.core.errors import ConfigError, DataError
from madpo.core.progress import say_once
from madpo.losses import DPO, Custom, LossConfig, LossInputs, LossState
from madpo.models.adapters import announce
from madpo.models.engine.logprobs import CompletionScores, completion_logps, install_completion_head, unwrapped
from madpo.models.engine.packing import HostRows
from madpo.models.loading import loading
from madpo.models.untrusted import check_model
from madpo.models.weights import NamedArchitecture
from madpo.training.columns import (
    HOST_ROWS,
    ID_COLUMNS,
    PAIR_COLUMNS,
    REFERENCE_COLUMNS,
    check_columns,
    lacks_margin,
    weights_are_used,
)
from madpo.training.config import PreferenceConfig, own_noise
from madpo.training.first_look import FirstLook
from madpo.training.metrics import Movement, WindowMetrics
from madpo.training.nan_guard import drop_unscored
from madpo.training.padding_pairs import REPEATED, each_marked, marked, observed, refuse_uneven
from madpo.training.reference_columns import ReferenceColumns
from madpo.training.refusals import loss_of, refuse_adapter, refuse_options
from madpo.training.rendering import rendering, with_prompts

_NO_METRICS = (
    "compute_metrics takes logits, which this trainer never builds; use the logged metrics, or evaluate with TRL's "
    "DPOTrainer"
)


class PreferenceTrainer(WindowMetrics, ReferenceColumns, DPOTrainer):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` with ``loss=...``.

    Args:
        model, ref_model, args, data_collator, train_dataset, ...: as in TRL, in TRL's order. ``args`` may be a plain
            ``DPOConfig``; its options of the loss are refused next to ``loss``.
        loss: any preference loss. Left out, it is the one that TRL's options name (``loss_type``, a list of several
            with ``loss_weights``, ``beta``, ``label_smoothing``, ``use_weighting``): DPO with beta 0.1 by default.

    The data may hold token ids (``prompt_ids``, ``chosen_ids``, ``rejected_ids``), which are taken as they are, and the
    columns that the loss names in ``needs`` (``reward_margin`` for MADPO). A ``weight`` column multiplies the loss with
    ``PreferenceConfig(pair_weights=True)``.
    Where ``reward_margin`` is missing, a probe of the reference's states gives it, out of fold, from the pass that
    computes the reference; the attribute ``probe`` holds it and its report.
    ``ref_chosen_logps`` and ``ref_rejected_logps`` are computed once before step 0 where they are missing, from
    ``ref_model`` or from the model as passed, and reused by every later run on the same weights and tokens. A
    ``ref_model`` then waits in the computer's own memory for data sets that come later (``evaluate(data)``). Of
    streamed data, and with ``sync_ref_model``, they are computed with each batch, by a reference that stays on the
    device: a copy of the model in full training.

    Raises:
        ConfigError: an option that the loss replaces.
        DataError: a column that the loss needs is missing.
    """

    # The loss is divided by the pairs of the effective batch, so the trainer must not divide once more.
    loss_is_scaled_for_ga = True
    aux_loss_enabled: bool
    continues = True
    first_look: FirstLook | None = None
    """Set before a training, it gets the implicit margins of the first epoch; pairs need an integer ``pair_id``."""

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        loss: LossConfig | None = None,
    ) -> None:
        self.loss = loss if loss is not None else DPO() if args is None else loss_of(args)
        self._take_name(self.loss)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PreferenceConfig(output_dir=f"{name.split('/')[-1]}-{self._name}")
        refuse_options(args, loss_given=loss is not None)
        refuse_adapter(model, peft_config, sync_ref_model=args.sync_ref_model)
        if compute_metrics is not None:
            raise ConfigError(_NO_METRICS)
        init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            args.model_init_kwargs = _safe_init(model, args)
            if processing_class is None:
                processing_class = _processor(model, args)
        self.loss_state = self.loss.init_state(args.seed)
        self._observed: LossState | None = None  # for all pairs of a step, and where its next micro-batch begins
        self._position = 0
        self._sources = {}
        self._weighted = weights_are_used(train_dataset, self.loss.needs, getattr(args, "pair_weights", None))
        self._needs = tuple(sorted(({"weight"} if self._weighted else set()) | self.loss.needs & set(PAIR_COLUMNS)))
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(data, name, self._needs, probed=lacks_margin(train_dataset))
        # TRL then asks `_precompute_ref_logps` for the columns instead of loading a second model.
        args.precompute_ref_log_probs = True
        self._synchronised, args.sync_ref_model = args.sync_ref_model, False  # TRL refuses the two together
        try:
            super().__init__(
                model,
                ref_model,
                args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            args.model_init_kwargs, args.sync_ref_model = init_kwargs, self._synchronised
        if self.sharded:  # parts of a model cannot wait elsewhere, and would take the accelerator's memory
            self.ref_model, self._reference_dropped = None, ref_model is not None
        self._set_reference_aside()
        if self._synchronised:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        if self.aux_loss_enabled:
            say_once(
                f"The model is a mixture of experts, and its load-balancing loss (router_aux_loss_coef "
                f"{self.router_aux_loss_coef:g} in its configuration) is no part of this training; "
                "router_aux_loss_coef=0 says that this is meant."
            )
            self.aux_loss_enabled = False
        even = getattr(args.accelerator_config, "even_batches", True)
        refuse_uneven(self.accelerator, even_batches=even, drop_last=args.dataloader_drop_last)
        announce(self.model)
        self.movement = Movement(self)
        self.add_callback(self.movement)
        install_completion_head(unwrapped(self.model))

    def _take_name(self, loss: LossConfig) -> None:
        """What model cards say, and the tags of the model: the loss and its paper in place of DPO's."""
        inner = loss.loss if isinstance(loss, Custom) else loss
        self._name = type(inner).__name__
        self._tag_names = list(dict.fromkeys(["trl", "madpo", self._name.lower()]))
        paper = inner.paper
        self._paper = {}
        if paper is not None:
            self._paper = {"title": paper.title, "id": paper.arxiv, "citation": paper.bibtex()}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As TRL's, about the loss of this training, with the tags in a fixed order."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            card.data.tags = sorted(card.data.tags)
            card.save(path)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        if not set(ID_COLUMNS) <= set(get_dataset_column_names(dataset)):
            with rendering(dataset, processing_class, args, dataset_name) as (findings, tokenizer):
                dataset = super()._prepare_dataset(with_prompts(dataset, dataset_name), tokenizer, args, dataset_name)
                findings.say(dataset, processing_class, dataset_name)
        return drop_unscored(dataset, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*ID_COLUMNS, *REFERENCE_COLUMNS, *PAIR_COLUMNS, "pair_id"]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As TRL's, which prepares a data set that is passed here.

        TRL refuses one after full training without a ``ref_model``, even with the columns or a loss that needs none.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: self._prepared_late(rows, name) for name, rows in eval_dataset.items()}
            else:
                eval_dataset = self._prepared_late(eval_dataset, "eval")
        metrics: dict[str, float] = super(DPOTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Metrics of a data set, prepared as in :meth:`evaluate`. There are no predictions: logits are never built."""
        rows = self._prepared_late(test_dataset, metric_key_prefix)
        self._metrics["eval"].clear()
        output = super(DPOTrainer, self).predict(rows, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._window_means("eval").items()}
        return PredictionOutput(None, None, {**(output.metrics or {}), **means})

    def _prepared_late(self, rows: Any, name: str) -> Any:
        check_columns(rows, name, self._needs, probed=self._probed())
        rows = self._prepare_dataset(rows, self.processing_class, self.args, name)
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(rows, name, batch_size)

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
            raise ConfigError(_NO_METRICS)
        inputs = marked(inputs, self.accelerator, drop_last=self.args.dataloader_drop_last)
        return super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The micro-batches of a step; a loss with running statistics sees all of them before the first is used."""
        epoch_iterator = each_marked(epoch_iterator, self.accelerator, drop_last=self.args.dataloader_drop_last)
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
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

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = {f"loss.{name}": value for name, value in self.loss_state.state_dict().items()}
        moved = {f"reference_model.{name}": value for name, value in self._moving_reference().items()}
        looked = {} if self.first_look is None else self.first_look.state()
        return {**state, **self._reference_tensors(), **moved, **looked}, {}

    def _moving_reference(self) -> dict[str, Tensor]:
        """The weights of a reference that follows the policy."""
        return dict(self.ref_model.named_parameters()) if self._synchronised else {}

    def _load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        state = {name.removeprefix("loss."): value for name, value in tensors.items() if name.startswith("loss.")}
        self.loss_state = LossState.from_state_dict(state)
        if self.first_look is not None:
            self.first_look.load(tensors)
        for name, value in self._moving_reference().items():
            value.data.copy_(tensors[f"reference_model.{name}"])

    def _column_groups(self) -> dict[str, tuple[str, ...]]:
        return {"reference": REFERENCE_COLUMNS, "margins": PAIR_COLUMNS}

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


def _safe_init(model: str, args: DPOConfig) -> dict[str, Any]:
    """How TRL loads a model that is given by name: with all of its weights, and without pickles and code.

    The user may ask for these by ``model_init_kwargs``.
    """
    given = dict(args.model_init_kwargs or {})
    if not args.trust_remote_code and given.get("use_safetensors", True) and not given.get("trust_remote_code"):
        check_model(model, given.get("revision"))
    return {**given, "architecture": NamedArchitecture(given.get("architecture"))}


def _processor(model: str, args: DPOConfig) -> Any:
    """The tokenizer (or processor) that TRL takes where none is given."""
    revision = (args.model_init_kwargs or {}).get("revision")
    with loading(model, "tokenizer"):
        return AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)


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
