"""The search space of ``madpo tune``: which settings are tried, and how a trial's values become a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import model_validator

from madpo.core.config import Frozen

if TYPE_CHECKING:
    from optuna import Trial

T = TypeVar("T", bound=Frozen)
Value = bool | int | float | str


class Dimension(Frozen):
    """One setting that is searched: ``{ values = [2, 3, 4] }`` or ``{ low = 2, high = 10 }``."""

    values: tuple[Value, ...] | None = None
    """What is tried, in this order of a grid."""
    low: float | None = None
    high: float | None = None
    """The ends of a range, both included."""
    log: bool = False
    """Draw the logarithm evenly: for settings whose size is unknown, such as beta or a learning rate."""
    integer: bool = False
    """Only whole numbers."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Dimension:
        if self.values is not None:
            if self.low is not None or self.high is not None or self.log or self.integer:
                raise ValueError("give values, or low and high, not both")
            if not self.values or len(set(self.values)) < len(self.values):
                raise ValueError("values must hold at least one value, each once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give values, or low and high")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}, but must be below high, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, but a logarithm needs a number above 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("low and high must be whole numbers where integer is true")
        return self

    @property
    def corners(self) -> tuple[Value, ...]:
        """Values that must be possible if every value of this dimension is to be."""
        if self.values is not None:
            return self.values
        assert self.low is not None
        assert self.high is not None
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def suggested(self, name: str, trial: Trial) -> Value:
        """What Optuna tries next."""
        if self.values is not None:
            chosen: Value = trial.suggest_categorical(name, self.values)  # type: ignore[assignment]
            return chosen
        low, high = self.corners
        if self.integer:
            return trial.suggest_int(name, int(low), int(high), log=self.log)
        return trial.suggest_float(name, float(low), float(high), log=self.log)


Space = dict[str, Dimension]

_TAU = Dimension(values=(2.0, 4.0, 7.0, 10.0))
_C_MAX = Dimension(values=(2.0, 3.0, 4.0))
_BETA = Dimension(low=0.01, high=1.0, log=True)

# What is searched where nothing else is said: for MADPO and beta-DPO the values of the paper's own searches.
SPACES: dict[str, Space] = {
    "madpo": {"loss.tau": _TAU, "loss.c_max": _C_MAX},
    "soft_madpo": {"loss.tau": _TAU, "loss.c_max": _C_MAX},
    "beta_dpo": {
        "loss.batch_scale": Dimension(values=(0.4, 0.6, 0.8)),
        "loss.keep": Dimension(values=(0.4, 0.6, 0.8)),
    },
}


def flat(tables: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys and dimensions out of nested tables: ``[space.loss]`` ``tau = [2, 4]`` is ``"loss.tau"``."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, list | tuple):
            found[above + key] = {"values": value}
        elif isinstance(value, Mapping) and not set(value) & set(Dimension.model_fields):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def default_space(kind: str, has_beta: bool) -> Space | None:
    """The search space of a loss; None where there is nothing to search by default."""
    return SPACES.get(kind) or ({"loss.beta": _BETA} if has_beta else None)


def grid_size(space: Mapping[str, Dimension]) -> float:
    """How many settings the space holds; infinite with a range in it."""
    return math.prod(len(d.values) if d.values is not None else math.inf for d in space.values())


def with_values(settings: T, values: Mapping[str, Any]) -> T:
    """``settings`` with the dotted keys of ``values`` exchanged, checked like any other configuration.

    Raises:
        pydantic.ValidationError: a key that does not exist, or a value that is out of range.
    """
    data = settings.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        here = data
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return type(settings).model_validate(data)
