"""Oracles: rewards of responses that training never sees.

An oracle gives f(p) = 6 (p - 0.5) in [-3, 3], p its probability of a positive text. Its configuration loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from madpo.core.config import Frozen
from madpo.core.custom import NamedClass
from madpo.core.errors import ConfigError, DataError, first_line
from madpo.core.metrics import Metrics
from madpo.core.progress import say
from madpo.core.seeding import rng
from madpo.core.statistics import proportion
from madpo.core.storage import write_atomically
from madpo.data.corpus import IMDB, Corpus, load_corpus, oracle_reviews
from madpo.runner.operation import operation

Floats = NDArray[np.float64]
Scores = Literal["completion", "prompt+completion"]


class RewardFn(Protocol):
    """A reward per response."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Floats: ...


class OracleConfig(Frozen):
    """An oracle is its configuration, with two methods.

    :meth:`fit` prepares it from labelled reviews and leaves what it needs in a folder; :meth:`load` gives the
    :class:`RewardFn`. A subclass has a ``kind`` of its own and overrides what it needs.
    """

    snippet_words: int = Field(default=45, ge=5)
    """Length of the snippets of reviews that its accuracy is also measured on, since responses are short."""

    def fit(self, reviews: pd.DataFrame, short: pd.DataFrame, seed: int, out: Path) -> pd.DataFrame:
        """Prepare the oracle; what ``load`` needs goes into ``out``.

        Args:
            reviews: columns ``text`` and ``positive``, in random order; nothing else of the study uses them.
            short: short labelled texts, same columns.

        Returns:
            The reviews that it was not fitted on, which measure its accuracy.
        """
        return reviews.iloc[:200]

    def load(self, folder: Path) -> RewardFn:
        """The reward function, from what :meth:`fit` left in ``folder``."""
        raise NotImplementedError


class NgramOracle(OracleConfig):
    """Logistic regression on TF-IDF of single words and word pairs, fitted on reviews that nothing else uses."""

    kind: Literal["ngram"] = "ngram"
    scores: Scores = "completion"
    """What is scored: only the response, or prompt and response as one text."""
    reviews: int | None = Field(default=None, ge=10)
    """At most this many reviews are used, drawn at random; None is all that are left."""
    features: int = Field(default=150_000, ge=100)
    """The most frequent words and word pairs are kept."""
    min_count: int = Field(default=3, ge=1)
    """Texts that a word or pair must occur in."""
    inverse_penalty: float = Field(default=4.0, gt=0)
    """sklearn's C: larger fits the labels more closely."""
    heldout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the reviews kept aside to measure the accuracy."""

    def fit(self, reviews: pd.DataFrame, short: pd.DataFrame, seed: int, out: Path) -> pd.DataFrame:
        """Fit on whole reviews, a snippet of each, and short reviews.

        Writes ``vocabulary.json`` and ``oracle.safetensors``.

        Raises:
            ConfigError: too few reviews are left.
        """
        reviews = reviews.iloc[: self.reviews]
        aside = max(1, round(len(reviews) * self.heldout))
        fitted = reviews.iloc[aside:]
        if fitted["positive"].nunique() < 2:
            raise ConfigError(
                f"only {len(fitted)} reviews are left to fit the oracle on; use fewer for the other parts"
            )
        from madpo.rewards.ngrams import fit_ngrams

        say(f"Fitting the oracle on {len(fitted)} reviews, a snippet of each, and {len(short)} short reviews.")
        snippets = [_snippet(text, self.snippet_words, seed, i) for i, text in fitted["text"].items()]
        texts = [*fitted["text"], *snippets, *short["text"]]
        labels = np.concatenate([fitted["positive"], fitted["positive"], short["positive"]]).astype(bool)
        fit_ngrams(self, texts, labels, out)
        return reviews.iloc[:aside]

    def load(self, folder: Path) -> RewardFn:
        """The fitted regression."""
        from madpo.rewards.ngrams import read_ngrams

        return _OracleReward(read_ngrams(folder), self.scores)


class ClassifierOracle(OracleConfig):
    """A sentiment classifier of the hub (or a folder); the paper's oracle."""

    kind: Literal["text-classification"] = "text-classification"
    scores: Scores = "completion"
    """What is scored: only the response, or prompt and response as one text."""
    name: str = "cardiffnlp/twitter-roberta-base-sentiment-latest"
    revision: str | None = None
    """Commit or branch of the hub; None is its main branch."""
    positive_label: str = "positive"
    """p is the probability of this label."""
    heldout: int = Field(default=200, ge=1)
    """Reviews that its accuracy is measured on."""

    def fit(self, reviews: pd.DataFrame, short: pd.DataFrame, seed: int, out: Path) -> pd.DataFrame:
        """It is trained already: only its accuracy is measured."""
        return reviews.iloc[: self.heldout]

    def load(self, folder: Path) -> RewardFn:
        """The classifier, from the hub or a folder."""
        from madpo.rewards.classifier import Classifier

        return _OracleReward(Classifier(self), self.scores)


