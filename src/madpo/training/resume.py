"""Exact resume for any of transformers' trainers: what a kill interrupts ends in the bytes of an undisturbed run.

A mixin that puts :mod:`madpo.training.checkpoints` behind the ordinary interface (``resume_from_checkpoint``). What a
checkpoint holds is in :mod:`madpo.training.saving`; what it must agree with, in :mod:`madpo.training.digests`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from madpo.core.errors import ConfigError, DataError, memory_errors
from madpo.core.locks import locked
from madpo.core.progress import say
from madpo.core.storage import storage_errors
from madpo.models.adapters import adapting
from madpo.models.engine.logprobs import embedding_rows, unwrapped
from madpo.models.untrusted import refuse_pickles
from madpo.training import checkpoints as disk
from madpo.training.digests import check_identity, training_identity
from madpo.training.saving import SavesCheckpoints, sort_sets
from madpo.training.states import check_groups, restore_callbacks, restore_random_states, restored_metrics, unpack


class ExactResume(SavesCheckpoints):
    """Mixin: put it before the trainer, ``class MyTrainer(ExactResume, RewardTrainer)``.

    Attributes:
        continues: a checkpoint may be continued for more steps, or with other evaluations.
    """

    continues: bool = False
    memory_remedy: str = (
        "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor, which leaves the "
        "result as it is unless dropout is on, or lower max_length"
    )

    _point: disk.Checkpoint | None = None  # where this call of `train` continues
    _random_due: bool = False
    _stopped: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        folder = Path(given[0].output_dir if given else ".")
        for each in given:
            if each.auto_find_batch_size:
                raise ConfigError(
                    "auto_find_batch_size=True would begin the training again when memory runs out, with half of the "
                    f"batch and from weights that have moved; leave it out, and if that happens {self.memory_remedy}"
                )
            if each.dataloader_persistent_workers:
                say("dataloader_persistent_workers is left out: a resumed run would draw other random numbers.")
                each.dataloader_persistent_workers = False
        with storage_errors(folder), memory_errors(self.memory_remedy), adapting():
            super().__init__(*args, **kwargs)
        for adapter in (getattr(self.model, "peft_config", None) or {}).values():
            sort_sets(adapter)

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
        with storage_errors(root), memory_errors(self.memory_remedy), contextlib.ExitStack() as stack:
            if self.args.should_save and self._saves:
                stack.enter_context(locked(root))
            self._refuse_pickle(self._saves or bool(resume_from_checkpoint))
            self._point, self._random_due, self._seconds_before = None, False, 0.0
            stack.callback(setattr, self, "_point", None)
            where = self._where(resume_from_checkpoint)
            if self._point is not None:
                self._prepare_resume(self._point.tensors(disk.EXTRA))
            if not self.sharded and (self._saves or self._point is not None):
                self._identity_now = training_identity(self)
            totals = _Totals(self)
            self.add_callback(totals)
            stack.callback(self.remove_callback, totals)
            result = super().train(resume_from_checkpoint=where, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
            if not self.sharded:
                self.require_finite_weights()
            return result

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
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None and kept["scaler"] is not None:
                scaler.load_state_dict(unpack(kept["scaler"], tensors))
            self._load_extra_state(self._point.tensors(disk.EXTRA), kept["extra"])
        self._random_due = True

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._point is None:  # else it comes with the optimizer
            super()._load_scaler(checkpoint)

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
        self._clock = time.monotonic()
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
        # The checkpoint was the last thing before an early stop, or that of the last step: inside an epoch transformers
        # would take one more.
        if self._stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Speed is that of all steps in all of their time.
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class _Totals(TrainerCallback):  # type: ignore[misc]
    """Calls the trainer before its first step, and after it; looks at what other callbacks have done to its model."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer, self.packed = trainer, False
        self.rows = embedding_rows(unwrapped(trainer.model))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (rows := embedding_rows(unwrapped(self.trainer.model))) != self.rows:
            raise ConfigError(
                f"a callback has changed the model's embedding from {self.rows} to {rows} rows, and the optimizer and "
                "the reference are those of the model before; call resize_token_embeddings before the trainer is made"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.packed and self.trainer._saves and not self.trainer.sharded and not args.save_only_model:
            self.trainer._packed_state()  # what no checkpoint can hold is refused now, not at the first one
        self.packed = True
