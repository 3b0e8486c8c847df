"""``madpo reward``, ``score``, ``train``, ``tune`` and ``evaluate``: what needs preference data and a model.

Each refuses mistakes before the libraries load, calls its operation, and prints the report. The way of ``madpo train``
from here: ``train`` in :mod:`madpo.operations.policy` runs ``train_pairs`` in the folder of the result (with no loss
named, :mod:`madpo.operations.auto` runs it twice), and that builds and runs ``PreferenceTrainer`` of
:mod:`madpo.training.preference`. Pairs come from ``load_training`` in :mod:`madpo.operations.inputs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, model_validator

from madpo.commands.from_settings import Configurable
from madpo.commands.shared import Data, DryRun, HeldOut, Result, finished, loading
from madpo.core.config import part
from madpo.core.options import Cli
from madpo.core.progress import show
from madpo.core.storage import expanded
from madpo.operations.settings import EvaluateSettings, RewardSettings, ScoreSettings
from madpo.operations.train_settings import TrainSettings
from madpo.operations.tuning.settings import TuneSettings


class Reward(Configurable, RewardSettings, HeldOut, Result, Data):
    pass


def reward(options: Reward) -> int:
    """Train a reward model and print its report.

    Example:
        madpo reward pairs.jsonl --model_name_or_path gemma-3-270m --output_dir rm
    """
    o = options
    with loading(o, pairs=[o.data, o.eval_data], reading=o.reading, models=[o.model]):
        from madpo.operations.reward_model import reward
    settings = part(o, RewardSettings)
    report = reward(o.data, o.output_dir, settings, eval_data=o.eval_data, overwrite=o.overwrite)
    following = ("evaluate", "POLICY", "--prompts", "PROMPTS", "--reward", o.output_dir, "--output_dir", "evaluation")
    return finished(report, o, "report.html", following)


class Score(Configurable, ScoreSettings, Result, Data):
    pass


def score(options: Score) -> int:
    """Score pairs and print the report.

    Example:
        madpo score pairs.jsonl --reward_model rm --output_dir scored
        madpo score pairs.jsonl --probe gemma-3-270m --output_dir scored
        madpo score pairs.jsonl --folds 5 --model_name_or_path gemma-3-270m --output_dir scored
        madpo score pairs.jsonl --score_columns chosen_score rejected_score --output_dir scored
    """
    o = options
    model, columns = o.reward.model if o.reward else o.probe, o.score_columns or ()
    named = {"pairs": [o.data], "reading": o.reading, "columns": columns}
    with loading(o, **named, models=[model], rewards=[o.reward_model]):
        from madpo.operations.scoring import score
    report = score(o.data, o.output_dir, part(o, ScoreSettings), overwrite=o.overwrite)
    following = ("inspect", o.output_dir / report.file, "--output", "margins.html")
    return finished(report, o, following=following)


class Train(Configurable, TrainSettings, HeldOut, DryRun, Result, Data):
    output_dir: Path
    """Folder of the result; only a dry run does without it."""
    memory: ByteSize | None = None
    """For dry_run: an accelerator's memory that the step must fit into, such as 80GB; none is all of this machine's."""
    lengths: tuple[int, int] | None = None
    """For dry_run: tokens of prompt and completion in place of those of the longest pairs; DATA is then not needed."""

    @model_validator(mode="after")
    def _plans(self) -> Train:
        if not self.dry_run and (self.memory or self.lengths):
            raise ValueError("memory and lengths go with dry_run; add --dry_run, or leave them out")
        return self


def train(options: Train) -> int:
    r"""Train a policy, with auto or any loss, and print its report.

    Example:
        madpo train pairs.jsonl --model_name_or_path gemma-3-270m --output_dir policy
        madpo train scored/scored.jsonl --model_name_or_path gemma-3-270m --loss madpo --loss.tau 7 \
            --loss.c_max 4 --learning_rate 1e-4 --eval_share 0.1 --merge --output_dir policy
        madpo train scored/scored.jsonl --config tuned/chosen.toml --output_dir policy
        madpo train pairs.jsonl --model_name_or_path MODEL --dry_run --memory 80GB
    """
    o = options
    probe = o.probe or o.loss.kind == "auto"
    named: dict[str, Any] = {"reading": o.reading, "loss": o.loss, "probe": probe, "models": [o.model]}
    settings, pairs = part(o, TrainSettings), [o.data, o.eval_data]
    if o.dry_run:
        with loading(o, **named, pairs=[] if o.lengths else pairs):
            from madpo.operations.memory_plan import memory_plan
        show(memory_plan(o.data, settings, lengths=o.lengths, memory=o.memory).text())
        return 0
    with loading(o, **named, pairs=pairs):
        from madpo.operations.policy import train
    report = train(o.data, o.output_dir, settings, eval_data=o.eval_data, overwrite=o.overwrite)
    return finished(report, o, "report.html", ("chat", o.output_dir))


class Tune(Configurable, TuneSettings, Result, Data):
    pass


def tune(options: Tune) -> int:
    r"""Search a loss's parameters and print all trials.

    ``--space.KEY '[VALUE, ...]'`` or ``'{ low = A, high = B, log = true }'`` is what is tried of a setting.

    Example:
        madpo tune scored/scored.jsonl --model_name_or_path gemma-3-270m --learning_rate 1e-4 --output_dir tuned \
            --space.loss.tau '[2, 4, 7, 10]' --space.loss.c_max '{ low = 1.5, high = 4 }'
    """
    o = options
    rewards = [o.reward.reward_model if o.reward else None]
    named = {"pairs": [o.data], "reading": o.reading, "loss": o.loss}
    with loading(o, **named, models=[o.model], rewards=rewards):
        from madpo.operations.tuning.search import tune
    report = tune(o.data, o.output_dir, part(o, TuneSettings), overwrite=o.overwrite)
    following = ("train", o.data, "--config", o.output_dir / "chosen.toml", "--output_dir", "DIR")
    return finished(report, o, "tune.html", following)


class Evaluate(Configurable, EvaluateSettings, Result):
    policy: Annotated[str, Cli(positional=True)]
    """A folder of madpo train, a model or an adapter."""
    prompts: Annotated[str, Cli(also=("prompts_data",))]
    """Rows with a prompt, text or messages."""


def evaluate(options: Evaluate) -> int:
    """Sample from policy and reference, and print the comparison.

    Example:
        madpo evaluate policy --prompts prompts.jsonl --reward rm --max_new_tokens 64 --output_dir evaluation
    """
    from madpo.operations.inputs import read_prompts
    from madpo.operations.preconditions import find_policy

    o = options
    find_policy(o.policy, o.reference)
    if expanded(o.prompts).is_file():
        read_prompts(o.prompts, o.max_prompts, o.reading)
    with loading(o, data=[o.prompts], models=[o.reference], rewards=[o.reward_model]):
        from madpo.operations.evaluation import evaluate
    settings = part(o, EvaluateSettings)
    report = evaluate(o.policy, o.prompts, o.output_dir, settings, overwrite=o.overwrite)
    return finished(report, o, "samples.html")
