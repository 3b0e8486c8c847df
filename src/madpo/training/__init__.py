"""Training: the only package that imports TRL.

``PreferenceTrainer`` is TRL's ``DPOTrainer`` with any preference loss and a fast log-probability engine; the
stages train the study's models with it and with TRL's SFT and reward trainers.
"""

from madpo.training.config import PreferenceConfig
from madpo.training.preference import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer"]
