"""Only early stopping ends a training for good; a training that was stopped in another way goes on."""

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from madpo import DPO
from madpo.losses import BetaDPO
from madpo.training import checkpoints as disk
from small_trainers import build, reward_trainer

pytestmark = pytest.mark.usefixtures("own_cache")


class TimeLimit(TrainerCallback):
    """Saves and stops, as before the end of a cluster's job."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Evaluations(TrainerCallback):
    """Replaces what an evaluation measures."""

    def __init__(self, losses):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = self.losses[state.global_step - 1]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(weights(a).values(), weights(b).values(), strict=True))
    clock = ("_runtime", "_per_second")
    logs = [[{k: v for k, v in row.items() if not k.endswith(clock)} for row in t.state.log_history] for t in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("loss", [DPO(), BetaDPO(filter=True, keep=0.75)], ids=["dpo", "beta_dpo"])
def test_a_time_limit_is_no_end(llama, tmp_path, loss):
    whole = build(llama, tmp_path / "whole", loss=loss)
    whole.train()
    for step in (2, 3):  # two jobs in a row, each with its limit
        stopped = build(llama, tmp_path / "part", [TimeLimit(step)], loss=loss)
        stopped.train(resume_from_checkpoint=step > 2)
        assert stopped.state.global_step == step
    last = build(llama, tmp_path / "part", loss=loss)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 6
    assert_same(whole, last)


def early(folder, out, *more, **changes):
    losses = Evaluations([3.0, 2.0, 2.5, 2.6, 1.0, 0.5])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    callbacks = [losses, *more, EarlyStoppingCallback(early_stopping_patience=2)]
    return build(folder, out, callbacks, save_steps=1, **settings, **changes)


def test_early_stopping_is_an_end_and_its_patience_survives(llama, tmp_path):
    whole = early(llama, tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 4, "the loss has not fallen at steps 3 and 4"
    again = early(llama, tmp_path / "whole")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    early(llama, tmp_path / "part", TimeLimit(3)).train()
    part = early(llama, tmp_path / "part")
    part.train(resume_from_checkpoint=True)
    assert part.state.global_step == 4, "one evaluation without improvement was before the stop"
    assert_same(whole, part)


def test_a_reward_models_own_patience_is_an_end_and_a_time_limit_is_none(llama, tmp_path):
    def measured(*callbacks):
        trainer = reward_trainer(llama, tmp_path, callbacks)
        trainer.callback_handler.callbacks.insert(0, Evaluations([3.0, 2.0, 2.5, 2.6, 1.0, 0.5]))
        return trainer

    measured(TimeLimit(3)).train()
    for _ in range(2):
        found = measured()
        found.train(resume_from_checkpoint=True)
        assert found.state.global_step == 4
        assert found.best.step == 2
    limited = reward_trainer(llama, tmp_path / "limited", [TimeLimit(1)], patience=9)
    limited.train()
    assert limited.state.global_step == 1, "an evaluation that improves does not take the stop back"
    assert not disk.newest(tmp_path / "limited").json(disk.TRAINING)["stopped"]


def test_a_resume_keeps_the_reference_that_the_training_began_with(llama, tmp_path, monkeypatch):
    """Other threads or another split of a step change the reference's last digits, and a resume must not mix them."""
    whole = build(llama, tmp_path / "whole", save_steps=2)
    whole.train()
    build(llama, tmp_path / "part", [TimeLimit(2)]).train()
    from madpo.training import reference

    real = reference._batch_logps
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(reference, "_batch_logps", lambda *a: [values + 1e-5 for values in real(*a)])
    part = build(llama, tmp_path / "part")
    assert part.train_dataset["ref_chosen_logps"] != whole.train_dataset["ref_chosen_logps"]
    part.train(resume_from_checkpoint=True)
    assert part.train_dataset["ref_chosen_logps"] == whole.train_dataset["ref_chosen_logps"]
    assert part.eval_dataset["ref_rejected_logps"] == whole.eval_dataset["ref_rejected_logps"]
    assert_same(whole, part)
