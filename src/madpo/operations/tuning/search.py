"""``madpo tune``: Optuna proposes settings, cross-validation measures them, and the best becomes a TOML."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from madpo.core.config import part
from madpo.core.errors import ConfigError, DivergedError
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import say
from madpo.core.seeding import derived_seed
from madpo.core.statistics import OUT_OF_FOLD, bootstrap_mean
from madpo.core.storage import expanded, write_atomically
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.operations.policy import MEMORY_REMEDY
from madpo.operations.running import digest, load_report, run_in_folder
from madpo.operations.train_report import resolved
from madpo.operations.tuning.heldout import Measured, Prepared, identity, measure, prepare
from madpo.operations.tuning.report import Diverged, Trial, TuneReport, in_words, write_search
from madpo.operations.tuning.settings import Criterion, TuneSettings, Value, grid_size, with_values
from madpo.runner.operation import operation
from madpo.runner.record import load_record

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
SEARCH = "search"
"""Journal and measured folds of a finished search, from which a search with more trials goes on."""


def tune(data: str | Path, output_dir: str | Path, settings: TuneSettings, *, overwrite: bool = False) -> TuneReport:
    """Choose a training's parameters by cross-validation on preference pairs.

    Every trial trains one policy per fold, on the other folds, from the same start and with the same random numbers,
    and is measured by the implicit rewards of the pairs held out. The reference scores the pairs once for all trials.

    ``output_dir`` gets ``trials.csv`` and ``tune.html`` (after every trial), and at the end ``chosen.toml``, which
    ``madpo train`` takes, and ``report.json``. Run again after an interruption, it continues: with the fold, the trial
    and the study that it was in, and to the same result. With more ``trials`` a finished study goes on.

    Args:
        data: as in :func:`madpo.data.load_preferences`, with the columns that the loss reads. Keep the pairs that
            will measure the final policy out of it.
        overwrite: discard what is in ``output_dir``.

    Raises:
        DataError, ConfigError: one sentence, before anything is trained.
        StorageError: ``output_dir`` holds something else, or a study with other settings.
    """
    out = expanded(output_dir)
    inputs = {
        "data": data,
        "model": settings.model,
        "reward_model": settings.reward.reward_model if settings.reward else None,
    }
    record = load_record(out)
    config = TuneConfig.model_validate(dict(settings))
    if record is not None and record.config.get("trials") != settings.trials and not overwrite:
        # A finished search goes on with more trials; everything else must be equal.
        before = config.model_copy(update={"trials": record.config.get("trials")})
        run_in_folder(tune_pairs, before, inputs, out, memory=MEMORY_REMEDY)
        config, overwrite = config.model_copy(update={"earlier": out}), True
    run_in_folder(tune_pairs, config, inputs, out, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", TuneReport)


class TuneConfig(TuneSettings):
    """:class:`TuneSettings` as the operation takes them."""

    earlier: Path | None = Field(default=None, exclude=True)
    """A finished search whose trials are kept."""


@operation("tune_pairs/6")
def tune_pairs(settings: TuneConfig, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`tune`."""
    data = str(inputs["data"])
    state = out / CHECKPOINTS
    if settings.earlier is not None and not state.exists():
        shutil.copytree(settings.earlier / SEARCH, state)
    state.mkdir(exist_ok=True)
    prepared = prepare(data, settings, state)
    tune_settings = part(settings, TuneSettings)
    report = _search(digest(data), out, tune_settings, prepared)
    chosen = with_values(settings.training, report.best().values)
    write_atomically(out / "chosen.toml", resolved(data, chosen, prepared.clock))
    report.write(out / "report.json")
    shutil.copytree(state, out / SEARCH, dirs_exist_ok=True)
    best = report.best().heldout
    return {"trials": len(report.trials), "log_loss": best.log_loss, "accuracy": best.accuracy}


def _search(data_digest: str | None, output_dir: Path, settings: TuneSettings, prepared: Prepared) -> TuneReport:
    folder = output_dir / CHECKPOINTS / "folds"
    baseline = None
    if settings.baseline:
        say("Plain DPO, to compare with.")
        baseline = measure(prepared, settings, settings.baseline_training, folder)
    study, space = open_study(output_dir / CHECKPOINTS / JOURNAL, settings), settings.searched
    found: dict[int, tuple[Trial, Measured]] = {}

    def look(number: int, values: dict[str, Value]) -> Measured:
        measured = measure(prepared, settings, with_values(settings.training, values), folder)
        found[number] = (Trial(number=number, values=values, heldout=measured.heldout), measured)
        return measured

    def written() -> TuneReport:
        report = _report(data_digest, settings, prepared, found, _diverged(study, settings), baseline)
        write_search(output_dir, report)
        return report

    for trial in _trials(study, settings):
        values = {key: dimension.suggested(key, trial) for key, dimension in space.items()}
        say(f"Trial {trial.number}: {in_words(values)}")
        try:
            measured = look(trial.number, values)
        except DivergedError as error:  # for good: a run after this one does not try it again
            gc.collect()
            training_folder = folder / identity(with_values(settings.training, values))
            for training in training_folder.glob("training-*"):  # its checkpoints lead nowhere
                shutil.rmtree(training, ignore_errors=True)
            reason = str(error).split("; the last checkpoint, ")[0]
            say(f"Trial {trial.number} diverged: {reason}")
            _end(study, trial, None, diverged=reason)
            continue
        # For people who open the journal with Optuna's own tools.
        shown = {name: getattr(measured.heldout, name).mean for name in ("accuracy", "log_loss", "raw_log_loss")}
        _end(study, trial, _value(measured, settings.criterion), **shown)
        if any(_value(one, settings.criterion) is not None for _, one in found.values()):
            written()
    for trial in study.trials:  # those of a run before this one
        if trial.number not in found and trial.state.name in ("COMPLETE", "PRUNED"):
            look(trial.number, {key: trial.params[key] for key in space})
    return written()


