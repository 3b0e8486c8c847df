"""Dropout of the model and of its adapter in real trainings, and NEFTune's noise."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.integrations.neftune import activate_neftune
from trl import RewardConfig

import trainer_settings
from engine_cases import PAIRS, build, pair_batch
from families import tiny
from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.models.engine.logprobs import completion_logps
from madpo.models.load import load_tokenizer
from madpo.models.modes import without_own_noise
from madpo.training.reward import RewardModelTrainer
from quick import quick
from small_trainers import pairs

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore")]
BY_NUMBER = {"opt": "v_proj", "seed_oss": "v_proj", "granite": "v_proj", "biogpt": "v_proj", "xglm": "v_proj"}
"""Families that apply dropout as a function with a number, and a layer to adapt."""
LOG_2 = pytest.approx([math.log(2)] * 3, abs=1e-6)


def losses(family, layer, llama, out, **changes):
    """Losses of three steps that change nothing, with every dropout of the model at 0.3."""
    settings = {"learning_rate": 1e-12, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", **changes}
    args = PreferenceConfig(output_dir=str(out), **{**trainer_settings.QUIET, **settings})
    trainer = PreferenceTrainer(
        tiny(family, noise=0.3, loud=3),
        args=args,
        loss=DPO(),
        train_dataset=pairs(20, seed=1).map(lambda row: {name: [i % 60 + 4 for i in ids] for name, ids in row.items()}),
        processing_class=load_tokenizer(llama),
        peft_config=LoraConfig(r=2, target_modules=[layer], lora_dropout=0.5, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("family", quick(BY_NUMBER, "opt", "granite"))
def test_every_loss_is_log_2_until_something_is_learned(family, llama, tmp_path):
    assert losses(family, BY_NUMBER[family], llama, tmp_path) == LOG_2


@pytest.mark.parametrize(("family", "layer"), [("opt", "v_proj"), ("gpt2", "c_attn")])
@pytest.mark.parametrize("checkpointing", quick([False, True], True))
def test_false_leaves_the_models_dropout_on_and_none_or_true_do_not(family, layer, checkpointing, llama, tmp_path):
    """Dropout as a function, and as modules."""
    for given in (None, True, False):
        found = losses(family, layer, llama, tmp_path, disable_dropout=given, activation_checkpointing=checkpointing)
        assert (found == LOG_2) == (given is not False), (given, found)


def test_the_adapters_dropout_stays():
    model = get_peft_model(build("llama").float(), LoraConfig(target_modules=["v_proj"], lora_dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    rows = pair_batch(PAIRS, "right")

    def twice():
        with without_own_noise(model.get_base_model()):
            return [completion_logps(model, **rows, pairs=True).logps for _ in range(2)]

    first, second = twice()
    assert not first.equal(second)
    assert all(module.training for module in model.modules())
    model.eval()
    first, second = twice()
    assert first.equal(second)
    assert not any(module.training for module in model.modules())


class Unpacked(nn.Linear):
    """As of a quantisation library: without a gradient in evaluation."""

    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x.detach())


def test_layers_of_other_libraries_keep_their_mode():
    model = build("llama").float().train()
    for layer in model.model.layers:
        old = layer.mlp.down_proj
        layer.mlp.down_proj = Unpacked(old.in_features, old.out_features, bias=False)
        layer.mlp.down_proj.weight = old.weight
    rows = pair_batch(PAIRS, "right")
    gate = model.model.layers[0].mlp.gate_proj.weight
    with without_own_noise(model):
        logps = completion_logps(model, **rows, pairs=True).logps
    assert float(torch.autograd.grad(logps.sum(), gate)[0].norm()) > 0


@pytest.mark.parametrize("packed", [True, False])
def test_the_noise_of_neftune_has_the_size_that_padded_rows_give_it(packed):
    model = build("llama").float().train()
    rows = pair_batch(PAIRS, "right")
    embedding, noise = model.get_input_embeddings(), []
    handle = activate_neftune(model, 5.0)
    embedding.register_forward_hook(
        lambda module, inputs, output: noise.append((output - module.weight[inputs[0]]).detach())
    )
    for _ in range(20):
        with without_own_noise(model):
            completion_logps(model, **rows, pairs=packed)
    assert embedding.neftune_noise_alpha == 5.0
    handle.remove()
    bound = 5.0 / math.sqrt(rows["input_ids"].shape[1] * embedding.embedding_dim)
    drawn = torch.cat([n.flatten() for n in noise if n.any()])
    assert (noise[-1].shape[0] == 1) == packed
    assert 0.99 * bound < float(drawn.abs().max()) <= bound + 1e-6
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("given", [None, True, False])
def test_a_reward_model_trains_without_the_models_dropout(given, llama, tmp_path):
    """Three steps over the same pairs that change nothing."""
    model = tiny("opt", auto=AutoModelForSequenceClassification, noise=0.3, loud=3, num_labels=1)
    draw = np.random.default_rng(0)
    rows = {
        "pair_id": list(range(4)),
        "prompt_length": [3] * 4,
        **{side: draw.integers(4, 60, (4, 9)).tolist() for side in ("chosen_ids", "rejected_ids")},
    }
    settings = {"learning_rate": 1e-12, "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    args = RewardConfig(
        output_dir=str(tmp_path),
        max_length=None,
        disable_dropout=given,
        per_device_train_batch_size=4,
        **{**trainer_settings.QUIET, **settings},
    )
    adapter = LoraConfig(r=2, target_modules=["v_proj"], task_type="SEQ_CLS")
    trainer = RewardModelTrainer(
        model,
        args,
        processing_class=load_tokenizer(llama),
        train_dataset=Dataset.from_dict(rows),
        peft_config=adapter,
    )
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == 3
    assert (max(found) - min(found) < 1e-5) == (given is not False)
