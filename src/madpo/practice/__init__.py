"""The practitioner's chain on preference data of one's own: check, reward, score, inspect, train, evaluate.

Each function is a command of the same name (``tune`` is in ``madpo.tuning``) and gives a report, whose ``text()`` is
what the command prints. Those that train or measure take a frozen configuration, and leave a folder that is whole or
absent. Names load on first use, so that a mistake in a configuration is told before TRL is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madpo.data import check
    from madpo.diagnostics import inspect_data as inspect
    from madpo.practice.measuring import EvaluateReport, evaluate
    from madpo.practice.policy import TrainReport, train
    from madpo.practice.reward_model import RewardReport, load_scorer, reward
    from madpo.practice.scoring import ScoreReport, score
    from madpo.practice.settings import EvaluateSettings, RewardSettings, ScoreSettings
    from madpo.practice.train_settings import TrainSettings
    from madpo.practice.trim_report import TrimReport, TrimSettings
    from madpo.practice.trimming import trim_vocab

_HOME = {
    "EvaluateReport": "madpo.practice.measuring",
    "EvaluateSettings": "madpo.practice.settings",
    "RewardReport": "madpo.practice.reward_model",
    "RewardSettings": "madpo.practice.settings",
    "ScoreReport": "madpo.practice.scoring",
    "ScoreSettings": "madpo.practice.settings",
    "TrainReport": "madpo.practice.policy",
    "TrainSettings": "madpo.practice.train_settings",
    "TrimReport": "madpo.practice.trim_report",
    "TrimSettings": "madpo.practice.trim_report",
    "check": "madpo.data",
    "evaluate": "madpo.practice.measuring",
    "inspect": "madpo.diagnostics",
    "load_scorer": "madpo.practice.reward_model",
    "reward": "madpo.practice.reward_model",
    "score": "madpo.practice.scoring",
    "train": "madpo.practice.policy",
    "trim_vocab": "madpo.practice.trimming",
}

__all__ = [
    "EvaluateReport",
    "EvaluateSettings",
    "RewardReport",
    "RewardSettings",
    "ScoreReport",
    "ScoreSettings",
    "TrainReport",
    "TrainSettings",
    "TrimReport",
    "TrimSettings",
    "check",
    "evaluate",
    "inspect",
    "load_scorer",
    "reward",
    "score",
    "train",
    "trim_vocab",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'madpo.practice' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), "inspect_data" if name == "inspect" else name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
