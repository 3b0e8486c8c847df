"""Running a trainer: its progress, its log, and going on from a checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_callback import PrinterCallback

from madpo.core import processes
from madpo.core.config import Frozen, identity_settings
from madpo.core.progress import bar, say
from madpo.core.storage import write_atomically
from madpo.models.adapters import announce
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.runner.folder import final_folder
from madpo.training.checkpoints import newest

MEMORY_REMEDY = (
    "set optimisation.micro_batch_size to a smaller divisor of its batch_size, which leaves the result as it is unless "
    "lora.dropout is on, and run again"
)


Page = Callable[[str], None]
"""Writes the page of a running training from its ``log.jsonl``, with a sentence on how far it is."""
PAGE_SECONDS = 10.0
"""Between two writings of a page."""
TRACKED = "runs"
"""TensorBoard's files: where transformers writes them, seen from the checkpoints, and where they stay."""


class _Watch(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the loss, and every logged row in ``log.jsonl``, without what the clock says."""

    def __init__(self, description: str, out: Path, page: Page | None) -> None:
        self.description, self.path = description, out / "log.jsonl"
        self.page, self._due = page, 0.0
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
            if self.page is not None and time.monotonic() >= self._due:
                self.page(f"{self.description}: step {state.global_step} of {state.max_steps}")
                self._due = time.monotonic() + PAGE_SECONDS
        if "loss" in logs:
            self._advance(state.global_step - self._shown, loss=round(float(logs["loss"]), 3))
            self._shown = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.__exit__(None, None, None)


def _log_line(row: Mapping[str, Any]) -> str:
    """A row of ``log.jsonl``: only what depends on the training, in an order that a checkpoint does not change."""
    kept = {k: v for k, v in sorted(row.items()) if k != "step" and not k.endswith(("_runtime", "_per_second"))}
    return json.dumps({"step": row["step"], **kept}) + "\n"


def watch(trainer: Any, description: str, out: Path, page: Page | None = None) -> None:
    """Show a trainer's progress our way, and write what it logs to ``out/log.jsonl``."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(description, out, page))


_reporting: list[Any] = []  # runs of wandb that trainings of this process began


def run_training(trainer: Any, settings: Frozen, description: str, out: Path, page: Page | None = None) -> Any:
    """Train, from the newest checkpoint in ``out`` if a run before this one was cut off there.

    What is logged goes to ``out/log.jsonl``, to the trackers of the trainer's arguments, and to ``page``; TensorBoard's
    files end in ``out/runs``.

    Args:
        trainer: one with :class:`ExactResume`.
        settings: the stage's configuration, part of what a checkpoint must agree with.
    """
    announce(trainer.model)
    watch(trainer, description, out, page)
    trainer.args.run_name = trainer.args.run_name or f"{final_folder(out).name}: {description}"
    while _reporting:  # wandb would go on with the last run
        _reporting.pop().finish()
    for callback in trainer.callback_handler.callbacks:
        wandb = getattr(callback, "_wandb", None)
        if isinstance(callback, WandbCallback) and wandb is not None and wandb.run is None:
            _reporting.append(wandb)
    trainer.export_checkpoints = False  # the stage writes the finished adapter
    trainer.stage_settings = identity_settings(settings)
    if hasattr(settings, "optimisation"):
        trainer.memory_remedy = MEMORY_REMEDY
    found = newest(out / CHECKPOINTS)
    result = trainer.train(resume_from_checkpoint=None if found is None else found.folder)
    keep_tracked(out)
    return result


def keep_tracked(out: Path) -> None:
    """Copy what TensorBoard has written out of the checkpoints, which are no part of a result."""
    if processes.is_main_process() and (tracked := out / CHECKPOINTS / TRACKED).is_dir():
        shutil.copytree(tracked, out / TRACKED, dirs_exist_ok=True)
