"""The trainer where scripts for TRL's DPOTrainer expect it: arguments, columns, collators, metrics, cards, refusals."""

import copy
import inspect
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from losses_cases import EVERY_LOSS
from madpo import DPO, MADPO, PreferenceConfig, PreferenceTrainer
from madpo.core.errors import ConfigError, DataError
from madpo.losses import BCO, IPO, RDPO, WPO, Combined, Custom
from madpo.models.load import load_tokenizer
from madpo.training import columns as trainer_columns
from madpo.training.padding_pairs import refuse_uneven
from madpo.training.refusals import loss_of
from quick import quick
from refusals import names, refused
from small_trainers import SETTINGS, pairs
from trainer_settings import QUIET

pytestmark = pytest.mark.usefixtures("own_cache")

PLAIN = {**SETTINGS, "save_strategy": "no", "max_steps": 3, "gradient_checkpointing": False}


class IdsAsGiven(DPOTrainer):
    """Stock TRL without its tokenisation, so that both trainers see the same ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora():
    torch.manual_seed(0)
    return LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def build(folder, out, data=None, *, stock=False, model=None, **more):
    config = DPOConfig if stock else PreferenceConfig
    adapter = more.pop("peft_config", None if model is not None else lora())
    own = {
        name: more.pop(name)
        for name in ("loss", "data_collator", "callbacks", "eval_dataset", "ref_model")
        if name in more
    }
    return (IdsAsGiven if stock else PreferenceTrainer)(
        load(folder) if model is None else model,
        args=config(output_dir=str(out), **{**PLAIN, **more}),
        train_dataset=pairs() if data is None else data,
        processing_class=load_tokenizer(folder),
        peft_config=adapter,
        **own,
    )


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(trainer_columns, "say_once", lines.append)
    return lines


# ---- Arguments ----


def test_arguments_stand_where_trl_has_them(llama, tmp_path):
    own, theirs = (list(inspect.signature(c.__init__).parameters) for c in (PreferenceTrainer, DPOTrainer))
    assert own == [*theirs, "loss"]
    args = PreferenceConfig(output_dir=str(tmp_path), **PLAIN)
    trainer = PreferenceTrainer(load(llama), None, args, None, pairs(), None, load_tokenizer(llama))
    expected = losses(build(llama, tmp_path, model=load(llama)))
    assert losses(trainer) == expected


@pytest.mark.parametrize(("loss", "name"), [(None, "DPO"), (MADPO(tau=2, c_max=4), "MADPO")])
def test_the_default_folder_is_named_as_in_trl(llama, tmp_path, monkeypatch, loss, name):
    monkeypatch.chdir(tmp_path)
    data = pairs().add_column("reward_margin", [1.0] * 16)
    for model in (str(llama), load(llama)):
        trainer = PreferenceTrainer(model, train_dataset=data, processing_class=load_tokenizer(llama), loss=loss)
        assert trainer.args.output_dir == f"llama-{name}"


# ---- Columns ----


def test_columns_that_no_loss_reads_change_nothing(llama, tmp_path, said):
    plain = losses(build(llama, tmp_path))
    text = [f"row-{i}" for i in range(16)]
    extra = {
        "pair_id": [text, [None, *text[1:]]],
        "weight": [["high"] * 16, [0.5] * 16],
        "margin": [text],
        "reward_margin": [[None] * 16, text],
    }
    for name, values in extra.items():
        for column in values:
            assert losses(build(llama, tmp_path, pairs().add_column(name, column))) == plain, (name, column[0])
    assert len(said) == len(extra["weight"])
    for line in said:
        names(line, "'weight'", "pair_weights=True", "pair_weights=False")


def test_a_pairs_weight_multiplies_its_loss_where_it_is_asked_for(llama, tmp_path, said):
    batch = {"per_device_train_batch_size": 4, "max_steps": 1, "pair_weights": True}
    assert losses(build(llama, tmp_path, pairs(4).add_column("weight", [3.0, 1.0, 0.0, 2.0]), **batch)) == [
        pytest.approx(1.5 * math.log(2), rel=1e-6)
    ]
    assert losses(build(llama, tmp_path, pairs(4).add_column("weight", [0.5] * 4), **{**batch, "pair_weights": False}))
    assert not said
    with refused(DataError, "train_dataset", "'weight'"):
        build(llama, tmp_path, pairs(4), **batch)
    for value, shown in (("high", "'high'"), (None, ""), (math.inf, "inf"), (1e39, r"(inf|1e\+39)"), (-0.5, "-0.5")):
        data = pairs(4).add_column("pair_id", list("abcd")).add_column("weight", [value] * 4)
        with pytest.raises(DataError, match=rf"'weight' .*{shown}.* pair [abcd]\b"):
            build(llama, tmp_path, data, **batch).train()


def test_a_margin_is_refused_only_by_a_loss_that_reads_one(llama, tmp_path):
    data = pairs().add_column("margin", [1.0] * 16)
    with refused(DataError, "'margin'", "'reward_margin'"):
        build(llama, tmp_path, data, loss=MADPO(tau=2, c_max=4))
    both = data.add_column("reward_margin", [1.0] * 16)
    assert losses(build(llama, tmp_path, both, loss=MADPO(tau=2, c_max=4), max_steps=1))
    rows = list(data)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with refused(DataError, "'margin'", "'reward_margin'"):
        build(llama, tmp_path, stream, loss=MADPO(tau=2, c_max=4))


def test_a_bad_number_names_its_pairs_by_text(llama, tmp_path):
    data = pairs(4).add_column("pair_id", ["a", "b", "c", "d"])
    data = data.add_column("ref_chosen_logps", [math.nan, -9.0, -9.0, -9.0]).add_column(
        "ref_rejected_logps", [-9.0] * 4
    )
    with refused(DataError, "[a]"):
        build(llama, tmp_path, data).train()


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", "hidden", "stream"])
def test_the_format_of_a_data_set_changes_nothing(llama, tmp_path, kind):
    """Padded to 8, as tensors: prompt and completion of equal lengths were added number by number."""
    data = equal_lengths(8).add_column("reward_margin", [1.0, -0.5] * 4)
    settings = {"loss": MADPO(tau=2, c_max=4), "pad_to_multiple_of": 8, "train_sampling_strategy": "sequential"}
    expected = losses(build(llama, tmp_path, data, **settings))
    shown = data.with_format("torch" if kind in ("hidden", "stream") else kind)
    if kind == "hidden":
        shown = data.with_format("torch", columns=["prompt_ids", "chosen_ids", "rejected_ids"])
    if kind == "stream":
        shown = data.to_iterable_dataset().with_format("torch")
    assert losses(build(llama, tmp_path, shown, **settings)) == pytest.approx(expected, rel=1e-6)


def test_what_is_no_data_set_is_refused(llama, tmp_path):
    rows, empty = [{"prompt": "a", "chosen": "b", "rejected": "c"}], IterableDataset.from_generator(lambda: iter([]))
    given = (rows, "list"), (DatasetDict(train=pairs()), "train"), (pairs().select([]), "no rows"), (empty, "no rows")
    for data, named in given:
        with refused(DataError, "train_dataset", named):
            build(llama, tmp_path, data)
    with refused(DataError, "eval_dataset", "list", "from_list"):
        build(llama, tmp_path, eval_dataset=rows)
    with refused(DataError, "held", "no rows"):
        build(llama, tmp_path, eval_dataset={"held": pairs().select([])})


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_the_tokens_of_their_longer_side(llama, tmp_path, strategy):
    longest = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs()]
    found = []
    for data in (pairs(), pairs().add_column("length", longest), pairs().add_column("length", longest[::-1])):
        trainer = build(llama, tmp_path, data, train_sampling_strategy=strategy, eval_dataset=pairs(8, seed=1))
        found.append(losses(trainer))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses_mean(trainer), abs=1e-5)
    assert found[0] == found[1]
    assert found[0] != found[2]


def losses_mean(trainer):
    """Of the held-out pairs by the policy as it is, pair by pair."""
    trainer.model.eval()
    with torch.no_grad():
        every = [trainer.compute_loss(trainer.model, trainer.data_collator([row])) for row in trainer.eval_dataset]
    trainer._metrics["eval"].clear()
    return float(torch.stack(every).mean())


# ---- Collators ----


def test_any_callable_is_a_collator(llama, tmp_path):
    class Subclass(DataCollatorForPreference):
        pass

    limits = {"max_length": 9, "loss": MADPO(tau=2, c_max=4)}
    data = pairs().add_column("reward_margin", np.linspace(-1, 3, 16).tolist())
    expected = losses(build(llama, tmp_path, data, **limits))
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=9)

    def function(rows):
        return {name: value for name, value in theirs(rows).items() if not name.startswith("ref_")}

    for collator in (function, lambda rows: theirs(rows), Subclass(pad_token_id=0, max_length=9), theirs):
        found = losses(build(llama, tmp_path, data, data_collator=collator, **limits))
        assert found == pytest.approx(expected, rel=1e-6)


def test_another_collator_has_another_reference(llama, tmp_path):
    def cut(length):
        return lambda rows: DataCollatorForPreference(pad_token_id=0, max_length=length)(rows)

    first, second = (build(llama, tmp_path, data_collator=cut(length)).train_dataset for length in (6, 20))
    assert first["ref_chosen_logps"] != second["ref_chosen_logps"]
    assert len(list((tmp_path / "cache" / "columns").glob("*.safetensors"))) == 2


# ---- Evaluation ----


def test_predict_measures_without_compute_metrics(llama, tmp_path):
    trainer = build(llama, tmp_path, eval_dataset=pairs(8, seed=1))
    trainer.train()
    evaluated = trainer.evaluate(pairs(8, seed=1))
    logged = trainer.state.log_history[-1]
    found = trainer.predict(pairs(8, seed=1))
    assert found.predictions is None
    assert found.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    for name in ("rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy"):
        assert found.metrics[f"test_{name}"] == pytest.approx(logged[f"eval_{name}"], rel=1e-5), name
    again = trainer.evaluate(pairs(8, seed=1))
    assert again["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6), "nothing of predict is left over"
    trainer.compute_metrics = lambda p: {}
    with refused(ConfigError, "compute_metrics"):
        trainer.predict(pairs(8, seed=1))


@pytest.mark.parametrize("every", [2, 500])
def test_token_metrics_are_those_of_trl_over_the_window_and_at_the_end(llama, tmp_path, every):
    """Completions of equal lengths: TRL averages batches, this trainer tokens."""
    generator = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = Dataset.from_dict({name: generator.integers(5, 200, (16, 6)).tolist() for name in names})
    settings = {"logging_steps": every, "max_steps": 4, "eval_dataset": data}
    stock, ours = (build(llama, tmp_path, data, stock=which, **settings) for which in (True, False))
    for trainer in (stock, ours):
        trainer.train()
        trainer.evaluate()
    token = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")
    if every == 500:  # in this transformers the last record of a training is not that of its evaluation
        assert set(token) <= ours.state.log_history[-2].keys()
    for theirs, own in zip(stock.state.log_history, ours.state.log_history, strict=True):
        assert theirs.keys() <= own.keys()
        for name in theirs:
            if name.removeprefix("eval_") in (*token, "rewards/margins", "logps/chosen"):
                assert own[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert "eval_num_tokens" in ours.state.log_history[-1]


# ---- What is refused ----


def test_an_encoder_decoder_and_rows_without_two_sides_are_refused(llama, tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=400, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    with refused(ConfigError, "BartForConditionalGeneration"):
        build(llama, tmp_path, model=BartForConditionalGeneration(config))
    assert build(llama, tmp_path, model=BartForCausalLM(config))
    with refused(DataError, "train_dataset", "'chosen'", "completion"):
        build(llama, tmp_path, Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_an_output_head_is_refused(llama, tmp_path, kind):
    with refused(ConfigError, kind.from_pretrained(llama).__class__.__name__, "AutoModelForCausalLM"):
        build(llama, tmp_path, model=kind.from_pretrained(llama))


def test_half_precision_that_a_processor_does_not_have_is_refused(llama, tmp_path):
    with refused(ConfigError, "fp16=True", "bf16=True"):
        build(llama, tmp_path, fp16=True)


@pytest.mark.parametrize("name", ["activation_offloading", "offload"])
def test_offloading_activations_from_a_processor_is_refused(llama, tmp_path, name):
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    with refused(ConfigError, name, "processor"):
        build(llama, tmp_path, **(kwargs if name == "offload" else {name: True}))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches"),
    ],
)
def test_batches_that_differ_between_processes_are_refused(llama, tmp_path, option, named):
    args = PreferenceConfig(output_dir=str(tmp_path), **PLAIN, **option)
    with refused(ConfigError, named):
        refuse_uneven(SimpleNamespace(num_processes=2), args)
    refuse_uneven(SimpleNamespace(num_processes=1), args)


def test_no_process_cuts_the_batches_of_a_stream(llama, tmp_path):
    """accelerate does so by default: pairs of one process would get their rejected rows from another's chosen ones."""
    trainer = build(llama, tmp_path, eval_dataset=pairs(8, seed=1).to_iterable_dataset())
    assert trainer.accelerator.dispatch_batches is False


