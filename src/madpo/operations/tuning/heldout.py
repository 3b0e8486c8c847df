"""One trial: a policy for every fold, what it makes of the pairs that it did not see, and its reward at equal KL.

For the reward of samples at equal KL an adapter is made weaker and stronger, and the reward is read off at one KL.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from safetensors.numpy import load_file, save
from torch import nn
from transformers import PreTrainedTokenizerBase

from madpo.core.columns import REFERENCE_COLUMNS
from madpo.core.errors import DivergedError
from madpo.core.statistics import OUT_OF_FOLD, bootstrap_mean, fit_temperature, proportion_of
from madpo.core.storage import write_atomically
from madpo.data.folds import folds_by_prompt, prompt_key, prompt_keys
from madpo.data.templates import Clock
from madpo.models.engine.responses import Response, divergence, respond
from madpo.models.load import load_model
from madpo.operations.inputs import Row, load_training
from madpo.operations.pair_scorer import PairScorer, load_scorer
from madpo.operations.policy import as_dataset, build_trainer, implicit_margins, trainer_arguments
from madpo.operations.preconditions import require_columns
from madpo.operations.responses import ends_of_responses, response_pairs
from madpo.operations.train_settings import TrainSettings
from madpo.operations.tuning.report import Heldout
from madpo.operations.tuning.settings import RewardCriterion, TuneSettings
from madpo.training.nan_guard import drop_unscored
from madpo.training.run import TRACKED, run_training

Floats = NDArray[np.float64]


class RewardCurve(NamedTuple):
    """One fold's policy: rewards and KL per prompt at rising strengths of its adapter.

    Attributes:
        strengths: (points,); 0, the reference, comes first.
        rewards: (points, prompts), in the reward model's unit.
        kl: (points, prompts), nats per response.
    """

    strengths: Floats
    rewards: Floats
    kl: Floats

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> RewardCurve:
        """From the arrays of :meth:`tensors`."""
        return cls(*(np.asarray(tensors[f"curve_{name}"], dtype=np.float64) for name in cls._fields))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, for a file."""
        return {f"curve_{name}": np.ascontiguousarray(value) for name, value in self._asdict().items()}

    def at(self, kl: float) -> Floats | None:
        """Reward per prompt at this KL, between the two strengths around it; None if no strength reaches it.

        By straight lines in the root of the KL, as which reward grows about.
        """
        roots = np.sqrt(self.kl.mean(-1))
        above = np.flatnonzero(roots >= np.sqrt(kl))
        if not len(above):
            return None
        right = int(above[0])
        share = (np.sqrt(kl) - roots[right - 1]) / (roots[right] - roots[right - 1])
        found: Floats = (1 - share) * self.rewards[right - 1] + share * self.rewards[right]
        return found


def reward_curve(
    policy: PeftModel,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scorer: PairScorer,
    rows: Sequence[Row],
    config: RewardCriterion,
) -> RewardCurve:
    """Sample at rising strengths until the KL reaches ``config.kl``; the same random numbers at each.

    Args:
        rows: held-out pairs; each of their first ``config.prompts`` different prompts gets one response a strength.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(prompt_key(row["prompt"]), row)
    chosen = list(first.values())[: config.prompts]
    prompt_ids = [list(row["prompt_ids"]) for row in chosen]
    prompts = [row["prompt"] for row in chosen]
    ends = ends_of_responses(tokenizer, prompts, reference)

    def written(model: nn.Module, name: str) -> list[Response]:
        keys = [int(row["pair_id"]) for row in chosen]
        how = f"{name}: responses"
        return respond(model, tokenizer, prompt_ids, config, keys=keys, draw=0, ends=ends, description=how)[0]

    base = written(reference, "Reference")
    points: list[tuple[float, Floats, Floats]] = []
    for strength in config.strengths:
        with rescale_adapter_scale(policy, strength):
            responses = written(policy, f"Adapter at {strength:g}")
            ids = [response.ids for response in responses]
            size = config.score_batch_size
            kl = divergence(policy, reference, prompt_ids, ids, pad=tokenizer.pad_token_id, batch_size=size)[1]
        pairs = response_pairs(prompts, (r.text for r in responses), (r.text for r in base))
        mine, theirs = scorer.score_pairs(pairs, "held-out prompts", "row")
        if not points:
            points.append((0.0, theirs, np.zeros(len(chosen))))
        points.append((strength, mine, kl))
        if kl.mean() >= config.kl:
            break
    strengths, rewards, kls = zip(*points, strict=True)
    return RewardCurve(np.array(strengths), np.stack(rewards), np.stack(kls))


class Prepared(NamedTuple):
    """The pairs of a study, with everything that all trials share."""

    rows: list[Row]
    """Token ids, margins, and the reference's log-probs, computed once."""
    fold: NDArray[np.int64]
    prompts: NDArray[np.int64]
    """Which prompt a row has: the unit of every interval."""
    tokenizer: PreTrainedTokenizerBase
    base: Path | str
    reference: nn.Module | None
    """Only for the reward at equal KL."""
    scorer: PairScorer | None
    dropped: int
    clock: Clock


class Measured(NamedTuple):
    """:class:`Heldout` with the values behind it, for comparisons pair by pair (or prompt by prompt)."""

    heldout: Heldout
    log_loss: Floats
    right: Floats
    rewards: Floats | None