class CustomOracle(NamedClass, OracleConfig):
    """An :class:`OracleConfig` subclass outside this package, with its parameters; see :mod:`madpo.core.custom`."""

    base = OracleConfig
    kind: Literal["custom"] = "custom"

    @property
    def oracle(self) -> OracleConfig:
        """The oracle itself."""
        own: OracleConfig = self.built()
        return own

    def fit(self, reviews: pd.DataFrame, short: pd.DataFrame, seed: int, out: Path) -> pd.DataFrame:
        """As the class does."""
        return self.oracle.fit(reviews, short, seed, out)

    def load(self, folder: Path) -> RewardFn:
        """As the class does."""
        return self.oracle.load(folder)


Oracle = Annotated[NgramOracle | ClassifierOracle | CustomOracle, Field(discriminator="kind")]


class OracleStage(Frozen):
    """The oracle, and which reviews are the other parts' own."""

    oracle: Oracle
    corpus: Corpus
    sft: int = Field(ge=0)
    """Reviews that SFT takes."""
    prompts: int = Field(ge=0)
    """Reviews that prompts are cut from."""
    seed: int = 0


@operation("fit_oracle/1")
def fit_oracle(config: OracleStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Fit the oracle (or check that it is there) and measure its accuracy on reviews it has not seen.

    Writes ``oracle.json`` and, for the n-gram oracle, ``vocabulary.json`` and ``oracle.safetensors``.
    """
    reviews = oracle_reviews(load_corpus(config.corpus), sft=config.sft, prompts=config.prompts)
    whole = reviews[reviews["source"] == IMDB]
    order = rng(config.seed, "oracle", "split").permutation(len(whole))
    heldout = config.oracle.fit(whole.iloc[order], reviews[reviews["source"] != IMDB], config.seed, out)
    write_atomically(out / "oracle.json", json.dumps(config.oracle.model_dump(mode="json"), indent=1))
    score = load_oracle(out)
    snippets = [_snippet(text, config.oracle.snippet_words, config.seed, i) for i, text in heldout["text"].items()]
    metrics: Metrics = {"heldout_reviews": len(heldout)}
    for name, texts in (("accuracy", list(heldout["text"])), ("snippet_accuracy", snippets)):
        # The labels are of whole texts: there is no prompt to add, whatever `scores` says.
        right = (score([""] * len(texts), texts) > 0) == heldout["positive"].to_numpy()
        metrics[name] = proportion(int(right.sum()), len(texts))
    return metrics


def load_oracle(folder: Path) -> RewardFn:
    """The oracle that :func:`fit_oracle` left in ``folder``.

    Raises:
        DataError: a file of it is missing or damaged.
    """
    try:
        config: OracleConfig = TypeAdapter(Oracle).validate_json((folder / "oracle.json").read_bytes())
        return config.load(folder)
    except ConfigError:
        raise
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"{folder / 'oracle.json'} is no oracle that can be loaded: {reason}") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = first_line(error, 160)
        raise DataError(f"{folder} holds no oracle that can be read ({reason}); delete it and run again") from error


class _OracleReward:
    def __init__(self, positive: Callable[[Sequence[str]], Floats], scores: Scores) -> None:
        self.positive, self.scores = positive, scores

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Floats:
        """f(p) = 6 (p - 0.5), one per response, in [-3, 3]."""
        if len(prompts) != len(completions):
            raise DataError(f"there are {len(prompts)} prompts but {len(completions)} responses; give one of each")
        if not len(completions):
            return np.zeros(0)
        texts = list(completions)
        if self.scores == "prompt+completion":
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return 6.0 * (self.positive(texts) - 0.5)


def _snippet(text: str, words: int, seed: int, review: Any) -> str:
    """``words`` consecutive words from a random place; which place depends only on (seed, review)."""
    parts = text.split()
    last = max(0, len(parts) - words)
    start = int(rng(seed, "oracle", "snippet", int(review)).integers(0, last + 1))
    return " ".join(parts[start : start + words])