SAID = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "c"}, ["row 1", "chosen"]),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, ["row 1", "prompt"]),
        ({"prompt": SAID, "chosen": SAID, "rejected": None}, ["row 1", "rejected"]),
    ],
)
def test_a_row_without_a_text_is_refused_by_number(llama, tmp_path, row, named):
    other = {name: value or row["chosen"] or "d" for name, value in row.items()}
    with refused(DataError, "train_dataset", *named):
        build(llama, tmp_path, Dataset.from_list([other, row]))
    with refused(DataError, "train_dataset", "row 0", named[1]):
        build(llama, tmp_path, Dataset.from_list([other, row]).select([1]))


def test_text_next_to_messages_is_refused(llama, tmp_path):
    rows = Dataset.from_list([{"prompt": SAID, "chosen": "b", "rejected": "c"}])
    with refused(DataError, "train_dataset", ("prompt", "messages"), ("chosen, rejected", "text")):
        build(llama, tmp_path, rows)


VIRTUAL = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    "POLY": lambda: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_adapters_that_change_no_weights_are_refused_when_the_trainer_is_made(llama, tmp_path, kind):
    args = PreferenceConfig(output_dir=str(tmp_path), **PLAIN)
    given = {"args": args, "train_dataset": pairs(), "processing_class": load_tokenizer(llama)}
    with refused(ConfigError, kind, "LoRA"):
        PreferenceTrainer(load(llama), peft_config=VIRTUAL[kind](), **given)
    with refused(ConfigError, kind):
        PreferenceTrainer(get_peft_model(load(llama), VIRTUAL[kind]()), **given)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"loss_type": "hinge"}, ["loss_type=['hinge']", "madpo.losses.Custom"]),
        ({"loss_type": ["sigmoid", "nca_pair"]}, [("loss_type=['sigmoid', 'nca_pair']", "nca_pair")]),
        ({"loss_type": "sft"}, ["loss_type=['sft']", "SFTTrainer"]),
        ({"loss_type": "ipo", "use_weighting": True}, ["use_weighting=True", "loss_type='sigmoid'"]),
        ({"label_smoothing": 0.1}, ["label_smoothing=0.1", "loss=DPO(label_smoothing="]),
        ({"f_divergence_type": "forward_kl"}, ["f_divergence_type=", "madpo.losses.Custom"]),
        ({"ld_alpha": 0.5}, ["ld_alpha=0.5", "madpo.losses.Custom"]),
        ({"label_smoothing_factor": 0.3}, ["label_smoothing_factor=0.3", "DPO(label_smoothing="]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_of_trl_without_a_loss_of_ours_are_refused(llama, tmp_path, option, named):
    with refused(ConfigError, *named):
        build(llama, tmp_path, **option)
    with refused(ConfigError, *named):
        PreferenceTrainer(load(llama), args=DPOConfig(output_dir=str(tmp_path), **QUIET, **option))


def test_every_other_loss_type_of_trl_is_refused(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), **QUIET)
    for kind in ("hinge", "exo_pair", "nca_pair", "sppo_hard", "aot", "apo_zero", "apo_down", "discopop"):
        args.loss_type = [kind]
        with refused(ConfigError, kind):
            loss_of(args)


