"""The columns of preference data: their names, which every package takes from here, and how a number gets to the loss.

A margin's way from a line of a file to the gradient, file by file, with every function that touches it:

1. ``data/load.py``: ``load_preferences`` reads ``PairStream.with_rows``, which adds file and line to a mistake;
2. ``data/rows.py``: ``Columns.found_in`` finds the column by its names below, ``Reader.pair`` makes a finite float of
   it (``as_number``), ``Pair.row`` puts that into a row for training;
3. ``operations/policy.py``: ``train_pairs`` gets the rows from ``load_training``, which holds some prompts out, and
   ``as_dataset`` hands all columns below to the trainer (a script does the same itself);
4. ``training/columns.py``: ``PreferenceCollator`` puts one float32 per pair into the batch (``_numbers``);
5. ``training/pair_loss.py``: ``_loss_inputs`` hands it to the loss, and ``compute_loss`` takes the mean over the step,
   which the ``training_step`` of transformers sends backward;
6. ``losses/madpo.py``: ``MADPO.margin`` detaches it, ``log_margin_weight`` makes a weight of it, and ``MADPO.__call__``
   multiplies DPO's loss by that: the gradient is the weight times DPO's.

A new numeric column is a name in ``PAIR_COLUMNS``, a field of :class:`madpo.core.layout.Layout` and, where a loss reads
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
    """Whether the trainer's probe of the reference's hidden states gives margins to training pairs with these columns.

    Args:
        past_scores: also where the pairs have scores, whose difference could be the margin instead.
    """
    return not any(name in columns for name in (MARGIN, "margin", *(() if past_scores else SCORES)))
