"""A training that leaves its policy where it was says so, and an adapter has a learning rate that moves it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from madpo import DPO, PreferenceConfig
from madpo.losses import LossInputs, SimPO
from madpo.operations import TrainSettings, train
from madpo.training.metrics import Movement
from practice_cases import write
from refusals import names
from small_trainers import build, reward_trainer

pytestmark = pytest.mark.usefixtures("own_cache")
REMEDY = "learning_rate"


def stepped(margins, beta=0.1, needs_reference=True):
    """What Movement says of a training in which step i has pairs with these log-ratio margins, nats."""
    state = SimpleNamespace(global_step=0, max_steps=len(margins))
    loss = SimpleNamespace(beta=beta, needs_reference=needs_reference)
    trainer = SimpleNamespace(state=state, loss=loss, model=None, accelerator=Accelerator(cpu=True))
    movement = Movement(trainer)
    movement.on_train_begin(None, state, None)
    for step, values in enumerate(margins):
        state.global_step = step
        chosen = torch.tensor(values)
        zero, ones = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.int64)
        movement.note(LossInputs(chosen, zero, zero, zero, ones, ones), torch.ones_like(chosen, dtype=torch.bool))
    movement.on_train_end(SimpleNamespace(learning_rate=2e-6), state, None)


@pytest.mark.parametrize(
    ("margins", "moved_little"),
    [
        ([[0.0, 0.0], *([[0.02, -0.04]] * 19)], True),  # pairs do not cancel
        ([[0.0, 0.0], [0.4, 0.3], *([[0.5, -0.3]] * 18)], True),  # rounding
        ([[0.0, 0.0], [0.01, 0.01], *([[1.3, -1.1]] * 18)], False),
        ([[0.0, 0.0], [2.0, 2.0], *([[2.0, -2.0]] * 18)], False),  # it moved at once
        ([[0.0, 0.0]], False),  # one step sees no other policy than the first
    ],
)
def test_the_statistic_is_the_mean_size_of_the_scaled_margins_of_the_last_steps(margins, moved_little, capsys):
    stepped(margins)
    err = capsys.readouterr().err
    assert (REMEDY in err) == moved_little
    if moved_little:
        last = sum(abs(m) for step in margins[-2:] for m in step) / 4 * 0.1
        names(err, (f"{last:.2g}", "4 pairs"), (REMEDY, "2e-06"))


def test_a_loss_without_a_reference_is_not_judged(capsys):
    stepped([[0.0]] * 20, needs_reference=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_a_trainer_says_that_its_policy_hardly_moved(llama, tmp_path, capsys, rate):
    build(llama, tmp_path, max_steps=10, learning_rate=rate, bf16=False).train()
    err = capsys.readouterr().err
    assert (REMEDY in err) == (rate == 1e-6)
    if rate == 1e-6:
        names(err, (REMEDY, "1e-06"), "1e-4")


def test_losses_without_a_reference_and_reward_models_say_nothing(llama, tmp_path, capsys):
    build(llama, tmp_path / "policy", loss=SimPO(), max_steps=10, learning_rate=1e-6).train()
    trainer = reward_trainer(llama, tmp_path / "reward")
    trainer.train()
    assert REMEDY not in capsys.readouterr().err


def test_adapters_have_a_default_learning_rate_of_their_own(llama, tmp_path):
    base = {"model": str(llama), "loss": DPO()}
    adapter, full = TrainSettings(**base).arguments(), TrainSettings(**base, full=True).arguments()
    assert 2e-5 <= adapter["learning_rate"] <= 1e-4
    assert full["learning_rate"] == PreferenceConfig(output_dir=str(tmp_path)).learning_rate == 1e-6, "TRL's"
    assert TrainSettings(**base, args={"learning_rate": 3e-4}).arguments()["learning_rate"] == 3e-4

    rows = [{"prompt": f"Film {i}", "chosen": " is good.", "rejected": " is bad."} for i in range(4)]
    write(tmp_path / "pairs.jsonl", rows)
    report = train(tmp_path / "pairs.jsonl", tmp_path / "out", TrainSettings(**base, args={"max_steps": 2}))
    assert report.learning_rate == adapter["learning_rate"]
    rate = adapter["learning_rate"]
    assert f"learning_rate = {rate}" in (tmp_path / "out" / "config.toml").read_text()
    names((tmp_path / "out" / "README.md").read_text(), f"{rate:g}")
