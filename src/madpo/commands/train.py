"""``madpo reward``, ``score``, ``train``, ``tune``, ``evaluate``: thin calls of the functions of these names.

An option stands for a key of the command's configuration; a TOML file (``--config``) and ``--set`` reach all of them.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from madpo.commands.options import DATA, asked, example, from_file, option
from madpo.core import processes
from madpo.core.libraries import loading_libraries
from madpo.core.progress import show

REWARD = "train a reward model on preference pairs"
SCORE = "add reward margins to preference pairs"
TRAIN = "train a policy on preference pairs with any loss"
TUNE = "choose a loss's parameters by cross-validation on preference pairs"
EVALUATE = "compare what a policy and its reference write"


def _common(parser: argparse.ArgumentParser, appears: str = "it appears when all is done") -> None:
    option(parser, "output_dir", "output_dir", f"folder of the result; {appears}", metavar="DIR")
    option(parser, "overwrite", "overwrite", "replace what is in it", action="store_true")
    from_file(parser)


def _strict(parser: argparse.ArgumentParser) -> None:
    option(parser, "strict", "strict", "treat what madpo check would warn of as an error", action="store_true")


def _result() -> dict[str, Any]:
    """What ``_common`` declares, for :func:`asked`."""
    return {"output_dir": (Path, ...), "overwrite": (bool, False)}


def _places(beside: dict[str, Any]) -> dict[str, Any]:
    """The same, for :func:`madpo.commands.early.refuse_missing_places`."""
    return {"output_dir": beside["output_dir"], "data": [beside["eval_data"]]}


def _held_out(parser: argparse.ArgumentParser) -> None:
    option(parser, "eval_data", "eval_data", "held-out pairs", metavar="DATA")
    option(parser, "eval_share", "eval_share", "or the share of the prompts to hold out", type=float)


def _truncation(parser: argparse.ArgumentParser, key: str) -> None:
    says = "what happens to pairs longer than that: drop (default), cut the completion, refuse"
    option(parser, "truncation", key, says, choices=("drop", "cut", "refuse"), metavar="POLICY")


def _reward_options(parser: argparse.ArgumentParser, place: str, *, batch: str) -> None:
    option(parser, "model_name_or_path", f"{place}model", "base model: packaged name, folder or hub id", metavar="M")
    inside = f"{place}optimisation."
    option(parser, "learning_rate", f"{inside}learning_rate", "of AdamW (default: 1e-4)", type=float)
    option(parser, "epochs", f"{inside}epochs", "passes over the pairs at most (default: 1)", type=float)
    option(parser, batch, f"{inside}batch_size", "pairs per optimiser step (default: 16)", type=int)
    option(parser, "micro_batch_size", f"{inside}micro_batch_size", "pairs per forward pass", type=int)
    option(parser, "lora_rank", f"{place}lora.rank", "rank of the adapter (default: 16)", type=int)
    option(parser, "lora_alpha", f"{place}lora.alpha", "the update is scaled by alpha / rank", type=float)
    option(parser, "lora_dropout", f"{place}lora.dropout", "dropout of the adapter (default: 0)", type=float)
    option(parser, "max_length", f"{place}max_length", "tokens of prompt and completion", type=int)
    _truncation(parser, f"{place}truncation")
    option(parser, "patience", f"{place}patience", "looks without improvement before it stops", type=int)
    says = "where the reward is read: at the last token (default), or as the mean over the completion: for few pairs"
    option(parser, "pooling", f"{place}pooling", says, choices=("last", "mean"))
    option(parser, "seed", f"{place}seed", "of split and training (default: 0)", type=int)


def reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo reward``."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    _common(parser)
    _held_out(parser)
    _reward_options(parser, "", batch="batch_size")
    _strict(parser)
    example(parser, "madpo reward pairs.jsonl --model_name_or_path gemma-3-270m --output_dir rm")


def reward_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo reward`` and print its report."""
    from madpo.commands.early import refuse_missing_files, refuse_missing_places
    from madpo.operations.settings import RewardSettings

    refuse_missing_files(arguments.data, arguments.config)
    beside, settings = asked(arguments, RewardSettings, **_result(), eval_data=(str | None, None))
    refuse_missing_places(**_places(beside), models=[settings.model])

    with loading_libraries():
        from madpo.operations import reward

    show(reward(arguments.data, settings=settings, **beside).text())
    show(f"written to {beside['output_dir']}")
    return 0


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo score``."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    _common(parser, "report.json in it is the last file")
    option(parser, "reward_model", "reward_model", "folder of madpo reward, or a sequence classifier", metavar="R")
    option(parser, "score_columns", "score_columns", "or columns with scores", nargs=2, metavar=("CHOSEN", "REJECTED"))
    says = "or a model (best the one to be trained) whose states give margins out of fold, without a training"
    option(parser, "probe", "probe", says, metavar="M")
    option(parser, "folds", "folds", "or this many reward models, each for the part it did not see", type=int)
    option(parser, "margin_temperature", "margin_temperature", "divides the columns' difference", type=float)
    option(parser, "format", "format", "of the result (default: jsonl)", choices=("jsonl", "parquet"))
    option(parser, "batch_size", "batch_size", "sequences per forward pass when scoring (default: 16)", type=int)
    option(parser, "eval_share", "reward.eval_share", "with --folds: held out to stop the training", type=float)
    _reward_options(parser, "reward.", batch="train_batch_size")
    _strict(parser)
    example(
        parser,
        "madpo score pairs.jsonl --reward_model rm --output_dir scored\n"
        "  madpo score pairs.jsonl --probe gemma-3-270m --output_dir scored\n"
        "  madpo score pairs.jsonl --folds 5 --model_name_or_path gemma-3-270m --output_dir scored\n"
        "  madpo score pairs.jsonl --score_columns chosen_score rejected_score --output_dir scored",
    )


