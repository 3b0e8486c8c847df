"""The search over a loss's parameters: ``madpo tune``.

``space`` says what is tried, ``settings`` everything else, ``heldout`` measures one setting by cross-validation,
``reward`` reads the reward of samples at equal KL, ``study`` lets Optuna search, ``page`` shows every trial. Names load
on first use, so that a mistake in a configuration is told before TRL is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madpo.tuning.settings import RewardCriterion, TuneSettings
    from madpo.tuning.space import Dimension
    from madpo.tuning.study import TuneReport, tune

_HOME = {
    "Dimension": "madpo.tuning.space",
    "RewardCriterion": "madpo.tuning.settings",
    "TuneReport": "madpo.tuning.study",
    "TuneSettings": "madpo.tuning.settings",
    "tune": "madpo.tuning.study",
}

__all__ = ["Dimension", "RewardCriterion", "TuneReport", "TuneSettings", "tune"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'madpo.tuning' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
