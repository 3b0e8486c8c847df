"""Preference losses as frozen configurations that can be called.

``Loss`` is the union that a TOML file, the command line and a study choose from by ``kind``. Adding a loss is a
class in this package and a member of the union.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState, PreferenceLoss
from madpo.losses.direct import DPO
from madpo.losses.margin import MADPO
from madpo.losses.weight import log_margin_weight, margin_coefficient, margin_weight

Loss = Annotated[DPO | MADPO, Field(discriminator="kind")]
LossAdapter: TypeAdapter[Loss] = TypeAdapter(Loss)

__all__ = [
    "DPO",
    "MADPO",
    "Loss",
    "LossAdapter",
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "LossState",
    "PreferenceLoss",
    "log_margin_weight",
    "margin_coefficient",
    "margin_weight",
]
