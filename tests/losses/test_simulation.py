"""The simulated worlds: what they promise, and exact measurement."""

import math

import numpy as np
import pytest
import torch

from madpo.losses import DPO, SoftDPO
from madpo.losses.simulation import KNOWLEDGE, Method, Setting, Worlds, at_kl, draw, measure, reward_margins, train

SMALL = Setting(pairs=60)


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return draw(SMALL, (0, 1))


def test_a_world_does_not_depend_on_its_company(worlds: Worlds) -> None:
    own = draw(SMALL, (1,))
    assert torch.equal(own.train.policy[0], worlds.train.policy[1])
    assert torch.equal(own.reward[0], worlds.reward[1])
    assert not torch.equal(worlds.reward[0], worlds.reward[1])


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [(Setting(reward_sd=0.5), 0.37), (Setting(), 0.22), (Setting(reward_sd=4.0), 0.10), (Setting(flips=0.2), 0.33)],
)
def test_labels_contradict_the_truth_as_often_as_said(setting: Setting, wrong: float) -> None:
    found = draw(setting, range(4))
    assert float((found.train.margin < 0).float().mean()) == pytest.approx(wrong, abs=0.03)
    assert float(found.reward.std()) == pytest.approx(setting.reward_sd, rel=0.15)


def test_low_pairs_are_easier_and_have_a_style(worlds: Worlds) -> None:
    low = draw(Setting(pairs=400, tier="low"), (0, 1))
    high = draw(Setting(pairs=400), (0, 1))
    assert low.train.margin.mean() > high.train.margin.mean()
    assert low.train.policy.mean(1).norm() > 1.5 * high.train.policy.mean(1).norm()


def test_measured_kl_and_reward_are_those_of_the_definition(worlds: Worlds) -> None:
    theta = 0.05 * torch.randn(2, 150, 3, generator=torch.Generator().manual_seed(0))
    kl, gain = measure(worlds, theta)
    logits = (worlds.features[1] @ theta[1, :, 2]).double()
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    assert kl[1, 2] == pytest.approx(float((p * (p * 256).log()).sum(1).mean()), rel=1e-4)
    value = (p * worlds.reward[1].double()).sum(1) - worlds.reward[1].double().mean(1)
    assert gain[1, :, 2].tolist() == pytest.approx([float(value[:25].mean()), float(value[25:].mean())], rel=1e-4)
    still_kl, still_gain = measure(worlds, torch.zeros(2, 150, 1))
    assert still_kl.abs().max() < 1e-6
    assert still_gain.abs().max() < 1e-5


def test_gains_are_read_linearly_in_the_root_of_the_kl() -> None:
    kl, gain = torch.tensor([[4.0, 0.25]]), torch.tensor([[[2.0, 0.5]]])
    assert at_kl(kl, gain, 1.0)[0, 0] == pytest.approx(1.0)
    assert at_kl(kl, gain, 0.0625)[0, 0] == pytest.approx(0.25)
    assert math.isnan(at_kl(kl, gain, 4.1)[0, 0])


def test_a_method_with_a_loss_for_each_world_is_those_losses(worlds: Worlds) -> None:
    margin, rows = worlds.train.margin, torch.tensor([3, 5])
    scaled = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    losses = [SoftDPO(beta=1.0, label_share=share) for share in (0.2, 0.9)]
    both = Method(losses, margin).per_pair(scaled, rows)
    for k, loss in enumerate(losses):
        assert torch.allclose(both[k], Method((loss,), margin).per_pair(scaled, rows)[k])


def test_training_follows_the_loss_and_leaves_out_what_is_not_kept(worlds: Worlds) -> None:
    kept = (torch.arange(60) < 30).float()
    methods = [Method((DPO(beta=1.0),)), Method((DPO(beta=1.0),), kept=kept)]
    (theta,) = train(worlds.train.policy, methods, (0.5, 5.0), seed=0)
    assert theta.shape == (2, 150, 2, 2)
    again = train(worlds.train.policy, methods, (0.5, 5.0), seed=0)[0]
    assert torch.equal(theta, again)
    fit = (worlds.train.policy @ theta[:, :, 0, 0][..., None])[..., 0]
    assert (fit > 0).float().mean() > 0.9
    others = worlds.train.policy.clone()
    others[:, 30:] = 7.0
    assert torch.equal(train(others, methods, (0.5, 5.0), seed=0)[0][:, :, 1], theta[:, :, 1])


def test_reward_models_that_know_more_are_better() -> None:
    found = draw(Setting(pairs=400), range(3))
    accuracy = []
    for kind in KNOWLEDGE:
        margins = reward_margins(found, kind, seed=0)
        assert margins.outside.shape == found.train.margin.shape
        # In sample a reward model flatters itself, out of fold it does not.
        assert (margins.inside > 0).float().mean() >= (margins.outside > 0).float().mean() - 0.02
        accuracy.append(np.corrcoef(margins.outside.flatten(), found.train.margin.flatten())[0, 1])
    assert accuracy[0] > accuracy[1] > accuracy[2] > 0.1
