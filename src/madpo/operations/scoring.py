"""``madpo score``: reward margins as columns, from a reward model, out of fold, from a probe, or from score columns.

Scores are kept in parts as they are made, so that an interrupted run goes on where it stopped and ends with the same
bytes; the rows are put together at the end. The processes of a launch share the parts among them, and the leading one
writes the result: the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from madpo.core import processes
from madpo.core.columns import MARGIN, SCORES
from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, StorageError, located
from madpo.core.layout import Layout
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import bar, say
from madpo.core.reports import Report
from madpo.core.statistics import OUT_OF_FOLD, proportion_of
from madpo.core.storage import storage_errors, write_atomically
from madpo.data import load_preferences
from madpo.data.arrange import scores_of_sides
from madpo.data.folds import PromptNumbers, folds_by_prompt, prompt_key, prompt_keys
from madpo.data.load import PairStream, surveyed
from madpo.data.raw import as_number
from madpo.data.rows import Pair
from madpo.data.templates import Clock
from madpo.data.tokens import Encoder
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.load import load_tokenizer, resolve_model
from madpo.operations.inputs import split_by_prompt, started_clock, tell_date, tell_findings
from madpo.operations.pair_scorer import load_pair_encoder, load_scorer, reward_model_digest, seen_pairs
from madpo.operations.preconditions import refuse_other_row
from madpo.operations.probing import feature_reader, fit_from_parts
from madpo.operations.reward_model import fit
from madpo.operations.row_files import Raw, json_line, write_parquet
from madpo.operations.running import digest, load_report, run_in_folder
from madpo.operations.settings import RewardSettings, ScoreSettings
from madpo.report.numbers import against
from madpo.rewards.margins import inspect
from madpo.rewards.probe import ProbeReport
from madpo.runner.operation import operation
from madpo.runner.step import Source, Step
from madpo.runner.work import run_step

Reader = Callable[[Sequence[Pair]], dict[str, NDArray[Any]]]
"""Pairs -> ``chosen`` and ``rejected``, rewards or features, and what else is kept with a part."""
Scores = tuple[NDArray[Any], NDArray[Any]]
"""Those of the chosen and those of the rejected."""
SIDES = ("chosen", "rejected")
PART = 512
"""Pairs per part: what an interruption can cost."""
FEW = 0.05
"""Share of the pairs up to which a temperature is fitted though the reward model was trained on them, and up to which
margins of 0 are no sign of one that learned nothing."""
MEMORY_REMEDY = (
    "give a smaller --batch_size, and run the same command again: parts that are scored stay; leave out a pair that is "
    "too long by itself"
)


class ScoreReport(Report):
    """What :func:`score` did."""

    file: str
    pairs: int
    accuracy: Estimate
    """Share of pairs with a margin above 0, with its interval over prompts."""
    mean_margin: float
    log_loss: float
    temperature: float
    """With score_columns, what the margins were divided by; else what would make them log-odds on these labels."""
    temperature_reason: str
    calibrated_log_loss: float
    heldout: bool
    """True if no margin comes from a model that was trained on its pair (known for ``folds`` and ``probe`` only)."""
    data_digest: str | None = None
    reward_model_digest: str | None = None
    """SHA-256 of what was scored, and by what; None for what is on the hub."""
    ties: int = 0
    """Margins of exactly 0: of a reward model that has learned nothing, or scores that are equal."""
    trained_on: bool = False
    """True if the reward model was trained on more than 5 % of these pairs, so that nothing here is calibrated."""
    seen: int | None = None
    """Pairs, in either order, that the reward model was trained on; None where it does not say."""
    probe: ProbeReport | None = None
    """With ``probe``: what it is, and how good out of fold."""

    def text(self) -> str:
        """The report for a person."""
        a = self.accuracy
        lines = [
            f"{self.pairs} pairs scored: the chosen side has the higher score in {a.mean:.1%} (95 % interval "
            f"{a.low:.1%} to {a.high:.1%}), {against(a, 0.5, 'chance')}; mean margin {self.mean_margin:.3f}",
            f"log loss {self.log_loss:.3f}, {self.calibrated_log_loss:.3f} at temperature {self.temperature:.3g} "
            f"(a coin: 0.693); the temperature was {self.temperature_reason}",
        ]
        if self.ties:
            count = "1 margin is" if self.ties == 1 else f"{self.ties} margins are"
            lines.append(f"{count} exactly 0: both sides are equal, or their scores are")
        if self.ties > FEW * self.pairs:
            lines.append("a reward model that learned nothing gives such margins; give it more pairs or more epochs")
        if self.probe is not None:
            lines += self.probe.fit()
        if self.seen:
            lines.append(
                f"the reward model was trained on {self.seen} of these pairs: all of this flatters it; --probe and "
                "--folds do not"
            )
        elif self.seen is None and not self.heldout:
            lines.append("if the reward model was trained on these pairs, all of this flatters it; --folds does not")
        return "\n".join(lines)


def score(data: str | Path, output_dir: str | Path, settings: ScoreSettings, *, overwrite: bool = False) -> ScoreReport:
    """Write the pairs with ``reward_margin``, ``chosen_score`` and ``rejected_score``.

    ``output_dir`` gets ``scored.jsonl`` (or ``scored.parquet``), ``report.json`` and ``record.json``. Columns that
    the data have keep their place; prompt, chosen and rejected have our names. Run again after an interruption, it
    continues; run again when finished, it gives the report.

    Args:
        data: as in :func:`madpo.data.load_preferences`.
        overwrite: discard what is in ``output_dir``.

    Raises:
        DataError, ConfigError: as the name says, before anything is scored.
        StorageError: ``output_dir`` holds something else, or scores made with other settings.
    """
    model = settings.reward.model if settings.reward else settings.probe
    inputs = {"data": data, "reward_model": settings.reward_model, "model": model}
    out = run_in_folder(score_pairs, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", ScoreReport)


@operation("score_pairs/5")
def score_pairs(settings: ScoreSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`score`."""
    data = str(inputs["data"])
    if settings.reward is not None and processes.world_size() > 1:
        raise ConfigError(
            "folds trains its reward models in one process; start it without accelerate launch (with --reward_model, "
            "scoring runs on several)"
        )
    pairs = _read(data, settings.reading)
    scores = None if settings.score_columns is None else _columns(data, settings.reading, settings.score_columns)
    processes.on_main_process(lambda: _rehearse(data, len(pairs), settings, out))
    clock = started_clock(out / CHECKPOINTS, settings.reward.date if settings.reward else None)
    clock.read = processes.on_main_process(lambda: _look(data, settings, clock))
    work, every, made = _Scoring(settings, data, pairs, out, clock), np.arange(len(pairs)), list[Path]()
    if (model := settings.probe) is not None:
        size = settings.batch_size
        made = work.parts(every, "parts", lambda: feature_reader(model, data, batch_size=size, clock=clock))
    elif settings.reward_model is not None:
        scores = work.by_model(settings.reward_model, every, "parts")
    elif settings.reward is not None:
        scores = work.by_folds(settings.reward)

    def finish() -> Raw:
        if scores is not None:
            return work.finish(*scores)
        fitted = fit_from_parts(pairs, map(_part, made), settings, data, out)
        return work.finish(fitted.out_of_fold.chosen, fitted.out_of_fold.rejected, fitted.report)

    report = processes.on_main_process(finish)
    return {"pairs": report["pairs"], "accuracy": Estimate(**report["accuracy"]), "log_loss": report["log_loss"]}


