"""The trainer against stock TRL, its columns, its statistics over a step, and what it refuses."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

import trainer_settings
from madpo import DPO, MADPO, PreferenceConfig, PreferenceTrainer
from madpo.core.errors import ConfigError, DataError
from madpo.losses import IPO, BetaDPO, Custom, SimPO
from madpo.models.engine.logprobs import completion_logps
from madpo.models.load import build_tiny, load_tokenizer
from madpo.operations.tuning.heldout import implicit_margins
from madpo.training.columns import DataCollatorForPreference
from madpo.training.digests import weights_digest
from quick import quick
from refusals import refused

QUIET = {
    **trainer_settings.QUIET,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
}


@pytest.fixture(scope="module", params=quick(["gemma3", "llama", "qwen3"], "gemma3"))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build_tiny(family, tmp_path_factory.mktemp("models") / family, seed=1)


pytestmark = pytest.mark.usefixtures("own_cache")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(**changes):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def pairs(count=20, seed=0, **columns):
    """Pairs of token ids of every length, with the columns asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, 200, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": draw(2, 6), "chosen_ids": draw(1, 9), "rejected_ids": draw(1, 9)} for _ in range(count)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Dataset.from_list(rows)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class IdsAsGiven(DPOTrainer):
    """Stock TRL without its tokenisation, so that both trainers see the same ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def trajectory(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def run_ours(folder, out, loss, data, *, peft=True, callback=None, **changes):
    args = PreferenceConfig(output_dir=str(out), **{**QUIET, "learning_rate": 1e-2, "max_steps": 20, **changes})
    trainer = PreferenceTrainer(
        load(folder),
        args=args,
        loss=loss,
        train_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=lora() if peft else None,
        callbacks=[callback] if callback else None,
    )
    return trainer, trajectory(trainer)


def test_dpo_follows_stock_trl_step_for_step(folder, tmp_path):
    data, batch = pairs(), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    theirs = Gradients()
    args = DPOConfig(output_dir=str(tmp_path / "trl"), **{**QUIET, "learning_rate": 1e-2, "max_steps": 20}, **batch)
    stock = IdsAsGiven(
        load(folder),
        args=args,
        train_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=lora(),
        callbacks=[theirs],
    )
    expected = trajectory(stock)
    ours = Gradients()
    _, found = run_ours(folder, tmp_path / "ours", DPO(), data, callback=ours, token_metrics="always", **batch)

    assert ours.first.keys() == theirs.first.keys()
    for name, gradient in theirs.first.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours.first[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert len(found) == len(expected) == 20
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name in ("rewards/margins", "rewards/chosen", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    # Before the first step every margin is 0 but for rounding, whose sign says nothing.
    assert [row["rewards/accuracies"] for row in found[1:]] == [row["rewards/accuracies"] for row in expected[1:]]
    for name in ("num_tokens", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=2e-2, abs=5e-3), name
    # mean residual: a dropped factor would shift every step the same way
    residual = [a["loss"] - b["loss"] for a, b in zip(found, expected, strict=True)]
    assert abs(sum(residual) / len(residual)) < 1e-6


def test_madpo_with_all_margins_at_tau_is_dpo(llama, tmp_path):
    data = pairs(reward_margin=[7.0, -7.0] * 10)
    _, dpo = run_ours(llama, tmp_path, DPO(beta=0.2), data, max_steps=8)
    _, madpo = run_ours(llama, tmp_path, MADPO(beta=0.2, tau=7, c_max=4), data, max_steps=8)
    assert [row["loss"] for row in dpo] == [row["loss"] for row in madpo]
    assert [row["grad_norm"] for row in dpo] == [row["grad_norm"] for row in madpo]


def test_madpo_logs_what_the_weight_does(llama, tmp_path):
    margins = [0.5, 3.0, 9.0, -1.0, -8.0, 0.5, 3.0, 9.0]
    data = pairs(8, reward_margin=margins)
    _, log = run_ours(llama, tmp_path, MADPO(tau=7, c_max=4), data, max_steps=1, per_device_train_batch_size=8)
    weight = [1.413129, 1.049773, 0.966372, 0.069339, 1.0, 1.413129, 1.049773, 0.966372]
    mean = sum(weight) / 8
    assert log[0]["weight/mean"] == pytest.approx(mean, abs=1e-6)
    assert log[0]["weight/effective_share"] == pytest.approx(mean**2 / (sum(w * w for w in weight) / 8), abs=1e-6)
    assert log[0]["margin/negative"] == pytest.approx(2 / 8)
    assert log[0]["weight/amplified"] == pytest.approx(4 / 8)
    assert log[0]["weight/dampened"] == pytest.approx(2 / 8)
    assert log[0]["weight/turned_down"] == pytest.approx(1 / 8)
    assert log[0]["loss"] == pytest.approx(mean * math.log(2), rel=1e-6)


@pytest.mark.parametrize("peft", [True, False])
def test_the_margin_is_exactly_zero_before_the_first_step(llama, tmp_path, peft):
    """The reference columns come from the same weights and the same batches."""
    data = pairs(12)
    trainer, _ = run_ours(llama, tmp_path, DPO(), data, peft=peft, max_steps=1, learning_rate=0.0)
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[i] for i in range(8)])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert float(loss) == pytest.approx(math.log(2), abs=1e-7)
    margins = [float(v[0]) for v in trainer._metrics["eval"]["rewards/margins"]]
    assert margins == [0.0]
    assert trainer.ref_model is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_margin_before_the_first_step_from_other_batches_is_within_rounding(folder, dtype, bound):
    """Columns of other batches differ by padding, and so in the last digits: 0.1 nats in bfloat16, 1e-4 in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    collate = DataCollatorForPreference(pad_token_id=0)
    rows = list(pairs(24, seed=5))

    def margins(size):
        found = []
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size])
            names = ("input_ids", "attention_mask", "completion_mask")
            with torch.no_grad():
                chosen, rejected = completion_logps(model, *(batch[name] for name in names)).logps.chunk(2)
            found.append(chosen - rejected)
        return torch.cat(found)

    assert margins(8).dtype == torch.float32
    assert float((margins(8) - margins(3)).abs().max()) <= bound
    assert float((margins(8) - margins(8)).abs().max()) == 0


