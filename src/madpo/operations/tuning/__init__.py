"""The search over a loss's parameters: ``madpo tune``.

``settings`` says what is tried, ``heldout`` measures one setting by cross-validation and reads the reward of
samples at equal KL, ``search`` lets Optuna search, ``report`` shows every trial. Names load on first use, so that a
mistake in a configuration is reported before TRL is loaded.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.operations.tuning.report import TuneReport as TuneReport
    from madpo.operations.tuning.search import tune as tune
    from madpo.operations.tuning.settings import Dimension as Dimension
    from madpo.operations.tuning.settings import RewardCriterion as RewardCriterion
    from madpo.operations.tuning.settings import TuneSettings as TuneSettings

__getattr__, __dir__, __all__ = attach(__name__)
