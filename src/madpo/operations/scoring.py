"""``madpo score``: reward margins as columns, from a reward model, out of fold, from a probe, or from score columns.

Scores are kept in parts as they are made, so that an interrupted run goes on where it stopped and ends with the same
bytes; the rows are put together at the end. The processes of a launch share the parts among them, and the leading one
writes the result: the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from madpo.core import processes
from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, StorageError, located
from madpo.core.layout import Layout
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import bar, say
from madpo.core.statistics import proportion
from madpo.core.storage import storage_errors, write_atomically
from madpo.data import load_preferences
from madpo.data.folds import folds_by_prompt, prompt_key
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
from madpo.operations.score_report import ScoreReport
from madpo.operations.settings import RewardSettings, ScoreSettings
from madpo.rewards.margins import inspect
from madpo.rewards.probe import ProbeReport
from madpo.runner.operation import operation
from madpo.runner.step import Source, Step
from madpo.runner.work import run_step

Reader = Callable[[Sequence[Pair]], dict[str, NDArray[Any]]]
"""Pairs -> ``chosen`` and ``rejected``, rewards or features, and what else is kept with a part."""
PART = 512
"""Pairs per part: what an interruption can cost."""
FEW = 0.05
"""Share of the pairs up to which a temperature is fitted though the reward model was trained on them."""
MEMORY_REMEDY = "give a smaller --batch_size, and run the same command again: parts that are scored stay"


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
    inputs = {
        "data": data,
        "reward_model": settings.reward_model,
        "model": settings.reward.model if settings.reward else settings.probe,
    }
    out = run_in_folder(score_pairs, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", ScoreReport)


@operation("score_pairs/2")
def score_pairs(settings: ScoreSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`score`."""
    data = str(inputs["data"])
    if settings.reward is not None and processes.world_size() > 1:
        raise ConfigError(
            "folds trains its reward models in one process; start it without accelerate launch (with --reward_model, "
            "scoring runs on several)"
        )
    pairs = _read(data, settings.reading)
    there = None
    if settings.score_columns is not None:
        there = _columns(data, settings.reading, settings.score_columns)
    processes.on_main_process(lambda: _rehearse(data, len(pairs), settings, out))
    clock = started_clock(out / CHECKPOINTS, settings.reward.date if settings.reward else None)
    clock.read = processes.on_main_process(lambda: _look(data, settings, clock))
    if settings.probe is not None:
        report = _by_probe(data, pairs, settings, out, clock)
    else:
        if there is not None:
            chosen, rejected = there
        elif settings.folds is not None:
            chosen, rejected = _out_of_fold(data, pairs, settings, out, clock)
        else:
            assert settings.reward_model is not None
            parts, rows = out / CHECKPOINTS / "parts", np.arange(len(pairs))
            chosen, rejected = _in_parts(settings, data, pairs, rows, parts, settings.reward_model, clock)
        report = processes.on_main_process(lambda: _finish(data, pairs, chosen, rejected, settings, out))
    return {"pairs": report["pairs"], "accuracy": Estimate(**report["accuracy"]), "log_loss": report["log_loss"]}


def _read(data: str | Path, columns: Layout) -> list[Pair]:
    """All pairs; a mistake in the last row must show before hours of scoring."""
    stream = PairStream(data, columns)
    pairs = list(stream)
    stream.refuse_no_pair(len(pairs))
    return pairs


def _look(data: str | Path, settings: ScoreSettings, clock: Clock) -> bool:
    """Say what a check would warn of: a row that the chat template refuses must also show before hours of scoring.

    Returns:
        Whether the chat template prints a date.
    """
    encoder, model = None, None
    if settings.reward_model is not None:
        encoder = load_pair_encoder(settings.reward_model, clock).encoder
    elif (model := settings.reward.model if settings.reward else settings.probe) is not None:
        encoder = Encoder(load_tokenizer(resolve_model(model)), clock)
    tell_findings(surveyed(data, encoder, settings.reading), str(data), model, strict=settings.strict)
    tell_date(clock)
    return clock.read


# Scores


