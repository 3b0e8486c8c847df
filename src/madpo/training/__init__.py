"""Training: the only package that imports TRL.

``PreferenceTrainer`` is TRL's ``DPOTrainer`` with any preference loss and a fast log-probability engine. Names load on
first use, so that what needs no trainer loads no TRL.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.training.config import PreferenceConfig as PreferenceConfig
    from madpo.training.preference import PreferenceTrainer as PreferenceTrainer

__getattr__, __dir__, __all__ = attach(__name__)