def score_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo score`` and print its report."""
    from madpo.commands.early import refuse_missing_files, refuse_missing_places
    from madpo.operations.settings import ScoreSettings

    refuse_missing_files(arguments.data, arguments.config)
    beside, settings = asked(arguments, ScoreSettings, **_result())
    model = settings.reward.model if settings.reward else settings.probe
    refuse_missing_places(models=[model], rewards=[settings.reward_model])

    with loading_libraries():
        from madpo.operations import score

    report = score(arguments.data, settings=settings, **beside)
    if processes.is_main_process():
        show(report.text())
        show(f"written to {beside['output_dir'] / report.file}")
    return 0


_DOTTED = (
    "--loss.FIELD VALUE sets a field of the loss (--loss.tau 7), --args.NAME VALUE any argument of TRL's DPOConfig\n"
    "(--args.warmup_steps 0.1), --lora.FIELD VALUE one of the adapter (--lora.rank 8). beta pulls to the reference:\n"
    "a larger one keeps the policy closer to it."
)


def _policy_options(parser: argparse.ArgumentParser) -> None:
    from madpo.models.hyperparameters import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE

    says = "start and reference: packaged name, folder or hub id"
    option(parser, "model_name_or_path", "model", says, metavar="M")
    option(parser, "loss", "loss.kind", "madpo (the default), dpo, ipo, ...", metavar="KIND")
    option(parser, "full", "full", "train all weights instead of an adapter", action="store_true")
    option(parser, "qlora", "qlora", "hold the frozen weights in 4 bits (GPU; untested)", action="store_true")
    option(parser, "dtype", "dtype", "of the loaded weights", choices=("auto", "float32", "bfloat16"))
    says = f"of AdamW (default: {ADAPTER_LEARNING_RATE:g}, with --full {FULL_LEARNING_RATE:g})"
    option(parser, "learning_rate", "args.learning_rate", says, type=float)
    option(parser, "epochs", "args.num_train_epochs", "passes over the pairs (default: 3)", type=float)
    says = "pairs per forward pass (default: 8)"
    option(parser, "batch_size", "args.per_device_train_batch_size", says, type=int)
    option(parser, "max_length", "args.max_length", "tokens of prompt and completion (default: 1024)", type=int)
    _truncation(parser, "truncation")
    option(parser, "seed", "args.seed", "of the training (default: 42)", type=int)
    _strict(parser)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo train``."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    _common(parser)
    _held_out(parser)
    _policy_options(parser)
    option(parser, "merge", "merge", "also write the model with the adapter folded in", action="store_true")
    option(parser, "report_to", "args.report_to", "a tracker that is installed, such as tensorboard", metavar="NAME")
    example(
        parser,
        "madpo train scored/scored.jsonl --model_name_or_path gemma-3-270m --loss madpo --loss.tau 7 \\\n"
        "      --loss.c_max 4 --learning_rate 1e-4 --eval_share 0.1 --merge --output_dir policy\n"
        "  madpo train scored/scored.jsonl --config tuned/chosen.toml --output_dir policy",
        _DOTTED,
    )


def train_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo train`` and print its report."""
    from madpo.commands.early import refuse_missing_files, refuse_missing_places

    refuse_missing_files(arguments.data, arguments.config)

    with loading_libraries():
        from madpo.operations.train_settings import TrainSettings

    beside, settings = asked(arguments, TrainSettings, **_result(), eval_data=(str | None, None))
    refuse_missing_places(**_places(beside), models=[settings.model])

    with loading_libraries():
        from madpo.operations import train

    report = train(arguments.data, settings=settings, **beside)
    if processes.is_main_process():
        show(report.text())
        show(f"written to {beside['output_dir']}")
    return 0


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo tune``."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    _common(parser, "report.json in it is the last file")
    _policy_options(parser)
    option(parser, "folds", "folds", "parts of the pairs, each held out once (default: 3)", type=int)
    option(parser, "trials", "trials", "settings to try (default: 20)", type=int)
    option(parser, "sampler", "sampler", "auto (default), tpe, grid or random", metavar="KIND")
    says = "log_loss after one temperature (default), accuracy, or reward of samples at equal KL"
    option(parser, "criterion", "criterion", says, metavar="WHAT")
    option(parser, "reward_model", "reward.reward_model", "for reward: the model that gives it", metavar="R")
    option(parser, "kl", "reward.kl", "for reward: the KL, in nats, at which it is compared", type=float)
    option(parser, "search_seed", "search_seed", "of folds and search (default: 0)", type=int)
    example(
        parser,
        "madpo tune scored/scored.jsonl --model_name_or_path gemma-3-270m --learning_rate 1e-4 --output_dir tuned \\\n"
        "      --space.loss.tau '[2, 4, 7, 10]' --space.loss.c_max '{ low = 1.5, high = 4 }'",
        _DOTTED + "\n--space.KEY '[VALUE, ...]' or '{ low = A, high = B, log = true }' says what is tried of a key; "
        "without any,\nMADPO tries the values of the paper's search.",
    )


