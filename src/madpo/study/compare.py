"""``madpo compare``: the study on a user's own pairs. Does it help on these data, and which loss?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from madpo.core.config import Seed, changed, part
from madpo.core.errors import printable
from madpo.core.options import Cli
from madpo.core.suggestions import did_you_mean
from madpo.losses import Loss
from madpo.models.hyperparameters import AdapterTraining, LoRA, Optimisation
from madpo.operations.settings import (
    PROBE,
    AdapterOptimisation,
    EvaluationSettings,
    JudgedPairs,
    StudyDecoding,
    Training,
)
from madpo.training.settings import AutoSettings

if TYPE_CHECKING:
    from madpo.runner.executors import Executor
    from madpo.runner.run import RunResult
    from madpo.runner.step import Step
    from madpo.study.experiment import RewardModelSettings


class AutoLoss(AutoSettings):
    """What ``madpo train`` does with no loss named."""

    kind: Literal["auto"] = "auto"


class CompareSettings(JudgedPairs, Training):
    """Which losses are compared on a user's own pairs, and how they are judged."""

    losses: tuple[str | dict[str, Any], ...] = ("dpo", "madpo", "auto")
    """Kinds of losses, classes of your own (my_file.py:MyLoss), or tables with their settings such as
    '{ kind = "madpo", tau = 4 }'. DPO is always among them: others are compared with it. ``madpo train --help`` lists
    the kinds."""
    betas: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Each loss is trained at each of them. None is 0.1, and with a judge 0.03, 0.1 and 0.3, since rewards compare at
    equal KL only. Losses compare at equal beta at 0.1 or, where it is not given, at the first: add further ones at the
    end, so that finished trainings keep their names."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """One training of every loss and beta for each of them."""
    other_learning_rates: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Learning rates besides ``learning_rate`` that each loss is trained at too. None trains DPO at half of it, since
    a policy that is trained less can have more reward at its distance from the reference: a loss is called better than
    DPO only where it is above DPO at each rate. [] is none."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the choice of the prompts that are held out, and of those for a judge ``probe``."""
    max_length: int | None = Field(default=1024, ge=2)
    """Tokens of prompt and completion; None is no limit."""
    optimisation: Annotated[AdapterOptimisation, Cli(short=True)] = AdapterOptimisation()
    lora: LoRA = LoRA()
    responses: Annotated[StudyDecoding, Cli(short=True)] = StudyDecoding()
    evaluation: Annotated[EvaluationSettings, Cli(short=True)] = EvaluationSettings()
    report_to: tuple[str, ...] = Field(default=(), exclude=True)
    """Trackers that are installed, such as tensorboard, trackio or wandb: every training is a run of them."""

    @model_validator(mode="after")
    def _check(self) -> CompareSettings:
        for name in ("seeds", "betas", "other_learning_rates"):
            values = getattr(self, name)
            if values is not None and (len(set(values)) != len(values) or not (values or name.startswith("other"))):
                raise ValueError(f"{name} must hold one value or more, each once")
        if (rate := self.optimisation.learning_rate) in (self.other_learning_rates or ()):
            raise ValueError(f"other_learning_rates has {rate:g}, which every loss is trained at anyway; remove it")
        judged = [*changed(self.responses), *changed(self.evaluation)] if self.judge is None else []
        unused = [*judged, *({"judge_share"} & set(changed(self) if self.judge != PROBE else ()))]
        if unused:
            needed = "probe" if unused == ["judge_share"] else "REWARD_MODEL or --judge probe"
            raise ValueError(f"nothing reads {', '.join(unused)} here; add --judge {needed}, or leave it out")
        for loss in self.losses:
            known_loss(loss)
        return self

    @property
    def policy(self) -> AdapterTraining:
        """What every loss's training shares."""
        return AdapterTraining(optimisation=part(self.optimisation, Optimisation), lora=self.lora)

    @property
    def reward_model(self) -> RewardModelSettings:
        """Where margins come from, if the pairs have none."""
        from madpo.study.experiment import RewardModelSettings

        return RewardModelSettings(kind="probe")


_KINDS = {"auto": AutoLoss, **{kind.model_fields["kind"].default: kind for kind in get_args(get_args(Loss)[0])}}


def known_loss(given: str | Mapping[str, Any]) -> Any:
    """A loss by its kind, a class of the user's by its place ("my_file.py:Mine"), or a table of its settings.

    Raises:
        ValueError: there is none such.
    """
    if isinstance(given, str):
        given = {"kind": "custom", "target": given} if ":" in given else {"kind": given}
    table = dict(given)
    kind = str(table.get("kind"))
    if kind not in _KINDS:
        near = did_you_mean(kind, _KINDS) or f"; there are {', '.join(_KINDS)}"
        raise ValueError(f"losses has {kind!r}, which is no kind of loss{near}")
    try:
        return TypeAdapter(_KINDS[kind]).validate_python(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, [kind, *first["loc"]]))
        value = f" = {first['input']!r}" if first["loc"] else ""  # else it is the whole table
        raise ValueError(f"losses: {where}{value}: {first['msg'].removeprefix('Value error, ')}") from None


def compare(
    data: str | Path,
    output_dir: str | Path,
    settings: CompareSettings,
    *,
    eval_data: str | Path | None = None,
    only: Sequence[str] = (),
    dry_run: bool = False,
    executor: AbstractContextManager[Executor] | None = None,
    upload: str | None = None,
) -> RunResult:
    """Train every loss on a user's pairs, measure the policies, and write the report; or continue.

    Policies are compared by held-out pairs (accuracy, and log loss of the implicit reward after one temperature) and,
    with a judge, by the reward of their responses to held-out prompts against their KL to the reference.

    Args:
        data: as in :func:`madpo.data.load_preferences`, text or messages.
        output_dir: the folder of the run; finished steps in it are kept.
        eval_data: held-out pairs; without it ``settings.eval_share`` of the pairs is held out.
        only, dry_run, executor, upload: as in :func:`madpo.study.experiment.run_experiment`.

    Raises:
        ConfigError, DataError: a mistake in settings, pairs or judge, before any model loads.
    """
    from madpo.report.methods import OWN
    from madpo.study.experiment import run_steps

    about: dict[str, Any] = {"title": f"Preference losses on {printable(Path(data).name)}"}

    def build() -> list[Step]:
        from madpo.study.own_graph import OwnPairsGraph

        graph = OwnPairsGraph(settings, str(data), None if eval_data is None else str(eval_data))
        given = {"data": str(data), **settings.model_dump(mode="json"), "judge_saw_pairs": graph.judge_saw_pairs}
        # All read the same margins, so that no name needs a word for them.
        rows = [{"key": row.key, **row.model_dump(mode="json"), "margins": "column"} for row in graph.rows]
        about.update(experiment=given, rows=rows)
        return graph.build([OWN])

    how: dict[str, Any] = {"only": only, "dry_run": dry_run, "executor": executor, "upload": upload}
    return run_steps(build, Path(output_dir), about, report_to=settings.report_to, **how)
