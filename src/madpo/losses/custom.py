"""A loss of one's own, named by where its class is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from madpo.core.custom import NamedClass
from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def _own(name: str) -> Any:
    return property(lambda self: getattr(self.loss, name), doc=f"``{name}`` of the class.")


class Custom(NamedClass, LossConfig):
    """A :class:`LossConfig` subclass outside this package, with its parameters.

    The file that defines the class enters the configuration by its SHA-256, so that a changed loss is another
    experiment. What that file imports does not. The named code is imported and run when the configuration is
    made: name only files that you trust.
    """

    kind: Literal["custom"] = "custom"

    @model_validator(mode="after")
    def _build(self) -> Custom:
        _ = self.loss  # so that bad parameters fail with the configuration
        return self

    @property
    def loss(self) -> LossConfig:
        """The loss itself."""
        return self.built(LossConfig)

    needs = _own("needs")
    needs_reference = _own("needs_reference")
    stateful = _own("stateful")
    paper = _own("paper")
    beta: ClassVar[Any] = _own("beta")  # what asks for it takes 1 where there is none

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        return self.loss(inputs, state)

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        return self.loss.implicit_margin(inputs)

    def init_state(self, seed: int) -> LossState:
        return self.loss.init_state(seed)

    def statistic(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        return self.loss.statistic(inputs)

    def observe(self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool = True) -> LossState:
        return self.loss.observe(statistic, state, training=training)
