"""Toys with a known answer, and identities between losses.

A softmax policy over a few responses per prompt is trained on the exact Bradley-Terry law of known rewards: each
ordered pair enters as "chosen over rejected" with its probability. What a loss converges to can then be compared
with what its paper promises.
"""

from __future__ import annotations

import math

import pytest
import torch

from losses_cases import batch, f64, with_columns
from madpo.losses import (
    DPO,
    IPO,
    MADPO,
    ODPO,
    RDPO,
    RPO,
    WPO,
    LossConfig,
    LossInputs,
    OmniDPO,
    SoftDPO,
    SoftMADPO,
    margin_coefficient,
    margin_weight,
)

BETA = 0.5


def ordered_pairs(logits: torch.Tensor, reference: torch.Tensor, rewards: torch.Tensor) -> LossInputs:
    """Every ordered pair of responses of every prompt (prompts, responses), with its reward margin."""
    count = logits.shape[1]
    chosen, rejected = (torch.tensor(list(side)) for side in zip(*permutations(count), strict=True))
    policy, ref = torch.log_softmax(logits, 1), torch.log_softmax(reference, 1)

    def take(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values[:, rows].flatten()

    return with_columns(
        take(policy, chosen),
        take(policy, rejected),
        take(ref, chosen),
        take(ref, rejected),
        margin=take(rewards, chosen) - take(rewards, rejected),
        tokens=1,
    )


def permutations(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def trained(
    loss: LossConfig,
    rewards: torch.Tensor,
    reference: torch.Tensor,
    *,
    flip_rate: float = 0.0,
    certain: bool = False,
    shares: torch.Tensor | None = None,
) -> LossInputs:
    """The pairs under the policy that minimises the expected loss, by full-batch descent (L-BFGS)."""
    logits = reference.clone().requires_grad_()
    margin = ordered_pairs(logits, reference, rewards).required("reward_margin").detach()
    label = (margin > 0).double() if certain else torch.sigmoid(margin)
    law = (1 - flip_rate) * label + flip_rate * (1 - label) if shares is None else shares
    optimiser = torch.optim.LBFGS(
        [logits], lr=1, max_iter=3000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = (law * loss(ordered_pairs(logits, reference, rewards)).per_pair).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return ordered_pairs(logits.detach(), reference, rewards)


def two_responses(*margins: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with two responses each at the given true margins, and an uneven reference."""
    rewards = torch.stack([f64(*margins), torch.zeros(len(margins), dtype=torch.float64)], 1)
    generator = torch.Generator().manual_seed(2)
    return rewards, torch.randn(len(margins), 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "flip_rate"),
    [(DPO(beta=BETA), 0.0), (RDPO(beta=BETA, flip_rate=0.2), 0.2), (RDPO(beta=BETA, flip_rate=0), 0.0)],
    ids=["dpo", "rdpo under flips", "rdpo"],
)
def test_the_tilted_policy(loss: LossConfig, flip_rate: float) -> None:
    # pi* = ref exp(r / beta) / Z over five responses: the whole policy, not a pair at a time.
    generator = torch.Generator().manual_seed(1)
    rewards, reference = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = trained(loss, rewards, reference, flip_rate=flip_rate)
    margin = pairs.required("reward_margin")
    assert torch.allclose(BETA * pairs.log_ratio_margin, margin, atol=1e-5)


def test_flips_bias_dpo_and_smoothing_does_not_undo_them() -> None:
    rewards, reference = two_responses(0.5, 1.0, 2.0)
    margin = ordered_pairs(reference, reference, rewards).required("reward_margin")
    flipped = trained(DPO(beta=BETA), rewards, reference, flip_rate=0.2)
    noisy = 0.8 * torch.sigmoid(margin) + 0.2 * torch.sigmoid(-margin)
    assert torch.allclose(BETA * flipped.log_ratio_margin, torch.logit(noisy), atol=1e-6)
    smoothed = trained(DPO(beta=BETA, label_smoothing=0.2), rewards, reference)
    assert torch.allclose(smoothed.log_ratio_margin, flipped.log_ratio_margin, atol=1e-5)


def test_smoothed_dpo_on_certain_labels_stops_at_the_logit() -> None:
    rewards, reference = two_responses(1.0, 3.0)
    pairs = trained(DPO(beta=BETA, label_smoothing=0.1), rewards, reference, certain=True)
    assert (BETA * pairs.log_ratio_margin)[::2].tolist() == pytest.approx([math.log(9)] * 2, abs=1e-6)


def test_ipo_reaches_its_gap() -> None:
    rewards, reference = two_responses(0.5, 1.0, 4.0)
    certain = trained(IPO(beta=BETA), rewards, reference, certain=True)
    assert certain.log_ratio_margin[::2].tolist() == pytest.approx([1 / (2 * BETA)] * 3, abs=1e-6)
    # Under uncertain labels the square loss averages: (2 p - 1) / (2 beta).
    drawn = trained(IPO(beta=BETA), rewards, reference)
    expected = torch.tanh(drawn.required("reward_margin") / 2) / (2 * BETA)
    assert torch.allclose(drawn.log_ratio_margin, expected, atol=1e-6)


MARGINS = (0.0, 0.3, 1.0, 1.9, 2.0, 3.0, 5.0)
SETTING = {"tau": 2.0, "c_max": 2.0, "c_min": 0.5}


def test_madpo_reaches_c_h_below_tau_and_h_plus_log_w_above() -> None:
    rewards, reference = two_responses(*MARGINS)
    pairs = trained(MADPO(beta=BETA, **SETTING), rewards, reference)
    margin = pairs.required("reward_margin")
    c = margin_coefficient(margin, **SETTING)
    size = margin.abs()
    above = margin.sign() * (size + margin_weight(size, **SETTING).log())
    expected = torch.where(size < 2, c * margin, above)
    assert torch.allclose(BETA * pairs.log_ratio_margin, expected, atol=1e-5)
    assert ((size - expected.abs())[size >= 2] <= math.log(2)).all()
    # and that is not c h: at a margin of 5, c h is 2.68 and the target 4.94.
    assert abs(float(expected[-2] - c[-2] * 5)) > 2


@pytest.mark.parametrize(
    "loss",
    [
        SoftMADPO(beta=BETA, **SETTING),
        SoftDPO(beta=BETA),
        SoftDPO(beta=BETA, margin_temperature=2),
        SoftDPO(beta=BETA, label_share=0.4),
        RPO(beta=BETA, form="sq"),
        RPO(beta=BETA, form="fwd_kl"),
        RPO(beta=BETA, form="bwd_kl", eta=0.5),
    ],
    ids=[
        "soft_madpo",
        "soft_dpo",
        "soft_dpo at temperature 2",
        "soft_dpo mixed",
        "rpo sq",
        "rpo fwd",
        "rpo bwd at eta 0.5",
    ],
)
def test_losses_with_a_target_reach_it(loss: LossConfig) -> None:
    rewards, reference = two_responses(*(m for m in MARGINS if m < 4))
    pairs = trained(loss, rewards, reference)
    margin = pairs.required("reward_margin")
    if isinstance(loss, SoftMADPO):
        target = margin_coefficient(margin, **SETTING) * margin
    else:
        target = margin * (loss.eta if isinstance(loss, RPO) else 1 / loss.margin_temperature)  # type: ignore[attr-defined]
    assert torch.allclose(BETA * pairs.log_ratio_margin, target, atol=1e-4)


def test_wpo_leaves_dpos_optimum_where_the_weight_is_the_pairs_own() -> None:
    rewards, reference = two_responses(0.5, 2.0)
    pairs = trained(WPO(beta=BETA), rewards, reference)
    assert torch.allclose(BETA * pairs.log_ratio_margin, pairs.required("reward_margin"), atol=1e-4)


def test_odpo_solves_its_own_balance() -> None:
    rewards, reference = two_responses(0.5, 2.0)
    pairs = trained(ODPO(beta=BETA, alpha=0.5, offset="linear"), rewards, reference)
    u, m = BETA * pairs.log_ratio_margin, pairs.required("reward_margin")
    # p sigma(m/2 - u) = (1 - p) sigma(u - m/2): the offset is odd in the order, so u = m + m/2.
    assert torch.allclose(u, 1.5 * m, atol=1e-5)


def test_soft_labels_reach_the_same_point_with_less_variance() -> None:
    # 60 copies of a study with 40 labels per prompt each: MADPO's answer scatters around the soft one's.
    generator = torch.Generator().manual_seed(4)
    rewards, reference = two_responses(*[1.0] * 60)
    draws = (torch.rand(60, 40, generator=generator) < 1 / (1 + math.exp(-1))).double().mean(1).clamp(0.03, 0.97)
    shares = torch.stack([draws, 1 - draws], 1).flatten().double()
    hard = trained(MADPO(beta=BETA, **SETTING), rewards, reference, shares=shares)
    soft = trained(SoftMADPO(beta=BETA, **SETTING), rewards, reference, shares=shares)
    target = float(margin_coefficient(f64(1.0), **SETTING))
    one, two = BETA * hard.log_ratio_margin[::2], BETA * soft.log_ratio_margin[::2]
    assert torch.allclose(two, torch.full_like(two, target), atol=1e-5)
    assert one.std() > 0.2
    assert abs(one.mean() - target) < 4 * one.std() / math.sqrt(60) + 0.05
    assert two.std() < 1e-5


# Identities.


def varied() -> LossInputs:
    generator = torch.Generator().manual_seed(8)
    columns = [torch.randn(200, generator=generator, dtype=torch.float64) * 20 for _ in range(4)]
    margin = torch.randn(200, generator=generator, dtype=torch.float64) * 4
    return with_columns(*(column.requires_grad_() for column in columns), margin=margin)


def same(one: LossConfig, two: LossConfig, inputs: LossInputs, rtol: float = 1e-12, shift: bool = False) -> None:
    """Equal values (unless ``shift``) and gradients."""
    values = [loss(inputs).per_pair for loss in (one, two)]
    policy = (inputs.policy_chosen_logps, inputs.policy_rejected_logps)
    gradients = [torch.autograd.grad(value.sum(), policy) for value in values]
    if not shift:
        assert torch.allclose(*values, rtol=rtol, atol=rtol)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=rtol)


def test_losses_that_are_dpo_in_a_limit() -> None:
    inputs = varied()
    same(MADPO(c_max=1 + 1e-9), DPO(), inputs, rtol=1e-7)
    same(MADPO(), DPO(), inputs.replace(reward_margin=torch.full((200,), 7.0, dtype=torch.float64)))
    same(MADPO(), DPO(), inputs.replace(reward_margin=torch.full((200,), -7.0, dtype=torch.float64)), rtol=0)
    same(RDPO(flip_rate=0), DPO(), inputs, rtol=0)
    same(DPO(label_smoothing=0), DPO(), inputs, rtol=0)
    same(ODPO(alpha=0, offset="linear"), DPO(), inputs, rtol=0)
    same(SoftDPO(), DPO(), inputs.replace(reward_margin=torch.full((200,), 60.0, dtype=torch.float64)))
    same(SoftDPO(label_share=1), DPO(), inputs, rtol=0)
    certain = torch.full((200,), 99.0, dtype=torch.float64)
    same(WPO(beta=0.1), DPO(), inputs.replace(chosen_log_sum_sq=-certain, rejected_log_sum_sq=-certain), rtol=0)


def test_a_share_of_the_label_mixes_soft_labels_with_dpo() -> None:
    inputs = varied()
    same(SoftDPO(margin_temperature=2, label_share=0), SoftDPO(margin_temperature=2), inputs, rtol=0)
    soft, hard = SoftDPO(margin_temperature=2)(inputs).per_pair, DPO()(inputs).per_pair
    mixed = SoftDPO(margin_temperature=2, label_share=0.3)(inputs)
    assert torch.allclose(mixed.per_pair, 0.3 * hard + 0.7 * soft, rtol=1e-12)
    p = 0.3 + 0.7 * torch.sigmoid(inputs.required("reward_margin").detach() / 2)
    assert torch.allclose(mixed.metrics["target/probability"], p, rtol=1e-12)
    # Its minimiser is logit p: there the slope in h is 0, and each side of it pulls back.
    at = inputs.replace(
        policy_chosen_logps=inputs.ref_chosen_logps + torch.logit(p) / 0.1,
        policy_rejected_logps=inputs.ref_rejected_logps,
    )
    chosen = at.policy_chosen_logps.detach().requires_grad_()
    (slope,) = torch.autograd.grad(
        SoftDPO(margin_temperature=2, label_share=0.3)(at.replace(policy_chosen_logps=chosen)).per_pair.sum(), chosen
    )
    assert slope.abs().max() < 1e-12


def test_losses_that_are_one_another() -> None:
    inputs = varied()
    margin = inputs.required("reward_margin").detach()
    target = margin_coefficient(margin, tau=7, c_max=4) * margin
    moved = inputs.replace(reward_margin=target)
    same(SoftDPO(), RPO(form="bwd_kl"), inputs, shift=True)
    entropy = SoftDPO(beta=0.1)(inputs).per_pair - RPO(form="bwd_kl")(inputs).per_pair
    p = torch.sigmoid(margin)
    assert torch.allclose(entropy, -p * p.log() - (1 - p) * torch.sigmoid(-margin).log())
    policy = (inputs.policy_chosen_logps, inputs.policy_rejected_logps)
    soft = torch.autograd.grad(SoftMADPO()(inputs).per_pair.sum(), policy)
    backward = torch.autograd.grad(RPO(form="bwd_kl")(moved).per_pair.sum(), policy)
    for a, b in zip(soft, backward, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_madpos_mean_over_labels_is_soft_madpo_below_tau_and_not_above() -> None:
    inputs = varied()
    swapped = LossInputs(
        inputs.policy_rejected_logps,
        inputs.policy_chosen_logps,
        inputs.ref_rejected_logps,
        inputs.ref_chosen_logps,
        inputs.rejected_lengths,
        inputs.chosen_lengths,
        reward_margin=-inputs.required("reward_margin"),
    )
    margin = inputs.required("reward_margin").detach()
    mean = torch.sigmoid(margin) * MADPO()(inputs).per_pair + torch.sigmoid(-margin) * MADPO()(swapped).per_pair
    soft = SoftMADPO()(inputs).per_pair
    below = margin.abs() < 7
    assert 0 < below.sum() < 200
    assert torch.allclose(mean[below], soft[below], rtol=1e-11)
    assert not torch.allclose(mean[~below], soft[~below], rtol=1e-5)
    # The label itself does not enter the soft form.
    assert torch.allclose(soft, SoftMADPO()(swapped).per_pair, rtol=1e-12)


def test_rdpo_is_unbiased_for_dpo_under_flips() -> None:
    inputs = varied()
    swapped = inputs.replace(
        policy_chosen_logps=inputs.policy_rejected_logps,
        policy_rejected_logps=inputs.policy_chosen_logps,
        ref_chosen_logps=inputs.ref_rejected_logps,
        ref_rejected_logps=inputs.ref_chosen_logps,
    )
    for rate in (0.05, 0.2, 0.45):
        loss = RDPO(flip_rate=rate)
        mean = (1 - rate) * loss(inputs).per_pair + rate * loss(swapped).per_pair
        assert torch.allclose(mean, DPO()(inputs).per_pair, rtol=1e-10)


def test_omni_dpo_without_its_weights_is_half_of_length_normalised_dpo() -> None:
    scores = {"chosen_score": f64(5, 5, 5, 5, 5), "rejected_score": f64(1, 2, 3, 4, 5)}
    inputs = batch("A", "B", "C", "D", "E", **scores)
    values = OmniDPO(eta=0, gamma=0, nll_weight=0)(inputs).per_pair * 2
    golden = [0.571573, 0.838651, 0.000335, 0.693147, 8.000335]
    assert values.tolist() == pytest.approx(golden, abs=5.1e-7)


def test_margin_temperature_divides() -> None:
    inputs = varied()
    halved = inputs.replace(reward_margin=inputs.required("reward_margin").detach() / 2)
    for kind in (MADPO, SoftMADPO, SoftDPO):
        one = kind(margin_temperature=2)(inputs).per_pair
        assert torch.equal(one, kind()(halved).per_pair)


def test_nothing_flows_into_the_margin() -> None:
    for loss in (MADPO(), SoftMADPO(), SoftDPO(), ODPO(offset="linear"), RPO()):
        margin = f64(1, -2).requires_grad_()
        logps = f64(-3, -4).requires_grad_()
        zeros = f64(0, 0)
        value = loss(with_columns(logps, zeros, zeros, zeros, margin=margin)).per_pair.sum()
        assert torch.autograd.grad(value, margin, allow_unused=True) == (None,)
