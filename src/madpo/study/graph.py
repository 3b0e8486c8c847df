"""The steps of an experiment as a graph: the one place where it is built.

(base, where the vocabulary is cut, comes before sft and every reward model)

oracle -----+--------------------------------------------------------------------------------+
            v                                                                                |
sft -> responses -> pairs/<tier>/seed<n> -> reward_model/... -> margins/... --+              |
 |                    |                        |                              v              v
 |                    |                        +-> fold<k> -> out_of_fold   agreeing, redrawn
 |                    |                        +-> probe -> probe_margins
 +--------------------+--> reference/... --> policy/<tier>/<row>/seed<n> --> evaluation/<tier>/<row>/seed<n>

A user's own pairs (:mod:`madpo.study.own_graph`) take the place of what is above and left of them: the reference is
the model as it is, and a reward model judges in the oracle's place.

Names carry tier and seed always, and identities know nothing of the other rows, tiers and seeds: adding some to an
experiment leaves every finished step valid and where it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from madpo.core.config import Frozen
from madpo.operations import study_margins as margins
from madpo.operations import study_training as training
from madpo.operations.own_pairs import HeldoutStage, measure_heldout, read_own_pairs
from madpo.operations.settings import PairCorpus
from madpo.operations.study_auto import AutoStage, train_auto_policy
from madpo.operations.study_evaluation import EvaluationStage, evaluate_policy
from madpo.operations.study_pairs import PairStage, ResponseStage, label_pairs, sample_responses
from madpo.operations.trimming.trim import TrimStage, trim_base
from madpo.report.methods import OWN, SFT
from madpo.rewards.oracles import OracleStage, fit_oracle
from madpo.runner.step import OperationFn, Source, Step, needed_by
from madpo.study.methods import Method
from madpo.training.settings import OnlineStage, RewardModelStage

if TYPE_CHECKING:
    from madpo.models.hyperparameters import Optimisation
    from madpo.study.compare import CompareSettings
    from madpo.study.experiment import Experiment, PairSettings


_LIGHT = (
    *(fit_oracle, label_pairs, read_own_pairs),
    *(margins.keep_agreeing, margins.redraw_labels, margins.probe_margins),
)
"""Operations that need a core and no accelerator."""


class StudyGraph(ABC):
    """What every tier and seed shares.

    Args:
        experiment: its settings; rows: the methods that are compared, with their sweeps spelled out.

    Attributes:
        sft: the reference of all policies; base: of reward models, where it is no model that the user names.
        judge: the input of evaluations that gives rewards; empty where nothing does.
        reference: how it is called.
        heldout: whether policies are also measured on held-out pairs.
    """

    sft: Step | Source
    judge: Mapping[str, Step | Source]
    reference = SFT
    heldout = False

    def __init__(self, experiment: Experiment | CompareSettings, rows: Sequence[Method]) -> None:
        self.experiment, self.rows = experiment, rows
        self.steps: dict[str, Step] = {}
        self.base: dict[str, Step] = {}

    @abstractmethod
    def pairs(self, tier: str, seed: int) -> Step:
        """The step whose pairs the rows of a tier and seed learn from."""

    def build(self, tiers: Sequence[str]) -> list[Step]:
        """Every step that a measurement needs, upstream steps first."""
        rows, seeds = self.rows, self.experiment.seeds
        extra = [seed for row in rows for seed in row.seeds or () if seed not in seeds]
        for seed in (*seeds, *dict.fromkeys(extra)):
            for tier in tiers:
                runs = _TierRuns(self, tier, seed)
                if tier == tiers[0]:  # the held-out prompts are the same in every tier
                    groups = tuple(dict.fromkeys(row.group for row in rows))
                    runs.evaluation(self.reference, f"evaluation/sft/seed{seed}", {}, groups)
                for row in rows:
                    if seed in (row.seeds or seeds) and tier in (row.tiers or tiers):
                        runs.row(row)
        measured = (step for step in self.steps.values() if step.fn in (evaluate_policy, measure_heldout))
        return needed_by(measured, self.steps.values())

    def add(
        self,
        name: str,
        fn: OperationFn,
        config: Frozen,
        inputs: Mapping[str, Step | Source] | None = None,
        *,
        says: str,
        groups: tuple[str, ...] = (),
    ) -> Step:
        """The step of this name, built once."""
        if name not in self.steps:
            light = fn in _LIGHT
            self.steps[name] = Step(name, fn, config, inputs or {}, says=says, groups=groups, light=light)
        return self.steps[name]


def build(experiment: Experiment) -> list[Step]:
    """The steps of a study on a corpus, upstream steps first."""
    assert experiment.pairs is not None
    return _CorpusGraph(experiment, experiment.pairs).build(experiment.pairs.tiers)


class _CorpusGraph(StudyGraph):
    def __init__(self, experiment: Experiment, pairs: PairSettings) -> None:
        super().__init__(experiment, experiment.rows())
        self.made, self.permutation, e = pairs, experiment.seed, experiment
        assert not isinstance(e.corpus, PairCorpus)
        used = pairs.skip + pairs.prompts
        stopping = 0 if e.sft.early_stopping is None else e.sft.early_stopping.texts
        oracle = OracleStage(oracle=e.oracle, corpus=e.corpus, sft=e.sft.reviews + stopping, prompts=used, seed=e.seed)
        self.judge = {"oracle": self.add("oracle", fit_oracle, oracle, says="the oracle, which judges every response")}
        if e.vocabulary is not None:
            trim = TrimStage(model=e.model, **e.vocabulary.model_dump())
            says = "the base model, with the vocabulary that the corpus uses"
            self.base["base"] = self.add("base", trim_base, trim, says=says)
        sft = training.SFTStage(
            model=e.model,
            corpus=e.corpus,
            reviews=e.sft.reviews,
            max_tokens=e.responses.prompt_tokens + e.responses.max_new_tokens,
            optimisation=e.sft.optimisation,
            lora=e.sft.lora,
            seed=e.seed,
            prompt_tokens=0 if e.sft.score_prompt else e.responses.prompt_tokens,
            early_stopping=e.sft.early_stopping,
        )
        says = "fine-tuning the base model on positive reviews"
        self.sft = self.add("sft", training.train_sft, sft, self.base, says=says)
        given = {"prompts": pairs.prompts, "skip": pairs.skip, "seed": e.seed, **e.responses.model_dump()}
        responses, inputs = ResponseStage(corpus=e.corpus, **given), {"sft": self.sft, **self.judge}
        says = "two responses to the beginning of every negative review"
        self.responses = self.add("responses", sample_responses, responses, inputs, says=says)

    def pairs(self, tier: str, seed: int) -> Step:
        """Two responses, or the best of them and a review's own words, labelled by the oracle."""
        given = {"tier": tier, "train": self.made.train, "label_noise": self.made.label_noise}
        labels = PairStage.model_validate({**given, "seed": seed, "seed_permutation": self.permutation})
        name, says = f"pairs/{tier}/seed{seed}", f"pairs of the {tier} tier, labelled"
        return self.add(name, label_pairs, labels, {"responses": self.responses}, says=says)


