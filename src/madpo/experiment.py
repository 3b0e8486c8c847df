"""An experiment: its configuration, and the graph of steps that it stands for. The one place where the graph is built.

oracle ----------+
                 v
sft ---> responses ---> pairs/<tier> ---> reward_model/<tier> ---> margins/<tier> --+
  |                          |                                                      v
  +--------------------------+---> reference/<tier> ---> policy/<tier>/<method>/seed<n> ---> evaluation/...
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from madpo.config import Frozen, find_experiment, load_config
from madpo.corpus import Corpus, PackagedIMDB
from madpo.evaluation import EvaluationStage, evaluate_policy
from madpo.executors import Inline, Processes
from madpo.losses import Loss
from madpo.models import LoRA
from madpo.pipeline import RunResult, Step, run
from madpo.preferences import PairStage, ResponseStage, Tier, label_pairs, sample_responses
from madpo.report import rebuild_report
from madpo.rewards import NgramOracle, Oracle, OracleStage, fit_oracle
from madpo.training.stages import (
    MarginStage,
    Optimisation,
    PolicyStage,
    ReferenceStage,
    RewardModelStage,
    SFTStage,
    reference_logps,
    score_margins,
    train_policy,
    train_reward_model,
    train_sft,
)

Group = Literal["core", "sensitivity", "ablation", "frontier", "rivals"]


class SFTSettings(Frozen):
    """Supervised fine-tuning on the corpus's last positive reviews."""

    reviews: int = Field(ge=1)
    optimisation: Optimisation
    lora: LoRA = LoRA()


class ResponseSettings(Frozen):
    """Prompts from negative reviews, and how responses are sampled, for the pairs and for every evaluation."""

    prompt_tokens: int = Field(default=20, ge=1)
    max_new_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=128, ge=1)
    """Prompts at once; changes the speed alone."""


class PairSettings(Frozen):
    """How many pairs, of which tiers, labelled how."""

    tiers: tuple[Tier, ...] = ("high", "medium", "low")
    prompts: int = Field(ge=2)
    """Negative reviews that prompts are cut from: one pair each, in every tier."""
    train: int = Field(ge=1)
    """Pairs for training; the others are held out."""
    label_noise: float = Field(default=1.0, ge=0)
    """Scale of the Gumbel noise on the oracle's rewards; 1 is Bradley-Terry in the oracle's unit."""

    @model_validator(mode="after")
    def _check(self) -> PairSettings:
        if self.train >= self.prompts:
            raise ValueError(f"train = {self.train} must be below prompts = {self.prompts}: some pairs are held out")
        if len(set(self.tiers)) != len(self.tiers) or not self.tiers:
            raise ValueError("tiers must name one tier or more, each once")
        return self


class RewardModelSettings(Frozen):
    """Bradley-Terry reward models, one per tier."""

    optimisation: Optimisation
    lora: LoRA = LoRA()
    eval_every: int = Field(default=20, ge=1)
    patience: int = Field(default=3, ge=1)
    stopping_share: float = Field(default=1.0, gt=0, le=1)


class PolicySettings(Frozen):
    """What every method's training shares: the comparison differs in the loss alone."""

    optimisation: Optimisation
    lora: LoRA = LoRA()


class EvaluationSettings(Frozen):
    """Sampling for the measurement of policies."""

    prompts: int | None = Field(default=None, ge=1)
    """The first so many held-out prompts; all of them when left out."""
    samples_per_prompt: int = Field(default=1, ge=1)


class Method(Frozen):
    """A row of the tables."""

    name: str = Field(min_length=1)
    group: Group = "core"
    """Part of the study that the row belongs to; ``--only`` chooses by it."""
    loss: Loss

    @property
    def key(self) -> str:
        """The name as part of a path: "β-DPO (0.6)" -> "beta-dpo-0.6"."""
        plain = self.name.lower().replace("β", "beta").replace("τ", "tau")
        return re.sub(r"[^a-z0-9.+=]+", "-", plain).strip("-.") or "method"


