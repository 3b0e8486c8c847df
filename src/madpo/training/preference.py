"""A drop-in for TRL's ``DPOTrainer`` with any preference loss and the fast log-probability engine.

TRL's losses are branches of one private method that averages inside, so this trainer brings its own ``compute_loss``
(:mod:`madpo.training.pair_loss`) and collator and inherits the rest: tokenising, chat templates, PEFT, accelerate,
DeepSpeed, FSDP, checkpoints, callbacks and loggers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoProcessor, TrainerCallback
from transformers.trainer_utils import PredictionOutput
from trl import DPOConfig, DPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from madpo.core.columns import ID_COLUMNS, MARGIN, PAIR_COLUMNS, REFERENCE_COLUMNS
from madpo.core.errors import ConfigError
from madpo.core.progress import say_once
from madpo.losses import DPO, Custom, LossConfig, LossState
from madpo.models.adapters import announce
from madpo.models.engine.logprobs import install_completion_head, unwrapped
from madpo.models.loading import loading
from madpo.models.untrusted import check_model
from madpo.models.weights import NamedArchitecture
from madpo.training.columns import (
    BY_LENGTH,
    check_columns,
    lacks_margin,
    weights_are_used,
    with_lengths,
    with_plain_rows,
)
from madpo.training.config import PreferenceConfig
from madpo.training.metrics import Movement
from madpo.training.nan_guard import drop_unscored
from madpo.training.padding_pairs import read_by_every_process, refuse_uneven
from madpo.training.pair_loss import NO_METRICS, PairLoss
from madpo.training.reference_adapter import copied_adapter
from madpo.training.refusals import loss_of, refuse_adapter, refuse_headless, refuse_options
from madpo.training.rendering import rendering, with_prompts


class PreferenceTrainer(PairLoss, DPOTrainer):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` with ``loss=...``.

    Args:
        model, ref_model, args, data_collator, train_dataset, ...: as in TRL, in TRL's order. ``args`` may be a plain
            ``DPOConfig``; its options of the loss are refused next to ``loss``.
        loss: any preference loss. Left out, it is the one that TRL's options name (``loss_type``, a list of several
            with ``loss_weights``, ``beta``, ``label_smoothing``, ``use_weighting``): DPO with beta 0.1 by default.

    The data may hold token ids (``prompt_ids``, ``chosen_ids``, ``rejected_ids``), which are taken as they are, and the
    columns that the loss names in ``needs`` (``reward_margin`` for MADPO). A ``weight`` column multiplies the loss with
    ``PreferenceConfig(pair_weights=True)``.
    Where ``reward_margin`` is missing, a probe of the reference's hidden states gives it, out of fold, from the pass
    that computes the reference; the attribute ``probe`` holds it and its report.
    ``ref_chosen_logps`` and ``ref_rejected_logps`` are computed once before step 0 where they are missing, from
    ``ref_model`` or from the model as passed, and reused by every later run on the same weights and tokens. A
    ``ref_model`` then waits in the computer's own memory for data sets that come later (``evaluate(data)``). Of
    streamed data, and with ``sync_ref_model``, they are computed with each batch, by a reference that stays on the
    device: a copy of the model in full training.

    Raises:
        ConfigError: an option that the loss replaces.
        DataError: a column that the loss needs is missing.
    """

    aux_loss_enabled: bool
    continues = True
    column_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"reference": REFERENCE_COLUMNS, "margins": PAIR_COLUMNS}

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
        if not isinstance(self.loss, LossConfig):
            raise ConfigError(f"loss is {loss!r}; give an object of madpo.losses, such as MADPO(beta=0.1) or DPO()")
        self._take_name(self.loss)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PreferenceConfig(output_dir=f"{name.split('/')[-1]}-{self._name}")
        refuse_options(args, loss_given=loss is not None)
        refuse_headless(model)
        refuse_adapter(model, peft_config, sync_ref_model=args.sync_ref_model)
        if compute_metrics is not None:
            raise ConfigError(NO_METRICS)
        init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            args.model_init_kwargs = _safe_init(model, args)
            if processing_class is None:
                processing_class = _processor(model, args)
        self.loss_state = self.loss.init_state(args.seed)
        self._sources = {}
        self._weighted = weights_are_used(train_dataset, self.loss.needs, getattr(args, "pair_weights", None))
        self._needs = tuple(sorted(({"weight"} if self._weighted else set()) | self.loss.needs & set(PAIR_COLUMNS)))
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(data, name, self._needs, probed=lacks_margin(train_dataset))
        # TRL then asks `_precompute_ref_logps` for the columns instead of loading a second model.
        args.precompute_ref_log_probs = True
        self._synchronised, args.sync_ref_model = args.sync_ref_model, False  # TRL refuses the two together
        try:
            with copied_adapter(model, ref_model):
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
        refuse_uneven(self.accelerator, args)
        read_by_every_process(self.accelerator, self.train_dataset, self.eval_dataset, args)
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
        """As TRL's, with the loss and its margins, and the tags in a fixed order."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            card.data.tags = sorted(card.data.tags)
            lines = [f"- loss: `{json.dumps(self.loss.model_dump(mode='json'))}`"]
            if self.probe is not None:
                lines.append(f"- margins: a probe of the reference's hidden states ({self.probe.report.brief()})")
            card.text = card.text.replace(
                "### Framework versions", "\n".join([*lines, "", "### Framework versions"]), 1
            )
            card.save(path)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        dataset = with_plain_rows(dataset)
        if not set(ID_COLUMNS) <= set(get_dataset_column_names(dataset)):
            with rendering(dataset, processing_class, args, dataset_name) as (findings, tokenizer):
                # TRL would leave out long prompts without a word; of a data set, `drop_unscored` counts them.
                whole = copy.copy(args)
                whole.max_length = None if isinstance(dataset, Dataset) else args.max_length
                dataset = super()._prepare_dataset(with_prompts(dataset, dataset_name), tokenizer, whole, dataset_name)
                findings.say(dataset, processing_class, dataset_name)
        return drop_unscored(dataset, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*ID_COLUMNS, *REFERENCE_COLUMNS, *PAIR_COLUMNS, "pair_id", *self._by_length]

    @property
    def _by_length(self) -> list[str]:
        """The column by which transformers groups rows of similar lengths, where it is asked to."""
        return [self.args.length_column_name] if self.args.train_sampling_strategy in BY_LENGTH else []

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        kept = super()._remove_unused_columns(dataset, description)
        return with_lengths(kept, *self._by_length) if self._by_length and isinstance(kept, Dataset) else kept

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
        check_columns(rows, name, self._needs, probed=MARGIN in self.computed_columns(self.train_dataset))
        rows = self._prepare_dataset(rows, self.processing_class, self.args, name)
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(rows, name, batch_size)

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
