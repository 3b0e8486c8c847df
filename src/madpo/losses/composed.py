"""Losses made of others: a weighted sum, such as MPO's, and a class of the user, named by where it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from madpo.core.custom import NamedClass
from madpo.core.errors import ConfigError
from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState, per_token, published

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def _loss(value: Any) -> Any:
    from madpo.losses import LossAdapter  # the union that this class is a member of

    return value if isinstance(value, LossConfig) else LossAdapter.validate_python(value)


Part = Annotated[SerializeAsAny[LossConfig], BeforeValidator(_loss)]


class Combined(LossConfig):
    """L = sum_i w_i L_i + nll (-log pi(y_w|x) / |y_w|), each term per pair, as MPO (Wang et al., arXiv 2411.10442).

    MPO is ``Combined(parts=(DPO(), BCO()), weights=(0.8, 0.2), nll=1)``. TRL's ``loss_type`` list is the same sum; its
    "sft" term is the mean over all tokens of a batch, ``nll`` the mean over pairs of their means per token. The
    implicit margin, which gives rewards and accuracies in the log, is that of the first part.
    """

    kind: Literal["combined"] = "combined"
    paper = published("2411.10442")
    parts: tuple[Part, ...] = Field(min_length=1)
    """The losses; those with running statistics (beta_dpo, alpha_dpo, re_dpo) are refused."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """One per part, not normalised; all 1 where left out."""
    nll: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood of the chosen completion, nats per token; larger imitates it more."""

    @model_validator(mode="after")
    def _check(self) -> Combined:
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ConfigError(f"there are {len(self.weights)} weights for {len(self.parts)} parts; give one for each")
        for part in self.parts:
            if part.stateful:
                raise ConfigError(
                    f"{_kind(part)} keeps running statistics, so it cannot be part of a sum; use it by itself"
                )
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any part reads."""
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether any part reads it."""
        return any(part.needs_reference for part in self.parts)

    @property
    def beta(self) -> float:
        """That of the first part."""
        return float(getattr(self.parts[0], "beta", 1.0))

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """As the first part reads a policy."""
        return self.parts[0].implicit_margin(inputs)

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        terms, metrics = [], {}
        kinds = [_kind(part) for part in self.parts]
        for i, (part, weight) in enumerate(zip(self.parts, self.weights or (1.0,) * len(self.parts), strict=True)):
            name = kinds[i] if kinds.count(kinds[i]) == 1 else f"{kinds[i]}_{i}"
            output = part(inputs)
            terms.append(weight * output.per_pair)
            metrics[f"{name}/loss"] = output.per_pair.detach()
            metrics |= {f"{name}/{key}": value for key, value in output.metrics.items()}
        if self.nll:
            nll = -per_token(inputs.policy_chosen_logps, inputs.chosen_lengths)
            terms.append(self.nll * nll)
            metrics["nll"] = nll.detach()
        return LossOutput(sum(terms[1:], terms[0]), metrics)


def _kind(part: LossConfig) -> str:
    return str(getattr(part, "kind", type(part).__name__))


def _own(name: str) -> Any:
    return property(lambda self: getattr(self.loss, name), doc=f"``{name}`` of the class.")


class Custom(NamedClass, LossConfig):
    """A :class:`LossConfig` subclass outside this package, with its parameters.

    The file that defines the class enters the configuration by its SHA-256, so that a changed loss is another
    experiment. What that file imports does not. The named code is imported and run when the configuration is
    made: name only files that you trust.
    """

    base = LossConfig
    kind: Literal["custom"] = "custom"

    @property
    def loss(self) -> LossConfig:
        """The loss itself."""
        own: LossConfig = self.built()
        return own

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
