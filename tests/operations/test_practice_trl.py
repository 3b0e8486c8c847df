"""``madpo train --loss dpo`` and ``madpo reward`` on TRL's example formats, against TRL's own trainers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardTrainer

from madpo.data import load_preferences
from madpo.data.rows import Pair
from madpo.models.load import load_tokenizer
from madpo.operations import load_scorer
from madpo.training.margins import sequences
from practice_cases import FORMATS, conversation, read, run, text_pairs, write

pytestmark = pytest.mark.usefixtures("module_cache", "module_float32")


@pytest.mark.parametrize("form", FORMATS)
def test_reward_models_see_the_ids_of_trls_reward_trainer(llama, form, tmp_path):
    rows, tokenizer = [FORMATS[form](row) for row in text_pairs(12)], load_tokenizer(llama)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    expected = RewardTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(rows), tokenizer, arguments, "train")
    found = sequences(load_preferences(write(tmp_path / "d.jsonl", rows), tokenizer=tokenizer))
    assert found.pop("pair_id") == list(range(12))
    for length, chosen, rejected in zip(found.pop("prompt_length"), *found.values(), strict=True):
        assert 0 < length < min(len(chosen), len(rejected))
        assert chosen[:length] == rejected[:length]
    assert found == {side: list(expected[side]) for side in ("chosen_ids", "rejected_ids")}


@pytest.mark.parametrize("form", FORMATS)
def test_dpo_gives_the_numbers_of_stock_trl(llama, form, tmp_path):
    rows = [FORMATS[form](row) for row in text_pairs(24)]
    data = write(tmp_path / "pairs.jsonl", rows)
    run("train", data, "--model_name_or_path", llama, "--loss", "dpo", "--output_dir", tmp_path / "P",
        "--learning_rate", "1e-2", "--args.max_steps", "4", "--args.bf16", "false", "--dtype", "float32",
        "--args.logging_steps", "1", "--lora.rank", "4", "--batch_size", "4")  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        **{"learning_rate": 1e-2, "max_steps": 4, "bf16": False, "use_cpu": True, "logging_steps": 1},
        **{"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    )
    torch.manual_seed(arguments.seed)
    adapter = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(llama),
        peft_config=adapter,
    )
    stock.train()
    names = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "rewards/accuracies")
    expected, found = (
        [[row[name] for name in names] for row in log if "loss" in row]
        for log in (stock.state.log_history, read(tmp_path / "P" / "log.jsonl"))
    )
    assert len(found) == 4
    (
        found[0].pop(),
        expected[0].pop(),
    )  # before the first step all rewards are 0 up to rounding, which decides no accuracy
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("padding", ["<pad>", "</s>"])
def test_the_reward_of_anothers_classifier_is_where_transformers_reads_it(llama, tmp_path, padding, form):
    """With the end token as padding, that is the token before the end."""
    tokenizer = load_tokenizer(llama)
    tokenizer.pad_token = padding
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [
        Pair(i, i, *(row[k] for k in ("prompt", "chosen", "rejected")), {})
        for i, row in enumerate(map(conversation if form == "messages" else dict, text_pairs(5)))
    ]
    scorer = load_scorer(tmp_path, batch_size=4)
    *sides, _ = scorer.encoder.ids(pairs, "d", "row")
    assert all(ids[-1] == tokenizer.eos_token_id for ids in sides[0])
    with torch.no_grad():
        expected = [[float(model(input_ids=torch.tensor([ids])).logits) for ids in side] for side in sides]
    np.testing.assert_allclose(scorer.score_pairs(pairs, "d", "row"), expected, rtol=0, atol=1e-5)
    if isinstance(pairs[0].prompt, str):
        found = scorer.score_responses([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5)