def test_reference_columns_are_reused_and_only_where_they_must_be(llama, tmp_path, monkeypatch):
    from madpo.training import reference

    calls = []
    real = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *a, **k: calls.append(1) or real(*a, **k))
    data = pairs(12)
    run_ours(llama, tmp_path / "a", DPO(beta=0.1), data, max_steps=1)
    run_ours(llama, tmp_path / "b", IPO(beta=0.5), data, max_steps=2, learning_rate=1e-3, seed=7)
    assert len(calls) == 1, "beta, loss, learning rate, seed and output folder do not change the reference"
    run_ours(llama, tmp_path / "a", DPO(), pairs(12, seed=1), max_steps=1)
    assert len(calls) == 2, "other tokens do"
    run_ours(llama, tmp_path / "a", DPO(), data, max_steps=1, max_length=6)
    assert len(calls) == 3, "truncation does"
    other = build_tiny("llama", tmp_path / "other", seed=2)
    run_ours(other, tmp_path / "a", DPO(), data, max_steps=1)
    assert len(calls) == 4, "other weights do"


def test_weights_that_deepspeed_keeps_in_parts_have_no_digest(llama):
    model = load(llama)
    weight = model.get_input_embeddings().weight
    whole = weights_digest(model)
    weight.ds_id, weight.ds_numel = 0, weight.numel()  # small parameters stay whole
    assert weights_digest(model) == whole
    weight.data = torch.empty(0)
    with refused(ConfigError, "ZeRO stage 3"):
        weights_digest(model)


def test_text_pairs_are_tokenised_as_trl_does(llama, tmp_path):
    rows = [{"prompt": "The film", "chosen": " was good", "rejected": " was bad"}] * 4
    rows += [{"prompt": "A story", "chosen": " of hope and joy", "rejected": " of"}] * 4
    data = Dataset.from_list(rows)
    args = {"per_device_train_batch_size": 4, "max_steps": 3}
    stock = DPOTrainer(
        load(llama),
        args=DPOConfig(output_dir=str(tmp_path), **QUIET, learning_rate=1e-2, **args),
        train_dataset=data,
        processing_class=load_tokenizer(llama),
        peft_config=lora(),
    )
    expected = trajectory(stock)
    _, found = run_ours(llama, tmp_path, DPO(), data, **args)
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_evaluation_and_a_late_evaluation_set(llama, tmp_path):
    trainer, _ = run_ours(llama, tmp_path, DPO(), pairs(12), max_steps=2)
    metrics = trainer.evaluate(pairs(6, seed=3))
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=0.2)
    assert {"eval_rewards/margins", "eval_logps/chosen"} <= set(metrics)


