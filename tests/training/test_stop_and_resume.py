"""Only early stopping ends a training for good; a training that was stopped in another way goes on."""

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from madpo import DPO, MADPO
from madpo.core.errors import ConfigError, DataError
from madpo.losses import BetaDPO
from madpo.training import checkpoints as disk
from madpo.training import digests
from quick import quick
from refusals import names, refused
from small_trainers import build, pairs, reward_trainer, weights

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


def assert_same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(weights(a).values(), weights(b).values(), strict=True))
    clock = ("_runtime", "_per_second")
    logs = [[{k: v for k, v in row.items() if not k.endswith(clock)} for row in t.state.log_history] for t in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "loss", quick([DPO(), BetaDPO(filter=True, keep=0.75)], BetaDPO(filter=True, keep=0.75)), ids=["dpo", "beta_dpo"]
)
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


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_training_that_ends_inside_an_epoch_takes_no_step_more(llama, tmp_path, steps):
    """As where the disk is full when its result is written. An epoch has three steps."""
    whole = build(llama, tmp_path, save_steps=1, max_steps=steps)
    whole.train()
    again = build(llama, tmp_path, save_steps=1, max_steps=steps)
    again.train(resume_from_checkpoint=True)
    assert whole.state.global_step == again.state.global_step == steps
    assert_same(whole, again)


def test_a_reward_model_that_ends_inside_an_epoch_takes_no_step_more(llama, tmp_path):
    trainers = [reward_trainer(llama, tmp_path) for _ in range(2)]
    for trainer in trainers:
        trainer.args.max_steps = 1
        trainer.train(resume_from_checkpoint=trainer is not trainers[0])
        assert trainer.take_best() == trainer.state.global_step == 1
    assert_same(*trainers)


def test_a_resume_keeps_the_reference_that_the_training_began_with(llama, tmp_path, monkeypatch):
    """Other threads or another split of a step change the reference's last digits, and a resume must not mix them."""
    whole = build(llama, tmp_path / "whole", save_steps=2)
    whole.train()
    build(llama, tmp_path / "part", [TimeLimit(2)]).train()
    from madpo.training import reference

    real = reference.batch_logps
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(reference, "batch_logps", lambda *a: [values + 1e-5 for values in real(*a)])
    part = build(llama, tmp_path / "part")
    assert part.train_dataset["ref_chosen_logps"] != whole.train_dataset["ref_chosen_logps"]
    part.train(resume_from_checkpoint=True)
    assert part.train_dataset["ref_chosen_logps"] == whole.train_dataset["ref_chosen_logps"]
    assert part.eval_dataset["ref_rejected_logps"] == whole.eval_dataset["ref_rejected_logps"]
    assert_same(whole, part)


def test_a_resume_keeps_the_margins_that_the_training_began_with(llama, tmp_path, monkeypatch):
    from madpo.training import reference_columns

    whole = build(llama, tmp_path / "whole", loss=MADPO(), save_steps=2)
    whole.train()
    build(llama, tmp_path / "part", [TimeLimit(2)], loss=MADPO()).train()
    real = reference_columns.fit_probe

    def others(chosen, rejected, prompts, **named):
        return real(np.array(chosen)[:, ::2], np.array(rejected)[:, ::2], prompts, **named)

    monkeypatch.setattr(reference_columns, "fit_probe", others)
    part = build(llama, tmp_path / "part", loss=MADPO(), eval_dataset=None)
    assert part.train_dataset["reward_margin"] != whole.train_dataset["reward_margin"]
    part.train(resume_from_checkpoint=True)
    assert part.train_dataset["reward_margin"] == whole.train_dataset["reward_margin"]
    assert_same(whole, part)


def test_a_training_is_continued_for_longer_as_in_trl(llama, tmp_path, monkeypatch):
    """Steps 4 to 6 under the schedule of six, after a training of four: the same losses as TRL's."""
    said = []
    monkeypatch.setattr(digests, "say", said.append)
    found = {}
    for stock in (True, False):
        out = tmp_path / str(stock)
        settings = {"stock": stock, "lora_dropout": 0.0, "lr_scheduler_type": "linear", "save_steps": 4}
        build(llama, out, max_steps=4, **settings).train()
        longer = build(llama, out, max_steps=7, **settings)
        longer.train(resume_from_checkpoint=True)
        assert longer.state.global_step == 7
        found[stock] = [(row["loss"], row["learning_rate"]) for row in longer.state.log_history if "loss" in row]
    assert len(found[True]) == 7
    for theirs, ours in zip(found[True], found[False], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    names("\n".join(said), ("max_steps", "4", "7"))


def test_evaluation_can_be_switched_on_by_a_resume(llama, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(digests, "say", said.append)
    build(llama, tmp_path, save_steps=3, max_steps=3, lr_scheduler_type="constant").train()
    more = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant"}
    again = build(llama, tmp_path, eval_dataset=pairs(6, seed=5), **more)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in again.state.log_history if "eval_loss" in row] == [4, 5, 6]
    assert len(said) == 1
    names(said[0], ("eval_strategy", "no", "steps"), "evaluation data")
    with refused(DataError, ("configuration.learning_rate", "0.01", "0.02")):
        build(llama, tmp_path, learning_rate=0.02, **more).train(resume_from_checkpoint=True)


def test_a_stage_is_not_continued_otherwise(llama, tmp_path):
    build(llama, tmp_path, save_steps=3, max_steps=3).train()
    stage = build(llama, tmp_path, max_steps=6)
    stage.stage_settings = {}
    with refused(DataError, "checkpoint-3"):
        stage.train(resume_from_checkpoint=True)


def test_workers_do_not_persist(llama, tmp_path, capsys):
    """Persistent ones draw a random number less per epoch, but not in the epoch after a resume: dropout differed."""
    trainer = build(llama, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert not trainer.get_train_dataloader().persistent_workers
    assert "dataloader_persistent_workers" in capsys.readouterr().err


def test_a_batch_is_not_halved_in_a_training(llama, tmp_path):
    with refused(ConfigError, "auto_find_batch_size=True", "per_device_train_batch_size"):
        build(llama, tmp_path, auto_find_batch_size=True)


class Resizes(TrainerCallback):
    """Gives the model more rows once its training has begun."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 8)


def test_a_callback_does_not_resize_the_model(llama, tmp_path):
    trainer = build(llama, tmp_path, [Resizes()])
    rows = trainer.model.get_input_embeddings().num_embeddings
    with refused(ConfigError, (str(rows), str(rows + 8)), "resize_token_embeddings"):
        trainer.train()
    assert trainer.state.global_step == 0
