"""``madpo train`` with no loss named, from pairs to the averaged policy."""

import json
import math
import re
import shutil
import tomllib
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError
from madpo.core.statistics import design_effect, fit_temperature
from madpo.data import load_preferences
from madpo.losses import DPO, MADPO
from madpo.models.load import load_model, load_tokenizer
from madpo.operations import TrainSettings, auto, inspect, train
from madpo.operations.averaging import averaged_adapter, save_average, strength_for
from madpo.operations.train_settings import Auto
from madpo.rewards.label_share import better_than_coin, label_share
from practice_cases import BAD, GOOD, read, run, text_pairs, write
from quick import quick
from refusals import names, refused

pytestmark = pytest.mark.usefixtures("module_cache", "module_float32")

ARGS = {"learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 16, "bf16": False, "seed": 7}


def pairs(count, *, coin=False, seed=0, prompts=60):
    """Pairs with exact margins and Bradley-Terry labels; with ``coin`` neither says anything."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        true = float(1 + 2 * generator.standard_normal())
        texts = [GOOD[generator.integers(4)], BAD[generator.integers(4)]]
        first = generator.random() < (0.5 if coin else 1 / (1 + math.exp(-true)))
        margin = float(generator.standard_normal()) if coin else true if first else -true
        chosen, rejected = texts if first else texts[::-1]
        rows.append(
            {"prompt": f"The film {i % prompts}", "chosen": chosen, "rejected": rejected, "reward_margin": margin}
        )
    return rows


def settings(model, loss=None, **more):
    args = ARGS | more.pop("args", {})
    more |= {} if more.get("full") else {"lora": {"rank": 2}}
    return TrainSettings(model=str(model), loss=loss or Auto(), args=args, dtype="float32", **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(160))


@pytest.fixture(scope="module")
def done(llama, data, tmp_path_factory):
    """``auto`` by the command line, no loss named."""
    out = tmp_path_factory.mktemp("auto") / "P"
    options = [word for name, value in ARGS.items() for word in (f"--args.{name}", str(value).lower())]
    run("train", data, "--model_name_or_path", llama, *options, "--dtype", "float32", "--lora.rank", 2, "--merge",
        "--output_dir", out)  # fmt: skip
    return out


def update(folder):
    """The update B A times its scale, by layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    scale = config["lora_alpha"] / config["r"]
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {n: scale * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


def test_the_policy_is_the_mean_of_both_updates(done, llama):
    first, second, mean = (update(done / name) for name in ("dpo/adapter", "mixed/adapter", "adapter"))
    assert first.keys() == mean.keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-7)
        assert not torch.equal(first[name], second[name])
    ids = torch.arange(3, 20)[None]
    adapted = PeftModel.from_pretrained(load_model(llama, dtype=torch.float32), done / "adapter")(ids).logits
    torch.testing.assert_close(load_model(done / "merged", dtype=torch.float32)(ids).logits, adapted)


def test_the_share_is_that_of_pairs_that_the_policy_had_not_seen(done, data):
    report = json.loads((done / "report.json").read_bytes())
    lines, margins = read(done / "dpo" / "first_look.jsonl"), [row["reward_margin"] for row in read(data)]
    assert not (done / "mixed" / "first_look.jsonl").exists(), "which nobody reads"
    assert [line["reward_margin"] for line in lines] == [margins[line["pair_id"]] for line in lines]
    assert len({line["pair_id"] for line in lines}) == len(lines)
    prompts = [read(data)[line["pair_id"]]["prompt"] for line in lines]
    assert len(set(prompts)) == len(lines) == report["share"]["difference"]["n"], "the first pair of each prompt"
    assert 20 <= len(lines) <= 40, "of half of 60 prompts, about"
    implicit = [line["implicit_margin"] for line in lines]
    found = label_share(implicit, [line["reward_margin"] for line in lines], prompts=prompts, seed=7)
    assert report["label_share"] == report["share"]["mean"] == pytest.approx(found.mean)
    assert report["share"]["difference"]["mean"] == pytest.approx(found.difference.mean)
    assert report["advice"] == "auto"
    shown = inspect(done / "dpo" / "first_look.jsonl")
    assert shown.share.mean == pytest.approx(found.mean)
    assert shown.share.difference.mean == pytest.approx(found.difference.mean)
    assert shown.share.difference.n == found.difference.n
    assert shown.share.text() in shown.text()
    assert found.mean < 0.4, "the margins are exact"
    assert report["margin_temperature"] == pytest.approx(fit_temperature(margins)[0])
    assert report["pairs"] == 160
    for name in ("dpo", "mixed"):
        own = json.loads((done / name / "report.json").read_bytes())
        assert (own["pairs"], own["eval_pairs"]) == (160, 0)


@torch.no_grad()
def implicit_margin(model, row):
    """log pi / ref of the chosen side less that of the rejected one, token by token."""

    def logps(side):
        ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
        found = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        return float(found[len(row["prompt_ids"]) - 1 :].sum())

    policy = logps("chosen") - logps("rejected")
    with model.disable_adapter():
        return policy - (logps("chosen") - logps("rejected"))


def test_held_out_pairs_are_in_neither_training(llama, data, tmp_path):
    report = train(data, tmp_path / "P", settings(llama, eval_share=0.2))
    held = [{line["pair_id"] for line in read(tmp_path / "P" / name / "heldout.jsonl")} for name in ("dpo", "mixed")]
    assert held[0] == held[1]
    assert len(held[0]) == report.eval_pairs > 20
    assert report.pairs == 160 - report.eval_pairs
    # The average is measured on them.
    model = PeftModel.from_pretrained(load_model(llama, dtype=torch.float32), tmp_path / "P" / "adapter")
    rows = {row["pair_id"]: row for row in load_preferences(str(data), tokenizer=load_tokenizer(llama))}
    margins = [implicit_margin(model, rows[pair]) for pair in sorted(held[0])]
    assert report.evaluation["eval_rewards/margins"] == pytest.approx(0.1 * np.mean(margins), rel=1e-3)
    assert report.evaluation["eval_rewards/accuracies"] == np.mean(np.array(margins) > 0)
    assert report.evaluation["eval_loss"] == pytest.approx(np.logaddexp(0, -0.1 * np.array(margins)).mean(), rel=1e-4)
    effect = design_effect(np.array(margins) > 0, [rows[pair]["prompt"] for pair in sorted(held[0])])
    assert report.eval_effect == pytest.approx(effect)
    looked = {line["pair_id"] for line in read(tmp_path / "P" / "dpo" / "first_look.jsonl")}
    assert not looked & held[0]
    rest = [row["reward_margin"] for i, row in enumerate(read(data)) if i not in held[0]]
    assert report.margin_temperature == pytest.approx(fit_temperature(rest)[0])


def test_evaluation_pairs_of_a_file_of_their_own_are_no_training_pairs(llama, tmp_path):
    """Both files number their pairs from 0."""
    own = pairs(60, prompts=30)
    other = [row | {"prompt": f"Another {i}"} for i, row in enumerate(pairs(70, seed=3))]
    data, held = write(tmp_path / "pairs.jsonl", own), write(tmp_path / "held.jsonl", other)
    report = train(data, tmp_path / "P", settings(llama), eval_data=held)
    assert (report.pairs, report.eval_pairs) == (60, 70)
    assert report.margin_temperature == pytest.approx(fit_temperature([row["reward_margin"] for row in own])[0])
    lines = read(tmp_path / "P" / "dpo" / "first_look.jsonl")
    prompts = [own[line["pair_id"]]["prompt"] for line in lines]
    assert [line["reward_margin"] for line in lines] == [own[line["pair_id"]]["reward_margin"] for line in lines]
    looked = read(tmp_path / "P" / "dpo" / "heldout.jsonl")
    assert [line["reward_margin"] for line in looked] == [row["reward_margin"] for row in other]
    assert len({line["prompt"] for line in looked}) == 70
    assert len(set(prompts)) == len(prompts) == len({line["prompt"] for line in lines}) == 15, "half of 30 prompts"


def test_record_card_and_configuration_say_all_of_it(done, llama, data):
    record = json.loads((done / "record.json").read_bytes())
    assert record["operation"] == "train_auto/12"
    assert {"label_share", "deciding", "advice"} <= record["metrics"].keys()
    assert {"adapter/adapter_model.safetensors", "dpo/adapter/adapter_model.safetensors"} <= record["provenance"][
        "files"
    ].keys()
    card = (done / "README.md").read_text()
    report = json.loads((done / "report.json").read_bytes())
    names(card, "reward_margin", f"{report['share']['margin_loss']:.3f}", f"{report['label_share']:.2f}")
    again = TrainSettings.model_validate(tomllib.loads((done / "config.toml").read_text()))
    assert again.loss == Auto()
    assert again.merge
    before = (done / "report.json").read_bytes()
    assert train(data, done, settings(llama, merge=True)).text()
    assert (done / "report.json").read_bytes() == before


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_margins_that_are_never_negative_take_no_part(llama, tmp_path, fast):
    rows = [row | {"reward_margin": abs(row["reward_margin"])} for row in pairs(24, prompts=12)]
    report = train(write(tmp_path / "p.jsonl", rows), tmp_path / "P", settings(llama, loss=Auto(fast=fast)))
    assert (report.advice, report.label_share, report.averaged) == ("dpo", 1.0, not fast)
    names(report.text(), "reward_margin", "negative")
    assert "log loss on unseen labels" not in report.text()


def test_pairs_of_one_prompt_cannot_decide(llama, tmp_path):
    data = write(tmp_path / "pairs.jsonl", pairs(24, prompts=1))
    with refused(DataError, data, "1 different prompt", "--loss dpo"):
        train(data, tmp_path / "P", settings(llama))
    assert train(data, tmp_path / "P", settings(llama, DPO()), overwrite=True).pairs == 24


def test_labels_of_a_coin_end_in_the_advice_to_take_dpo(llama, tmp_path):
    # Four pairs with one margin for each prompt: over pairs the margins would pass.
    coin = pairs(20, coin=True, seed=4)
    shared = ({name: coin[i % 20][name] for name in ("prompt", "reward_margin")} for i in range(80))
    rows = [row | same for row, same in zip(pairs(80, coin=True), shared, strict=True)]
    margins, prompts = ([row[name] for row in rows] for name in ("reward_margin", "prompt"))
    assert (better_than_coin(margins), better_than_coin(margins, prompts)) == (True, False)
    data = write(tmp_path / "pairs.jsonl", rows)
    report = train(data, tmp_path / "P", settings(llama))
    assert (report.advice, report.label_share) == ("dpo", 1.0)
    assert report.reason == auto.REASONS["coin"]
    assert report.share.text() in report.text()
    log = read(tmp_path / "P" / "mixed" / "log.jsonl")
    assert all(line.get("target/probability", 1.0) == pytest.approx(1.0) for line in log)


@pytest.mark.parametrize("fast", quick([False, True], False))
def test_pairs_without_margins_get_them_from_a_probe(llama, tmp_path, fast):
    data = write(tmp_path / "pairs.jsonl", text_pairs(120))
    report = train(data, tmp_path / "P", settings(llama, Auto(fast=fast)))
    assert "probe" in report.text()
    probed = read(tmp_path / "P" / "mixed" / "margins.jsonl")
    assert len(probed) == report.pairs
    assert np.mean([line["reward_margin"] > 0 for line in probed]) > 0.6
    if not fast:
        known = {line["pair_id"]: line["reward_margin"] for line in read(tmp_path / "P" / "dpo" / "margins.jsonl")}
        assert known == {line["pair_id"]: line["reward_margin"] for line in probed}, "one pass gives both trainings'"
        looked = read(tmp_path / "P" / "dpo" / "first_look.jsonl")
        assert all(line["reward_margin"] == known[line["pair_id"]] for line in looked)
        assert report.share.margin_loss < math.log(2)


def test_pages_say_what_was_trained_in_words_of_auto(done):
    pages = {name: (done / name / "report.html").read_text() for name in (".", "dpo", "mixed")}
    titles = {name: re.search(r"<h1.*?>(.*?)</h1>", page)[1].split(" with ")[1] for name, page in pages.items()}
    share = json.loads((done / "report.json").read_bytes())["label_share"]
    mixed = f"labels and margins mixed (label share {share:.2f}), for auto"
    assert titles == {".": "auto", "dpo": "plain DPO, for auto", "mixed": mixed}
    assert "Label share" in pages["."], "the decision is on the page"


def test_fast_is_one_training_with_a_fixed_share(llama, data, tmp_path):
    report = train(data, tmp_path / "P", settings(llama, Auto(fast=True), eval_share=0.3))
    assert (report.pairs + report.eval_pairs, report.label_share, report.share) == (160, 0.75, None)
    held = {line["pair_id"] for line in read(tmp_path / "P" / "mixed" / "heldout.jsonl")}
    every = [row["reward_margin"] for row in read(data)]
    trained = [margin for i, margin in enumerate(every) if i not in held]
    assert report.margin_temperature == pytest.approx(fit_temperature(np.array(trained))[0])
    assert report.margin_temperature != pytest.approx(fit_temperature(np.array(every))[0]), "held-out pairs decide not"
    assert not (tmp_path / "P" / "dpo").exists()
    assert (tmp_path / "P" / "adapter" / "adapter_model.safetensors").exists()


def test_an_interruption_in_the_second_training_ends_in_the_same_bytes(done, llama, data, tmp_path, monkeypatch):
    trained, stop = auto._Work.train, [True]

    def interrupted(work, name, *given, **how):
        if name == auto.MIXED_FOLDER and stop:
            stop.clear()
            raise KeyboardInterrupt
        return trained(work, name, *given, **how)

    monkeypatch.setattr(auto._Work, "train", interrupted)
    for _ in range(2):
        try:
            train(data, tmp_path / "P", settings(llama, merge=True))
        except KeyboardInterrupt:
            assert not (tmp_path / "P" / "record.json").exists()
    for name in ("adapter/adapter_model.safetensors", "report.json", "mixed/log.jsonl", "dpo/first_look.jsonl"):
        assert (tmp_path / "P" / name).read_bytes() == (done / name).read_bytes()


def test_a_wanted_kl_sets_the_adapters_strength(done, llama, data, tmp_path):
    out = tmp_path / "P"
    report = train(data, out, settings(llama, Auto(kl=0.05, kl_tokens=6)))
    assert report.kl.mean == pytest.approx(0.05, rel=0.4)
    assert report.strength != 1
    trained, weaker = update(done / "adapter"), update(out / "adapter")
    for name, value in weaker.items():
        torch.testing.assert_close(value, report.strength * trained[name], rtol=1e-4, atol=1e-7)


def test_end_tokens_that_cannot_be_sampled_are_refused_before_the_trainings(llama, data, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    own = json.loads((model / "generation_config.json").read_bytes())
    (model / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": "</s>"}))
    with mock.patch.object(auto, "run_in_folder", side_effect=AssertionError("a training began")):
        with refused(ConfigError, model, ("eos_token_id", "'</s>'", "generation_config.json")):
            train(data, tmp_path / "P", settings(model, Auto(kl=0.05)))
        (model / "generation_config.json").unlink()  # those of config.json are good
        with pytest.raises(AssertionError, match="a training began"):
            train(data, tmp_path / "P", settings(model, Auto(kl=0.05)))


@pytest.mark.slow
def test_full_training_averages_the_weights(llama, data, tmp_path):
    report = train(data, tmp_path / "P", settings(llama, full=True, args={"learning_rate": 1e-3}))
    assert report.averaged
    ours, first, second = (
        load_model(tmp_path / "P" / name, dtype="auto") for name in ("model", "dpo/model", "mixed/model")
    )
    base = load_model(llama, dtype="auto")
    models = (ours, first, second, base)
    for mean, one, two, start in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mean, (one + two) / 2)
        assert not torch.equal(mean, start)


def test_weights_are_averaged_in_float32(llama, tmp_path):
    one, two = (load_model(llama, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(1.0)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(tmp_path / name)
        load_tokenizer(llama).save_pretrained(tmp_path / name)
    save_average(tmp_path / "one", tmp_path / "two", tmp_path / "mean")
    for mean, low in zip(load_model(tmp_path / "mean", dtype="auto").parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mean, low + 0.5)


def test_the_average_is_written_in_the_same_bytes_whatever_the_hash_seed(done):
    targets = json.loads((done / "adapter" / "adapter_config.json").read_bytes())["target_modules"]
    assert len(targets) > 1
    assert targets == sorted(targets)


def test_the_average_of_one_adapter_with_itself_is_the_adapter(done, llama):
    model = averaged_adapter(llama, done / "dpo" / "adapter", done / "dpo" / "adapter", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    own = PeftModel.from_pretrained(load_model(llama, dtype=torch.float32), done / "dpo" / "adapter")(ids).logits
    torch.testing.assert_close(model(ids).logits, own)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_strength_for_a_kl_is_found(power):
    found = strength_for(0.5, lambda s: [3.0 * s**power] * 4, seed=0)
    assert found.near
    assert found.strength == pytest.approx((0.5 / 3) ** (1 / power), rel=0.2)
    out_of_reach = strength_for(1e3, lambda s: [s * s] * 4, seed=0)
    assert not out_of_reach.near
    assert out_of_reach.strength == pytest.approx(4)


def test_what_auto_refuses(llama, data, tmp_path, capsys):
    with refused(ConfigError, "'epoch'", ("eval_data", "eval_share")):
        train(data, tmp_path / "P", settings(llama, args={"eval_strategy": "epoch"}))
    with refused(ValueError, "kl", "fast"):
        Auto(fast=True, kl=1.0)
    with refused(ValueError, "loss.kl", "full"):
        settings(llama, Auto(kl=1.0), full=True)
    words = ["--model_name_or_path", str(llama), "--output_dir", str(tmp_path / "P"), "--loss", "dpo", "--loss.fast"]
    assert main(["train", str(data), *words, "true"]) == 2
    assert "fast" in capsys.readouterr().err
    assert not (tmp_path / "P").exists()


def test_no_loss_named_is_auto_and_a_field_of_madpo_names_madpo():
    def loss(**given):
        return TrainSettings.model_validate({"model": "m", **given}).loss

    assert loss() == loss(loss={}) == Auto()
    assert loss(loss={"beta": 0.2, "fast": True}) == Auto(beta=0.2, fast=True)
    assert loss(loss={"tau": 3}) == MADPO(tau=3)
    assert loss(loss={"kind": "dpo", "beta": 0.2}) == DPO(beta=0.2)
