"""Training: the only package that imports TRL.

``PreferenceTrainer`` is TRL's ``DPOTrainer`` with any preference loss and a fast log-probability engine. Names load on
first use, so that what needs no trainer loads no TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madpo.training.config import PreferenceConfig
    from madpo.training.preference import PreferenceTrainer

_HOME = {"PreferenceConfig": "madpo.training.config", "PreferenceTrainer": "madpo.training.preference"}

__all__ = ["PreferenceConfig", "PreferenceTrainer"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'madpo.training' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
