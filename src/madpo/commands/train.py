"""``madpo reward``, ``score``, ``train``, ``tune`` and ``evaluate``: thin calls of the functions of these names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ByteSize

from madpo.commands.from_settings import Configurable, part
from madpo.commands.shared import Data, HeldOut, Result, call
from madpo.core.libraries import loading_libraries
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
    refused = {"pairs": [o.data, o.eval_data], "reading": o.reading, "models": [o.model]}
    return call("reward", o, RewardSettings, o.data, refused=refused, page="report.html", eval_data=o.eval_data)


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
    refused = {
        "pairs": [o.data],
        "reading": o.reading,
        "columns": o.score_columns or (),
        "models": [o.reward.model if o.reward else o.probe],
        "rewards": [o.reward_model],
    }
    return call("score", o, ScoreSettings, o.data, refused=refused)


class Train(Configurable, TrainSettings, HeldOut, Result, Data):
    dry_run: bool = False
    """Say how much memory a step needs and which micro-batch fits, and write nothing."""
    memory: ByteSize | None = None
    """For dry_run: what must do, such as 80GB; none is all that this machine has."""
    lengths: tuple[int, int] | None = None
    """For dry_run: tokens of prompt and completion in place of those of the longest pairs, which are then not read."""


def train(options: Train) -> int:
    r"""Train a policy, with auto or any loss, and print its report.

    Example:
        madpo train pairs.jsonl --model_name_or_path gemma-3-270m --output_dir policy
        madpo train scored/scored.jsonl --model_name_or_path gemma-3-270m --loss madpo --loss.tau 7 \
            --loss.c_max 4 --learning_rate 1e-4 --eval_share 0.1 --merge --output_dir policy
        madpo train scored/scored.jsonl --config tuned/chosen.toml --output_dir policy
        madpo train pairs.jsonl --model_name_or_path MODEL --output_dir policy --dry_run --memory 80GB
    """
    o = options
    refused: dict[str, Any] = {"pairs": [o.data, o.eval_data], "reading": o.reading, "loss": o.loss}
    refused |= {"probe": o.probe, "models": [o.model]}
    if o.dry_run:
        from madpo.operations.preconditions import refuse_missing

        refuse_missing(output_dir=o.output_dir, **refused | ({"pairs": []} if o.lengths else {}))
        with loading_libraries():
            from madpo.operations.memory_plan import memory_plan

        show(memory_plan(o.data, part(o, TrainSettings), lengths=o.lengths, memory=o.memory).text())
        return 0
    return call("train", o, TrainSettings, o.data, refused=refused, page="report.html", eval_data=o.eval_data)


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
    refused = {"pairs": [o.data], "reading": o.reading, "loss": o.loss, "models": [o.model], "rewards": rewards}
    call("tune", o, TuneSettings, o.data, refused=refused, page="tune.html")
    show(f"madpo train {o.data} --config {o.output_dir / 'chosen.toml'} --output_dir DIR")
    return 0


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
    refused = {"data": [o.prompts], "models": [o.reference], "rewards": [o.reward_model]}
    return call("evaluate", o, EvaluateSettings, o.policy, o.prompts, refused=refused, page="samples.html")
