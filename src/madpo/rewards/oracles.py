"""Rewards of responses: an oracle, which training never sees, and the trained reward model.

Both are a :class:`RewardFn`. An oracle gives f(p) = 6 (p - 0.5) in [-3, 3], p its probability of a positive text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from peft import PeftModel
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, first_line
from madpo.core.metrics import Metrics
from madpo.core.progress import say
from madpo.core.seeding import rng
from madpo.core.statistics import proportion
from madpo.core.storage import write_atomically
from madpo.data.corpus import IMDB, Corpus, load_corpus, oracle_reviews
from madpo.models.engine.batches import padded, padded_batches, similar_lengths
from madpo.models.engine.logprobs import completion_states, hidden_states
from madpo.models.hyperparameters import Pooling
from madpo.models.load import load_classifier, load_tokenizer, resolve_model
from madpo.runner.operation import operation

Floats = NDArray[np.float64]
Scores = Literal["completion", "prompt+completion"]
_TOKEN = r"(?u)\b\w[\w']*\b"  # words with their apostrophe ("didn't"), one letter is enough


class RewardFn(Protocol):
    """A reward per response."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Floats: ...


class NgramOracle(Frozen):
    """Logistic regression on TF-IDF of single words and word pairs, fitted on reviews that nothing else uses."""

    kind: Literal["ngram"] = "ngram"
    scores: Scores = "completion"
    """What is scored: the response alone, or prompt and response as one text."""
    reviews: int | None = Field(default=None, ge=10)
    """At most this many reviews are used, drawn at random; None is all that are left."""
    snippet_words: int = Field(default=45, ge=5)
    """Length of the snippets of reviews that are fitted on beside whole reviews, since responses are short."""
    features: int = Field(default=150_000, ge=100)
    """The most frequent words and word pairs are kept."""
    min_count: int = Field(default=3, ge=1)
    """Texts that a word or pair must occur in."""
    inverse_penalty: float = Field(default=4.0, gt=0)
    """sklearn's C: larger fits the labels more closely."""
    heldout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the reviews kept aside to measure the accuracy."""


class ClassifierOracle(Frozen):
    """A sentiment classifier of the hub (or a folder); the paper's oracle."""

    kind: Literal["text-classification"] = "text-classification"
    scores: Scores = "completion"
    """What is scored: the response alone, or prompt and response as one text."""
    name: str = "cardiffnlp/twitter-roberta-base-sentiment-latest"
    revision: str | None = None
    """Commit or branch of the hub; None is its main branch."""
    positive_label: str = "positive"
    """p is the probability of this label."""
    snippet_words: int = Field(default=45, ge=5)
    """Length of the snippets that its accuracy is also measured on."""
    heldout: int = Field(default=200, ge=1)
    """Reviews that its accuracy is measured on."""


Oracle = Annotated[NgramOracle | ClassifierOracle, Field(discriminator="kind")]


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
    cap = config.oracle.reviews if isinstance(config.oracle, NgramOracle) else config.oracle.heldout
    whole = whole.iloc[order[:cap]]
    heldout = whole
    if isinstance(config.oracle, NgramOracle):
        aside = max(1, round(len(whole) * config.oracle.heldout))
        heldout, fitted = whole.iloc[:aside], whole.iloc[aside:]
        if fitted["positive"].nunique() < 2:
            raise ConfigError(
                f"only {len(fitted)} reviews are left to fit the oracle on; use fewer for the other parts"
            )
        _fit_ngrams(config, fitted, reviews[reviews["source"] != IMDB], out)
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
        config: NgramOracle | ClassifierOracle = TypeAdapter(Oracle).validate_json(
            (folder / "oracle.json").read_bytes()
        )
        positive = _ngram_reader(folder) if isinstance(config, NgramOracle) else _Classifier(config)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = first_line(error, 160)
        raise DataError(f"{folder} holds no oracle that can be read ({reason}); delete it and run again") from error
    return _OracleReward(positive, config.scores)


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


def _vectoriser(**settings: Any) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_TOKEN, dtype=np.float64, **settings)


def _fit_ngrams(config: OracleStage, reviews: pd.DataFrame, short: pd.DataFrame, out: Path) -> None:
    oracle = config.oracle
    assert isinstance(oracle, NgramOracle)
    say(f"Fitting the oracle on {len(reviews)} reviews, a snippet of each, and {len(short)} short reviews.")
    snippets = [_snippet(text, oracle.snippet_words, config.seed, i) for i, text in reviews["text"].items()]
    texts = [*reviews["text"], *snippets, *short["text"]]
    labels = np.concatenate([reviews["positive"], reviews["positive"], short["positive"]]).astype(bool)
    vectoriser = _vectoriser(min_df=oracle.min_count, max_features=oracle.features)
    columns = vectoriser.fit_transform(texts)
    model = LogisticRegression(C=oracle.inverse_penalty, solver="lbfgs", tol=1e-6, max_iter=1000).fit(columns, labels)
    terms = sorted(vectoriser.vocabulary_, key=vectoriser.vocabulary_.__getitem__)
    write_atomically(out / "vocabulary.json", json.dumps(terms, ensure_ascii=False))
    arrays = {"idf": vectoriser.idf_, "coefficient": model.coef_[0], "intercept": model.intercept_}
    save_file({k: np.ascontiguousarray(v, dtype=np.float64) for k, v in arrays.items()}, out / "oracle.safetensors")


