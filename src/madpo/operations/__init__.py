"""The practitioner's chain on own preference data: check, reward, score, inspect, train, evaluate.

Each function is a command of the same name (``tune`` is in ``madpo.operations.tuning``) and gives a report; its
``text()`` is what the command prints. Those that train or measure take a frozen
configuration, and leave a folder that is whole or absent. Names load on first use, so that a mistake in a
configuration is reported before TRL is loaded.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.data import check as check
    from madpo.operations.evaluation import EvaluateReport as EvaluateReport
    from madpo.operations.evaluation import evaluate as evaluate
    from madpo.operations.inspection import inspect as inspect
    from madpo.operations.pair_scorer import load_scorer as load_scorer
    from madpo.operations.policy import train as train
    from madpo.operations.reward_model import RewardReport as RewardReport
    from madpo.operations.reward_model import reward as reward
    from madpo.operations.scoring import ScoreReport as ScoreReport
    from madpo.operations.scoring import score as score
    from madpo.operations.settings import EvaluateSettings as EvaluateSettings
    from madpo.operations.settings import RewardSettings as RewardSettings
    from madpo.operations.settings import ScoreSettings as ScoreSettings
    from madpo.operations.settings import TrimSettings as TrimSettings
    from madpo.operations.train_report import TrainReport as TrainReport
    from madpo.operations.train_settings import TrainSettings as TrainSettings
    from madpo.operations.trimming.trim import TrimReport as TrimReport
    from madpo.operations.trimming.trim import trim_vocab as trim_vocab

__getattr__, __dir__, __all__ = attach(__name__)