def build(folder, out, data, *, reference=None, model=None, loss=None, peft=False, **changes):
    return PreferenceTrainer(
        load(folder) if model is None else model,
        reference,
        args=PreferenceConfig(output_dir=str(out), **{**QUIET, "learning_rate": 1e-2, "max_steps": 2, **changes}),
        loss=loss,
        train_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=lora() if peft else None,
    )


@pytest.mark.parametrize("peft", [True, False])
def test_a_late_set_is_compared_with_the_reference_that_was_given(llama, tmp_path, peft):
    given = load(build_tiny("llama", tmp_path / "other", seed=2))
    trainer = build(llama, tmp_path, pairs(12), reference=given, loss=DPO(beta=0.5), peft=peft)
    trainer.train()
    late = pairs(6, seed=3)
    found = trainer.evaluate(late)["eval_loss"]
    batch = DataCollatorForPreference(pad_token_id=0)(list(late))
    rows = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]

    @torch.no_grad()
    def loss(reference):
        ratios = [completion_logps(model.eval(), *rows).logps for model in (trainer.model, reference)]
        chosen, rejected = (ratios[0] - ratios[1]).chunk(2)
        return float(-torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean())

    assert found == pytest.approx(loss(given), rel=1e-5)
    assert abs(loss(given) - loss(load(llama))) > 1e-3
    assert trainer.evaluate({"a": late})["eval_a_loss"] == pytest.approx(found, rel=1e-6)


def test_a_late_set_without_its_reference_is_refused_in_true_words(llama, tmp_path, monkeypatch):
    late = pairs(6, seed=3)
    trainer = build(llama, tmp_path, pairs(12))
    trainer.train()
    with refused(DataError, "eval", "ref_chosen_logps"):
        trainer.evaluate(late)
    scored = pairs(6, seed=3, ref_chosen_logps=[-9.0] * 6, ref_rejected_logps=[-9.0] * 6)
    assert math.isfinite(trainer.evaluate(scored)["eval_loss"])

    monkeypatch.setattr(PreferenceTrainer, "sharded", True)
    trainer = build(llama, tmp_path, pairs(12), reference=load(llama))
    with refused(DataError, "ref_model"):
        trainer.evaluate(late)


