"""``madpo reward``, ``score``, ``train``, ``tune`` and ``evaluate``: thin calls of the functions of these names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from madpo.commands.from_settings import Configurable, part
from madpo.commands.shared import Data, HeldOut, Result
from madpo.core import processes
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import show
from madpo.core.storage import expanded
from madpo.operations.settings import EvaluateSettings, RewardSettings, ScoreSettings
from madpo.operations.train_settings import Auto, TrainSettings
from madpo.operations.tuning.settings import TuneSettings


def _print(report: str, place: Path, page: str = "") -> int:
    if processes.is_main_process():
        show(f"{report}\nwritten to {place}")
        if page and (place / page).is_file():
            show(f"Page: {(place / page).resolve().as_uri()}")
    return 0


class Reward(Configurable, RewardSettings, HeldOut, Result, Data):
    pass


def reward(options: Reward) -> int:
    """Train a reward model and print its report.

    Example:
        madpo reward pairs.jsonl --model_name_or_path gemma-3-270m --output_dir rm
    """
    from madpo.commands.early import refuse_missing

    o = options
    refuse_missing(pairs=[o.data, o.eval_data], reading=o.reading, models=[o.model], output_dir=o.output_dir)
    with loading_libraries():
        from madpo.operations import reward

    report = reward(o.data, o.output_dir, part(o, RewardSettings), eval_data=o.eval_data, overwrite=o.overwrite)
    return _print(report.text(), o.output_dir, "report.html")


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
    from madpo.commands.early import refuse_missing

    o = options
    model = o.reward.model if o.reward else o.probe
    columns = o.score_columns or ()
    refuse_missing(
        pairs=[o.data],
        reading=o.reading,
        columns=columns,
        models=[model],
        rewards=[o.reward_model],
        output_dir=o.output_dir,
    )
    with loading_libraries():
        from madpo.operations import score

    report = score(o.data, o.output_dir, part(o, ScoreSettings), overwrite=o.overwrite)
    return _print(report.text(), o.output_dir / report.file)


class Train(Configurable, TrainSettings, HeldOut, Result, Data):
    pass


def train(options: Train) -> int:
    r"""Train a policy, with auto or any loss, and print its report.

    Example:
        madpo train pairs.jsonl --model_name_or_path gemma-3-270m --output_dir policy
        madpo train scored/scored.jsonl --model_name_or_path gemma-3-270m --loss madpo --loss.tau 7 \
            --loss.c_max 4 --learning_rate 1e-4 --eval_share 0.1 --merge --output_dir policy
        madpo train scored/scored.jsonl --config tuned/chosen.toml --output_dir policy
    """
    from madpo.commands.early import refuse_missing

    o = options
    if isinstance(o.loss, Auto):
        o.loss.refuse_held_out(o.eval_data)
    refuse_missing(
        pairs=[o.data, o.eval_data],
        reading=o.reading,
        loss=o.loss,
        probe=True,
        models=[o.model],
        output_dir=o.output_dir,
    )
    with loading_libraries():
        from madpo.operations import train

    report = train(o.data, o.output_dir, part(o, TrainSettings), eval_data=o.eval_data, overwrite=o.overwrite)
    return _print(report.text(), o.output_dir, "report.html")


class Tune(Configurable, TuneSettings, Result, Data):
    pass


def tune(options: Tune) -> int:
    r"""Search a loss's parameters and print all trials.

    ``--space.KEY '[VALUE, ...]'`` or ``'{ low = A, high = B, log = true }'`` is what is tried of a setting.

    Example:
        madpo tune scored/scored.jsonl --model_name_or_path gemma-3-270m --learning_rate 1e-4 --output_dir tuned \
            --space.loss.tau '[2, 4, 7, 10]' --space.loss.c_max '{ low = 1.5, high = 4 }'
    """
    from madpo.commands.early import refuse_missing

    o = options
    rewards = [o.reward.reward_model if o.reward else None]
    refuse_missing(
        pairs=[o.data], reading=o.reading, loss=o.loss, models=[o.model], rewards=rewards, output_dir=o.output_dir
    )
    with loading_libraries():
        from madpo.operations.tuning import tune

    report = tune(o.data, o.output_dir, part(o, TuneSettings), overwrite=o.overwrite)
    show(f"{report.text()}\nPage: {(o.output_dir / 'tune.html').resolve().as_uri()}")
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
    from madpo.commands.early import refuse_missing
    from madpo.operations.preconditions import find_policy
    from madpo.operations.prompts import read_prompts

    o = options
    refuse_missing(data=[o.prompts], models=[o.reference], rewards=[o.reward_model], output_dir=o.output_dir)
    find_policy(o.policy, o.reference)
    if expanded(o.prompts).is_file():
        read_prompts(o.prompts, o.max_prompts, o.reading)
    with loading_libraries():
        from madpo.operations import evaluate

    report = evaluate(o.policy, o.prompts, o.output_dir, part(o, EvaluateSettings), overwrite=o.overwrite)
    return _print(report.text(), o.output_dir, "samples.html")
