"""``madpo reward``, ``score``, ``train``, ``evaluate``: thin calls of the functions of these names in ``practice``.

An option stands for a key of the command's configuration; a TOML file (``--config``) and ``--set`` reach all of them.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from madpo import processes
from madpo.errors import ConfigError

if TYPE_CHECKING:
    from madpo.config import Frozen

    T = TypeVar("T", bound=Frozen)

REWARD = "train a reward model on preference pairs"
SCORE = "add reward margins to preference pairs"
TRAIN = "train a policy on preference pairs with any loss"
EVALUATE = "compare what a policy and its reference write"
_DATA = "a .jsonl, .csv or .parquet file, or a hub data set OWNER/NAME[:SPLIT]"

# Command -> prefixes of options that stand for a key: `--loss.tau 7` is `--set loss.tau=7`.
DOTTED = {"reward": ("optimisation", "lora"), "score": ("reward",), "train": ("loss", "args", "lora")}
_KEY = "key:"


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The words of a command line with ``--loss.tau 7`` and ``--loss.tau=7`` written as ``--set=loss.tau=7``.

    Raises:
        ConfigError: such an option has no value.
    """
    prefixes = tuple(f"--{prefix}." for prefix in DOTTED.get(argv[0] if argv else "", ()))
    words, found = iter(argv), []
    for word in words:
        if not prefixes or not word.startswith(prefixes):
            found.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"the option --{key} has no value; write --{key} VALUE")
        found.append(f"--set={key}={value}")
    return found


def _option(parser: argparse.ArgumentParser, name: str, key: str | None, text: str, **rest: Any) -> None:
    """An option in both spellings (a_b and a-b); its value goes to ``key`` of the configuration."""
    names = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
    dest = name if key is None else _KEY + key
    rest.setdefault("default", None)
    if "action" not in rest:
        rest.setdefault("metavar", name.split("_")[-1].upper())
    parser.add_argument(*names, dest=dest, help=text, **rest)


def _common(parser: argparse.ArgumentParser) -> None:
    _option(parser, "output_dir", None, "folder of the result; it appears when all is done", type=Path, required=True)
    _option(parser, "overwrite", None, "replace what is in it", action="store_true", default=False)
    _option(parser, "config", None, "settings from a TOML file; options of the command line go before it", type=Path)
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change a setting"
    )


def _held_out(parser: argparse.ArgumentParser) -> None:
    _option(parser, "eval_data", None, "held-out pairs", metavar="DATA")
    _option(parser, "eval_share", "eval_share", "or the share of the prompts to hold out", type=float)


def _reward_options(parser: argparse.ArgumentParser, place: str, *, batch: str) -> None:
    _option(parser, "model_name_or_path", f"{place}model", "base model: packaged name, folder or hub id", metavar="M")
    inside = f"{place}optimisation."
    _option(parser, "learning_rate", f"{inside}learning_rate", "of AdamW (default: 1e-4)", type=float)
    _option(parser, "epochs", f"{inside}epochs", "passes over the pairs at most (default: 1)", type=float)
    _option(parser, batch, f"{inside}batch_size", "pairs per optimiser step (default: 16)", type=int)
    _option(parser, "micro_batch_size", f"{inside}micro_batch_size", "pairs per forward pass", type=int)
    _option(parser, "lora_rank", f"{place}lora.rank", "rank of the adapter (default: 16)", type=int)
    _option(parser, "lora_alpha", f"{place}lora.alpha", "the update is scaled by alpha / rank", type=float)
    _option(parser, "lora_dropout", f"{place}lora.dropout", "dropout of the adapter (default: 0)", type=float)
    _option(parser, "max_length", f"{place}max_length", "tokens of prompt and completion", type=int)
    _option(parser, "patience", f"{place}patience", "looks without improvement before it stops", type=int)
    _option(parser, "seed", f"{place}seed", "of split and training (default: 0)", type=int)


def reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo reward``."""
    parser.add_argument("data", metavar="DATA", help=_DATA)
    _common(parser)
    _held_out(parser)
    _reward_options(parser, "", batch="batch_size")


def reward_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo reward`` and print its report."""
    from madpo.practice import RewardSettings, reward

    settings = _settings(arguments, RewardSettings)
    eval_data, overwrite = arguments.eval_data, arguments.overwrite
    print(reward(arguments.data, arguments.output_dir, settings, eval_data=eval_data, overwrite=overwrite).text())
    print(f"written to {arguments.output_dir}")
    return 0


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo score``."""
    parser.add_argument("data", metavar="DATA", help=_DATA)
    _common(parser)
    _option(parser, "reward_model", "reward_model", "folder of madpo reward, or a sequence classifier", metavar="R")
    _option(parser, "score_columns", "score_columns", "or columns with scores", nargs=2, metavar=("CHOSEN", "REJECTED"))
    _option(parser, "folds", "folds", "or this many reward models, each for the part it did not see", type=int)
    _option(parser, "margin_temperature", "margin_temperature", "divides the columns' difference", type=float)
    _option(parser, "format", "format", "of the result (default: jsonl)", choices=("jsonl", "parquet"))
    _option(parser, "batch_size", "batch_size", "sequences per forward pass when scoring (default: 16)", type=int)
    _option(parser, "eval_share", "reward.eval_share", "with --folds: held out to stop the training", type=float)
    _reward_options(parser, "reward.", batch="train_batch_size")


def score_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo score`` and print its report."""
    from madpo.practice import ScoreSettings, score

    settings = _settings(arguments, ScoreSettings)
    report = score(arguments.data, arguments.output_dir, settings, overwrite=arguments.overwrite)
    if processes.leads():
        print(report.text())
        print(f"written to {arguments.output_dir / report.file}")
    return 0


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo train``."""
    parser.epilog = (
        "--loss.FIELD VALUE sets a field of the loss (--loss.tau 7), --args.NAME VALUE an argument of the trainer "
        "(--args.warmup_steps 0.1), --lora.FIELD VALUE one of the adapter (--lora.rank 8)."
    )
    parser.add_argument("data", metavar="DATA", help=_DATA)
    _common(parser)
    _held_out(parser)
    _option(parser, "model_name_or_path", "model", "start and reference: packaged name, folder or hub id", metavar="M")
    _option(parser, "loss", "loss.kind", "madpo (the default), dpo, ipo, ...", metavar="KIND")
    _option(parser, "full", "full", "train all weights instead of an adapter", action="store_true")
    _option(parser, "merge", "merge", "also write the model with the adapter folded in", action="store_true")
    _option(parser, "dtype", "dtype", "of the loaded weights", choices=("auto", "float32", "bfloat16"))
    _option(parser, "learning_rate", "args.learning_rate", "of AdamW (default: TRL's, 1e-6)", type=float)
    _option(parser, "epochs", "args.num_train_epochs", "passes over the pairs (default: 3)", type=float)
    _option(parser, "batch_size", "args.per_device_train_batch_size", "pairs per forward pass (default: 8)", type=int)
    _option(parser, "max_length", "args.max_length", "tokens of prompt and completion (default: 1024)", type=int)
    _option(parser, "seed", "args.seed", "of split and training (default: 42)", type=int)


def train_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo train`` and print its report."""
    from madpo.practice import TrainSettings, train

    settings = _settings(arguments, TrainSettings)
    eval_data, overwrite = arguments.eval_data, arguments.overwrite
    report = train(arguments.data, arguments.output_dir, settings, eval_data=eval_data, overwrite=overwrite)
    if processes.leads():
        print(report.text())
    return 0


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo evaluate``."""
    parser.add_argument("policy", metavar="POLICY", help="a folder of madpo train, a model or an adapter")
    _common(parser)
    _option(parser, "prompts", None, "rows with a prompt, text or messages", required=True, metavar="DATA")
    parser.add_argument(
        *("--reward", "--reward_model", "--reward-model"),
        dest=f"{_KEY}reward_model",
        metavar="R",
        help="folder of madpo reward, or a sequence classifier",
    )
    _option(parser, "reference", "reference", "model to compare with (default: where the policy started)", metavar="M")
    _option(parser, "max_prompts", "prompts", "the first so many prompts", type=int, metavar="N")
    _option(parser, "samples_per_prompt", "samples_per_prompt", "(default: 1)", type=int, metavar="N")
    _option(parser, "max_new_tokens", "max_new_tokens", "(default: 256)", type=int, metavar="N")
    _option(parser, "temperature", "temperature", "of the sampling (default: 1)", type=float)
    _option(parser, "top_p", "top_p", "(default: 1)", type=float, metavar="P")
    _option(parser, "batch_size", "batch_size", "prompts generated for at once (default: 32)", type=int)
    _option(parser, "seed", "seed", "of the sampling (default: 0)", type=int)


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo evaluate`` and print its table."""
    from madpo.practice import EvaluateSettings, evaluate

    settings = _settings(arguments, EvaluateSettings)
    report = evaluate(
        arguments.policy, arguments.prompts, arguments.output_dir, settings, overwrite=arguments.overwrite
    )
    print(report.text())
    print(f"written to {arguments.output_dir}")
    return 0


def _settings(arguments: argparse.Namespace, model: type[T]) -> T:
    """The configuration from the TOML file, the options, and ``--set``, in the order of increasing precedence."""
    from madpo.config import load_config

    # Notices from one library about another's names say nothing to the person who runs a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    options = {
        name.removeprefix(_KEY): value
        for name, value in vars(arguments).items()
        if name.startswith(_KEY) and value is not None
    }
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items()]
    nothing = Path(os.devnull)
    try:
        return load_config(arguments.config or nothing, model, [*overrides, *arguments.overrides])
    except ConfigError as error:
        text = str(error).replace(str(nothing), "the command line", 1)
        for key in ("'model'", "'reward.model'"):
            text = text.replace(
                f"the key {key} is missing; add it", f"the key {key} is missing; add --model_name_or_path"
            )
        raise ConfigError(text) from None
