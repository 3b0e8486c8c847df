"""RLOO and GRPO against a known reward, where the optimum is known in closed form."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from madpo.core.errors import ConfigError
from madpo.models.hyperparameters import Optimisation
from madpo.models.load import LoRA, build_tiny, load_tokenizer
from madpo.training import online
from madpo.training.online import fit_online
from madpo.training.settings import OnlineSettings, OnlineStage
from refusals import refused

REFERENCE = np.array([0.5, 0.3, 0.2])
REWARD = np.array([1.0, 2.0, 0.0])
ARMS = (50, 60, 70)  # token ids
PROMPT = [1, 20, 21]


def bandit(seed=0):
    """A language model that says one of three tokens after any prompt of ours, by the probabilities of REFERENCE.

    Its head's rows are log p in the direction of the last state, so the reference is exact, plus directions of their
    own that the state has no part in yet, so that an adapter can reach every distribution.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        state = model.base_model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1]
        basis = torch.linalg.qr(torch.cat([state[:, None], torch.randn(16, 3)], dim=1))[0][:, 1:]
        model.lm_head.weight.copy_(-40 * (state / state.square().sum()).expand(128, -1))
        for arm, (token, p) in enumerate(zip(ARMS, REFERENCE, strict=True)):
            model.lm_head.weight[token] = math.log(p) * state / state.square().sum() + 2 * basis[:, arm]
    return model


def distribution(model):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double()
    return logits.softmax(-1)[list(ARMS)].numpy()


def stage(algorithm, updates, *, batch=16, beta=0.5, rate=1e-2, every=0, **settings):
    return OnlineStage(
        method=algorithm,
        algorithm=algorithm,
        settings=OnlineSettings(beta=beta, generations=batch // 2, **settings),
        optimisation=Optimisation(
            learning_rate=rate, epochs=updates, batch_size=batch, weight_decay=0, checkpoint_every=every
        ),
        lora=LoRA(rank=4, alpha=8),
        max_new_tokens=1,
    )


def reward(prompts, responses):
    assert all(list(prompt) == PROMPT for prompt in prompts)
    arms = dict(zip(ARMS, REWARD, strict=True))
    return [arms.get(response[0], -10.0) for response in responses]  # anything else hardly ever happens


def train(config, out, model=None):
    tokenizer = load_tokenizer(build_tiny("llama", out / "tokenizer"))
    return fit_online(config, model or bandit(), tokenizer, {7: PROMPT, 8: PROMPT}, reward, out)


@pytest.mark.slow
def test_rloo_reaches_the_closed_form_of_a_three_armed_bandit(tmp_path: Path) -> None:
    """pi* = ref exp(r / beta) / Z: 0.182230, 0.807905, 0.009865; its KL is 0.586742 and its mean reward 1.798040."""
    optimum = REFERENCE * np.exp(REWARD / 0.5)
    optimum /= optimum.sum()
    assert optimum == pytest.approx([0.182230, 0.807905, 0.009865], abs=1e-6)
    model = bandit()
    assert distribution(model) == pytest.approx(REFERENCE, abs=1e-6)
    trainer = train(stage("rloo", 100, batch=128), tmp_path, model)
    found = distribution(trainer.model.eval())
    assert found.sum() == pytest.approx(1, abs=1e-4)
    kl = float((found * np.log(found / REFERENCE)).sum())
    print(found, kl)
    assert kl == pytest.approx(0.586742, abs=0.02)
    assert float(found @ REWARD) == pytest.approx(1.798040, abs=0.02)


def test_grpo_prefers_what_is_rewarded(tmp_path: Path) -> None:
    found = distribution(train(stage("grpo", 20, rate=5e-3), tmp_path).model.eval())
    print(found)
    assert found[1] > REFERENCE[1] + 0.1
    assert found[2] < REFERENCE[2] - 0.05


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_training_that_was_cut_off_ends_in_the_same_bytes(algorithm, tmp_path: Path, monkeypatch) -> None:
    config = stage(algorithm, 8, every=3)
    whole = train(config, tmp_path / "whole")
    sampled = online._OwnSampling._sampled

    def die_at_the_sixth(self, prompt_ids):
        if self.state.global_step == 5:
            raise InterruptedError
        return sampled(self, prompt_ids)

    monkeypatch.setattr(online._OwnSampling, "_sampled", die_at_the_sixth)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "cut")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir() if p.is_dir()] == ["checkpoint-3"]
    again = train(config, tmp_path / "cut")
    a, b = (dict(t.model.named_parameters()) for t in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [(tmp_path / run / "log.jsonl").read_bytes() for run in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_batch_of_broken_groups_is_refused(tmp_path: Path) -> None:
    config = stage("rloo", 1).model_copy(update={"settings": OnlineSettings(generations=3)})
    with refused(ConfigError, ("batch_size", "16"), ("generations", "3")):
        train(config, tmp_path)
