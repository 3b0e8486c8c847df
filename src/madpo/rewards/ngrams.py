"""The n-gram oracle's regression: fitting it, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from madpo.core.storage import write_atomically
from madpo.rewards.oracles import Floats, NgramOracle

_TOKEN = r"(?u)\b\w[\w']*\b"  # words with their apostrophe ("didn't"), one letter is enough


def _vectoriser(**settings: Any) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_TOKEN, dtype=np.float64, **settings)


def fit_ngrams(oracle: NgramOracle, texts: Sequence[str], labels: NDArray[np.bool_], out: Path) -> None:
    """Fit on labelled texts; writes ``vocabulary.json`` and ``oracle.safetensors``."""
    vectoriser = _vectoriser(min_df=oracle.min_count, max_features=oracle.features)
    columns = vectoriser.fit_transform(texts)
    model = LogisticRegression(C=oracle.inverse_penalty, solver="lbfgs", tol=1e-6, max_iter=1000).fit(columns, labels)
    terms = sorted(vectoriser.vocabulary_, key=vectoriser.vocabulary_.__getitem__)
    write_atomically(out / "vocabulary.json", json.dumps(terms, ensure_ascii=False))
    arrays = {"idf": vectoriser.idf_, "coefficient": model.coef_[0], "intercept": model.intercept_}
    save_file({k: np.ascontiguousarray(v, dtype=np.float64) for k, v in arrays.items()}, out / "oracle.safetensors")


def read_ngrams(folder: Path) -> Callable[[Sequence[str]], Floats]:
    """The probability that a text is positive, from what :func:`fit_ngrams` left in ``folder``."""
    terms = json.loads((folder / "vocabulary.json").read_bytes())
    arrays = load_file(folder / "oracle.safetensors")
    vectoriser = _vectoriser(vocabulary={term: column for column, term in enumerate(terms)})
    vectoriser.idf_ = arrays["idf"]
    coefficient, intercept = arrays["coefficient"], float(arrays["intercept"][0])

    def positive(texts: Sequence[str]) -> Floats:
        return np.asarray(expit(vectoriser.transform(texts) @ coefficient + intercept), dtype=np.float64)

    return positive
