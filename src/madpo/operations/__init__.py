"""The practitioner's chain on preference data of one's own: check, reward, score, inspect, train, evaluate.

Each function is a command of the same name (``tune`` is in ``madpo.operations.tuning``) and gives a report; its
``text()`` is what the command prints. Those that train or measure take a frozen
configuration, and leave a folder that is whole or absent. Names load on first use, so that a mistake in a
configuration is reported before TRL is loaded.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.data import check
    from madpo.operations.evaluation import EvaluateReport, evaluate
    from madpo.operations.inspection import inspect_data as inspect
    from madpo.operations.policy import TrainReport, train
    from madpo.operations.reward_model import RewardReport, load_scorer, reward
    from madpo.operations.score_report import ScoreReport
    from madpo.operations.scoring import score
    from madpo.operations.settings import EvaluateSettings, RewardSettings, ScoreSettings, TrimSettings
    from madpo.operations.train_settings import TrainSettings
    from madpo.operations.trimming.report import TrimReport
    from madpo.operations.trimming.trim import trim_vocab

__getattr__, __dir__ = attach(
    __name__,
    {
        "EvaluateReport": "madpo.operations.evaluation",
        "EvaluateSettings": "madpo.operations.settings",
        "RewardReport": "madpo.operations.reward_model",
        "RewardSettings": "madpo.operations.settings",
        "ScoreReport": "madpo.operations.score_report",
        "ScoreSettings": "madpo.operations.settings",
        "TrainReport": "madpo.operations.policy",
        "TrainSettings": "madpo.operations.train_settings",
        "TrimReport": "madpo.operations.trimming.report",
        "TrimSettings": "madpo.operations.settings",
        "check": "madpo.data",
        "evaluate": "madpo.operations.evaluation",
        "inspect": "madpo.operations.inspection:inspect_data",
        "load_scorer": "madpo.operations.reward_model",
        "reward": "madpo.operations.reward_model",
        "score": "madpo.operations.scoring",
        "train": "madpo.operations.policy",
        "trim_vocab": "madpo.operations.trimming.trim",
    },
)

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
