"""Margin Adaptive DPO: align a language model with preference data, pair by pair.

This module is the table of contents. Names load on first use (PEP 562), so ``import madpo`` costs
milliseconds and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madpo.core.errors import MadpoError
    from madpo.losses import (
        DPO,
        MADPO,
        Loss,
        LossInputs,
        LossOutput,
        LossState,
        PreferenceLoss,
        log_margin_weight,
        margin_weight,
    )
    from madpo.training import PreferenceConfig, PreferenceTrainer

__version__ = "0.1.0"

_HOME = {
    "madpo.core.errors": ("MadpoError",),
    "madpo.losses": (
        "DPO",
        "MADPO",
        "Loss",
        "LossInputs",
        "LossOutput",
        "LossState",
        "PreferenceLoss",
        "log_margin_weight",
        "margin_weight",
    ),
    "madpo.training": ("PreferenceConfig", "PreferenceTrainer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DPO",
    "MADPO",
    "Loss",
    "LossInputs",
    "LossOutput",
    "LossState",
    "MadpoError",
    "PreferenceConfig",
    "PreferenceLoss",
    "PreferenceTrainer",
    "log_margin_weight",
    "margin_weight",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'madpo' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
