"""Settings of ``madpo train``. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from madpo.core import processes
from madpo.core.columns import MARGIN
from madpo.core.config import added, changed, identity_settings
from madpo.core.options import Cli
from madpo.losses import Loss, LossConfig, SoftDPO
from madpo.models.hyperparameters import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE, LoRA
from madpo.operations.arguments import ARGUMENTS, checked_arguments
from madpo.operations.settings import Training


class Auto(LossConfig):
    """The average of DPO and of a training on labels mixed with margins, in a share that unseen labels choose.

    See :mod:`madpo.operations.auto`. Pairs without ``reward_margin`` get margins from a probe of the reference.
    """

    kind: Literal["auto"] = "auto"
    needs = frozenset({MARGIN})
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference in all trainings; larger keeps the policy closer to it."""
    fast: Annotated[bool, Cli(bare=("fast",))] = False
    """One training, with a fixed label_share of 0.75."""
    kl: Annotated[float | None, Cli(bare=("kl",))] = Field(default=None, gt=0)
    """The adapter is scaled so that KL(policy || reference) per response is this, in nats; None scales nothing."""
    kl_prompts: int = Field(default=64, ge=1)
    """Prompts that the KL is measured on, at most: held-out ones where there are any."""
    kl_tokens: int = Field(default=64, ge=1)
    """Tokens of each response, at most."""

    @model_validator(mode="after")
    def _fits(self) -> Auto:
        if self.fast and self.kl is not None:
            raise ValueError("kl sets the strength of an average, and fast trains one policy; give one of them")
        return self


class TrainSettings(Training):
    """How a policy is trained; the model that it starts from is its reference."""

    loss: Annotated[Auto | Loss, Field(discriminator="kind")] = Auto()
    """What is learned: auto, which needs nothing else, or any preference loss."""
    args: Annotated[dict[str, Any], ARGUMENTS, AfterValidator(checked_arguments)] = Field(default_factory=dict)
    """Arguments of TRL's ``DPOConfig`` (and our ``PreferenceConfig``) by name."""
    lora: LoRA = LoRA()
    full: bool = False
    """Train all weights instead of an adapter."""
    qlora: bool = False
    """Hold the frozen weights in 4 bits (NF4) under the adapter. Needs a GPU and bitsandbytes; untested on one."""
    merge: bool = False
    """Also write the model with the adapter folded in."""
    export: Literal["gguf"] | None = added(None)
    """Also write policy.gguf for llama.cpp and Ollama, by llama.cpp's converter; an adapter is merged for it."""
    split_seed: int | None = added(None)
    """Seed of the choice of held-out prompts; None is ``args.seed``."""
    probe: bool = added(False)
    """A probe gives missing margins also where the data have scores, whose difference could be taken instead (without
    scores it does so in any case)."""
    first_look: bool = added(False)
    """Take the pairs of half of the prompts first, and keep what the policy says of the others before it is trained on
    them (first_look.jsonl)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the loaded weights; auto is float32 in full training, else bfloat16 where the hardware multiplies it."""

    @property
    def method(self) -> str:
        """What the policy is trained with, for people."""
        if not isinstance(self.loss, SoftDPO):
            return self.loss.kind
        share = self.loss.label_share
        mixed = f"labels and margins mixed (label share {share:.2f})" if share else "soft labels"
        return f"{'plain DPO' if share == 1 else mixed}{', for auto' if self.first_look else ''}"

    @property
    def merges(self) -> bool:
        """Whether the adapter is folded in."""
        return self.merge or (self.export is not None and not self.full)

    @field_validator("loss", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {"kind": "auto" if value.keys() <= Auto.model_fields.keys() else "madpo", **value}

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.full and self.merge:
            raise ValueError("full training has no adapter to merge: out/model is the whole model; leave --merge out")
        if self.full and (unused := changed(self.lora)):
            raise ValueError(f"full training has no adapter: lora.{unused[0]} has no effect; leave it or --full out")
        if self.probe and MARGIN not in self.loss.needs:
            raise ValueError(f"probe gives reward_margin, which the loss {self.loss.kind} does not read; leave it out")
        if self.full and getattr(self.loss, "kl", None) is not None:
            raise ValueError("loss.kl is reached by the strength of an adapter, which full training does not have")
        if self.full and self.qlora:
            raise ValueError("weights of 4 bits cannot be trained themselves; give full or qlora, not both")
        return self

    def arguments(self) -> dict[str, Any]:
        """``args`` with the defaults that are ours and not TRL's."""
        ours: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}
        ours |= {"report_to": "none", "disable_tqdm": True}
        ours["learning_rate"] = FULL_LEARNING_RATE if self.full else ADAPTER_LEARNING_RATE
        return ours | self.args

    def decisive(self) -> dict[str, Any]:
        """What bears on the result, as plain values: only arguments that change it, and in place of the two that split
        a step into micro-batches their product."""
        from madpo.training import PreferenceConfig
        from madpo.training.digests import BATCH, decisive_arguments

        values, found = self.arguments(), self.model_dump(mode="json")
        defaults = {field.name: field.default for field in fields(PreferenceConfig)}
        pairs, micro_batches = (int(values.get(name, defaults[name])) for name in BATCH)
        # A result without these is as it was before they existed.
        for name in ("split_seed", "probe", "first_look", "columns", "layout"):
            if getattr(self, name) == TrainSettings.model_fields[name].default:
                found.pop(name)
        batch = pairs * micro_batches * processes.world_size()
        return {**found, "loss": identity_settings(self.loss), "args": decisive_arguments(values), "batch": batch}