def _read(data: str | Path, columns: Layout) -> list[Pair]:
    """All pairs; a mistake in the last row must show before hours of scoring."""
    stream = PairStream(data, columns)
    pairs = list(stream)
    stream.refuse_no_pair(len(pairs))
    return pairs


def _look(data: str | Path, settings: ScoreSettings, clock: Clock) -> bool:
    """Say what a check would warn of, such as rows that the chat template refuses; whether this prints a date."""
    encoder, model = None, None
    if settings.reward_model is not None:
        encoder = load_pair_encoder(settings.reward_model, clock).encoder
    elif (model := settings.reward.model if settings.reward else settings.probe) is not None:
        encoder = Encoder(load_tokenizer(resolve_model(model)), clock)
    reading = settings.reading
    tell_findings(surveyed(data, encoder, reading), str(data), model, reading=reading, strict=settings.strict)
    tell_date(clock)
    return clock.read


def _columns(data: str, columns: Layout, names: tuple[str, str]) -> Scores:
    sides: tuple[list[float], list[float]] = ([], [])
    stream = PairStream(data, columns, every_column=True)
    for pair, raw in stream.with_rows():
        if stream.layout and (remedy := scores_of_sides(stream.layout, names)):
            raise ConfigError(f"{data}: score_columns are {' and '.join(names)}: {remedy}")
        with located(stream.source.at(pair.number)):
            refuse_other_row(raw, names)
            for name, found in zip(names, sides, strict=True):
                found.append(as_number(raw[name], name, from_text=stream.source.columns is not None))
    return np.array(sides[0]), np.array(sides[1])