def test_streams_pass_where_no_reference_is_to_be_computed(llama, tmp_path):
    reference = {"ref_chosen_logps": [-9.0] * 8, "ref_rejected_logps": [-8.0] * 8}
    for loss, columns in ((DPO(), reference), (SimPO(), {})):
        whole = pairs(8, **columns)
        expected = trajectory(build(llama, tmp_path, whole, loss=loss))
        rows = list(whole)
        for stream in (whole.to_iterable_dataset(), IterableDataset.from_generator(lambda rows=rows: iter(rows))):
            found = trajectory(build(llama, tmp_path, stream, loss=loss))
            assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_a_mixture_of_experts_is_trained_without_its_load_balancing_loss_and_says_so(llama, tmp_path, capsys):
    def experts():
        torch.manual_seed(0)
        sizes = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads))

    data = pairs(8)
    with refused(ConfigError, "router_aux_loss_coef", "0.01"):
        build(llama, tmp_path, data, model=experts(), router_aux_loss_coef=0.01)
    build(llama, tmp_path, data, model=experts())
    found = trajectory(build(llama, tmp_path, data, model=experts(), max_grad_norm=1e9))
    assert capsys.readouterr().err.count("load-balancing loss (router_aux_loss_coef 0.001") == 1
    stock = IdsAsGiven(
        experts(),
        args=DPOConfig(
            output_dir=str(tmp_path),
            router_aux_loss_coef=0.0,
            precompute_ref_log_probs=True,
            **{**QUIET, "learning_rate": 1e-2, "max_steps": 2, "max_grad_norm": 1e9},
        ),
        train_dataset=data,
        processing_class=load_tokenizer(llama),
    )
    for ours, theirs in zip(found, trajectory(stock), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    capsys.readouterr()
    build(llama, tmp_path, data, model=experts(), router_aux_loss_coef=0.0)
    assert "load-balancing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "loss",
    [IPO(beta=0.5, reduction="mean"), Custom(target="madpo.losses:SimPO", parameters={"beta": 3.0})],
    ids=lambda loss: loss.kind,
)
def test_logged_margins_are_those_that_a_search_measures(llama, tmp_path, loss):
    trainer = build(llama, tmp_path, pairs(8), loss=loss, peft=True)
    trainer.train()
    late = pairs(6, seed=3, ref_chosen_logps=[-20.0 - i for i in range(6)], ref_rejected_logps=[-24.0] * 6)
    expected = implicit_margins(trainer, list(late))
    trainer.evaluate(late)
    found = next(row for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    assert found["eval_rewards/margins"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["eval_rewards/accuracies"] == pytest.approx((expected > 0).mean())


def test_evaluation_leaves_running_statistics_unchanged(llama, tmp_path):
    trainer, _ = run_ours(llama, tmp_path, BetaDPO(), pairs(16), max_steps=3)
    before = {name: value.clone() for name, value in trainer.loss_state.tensors.items()}
    trainer.evaluate(pairs(6, seed=3))
    assert all(torch.equal(before[name], value) for name, value in trainer.loss_state.tensors.items())


@pytest.mark.parametrize("loss", [DPO(), BetaDPO()], ids=lambda loss: loss.kind)
def test_resuming_gives_the_same_bytes(llama, tmp_path, loss):
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    data = pairs(16)
    whole, _ = run_ours(llama, tmp_path / "whole", loss, data, **settings)
    part = PreferenceTrainer(
        load(llama),
        args=PreferenceConfig(output_dir=str(tmp_path / "part"), **{**QUIET, "learning_rate": 1e-2, **settings}),
        loss=loss,
        train_dataset=data,
        processing_class=load_tokenizer(llama),
        peft_config=lora(),
    )
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), part.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lora_dropout_stays_as_written_and_the_models_own_is_off(llama, tmp_path):
    trainer = PreferenceTrainer(
        load(llama),
        args=PreferenceConfig(output_dir=str(tmp_path), **QUIET),
        train_dataset=pairs(4),
        processing_class=load_tokenizer(llama),
        peft_config=lora(lora_dropout=0.25),
    )
    rates = {m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in n}
    assert rates == {0.25}


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("beta", 0.5, "MADPO(beta="),
        ("loss_type", ["ipo"], "loss=..."),
        ("label_smoothing", 0.1, "DPO(label_smoothing="),
        ("loss_weights", [1.0], "Combined(parts="),
        ("use_weighting", True, "loss=WPO("),
        ("ld_alpha", 0.5, "madpo.losses.Custom"),
        ("f_divergence_type", "forward_kl", "madpo.losses.Custom"),
    ],
)
def test_options_of_trls_loss_are_refused(llama, tmp_path, option, value, remedy):
    args = DPOConfig(output_dir=str(tmp_path), **QUIET, **{option: value})
    with refused(ConfigError, option, remedy):
        PreferenceTrainer(
            load(llama), args=args, loss=DPO(), train_dataset=pairs(4), processing_class=load_tokenizer(llama)
        )


def test_missing_columns_are_refused_by_name(llama, tmp_path):
    with refused(DataError, "train_dataset", "'reward_margin'", "madpo score"):
        build(llama, tmp_path, pairs(4).to_iterable_dataset(), loss=MADPO(tau=7, c_max=4), max_steps=1)


def test_a_loss_that_is_not_finite_stops_with_the_pairs(llama, tmp_path):
    data = pairs(
        8, ref_chosen_logps=[-5.0] * 7 + [float("inf")], ref_rejected_logps=[-5.0] * 8, pair_id=range(100, 108)
    )
    with refused(DataError, ("step 1", "[107]")):
        run_ours(llama, tmp_path, DPO(), data, max_steps=1, per_device_train_batch_size=8)


def test_the_seam_with_trl_is_where_we_expect_it():
    """Names of TRL that the trainer overrides or calls; a new TRL that lacks one must fail here, not in a run."""
    for name in (
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
        "_precompute_ref_logps",
        "compute_loss",
        "prediction_step",
        "log",
        "_save_checkpoint",
        "_send_telemetry",
        "_get_num_items_in_batch",
        "get_batch_samples",
        "_load_optimizer_and_scheduler",
    ):
        assert callable(getattr(DPOTrainer, name)), name
    assert hasattr(DPOTrainer, "loss_is_scaled_for_ga")


def test_log_rows_are_plain_json(llama, tmp_path):
    trainer, _ = run_ours(llama, tmp_path, MADPO(), pairs(8, reward_margin=[1.0] * 8), max_steps=2)
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("loss", ["madpo", MADPO])
def test_a_loss_is_an_object(loss):
    with refused(ConfigError, "loss", "MADPO(beta=0.1)"):
        PreferenceTrainer("nowhere", loss=loss)