# ---- Losses by TRL's names ----

MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3}


def equal_lengths(count=16):
    generator = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({name: generator.integers(5, 200, (count, 6)).tolist() for name in names})


AS_IN_TRL = [
    ({"loss_type": "ipo", "beta": 0.2}, IPO(beta=0.2, reduction="mean")),
    ({"loss_type": "robust", "label_smoothing": 0.2}, RDPO(flip_rate=0.2)),
    ({"loss_type": "bco_pair"}, BCO()),
    ({"use_weighting": True}, WPO(beta=0.1, clamp=False)),
    (MPO, Combined(parts=(DPO(beta=0.3), BCO(beta=0.3)), weights=(0.8, 0.2), nll=1)),
    (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.1]},
        Combined(parts=(DPO(), IPO(reduction="mean")), weights=(0.7, 0.1)),
    ),
]


@pytest.mark.parametrize(("option", "loss"), quick(AS_IN_TRL, AS_IN_TRL[0], AS_IN_TRL[4]), ids=str)
def test_a_loss_type_of_trl_trains_as_in_trl(llama, tmp_path, option, loss):
    """Completions of equal lengths: TRL averages the likelihood over the tokens of a batch, madpo over pairs."""
    data = equal_lengths()
    stock, own = (build(llama, tmp_path, data, stock=which, **option) for which in (True, False))
    assert own.loss == loss
    assert losses(own) == pytest.approx(losses(stock), rel=1e-4, abs=1e-6)
    for one, other in zip(stock.model.parameters(), own.model.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


# ---- References that are computed with each batch ----


def full(folder, out, data=None, *, stock=False, **more):
    """Full training, with a reference model as TRL makes one."""
    return build(folder, out, data, stock=stock, model=load(folder), max_steps=6, **more)


def test_a_reference_that_follows_the_policy_is_trls(llama, tmp_path):
    option = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "learning_rate": 1e-3}
    stock, own, still = (full(llama, tmp_path, stock=which == 0, **(option if which < 2 else {})) for which in range(3))
    expected, found = losses(stock), losses(own)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(losses(still), rel=1e-3)
    for one, other in zip(stock.ref_model.parameters(), own.ref_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    with refused(ConfigError, "sync_ref_model"):
        build(llama, tmp_path, sync_ref_model=True)


def test_a_reference_that_follows_the_policy_resumes_where_it_was(llama, tmp_path):
    option = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "learning_rate": 1e-3}
    saved = {**option, "save_strategy": "steps", "save_steps": 3}
    whole = full(llama, tmp_path / "whole", **option)
    expected = losses(whole)
    full(llama, tmp_path / "part", **saved).train()
    again = full(llama, tmp_path / "part", **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == expected
    for one, other in zip(whole.ref_model.parameters(), again.ref_model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [build, full])
def test_a_stream_computes_its_reference_as_it_goes(llama, tmp_path, make):
    rows = list(pairs())
    expected = losses(make(llama, tmp_path, pairs()))
    streams = [pairs().to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))]
    trainers = [
        make(llama, tmp_path, stream, stock=which) for stream, which in zip(streams, (True, False), strict=True)
    ]
    stock, own = (losses(trainer) for trainer in trainers)
    assert own == pytest.approx(stock, rel=1e-4)
    assert own[0] == pytest.approx(expected[0], rel=1e-6)
    found = trainers[1].evaluate(pairs(8, seed=1).to_iterable_dataset())
    assert found["eval_loss"] == pytest.approx(trainers[1].evaluate(pairs(8, seed=1))["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("make", [build, full])
def test_a_stream_next_to_rows_has_the_reference_of_the_rows(llama, tmp_path, make):
    """The copy of a model that had scored rows answered with logits."""
    held = pairs(8, seed=1)
    trainer = make(llama, tmp_path, eval_dataset={"rows": held, "stream": held.to_iterable_dataset()})
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_stream_loss"] == pytest.approx(found["eval_rows_loss"], rel=1e-5)


# ---- References that would move ----


def next_to_adapter(folder, part):
    """A model whose training moves more than an adapter."""
    model = get_peft_model(load(folder), lora())
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("part", ["norm", "embed_tokens"])
def test_weights_next_to_an_adapter_move_no_reference(llama, tmp_path, part):
    """Without its adapter such a model is no reference: streams and late sets were compared with trained weights."""
    settings = {"max_steps": 4, "train_sampling_strategy": "sequential"}
    held = pairs(8, seed=1)
    rows = build(llama, tmp_path, model=next_to_adapter(llama, part), eval_dataset=held, **settings)
    stream = build(llama, tmp_path, pairs().to_iterable_dataset(), model=next_to_adapter(llama, part), **settings)
    assert losses(stream) == pytest.approx(losses(rows), rel=1e-5)
    assert stream.evaluate(held)["eval_loss"] == pytest.approx(rows.evaluate()["eval_loss"], rel=1e-5)
    with refused(DataError, "ref_chosen_logps", "adapter", "ref_model"):
        rows.evaluate(pairs(8, seed=1))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64))


