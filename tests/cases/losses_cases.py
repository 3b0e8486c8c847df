"""The shared cases A to F of the golden tables, and one configuration of every loss."""

from __future__ import annotations

import torch

from madpo.losses import (
    DPO,
    IPO,
    MADPO,
    ODPO,
    RDPO,
    RPO,
    WPO,
    AlphaDPO,
    BetaDPO,
    LossConfig,
    LossInputs,
    OmniDPO,
    SimPO,
    SoftDPO,
    SoftMADPO,
)

# policy chosen, policy rejected, reference chosen, reference rejected, tokens chosen, tokens rejected
CASES = {
    "A": (-42, -55.5, -45, -54, 30, 50),
    "B": (-60.25, -48, -58, -50, 40, 25),
    "C": (-100, -1700, -200, -300, 200, 400),
    "D": (-10, -20, -10, -20, 8, 16),
    "E": (-1700, -100, -300, -200, 400, 200),
    "F": (-30, -33, -31.5, -32, 20, 22),
}

EVERY_LOSS: dict[str, LossConfig] = {
    "dpo": DPO(),
    "cdpo": DPO(label_smoothing=0.1),
    "ipo-sum": IPO(),
    "ipo-mean": IPO(reduction="mean"),
    "rdpo": RDPO(),
    "simpo": SimPO(),
    "wpo": WPO(),
    "wpo-unclamped": WPO(clamp=False),
    "madpo": MADPO(),
    "soft_madpo": SoftMADPO(),
    "soft_dpo": SoftDPO(),
    "odpo": ODPO(),
    "odpo-linear": ODPO(offset="linear"),
    "rpo-sq": RPO(form="sq"),
    "rpo-fwd": RPO(form="fwd_kl"),
    "rpo-bwd": RPO(form="bwd_kl"),
    "omni_dpo": OmniDPO(),
    "omni_dpo-detached": OmniDPO(detach_weight=True),
    "beta_dpo": BetaDPO(),
    "beta_dpo-official": BetaDPO.preset("official"),
    "beta_dpo-notebook": BetaDPO.preset("madpo_notebook"),
    "beta_dpo-text": BetaDPO.preset("madpo_text"),
    "alpha_dpo": AlphaDPO(),
    "alpha_dpo-official": AlphaDPO.official(),
    "alpha_dpo-paper": AlphaDPO(scale="paper"),
}


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
