"""``madpo trim-vocab``: a smaller copy of a model, whose vocabulary keeps what a corpus uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from madpo import __version__
from madpo.core.config import Frozen, added
from madpo.core.errors import ConfigError
from madpo.core.metrics import Estimate, Metrics
from madpo.core.reports import Report
from madpo.core.statistics import bootstrap_statistic
from madpo.core.storage import write_atomically
from madpo.data.corpus import IMDB
from madpo.models.load import load_config, load_model, resolve_model
from madpo.models.locate import read_tokenizer
from madpo.models.packaged import quiet_transformers
from madpo.models.vocabulary import Vocabulary, named_ids, refuse_untranslated, renumbered
from madpo.models.weights import pretrained
from madpo.operations.running import digest, load_report, run_in_folder
from madpo.operations.settings import TrimSettings
from madpo.operations.trimming.corpus_tokens import CorpusTokens, encoded, read_corpus
from madpo.operations.trimming.kept_mass import Probe, TextScore, probe, score_texts
from madpo.report.numbers import short
from madpo.report.pages import markdown
from madpo.runner.operation import operation

PROBES, PROBE_TOKENS = 4, 64


class TrimReport(Report):
    """What was kept and what it costs; intervals are over held-out texts."""

    model: str
    model_digest: str | None
    corpus: tuple[str, ...]
    corpus_digests: tuple[str | None, ...]
    eval_data: str | None
    texts: int
    tokens: int
    """Texts and tokens that decided what is kept."""
    entries_before: int
    entries: int
    entries_always: int
    """Kept whatever the corpus says: added and special tokens, bytes or characters."""
    parameters_before: int
    parameters: int
    covered: float
    """Share of the corpus's tokens whose entry is kept."""
    held_out_texts: int
    held_out_covered: float
    tokens_per_word: Estimate
    tokens_per_word_before: Estimate
    kl: Estimate
    """KL(trimmed || original), nats **per token**, on held-out text as the original tokenises it: the mean of
    -log(the original's probability of all kept entries). Exact where all tokens so far are kept."""
    nats_per_byte: Estimate
    nats_per_byte_before: Estimate
    nats_per_byte_difference: Estimate
    """Each reads the same bytes in its own tokens."""
    largest_state_gap: float
    """Between the states of both models on held-out text in kept tokens; 0 is expected."""
    settings: TrimSettings

    def text(self) -> str:
        """The report for a person."""
        lines = [
            f"kept {self.entries:,} of {self.entries_before:,} entries ({self.entries_always:,} of them whatever the "
            f"corpus says), {self.parameters / 1e6:,.1f} of {self.parameters_before / 1e6:,.1f} million parameters",
            f"{self.covered:.2%} of the corpus's {self.tokens:,} tokens are kept entries, and "
            f"{self.held_out_covered:.2%} of those of {self.held_out_texts} held-out texts",
            f"{'on the held-out texts':22}{'original':>26}{'trimmed':>26}",
        ]
        for name, before, after in (
            ("tokens per word", self.tokens_per_word_before, self.tokens_per_word),
            ("nats per byte", self.nats_per_byte_before, self.nats_per_byte),
        ):
            lines.append(f"{name:22}{short(before, digits=4):>26}{short(after, digits=4):>26}")
        lines.append(f"difference in nats per byte: {short(self.nats_per_byte_difference, digits=4)}")
        lines.append(f"KL(trimmed || original): {short(self.kl, digits=4)} nats per token")
        return "\n".join(lines)


def trim_vocab(
    model: str | Path,
    corpus: Sequence[str | Path],
    output_dir: str | Path,
    settings: TrimSettings | None = None,
    *,
    eval_data: str | Path | None = None,
    overwrite: bool = False,
) -> TrimReport:
    """Write a copy of a causal language model whose vocabulary keeps what a corpus uses.

    Its tokenizer writes dropped words in smaller kept pieces. Where all tokens of a text are kept, it gives the same
    tokens, the model the same states, and the same log-probabilities but for the common normaliser. The folder also
    holds ``kept_ids.json`` (for each new id the old one), ``vocabulary.json`` (the report) and a model card. It
    depends on what the corpus holds and not on its order.

    Args:
        model: packaged name, folder or hub id.
        corpus: files or hub data sets, as :func:`madpo.data.texts.read_texts` takes them, or ``imdb``.
        output_dir: must not exist, or be empty.
        eval_data: held-out text; without it ``settings.held_out_share`` of the corpus is held out.
        overwrite: replace a result of madpo in ``output_dir``.

    Raises:
        ConfigError: no causal model, adapter, quantised weights, or a tokenizer that has no smaller pieces.
        DataError, StorageError: one sentence; nothing is left behind.
    """
    if not corpus:
        raise ConfigError("there is no corpus; give at least one file with --corpus")
    inputs = {"model": model, "eval_data": eval_data}
    inputs |= {f"corpus{i}": data for i, data in enumerate(sorted(map(str, corpus)))}
    out = run_in_folder(
        trim_model,
        settings or TrimSettings(),
        inputs,
        output_dir,
        overwrite=overwrite,
        memory="give a smaller --batch_size",
    )
    return load_report(out / "vocabulary.json", TrimReport)