class Experiment(Frozen):
    """The whole of an experiment, as a TOML file spells it out."""

    title: str
    model: str = "gemma-3-270m"
    """Packaged name, folder or hub id of the base model."""
    corpus: Corpus = PackagedIMDB()
    oracle: Oracle = NgramOracle()
    seed: int = Field(default=0, ge=0)
    """Decides SFT, responses and the permutation, which all runs share."""
    seeds: tuple[int, ...] = (0,)
    """One run each of labels, reward model, policies and evaluation draws."""
    sft: SFTSettings
    responses: ResponseSettings = ResponseSettings()
    pairs: PairSettings
    reward_model: RewardModelSettings
    policy: PolicySettings
    method: tuple[Method, ...] = Field(min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        keys = [method.key for method in self.method]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"two methods are called {twice[0]!r}; give each a name of its own")
        heldout = self.pairs.prompts - self.pairs.train
        if self.evaluation.prompts is not None and self.evaluation.prompts > heldout:
            raise ValueError(f"evaluation.prompts = {self.evaluation.prompts}, but only {heldout} pairs are held out")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("seeds must hold one seed or more, each once")
        return self

    def steps(self) -> list[Step]:
        """The graph, upstream steps first. Building it runs nothing."""
        oracle = self._oracle()
        sft = self._sft()
        responses = self._responses(sft, oracle)
        steps = [oracle, sft, responses]
        for seed in self.seeds:
            for tier in self.pairs.tiers:
                steps += self._tier(tier, seed, sft, oracle, responses)
        return steps

    def _oracle(self) -> Step:
        config = OracleStage(
            oracle=self.oracle, corpus=self.corpus, sft=self.sft.reviews, prompts=self.pairs.prompts, seed=self.seed
        )
        return Step("oracle", fit_oracle, config, says="the oracle, which judges every response")

    def _sft(self) -> Step:
        config = SFTStage(
            model=self.model,
            corpus=self.corpus,
            reviews=self.sft.reviews,
            max_tokens=self.responses.prompt_tokens + self.responses.max_new_tokens,
            optimisation=self.sft.optimisation,
            lora=self.sft.lora,
            seed=self.seed,
        )
        return Step("sft", train_sft, config, says="fine-tuning the base model on positive reviews")

    def _responses(self, sft: Step, oracle: Step) -> Step:
        config = ResponseStage(
            corpus=self.corpus, prompts=self.pairs.prompts, seed=self.seed, **self.responses.model_dump()
        )
        says = "two responses to the beginning of every negative review"
        return Step("responses", sample_responses, config, {"sft": sft, "oracle": oracle}, says=says)

    def _tier(self, tier: Tier, seed: int, sft: Step, oracle: Step, responses: Step) -> list[Step]:
        # The seed always shows in the name, and so in the folder: adding a seed later keeps what is finished.
        place = f"{tier}/seed{seed}"
        labels = PairStage(
            tier=tier,
            train=self.pairs.train,
            label_noise=self.pairs.label_noise,
            seed=seed,
            seed_permutation=self.seed,
        )
        pairs = Step(
            f"pairs/{place}", label_pairs, labels, {"responses": responses}, says=f"pairs of the {tier} tier, labelled"
        )
        reward_model = Step(
            f"reward_model/{place}",
            train_reward_model,
            RewardModelStage(model=self.model, seed=seed, **_fields(self.reward_model)),
            {"pairs": pairs},
            says=f"a reward model on the {tier} pairs",
        )
        margins = Step(
            f"margins/{place}",
            score_margins,
            MarginStage(),
            {"pairs": pairs, "reward_model": reward_model},
            says="how strongly the reward model prefers each pair",
        )
        batch = self.policy.optimisation.micro_batch_size or self.policy.optimisation.batch_size
        logps = Step(
            f"reference/{place}",
            reference_logps,
            ReferenceStage(batch_size=batch),
            {"pairs": pairs, "reference": sft},
            says="reference log-probabilities, once for all methods",
        )
        steps = [pairs, reward_model, margins, logps]
        evaluation = self._evaluation(tier, seed, pairs, sft, oracle)
        if tier == self.pairs.tiers[0]:  # the held-out prompts are the same in every tier
            steps.append(evaluation("SFT", f"evaluation/sft/seed{seed}", {}, tuple({m.group: 0 for m in self.method})))
        for method in self.method:
            inputs = {"pairs": pairs, "reference": sft, "logps": logps}
            if "reward_margin" in method.loss.needs:
                inputs["margins"] = margins
            policy = Step(
                f"policy/{tier}/{method.key}/seed{seed}",
                train_policy,
                PolicyStage(method=method.name, loss=method.loss, seed=seed, **_fields(self.policy)),
                inputs,
                says=f"{method.name} on the {tier} pairs",
                groups=(method.group,),
            )
            name = f"evaluation/{tier}/{method.key}/seed{seed}"
            steps += [policy, evaluation(method.name, name, {"policy": policy}, policy.groups)]
        return steps

    def _evaluation(self, tier: Tier, seed: int, pairs: Step, sft: Step, oracle: Step) -> Any:
        def step(method: str, name: str, policy: dict[str, Step], groups: tuple[str, ...]) -> Step:
            config = EvaluationStage(
                method=method,
                tier=tier,
                seed=seed,
                **self.evaluation.model_dump(),
                **self.responses.model_dump(exclude={"prompt_tokens"}),
            )
            inputs = {"reference": sft, "oracle": oracle, "pairs": pairs, **policy}
            says = f"measuring {method} on held-out prompts"
            return Step(name, evaluate_policy, config, inputs, says=says, groups=groups)

        return step


def _fields(settings: Frozen) -> dict[str, Any]:
    """The fields as objects (a dump would lose fields that stay outside identities)."""
    return {name: getattr(settings, name) for name in type(settings).model_fields}


def run_experiment(
    name_or_path: str,
    output_dir: Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    dry_run: bool = False,
    jobs: int = 1,
) -> RunResult:
    """Run a packaged experiment or a TOML file, or continue it, and write its report.

    Args:
        name_or_path: "quickstart", "smoke", or the path of a TOML file.
        output_dir: the folder of the run; finished steps in it are kept.
        overrides: settings to change, such as ``"policy.optimisation.learning_rate=1e-4"``.
        only: groups of methods, or patterns on step names; their upstream steps are included. Empty is everything.
        dry_run: say what would run, and write nothing.
        jobs: steps at once, each in a process of its own.

    Raises:
        ConfigError: a mistake in the experiment, before any model loads.
    """
    # Notices from one library about another's names say nothing to the person who runs an experiment.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # the same for worker processes
    experiment = load_config(find_experiment(name_or_path), Experiment, overrides)
    resolved = experiment.model_dump(mode="json")
    about = {"title": experiment.title, "experiment": resolved}
    steps = experiment.steps()
    if jobs > 1:
        with Processes(jobs) as pool:
            result = run(steps, output_dir, pool, only=only, dry_run=dry_run, about=about)
    else:
        result = run(steps, output_dir, Inline(), only=only, dry_run=dry_run, about=about)
    if not dry_run and result.records:
        rebuild_report(output_dir)  # of the whole run, whichever part of it this call worked on
    return result
