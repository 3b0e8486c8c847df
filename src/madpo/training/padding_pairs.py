"""Pairs that a data loader repeats so that every process gets as many as the others.

On several processes accelerate completes the last round of an epoch with pairs from its beginning. They pass through
the model, since every process must take part in every step, but they must not count: not in the loss, its divisor,
the statistics of the batch, or what is logged.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from madpo.core.errors import ConfigError
from madpo.core.progress import say_once
from madpo.losses import LossConfig, LossState

REPEATED = "repeated"


def marked(batch: dict[str, Any], accelerator: Any, *, drop_last: bool) -> dict[str, Any]:
    """The batch, with one truth value per pair in ``repeated`` if it is the last of its data loader.

    Call it while the loader is at this batch. Rows are pairs: chosen ones first, then rejected ones.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or drop_last or not state.end_of_dataloader:
        return batch
    pairs = len(batch["input_ids"]) // 2
    real = state.remainder
    if real < 0:  # accelerate forgets it where an epoch is entered in the middle, after a resume
        try:
            real = len(state.active_dataloader.dataset) % (pairs * accelerator.num_processes)
        except TypeError:  # a stream of unknown length, which every process reads for itself
            return batch
    if real == 0:
        return batch
    position = accelerator.process_index * pairs + torch.arange(pairs, device=batch["input_ids"].device)
    return {**batch, REPEATED: position >= real}


def refuse_uneven(accelerator: Any, args: Any) -> None:
    """Refuse batches of different sizes: processes that gather over a batch would wait for each other forever.

    Raises:
        ConfigError: on several processes ``even_batches`` is off, one process makes the batches of all, or batches are
            balanced by their tokens.
    """
    if accelerator.num_processes == 1:
        return
    if args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy='batch_rebalance' gives processes batches of different sizes; use "
            "'group_by_length' with several processes"
        )
    if args.accelerator_config.dispatch_batches:
        raise ConfigError(
            "accelerator_config.dispatch_batches cuts batches between processes, and the first half of a batch are "
            "chosen rows, the second half rejected ones; leave it out"
        )
    if not args.accelerator_config.even_batches and not args.dataloader_drop_last:
        raise ConfigError(
            "accelerator_config.even_batches is off, so the processes' last batches differ in size; leave it on "
            "(repeated pairs are not counted), or set dataloader_drop_last"
        )


def read_by_every_process(accelerator: Any, train: Any, held: Any, args: Any) -> None:
    """Let every process read a stream for itself, and say that pairs which complete its last batch count.

    accelerate would let one process read it and cut its batches.
    """
    loader = accelerator.dataloader_config
    loader.dispatch_batches = bool(loader.dispatch_batches)
    sets = [("train", train), *(held.items() if isinstance(held, dict) else [("eval", held)])]
    streams = [name for name, rows in sets if isinstance(rows, IterableDataset)]
    if streams and accelerator.num_processes > 1 and not args.dataloader_drop_last:
        say_once(
            f"{', '.join(streams)}: several processes read a stream, whose last batch is completed with pairs from its "
            "beginning, and these count twice; load it without streaming, or set dataloader_drop_last."
        )


def observed(
    loss: LossConfig, statistic: Tensor, counted: Tensor, state: LossState, *, training: bool = True
) -> LossState:
    """``loss.observe`` on the pairs that count, with rows for all of them.

    Args:
        statistic: of every pair of the batch, in the same order on every process.
        counted: which of them take part. The rows of the others are placeholders, and none of them is kept.
    """
    statistic, counted = statistic.detach().cpu(), counted.cpu()  # where a loss's state lives
    if bool(counted.all()):
        return loss.observe(statistic, state, training=training)
    if bool(counted.any()):
        ready, place = loss.observe(statistic[counted], state, training=training), (counted.cumsum(0) - 1).clamp(min=0)
    else:  # no loss of these rows is used, so nothing moves
        ready, place = loss.observe(torch.zeros_like(statistic), state, training=False), torch.arange(len(counted))
    rows = {name: value[place] if value.ndim else value for name, value in ready.batch.items()}
    if "kept" in rows:
        rows["kept"] = rows["kept"] & counted
    return LossState(ready.tensors, rows)
