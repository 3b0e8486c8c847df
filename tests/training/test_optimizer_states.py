"""Checkpoints of optimizers with states of any nesting; what no checkpoint can hold is refused at the first step."""

import json

import pytest
import torch
from safetensors.torch import load_file

from madpo.core.errors import ConfigError
from madpo.training import checkpoints as disk
from madpo.training.states import pack, unpack
from quick import quick
from refusals import refused
from small_trainers import build

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_nested_state_is_put_together_again_exactly(tmp_path):
    table = torch.linspace(-1, 1, 7)
    state = {
        "state": {
            0: {
                "step": 3,
                "quantised": {"q": torch.arange(5, dtype=torch.uint8), "table": table, "absmax": (0.5, None)},
            },
            1: {"step": 4, "quantised": {"q": torch.zeros(0, dtype=torch.uint8), "table": table}, "a.b": [True, "x"]},
        },
        "param_groups": [{"params": [0, 1], "betas": (0.9, float("inf")), "view": torch.arange(6.0)[2:4]}],
    }
    tensors, values = pack(state, "optimizer")
    disk.save_tensors(tensors, tmp_path / "o.safetensors")
    found = unpack(json.loads(json.dumps(values)), load_file(tmp_path / "o.safetensors"))
    assert sum("table" in name for name in tensors) == 1, "a table that parameters share is kept once"
    flat, expected = (pack(one, "optimizer") for one in (found, state))
    assert flat[1] == expected[1]
    assert all(
        torch.equal(flat[0][name], tensor) and flat[0][name].dtype == tensor.dtype
        for name, tensor in expected[0].items()
    )
    assert found["param_groups"][0]["betas"] == (0.9, float("inf"))


@pytest.mark.parametrize("bad", [object(), {3.5: 1}, torch.ones(2).to_sparse()], ids=["object", "key", "sparse"])
def test_an_object_is_refused_by_its_place(bad):
    if isinstance(bad, torch.Tensor):
        bad = torch.nn.UninitializedParameter()
    with refused(ConfigError, "state.0.odd"):
        pack({"state": {0: {"odd": bad}}}, "optimizer")


class Strange(torch.optim.SGD):
    """Keeps an object in its state, as optimizers with tensor subclasses do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["moments"] = object()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_state_that_cannot_be_kept_is_refused_after_one_step(llama, tmp_path, strategy):
    trainer = build(llama, tmp_path, save_strategy=strategy, save_steps=500)
    trainer.optimizer = Strange([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    if strategy == "no":
        trainer.train()
        assert trainer.state.global_step == 6
        return
    with refused(ConfigError, "state.0.moments", "adamw_torch", "save_strategy='no'"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert not disk.folders(tmp_path)


OPTIMISERS = ("adafactor", "sgd", "rmsprop", "adamw_8bit", "lion_8bit", "paged_adamw_8bit")


@pytest.mark.parametrize("optim", quick(OPTIMISERS, "adafactor"))
def test_optimizers_resume_to_the_same_bytes(llama, tmp_path, optim):
    if optim.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    whole = build(llama, tmp_path / "whole", optim=optim, save_steps=3, lora_rank=128)
    whole.train()
    part = build(llama, tmp_path / "part", optim=optim, save_steps=3, lora_rank=128)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    last = [tmp_path / run / "checkpoint-6" for run in ("whole", "part")]
    for name in (disk.OPTIMIZER, disk.WEIGHTS):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    if optim == "adamw_8bit":
        assert any(tensor.dtype == torch.uint8 for tensor in load_file(last[0] / disk.OPTIMIZER).values())
