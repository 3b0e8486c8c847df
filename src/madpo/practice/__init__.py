"""The practitioner's chain on preference data of one's own: check, reward, score, inspect, train, evaluate.

Each function is a command of the same name (``tune`` is in ``madpo.tuning``) and gives a report, whose ``text()`` is
what the command prints. Those that train or measure take a frozen configuration, and leave a folder that is whole or
absent.
"""

from madpo.data import check
from madpo.diagnostics import inspect_data as inspect
from madpo.practice.measuring import EvaluateReport, EvaluateSettings, evaluate
from madpo.practice.policy import TrainReport, TrainSettings, train
from madpo.practice.reward_model import RewardReport, RewardSettings, load_scorer, reward
from madpo.practice.scoring import ScoreReport, ScoreSettings, score
from madpo.practice.trim_report import TrimReport, TrimSettings
from madpo.practice.trimming import trim_vocab

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