def tune_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo tune`` and print its report."""
    from madpo.commands.early import refuse_missing_files, refuse_missing_places

    refuse_missing_files(arguments.data, arguments.config)

    with loading_libraries():
        from madpo.operations.tuning import TuneSettings

    beside, settings = asked(arguments, TuneSettings, **_result())
    refuse_missing_places(models=[settings.model])

    with loading_libraries():
        from madpo.operations.tuning import tune

    show(tune(arguments.data, settings=settings, **beside).text())
    output_dir = beside["output_dir"]
    show(f"Page: {(output_dir / 'tune.html').resolve().as_uri()}")
    show(f"madpo train {arguments.data} --config {output_dir / 'chosen.toml'} --output_dir DIR")
    return 0


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo evaluate``."""
    parser.add_argument("policy", metavar="POLICY", help="a folder of madpo train, a model or an adapter")
    _common(parser)
    option(parser, "prompts", "prompts_data", "rows with a prompt, text or messages", metavar="DATA")
    option(
        parser,
        "reward",
        "reward_model",
        "folder of madpo reward, or a sequence classifier",
        "reward_model",
        metavar="R",
    )
    option(parser, "reference", "reference", "model to compare with (default: where the policy started)", metavar="M")
    option(parser, "max_prompts", "prompts", "the first so many prompts", type=int, metavar="N")
    option(parser, "samples_per_prompt", "samples_per_prompt", "(default: 1)", type=int, metavar="N")
    option(parser, "max_new_tokens", "max_new_tokens", "(default: 256)", type=int, metavar="N")
    option(parser, "temperature", "temperature", "of the sampling (default: 1)", type=float)
    option(parser, "top_p", "top_p", "(default: 1)", type=float, metavar="P")
    option(parser, "top_k", "top_k", "(default: every token)", type=int, metavar="K")
    option(parser, "batch_size", "batch_size", "prompts generated for at once (default: 32)", type=int)
    option(parser, "seed", "seed", "of the sampling (default: 0)", type=int)
    example(
        parser, "madpo evaluate policy --prompts prompts.jsonl --reward rm --max_new_tokens 64 --output_dir evaluation"
    )


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo evaluate`` and print its table."""
    from madpo.commands.early import refuse_missing_files, refuse_missing_places
    from madpo.operations.settings import EvaluateSettings

    refuse_missing_files(None, arguments.config)
    beside, settings = asked(arguments, EvaluateSettings, **_result(), prompts_data=(str, ...))
    prompts = beside.pop("prompts_data")
    refuse_missing_places(
        **_places(beside | {"eval_data": prompts}), models=[settings.reference], rewards=[settings.reward_model]
    )

    with loading_libraries():
        from madpo.operations import evaluate

    show(evaluate(arguments.policy, prompts, settings=settings, **beside).text())
    show(f"written to {beside['output_dir']}")
    return 0