def test_a_bias_that_an_adapter_trains_moves_no_reference(llama, tmp_path):
    """PEFT leaves it in place when it switches the adapter off."""
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all", task_type="CAUSAL_LM")
    settings = {"peft_config": config, "max_steps": 4, "train_sampling_strategy": "sequential"}
    expected, found = (
        losses(build(llama, tmp_path, data, model=gpt2(), **settings))
        for data in (pairs(), pairs().to_iterable_dataset())
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_reference_that_shares_what_is_trained_is_refused(llama, tmp_path):
    base, model, same = load(llama), load(llama), load(llama)
    adapted = get_peft_model(base, lora())
    same.load_state_dict(model.state_dict(), assign=True)
    for policy, reference, name in (
        (adapted, base, "lora_A"),
        (model, copy.copy(model), "embed_tokens"),
        (model, same, "embed_tokens"),
    ):
        with refused(ConfigError, "ref_model") as caught:
            build(llama, tmp_path, model=policy, ref_model=reference)
        assert name in str(caught.value)
    frozen = get_peft_model(same, lora())
    assert losses(build(llama, tmp_path, model=frozen, ref_model=model))


@pytest.mark.parametrize("name", ["image", "images"])
def test_images_are_refused_in_a_sentence_that_can_be_followed(llama, tmp_path, name):
    data = pairs().add_column(name, [[0]] * 16)
    with refused(DataError, "train_dataset", repr(name)):
        build(llama, tmp_path, data)
    with refused(DataError, "eval_dataset", repr(name)):
        build(llama, tmp_path, eval_dataset=data)
    trainer = build(llama, tmp_path, data.remove_columns(name))
    with refused(DataError, repr(name)):
        trainer.evaluate(data)
    assert losses(trainer)


# ---- Cards and names ----


CARDS = [MADPO(tau=2, c_max=4), IPO(), DPO(), Custom(target="madpo.losses:SimPO")]


@pytest.mark.parametrize("loss", quick(CARDS, *CARDS[2:]), ids=str)
def test_the_model_card_is_about_the_loss(llama, tmp_path, loss):
    data = pairs().add_column("reward_margin", [1.0] * 16)
    trainer = build(llama, tmp_path, data, loss=loss, save_strategy="steps", save_steps=3)
    trainer.train()
    inner = loss.loss if isinstance(loss, Custom) else loss
    name, paper = type(inner).__name__, inner.paper
    card = ModelCard.load(tmp_path / "README.md")
    names(card.content, (name, f"[{paper.title}](https://huggingface.co/papers/{paper.arxiv})"))
    assert f"Cite {name}" in card.content
    assert paper.arxiv in card.content.split("Cite TRL as")[0].split("bibtex")[1]
    assert ("rafailov" in card.content) == (name == "DPO")
    assert f'"kind": "{loss.kind}"' in card.content.split("### Framework versions")[0]
    assert card.data.tags == sorted(card.data.tags)
    assert {"madpo", "trl", name.lower()} <= set(card.data.tags)
    assert ("dpo" in card.data.tags) == (name == "DPO")


def test_every_published_loss_has_a_paper():
    for name, loss in EVERY_LOSS.items():
        if name.startswith("custom"):
            continue
        assert loss.paper is not None, name
        assert loss.paper.arxiv in loss.paper.bibtex()
        assert loss.paper.bibtex().count("{") == loss.paper.bibtex().count("}")
