"""A tokenizer and a model's configuration with fewer entries: what is kept, and how it is numbered.

A kept entry must still be reached. BPE builds an entry by a chain of merges, and the chain of an entry is the same in
every text where it appears: no merge crosses its ends. So a set that holds, with each entry, all entries of its
chain tokenises every text whose tokens are all kept as before, and other texts into smaller kept pieces. Unigram
takes the best path among its pieces, which stays the best where others are taken away. Bytes or characters are always
kept, so no unknown token appears that was not there.

Also the refusal of token ids that a model has no embedding for. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import ConfigError, RowError, located
from madpo.models.loading import loading
from madpo.models.untrusted import read_object

Spec = dict[str, Any]
"""What ``tokenizer.json`` holds."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_RESERVED = re.compile(r"unused|reserved", re.IGNORECASE)
# Fields of a configuration that hold the id of a token, or several.
_ID = re.compile(r"(^|_)token_(ids?|index)$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_UNTRANSLATED = ("sequence_bias", "forced_decoder_ids", "force_words_ids")


class Choice(NamedTuple):
    """The ids to keep, ascending, and how many of them are kept whatever the corpus says."""

    ids: list[int]
    always: int


@dataclass
class Vocabulary:
    """The entries of a tokenizer, and what each is made of.

    Attributes:
        spec: as in ``tokenizer.json``.
        ids: token -> id, added tokens included.
        tokens: the other way.
        name: what messages begin with.
    """

    spec: Spec
    name: str
    ids: dict[str, int] = field(init=False)
    tokens: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        _refuse_other_kinds(self.spec, self.name)
        model = self.spec["model"]
        self._bpe = model["type"] == "BPE"
        entries = model["vocab"] if self._bpe else {piece: i for i, (piece, _) in enumerate(model["vocab"])}
        self.ids = {**entries, **{added["content"]: added["id"] for added in self.spec["added_tokens"]}}
        self.tokens = {i: token for token, i in self.ids.items()}
        if len(self.tokens) != len(self.ids):
            raise ConfigError(f"{self.name}: two entries of its tokenizer have one id; it is damaged")
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])} if self._bpe else {}

    def choose(
        self, counts: Mapping[int, int], *, size: int | None, named: Sequence[int], drop_reserved: bool = False
    ) -> Choice:
        """The entries to keep: those that must be, and those that the corpus uses most.

        An entry's use is how often the corpus's tokens are it or are built through it, so that taking the most used
        first takes no entry without its chain. Ties go to the shorter entry, then to the lower id.

        Args:
            counts: id -> occurrences in the corpus.
            size: entries to keep at most; None keeps all that are used.
            named: further ids that must stay, such as those in the model's configuration.
            drop_reserved: leave out added tokens that are called unused or reserved, unless the corpus has them, or
                they could not be spelled.

        Raises ConfigError: ``size`` is smaller than what must be kept.
        """
        always = self._always(counts, drop_reserved) | {i for i in named if i in self.tokens}
        for i in list(always):
            always.update(self.ids[part] for part in self.chain(self.tokens[i]))
        always.update(named)
        if size is not None and size < len(always):
            reserved = "" if drop_reserved else ", or --drop_reserved where many of them are reserved"
            raise ConfigError(
                f"size is {size}, but {self.name} has {len(always)} entries that must stay (special and added tokens, "
                f"bytes or characters); give a larger size{reserved}"
            )
        use: dict[int, int] = {}
        for i, count in counts.items():
            if count and i in self.tokens:
                for part in self.chain(self.tokens[i]):
                    use[self.ids[part]] = use.get(self.ids[part], 0) + count
        order = sorted((i for i in use if i not in always), key=lambda i: (-use[i], len(self.tokens[i]), i))
        taken = order if size is None else order[: size - len(always)]
        return Choice(sorted(always.union(taken)), len(always))

    def chain(self, token: str) -> list[str]:
        """The entries that a token is built through, itself last, as often as they are built."""
        if not self._bpe or token not in self.spec["model"]["vocab"]:
            return [token]
        parts, built = list(token), list(token)
        while len(parts) > 1:
            ranked = [(self._ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in self._ranks]
            if not ranked:
                return [token]  # reached whole or not at all: an added token, or a model that ignores merges
            at = min(ranked)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            built.append(parts[at])
        return built

    def _always(self, counts: Mapping[int, int], drop_reserved: bool) -> set[int]:
        model = self.spec["model"]
        kept: set[int] = set()

        def note(i: int) -> int:
            kept.add(i)
            return i

        _with_ids(self.spec["post_processor"], note)
        if self.spec["padding"] is not None:
            kept.add(self.spec["padding"]["pad_id"])
        if self._bpe:
            entries: Mapping[str, int] = model["vocab"]
            kept |= {entries[model["unk_token"]]} if model["unk_token"] in entries else set()
        else:
            entries = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
            kept |= {model["unk_id"]} if model["unk_id"] is not None else set()
            # The lowest score sets the price of an unknown character.
            kept.add(min(range(len(model["vocab"])), key=lambda i: (model["vocab"][i][1], i)))
        kept |= {entries[byte] for byte in _BYTES if byte in entries}
        falls_back = self._bpe and model["byte_fallback"] and all(byte in entries for byte in _BYTES)
        for added in self.spec["added_tokens"]:
            # Without its entry it must still be text in known pieces.
            spelled = falls_back or all(character in entries for character in added["content"])
            reserved = drop_reserved and spelled and _RESERVED.search(added["content"])
            if not (reserved and not counts.get(added["id"])):
                kept.add(added["id"])
        stays = _literals(self.spec) if falls_back else None
        # Characters fall into bytes, but for those that the decoder looks for as characters.
        kept |= {i for token, i in entries.items() if len(token) == 1 and (stays is None or token in stays)}
        return kept

    def trimmed(self, new: Mapping[int, int]) -> Spec:
        """The specification of the smaller tokenizer.

        Args:
            new: old id -> new id of what is kept.
        """
        model = dict(self.spec["model"])
        if self._bpe:
            kept = {token: new[i] for token, i in model["vocab"].items() if i in new}
            model["vocab"] = dict(sorted(kept.items(), key=lambda entry: entry[1]))
            model["merges"] = [
                [a, b] for a, b in map(tuple, model["merges"]) if a in kept and b in kept and a + b in kept
            ]
        else:
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        added = [{**token, "id": new[token["id"]]} for token in self.spec["added_tokens"] if token["id"] in new]
        padding = self.spec["padding"]
        return {
            **self.spec,
            "model": model,
            "added_tokens": sorted(added, key=lambda token: int(token["id"])),
            "post_processor": _with_ids(self.spec["post_processor"], new.__getitem__),
            "padding": None if padding is None else {**padding, "pad_id": new[padding["pad_id"]]},
        }


def _refuse_other_kinds(spec: Spec, name: str) -> None:
    model = spec["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise ConfigError(
            f"{name} has a tokenizer of the kind {model['type']}; only the words of BPE and Unigram fall into smaller "
            "pieces, so only their vocabularies can be trimmed"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ConfigError(
                f"{name} has a BPE tokenizer with {key} = {model[key]!r}; only byte-level BPE, BPE on characters and "
                "Unigram can be trimmed"
            )


def _literals(spec: Spec) -> set[str]:
    """ASCII, and the characters in the texts that normaliser, splitter and decoder look for or write."""

    def within(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield from value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from within(inner)

    return {chr(i) for i in range(128)}.union(
        *(within(spec[part]) for part in ("normalizer", "pre_tokenizer", "decoder"))
    )


def _with_ids(processor: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with other ids: of templates, and of BERT's and RoBERTa's pairs of token and id."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_with_ids(inner, new) for inner in processor["processors"]]
    if processor.get("special_tokens"):
        changed["special_tokens"] = {
            name: {**special, "ids": [new(i) for i in special["ids"]]}
            for name, special in processor["special_tokens"].items()
        }
    for key in ("sep", "cls"):
        if key in processor:
            changed[key] = [processor[key][0], new(processor[key][1])]
    return changed


def named_ids(settings: Any, rows: int) -> set[int]:
    """Ids of tokens that a model's or a generation's configuration names, as far as the model has rows for them."""
    found: set[int] = set()
    if isinstance(settings, list):
        return found.union(*(named_ids(inner, rows) for inner in settings))
    if not isinstance(settings, dict):
        return found
    for key, value in settings.items():
        found |= {i for i in _numbers(value) if 0 <= i < rows} if _is_id(key) else named_ids(value, rows)
    return found


def renumbered(settings: Any, new: Mapping[int, int], rows: int, kept_rows: int) -> Any:
    """A model's or a generation's configuration with the new ids and the new size.

    Args:
        settings: as in ``config.json`` or ``generation_config.json``.
        new: old id -> new id. What is not in it and lies outside the model (-1, say) stays as it is.
        rows, kept_rows: the size before and after; ``vocab_size`` is changed where it is the size before.
    """
    if isinstance(settings, list):
        return [renumbered(inner, new, rows, kept_rows) for inner in settings]
    if not isinstance(settings, dict):
        return settings
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "vocab_size" and value == rows:
            changed[key] = kept_rows
        elif key in _ID_LISTS and isinstance(value, list):
            # What is dropped cannot be written, so it needs no suppressing.
            changed[key] = [_mapped(entry, new) for entry in value if set(_numbers(entry)) <= set(new)]
        else:
            changed[key] = _mapped(value, new) if _is_id(key) else renumbered(value, new, rows, kept_rows)
    return changed


def refuse_untranslated(settings: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration that speaks of ids, or of a second vocabulary, in a way that is not understood here.

    Raises ConfigError.
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            refuse_untranslated(value, name)
        if key in _UNTRANSLATED and value:
            raise ConfigError(f"{name}: {key} in its configuration holds ids of tokens; remove it before trimming")
        if "vocab_size" in str(key) and key != "vocab_size" and isinstance(value, int) and value > 0:
            raise ConfigError(f"{name}: {key} is {value}: the model has a second vocabulary, which cannot be trimmed")


def _is_id(key: Any) -> bool:
    return isinstance(key, str) and _ID.search(key) is not None


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return new.get(value, value)
    if isinstance(value, dict):
        return {key: _mapped(inner, new) for key, inner in value.items()}
    return [_mapped(inner, new) for inner in value] if isinstance(value, list | tuple) else value


def configured_rows(path: Path | str) -> int | None:
    """Rows of a model's embedding, by its configuration; None where that does not say."""
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


def refuse_unknown(ids: Sequence[int], rows: int, place: str | None = None, tokenizer: Any = None) -> None:
    """Refuse token ids that a model's embedding of ``rows`` has no row for (RowError, which says ``place`` if there is
    one); on a GPU one would end the process.
    """
    worst = max(ids, default=0) if min(ids, default=0) >= 0 else min(ids)
    if 0 <= worst < rows:
        return
    token = None if tokenizer is None or worst < 0 else tokenizer.convert_ids_to_tokens(worst)
    with nullcontext() if place is None else located(place):
        raise RowError(
            f"the token id {worst}{'' if token is None else f' ({token!r})'} is not in the model's embedding, which "
            f"has {rows} rows; use the tokenizer of this model, or give it the rows (model.resize_token_embeddings("
            "len(tokenizer))) and save it"
        )
