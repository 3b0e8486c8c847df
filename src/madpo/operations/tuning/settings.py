"""Settings of ``madpo tune``: everything that ``madpo train`` takes, the search space, and what is selected on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from madpo.core.config import Frozen, part
from madpo.core.options import Cli
from madpo.losses import MADPO, Loss
from madpo.operations.settings import Sampling
from madpo.operations.train_settings import TrainSettings

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

# The default search spaces: for MADPO and beta-DPO the values of the paper's own searches.
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
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return type(settings).model_validate(data)


Criterion = Literal["log_loss", "accuracy", "reward"]
SEARCHED = ("loss", "args", "lora")


class RewardCriterion(Sampling):
    """How the reward of samples at equal KL is measured.

    More KL buys more reward. So each policy is measured at several strengths of its adapter (0 is the reference, 1 the
    policy as trained), and the reward is read off between the two strengths whose KL lies around ``kl``.
    """

    reward_model: str
    """A folder of ``madpo reward``, or a sequence classifier; best one that took no part in making the margins."""
    kl: float = Field(gt=0)
    """KL(policy || reference) per response, nats, at which rewards are compared."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Strengths of the adapter, rising; sampled up to the first whose KL reaches ``kl``."""
    prompts: int = Field(default=64, ge=1)
    """Held-out prompts of each fold, at most."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of a response at most."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampling."""

    @field_validator("strengths")
    @classmethod
    def _rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or value[0] <= 0 or any(b <= a for a, b in pairwise(value)):
            raise ValueError("strengths must be above 0 and rising, such as [0.5, 1.0, 1.5]")
        return value


class TuneSettings(TrainSettings):
    """How the parameters of a training are chosen. The fields of ``TrainSettings`` are what every trial shares."""

    loss: Loss = MADPO()
    """The preference loss."""
    space: Space = Field(default_factory=dict)
    """Dotted settings (``loss.tau``, ``args.learning_rate``, ``lora.rank``) and what is tried of each; empty is the
    loss's own: the values of the paper's searches for MADPO and beta-DPO, beta for the others."""
    folds: int = Field(default=3, ge=2)
    """Parts of the pairs, whole prompts at a time; each is held out from one training of every trial."""
    trials: int = Field(default=20, ge=1)
    """Settings to try; a grid ends when it is through."""
    sampler: Literal["auto", "tpe", "grid", "random"] = "auto"
    """How Optuna searches; auto is a grid where the space is finite and fits into ``trials``, else TPE."""
    criterion: Criterion = "log_loss"
    """What the choice is made on: held-out "log_loss" after one fitted temperature, held-out "accuracy", or "reward"
    of samples at equal KL. Raw log loss is shown and cannot be chosen."""
    reward: Annotated[RewardCriterion | None, Cli(short=True)] = None
    """How the reward is measured, for the criterion "reward"."""
    baseline: bool = True
    """Also measure plain DPO with the same arguments: shown, compared with, never chosen."""
    search_seed: int = Field(default=0, ge=0)
    """Seed of folds and search; ``args.seed`` is that of each training, the same in all."""

    @field_validator("loss", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        return {"kind": "madpo", **value} if isinstance(value, dict) else value

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return flat(value) if isinstance(value, Mapping) else value

    @field_validator("criterion", mode="before")
    @classmethod
    def _not_the_raw_log_loss(cls, value: Any) -> Any:
        if value in ("raw_log_loss", "loss", "eval_loss"):
            raise ValueError(
                "the raw log loss is lowest for plain DPO by construction (its target is the margin itself, "
                "another loss's is not), so it is shown and never selected on; take log_loss, accuracy or reward"
            )
        return value

    @model_validator(mode="after")
    def _searches(self) -> TuneSettings:
        if (self.criterion == "reward") != (self.reward is not None):
            raise ValueError('criterion "reward" and the table reward go together; give both or neither')
        if self.reward is not None and self.full:
            raise ValueError(
                "the reward at equal KL changes an adapter's strength, and full training does not have an adapter"
            )
        if not self.searched:
            raise ValueError(f"the loss {self.loss.kind} has no search space of its own; give one in [space]")
        for key, dimension in self.searched.items():
            if key.split(".")[0] not in SEARCHED or "." not in key:
                raise ValueError(f"space has the key {key!r}, but only loss.*, args.* and lora.* are searched")
            for corner in dimension.corners:
                try:
                    with_values(self.training, {key: corner})
                except ValidationError as error:
                    message = error.errors()[0]["msg"].removeprefix("Value error, ")
                    reason = message.replace("Input should be", "must be")
                    raise ValueError(f"space.{key}: {corner!r} cannot be: {reason}") from None
        if self.sampler == "grid" and any(dimension.values is None for dimension in self.searched.values()):
            raise ValueError('sampler "grid" needs values for every key of the space; give values, or take "tpe"')
        return self

    @property
    def searched(self) -> Space:
        """The search space: as given, or the loss's own."""
        beta = {"loss.beta": _BETA} if "beta" in type(self.loss).model_fields else {}
        return self.space or SPACES.get(self.loss.kind) or beta

    @property
    def training(self) -> TrainSettings:
        """What ``madpo train`` would take, before any trial's values."""
        return part(self, TrainSettings)

    @property
    def baseline_training(self) -> TrainSettings:
        """Plain DPO with the same arguments, at the loss's beta where that means the same."""
        beta = getattr(self.loss, "beta", 0.1) if self.loss.kind in ("madpo", "soft_madpo", "beta_dpo") else 0.1
        return TrainSettings.model_validate({**self.training.model_dump(), "loss": {"kind": "dpo", "beta": beta}})
