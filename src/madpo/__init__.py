"""Margin Adaptive DPO: align a language model with preference data, pair by pair.

This module is the table of contents. Names load on first use (PEP 562), so ``import madpo`` costs
milliseconds and imports no torch.
"""

from typing import TYPE_CHECKING

from madpo.core.lazy import attach

if TYPE_CHECKING:
    from madpo.core.errors import MadpoError as MadpoError
    from madpo.losses import DPO as DPO
    from madpo.losses import MADPO as MADPO
    from madpo.losses import Loss as Loss
    from madpo.losses import LossInputs as LossInputs
    from madpo.losses import LossOutput as LossOutput
    from madpo.losses import LossState as LossState
    from madpo.losses import PreferenceLoss as PreferenceLoss
    from madpo.losses import log_margin_weight as log_margin_weight
    from madpo.losses import margin_weight as margin_weight
    from madpo.training import PreferenceConfig as PreferenceConfig
    from madpo.training import PreferenceTrainer as PreferenceTrainer

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__)