class _Scoring(NamedTuple):
    settings: ScoreSettings
    data: str
    pairs: list[Pair]
    out: Path
    clock: Clock

    def by_model(self, model: str | Path, rows: NDArray[Any], folder: str) -> Scores:
        """Scores of ``rows`` by a reward model."""

        def load() -> Reader:
            scorer = load_scorer(model, batch_size=self.settings.batch_size, clock=self.clock)
            return lambda chunk: dict(zip(SIDES, scorer.score_pairs(chunk, self.data, "row"), strict=True))

        parts = [_part(path) for path in self.parts(rows, folder, load)]
        return np.concatenate([p["chosen"] for p in parts]), np.concatenate([p["rejected"] for p in parts])

    def by_folds(self, settings: RewardSettings) -> Scores:
        """Each pair's scores by the reward model that saw neither it nor its prompt, not even to stop."""
        folds, read = self.settings.folds or 0, self.settings
        keys = prompt_keys([p.prompt for p in self.pairs])
        fold = np.array(folds_by_prompt(keys, folds, settings.seed, self.data))
        chosen, rejected = np.zeros(len(fold)), np.zeros(len(fold))
        changes = {"date": self.clock.now if self.clock.read else None, "columns": read.columns, "layout": read.layout}
        reward, source = settings.model_copy(update=changes), Source(self.data, digest(self.data) or self.data)
        for k in range(folds):
            folder = self.out / CHECKPOINTS / "folds" / f"fold-{k}"
            say(f"Fold {k + 1} of {folds}: a reward model on {int((fold != k).sum())} pairs.")
            step = Step(folder.name, train_fold, FoldStage(reward=reward, folds=folds, fold=k), {"data": source})
            run_step(step, folder, memory=MEMORY_REMEDY)
            rows = np.flatnonzero(fold == k)
            chosen[rows], rejected[rows] = self.by_model(folder, rows, f"parts/{folder.name}")
        return chosen, rejected

    def parts(self, rows: NDArray[Any], name: str, load: Callable[[], Reader]) -> list[Path]:
        """Files with the scores of ``PART`` pairs each; one that is there is not computed again."""
        folder = self.out / CHECKPOINTS / name
        paths = {start: folder / f"part-{start:08d}.safetensors" for start in range(0, len(rows), PART)}

        def missing() -> list[int]:
            folder.mkdir(parents=True, exist_ok=True)
            return [start for start, path in paths.items() if not path.exists()]

        mine = processes.on_main_process(missing)[processes.rank() :: processes.world_size()]

        def compute() -> None:
            read: Reader | None = None
            with bar("Scoring", sum(len(rows[start : start + PART]) for start in mine)) as advance:
                for start in mine:
                    chunk = [self.pairs[int(i)] for i in rows[start : start + PART]]
                    read = read or load()
                    found = read(chunk)
                    finite = (np.isfinite(found["chosen"]) & np.isfinite(found["rejected"])).reshape(len(chunk), -1)
                    if len(bad := np.flatnonzero(~finite.all(1))):
                        raise DataError(
                            f"the reward of pair {chunk[int(bad[0])].pair_id} is not finite; the reward model has "
                            "diverged, train it with a lower learning rate"
                        )
                    write_atomically(paths[start], save(found))
                    advance(len(chunk))

        processes.on_every_process(compute)
        return list(paths.values())

    def finish(self, chosen: NDArray[Any], rejected: NDArray[Any], probe: ProbeReport | None = None) -> Raw:
        """Write the rows, and last of all the report."""
        settings, difference = self.settings, chosen - rejected
        with storage_errors(self.out):  # the runner moves both files up when both are whole
            seen = None if settings.reward_model is None else seen_pairs(settings.reward_model, self.pairs)
            trained_on = (seen or 0) > FEW * len(self.pairs)
            prompts = [*map(PromptNumbers(), (pair.prompt for pair in self.pairs))]
            how: Any = {"margin_temperature": settings.margin_temperature, "trained_on": trained_on}
            fitted = inspect(difference, prompts=prompts, **how)
            out_of_fold = settings.folds is not None or settings.probe is not None
            margins = difference / (fitted.margin_temperature if settings.score_columns is not None else 1.0)
            report = ScoreReport(
                file=f"scored.{settings.format}",
                pairs=len(margins),
                accuracy=proportion_of(margins > 0, prompts, inflation=OUT_OF_FOLD if out_of_fold else 1.0),
                mean_margin=float(margins.mean()),
                log_loss=fitted.log_loss,
                temperature=fitted.margin_temperature,
                temperature_reason=fitted.temperature_reason,
                calibrated_log_loss=fitted.calibrated_log_loss,
                heldout=out_of_fold,
                trained_on=trained_on,
                seen=seen,
                ties=int((margins == 0).sum()),
                data_digest=digest(self.data),
                reward_model_digest=settings.reward_model and reward_model_digest(settings.reward_model),
                probe=probe,
            )
            _write(self.out / report.file, settings, self.data, (margins, chosen, rejected))
            report.write(self.out / "report.json")
        return report.plain()


