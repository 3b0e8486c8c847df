"""What a policy says of every pair just before it is trained on it: held-out margins that cost no pairs.

In the first epoch each pair is new to the policy, so its label judges the policy as that of a held-out pair does
(prequential evaluation, Dawid 1984). Half of the prompts are trained on first, and the pairs of the others decide: they
judge a policy that has learned, and none of them shares its prompt with a pair before it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from madpo.core.seeding import rng

Row = TypeVar("Row")


def in_halves(rows: Sequence[Row], prompts: Sequence[Hashable], seed: int) -> list[Row]:
    """The rows in a drawn order, in which the pairs of about half of the prompts come after those of the others.

    For a training that takes its rows in this order in every epoch.

    Args:
        prompts: of each row.
        seed: of the order.
    """
    names = list(dict.fromkeys(prompts))
    generator = rng(seed, "first look")
    late = {names[k] for k in generator.permutation(len(names))[len(names) // 2 :]}
    order = sorted(generator.permutation(len(rows)).tolist(), key=lambda k: prompts[k] in late)
    return [rows[k] for k in order]


class FirstLook:
    """Implicit margins of the pairs of a training's first epoch, each from before the pair was trained on.

    A trainer notes every micro-batch, and keeps the notes in its checkpoints.
    """

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []
        self._margins: list[Tensor] = []

    def note(self, accelerator: Any, pairs: Sequence[int], margins: Tensor, counted: Tensor) -> None:
        """Keep the margins of a micro-batch, on every process those of all.

        Args:
            pairs: pair_id of each row.
            margins: log-odds, ``rows``.
            counted: which rows are pairs of their own: no repeats that fill a batch.
        """
        ids = torch.tensor(pairs, dtype=torch.long, device=margins.device)
        ids, margins, counted = accelerator.gather((ids, margins.detach().float(), counted.to(margins.device)))
        self._pairs.append(torch.where(counted, ids, -1))
        self._margins.append(margins)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {"first_look.pairs": self._pairs, "first_look.margins": self._margins}
        return {name: torch.cat([part.cpu() for part in parts]) for name, parts in kept.items() if parts}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what a checkpoint kept."""
        self._pairs, self._margins = (
            [tensors[name]] if (name := f"first_look.{kind}") in tensors else [] for kind in ("pairs", "margins")
        )

    def deciding(self, prompts: Mapping[int, Hashable]) -> dict[int, float]:
        """pair_id -> implicit margin of the second half of the pairs, where the prompt had not been seen before.

        Args:
            prompts: pair_id -> prompt.
        """
        state = self.state()
        pairs, margins = (state[f"first_look.{name}"].numpy() for name in ("pairs", "margins"))
        pairs, margins = pairs[pairs >= 0], margins[pairs >= 0].astype(np.float64)
        found: dict[int, float] = {}
        seen: set[Hashable] = set()
        for place, (pair, margin) in enumerate(zip(pairs.tolist(), margins.tolist(), strict=True)):
            if place >= len(pairs) // 2 and prompts[pair] not in seen:
                found[pair] = margin
            seen.add(prompts[pair])
        return found
