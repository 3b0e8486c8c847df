"""Token ids that a model has an embedding for, and the refusal of others: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError
from madpo.models.loading import loading
from madpo.models.untrusted import read_object


def configured_rows(path: Path | str) -> int | None:
    """Rows of a model's embedding, by its configuration; None where that does not say.

    Args:
        path: folder or hub id.
    """
    file: Path | str | None = Path(path) / "config.json"
    if isinstance(path, str) and not Path(path).is_dir():
        from transformers.utils import cached_file

        with loading(path):
            file = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not Path(file).is_file():  # the folder of a tokenizer
        return None
    config = read_object(Path(file))
    parts = [config, *(config.get(name) for name in ("text_config", "language_config", "llm_config", "decoder"))]
    found = [part["vocab_size"] for part in parts if isinstance(part, dict) and isinstance(part.get("vocab_size"), int)]
    return found[0] if found else None


def refuse_unknown(ids: Sequence[int], rows: int, place: str, tokenizer: Any = None) -> None:
    """Refuse token ids that a model's embedding has no row for; on a GPU one would end the process.

    Args:
        rows: of the embedding.
        place: of the text, for the sentence.
        tokenizer: to show the token.

    Raises:
        DataError: naming the largest (or a negative) one.
    """
    worst = max(ids, default=0) if min(ids, default=0) >= 0 else min(ids)
    if 0 <= worst < rows:
        return
    token = None if tokenizer is None or worst < 0 else tokenizer.convert_ids_to_tokens(worst)
    raise DataError(
        f"{place}: the token id {worst}{'' if token is None else f' ({token!r})'} is not in the model's embedding, "
        f"which has {rows} rows; use the tokenizer of this model, or give it the rows (model.resize_token_embeddings("
        "len(tokenizer))) and save it"
    )
