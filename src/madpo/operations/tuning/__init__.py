"""The search over a loss's parameters: ``madpo tune``.

``space`` says what is tried, ``settings`` everything else, ``heldout`` measures one setting by cross-validation,
``reward`` reads the reward of samples at equal KL, ``study`` lets Optuna search, ``page`` shows every trial. Names load
on first use, so that a mistake in a configuration is told before TRL is loaded.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.operations.tuning.search import TuneReport, tune
    from madpo.operations.tuning.settings import RewardCriterion, TuneSettings
    from madpo.operations.tuning.space import Dimension

__getattr__, __dir__ = attach(
    __name__,
    {
        "Dimension": "madpo.operations.tuning.space",
        "RewardCriterion": "madpo.operations.tuning.settings",
        "TuneReport": "madpo.operations.tuning.search",
        "TuneSettings": "madpo.operations.tuning.settings",
        "tune": "madpo.operations.tuning.search",
    },
)

__all__ = ["Dimension", "RewardCriterion", "TuneReport", "TuneSettings", "tune"]
