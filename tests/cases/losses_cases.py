"""The shared cases A to F of the golden tables, and configurations of every loss."""

from __future__ import annotations

from typing import Any, get_args

import torch

from madpo.losses import (
    BCO,
    DPO,
    IPO,
    ODPO,
    RPO,
    WPO,
    AlphaDPO,
    BetaDPO,
    Combined,
    Custom,
    Loss,
    LossConfig,
    LossInputs,
    OmniDPO,
)
from quick import quick

# policy chosen, policy rejected, reference chosen, reference rejected, tokens chosen, tokens rejected
CASES = {
    "A": (-42, -55.5, -45, -54, 30, 50),
    "B": (-60.25, -48, -58, -50, 40, 25),
    "C": (-100, -1700, -200, -300, 200, 400),
    "D": (-10, -20, -10, -20, 8, 16),
    "E": (-1700, -100, -300, -200, 400, 200),
    "F": (-30, -33, -31.5, -32, 20, 22),
}

UNION: dict[str, type[LossConfig]] = {
    get_args(member.model_fields["kind"].annotation)[0]: member for member in get_args(get_args(Loss)[0])
}
"""Kind -> class, of every loss that a file can name."""

VARIANTS: dict[str, LossConfig] = {
    "cdpo": DPO(label_smoothing=0.1),
    "ipo-mean": IPO(reduction="mean"),
    "wpo-unclamped": WPO(clamp=False),
    "odpo-linear": ODPO(offset="linear"),
    "rpo-sq": RPO(form="sq"),
    "rpo-fwd": RPO(form="fwd_kl"),
    "omni_dpo-detached": OmniDPO(detach_weight=True),
    "beta_dpo-official": BetaDPO.preset("official"),
    "beta_dpo-notebook": BetaDPO.preset("madpo_notebook"),
    "beta_dpo-text": BetaDPO.preset("madpo_text"),
    "alpha_dpo-official": AlphaDPO.official(),
    "alpha_dpo-paper": AlphaDPO(scale="paper"),
    "combined": Combined(parts=(DPO(), BCO(), WPO()), weights=(0.8, 0.2, 0)),
}

EVERY_LOSS: dict[str, LossConfig] = {
    kind: cls() for kind, cls in UNION.items() if cls not in (Combined, Custom)
} | VARIANTS
"""Every loss of the union at its defaults, and other forms of some."""


def trainer_class(loss: LossConfig) -> tuple[object, ...]:
    """What a trainer does for a loss; losses with equal values differ in arithmetic only."""
    return type(loss) if loss.stateful else None, loss.needs, loss.needs_reference


def first_of_each_class() -> list[str]:
    """Names of losses, one of every class."""
    first: dict[tuple[object, ...], str] = {}
    for name, loss in EVERY_LOSS.items():
        first.setdefault(trainer_class(loss), name)
    return [*first.values()]


def for_trainers() -> list[Any]:
    """Parameters of a test that trains with every loss: one of each class in ``make test``, the others slow."""
    return quick(EVERY_LOSS, *first_of_each_class())


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(*names: str, reward_margin: float | None = None, **columns: torch.Tensor) -> LossInputs:
    """The named cases in float64; policy log-probs ask for gradients. Optional columns as given."""
    rows = list(zip(*(CASES[name] for name in names), strict=True))
    if reward_margin is not None:
        columns["reward_margin"] = torch.full((len(names),), reward_margin, dtype=torch.float64)
    return LossInputs(
        f64(*rows[0]).requires_grad_(),
        f64(*rows[1]).requires_grad_(),
        f64(*rows[2]),
        f64(*rows[3]),
        torch.tensor(rows[4]),
        torch.tensor(rows[5]),
        **columns,
    )


def with_columns(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    margin: torch.Tensor | float = 2.0,
    tokens: int = 10,
) -> LossInputs:
    """Inputs with every optional column filled, for tests that face every loss."""
    count, kind = len(policy_chosen), policy_chosen.dtype
    margins = margin if isinstance(margin, torch.Tensor) else torch.full((count,), margin, dtype=kind)
    lengths = torch.full((count,), tokens)
    return LossInputs(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        lengths,
        lengths,
        reward_margin=margins,
        chosen_score=torch.full((count,), 5.0, dtype=kind),
        rejected_score=torch.full((count,), 5.0, dtype=kind) - margins,
        chosen_log_sum_sq=torch.full((count,), -1.5, dtype=kind),
        rejected_log_sum_sq=torch.full((count,), -2.0, dtype=kind),
    )