def _columns(data: str | Path, columns: Layout, names: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    sides: tuple[list[float], list[float]] = ([], [])
    stream = PairStream(data, columns, every_column=True)
    for pair, raw in stream.with_rows():
        with located(stream.source.at(pair.number)):
            refuse_other_row(raw, names)
            for name, found in zip(names, sides, strict=True):
                found.append(as_number(raw[name], name, from_text=stream.source.columns is not None))
    return np.array(sides[0]), np.array(sides[1])


def _by_probe(data: str, pairs: Sequence[Pair], settings: ScoreSettings, out: Path, clock: Clock) -> Raw:
    """Features of all processes, a probe of the leading one, and the report."""

    def load() -> Reader:
        assert settings.probe is not None
        return feature_reader(settings.probe, data, batch_size=settings.batch_size, clock=clock)

    made = _parts(pairs, np.arange(len(pairs)), out / CHECKPOINTS / "parts", load)

    def finish() -> Raw:
        fitted = fit_from_parts(pairs, map(_part, made), settings, data, out)
        found = fitted.out_of_fold
        return _finish(data, pairs, found.chosen, found.rejected, settings, out, fitted.report)

    return processes.on_main_process(finish)


def _in_parts(
    settings: ScoreSettings,
    name: str,
    pairs: Sequence[Pair],
    rows: NDArray[Any],
    folder: Path,
    model: str | Path,
    clock: Clock,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scores of ``rows`` by a reward model."""

    def load() -> Reader:
        scorer = load_scorer(model, batch_size=settings.batch_size, clock=clock)
        return lambda chunk: dict(zip(("chosen", "rejected"), scorer.score_pairs(chunk, name, "row"), strict=True))

    parts = [_part(path) for path in _parts(pairs, rows, folder, load)]
    return np.concatenate([p["chosen"] for p in parts]), np.concatenate([p["rejected"] for p in parts])


def _parts(pairs: Sequence[Pair], rows: NDArray[Any], folder: Path, load: Callable[[], Reader]) -> list[Path]:
    """Files with the scores of ``PART`` pairs each; one that is there is not computed again."""
    paths = {start: folder / f"part-{start:08d}.safetensors" for start in range(0, len(rows), PART)}

    def missing() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        return [start for start, path in paths.items() if not path.exists()]

    mine = processes.on_main_process(missing)[processes.rank() :: processes.world_size()]

    def compute() -> None:
        read: Reader | None = None
        with bar("Scoring", sum(len(rows[start : start + PART]) for start in mine)) as advance:
            for start in mine:
                chunk = [pairs[int(i)] for i in rows[start : start + PART]]
                read = read or load()
                found = read(chunk)
                _refuse_not_finite(found["chosen"], found["rejected"], chunk)
                write_atomically(paths[start], save(found))
                advance(len(chunk))

    processes.on_every_process(compute)
    return list(paths.values())


def _part(path: Path) -> dict[str, NDArray[Any]]:
    try:
        part: dict[str, NDArray[Any]] = load_file(path)
        return part | {name: part[name] for name in ("chosen", "rejected")}
    except (SafetensorError, KeyError) as error:
        raise StorageError(f"{path} is damaged ({error}); delete the file and run the same command again") from error


def _refuse_not_finite(chosen: NDArray[Any], rejected: NDArray[Any], pairs: Sequence[Pair]) -> None:
    finite = (np.isfinite(chosen) & np.isfinite(rejected)).reshape(len(pairs), -1).all(1)
    if len(bad := np.flatnonzero(~finite)):
        raise DataError(
            f"the reward of pair {pairs[int(bad[0])].pair_id} is not finite; the reward model has diverged, train it "
            "with a lower learning rate"
        )


def _out_of_fold(
    data: str | Path, pairs: Sequence[Pair], settings: ScoreSettings, output_dir: Path, clock: Clock
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each pair's scores by the reward model that saw neither it nor its prompt, not even to stop."""
    assert settings.folds is not None
    assert settings.reward is not None
    fold = np.array(
        folds_by_prompt((prompt_key(p.prompt) for p in pairs), settings.folds, settings.reward.seed, str(data))
    )
    chosen, rejected = np.zeros(len(pairs)), np.zeros(len(pairs))
    changes = {"date": clock.now if clock.read else None, "columns": settings.columns, "layout": settings.layout}
    reward = settings.reward.model_copy(update=changes)
    for k in range(settings.folds):
        folder = output_dir / CHECKPOINTS / "folds" / f"fold-{k}"
        say(f"Fold {k + 1} of {settings.folds}: a reward model on {int((fold != k).sum())} pairs.")
        step = Step(
            f"fold-{k}",
            train_fold,
            FoldSettings(reward=reward, folds=settings.folds, fold=k),
            {"data": Source(str(data), digest(data) or str(data))},
        )
        run_step(step, folder, memory=MEMORY_REMEDY)
        rows = np.flatnonzero(fold == k)
        scores = _in_parts(
            settings, str(data), pairs, rows, output_dir / CHECKPOINTS / "parts" / f"fold-{k}", folder, clock
        )
        chosen[rows], rejected[rows] = scores
    return chosen, rejected


class FoldSettings(Frozen):
    """A reward model on all folds of the pairs but one."""

    reward: RewardSettings
    folds: int
    fold: int
    """The one that it does not see."""


@operation("train_fold/1")
def train_fold(config: FoldSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train a reward model that has seen neither the pairs of one fold nor their prompts."""
    data, settings = str(inputs["data"]), config.reward
    pairs = _read(data, settings.reading)
    fold = folds_by_prompt((prompt_key(p.prompt) for p in pairs), config.folds, settings.seed, data)
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


# Rows


def _finish(
    data: str | Path,
    pairs: Sequence[Pair],
    chosen: NDArray[Any],
    rejected: NDArray[Any],
    settings: ScoreSettings,
    output_dir: Path,
    probe: ProbeReport | None = None,
) -> Raw:
    """Write the rows, and last of all the report."""
    with storage_errors(output_dir):  # the runner moves both files up when both are whole
        difference = chosen - rejected
        seen = None if settings.reward_model is None else seen_pairs(settings.reward_model, pairs)
        trained_on = (seen or 0) > FEW * len(pairs)
        fitted = inspect(difference, margin_temperature=settings.margin_temperature, trained_on=trained_on)
        scale = fitted.margin_temperature if settings.score_columns is not None else 1.0
        margins = difference / scale
        report = ScoreReport(
            file=f"scored.{settings.format}",
            pairs=len(margins),
            accuracy=proportion(int((margins > 0).sum()), len(margins)),
            mean_margin=float(margins.mean()),
            log_loss=fitted.log_loss,
            temperature=fitted.margin_temperature,
            temperature_reason=fitted.temperature_reason,
            calibrated_log_loss=fitted.calibrated_log_loss,
            heldout=settings.folds is not None or settings.probe is not None,
            trained_on=trained_on,
            seen=seen,
            ties=int((margins == 0).sum()),
            data_digest=digest(data),
            reward_model_digest=None if settings.reward_model is None else reward_model_digest(settings.reward_model),
            probe=probe,
        )
        _write(output_dir / report.file, settings, data, margins, chosen, rejected)
        report.write(output_dir / "report.json")
    return report.plain()


def _rehearse(data: str | Path, pairs: int, settings: ScoreSettings, output_dir: Path) -> None:
    """Write the rows with zeros for scores, and remove them: what the format cannot hold must show before scoring."""
    zeros = np.zeros(pairs)
    path = output_dir / ".rehearsal.tmp"
    with storage_errors(output_dir):
        try:
            _write(path, settings, data, zeros, zeros, zeros)
        finally:
            path.unlink(missing_ok=True)


def _write(
    path: Path,
    settings: ScoreSettings,
    data: str | Path,
    margins: NDArray[Any],
    chosen: NDArray[Any],
    rejected: NDArray[Any],
) -> None:
    """The rows with their scores; a row at a time, or a group of rows for Parquet."""
    stream = PairStream(data, settings.reading, every_column=True)
    at = stream.source.at
    rows = (
        (
            at(pair.number),
            {k: v for k, v in raw.items() if k not in stream.texts}
            | pair.row()
            | {
                "reward_margin": float(margins[i]),
                "chosen_score": float(chosen[i]),
                "rejected_score": float(rejected[i]),
            },
        )
        for i, (pair, raw) in enumerate(stream.with_rows())
    )
    if settings.format == "parquet":
        write_parquet(path, rows, 8 * PART)
    else:
        with path.open("wb") as file:
            file.writelines(json_line(place, row) for place, row in rows)
