"""``madpo reward``: a Bradley-Terry reward model from a user's pairs; and any reward model, ready to score pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from madpo.core.errors import ConfigError, DataError, StorageError, first_line, located
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import say
from madpo.core.reports import Report
from madpo.core.statistics import bootstrap_mean, bootstrap_temperature, proportion
from madpo.core.storage import expanded, write_atomically
from madpo.data.findings import Seen
from madpo.data.folds import prompt_key
from madpo.data.messages import Text, answered
from madpo.data.rows import Pair
from madpo.data.templates import Clock, render
from madpo.data.tokens import Encoded, Encoder
from madpo.models.adapters import adapter_text
from madpo.models.load import load_classifier, load_config, load_tokenizer, placed, resolve_model
from madpo.models.loading import loading
from madpo.models.locate import refuse_fetching
from madpo.operations.inputs import Row, load_training, split_by_prompt
from madpo.operations.preconditions import own_reward_model, refuse_other_outputs
from madpo.operations.running import digest, load_report, run_in_folder, toml
from madpo.operations.settings import RewardSettings
from madpo.operations.trackers import reporting_to
from madpo.report.command_pages import REFRESH, write_reward_page, write_training_page
from madpo.report.numbers import against, short
from madpo.rewards.margins import MarginReport, Reliability, inspect
from madpo.rewards.reward_model import PROBE, RewardModel, reward_base
from madpo.runner.operation import operation
from madpo.training.margins import sequences
from madpo.training.settings import RewardModelStage

if TYPE_CHECKING:
    from madpo.training.run import Page

TRAINED_ON = "trained_on.safetensors"
"""In the folder of a reward model: keys of the pairs that decided its weights, or when to stop."""
EVALUATIONS = 10
"""Evaluations on the held-out pairs during the training, where ``eval_every`` does not say otherwise."""

MEMORY_REMEDY = (
    "give a smaller --micro_batch_size, which leaves the result as it is unless "
    "--lora.dropout is on, or a lower --max_length"
)


class RewardReport(Report):
    """What :func:`reward` measured on held-out pairs that neither the weights nor the stopping saw."""

    data: str
    data_digest: str | None
    eval_data: str | None
    model_digest: str | None
    """SHA-256 of the files of the base model; None for one of the hub."""
    dropped: int
    """Pairs of more than max_length tokens that were left out; ``dropped.jsonl`` names them."""
    train_pairs: int
    stopping_pairs: int
    heldout_pairs: int
    steps: int
    """Optimiser steps of the weights that were kept."""
    adapter: str | None
    """Which weights the adapter changes, and their share of the model's parameters."""
    accuracy: Estimate
    """Share of held-out pairs whose chosen side has the higher reward, with its Wilson interval."""
    log_loss: float
    """Nats per pair; a coin's is 0.693."""
    log_loss_interval: Estimate
    """The same with its interval over prompts."""
    temperature: float
    """Divides margins to make them log-odds: ``margin_temperature`` of the losses."""
    temperature_interval: Estimate | None
    """The same with its interval; None where it was not fitted."""
    temperature_reason: str
    calibrated_log_loss: float
    reliability: tuple[Reliability, ...]
    """Up to 10 bins of equally many held-out pairs by |margin| / temperature."""
    date: str | None
    """What the chat template printed as now; None where it prints no date."""
    settings: RewardSettings

    def text(self) -> str:
        """The report for a person."""
        a = self.accuracy
        lines = [
            f"reward model: {self.train_pairs} training pairs, {self.steps} steps kept; "
            f"{self.stopping_pairs} held-out pairs decided when to stop",
            f"accuracy {a.mean:.1%} (95 % interval {a.low:.1%} to {a.high:.1%}) on {self.heldout_pairs} other "
            "held-out pairs",
            f"log loss {self.log_loss:.3f} ({_range(self.log_loss_interval)}), {self.calibrated_log_loss:.3f} at "
            f"temperature {self.temperature:.3g}"
            + (f" ({_range(self.temperature_interval)})" if self.temperature_interval else "")
            + " (a coin: 0.693)",
            f"    the temperature was {self.temperature_reason}",
            "pairs  predicted  observed",
        ]
        lines += [
            f"{b.pairs:5d}  {b.predicted:9.1%}  {b.observed.mean:8.1%} ({b.observed.low:.1%} to {b.observed.high:.1%})"
            for b in self.reliability
        ]
        if self.dropped:
            lines.append(f"longer than max_length: {self.dropped} pairs dropped (dropped.jsonl)")
        return "\n".join(lines)


