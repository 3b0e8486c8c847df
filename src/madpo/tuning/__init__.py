"""The search over a loss's parameters: ``madpo tune``.

``space`` says what is tried, ``settings`` everything else, ``heldout`` measures one setting by cross-validation,
``reward`` reads the reward of samples at equal KL, ``study`` lets Optuna search, ``page`` shows every trial.
"""

from madpo.tuning.settings import RewardCriterion, TuneSettings
from madpo.tuning.space import Dimension
from madpo.tuning.study import TuneReport, tune

__all__ = ["Dimension", "RewardCriterion", "TuneReport", "TuneSettings", "tune"]