def _snippet(text: str, words: int, seed: int, review: Any) -> str:
    """``words`` consecutive words from a random place; which place depends on (seed, review) alone."""
    parts = text.split()
    last = max(0, len(parts) - words)
    start = int(rng(seed, "oracle", "snippet", int(review)).integers(0, last + 1))
    return " ".join(parts[start : start + words])


def _ngram_reader(folder: Path) -> Callable[[Sequence[str]], Floats]:
    terms = json.loads((folder / "vocabulary.json").read_bytes())
    arrays = load_file(folder / "oracle.safetensors")
    vectoriser = _vectoriser(vocabulary={term: column for column, term in enumerate(terms)})
    vectoriser.idf_ = arrays["idf"]
    coefficient, intercept = arrays["coefficient"], float(arrays["intercept"][0])

    def positive(texts: Sequence[str]) -> Floats:
        return np.asarray(expit(vectoriser.transform(texts) @ coefficient + intercept), dtype=np.float64)

    return positive


class _Classifier:
    def __init__(self, config: ClassifierOracle) -> None:
        place = resolve_model(config.name)
        model = load_classifier(place, revision=config.revision, dtype=torch.float32)
        self.tokenizer = load_tokenizer(place)
        labels = {str(label).lower(): index for index, label in model.config.id2label.items()}
        if config.positive_label.lower() not in labels:
            raise ConfigError(
                f"positive_label is {config.positive_label!r}, but {config.name} has the labels {', '.join(labels)}"
            )
        self.column = int(labels[config.positive_label.lower()])
        self.model = placed(model)
        # RoBERTa counts positions from 2, and some tokenizers do not know their model's limit.
        self.limit = min(self.tokenizer.model_max_length, model.config.max_position_embeddings - 2)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Floats:
        sequences = [self.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"] for text in texts]
        found = np.zeros(len(texts))
        for rows, ids, mask in padded_batches(sequences, 32, self.tokenizer.pad_token_id, self.model, "Oracle"):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            found[rows] = logits.double().softmax(-1)[:, self.column].cpu().numpy()
        return found


def reward_base(folder: Path) -> tuple[Path | str, Pooling]:
    """Where the base of a trained reward model lies, and which states its head reads.

    Raises:
        DataError: ``folder`` holds none.
    """
    try:
        told = json.loads((folder / "reward_model.json").read_bytes())
        beside = told.get("base_folder")  # of a step before the training, seen from here
        base = resolve_model(str(told["base"]) if beside is None else str(folder.absolute() / str(beside)))
        pooling: Pooling = TypeAdapter(Pooling).validate_python(told.get("pooling", "last"))
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{folder} holds no reward model ({error}); train one, or delete it and run again") from error
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise DataError(f"{folder} has no adapter/adapter_config.json; delete the folder and train again")
    return base, pooling


class RewardModel:
    """A trained Bradley-Terry reward model: differences of its rewards are log-odds.

    Args:
        model: a sequence classifier with one output, with or without a PEFT adapter.
        tokenizer: for text; ids are scored as they are.
        pooling: which states the head reads; see :func:`pooled`.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, pooling: Pooling = "last") -> None:
        self.model, self.pooling = model, pooling
        self.inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.tokenizer = tokenizer
        self.inner.score.float()

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """From ``reward_model.json`` (the base model's name, the pooling) and ``adapter`` (with the head).

        Raises:
            DataError: ``folder`` holds none.
        """
        base, pooling = reward_base(folder)
        model = load_classifier(base, num_labels=1, adapter=folder / "adapter")
        return cls(placed(model), load_tokenizer(base), pooling)

    @torch.inference_mode()
    def score_ids(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 16,
        *,
        prompt_lengths: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """One reward per token sequence (prompt and response), in the order given.

        Real tokens are found by the attention mask: a padding token that doubles as end token, as many tokenizers have
        it, moves nothing.

        Args:
            prompt_lengths: tokens of each sequence that are its prompt's; without it a mean is over all tokens.

        Raises:
            DataError: an empty sequence.
        """
        lengths = np.zeros(len(sequences), dtype=np.int64) if prompt_lengths is None else np.asarray(prompt_lengths)
        found = np.zeros(len(sequences), dtype=np.float32)
        pad = self.tokenizer.pad_token_id
        for rows, ids, mask in padded_batches(sequences, batch_size, pad, self.inner, "Rewards"):
            states = hidden_states(self.inner, ids, mask)
            state = pooled(states, mask, self.pooling, torch.as_tensor(lengths[rows], device=states.device))
            found[rows] = self.inner.score(state).squeeze(-1).cpu().numpy()
        return found

    @torch.inference_mode()
    def score_pairs(
        self,
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        batch_size: int = 16,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rewards of both sides of pairs; as :meth:`score_ids`, but the prompt of a pair is computed once.

        Equal sides get equal rewards, to the last bit.

        Args:
            chosen, rejected: token ids of prompt and completion.
            prompt_lengths: tokens of both sides of a pair that are the prompt's.
            batch_size: sequences at once, two a pair.

        Raises:
            DataError: an empty sequence.
        """
        sides = [chosen, rejected]
        # By the longer side; a pair without tokens on one side has no reward to compare.
        sizes = [max(len(c), len(r)) if len(c) and len(r) else 0 for c, r in zip(chosen, rejected, strict=True)]
        lengths = np.asarray(prompt_lengths, dtype=np.int64)
        found = np.zeros((2, len(sizes)), dtype=np.float32)
        for rows in similar_lengths(sizes, max(1, batch_size // 2), "Rewards"):
            sequences = [side[row] for side in sides for row in rows]
            ids, mask = padded(sequences, self.tokenizer.pad_token_id, self.inner)
            prompts = torch.as_tensor(lengths[rows], device=ids.device).repeat(2)
            states = completion_states(self.inner, ids, mask, completion_tokens(mask, prompts))
            state = pooled(states, mask, self.pooling, prompts)
            found[:, rows] = self.inner.score(state).view(2, len(rows)).cpu().numpy()
        # Rows of one product may differ in the last bits, and rounding must not decide between equal texts.
        equal = [list(c) == list(r) for c, r in zip(chosen, rejected, strict=True)]
        found[1, equal] = found[0, equal]
        return found[0], found[1]

    def score_responses(
        self, prompt_ids: Iterable[Sequence[int]], response_ids: Iterable[Sequence[int]]
    ) -> NDArray[np.float32]:
        """One reward per response, given in token ids beside its prompt's.

        Raises:
            DataError: a prompt and a response that have no tokens together.
        """
        sequences, lengths = [], []
        for prompt, response in zip(prompt_ids, response_ids, strict=True):
            sequences.append([*map(int, prompt), *map(int, response)])
            lengths.append(len(prompt))
        return self.score_ids(sequences, prompt_lengths=lengths)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Floats:
        """The same for text; prompt and response are tokenised each for itself, as in training."""
        if len(prompts) != len(completions):
            raise DataError(f"there are {len(prompts)} prompts but {len(completions)} responses; give one of each")
        before = []
        for prompt in prompts:
            ids = list(self.tokenizer(prompt)["input_ids"])
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # the response goes on from here
            before.append(ids)
        after = [self.tokenizer(completion, add_special_tokens=False)["input_ids"] for completion in completions]
        return self.score_responses(before, after).astype(np.float64)


def pooled(
    states: Float[Tensor, "rows length hidden"],
    mask: Int[Tensor, "rows length"],
    pooling: Pooling,
    prompt_lengths: Int[Tensor, " rows"],
) -> Float[Tensor, "rows hidden"]:
    """The state that a reward is read from, in float32; rows are padded on the right.

    ``last`` is the state of the last real token, the convention of sequence classifiers. ``mean`` is the mean over the
    completion's tokens. A base model's last state speaks of the next word; what a text is like is spread over its
    tokens, so a few hundred pairs teach a mean what they do not teach a last state (docs/log.md).
    """
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(-1) - 1].float()
    inside = completion_tokens(mask, prompt_lengths)
    total = states.float().masked_fill(~inside[..., None], 0.0).sum(1)
    return total / inside.sum(-1, keepdim=True)


def completion_tokens(
    mask: Int[Tensor, "rows length"], prompt_lengths: Int[Tensor, " rows"]
) -> Bool[Tensor, "rows length"]:
    """Which tokens are read; rows are padded on the right. A completion without tokens is read at the last one."""
    last = mask.sum(-1) - 1
    begin = torch.minimum(prompt_lengths.to(last), last)
    return mask.bool() & (torch.arange(mask.shape[-1], device=mask.device) >= begin[:, None])


def placed(model: nn.Module) -> Any:
    """The model ready to score: on the GPU where there is one, dropout off."""
    return (model.to("cuda") if torch.cuda.is_available() else model).eval()
