"""The columns of preference data: their names, which every room takes from here, and how a number gets to the loss.

A margin's way from a file to the gradient, file by file:

1. ``data/load.py``: ``load_preferences`` goes through the rows, and a mistake in one learns its place;
2. ``data/rows.py``: ``Reader.pair`` finds the column by its names below and refuses what is no finite number;
3. ``operations/policy.py``: ``as_dataset`` hands all columns below to the trainer (a script does the same itself);
4. ``training/columns.py``: ``PreferenceCollator`` puts one float32 per pair into the batch;
5. ``training/pair_loss.py``: ``compute_loss`` gives it to the loss and takes the mean over the step, which transformers
   sends backward;
6. ``losses/madpo.py``: ``MADPO`` makes a weight of it, and multiplies DPO's loss by that.

A new numeric column is a name in ``PAIR_COLUMNS``, a verb of :class:`madpo.core.layout.Layout` and, where a loss reads
it, a field of :class:`madpo.losses.LossInputs`.
"""

from __future__ import annotations

from collections.abc import Container

MARGIN = "reward_margin"
SCORES = ("chosen_score", "rejected_score")
PAIR_COLUMNS = (*SCORES, MARGIN, "weight")
"""Numbers of a pair that a loss may read."""
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Log-probabilities of both sides under the reference, nats, summed over tokens."""
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Token ids, in the place of texts; each completion ends with its end token."""

_SCORES = ("{}_score", "score_{}", "{}_rating", "rating_{}", "{}-rating", "{}_avg_rating")
NUMBERS: dict[str, tuple[str, ...]] = {
    **{f"{side}_score": tuple(form.format(side) for form in _SCORES) for side in ("chosen", "rejected")},
    **{name: (name,) for name in (*PAIR_COLUMNS, *REFERENCE_COLUMNS) if name not in SCORES},
}
"""Our name of every numeric column -> what known data sets call it, our name first."""


def probe_gives_margin(columns: Container[str], *, past_scores: bool) -> bool:
    """Whether the trainer's probe of the reference's states gives the margins of training pairs with these columns.

    Args:
        past_scores: also where the pairs have scores, whose difference could be the margin instead.
    """
    return not any(name in columns for name in (MARGIN, "margin", *(() if past_scores else SCORES)))
