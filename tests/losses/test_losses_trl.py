"""Our losses against TRL's own branches, on the same per-token log-probs (this is the one test use of TRL here)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from madpo.losses import BCO, DPO, IPO, RDPO, WPO, Combined, LossConfig, LossInputs

PAIRS, TOKENS = 6, 9


class Accelerator:
    """One process: gathering gives the tensor back."""

    device = torch.device("cpu")

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def gather_for_metrics(self, value: torch.Tensor) -> torch.Tensor:
        return value


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    """Per-token log-probs and log sum p^2 of chosen and rejected rows, with prompts of 2 and padded ends."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(2 * PAIRS, TOKENS, 5, generator=generator, dtype=torch.float64) * 2
    log_probs = torch.log_softmax(logits, -1)
    lengths = torch.randint(1, TOKENS - 1, (2 * PAIRS,), generator=generator)
    mask = torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 2 : 2 + int(length)] = 1
    shifted = mask[:, 1:]
    return {
        "log_probs": (log_probs[..., 0] * shifted).requires_grad_(),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1) * shifted,
        "mask": mask,
        "lengths": lengths,
        "ref": torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64) * 3 - 12,
    }


def trl_loss(case: dict[str, torch.Tensor], loss_type: str, **settings: Any) -> torch.Tensor:
    from trl import DPOTrainer

    count = 2 * PAIRS
    zeros = torch.zeros(count, TOKENS, dtype=torch.float64)
    outputs = SimpleNamespace(
        log_probs=case["log_probs"],
        log_sum_sq_probs=case["log_sum_sq_probs"],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(stub).update(settings)
    inputs = {
        "input_ids": torch.zeros(count, TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(count, TOKENS + 1, dtype=torch.long),
        "completion_mask": case["mask"],
        "ref_chosen_logps": case["ref"][:PAIRS],
        "ref_rejected_logps": case["ref"][PAIRS:],
    }
    value: torch.Tensor = DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, return_outputs=False)
    return value


@pytest.mark.parametrize(
    ("loss", "loss_type", "settings"),
    [
        (DPO(beta=0.3), "sigmoid", {"beta": 0.3}),
        (IPO(beta=0.3, reduction="mean"), "ipo", {"beta": 0.3}),
        (BCO(beta=0.3), "bco_pair", {"beta": 0.3}),
        (
            Combined(parts=(DPO(beta=0.3), BCO(beta=0.3)), weights=(0.8, 0.2)),
            "",
            {"beta": 0.3, "loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        ),
        (RDPO(beta=0.3, flip_rate=0.2), "robust", {"beta": 0.3, "label_smoothing": 0.2}),
        (WPO(beta=0.3, clamp=False), "sigmoid", {"beta": 0.3, "use_weighting": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_value_and_gradient_are_trls(
    case: dict[str, torch.Tensor], loss: LossConfig, loss_type: str, settings: dict[str, Any]
) -> None:
    stock = trl_loss(case, loss_type, **settings)
    (stock_gradient,) = torch.autograd.grad(stock, case["log_probs"], retain_graph=True)

    logps = case["log_probs"].sum(1)
    aligned = case["log_sum_sq_probs"].sum(1) / case["lengths"]
    ours = loss(
        LossInputs(
            logps[:PAIRS],
            logps[PAIRS:],
            case["ref"][:PAIRS],
            case["ref"][PAIRS:],
            case["lengths"][:PAIRS],
            case["lengths"][PAIRS:],
            chosen_log_sum_sq=aligned[:PAIRS],
            rejected_log_sum_sq=aligned[PAIRS:],
        )
    ).per_pair.mean()
    (gradient,) = torch.autograd.grad(ours, case["log_probs"])
    assert ours.item() == pytest.approx(stock.item(), rel=1e-13)
    assert torch.allclose(gradient, stock_gradient, rtol=1e-12, atol=1e-15)


def test_trl_ignores_label_smoothing_where_ours_applies_it(case: dict[str, torch.Tensor]) -> None:
    smoothed = trl_loss(case, "sigmoid", beta=0.3, label_smoothing=0.2)
    assert smoothed.item() == trl_loss(case, "sigmoid", beta=0.3).item()
    margin = case["log_probs"].sum(1) - case["ref"]
    zeros, ones = torch.zeros(PAIRS, dtype=torch.float64), torch.ones(PAIRS, dtype=torch.long)
    inputs = LossInputs(margin[:PAIRS], margin[PAIRS:], zeros, zeros, ones, ones)
    ours = DPO(beta=0.3, label_smoothing=0.2)(inputs).per_pair.mean()
    assert abs(ours.item() - smoothed.item()) > 1e-3
