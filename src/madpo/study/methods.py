"""The rows of a study: which method, on which pairs, in which group, and sweeps, each of which is many rows."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from madpo.core.config import Frozen
from madpo.core.suggestions import did_you_mean
from madpo.data.corpus import Tier
from madpo.losses import Custom, Loss, LossAdapter
from madpo.training.settings import AutoSettings, OnlineSettings

Group = Literal["core", "sensitivity", "ablation", "frontier", "rivals", "auto"]
_SIGNS = {"beta": "β", "tau": "τ", "lam": "λ", "c_max": "c", "batch_scale": "m", "keep": "p", "learning_rate": "lr"}
_OF_TRAINING = ("learning_rate",)  # fields of a row that a sweep varies like those of its loss


class Method(Frozen):
    """A row of the tables, or with ``sweep`` one row per combination of values."""

    name: str = Field(min_length=1)
    group: Group = "core"
    """Part of the study that the row belongs to; ``--only`` chooses by it."""
    trainer: Literal["offline", "auto", "rloo", "grpo", "best_of_n"] = "offline"
    """"offline": a preference loss on the pairs. "auto": what ``madpo train`` does with no loss named, two trainings
    and their average. "rloo", "grpo": policy optimisation against the reward model with a KL penalty. "best_of_n": no
    training; of n responses the one that the reward model likes best."""
    loss: Loss | None = None
    """Only of the trainer "offline"."""
    pairs: Literal["all", "agreeing", "redrawn"] = "all"
    """"agreeing": the training pairs whose label the reward model agrees with. "redrawn": all, with labels drawn again
    from the reward model's probabilities."""
    margins: Literal["in_sample", "out_of_fold", "probe", "column"] = "in_sample"
    """Whose margins the loss and ``pairs`` read: those of the tier's own reward model, which has been trained on the
    same pairs; of the fold that has not (``reward_model.folds``); of a probe of the SFT model's states, out of fold;
    or those that a user's own pairs have as a column."""
    auto: AutoSettings | None = None
    """Settings of the trainer "auto"."""
    online: OnlineSettings | None = None
    """Settings of the trainers "rloo" and "grpo"."""
    n: int | None = Field(default=None, ge=2)
    """Responses per prompt that the trainer "best_of_n" chooses from."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of this row's training; None is ``policy.optimisation.learning_rate``, or that of ``online``."""
    sweep: dict[str, tuple[JsonValue, ...]] = Field(default_factory=dict)
    """Field -> values: one row for every combination. Fields are those of the loss (of ``online`` for "rloo" and
    "grpo", of ``auto`` for "auto"; ``n`` for "best_of_n"), and ``learning_rate``."""
    seeds: tuple[int, ...] | None = None
    """Seeds of this row; None is the experiment's."""
    tiers: tuple[Tier, ...] | None = None
    """Tiers of this row; None is the experiment's."""
    samples_per_prompt: int | None = Field(default=None, ge=1)
    """Responses to every held-out prompt when this row is measured; None is ``evaluation.samples_per_prompt``."""

    @model_validator(mode="after")
    def _check(self) -> Method:
        if (self.loss is not None) != (self.trainer == "offline"):
            raise ValueError(
                f"method {self.name!r}: the trainer {self.trainer!r} "
                + ("needs a loss" if self.loss is None else "takes no loss; remove it")
            )
        if self.trainer == "best_of_n" and self.n is None and "n" not in self.sweep:
            raise ValueError(f"method {self.name!r}: best_of_n needs n, or values of n in sweep")
        for field, trainers in {"n": ["best_of_n"], "online": ["rloo", "grpo"], "auto": ["auto"]}.items():
            if getattr(self, field) is not None and self.trainer not in trainers:
                whose = f"trainer{'s' * (len(trainers) > 1)} {' and '.join(trainers)}"
                raise ValueError(f"method {self.name!r}: {field} belongs to the {whose}; remove it")
        if self.trainer == "best_of_n" and (self.learning_rate is not None or "learning_rate" in self.sweep):
            raise ValueError(f"method {self.name!r}: best_of_n trains nothing; remove learning_rate")
        if self.trainer == "auto" and self.pairs != "all":
            raise ValueError(f"method {self.name!r}: auto takes all pairs; remove pairs")
        if self.reads and self.trainer == "auto" and self.margins == "in_sample":
            raise ValueError(
                f"method {self.name!r}: auto needs margins of models that have not seen the pair; set margins to "
                "'probe' or 'out_of_fold'"
            )
        if self.trainer not in ("offline", "auto") and (self.pairs != "all" or self.margins != "in_sample"):
            raise ValueError(f"method {self.name!r}: {self.trainer} learns from no pairs; remove pairs and margins")
        _ = self.rows()  # so that a bad value in a sweep fails with the configuration
        return self

    @property
    def key(self) -> str:
        """The name as part of a path: "β-DPO (0.6)" -> "beta-dpo-0.6"."""
        plain = self.name.lower()
        for name, sign in _SIGNS.items():
            plain = plain.replace(sign, name) if len(sign) == 1 and not sign.isascii() else plain
        return re.sub(r"[^a-z0-9.+=]+", "-", plain).strip("-.") or "method"

    @property
    def settings(self) -> OnlineSettings:
        """Those of "rloo" and "grpo", or the defaults."""
        return self.online or OnlineSettings()

    @property
    def averaging(self) -> AutoSettings:
        """Those of "auto", or the defaults."""
        return self.auto or AutoSettings()

    @property
    def reads(self) -> frozenset[str]:
        """What the training reads of a reward model: "reward_margin", "chosen_score", "rejected_score"."""
        columns = {"reward_margin", "chosen_score", "rejected_score"}
        if self.trainer == "auto":
            return frozenset() if self.averaging.label_share == 1 else frozenset({"reward_margin"})
        return frozenset() if self.loss is None else frozenset(self.loss.needs & columns)

    def rows(self) -> tuple[Method, ...]:
        """This row, or those of its sweep; none of them has a sweep."""
        if not self.sweep:
            return (self,)
        for name, values in self.sweep.items():
            if not values:
                raise ValueError(f"method {self.name!r}: sweep.{name} has no values")
        combinations = itertools.product(*self.sweep.values())
        return tuple(self._row(dict(zip(self.sweep, values, strict=True))) for values in combinations)

    def _row(self, values: Mapping[str, JsonValue]) -> Method:
        words = " ".join(f"{_SIGNS.get(name, name)}={value}" for name, value in values.items())
        changes: dict[str, Any] = {"name": f"{self.name} {words}", "sweep": {}}
        changes |= {name: value for name, value in values.items() if name in _OF_TRAINING}
        values = {name: value for name, value in values.items() if name not in _OF_TRAINING}
        fields: Any
        if self.trainer == "best_of_n":
            fields, parts = {"n": self.n}, dict(values)
            changes |= parts
        elif self.loss is None:
            where, settings = ("auto", self.averaging) if self.trainer == "auto" else ("online", self.settings)
            fields = dict(settings)  # as objects: a dump would lose fields that stay outside identities
            changes[where] = {**fields, **values}
        elif isinstance(self.loss, Custom):
            fields = type(self.loss.loss).model_fields
            changes["loss"] = self.loss.model_copy(update={"parameters": {**self.loss.parameters, **values}})
        else:
            fields = type(self.loss).model_fields
            given = {name: value for name, value in {**self.loss.model_dump(), **values}.items() if name in fields}
            try:
                changes["loss"] = LossAdapter.validate_python(given)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(str(part) for part in first["loc"][1:])
                mistake = f"sweep.{where} = {first['input']!r}: {first['msg']}"
                raise ValueError(f"method {self.name!r}: {mistake}") from None
        known = [*fields, *_OF_TRAINING]
        for name in values:
            if name not in fields:
                near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise ValueError(f"method {self.name!r}: sweep.{name} is no field to vary{near}")
        return Method.model_validate({**dict(self), **changes})


class Selection(Frozen):
    """A choice among rows, made on one half of the held-out prompts and reported on the other."""

    name: str = Field(min_length=1)
    """How the chosen row is shown: "MADPO, best of 6"."""
    among: tuple[str, ...] = Field(min_length=1)
    """Names of rows, or patterns on them ("MADPO τ=*")."""

    def candidates(self, names: Sequence[str]) -> list[str]:
        """The rows that ``among`` names, in the given order.

        Raises:
            ValueError: an entry names none.
        """
        for word in self.among:
            if not any(fnmatch.fnmatchcase(name, word) for name in names):
                raise ValueError(f"selection {self.name!r}: {word!r} names no row{did_you_mean(word, list(names))}")
        return [name for name in names if any(fnmatch.fnmatchcase(name, word) for word in self.among)]