class _TierRuns:
    """One tier with one seed: its pairs, its reward model, and the rows that are trained on them."""

    def __init__(self, graph: StudyGraph, tier: str, seed: int) -> None:
        self.graph, self.experiment, self.tier, self.seed = graph, graph.experiment, tier, seed
        self.place, self.whose = f"{tier}/seed{seed}", "your" if tier == OWN else f"the {tier}"
        self.pairs = graph.pairs(tier, seed)

    # Each just before the first row that reads it: results do not wait for what they do not need.
    def _logps(self, kind: str = "reference", **split: str) -> Step:
        optimisation = self.experiment.policy.optimisation
        sizes = {"batch_size": optimisation.batch_size, "micro_batch_size": optimisation.per_pass}
        inputs = {"pairs": self.pairs, "reference": self.graph.sft}
        stage = training.ReferenceStage.model_validate(sizes | split)
        says = "reference log-probabilities, once for all methods"
        return self._add(kind, training.reference_logps, stage, inputs, says)

    @cached_property
    def reward_model(self) -> Step:
        """The tier's reward model."""
        if self.experiment.reward_model.kind == "probe":
            return self._probe("reward_model")
        inputs = {"pairs": self.pairs, **self.graph.base}
        says = f"a reward model on {self.whose} pairs"
        return self._add("reward_model", training.train_reward_model, self._reward_model_stage(), inputs, says)

    def _add(self, kind: str, fn: OperationFn, config: Frozen, inputs: Mapping[str, Step | Source], says: str) -> Step:
        return self.graph.add(f"{kind}/{self.place}", fn, config, inputs, says=says)

    def _reward_model_stage(self, **fold: int) -> RewardModelStage:
        settings = dict(self.experiment.reward_model)
        del settings["folds"], settings["kind"]
        return RewardModelStage(model=self.experiment.model, seed=self.seed, **settings, **fold)

    def row(self, method: Method) -> None:
        """A row's training, where it has one, and its evaluation."""
        name, given = f"{self.tier}/{method.key}/seed{self.seed}", dict[str, Step]()
        if method.trainer == "best_of_n":
            given["reward_model"] = self.reward_model
        else:
            given["policy"] = self._policy(method, name)
        groups, samples = (method.group,), method.samples_per_prompt
        self.evaluation(method.name, f"evaluation/{name}", given, groups, best_of=method.n, samples=samples)

    def _policy(self, method: Method, name: str) -> Step:
        """The policy, and its measurement on held-out pairs where there are such."""
        fn, config, inputs = {"offline": self._offline, "auto": self._auto}.get(method.trainer, self._online)(method)
        says, groups = f"{method.name} on {self.whose} pairs", (method.group,)
        policy = self.graph.add(f"policy/{name}", fn, config, inputs, says=says, groups=groups)
        if self.graph.heldout:
            logps = self._logps("heldout_reference", split="heldout")
            given = {"pairs": self.pairs, "reference": self.graph.sft, "logps": logps, "policy": policy}
            size = self.experiment.policy.optimisation.per_pass
            stage = HeldoutStage(method=method.name, seed=self.seed, batch_size=size)
            says = f"{method.name} on held-out pairs"
            self.graph.add(f"heldout/{name}", measure_heldout, stage, given, says=says, groups=groups)
        return policy

    def _offline(self, method: Method) -> tuple[OperationFn, Frozen, dict[str, Step | Source]]:
        assert method.loss is not None
        inputs = self._learns_from(method)
        if method.reads & {"chosen_score", "rejected_score"}:
            inputs["scores"] = self._scores()
        if method.pairs == "agreeing":
            inputs["pairs"] = self._relabelled(method, margins.keep_agreeing, margins.AgreeingStage(), {})
        elif method.pairs == "redrawn":
            sides = {"logps": self._logps(), "scores": self._scores() if "scores" in inputs else None}
            given = {role: step for role, step in sides.items() if step is not None}
            turned = self._relabelled(method, margins.redraw_labels, margins.RedrawnStage(seed=self.seed), given)
            inputs |= {role: turned for role in inputs if role != "reference"}
        config = training.PolicyStage(method=method.name, loss=method.loss, seed=self.seed, **self._shared(method))
        return training.train_policy, config, inputs

    def _auto(self, method: Method) -> tuple[OperationFn, Frozen, dict[str, Step | Source]]:
        given = method.margins == "column"
        shared = self._shared(method)
        config = AutoStage(method=method.name, settings=method.averaging, seed=self.seed, given=given, **shared)
        return train_auto_policy, config, self._learns_from(method)

    def _shared(self, method: Method, optimisation: Optimisation | None = None) -> dict[str, Any]:
        """What every policy's training shares, at the row's learning rate."""
        policy = self.experiment.policy
        optimisation = optimisation or policy.optimisation
        rate = optimisation.learning_rate if method.learning_rate is None else method.learning_rate
        return {"optimisation": optimisation.model_copy(update={"learning_rate": rate}), "lora": policy.lora}

    def _learns_from(self, method: Method) -> dict[str, Step | Source]:
        inputs: dict[str, Step | Source] = {"pairs": self.pairs, "reference": self.graph.sft, "logps": self._logps()}
        if "reward_margin" in method.reads:
            inputs["margins"] = self._margins_of(method)
        return inputs

    def _online(self, method: Method) -> tuple[OperationFn, Frozen, dict[str, Step | Source]]:
        e, settings = self.experiment, method.settings
        config = OnlineStage(
            method=method.name,
            algorithm="rloo" if method.trainer == "rloo" else "grpo",
            settings=settings.model_copy(update={"optimisation": None}),
            **self._shared(method, settings.optimisation),
            seed=self.seed,
            **e.responses.model_dump(include={"max_new_tokens", "temperature", "top_p", "top_k"}),
        )
        inputs = {"pairs": self.pairs, "reference": self.graph.sft, "reward_model": self.reward_model}
        return training.train_online, config, inputs

    def _scores(self) -> Step:
        if self.experiment.reward_model.kind == "probe":  # which has none: those of the data
            return self.pairs
        inputs = {"pairs": self.pairs, "reward_model": self.reward_model}
        says = "the reward model's score of either side"
        return self._add("scores", margins.score_sides, margins.NoSettings(), inputs, says)

    def _out_of_fold(self) -> Step:
        folds = self.experiment.reward_model.folds
        assert folds is not None
        models = {
            f"fold{k}": self.graph.add(
                f"reward_model/{self.place}/fold{k}",
                training.train_reward_model,
                self._reward_model_stage(folds=folds, fold=k),
                {"pairs": self.pairs, **self.graph.base},
                says=f"a reward model on {self.whose} pairs, less part {k + 1} of {folds}",
            )
            for k in range(folds)
        }
        stage, inputs = margins.OutOfFoldStage(folds=folds, seed=self.seed), {"pairs": self.pairs, **models}
        says = "margins from reward models that have not seen the pair"
        return self._add("out_of_fold", margins.score_out_of_fold, stage, inputs, says)

    def _probe(self, kind: str) -> Step:
        folds = self.experiment.reward_model.folds
        stage = margins.ProbeStage(seed=self.seed, **({"folds": folds} if folds else {}))
        inputs = {"pairs": self.pairs, "reference": self.graph.sft}
        return self._add(kind, margins.fit_pairs_probe, stage, inputs, f"a probe on {self.whose} pairs")

    def _margins_of(self, method: Method) -> Step:
        if method.margins == "column":
            return self.pairs
        probed = self.experiment.reward_model.kind == "probe"  # whose margins are out of fold by themselves
        if method.margins == "out_of_fold" and not probed:
            return self._out_of_fold()
        if method.margins == "probe" and not probed:
            inputs = {"pairs": self.pairs, "reward_model": self._probe("probe")}
            says = "the probe's margins, out of fold"
            return self._add("probe_margins", margins.probe_margins, margins.NoSettings(), inputs, says)
        fn = margins.probe_margins if probed else margins.score_margins
        inputs = {"pairs": self.pairs, "reward_model": self.reward_model}
        return self._add("margins", fn, margins.NoSettings(), inputs, "how strongly the reward model prefers each pair")

    def _relabelled(self, method: Method, fn: OperationFn, config: Frozen, inputs: Mapping[str, Step]) -> Step:
        kind = method.pairs if method.margins == "in_sample" else f"{method.pairs}_{method.margins}"
        kind = f"{kind}_scores" if "scores" in inputs else kind
        says = f"{self.whose} pairs that the reward model agrees with"
        if method.pairs == "redrawn":
            says = f"{self.whose} pairs with labels from the reward model"
        return self._add(kind, fn, config, {"pairs": self.pairs, "margins": self._margins_of(method), **inputs}, says)

    def evaluation(
        self,
        method: str,
        name: str,
        inputs: Mapping[str, Step],
        groups: tuple[str, ...],
        best_of: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Samples and measures of one policy on the held-out prompts, where something judges them."""
        if not self.graph.judge:
            return
        e = self.experiment
        config = EvaluationStage(
            method=method,
            tier=self.tier,
            seed=self.seed,
            best_of=best_of,
            **e.evaluation.model_dump() | ({} if samples is None else {"samples_per_prompt": samples}),
            **e.responses.model_dump(exclude={"prompt_tokens"}),
        )
        common = {"reference": self.graph.sft, **self.graph.judge, "pairs": self.pairs}
        says = f"measuring {method} on held-out prompts"
        self.graph.add(name, evaluate_policy, config, {**common, **inputs}, says=says, groups=groups)