def _range(e: Estimate) -> str:
    return f"{e.low:.3g} to {e.high:.3g}"


def reward(
    data: str | Path,
    output_dir: str | Path,
    settings: RewardSettings,
    *,
    eval_data: str | Path | None = None,
    overwrite: bool = False,
) -> RewardReport:
    """Train a reward model on preference pairs.

    Writes ``adapter`` (with the head) and ``reward_model.json``, which ``RewardModel.load`` reads, ``log.jsonl``,
    ``report.json`` and ``report.html`` (the curves while it runs, then the reliability). The folder appears when all is
    done; the same call continues an interrupted one.

    Args:
        data: as in :func:`madpo.data.load_preferences`, text or messages.
        output_dir: must not exist, or be empty.
        eval_data: held-out pairs; without it ``settings.eval_share`` of the pairs is held out.
        overwrite: replace what is in ``output_dir``.

    Raises:
        DataError, ConfigError, StorageError: one sentence; nothing is left behind.
    """
    inputs = {"data": data, "eval_data": eval_data, "model": settings.model}
    out = run_in_folder(reward_pairs, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", RewardReport)


@operation("reward_pairs/1")
def reward_pairs(settings: RewardSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`reward`."""
    data, eval_data = str(inputs["data"]), inputs.get("eval_data")
    base, _, train, heldout, too_long, clock = load_training(
        settings, data, eval_data, out, seed=settings.seed, max_length=settings.max_length
    )
    stopping, reported = _halves(heldout, settings, str(eval_data or data))
    seen = {prompt_key(row["prompt"]) for row in train}
    if leaked := sum(prompt_key(row["prompt"]) in seen for row in reported):
        say(f"{leaked} of {len(reported)} held-out pairs have a prompt of the training pairs, which flatters.")
    config = toml({"data": data, **settings.model_dump(mode="json")})

    def page(said: str) -> None:
        write_training_page(
            out / "report.html",
            title=f"Reward model on {settings.model}",
            says=[said],
            numbers={"training pairs": f"{len(train):,}"},
            evaluation={},
            log=out / "log.jsonl",
            settings=config,
            refresh=REFRESH,
        )

    steps = fit(settings, train, stopping, out, page)
    used = (Pair(row["pair_id"], 0, row["prompt"], row["chosen"], row["rejected"], {}) for row in [*train, *stopping])
    remember_pairs(out, used)
    model = RewardModel.load(out)
    measured = _measure(model, reported)
    report = RewardReport(
        data=data,
        data_digest=digest(data),
        eval_data=None if eval_data is None else str(eval_data),
        model_digest=digest(base),
        dropped=len(too_long.dropped),
        train_pairs=len(train),
        stopping_pairs=len(stopping),
        heldout_pairs=len(reported),
        steps=steps,
        adapter=adapter_text(model.model),
        accuracy=measured[0],
        log_loss=measured[1].log_loss,
        log_loss_interval=measured[2],
        temperature=measured[1].margin_temperature,
        temperature_interval=measured[3],
        temperature_reason=measured[1].temperature_reason,
        calibrated_log_loss=measured[1].calibrated_log_loss,
        reliability=measured[1].reliability,
        date=clock.text(),
        settings=settings,
    )
    if too_long.dropped:
        write_atomically(out / "dropped.jsonl", too_long.lines())
    _write_page(report, out)
    report.write(out / "report.json")
    return {"accuracy": report.accuracy, "log_loss": report.log_loss_interval, "steps": steps}


def _write_page(report: RewardReport, out: Path) -> None:
    write_reward_page(
        out / "report.html",
        model=report.settings.model,
        says=[
            f"It orders {short(report.accuracy, 'share')} of {report.heldout_pairs} held-out pairs as labelled: "
            f"{against(report.accuracy, 0.5, 'chance')}.",
            f"The temperature was {report.temperature_reason}.",
        ],
        tiles={
            "accuracy": report.accuracy,
            "log loss": report.log_loss_interval,
            "log loss after the temperature": report.calibrated_log_loss,
            "temperature": report.temperature_interval or f"{report.temperature:.3g}",
            "training pairs": f"{report.train_pairs:,}",
            "held-out pairs": f"{report.heldout_pairs:,}",
        },
        bins=report.reliability,
        log=out / "log.jsonl",
        settings={"data": report.data, "eval_data": report.eval_data, **report.settings.model_dump(mode="json")},
    )


def _halves(heldout: Sequence[Row], settings: RewardSettings, name: str) -> tuple[list[Row], list[Row]]:
    """(decides when to stop, gives the report); no prompt is in both."""
    try:
        reported, stopping = split_by_prompt(heldout, settings.stopping_share, settings.seed + 1, name)
    except DataError:
        raise DataError(
            f"{name}: the held-out pairs have one prompt, but two are needed (one decides when to stop, the other "
            "measures); raise eval_share or give eval_data with more prompts"
        ) from None
    return stopping, reported


def fit(
    settings: RewardSettings, train: Sequence[Row], stopping: Sequence[Row], out: Path, page: Page | None = None
) -> int:
    """Train on rows with token ids; returns the step whose weights were kept.

    Args:
        page: written while it runs.
    """
    from datasets import Dataset

    from madpo.training.reward import fit_reward_model  # which loads TRL: scoring does without both

    planned = ceil(len(train) * settings.optimisation.epochs / settings.optimisation.batch_size)
    stage = RewardModelStage(
        model=settings.model,
        optimisation=settings.optimisation,
        lora=settings.lora,
        eval_every=settings.eval_every or ceil(planned / EVALUATIONS),
        patience=settings.patience,
        pooling=settings.pooling,
        seed=settings.seed,
    )
    pairs, held = (Dataset.from_dict(sequences(rows)) for rows in (train, stopping))
    with reporting_to(settings.report_to):
        return fit_reward_model(stage, pairs, held, out, page=page)


def _measure(model: RewardModel, rows: Sequence[Row]) -> tuple[Estimate, MarginReport, Estimate, Estimate | None]:
    """(accuracy, calibration, log loss, temperature where one was fitted); the last two over prompts."""
    sides = sequences(rows)
    chosen, rejected = model.score_pairs(sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"])
    margins = chosen.astype(np.float64) - rejected
    found, prompts = inspect(margins), [prompt_key(row["prompt"]) for row in rows]
    log_loss = bootstrap_mean(np.logaddexp(0.0, -margins), clusters=prompts)
    temperature = bootstrap_temperature(margins, clusters=prompts) if found.temperature_fitted else None
    return proportion(int((margins > 0).sum()), len(margins)), found, log_loss, temperature


class PairEncoder:
    """Tokenises pairs of text or messages as a reward model was trained.

    Args:
        own: trained by :func:`reward`: then a completion ends with its end token and nothing after it. Other models
            see the chat template's text as it is, as TRL's reward trainer tokenises it.
        clock: the date that the chat template prints; None is now.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, own: bool, clock: Clock | None = None) -> None:
        self.tokenizer, self.own = tokenizer, own
        self.encoder = Encoder(tokenizer, clock)

    def ids(self, pairs: Sequence[Pair], name: str, unit: str) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Token ids of prompt and completion, for both sides, and how many are the prompt's.

        Raises:
            ConfigError: the pairs are messages, and the reward model has no chat template.
            DataError: its chat template refuses a conversation.
        """
        encoded = self.encoder.encode(pairs, lambda number: f"{name}, {unit} {number}")
        for result in encoded:
            if isinstance(result, DataError):
                raise result
        good = [result for result in encoded if isinstance(result, Encoded)]
        if not self.own and pairs and isinstance(pairs[0].prompt, list):
            chosen, rejected = self._rendered(pairs, "chosen"), self._rendered(pairs, "rejected")
        else:
            chosen, rejected = ([[*e.prompt_ids, *getattr(e, s)] for e in good] for s in ("chosen_ids", "rejected_ids"))
        return chosen, rejected, [len(e.prompt_ids) for e in good]

    def _rendered(self, pairs: Sequence[Pair], side: str) -> list[list[int]]:
        texts = []
        for pair in pairs:
            with located(f"pair {pair.pair_id}"):
                texts.append(render(self.tokenizer, pair.prompt + getattr(pair, side), self.encoder.clock))
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


class PairScorer:
    """A reward model that scores pairs of text or messages.

    Args:
        model: scores token ids.
        own: as for :class:`PairEncoder`.
        batch_size: sequences per forward pass; it decides the padding, and so the last digits.
        clock: as for :class:`PairEncoder`.
    """

    def __init__(self, model: RewardModel, *, own: bool, batch_size: int = 16, clock: Clock | None = None) -> None:
        self.model, self.batch_size = model, batch_size
        self.encoder = PairEncoder(model.tokenizer, own=own, clock=clock)

    def score_pairs(self, pairs: Sequence[Pair], name: str, unit: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """(rewards of the chosen, rewards of the rejected), float64, in the reward model's unit.

        Raises:
            ConfigError, DataError: as :meth:`PairEncoder.ids`.
        """
        chosen, rejected = self.model.score_pairs(*self.encoder.ids(pairs, name, unit), self.batch_size)
        return chosen.astype(np.float64), rejected.astype(np.float64)

    def score_responses(self, prompts: Sequence[Text], responses: Sequence[str]) -> NDArray[np.float64]:
        """One reward per response, in the reward model's unit; messages are answered by a message.

        Raises:
            ConfigError, DataError: as :meth:`PairEncoder.ids`.
        """
        said = [answered(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        pairs = [Pair(i, i, prompt, one, one, {}) for i, (prompt, one) in enumerate(zip(prompts, said, strict=True))]
        ids, _, lengths = self.encoder.ids(pairs, "the responses", "response")
        return self.model.score_ids(ids, self.batch_size, prompt_lengths=lengths).astype(np.float64)


def load_scorer(place: str | Path, *, batch_size: int = 16, clock: Clock | None = None) -> PairScorer:
    """The reward model of a folder that :func:`reward` wrote, or a sequence classifier with one output.

    Args:
        place: that folder, another model folder, or a hub id.

    Raises:
        ConfigError: it is no reward model, or cannot be loaded.
    """
    if (folder := own_reward_model(place)) is not None:
        base, _ = reward_base(folder)
        refuse_fetching(base, folder)
        _refuse_other_model(folder, base)
        return PairScorer(RewardModel.load(folder), own=True, batch_size=batch_size, clock=clock)
    base = _classifier(place)
    model, tokenizer = load_classifier(base), load_tokenizer(base)
    return PairScorer(RewardModel(placed(model), tokenizer), own=False, batch_size=batch_size, clock=clock)


def _refuse_other_model(folder: Path, base: Path | str) -> None:
    """Refuse a probe whose model has changed: its weights would be read against other states.

    Raises:
        DataError: naming both.
    """
    about = json.loads((folder / "reward_model.json").read_bytes()).get("probe")
    if about is None or not isinstance(base, Path) or about.get("model_digest") in (None, digest(base)):
        return
    raise DataError(f"{folder} is a probe of another model than {base} holds now; fit it again with --probe {base}")


def load_pair_encoder(place: str | Path, clock: Clock | None = None) -> PairEncoder:
    """How a reward model reads pairs, without its weights: what is no reward model is refused before hours of work.

    Args:
        place: as for :func:`load_scorer`.

    Raises:
        ConfigError, DataError: as :func:`load_scorer`.
    """
    if (folder := own_reward_model(place)) is not None:
        base, _ = reward_base(folder)
        refuse_fetching(base, folder)
        return PairEncoder(load_tokenizer(base), own=True, clock=clock)
    return PairEncoder(load_tokenizer(_classifier(place)), own=False, clock=clock)


def _classifier(place: str | Path) -> Path | str:
    """Where a sequence classifier with one output lies.

    Raises:
        ConfigError: it is something else.
    """
    base = resolve_model(str(place))
    config = load_config(base)
    refuse_other_outputs(place, config.architectures, config.num_labels)
    with loading(place), torch.device("meta"):  # its parts without their weights
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    if not hasattr(model, "score"):
        raise ConfigError(
            f"{place} does not read its score at the last token ({type(model).__name__}); score the pairs with its own "
            "code and give the columns with --score_columns"
        )
    return base


def reward_model_digest(place: str) -> str | None:
    """SHA-256 of a reward model's files (of one of ours, its adapter's or its probe's); None for one of the hub."""
    folder = expanded(place)
    if (folder / PROBE).is_file():
        return digest(folder / PROBE)
    own = (folder / "reward_model.json").is_file()
    return digest(folder / "adapter") if own else digest(folder)


def _keys(pairs: Iterable[Pair]) -> NDArray[np.bytes_]:
    seen = Seen()
    for pair in pairs:
        seen.add(pair)
    return seen.unordered()


def remember_pairs(folder: Path, pairs: Iterable[Pair]) -> None:
    """Keep which pairs a reward model was trained on, as keys, for :func:`seen_pairs`."""
    write_atomically(folder / TRAINED_ON, save({"pairs": _keys(pairs).view(np.uint8).reshape(-1, 16)}))


def seen_pairs(place: str | Path, pairs: Iterable[Pair]) -> int | None:
    """How many of the pairs, in either order, a reward model was trained on; None where its folder does not say."""
    path = expanded(place) / TRAINED_ON
    if not path.is_file():
        return None
    try:
        trained = load_file(path)["pairs"].view("S16").ravel()
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise StorageError(f"{path} is damaged ({first_line(error)}); copy the reward model again") from error
    return int(np.isin(_keys(pairs), trained).sum())
