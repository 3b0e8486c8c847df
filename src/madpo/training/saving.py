"""Checkpoints of any of transformers' trainers, written without pickle: what a training is at a step.

A checkpoint holds the weights, what transformers forgets (running totals of the logged rows) and what transformers
keeps as pickle (optimizer, schedule, random states, arguments), under the identity of its training
(:func:`madpo.training.digests.training_identity`). :mod:`madpo.training.resume` continues from it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState, TrainerState

from madpo.core.errors import StorageError
from madpo.core.processes import all_gather_object
from madpo.training import checkpoints as disk
from madpo.training.digests import training_identity
from madpo.training.nan_guard import FiniteTraining
from madpo.training.states import pack, random_states, stored_metrics


class SortedSet(set[str]):
    """A set that is iterated in order.

    PEFT keeps target modules in a set and writes it as a list. The order of a plain set of strings follows the hash
    seed of the process, so that equal trainings would leave different bytes in ``adapter_config.json``.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


def sort_sets(adapter: Any) -> None:
    """Give an adapter's configuration (a ``PeftConfig``) sorted sets, in place."""
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        if isinstance(value, set) and all(isinstance(item, str) for item in value):
            setattr(adapter, field.name, SortedSet(value))


class SavesCheckpoints(FiniteTraining):
    """Mixin: the ordinary interface (``save_strategy``, ``save_total_limit``) over :mod:`madpo.training.checkpoints`.

    Attributes:
        export_checkpoints: also write what ``from_pretrained`` reads (adapter or model, tokenizer) into checkpoints.
        stage_settings: further settings that the result depends on; a checkpoint with others is refused.
        column_groups: columns with a field of their own in the identity, by field. All others are the field ``data``.
    """

    export_checkpoints: bool = True
    stage_settings: dict[str, Any] | None = None
    column_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    _identity_now: dict[str, Any] | None = None
    _clock: float = 0.0
    _seconds_before: float = 0.0

    # ---- What a trainer adds ----

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Further state as tensors and plain values, equal on every process."""
        return {}, {}

    def _load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take what ``_extra_state`` gave."""

    def _prepare_resume(self, tensors: dict[str, Tensor]) -> None:
        """Take what is needed of it before the data loader exists."""

    def computed_columns(self, dataset: Any) -> dict[str, str]:
        """Columns of a data set that this trainer has computed -> what with, which identifies them."""
        return {}

    def _stops_early(self) -> bool:
        """Whether the training has ended for good. After a time limit or a preemption, a resume goes on."""
        stopping = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stopping)

    @property
    def _saves(self) -> bool:
        return str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of the model (DeepSpeed, FSDP); transformers' own formats are for that."""
        return bool(
            self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or getattr(self, "is_distributed_loading_by_transformers", False)
        )

    def _conditions(self) -> dict[str, Any]:
        """What changes last digits only: reported, not refused."""
        return {
            "threads": torch.get_num_threads(),
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "per_device_eval_batch_size": self.args.per_device_eval_batch_size,
        }

    def _send_telemetry(self) -> None:
        """Nothing of TRL's trainers leaves the machine."""

    # ---- Saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Model and tokenizer; no ``training_args.bin``, which is a pickle that nobody reads."""
        if not self.args.should_save and not self.sharded:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.model
        if not hasattr(model, "save_pretrained"):
            model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(self._get_output_dir(trial=trial))
        if self.sharded:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._save_extra(root / f"checkpoint-{self.state.global_step}")
            return
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        step = self.state.global_step
        best = self.state.best_global_step
        if best and (best == step or (root / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(root / f"checkpoint-{best}")
        callbacks = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        self.state.stateful_callbacks |= TrainerState(stateful_callbacks=callbacks).stateful_callbacks
        window = getattr(self, "_metrics", {}).get("train", {})
        own = {"random": random_states(), "loss": float(self._tr_loss), "metrics": stored_metrics(window)}
        ranks = all_gather_object(own)
        failed: Exception | None = None
        if self.args.should_save:
            try:
                self._write(root, step, ranks)
            except Exception as error:  # the other processes must hear of it before it ends this one
                failed = error
        others = all_gather_object(failed is not None)
        if failed is not None:
            raise failed
        if any(others):
            raise StorageError(f"process {others.index(True)} could not write the checkpoint of step {step} in {root}")
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(root / f"checkpoint-{step}"))

    def _write(self, root: Path, step: int, ranks: list[Any]) -> None:
        identity = self._identity_now or training_identity(self)
        self.require_finite_weights()
        if self.hp_search_backend is not None:
            root.mkdir(parents=True, exist_ok=True)  # a trial has a folder of its own
        with disk.writing(root, step, identity) as folder:
            if self.export_checkpoints:
                self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                disk.save_tensors(self._trainable(), folder / disk.WEIGHTS)
                tensors, values = self._packed_state()
                disk.save_tensors(tensors, folder / disk.OPTIMIZER)
                totals = {
                    "extra": self._save_extra(folder),
                    "total_loss": self._total_loss_scalar,
                    "last_logged": self._globalstep_last_logged,
                    "first_step": self._initial_global_step,
                    "train_tokens": getattr(self, "_total_train_tokens", 0),
                    "seconds": self._seconds_before + time.monotonic() - self._clock,
                    "stopped": self._stops_early(),
                    "conditions": self._conditions(),
                    "processes": ranks,
                }
                disk.save_json({**values, **totals}, folder / disk.TRAINING)
            self.state.save_to_json(str(folder / disk.TRAINER_STATE))
        if self.export_checkpoints and self.is_world_process_zero():
            self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            protected = [root / f"checkpoint-{step}", *([Path(best)] if best else [])]
            disk.rotate(root, self.args.save_total_limit, protected)

    def _save_extra(self, folder: Path) -> dict[str, Any]:
        tensors, values = self._extra_state()
        disk.save_tensors(tensors, folder / disk.EXTRA)
        return values

    def _trainable(self) -> dict[str, Tensor]:
        """What training changes: parameters with a gradient, and buffers that belong to the model's state."""
        kept = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        lasting = self.model.state_dict().keys()
        return kept | {name: b for name, b in self.model.named_buffers() if name in lasting}

    def _packed_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer, schedule and gradient scaler as tensors and plain values.

        Raises:
            ConfigError: one of them holds something that only a pickle could.
        """
        scaler = getattr(self.accelerator, "scaler", None)
        states = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, state in states.items():
            found, values[name] = pack(state, name)
            tensors |= found
        return tensors, values
