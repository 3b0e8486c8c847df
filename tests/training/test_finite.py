"""Bad numbers: found before they reach the weights, named by step and pairs, and the last good checkpoint stays."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, SFTConfig

import soak
from guarded_cases import SETTINGS, At, build, pairs
from losses_cases import EVERY_LOSS, for_trainers
from madpo import DPO, MADPO, PreferenceConfig, PreferenceTrainer
from madpo.commands.cli import main
from madpo.core.errors import DataError, DivergedError
from madpo.losses import LossConfig, LossOutput, SoftDPO
from madpo.models.hyperparameters import Optimisation
from madpo.models.load import LoRA, load_tokenizer
from madpo.operations import study_training as stages
from madpo.training import checkpoints as disk
from madpo.training import margins
from madpo.training.nan_guard import SKIPPED, drop_unscored
from madpo.training.reward import RewardModelTrainer
from madpo.training.sft import CompletionSFT
from practice_cases import text_pairs, write
from quick import quick
from refusals import names, refused

HUGE = [1e6 + 1, -3e6, 1e30, -1e30, 2.5, -2.5, 0.0, 1e12]


pytestmark = pytest.mark.usefixtures("own_cache")


def spoil_gradient(model):
    """From now on the gradient of one weight overflows."""
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    spoil_gradient.name = name


def spoil_weight(model):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "down_proj.lora_B" in n).fill_(torch.nan)


def spoil_base(model):
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).fill_(torch.inf)


class RootLoss(LossConfig):
    """Finite at the reference, with a gradient that is not: d sqrt|h| / dh at h = 0."""

    kind: str = "root"
    beta: float = Field(default=0.1)

    def __call__(self, inputs, state=None):
        h = inputs.log_ratio_margin
        return LossOutput((h - h.detach()).abs().sqrt(), {})


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- What stops a training ----


def test_a_finite_loss_with_an_infinite_gradient_stops_before_the_weights_move(llama, tmp_path):
    trainer = build(llama, tmp_path, RootLoss())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with refused(DataError, ("nan", "step 1"), "max_grad_norm") as error:
        trainer.train()
    found = {int(i) for i in re.search(r"pairs \[(.*?)\]", sentence(error))[1].split(",")}
    assert len(found) == 4
    assert found <= set(range(100, 108))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not disk.folders(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "kind", "step"),
    [
        (spoil_gradient, DivergedError, 3),
        (spoil_weight, DivergedError, 2),
        pytest.param(spoil_base, DataError, 3, marks=pytest.mark.slow),
    ],
)
def test_the_last_good_checkpoint_stays_and_continues(llama, tmp_path, spoil, kind, step):
    undisturbed = build(llama, tmp_path / "whole")
    undisturbed.train()
    trainer = build(llama, tmp_path / "run", callback=At(2, spoil), save_total_limit=1)
    with refused(kind, f"step {step}", "base_model.") as error:  # the weight where it begins
        trainer.train()
    assert error.type is kind
    newest = disk.newest(tmp_path / "run")
    # A spoilt weight must not become a checkpoint, and push out the good one.
    assert newest.step == (1 if spoil is spoil_weight else 2)
    names(sentence(error), f"checkpoint-{newest.step}")
    if spoil is not spoil_base:
        again = build(llama, tmp_path / "run")
        again.train(resume_from_checkpoint=True)
        for a, b in zip(undisturbed.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_weights_that_overflow_in_the_last_step_are_no_result(llama, tmp_path):
    trainer = build(llama, tmp_path, learning_rate=3e39, max_steps=1, max_grad_norm=0.0, save_strategy="no")
    with refused(DataError, "step 1"):
        trainer.train()
    saving = build(llama, tmp_path, learning_rate=3e39, max_steps=1, max_grad_norm=0.0)
    with refused(DataError, "step 1"):
        saving.train()
    assert not disk.folders(tmp_path)


def test_an_overflow_in_half_precision_is_found_and_named(llama, tmp_path):
    def overflowing(dtype):
        trainer = build(llama, tmp_path / str(dtype), dtype=dtype, peft=False, max_steps=1, save_strategy="no")
        with torch.no_grad():
            for layer in trainer.model.model.layers:
                layer.mlp.down_proj.weight.mul_(3e5)
                layer.mlp.up_proj.weight.mul_(3e3)
        return trainer

    with refused(DivergedError, ("nan", "step 1"), "float16", "bf16=True"):
        overflowing(torch.float16).train()
    overflowing(torch.bfloat16).train()  # the same numbers where the exponent has room


def test_a_loss_scaler_may_skip_some_steps_and_not_all(llama, tmp_path):
    trainer = build(llama, tmp_path, save_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    infinite = torch.tensor(torch.inf)
    for _ in range(SKIPPED):
        assert trainer._get_grad_norm(trainer.model, grad_norm=infinite) == torch.inf
    assert trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0)) == 1.0
    for _ in range(SKIPPED):
        trainer._get_grad_norm(trainer.model, grad_norm=infinite)
    with refused(DataError, f"{SKIPPED + 1}th"):
        trainer._get_grad_norm(trainer.model, grad_norm=infinite)


def test_a_held_out_loss_that_is_no_number_is_an_error(llama, tmp_path):
    trainer = build(llama, tmp_path, save_strategy="no")
    spoil_weight(trainer.model)
    with refused(DataError, ("nan", "step 0"), "100"):
        trainer.evaluate(pairs())
    other = reward_trainer(llama, tmp_path)
    spoil_weight(other.model)
    with refused(DataError, "nan", "step 0"):
        other.evaluate(sides().remove_columns("pair_id"))


def test_a_reference_that_overflows_is_not_cached(llama, tmp_path):
    data = pairs().remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with refused(DataError, "ref_chosen_logps", "pair 100", "nan"):
        PreferenceTrainer(
            model,
            args=PreferenceConfig(output_dir=str(tmp_path / "run"), **SETTINGS),
            train_dataset=data,
            processing_class=load_tokenizer(llama),
        )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# ---- The other two trainers ----


def sft_trainer(llama, out, **changes):
    arguments = {**SETTINGS, "max_length": None, "activation_checkpointing": False, **changes}
    rows = [{"input_ids": row["chosen_ids"], "labels": row["chosen_ids"]} for row in pairs()]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return CompletionSFT(
        model=model,
        args=SFTConfig(output_dir=str(out), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(llama),
        peft_config=LoRA(rank=4, alpha=8).peft_config("CAUSAL_LM", model),
    )


def sides():
    rows = pairs().select_columns(["pair_id", "chosen_ids", "rejected_ids"])
    return rows.add_column("prompt_length", [0] * len(rows))


def reward_trainer(llama, out, **changes):
    arguments = {**SETTINGS, "max_length": None, "activation_checkpointing": False, **changes}
    tokenizer = load_tokenizer(llama)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    return RewardModelTrainer(
        model,
        RewardConfig(output_dir=str(out), **arguments),
        train_dataset=sides(),
        processing_class=tokenizer,
        peft_config=LoRA(rank=4, alpha=8).peft_config("SEQ_CLS", model),
    )


@pytest.mark.parametrize("spoil", quick([spoil_gradient, spoil_base], spoil_base))
def test_sft_and_reward_model_stop_with_rows_or_pairs(llama, tmp_path, spoil):
    for make, places in (
        (sft_trainer, r"rows \[\d(, \d){3}\]"),
        (reward_trainer, r"pairs \[10\d(, 10\d){3}\]"),
    ):
        trainer = make(llama, tmp_path / make.__name__)
        trainer.add_callback(At(2, spoil))
        with refused(DataError, "step 3", "checkpoint-2") as error:
            trainer.train()
        assert re.search(places, str(error.value))
        assert disk.newest(tmp_path / make.__name__).step == 2


# ---- Extremes that are no mistakes ----


WITH_MARGINS = [n for n, loss in EVERY_LOSS.items() if "reward_margin" in loss.needs]


@pytest.mark.parametrize("name", quick(WITH_MARGINS, "madpo", "odpo", "rpo-sq", "soft_dpo"))
def test_margins_of_any_size_train_or_are_refused_by_pair(llama, tmp_path, name):
    loss = EVERY_LOSS[name]
    trainer = build(llama, tmp_path, loss, pairs(reward_margin=HUGE), save_strategy="no", max_steps=2)
    start = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    place = {"odpo": r"reward_margin.* row \d", "rpo-sq": r"pairs \[10\d", "rpo-fwd": r"pairs \[10\d"}
    if name in place:
        with pytest.raises(DataError, match=place[name]):
            trainer.train()
    else:
        trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(bool(torch.isfinite(p).all()) for p in after)
    if name in ("madpo", "soft_madpo", "soft_dpo"):
        assert any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))


def test_a_margin_beyond_float32_is_refused_by_pair(llama, tmp_path):
    data = pairs(reward_margin=[1.0] * 7 + [1e300])
    trainer = build(llama, tmp_path, MADPO(), data, save_strategy="no", per_device_train_batch_size=8)
    with refused(DataError, "'reward_margin'", "1e+300", "pair 107"):
        trainer.train()


@pytest.mark.parametrize("value", quick([-2.0, 0.0, 3.0, -1e7, 1e7], -2.0, 3.0))
def test_equal_margins_are_dpo_times_a_weight(llama, tmp_path, value):
    """Also all-negative ones: below -tau the weight is 1, the limit of what is far above it is that of 0 to tau."""
    from madpo import margin_weight

    trainer = build(llama, tmp_path, MADPO(), pairs(reward_margin=[value] * 8), save_strategy="no", max_steps=1)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "weight/mean" in row)
    assert row["weight/mean"] == pytest.approx(float(margin_weight(torch.tensor(value), tau=7.0, c_max=4.0)))
    assert row["weight/effective_share"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", for_trainers())
def test_completions_of_one_token(llama, tmp_path, name):
    data = pairs(tokens=(1, 2))
    assert {len(ids) for ids in data["chosen_ids"]} == {1}
    trainer = build(llama, tmp_path, EVERY_LOSS[name], data, save_strategy="no", max_steps=1)
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_pairs_that_truncation_empties_are_left_out_and_told(llama, tmp_path, capsys):
    data = pairs().map(lambda row, i: {"prompt_ids": [7] * (20 if i in (2, 5) else 3)}, with_indices=True)
    trainer = build(llama, tmp_path, DPO(), data, save_strategy="no", max_length=12)
    assert trainer.train_dataset["pair_id"] == [100, 101, 103, 104, 106, 107]
    names(capsys.readouterr().err, ("train", "2 of 8"), "max_length 12")
    trainer.train()
    with refused(DataError, "train", "max_length 3"):
        build(llama, tmp_path, DPO(), data, save_strategy="no", max_length=3)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("limit", [None, 1, 2, 4, 6])
def test_what_is_left_out_or_cut_is_what_the_collator_leaves(llama, capsys, mode, limit):
    from madpo.training.columns import DataCollatorForPreference

    rows = [
        {"prompt_ids": [7] * p, "chosen_ids": [8] * c, "rejected_ids": [9] * r}
        for p in range(6)
        for c in range(4)
        for r in range(3)
        if p + min(c, r)
    ]
    rows += [{**row, "rejected_ids": [*row["chosen_ids"], 9]} for row in rows]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=limit, truncation_mode=mode)(rows)
    scored = (batch["completion_mask"][:, 1:] * batch["attention_mask"][:, 1:]).sum(-1)
    chosen, rejected = scored.chunk(2)
    expected = [row for row, keep in zip(rows, (chosen > 0) & (rejected > 0), strict=True) if keep]
    arguments = PreferenceConfig(output_dir="unused", max_length=limit, truncation_mode=mode, report_to="none")
    if not expected:
        with refused(DataError, f"max_length {limit}"):
            drop_unscored(Dataset.from_list(rows), arguments, "train")
    else:
        assert drop_unscored(Dataset.from_list(rows), arguments, "train").to_list() == expected
    said = capsys.readouterr().err
    longer = [k for k, row in enumerate(rows) if limit and row in expected and max(map(len, sequences(row))) > limit]
    ids = batch["input_ids"].chunk(2)
    same = sum(torch.equal(ids[0][k], ids[1][k]) for k in longer)
    if longer:
        names(said, ("train", f"{len(longer)} of {len(rows)}"), f"max_length {limit}")
    assert ("are equal" in said) == bool(same)
    assert not same or f"of {same} are equal" in said


def sequences(row):
    return [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")]


def test_long_prompts_given_as_text_are_counted_too(llama, tmp_path, capsys):
    rows = [{"prompt": "a" * (40 if k == 1 else 3), "chosen": f" b{k}", "rejected": f" c{k}"} for k in range(4)]
    settings = {**SETTINGS, "save_strategy": "no", "max_steps": 1, "max_length": 12}
    parts = {"processing_class": load_tokenizer(llama), "train_dataset": Dataset.from_list(rows)}
    arguments = PreferenceConfig(output_dir=str(tmp_path), **settings)
    trainer = PreferenceTrainer(AutoModelForCausalLM.from_pretrained(llama), args=arguments, **parts)
    assert trainer.train_dataset["chosen"] == [rows[k]["chosen"] + "</s>" for k in (0, 2, 3)]
    names(capsys.readouterr().err, ("train", "1 of 4"), "max_length 12")


@pytest.mark.parametrize("limit", [None, 4])
def test_a_first_token_has_nothing_that_predicts_it_whatever_the_length(limit):
    rows = [{"prompt_ids": [], "chosen_ids": [8], "rejected_ids": [9, 9]}]
    arguments = PreferenceConfig(output_dir="unused", max_length=limit, report_to="none")
    with refused(DataError, "train") as error:
        drop_unscored(Dataset.from_list(rows), arguments, "train")
    assert "max_length" not in str(error.value), "which would not help"


# ---- The commands and the study ----


MARGINS = {
    "huge": [HUGE[i % 8] for i in range(24)],
    "equal": [1.5] * 24,
    "negative": [-0.1 * (i + 1) for i in range(24)],
    "zero": [0.0] * 24,
}
CASES = quick(MARGINS, "huge")


@pytest.mark.parametrize("case", CASES)
def test_the_commands_with_odd_margins(llama, tmp_path, case, capsys):
    rows = [row | {"reward_margin": m} for row, m in zip(text_pairs(24), MARGINS[case], strict=True)]
    data = write(tmp_path / "pairs.jsonl", rows)
    assert main(["inspect", str(data)]) == 0
    options = ["--args.max_steps", "2", "--args.bf16", "false", "--lora.rank", "2", "--eval_share", "0.2"]
    base = ["--model_name_or_path", str(llama), "--output_dir", str(tmp_path / "P")]
    assert main(["train", str(data), *base, *options]) == 0
    said = capsys.readouterr().out
    assert "nan" not in said
    scored = write(tmp_path / "scored.jsonl", [r | {"a": r["reward_margin"], "b": 0.0} for r in rows])
    words = ["score", str(scored), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "S")]
    assert main(words) == 0
    report = json.loads((tmp_path / "S" / "report.json").read_text())
    assert np.isfinite([report["temperature"], report["log_loss"], report["calibrated_log_loss"]]).all()


def test_a_diverged_command_is_one_sentence_and_keeps_its_checkpoint(llama, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    words = ["train", str(data), "--model_name_or_path", str(llama), "--loss", "dpo", "--output_dir"]
    words += [str(tmp_path / "P"), "--args.bf16", "false", "--dtype", "float32", "--args.save_steps", "1"]
    real = PreferenceTrainer.__init__

    def with_damage(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(At(2, spoil_gradient))

    monkeypatch.setattr(PreferenceTrainer, "__init__", with_damage)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert re.search(r"madpo: .* step 3 .* pairs \[", err)
    names(err, tmp_path / "P")
    assert not (tmp_path / "P" / "record.json").exists()
    assert disk.newest(tmp_path / "P" / "unfinished" / "checkpoints").step == 2
    monkeypatch.setattr(PreferenceTrainer, "__init__", real)
    assert main(words) == 0
    names(capsys.readouterr().err, "step 2")
    assert not (tmp_path / "P" / "unfinished").exists()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    soak.prepare(root)
    return root


@pytest.mark.parametrize("case", CASES)
def test_the_studys_policy_with_odd_margins(study, tmp_path, case):
    table = pd.read_parquet(study / "pairs" / "pairs.parquet")
    values = [MARGINS[case][i % 24] for i in range(len(table))]
    (tmp_path / "margins").mkdir()
    pd.DataFrame({"pair_id": table["pair_id"], "reward_margin": values}).to_parquet(
        tmp_path / "margins" / "margins.parquet"
    )
    inputs = {"pairs": study / "pairs", "reference": study / "base", "logps": study / "logps"}
    optimisation = Optimisation(learning_rate=1e-3, epochs=0.4, batch_size=8, checkpoint_every=0)
    for loss in (MADPO(), SoftDPO(margin_temperature=2.0)):
        out = tmp_path / loss.kind
        out.mkdir()
        config = stages.PolicyStage(method=loss.kind, loss=loss, optimisation=optimisation)
        metrics = stages.train_policy(config, {**inputs, "margins": tmp_path / "margins"}, out)
        assert np.isfinite(list(metrics.values())).all()
    assert np.isfinite([*map(float, np.ravel(list(margins.margin_metrics(np.array(values)).values())[-3:]))]).all()


def test_the_studys_columns_refuse_what_is_no_number(study, tmp_path):
    from madpo.training.reference import refuse_not_finite

    with refused(DataError, "a", "pair 12", "inf"):
        refuse_not_finite({"a": np.array([1.0, np.inf])}, [11, 12])

    class Broken:
        def score_pairs(self, chosen, rejected, prompt_lengths):
            return np.array([np.nan] * len(chosen)), np.zeros(len(rejected))

    with refused(DataError, "reward_margin", "pair 100", "nan"):
        margins.margin_table(Broken(), pd.read_parquet(study / "pairs" / "pairs.parquet"))