@operation("trim_model/1")
def trim_model(settings: TrimSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`trim_vocab`; the corpus's files are the inputs ``corpus0``, ``corpus1``, ..."""
    model, eval_data = str(inputs["model"]), inputs.get("eval_data")
    names = sorted(str(place) for role, place in inputs.items() if role.startswith("corpus"))
    base = resolve_model(model)
    config = load_config(base)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{model} is an encoder and decoder; only causal language models can be trimmed")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{model} holds quantised weights, whose rows cannot be taken apart; give the plain model")
    refuse_untranslated(config.to_dict(), model)
    digests = tuple(digest(data) for data in names)
    whole = _Whole.load(base, str(model))
    counted = read_corpus(names, whole.tokenizer, settings, eval_data)
    named = sorted(named_ids(whole.settings, whole.rows))
    kept = whole.vocabulary.choose(
        counted.counts, size=settings.size, named=named, drop_reserved=settings.drop_reserved
    )
    new = {old: i for i, old in enumerate(kept.ids)}
    sizes = _write(whole, new, out)
    measured = _measure(base, whole, new, counted, settings.batch_size, out)
    report = TrimReport(
        model=str(model),
        model_digest=digest(base),
        corpus=tuple(names),
        corpus_digests=digests,
        eval_data=None if eval_data is None else str(eval_data),
        texts=counted.texts,
        tokens=counted.tokens,
        entries_before=len(whole.vocabulary.ids),
        entries=len(new),
        entries_always=kept.always,
        parameters_before=sizes[0],
        parameters=sizes[1],
        covered=counted.share(new),
        settings=settings,
        **measured,
    )
    write_atomically(out / "kept_ids.json", json.dumps(kept.ids) + "\n")
    corpus = list(zip(names, digests, strict=True))
    card = markdown("trim_card.md", version=__version__, report=report, corpus=corpus)
    write_atomically(out / "README.md", card)
    report.write(out / "vocabulary.json")
    return {
        "entries": report.entries,
        "entries_before": report.entries_before,
        "parameters": report.parameters,
        "covered": report.covered,
        "kl": report.kl,
        "nats_per_byte": report.nats_per_byte,
        "nats_per_byte_before": report.nats_per_byte_before,
    }


class TrimStage(Frozen):
    """A step of a study: the base model, with the vocabulary that the packaged IMDB reviews use."""

    model: str
    size: int = Field(ge=1)
    """Entries to keep at most."""
    eval_texts: int = added(128, ge=1)
    """Held-out texts to measure on at most."""


@operation("trim_base/1")
def trim_base(config: TrimStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``out/model``; the metrics say what the smaller vocabulary costs on reviews that did not choose it."""
    settings = TrimSettings(size=config.size, eval_texts=config.eval_texts)
    model = out / "model"
    model.mkdir(exist_ok=True)
    return trim_model(settings, {"model": Path(config.model), "corpus0": Path(IMDB)}, model)


class _Whole(NamedTuple):
    """The model as stored, on the CPU, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    vocabulary: Vocabulary
    settings: list[Any]
    """Its configuration, and that of its generation."""
    rows: int

    @classmethod
    def load(cls, base: Path | str, name: str) -> _Whole:
        tokenizer, model = read_tokenizer(base), pretrained(AutoModelForCausalLM, base, dtype="auto")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"{name} has a tokenizer without tokenizer.json; convert it first (tokenizer.save_pretrained)"
            )
        if tokenizer.bos_token is None and tokenizer.eos_token is None:
            raise ConfigError(f"{name} has a tokenizer with neither a beginning nor an end token; set one of them")
        if model.get_output_embeddings() is None:
            raise ConfigError(
                f"{name} has no output head over a vocabulary; only causal language models can be trimmed"
            )
        settings = [model.config.to_dict()]
        if model.generation_config is not None:
            settings.append(model.generation_config.to_dict())
            refuse_untranslated(settings[1], name)
        vocabulary = Vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), name)
        rows = model.get_input_embeddings().weight.shape[0]
        return cls(model, tokenizer, vocabulary, settings, rows)