def prepare(data: str | Path, settings: TuneSettings, folder: Path) -> Prepared:
    """Read the pairs, deal them to folds, and let the reference score them once.

    The reference's columns come from the cache that ``madpo train`` uses, and go there.

    Args:
        folder: of the study; what an interruption must leave.

    Raises:
        DataError, ConfigError: a column that the loss reads is missing, fewer prompts than folds.
    """
    training = settings.training
    args = trainer_arguments(training, folder / "reference", evaluated=False)
    whole = training.model_copy(update={"eval_share": 0.0})
    base, tokenizer, rows, _, too_long, clock = load_training(
        whole, data, None, folder.parent, seed=0, max_length=args.max_length
    )
    require_columns(rows, settings.loss, str(data))
    # As the trainer will: an empty prompt, without a token that begins every text, leaves an end token unpredicted.
    scored = set(drop_unscored(as_dataset(rows), args, str(data))["pair_id"])
    rows = [row for row in rows if row["pair_id"] in scored]
    keys = prompt_keys([row["prompt"] for row in rows])
    fold = np.array(folds_by_prompt(keys, settings.folds, settings.search_seed, str(data)))
    trainer = build_trainer(training, args, base, tokenizer, rows, [])
    found = trainer.train_dataset
    if REFERENCE_COLUMNS[0] in found.column_names:
        for name in REFERENCE_COLUMNS:
            rows = [{**row, name: value} for row, value in zip(rows, found[name], strict=True)]
    _free(trainer)
    shutil.rmtree(folder / "reference", ignore_errors=True)
    place = {key: i for i, key in enumerate(sorted(set(keys)))}
    reward = settings.reward
    return Prepared(
        rows=rows,
        fold=fold,
        prompts=np.array([place[key] for key in keys]),
        tokenizer=tokenizer,
        base=base,
        reference=None if reward is None else load_model(base),
        scorer=None
        if reward is None
        else load_scorer(reward.reward_model, batch_size=reward.score_batch_size, clock=clock),
        dropped=len(too_long.dropped),
        clock=clock,
    )


def measure(prepared: Prepared, settings: TuneSettings, training: TrainSettings, folder: Path) -> Measured:
    """For each fold, train on the others and measure on it; a fold that is there is not trained again.

    Args:
        folder: of all trials; each setting has its own in it, so that an equal one is not measured twice.
    """
    place = folder / identity(training)
    margins = np.zeros(len(prepared.rows))
    curves = []
    for k in range(settings.folds):
        path = place / f"fold-{k}.safetensors"
        if not path.exists():
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(_fold(prepared, settings, training, k, place / f"training-{k}")))
            if (tracked := place / f"training-{k}" / TRACKED).is_dir():
                shutil.copytree(tracked, folder.parent / TRACKED / f"{place.name}-fold-{k}", dirs_exist_ok=True)
            shutil.rmtree(place / f"training-{k}", ignore_errors=True)
        found = load_file(path)
        margins[prepared.fold == k] = found["margins"]
        if settings.reward is not None:
            curves.append(RewardCurve.of(found))
    return summarised(margins, prepared.prompts, curves, settings)


def identity(training: TrainSettings) -> str:
    """A name for a setting: equal settings have the same."""
    text = json.dumps(training.model_dump(mode="json"), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fold(
    prepared: Prepared, settings: TuneSettings, training: TrainSettings, k: int, out: Path
) -> dict[str, NDArray[Any]]:
    out.mkdir(parents=True, exist_ok=True)
    args = trainer_arguments(training, out, evaluated=False)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, fold in zip(prepared.rows, prepared.fold, strict=True):
        sides[int(fold == k)].append(row)
    train, heldout = sides
    trainer = build_trainer(training, args, prepared.base, prepared.tokenizer, train, [])
    run_training(trainer, training, f"{training.loss.kind}, fold {k + 1} of {settings.folds}", out)
    found: dict[str, NDArray[Any]] = {"margins": implicit_margins(trainer, as_dataset(heldout))}
    if bad := int((~np.isfinite(found["margins"])).sum()):
        raise DivergedError(
            f"the margins of {bad} of {len(heldout)} held-out pairs are not finite after the training of fold {k + 1}: "
            "the last step was too large; lower the learning rate or max_grad_norm"
        )
    if settings.reward is not None:
        assert prepared.reference is not None
        assert prepared.scorer is not None
        how = (prepared.reference, prepared.tokenizer, prepared.scorer, heldout, settings.reward)
        found |= reward_curve(trainer.model, *how).tensors()
    _free(trainer)
    return found


def summarised(
    margins: Floats, prompts: NDArray[np.int64], curves: Sequence[RewardCurve], settings: TuneSettings
) -> Measured:
    """The criteria, from the held-out margins (and reward curves) of all folds together."""
    seed, how = settings.search_seed, dict[str, Any](clusters=prompts, inflation=OUT_OF_FOLD)
    temperature = fit_temperature(margins)[0]
    right = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    calibrated = np.logaddexp(0.0, -margins / temperature)
    rewards = kl = None
    if curves:
        assert settings.reward is not None
        found = [curve.at(settings.reward.kl) for curve in curves]
        reached = [values for values in found if values is not None]
        rewards = np.concatenate(reached) if len(reached) == len(found) else None
        kl = bootstrap_mean(np.concatenate([curve.kl[-1] for curve in curves]), seed=seed)
    heldout = Heldout(
        accuracy=proportion_of(right, **how),
        log_loss=bootstrap_mean(calibrated, seed=seed, lowest=0.0, **how),
        temperature=temperature,
        raw_log_loss=bootstrap_mean(np.logaddexp(0.0, -margins), seed=seed, lowest=0.0, **how),
        mean_margin=float(margins.mean()),
        reward=None if rewards is None else bootstrap_mean(rewards, seed=seed),
        kl=kl,
    )
    return Measured(heldout, calibrated, right, rewards)


def _free(trainer: Any) -> None:
    """Let go of a model before the next is loaded."""
    trainer.model = trainer.model_wrapped = trainer.optimizer = None
    gc.collect()
