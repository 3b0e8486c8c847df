"""The practitioner's chain on preference data of one's own: reward, score, train, evaluate.

Each function is a command of the same name. Each takes a frozen configuration, gives a report whose ``text()`` is what
the command prints, and leaves a folder that is whole or not there.
"""

from madpo.practice.measuring import EvaluateReport, EvaluateSettings, evaluate
from madpo.practice.policy import TrainReport, TrainSettings, train
from madpo.practice.reward_model import RewardReport, RewardSettings, load_scorer, reward
from madpo.practice.scoring import ScoreReport, ScoreSettings, score

__all__ = [
    "EvaluateReport",
    "EvaluateSettings",
    "RewardReport",
    "RewardSettings",
    "ScoreReport",
    "ScoreSettings",
    "TrainReport",
    "TrainSettings",
    "evaluate",
    "load_scorer",
    "reward",
    "score",
    "train",
]
