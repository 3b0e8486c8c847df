"""Exact resume for any of transformers' trainers: what a kill interrupts ends in the bytes of an undisturbed run.

A mixin that puts :mod:`madpo.training.checkpoints` behind the ordinary interface (``save_strategy``,
``save_total_limit``, ``resume_from_checkpoint``). It keeps the weights, what transformers forgets (running
totals of the logged rows, random states of a loss that looks at a step before it is taken) and what transformers keeps
as pickle (optimizer, schedule, random states, arguments).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from madpo.core.errors import ConfigError, DataError, StorageError, memory_errors
from madpo.core.locks import locked
from madpo.core.processes import all_gather_object
from madpo.core.progress import say
from madpo.core.storage import storage_errors
from madpo.models.adapters import adapting
from madpo.models.untrusted import refuse_pickles
from madpo.training import checkpoints as disk
from madpo.training.adapters import sort_sets
from madpo.training.digests import check_identity, rows_digest, training_identity
from madpo.training.nan_guard import FiniteTraining
from madpo.training.states import (
    check_groups,
    pack,
    random_states,
    restore_callbacks,
    restore_random_states,
    restored_metrics,
    stored_callbacks,
    stored_metrics,
    unpack,
)


class ExactResume(FiniteTraining):
    """Mixin: put it before the trainer, ``class MyTrainer(ExactResume, RewardTrainer)``.

    Attributes:
        export_checkpoints: also write what ``from_pretrained`` reads (adapter or model, tokenizer) into checkpoints.
        continues: a checkpoint may be continued for more steps, or with other evaluations.
        stage_settings: further settings that the result depends on; a checkpoint with others is refused.
    """

    export_checkpoints: bool = True
    continues: bool = False
    stage_settings: dict[str, Any] | None = None
    memory_remedy: str = (
        "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor, which leaves the "
        "result as it is unless dropout is on, or lower max_length"
    )

    _point: disk.Checkpoint | None = None  # where this call of `train` continues
    _random_due: bool = False
    _stopped: bool = False
    _identity_now: dict[str, Any] | None = None
    _clock: float = 0.0
    _seconds_before: float = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        folder = Path(given[0].output_dir if given else ".")
        with storage_errors(folder), memory_errors(self.memory_remedy), adapting():
            super().__init__(*args, **kwargs)
        for adapter in (getattr(self.model, "peft_config", None) or {}).values():
            sort_sets(adapter)

    # ---- What a trainer adds ----

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Further state as tensors and plain values, equal on every process."""
        return {}, {}

    def _load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take what ``_extra_state`` gave."""

    def _prepare_resume(self, tensors: dict[str, Tensor]) -> None:
        """Take what is needed of it before the data loader exists."""

    def _column_groups(self) -> dict[str, tuple[str, ...]]:
        """Columns with a field of their own in the identity: field -> names. All others are the field ``data``."""
        return {}

    def _stops_early(self) -> bool:
        """Whether the training has ended for good. After a time limit or a preemption, a resume goes on."""
        stopping = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stopping)

    # ---- Finding and refusing ----

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As transformers' ``train``.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one in ``output_dir``.

        Raises:
            DataError: the checkpoint is damaged, or belongs to another training; the sentence names file or field.
            ConfigError: the training is sharded, and its checkpoints would be pickles.
            StorageError: another run trains in ``output_dir``, or it cannot be written.
            MemoryShortage: the memory is used up; the checkpoints stay.
        """
        root = Path(self.args.output_dir)
        with storage_errors(root), memory_errors(self.memory_remedy), contextlib.ExitStack() as held:
            if self.args.should_save and self._saves:
                held.enter_context(locked(root))
            self._refuse_pickle(self._saves or bool(resume_from_checkpoint))
            self._point, self._random_due, self._seconds_before = None, False, 0.0
            held.callback(setattr, self, "_point", None)
            where = self._where(resume_from_checkpoint)
            if self._point is not None:
                self._prepare_resume(self._point.tensors(disk.EXTRA))
            if not self.sharded and (self._saves or self._point is not None):
                self._identity_now = training_identity(self)
            totals = _Totals(self)
            self.add_callback(totals)
            held.callback(self.remove_callback, totals)
            result = super().train(resume_from_checkpoint=where, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
            if not self.sharded:
                self.require_finite_weights()
            return result

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

    def _refuse_pickle(self, checkpoints: bool) -> None:
        if getattr(self.args, "allow_pickle", False):
            return
        remedy = "pass allow_pickle=True in PreferenceConfig if you trust every checkpoint that you will load"
        if self.sharded and checkpoints:
            raise ConfigError(
                "checkpoints of a model that DeepSpeed or FSDP splits over processes are pickles, which can run code "
                f"when they are loaded; {remedy}, or set save_strategy='no'"
            )
        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        if self.args.push_to_hub and checkpoints and strategy != "end":
            raise ConfigError(
                f"hub_strategy={strategy!r} writes training_args.bin, a pickle, at every push; use hub_strategy='end', "
                f"or {remedy}"
            )

    def _where(self, wanted: str | Path | bool | None) -> str | None:
        """The folder to continue from, verified."""
        if not wanted:
            return None
        root = Path(self.args.output_dir)
        if self.sharded:
            return str(wanted) if not isinstance(wanted, bool) else str(disk.folders(root)[0])
        if wanted is True:
            self._point = disk.newest(root)
            if self._point is None:
                raise DataError(f"there is no complete checkpoint in {root} to resume from")
        else:
            folder = Path(wanted)
            try:
                self._point = disk.verify(folder)
            except disk.DamagedCheckpoint as error:
                foreign = folder.is_dir() and not (folder / disk.MANIFEST).exists()
                if foreign and getattr(self.args, "allow_pickle", False):
                    say(f"{folder} is not a checkpoint of madpo; loading transformers' formats, pickles included")
                    return str(folder)
                hint = " (allow_pickle=True in PreferenceConfig loads transformers' own format)" if foreign else ""
                raise disk.DamagedCheckpoint(f"{error}{hint}") from error
        state_file = self._point.folder / disk.TRAINER_STATE
        with disk.reading(state_file):
            state = TrainerState.load_from_json(str(state_file))
            if state.global_step != self._point.step:
                raise ValueError(f"global_step is {state.global_step} in the checkpoint of step {self._point.step}")
        return str(self._point.folder)

    def _rows_digest(self, dataset: Any, columns: Iterable[str]) -> str | None:
        """SHA-256 of columns, for the identity."""
        return rows_digest(dataset, columns)

    def _conditions(self) -> dict[str, Any]:
        """What changes last digits only: reported, not refused."""
        return {
            "threads": torch.get_num_threads(),
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "per_device_eval_batch_size": self.args.per_device_eval_batch_size,
        }

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
        callbacks = stored_callbacks([*self.callback_handler.callbacks, self.control])
        self.state.stateful_callbacks = {**self.state.stateful_callbacks, **callbacks}
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
                    "seconds": self._seconds_before + time.time() - self._clock,
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

    # ---- Loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._point is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        identity = self._identity_now or training_identity(self)
        check_identity(self._point, identity, continues=self.continues and self.stage_settings is None)
        saved, live = self._point.tensors(disk.WEIGHTS), self._trainable()
        for name in sorted(saved.keys() ^ live.keys()):
            where = "the checkpoint" if name in saved else "this model"
            raise DataError(f"{self._point.folder}: {name} is trained in {where} only; use the model it was made with")
        with torch.no_grad(), disk.reading(self._point.folder):
            for name, tensor in live.items():
                if tensor.shape != saved[name].shape:
                    raise DataError(
                        f"{self._point.folder}: {name} has shape {tuple(saved[name].shape)} in the checkpoint and "
                        f"{tuple(tensor.shape)} in this model; use the model it was made with"
                    )
                tensor.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._point is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self._extra_state()[0]:
                path = Path(checkpoint, disk.EXTRA)
                if not path.exists():
                    raise DataError(f"{path} is missing: the checkpoint belongs to another loss; use an older one")
                self._load_extra_state(dict(load_file(path)), {})
            return
        with disk.reading(self._point.folder):
            kept = self._point.json(disk.TRAINING)
            tensors = self._point.tensors(disk.OPTIMIZER)
            optimizer = unpack(kept["optimizer"], tensors)
            check_groups(optimizer, self.optimizer.param_groups)
            self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(unpack(kept["scheduler"], tensors))
            self._load_extra_state(self._point.tensors(disk.EXTRA), kept["extra"])
        self._random_due = True

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._point is None:
            super()._load_scaler(checkpoint)
            return
        with disk.reading(self._point.folder):
            scaler, kept = getattr(self.accelerator, "scaler", None), self._point.json(disk.TRAINING)["scaler"]
            if scaler is not None and kept is not None:
                scaler.load_state_dict(unpack(kept, self._point.tensors(disk.OPTIMIZER)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._point is None:
            super()._load_rng_state(checkpoint)
        elif self._random_due:
            self._random_due = False
            with disk.reading(self._point.folder):
                ranks = self._point.json(disk.TRAINING)["processes"]
                restore_random_states(ranks[self.accelerator.process_index]["random"])

    def _load_best_model(self) -> None:
        # The trainer's state names its folder, and that may come from somebody's checkpoint.
        folder = Path(self.state.best_model_checkpoint)
        if not getattr(self.args, "allow_pickle", False):
            if folder.resolve().parent != Path(self.args.output_dir).resolve():
                raise DataError(f"the best checkpoint, {folder}, lies outside {self.args.output_dir}; train without it")
            if not self.args.save_only_model:
                disk.verify(folder)
            refuse_pickles(folder)
        super()._load_best_model()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step. A loss may draw while it looks at them, so the random states are put back first."""
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._point is not None:
            self._load_rng_state(str(self._point.folder))
        return samples

    # ---- Running totals ----

    def _begin(self) -> None:
        """Just before the first step: transformers has set the totals to zero by now."""
        self._clock = time.time()
        self._stopped = False
        if self._point is None:
            return
        with disk.reading(self._point.folder):
            kept = self._point.json(disk.TRAINING)
            own = kept["processes"][self.accelerator.process_index]
            self._stopped, self._seconds_before = kept["stopped"], kept["seconds"]
            self._initial_global_step, self._globalstep_last_logged = kept["first_step"], kept["last_logged"]
            self._total_loss_scalar = kept["total_loss"]
            self._tr_loss = torch.tensor(own["loss"], device=self.args.device)
            if hasattr(self, "_total_train_tokens"):
                self._total_train_tokens = kept["train_tokens"]
            if own["metrics"]:
                self._metrics["train"].update(restored_metrics(own["metrics"], self.args.device))
            restore_callbacks(self.callback_handler.callbacks, self.state.stateful_callbacks)
            dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
            for name, now in self._conditions().items():
                if (before := kept["conditions"].get(name)) != now:
                    # Dropout draws other masks for micro-batches of another size.
                    drawn = dropout and name == "per_device_train_batch_size"
                    what = "the result differs" if drawn else "last digits can differ"
                    say(f"{name} was {before} and is {now}: {what} from that of an undisturbed run")
        self.state.compute_steps(self.args, self.state.max_steps)  # transformers keeps those of the checkpoint

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._stopped:
            self.control.should_training_stop = True  # the checkpoint was the last thing before an early stop
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Speed is that of all steps in all of their time.
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class _Totals(TrainerCallback):  # type: ignore[misc]
    """Calls the trainer before its first step, and after it."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer, self.packed = trainer, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.packed and self.trainer._saves and not self.trainer.sharded and not args.save_only_model:
            self.trainer._packed_state()  # what no checkpoint can hold is refused now, not at the first one
        self.packed = True