def _end(study: optuna.Study, trial: optuna.Trial, value: float | None, **attributes: Any) -> None:
    """Tell Optuna what came out; without a value nothing was measured, or the training diverged."""
    from optuna import samplers
    from optuna.trial import TrialState

    for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
    # A grid's sampler stops the study after its last value, which only Optuna's own loop allows.
    study.sampler = samplers.RandomSampler(seed=0)
    without = TrialState.FAIL if "diverged" in attributes else TrialState.PRUNED
    study.tell(trial, value, state=without if value is None else None)


def _diverged(study: optuna.Study, settings: TuneSettings) -> tuple[Diverged, ...]:
    return tuple(
        Diverged(
            number=trial.number,
            values={key: trial.params[key] for key in settings.searched if key in trial.params},
            reason=trial.user_attrs.get("diverged", "it failed"),
        )
        for trial in study.trials
        if trial.state.name == "FAIL"
    )


def open_study(path: Path, settings: TuneSettings) -> optuna.Study:
    """The study in a journal file, which a kill leaves whole but for its last line."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A kill may have cut its last line and left a lock; the folder's own lock is ours.
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name="madpo",
        direction="minimize" if settings.criterion == "log_loss" else "maximize",
        load_if_exists=True,
    )


def _trials(study: optuna.Study, settings: TuneSettings) -> Any:
    """Trials to run: first one that a kill cut off, then new ones until there are enough."""
    from optuna.trial import Trial as OptunaTrial
    from optuna.trial import TrialState

    wanted = min(settings.trials, grid_size(settings.searched)) if _is_grid(settings) else settings.trials
    while True:
        cut_off = [trial for trial in study.trials if trial.state is TrialState.RUNNING]
        if cut_off:
            yield OptunaTrial(study, cut_off[0]._trial_id)
        elif len(study.trials) < wanted:
            # Seeded by the trial's number: an interruption does not change what is proposed next.
            study.sampler = _sampler(settings, len(study.trials))
            yield study.ask()
        else:
            return


def _is_grid(settings: TuneSettings) -> bool:
    small = grid_size(settings.searched) <= settings.trials
    return settings.sampler == "grid" or (settings.sampler == "auto" and small)


def _sampler(settings: TuneSettings, number: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if _is_grid(settings):
        grid = {key: list(d.values or ()) for key, d in settings.searched.items()}
        return samplers.GridSampler(grid, seed=derived_seed(settings.search_seed, "tune", "grid") % 2**32)
    seed = derived_seed(settings.search_seed, "tune", number) % 2**32
    if settings.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed, n_startup_trials=max(4, settings.trials // 4))


def _value(measured: Measured, criterion: Criterion) -> float | None:
    found: Estimate | None = getattr(measured.heldout, criterion)
    return None if found is None else found.mean


def _report(
    data_digest: str | None,
    settings: TuneSettings,
    prepared: Prepared,
    found: Mapping[int, tuple[Trial, Measured]],
    diverged: tuple[Diverged, ...],
    baseline: Measured | None,
) -> TuneReport:
    sign = -1 if settings.criterion == "log_loss" else 1
    ranked = {n: _value(measured, settings.criterion) for n, (_, measured) in found.items()}
    reached = {n: sign * value for n, value in ranked.items() if value is not None}
    if diverged and not found:
        raise DivergedError(
            f"all {len(diverged)} trials diverged, the first since {diverged[0].reason}; search smaller learning rates "
            "or a weaker loss, in another output_dir or with --overwrite"
        )
    if not reached:
        raise ConfigError(
            f"no policy reached a KL of {settings.reward.kl if settings.reward else 0:g} nats; lower reward.kl, raise "
            "the strengths, or train with a larger learning rate"
        )
    # Of equal ones the first: a tie says nothing for the later trial.
    chosen = max(reached, key=lambda n: (reached[n], -n))
    return TuneReport(
        data_digest=data_digest,
        pairs=len(prepared.rows),
        dropped=prepared.dropped,
        criterion=settings.criterion,
        trials=tuple(found[n][0] for n in sorted(found)),
        baseline=None if baseline is None else Trial(number=-1, values={}, heldout=baseline.heldout),
        chosen=chosen,
        advantage=None if baseline is None else _advantage(found[chosen][1], baseline, prepared, settings),
        settings=settings,
        diverged=diverged,
    )


def _advantage(best: Measured, baseline: Measured, prepared: Prepared, settings: TuneSettings) -> Estimate | None:
    """Best less baseline on the same pairs, so that above 0 is better."""
    if settings.criterion == "reward":
        if best.rewards is None or baseline.rewards is None:
            return None
        return bootstrap_mean(best.rewards - baseline.rewards, seed=settings.search_seed)
    gain = best.right - baseline.right if settings.criterion == "accuracy" else baseline.log_loss - best.log_loss
    how: dict[str, Any] = {"seed": settings.search_seed, "clusters": prepared.prompts, "inflation": OUT_OF_FOLD}
    return bootstrap_mean(np.asarray(gain), **how)
