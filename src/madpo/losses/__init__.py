"""Preference losses as frozen configurations that can be called.

``Loss`` is the union that a TOML file, the command line and a study choose from by ``kind``. Adding a loss is a file
with a class such as this one, and a member of the union. Nothing else lists losses::

    from typing import Literal

    from madpo.core.lazy import F  # and torch: they load on first use
    from madpo.losses.base import BetaLoss, LossInputs, LossOutput, LossState

    class Cubic(BetaLoss):  # which has the field beta
        \"\"\"Cubic: L = -log sigma(m + m^3) with m = beta h, summed log-probs.\"\"\"

        kind: Literal["cubic"] = "cubic"

        def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
            margin = self.beta * inputs.log_ratio_margin  # one value per pair, nats
            return LossOutput(-F.logsigmoid(margin + margin**3), {})  # per pair, never averaged; numbers to log

It reads a column of the data by ``needs = frozenset({"reward_margin"})`` and ``inputs.required("reward_margin")``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from madpo.losses.adaptive import REDPO, AlphaDPO, BetaDPO
from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState, PreferenceLoss
from madpo.losses.composed import Combined, Custom
from madpo.losses.direct import BCO, DPO, IPO, RDPO, WPO, SimPO
from madpo.losses.madpo import MADPO, log_margin_weight, margin_coefficient, margin_weight
from madpo.losses.margin import ODPO, RPO, OmniDPO, SoftDPO, SoftMADPO

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
