"""Running a trainer: its progress, its log, and going on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from madpo.core import processes
from madpo.core.config import Frozen, identity_settings
from madpo.core.progress import bar, say
from madpo.core.storage import write_atomically
from madpo.models.adapters import announce
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.training.checkpoints import newest, remove

MEMORY_REMEDY = (
    "set optimisation.micro_batch_size to a smaller divisor of its batch_size, which leaves the result as it is unless "
    "lora.dropout is on, and run again"
)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the loss, and every logged row in ``log.jsonl``, without what the clock says."""

    def __init__(self, description: str, out: Path) -> None:
        self.description, self.path = description, out / "log.jsonl"
        if processes.is_main_process():
            self.path.unlink(missing_ok=True)
        self._bar: Any = None
        self._advance: Any = None
        self._shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = bar(self.description, state.max_steps)
        self._advance = self._bar.__enter__()
        if state.global_step:  # rows after the checkpoint are written again, so its own history is what counts
            say(f"{self.description}: continues after step {state.global_step} of {state.max_steps}")
            if processes.is_main_process():
                write_atomically(self.path, "".join(map(_log_line, state.log_history)))
            self._shown = state.global_step
            self._advance(self._shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if processes.is_main_process():
            with self.path.open("a", encoding="utf-8") as log:
                log.write(_log_line({**logs, "step": state.global_step}))
        if "loss" in logs:
            self._advance(state.global_step - self._shown, loss=round(float(logs["loss"]), 3))
            self._shown = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.__exit__(None, None, None)


def _log_line(row: Mapping[str, Any]) -> str:
    """A row of ``log.jsonl``: what depends on the training alone, in an order that a checkpoint does not change."""
    kept = {k: v for k, v in sorted(row.items()) if k != "step" and not k.endswith(("_runtime", "_per_second"))}
    return json.dumps({"step": row["step"], **kept}) + "\n"


def watch(trainer: Any, description: str, out: Path) -> None:
    """Show a trainer's progress our way, and write what it logs to ``out/log.jsonl``."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(description, out))


def run_training(trainer: Any, settings: Frozen, description: str, out: Path) -> Any:
    """Train, from the newest checkpoint in ``out`` if a run before this one was cut off there.

    What is logged goes to ``out/log.jsonl``. The checkpoints stay until :func:`forget_checkpoints`.

    Args:
        trainer: one with :class:`ExactResume`.
        settings: the stage's configuration, part of what a checkpoint must agree with.
    """
    announce(trainer.model)
    watch(trainer, description, out)
    trainer.export_checkpoints = False  # the stage writes the finished adapter
    trainer.stage_settings = identity_settings(settings)
    if hasattr(settings, "optimisation"):
        trainer.memory_remedy = MEMORY_REMEDY
    found = newest(out / CHECKPOINTS)
    return trainer.train(resume_from_checkpoint=None if found is None else found.folder)


def forget_checkpoints(out: Path) -> None:
    """Remove what only an interrupted training needs."""
    if processes.is_main_process():
        remove(out / CHECKPOINTS)
