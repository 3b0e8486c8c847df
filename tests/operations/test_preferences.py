"""Responses that survive an interruption, and labels that follow Bradley-Terry on one permutation."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from scipy.stats import binom

from madpo.core.errors import ConfigError
from madpo.data.corpus import PackagedIMDB
from madpo.models.engine import responses as sampled
from madpo.models.load import build_tiny, load_tokenizer
from madpo.operations import study_pairs as preferences
from madpo.operations.study_pairs import (
    PAIRS,
    RESPONSES,
    PairStage,
    ResponseStage,
    cut_prompts,
    label_pairs,
    sample_responses,
)
from madpo.operations.study_training import ReferenceStage, reference_logps
from refusals import refused

WORDS = ["the", "film", "was", "good", "bad", "story", "and", "it", "is", "what", "I like", "to see", "in a cinema"]


def reviews(n: int, shortest: int = 60) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, shortest + i)) for i in range(n)]
    texts[1] = "too short"
    return pd.DataFrame(
        {"review_id": np.arange(n), "text": texts, "positive": False, "source": "imdb", "group": range(n)}
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    build_tiny("llama", folder / "model", seed=3)
    return folder


@pytest.fixture
def study(sft, tmp_path, monkeypatch):
    """A stage over ten toy reviews and an oracle that counts letters; returns a function that runs it."""
    monkeypatch.setattr(preferences, "load_corpus", lambda config: reviews(10))
    monkeypatch.setattr(preferences, "load_oracle", lambda folder: lambda p, c: np.array([len(x) / 100 for x in c]))
    config = ResponseStage(corpus=PackagedIMDB(), prompts=10, prompt_tokens=6, max_new_tokens=12, seed=5, batch_size=4)

    def run(name: str, config: ResponseStage = config):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return sample_responses(config, {"sft": sft, "oracle": tmp_path}, out), out

    run.config = config
    return run


def test_responses_hold_what_was_sampled(study, sft) -> None:
    metrics, out = study("a")
    assert (metrics["prompts"], metrics["skipped"]) == (9, 1)
    assert [path.name for path in out.iterdir()] == ["responses.parquet"]
    assert pq.read_schema(out / "responses.parquet").remove_metadata().equals(RESPONSES)
    table = pd.read_parquet(out / "responses.parquet")
    tokenizer = load_tokenizer(sft / "model")
    texts = reviews(10).set_index("review_id")["text"]
    assert list(table["prompt_id"]) == [0, *range(2, 10)]
    for row in table.itertuples():
        whole = tokenizer(texts[row.prompt_id])["input_ids"]
        assert list(row.prompt_ids) == whole[:6]
        assert row.prompt_ids[0] == tokenizer.bos_token_id
        assert list(row.real_ids) == whole[6:18]
        assert (row.prompt + row.real) == texts[row.prompt_id][: len(row.prompt + row.real)]
        assert 1 <= len(row.response_ids_0) <= 12
        assert list(row.response_ids_0) != list(row.response_ids_1)
        assert row.response_0 == tokenizer.decode(row.response_ids_0, skip_special_tokens=True)
        assert row.reward_real == len(row.real) / 100
    sampled = pd.concat([table["reward_0"], table["reward_1"]])
    assert metrics["oracle_reward"].mean == pytest.approx(sampled.mean())
    assert metrics["oracle_reward"].n == 9


def test_the_end_token_stands_only_at_a_reviews_end(sft) -> None:
    tokenizer = load_tokenizer(sft / "model")
    table = pd.DataFrame({"review_id": [7], "text": ["the film was good and it is not bad to see in a cinema"]})
    length = len(tokenizer(table["text"][0])["input_ids"])
    ended = cut_prompts(table, tokenizer, 6, length).iloc[0]
    assert ended["real_ids"][-1] == tokenizer.eos_token_id
    assert len(ended["real_ids"]) == length - 6 + 1
    assert ended["prompt"] + ended["real"] == table["text"][0]
    assert tokenizer.eos_token_id not in cut_prompts(table, tokenizer, 6, length - 6).iloc[0]["real_ids"]
    assert cut_prompts(table, tokenizer, length - 8, 5).shape == (1, 5)
    assert cut_prompts(table, tokenizer, length - 7, 5).empty


def test_a_killed_run_continues_to_the_same_bytes(study, monkeypatch) -> None:
    expected = (study("whole")[1] / "responses.parquet").read_bytes()
    original, calls = sampled.generate, []

    def dies(*args, **kwargs):
        calls.append(list(kwargs["keys"]))
        if len(calls) == 4:  # in the second draw of the second part
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sampled, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        study("cut")
    _, out = study("cut")
    assert (out / "responses.parquet").read_bytes() == expected
    assert calls.count([0, 2, 3, 4]) == 2  # the first part was not sampled again
    assert [path.name for path in out.iterdir()] == ["responses.parquet"]
    before = len(calls)
    assert study("cut")[0]["prompts"] == 9  # killed after the last write, before the record
    assert len(calls) == before


def test_the_seed_decides_the_responses(study) -> None:
    first = pd.read_parquet(study("a")[1] / "responses.parquet")
    other = pd.read_parquet(study("b", study.config.model_copy(update={"seed": 6}))[1] / "responses.parquet")
    assert (first["real"] == other["real"]).all()
    assert (first["response_0"] != other["response_0"]).any()


def test_prompts_longer_than_every_review_are_refused(study) -> None:
    with refused(ConfigError, "10", "508"):
        study("a", study.config.model_copy(update={"prompt_tokens": 500}))


def responses(folder, n: int, reward=lambda i: (0.5, -0.3, -1.0)):
    rows = []
    for i in range(n):
        ids = {"prompt_ids": [1, i], "response_ids_0": [10], "response_ids_1": [11], "real_ids": [12]}
        texts = {"prompt": f"p{i}", "response_0": f"a{i}", "response_1": f"b{i}", "real": f"r{i}"}
        rewards = dict(zip(("reward_0", "reward_1", "reward_real"), reward(i), strict=True))
        rows.append({"prompt_id": 3 * i, **ids, **texts, **rewards})
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=RESPONSES), folder / "responses.parquet")
    return {"responses": folder}


def label(tmp_path, inputs, **changes):
    settings = {"tier": "high", "train": 40, **changes}
    out = tmp_path / "-".join(map(str, settings.values()))
    out.mkdir(exist_ok=True)
    metrics = label_pairs(PairStage(**settings), inputs, out)
    assert pq.read_schema(out / "pairs.parquet").remove_metadata().equals(PAIRS)
    return metrics, pd.read_parquet(out / "pairs.parquet")


def test_labels_follow_bradley_terry(tmp_path) -> None:
    n = 4000
    inputs = responses(tmp_path / "r", n)
    for noise in (1.0, 0.5):
        _, pairs = label(tmp_path, inputs, label_noise=noise)
        wins = int((pairs["chosen"].str[0] == "a").sum())
        low, high = binom.interval(0.999, n, expit(0.8 / noise))
        assert low <= wins <= high
    _, pairs = label(tmp_path, inputs, label_noise=0.0)
    assert (pairs["chosen"].str[0] == "a").all()


def test_tiers_share_one_permutation_and_pair_what_they_should(tmp_path) -> None:
    # The second response is the better one for odd prompts.
    inputs = responses(tmp_path / "r", 60, lambda i: (0.1, 0.2 if i % 2 else 0.0, -1.0))
    tiers = {tier: label(tmp_path, inputs, tier=tier)[1] for tier in ("high", "medium", "low")}
    high = tiers["high"]
    assert list(high["split"]) == ["train"] * 40 + ["heldout"] * 20
    assert sorted(high["pair_id"]) == list(range(0, 180, 3))
    assert not high["pair_id"].is_monotonic_increasing
    for pairs in tiers.values():
        assert list(pairs["pair_id"]) == list(high["pair_id"])
        assert list(pairs["split"]) == list(high["split"])
    for tier, pairs in tiers.items():
        for row in pairs.itertuples():
            prompt = row.pair_id // 3
            assert row.prompt == f"p{prompt}"
            low = tier == "low" or (tier == "medium" and prompt < 30)
            best = "b" if prompt % 2 else "a"
            assert {row.chosen[0], row.rejected[0]} == ({best, "r"} if low else {"a", "b"})
            for side in ("chosen", "rejected"):
                letter = getattr(row, side)[0]
                assert getattr(row, f"{side}_source") == ("review" if letter == "r" else "sft")
                assert list(getattr(row, f"{side}_ids")) == [{"a": 10, "b": 11, "r": 12}[letter]]
                expected = {"a": 0.1, "b": 0.2 if prompt % 2 else 0.0, "r": -1.0}[letter]
                assert getattr(row, f"{side}_oracle_reward") == expected


def test_a_label_depends_only_on_its_prompt_and_the_seed(tmp_path) -> None:
    few = label(tmp_path, responses(tmp_path / "few", 50))[1].set_index("pair_id")
    many = label(tmp_path, responses(tmp_path / "many", 90))[1].set_index("pair_id")
    assert (few["chosen"] == many.loc[few.index, "chosen"]).all()
    other = label(tmp_path, responses(tmp_path / "few", 50), seed=1)[1].set_index("pair_id")
    assert list(other.index) == list(few.index)
    assert (other["chosen"] != few["chosen"]).any()
    moved = label(tmp_path, responses(tmp_path / "few", 50), seed_permutation=1)[1].set_index("pair_id")
    assert list(moved.index) != list(few.index)
    assert (moved.loc[few.index, "chosen"] == few["chosen"]).all()


def test_metrics_of_the_labels(tmp_path) -> None:
    metrics, pairs = label(tmp_path, responses(tmp_path / "r", 60))
    flipped = int((pairs["chosen_oracle_reward"] < pairs["rejected_oracle_reward"]).sum())
    assert metrics["flipped_share"].mean == flipped / 60
    assert metrics["mean_oracle_margin"].mean == pytest.approx(0.8 * (60 - 2 * flipped) / 60)
    assert metrics["mean_absolute_oracle_margin"] == pytest.approx(0.8)


def test_pairs_with_equal_sides_are_counted_where_there_are_some(tmp_path) -> None:
    inputs = responses(tmp_path / "r", 60)
    assert "identical_sides" not in label(tmp_path, inputs)[0]
    path = inputs["responses"] / "responses.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:7]:
        row["response_ids_1"] = row["response_ids_0"]
    pq.write_table(pa.Table.from_pylist(rows, schema=RESPONSES), path)
    assert label(tmp_path, inputs, seed=1)[0]["identical_sides"] == 7
    assert "identical_sides" not in label(tmp_path, inputs, tier="low")[0]


def test_some_pairs_must_be_held_out(tmp_path) -> None:
    with refused(ConfigError, "train", "40"):
        label(tmp_path, responses(tmp_path / "r", 40))


def test_reference_values_are_those_of_any_micro_batch(sft, tmp_path) -> None:
    """Up to the last digits, which padding decides; more than the batch is the batch."""
    _, pairs = label(tmp_path, responses(tmp_path / "r", 60), train=20)
    (folder,) = [path.parent for path in tmp_path.glob("*/pairs.parquet")]
    found = []
    for micro in (None, 2, 3, 100):
        out = tmp_path / f"reference{micro}"
        out.mkdir()
        config = ReferenceStage(batch_size=8, micro_batch_size=micro)
        assert reference_logps(config, {"pairs": folder, "reference": sft}, out)["pairs"] == 20
        found.append(pd.read_parquet(out / "reference.parquet"))
    whole = found[0]
    assert list(whole["pair_id"]) == list(pairs["pair_id"][pairs["split"] == "train"])
    for other in found[1:]:
        assert list(other["pair_id"]) == list(whole["pair_id"])
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            assert other[column].to_numpy() == pytest.approx(whole[column].to_numpy(), abs=1e-4)
    assert found[3].equals(whole)