def _write(whole: _Whole, new: Mapping[int, int], out: Path) -> tuple[int, int]:
    name = whole.vocabulary.name
    with quiet_transformers():
        # The class and its settings stay; what it calls for every text is exchanged.
        whole.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole.vocabulary.trimmed(new)))
        whole.tokenizer.save_pretrained(out)
        expected = {token: new[i] for token, i in whole.vocabulary.ids.items() if i in new}
        if read_tokenizer(out).get_vocab() != expected:
            raise ConfigError(f"{name} is not supported: its trimmed tokenizer is loaded with other token ids")
        before = whole.model.num_parameters()
        rows = [old for old in new if old < whole.rows]
        trim_rows(whole.model, rows)
        whole.model.save_pretrained(out)
    for file in ("config.json", "generation_config.json"):
        if (out / file).is_file():
            settings = renumbered(json.loads((out / file).read_bytes()), new, whole.rows, len(rows))
            write_atomically(out / file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return before, whole.model.num_parameters()


@torch.no_grad()
def trim_rows(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep some rows of a model's embedding, of its head and of the head's bias, in this order."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for module in (embedding, head):
        module.weight = nn.Parameter(module.weight[kept].clone(), requires_grad=module.weight.requires_grad)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(module.bias[kept].clone(), requires_grad=module.bias.requires_grad)
    if tied:
        head.weight = embedding.weight


def _measure(
    base: Path | str, whole: _Whole, new: Mapping[int, int], counted: CorpusTokens, batch_size: int, out: Path
) -> dict[str, Any]:
    tokenizer, rows = whole.tokenizer, [old for old in new if old < whole.rows]
    # A first token needs something before it to be predicted from.
    start = tokenizer.convert_tokens_to_ids(tokenizer.bos_token or tokenizer.eos_token)
    old_start = whole.vocabulary.ids[tokenizer.bos_token or tokenizer.eos_token]
    before = [[old_start, *ids] for ids in counted.held_out_ids]
    after = [[start, *ids] for ids in encoded(tokenizer, counted.held_out)]
    # Of some texts the longest beginning whose tokens are all kept.
    kept_runs = (takewhile(new.__contains__, ids[1 : PROBE_TOKENS + 1]) for ids in before[:PROBES])
    probes = [[old_start, *run] for run in kept_runs]
    original = load_model(base)
    kept = torch.zeros(whole.rows, dtype=torch.bool, device=original.device)
    kept[rows] = True
    scores = [score_texts(original, before, kept, batch_size=batch_size, description="The original")]
    wanted = [probe(original, ids, rows) for ids in probes]
    del original
    trimmed = load_model(out)
    gap = _gap(wanted, [probe(trimmed, [new[i] for i in ids]) for ids in probes], whole.vocabulary.name)
    scores.append(score_texts(trimmed, after, batch_size=batch_size, description="The trimmed model"))
    kept_tokens = sum(i in new for ids in before for i in ids[1:])
    return {
        "held_out_texts": len(before),
        "held_out_covered": kept_tokens / sum(len(ids) - 1 for ids in before),
        "largest_state_gap": gap,
        **_estimates(counted.held_out, *scores),
    }


def _gap(wanted: Sequence[Probe], found: Sequence[Probe], name: str) -> float:
    """The largest difference of states; a model that is another one is not written."""
    states = max(float((a.hidden.float() - b.hidden.float()).abs().max()) for a, b in zip(wanted, found, strict=True))
    logps = max(float((a.logps - b.logps).abs().max()) for a, b in zip(wanted, found, strict=True))
    scale = max(float(a.hidden.float().abs().max()) for a in wanted)
    if not (states <= 0.05 * scale and logps <= 0.5):
        raise ConfigError(
            f"{name}: on kept tokens the trimmed model gives other states (by {states:.2g}) or log-probabilities (by "
            f"{logps:.2g} nats), so it has weights for each word outside embedding and head; it cannot be trimmed yet"
        )
    return states


def _estimates(texts: Sequence[str], before: Sequence[TextScore], after: Sequence[TextScore]) -> dict[str, Estimate]:
    table = np.array(
        [
            (len(text.split()), len(text.encode()), a.tokens, b.tokens, a.nats, b.nats, a.outside)
            for text, a, b in zip(texts, before, after, strict=True)
        ],
        dtype=np.float64,
    )
    words, size, tokens_before, tokens_after, nats_before, nats_after, outside = range(7)

    def ratio(above: Sequence[int], below: int) -> Estimate:
        signs = np.zeros(7)
        signs[list(above)] = (1.0, -1.0)[: len(above)]
        return bootstrap_statistic(table, lambda means: means @ signs / means[:, below])

    return {
        "tokens_per_word_before": ratio([tokens_before], words),
        "tokens_per_word": ratio([tokens_after], words),
        "kl": ratio([outside], tokens_before),
        "nats_per_byte_before": ratio([nats_before], size),
        "nats_per_byte": ratio([nats_after], size),
        "nats_per_byte_difference": ratio([nats_after, nats_before], size),
    }
