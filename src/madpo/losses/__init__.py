"""Preference losses as frozen configurations that can be called.

``Loss`` is the union that a TOML file, the command line and a study choose from by ``kind``. Adding a loss is a
class in this package and a member of the union.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from madpo.losses.adaptive import REDPO, AlphaDPO, BetaDPO
from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState, PreferenceLoss
from madpo.losses.composed import Combined, Custom
from madpo.losses.direct import BCO, DPO, IPO, RDPO, WPO, SimPO
from madpo.losses.margin import MADPO, ODPO, RPO, OmniDPO, SoftDPO, SoftMADPO
from madpo.losses.weight import log_margin_weight, margin_coefficient, margin_weight

Loss = Annotated[
    DPO
    | IPO
    | RDPO
    | BCO
    | SimPO
    | WPO
    | MADPO
    | SoftMADPO
    | SoftDPO
    | ODPO
    | RPO
    | OmniDPO
    | BetaDPO
    | AlphaDPO
    | REDPO
    | Combined
    | Custom,
    Field(discriminator="kind"),
]
LossAdapter: TypeAdapter[Loss] = TypeAdapter(Loss)

__all__ = [
    "BCO",
    "DPO",
    "IPO",
    "MADPO",
    "ODPO",
    "RDPO",
    "REDPO",
    "RPO",
    "WPO",
    "AlphaDPO",
    "BetaDPO",
    "Combined",
    "Custom",
    "Loss",
    "LossAdapter",
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "LossState",
    "OmniDPO",
    "PreferenceLoss",
    "SimPO",
    "SoftDPO",
    "SoftMADPO",
    "log_margin_weight",
    "margin_coefficient",
    "margin_weight",
]