def _part(path: Path) -> dict[str, NDArray[Any]]:
    try:
        part: dict[str, NDArray[Any]] = load_file(path)
        return part | {name: part[name] for name in SIDES}
    except (SafetensorError, KeyError) as error:
        raise StorageError(f"{path} is damaged ({error}); delete the file and run the same command again") from error


class FoldStage(Frozen):
    """A reward model on all folds of the pairs but one."""

    reward: RewardSettings
    folds: int
    fold: int
    """The one that it does not see."""


@operation("train_fold/2")
def train_fold(config: FoldStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train a reward model that has seen neither the pairs of one fold nor their prompts."""
    data, settings = str(inputs["data"]), config.reward
    pairs = _read(data, settings.reading)
    fold = folds_by_prompt(prompt_keys([p.prompt for p in pairs]), config.folds, settings.seed, data)
    seen = {prompt_key(pair.prompt) for pair, own in zip(pairs, fold, strict=True) if own != config.fold}
    rows = load_preferences(
        data,
        columns=settings.reading,
        tokenizer=load_tokenizer(resolve_model(settings.model)),
        max_length=settings.max_length,
        truncation=settings.truncation,
        clock=Clock(settings.date),
    )
    rows = [row for row in rows if prompt_key(row["prompt"]) in seen]
    train, stopping = split_by_prompt(rows, settings.eval_share, settings.seed, data)
    return {"steps": fit(settings, train, stopping, out)}


def _rehearse(data: str, pairs: int, settings: ScoreSettings, output_dir: Path) -> None:
    """Write the rows with zeros for scores, and remove them: what the format cannot hold must show before scoring."""
    path = output_dir / ".rehearsal.tmp"
    with storage_errors(output_dir):
        try:
            _write(path, settings, data, [np.zeros(pairs)] * 3)
        finally:
            path.unlink(missing_ok=True)


def _write(path: Path, settings: ScoreSettings, data: str, numbers: Sequence[NDArray[Any]]) -> None:
    """The rows with their margins and scores; a row at a time, or a group of rows for Parquet."""
    stream = PairStream(data, settings.reading, every_column=True)
    columns = dict(zip((MARGIN, *SCORES), numbers, strict=True))
    rows = (
        (
            stream.source.at(pair.number),
            {k: v for k, v in raw.items() if k not in stream.texts}
            | pair.row()
            | {name: float(values[i]) for name, values in columns.items()},
        )
        for i, (pair, raw) in enumerate(stream.with_rows())
    )
    if settings.format == "parquet":
        write_parquet(path, rows, 8 * PART)
    else:
        with path.open("wb") as file:
            file.writelines(json_line(place, row) for place, row in rows)
