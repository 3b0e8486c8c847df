"""An experiment: its configuration, and running it. :mod:`madpo.study.graph` builds its steps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from madpo.core.config import Frozen, Seed, find_experiment, load_config
from madpo.core.progress import say
from madpo.core.storage import expanded
from madpo.data.corpus import Corpus, PackagedIMDB, Tier
from madpo.models.hyperparameters import AdapterTraining, EarlyStopping, Optimisation
from madpo.operations.settings import NONE_IF_FALSE, PROBE, EvaluationSettings, PairCorpus, StudyDecoding
from madpo.operations.trackers import reporting_to
from madpo.report import rebuild_report
from madpo.report.live import LiveReport
from madpo.rewards.oracles import NgramOracle, Oracle
from madpo.runner.executors import Executor, Inline
from madpo.runner.run import RunResult, finished, run
from madpo.runner.step import Step
from madpo.runner.uploads import Upload
from madpo.study.methods import Group, Method, Selection
from madpo.training.settings import RewardTraining


class VocabularySettings(Frozen):
    """The base model with a vocabulary cut to the corpus, as ``madpo trim-vocab`` does. The whole study then uses it:
    faster, and no longer the paper's model."""

    size: int = Field(ge=1)
    """Entries to keep at most."""
    eval_texts: int = Field(default=128, ge=1)
    """Held-out texts to measure the cost on at most: most of the time that cutting takes."""


class SFTSettings(AdapterTraining):
    """Supervised fine-tuning on the corpus's last positive reviews, or on the chosen completions of training pairs."""

    reviews: int = Field(ge=1)
    """Texts, or pairs at most, to train on."""
    score_prompt: bool = True
    """Whether the first ``responses.prompt_tokens`` of a review count in the loss. The paper and its notebook leave
    them out, as a prompt."""
    early_stopping: EarlyStopping | None = None
    """None trains all epochs; the author's notebook stops (every 20 updates, patience 3)."""


class ResponseSettings(StudyDecoding):
    """Prompts from negative reviews, and how responses are sampled, for the pairs and for every evaluation."""

    prompt_tokens: int = Field(default=20, ge=1)
    max_new_tokens: int = Field(default=48, ge=1)
    batch_size: int = Field(default=128, ge=1)


class PairSettings(Frozen):
    """How many pairs, of which tiers, labelled how."""

    tiers: tuple[Tier, ...] = ("high", "medium", "low")
    prompts: int = Field(ge=2)
    """Negative reviews that prompts are cut from: one pair each, in every tier."""
    skip: int = Field(default=0, ge=0)
    """Negative reviews before those, which are left out: a pilot's prompts are then used nowhere else."""
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


class RewardModelSettings(RewardTraining):
    """Bradley-Terry reward models, one per tier."""

    kind: Literal["trained", "probe"] = "trained"
    """trained: an adapter with a head. probe: a regression on the states of the SFT model, which takes seconds; its
    margins of training pairs are out of fold, and of the other settings it reads ``folds``."""
    optimisation: Optimisation | None = None
    """How a trained reward model is trained; a probe has none."""

    @model_validator(mode="after")
    def _check(self) -> RewardModelSettings:
        if (self.kind == "trained") == (self.optimisation is None):
            remedy = "add it" if self.kind == "trained" else "remove it, since a probe is not trained by steps"
            raise ValueError(f"optimisation {'is missing' if self.kind == 'trained' else 'is given'}: {remedy}")
        return self


class Experiment(Frozen):
    """The whole of an experiment, as a TOML file spells it out."""

    title: str
    model: str = "gemma-3-270m"
    """Packaged name, folder or hub id of the base model."""
    vocabulary: Annotated[VocabularySettings | None, NONE_IF_FALSE] = None
    """None, or false in TOML, which has no word for nothing, is the whole model."""
    corpus: Annotated[Corpus | PairCorpus, Field(discriminator="kind")] = PackagedIMDB()
    """Where texts come from; or pairs as they are (``kind = "pairs"``), which take the place of ``pairs``, the prompts
    and, with a judge of their own, ``oracle``."""
    oracle: Oracle = NgramOracle()
    seed: Seed = 0
    """Decides SFT, responses and the permutation, which all runs share."""
    seeds: tuple[Seed, ...] = (0,)
    """One run each of labels, reward model, policies and evaluation draws."""
    sft: SFTSettings
    responses: ResponseSettings = ResponseSettings()
    pairs: PairSettings | None = None
    """What is made of the corpus; None where it has pairs."""
    reward_model: RewardModelSettings
    policy: AdapterTraining
    """What every method's training shares: the comparison differs in the loss only."""
    method: tuple[Method, ...] = Field(min_length=1)
    extra: tuple[Group, ...] = ()
    """Groups of methods that a run leaves out unless ``--only`` names them."""
    selection: tuple[Selection, ...] = ()
    """Choices among rows of one method, per tier."""
    selection_seed: int = Field(default=0, ge=0)
    """Which half of the held-out prompts selects; the other half reports."""
    evaluation: EvaluationSettings = EvaluationSettings()
    report_to: tuple[str, ...] = Field(default=(), exclude=True)
    """Trackers that are installed, such as tensorboard, trackio or wandb: every training is a run of them."""

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        keys = [method.key for method in self.rows()]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"two methods are called {twice[0]!r}; give each a name of its own")
        if isinstance(self.corpus, PairCorpus):
            heldout, sampled = self.corpus.heldout, []
            parts = {
                "pairs": self.pairs is not None,
                "oracle": "oracle" in self.model_fields_set,
                "responses.prompt_tokens": "prompt_tokens" in self.responses.model_fields_set,
                "tiers of methods": any(row.tiers for row in self.rows()),
            }
            if given := [name for name, there in parts.items() if there]:
                raise ValueError(f"the corpus has pairs and a judge, so nothing reads {', '.join(given)}; remove it")
        elif self.pairs is None:
            raise ValueError("pairs is missing; say how many of which tiers are made, or give a corpus that has pairs")
        else:
            heldout = self.pairs.prompts - self.pairs.train
            sampled = [tier for tier in self.pairs.tiers if tier != "low"]
        if self.evaluation.prompts is not None and self.evaluation.prompts > heldout:
            raise ValueError(f"evaluation.prompts = {self.evaluation.prompts}, but only {heldout} pairs are held out")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("seeds must hold one seed or more, each once")
        if self.vocabulary is not None and not isinstance(self.corpus, PackagedIMDB):
            raise ValueError(
                "vocabulary is for the corpus that comes as a package; trim the model by `madpo trim-vocab`, and give "
                "that folder as model"
            )
        if self.responses.temperature == 0 and sampled:
            raise ValueError(
                f"responses.temperature = 0 samples the same response twice, so pairs of the tier {sampled[0]!r} would "
                "have equal sides; give a temperature above 0, or pairs.tiers = ['low']"
            )
        for row in self.rows():
            if row.margins == "column":
                raise ValueError(f"method {row.name!r}: margins = 'column' is for a user's own pairs, in madpo compare")
            if row.margins == "out_of_fold" and self.reward_model.folds is None:
                raise ValueError(f"method {row.name!r} reads out_of_fold margins, so reward_model.folds must be set")
            if self.reward_model.kind == "probe" and row.reads & {"chosen_score", "rejected_score"}:
                raise ValueError(
                    f"method {row.name!r} reads scores of either side, which a probe gives in sample only; set "
                    "reward_model.kind = 'trained'"
                )
            if row.trainer in ("rloo", "grpo"):
                self._check_online(row)
        for selection in self.selection:
            selection.candidates([row.name for row in self.rows()])
        return self

    def _check_online(self, row: Method) -> None:
        batch = (row.settings.optimisation or self.policy.optimisation).batch_size
        if batch % row.settings.generations:
            raise ValueError(
                f"method {row.name!r}: batch_size {batch} is no multiple of generations {row.settings.generations}, "
                "and an update takes whole groups of responses; give online.generations that divide it, or an "
                "online.optimisation with a batch_size of its own"
            )
        if self.responses.temperature == 0:
            raise ValueError(
                f"method {row.name!r} learns from how responses to a prompt differ, and responses.temperature = 0 "
                "samples the same one each time; give a temperature above 0, or remove the method"
            )

    def rows(self) -> tuple[Method, ...]:
        """The methods with their sweeps spelled out."""
        return tuple(row for method in self.method for row in method.rows())

    def with_groups(self, only: Sequence[str] = ()) -> Experiment:
        """Without the extra groups that ``only`` does not name."""
        left_out = {*self.extra} - {word.split("/")[0] for word in only}
        kept = tuple(method for method in self.method if method.group not in left_out)
        return self.model_copy(update={"method": kept, "extra": ()})

    def steps(self) -> list[Step]:
        """The graph, upstream steps first, without extra groups. Building it runs nothing."""
        # With the operations and their libraries, which no mistake in a file waits for.
        from madpo.study import graph, own_graph

        build = graph.build if self.pairs is not None else own_graph.build
        return build(self.with_groups())


def run_experiment(
    name_or_path: str,
    output_dir: Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    dry_run: bool = False,
    executor: AbstractContextManager[Executor] | None = None,
    upload: str | None = None,
) -> RunResult:
    """Run a packaged experiment or a TOML file, or continue it, and write its report.

    The report and ``selection.json`` speak of everything that is finished in the folder, whatever ``only`` says.

    Args:
        name_or_path: "quickstart", "smoke", or the path of a TOML file.
        output_dir: the folder of the run; finished steps in it are kept.
        overrides: settings to change, such as ``"policy.optimisation.learning_rate=1e-4"``.
        only: groups of methods, or patterns on step names; their upstream steps are included. Empty is everything.
        dry_run: say what would run, and write nothing.
        executor: where steps run, entered and left here; in this process, one after another, when left out.
        upload: URL of an object store that finished steps, and in the end the report, are copied to; see
            :mod:`madpo.runner.uploads`. What it did not take is in the result's ``not_uploaded``.

    Raises:
        ConfigError: a mistake in the experiment or in the URL, before any model loads.
    """
    experiment = load_config(find_experiment(name_or_path), Experiment, overrides).with_groups(only)
    about: dict[str, Any] = {
        "title": experiment.title,
        "experiment": experiment.model_dump(mode="json"),
        "rows": [{"key": row.key, **row.model_dump(mode="json")} for row in experiment.rows()],
    }
    if isinstance(experiment.corpus, PairCorpus):  # which the report knows by these
        about["experiment"] |= {"data": experiment.corpus.data, "judge": experiment.corpus.judge}
    how: dict[str, Any] = {"only": only, "dry_run": dry_run, "executor": executor, "upload": upload}

    def build() -> list[Step]:
        steps = experiment.steps()
        if not dry_run and isinstance(experiment.corpus, PairCorpus) and experiment.corpus.judge != PROBE:
            from madpo.operations.pair_scorer import load_pair_encoder

            load_pair_encoder(experiment.corpus.judge)  # which is asked only after hours
        return steps

    return run_steps(build, output_dir, about, report_to=experiment.report_to, **how)


def run_steps(
    build: Callable[[], list[Step]],
    output_dir: Path,
    about: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    dry_run: bool = False,
    executor: AbstractContextManager[Executor] | None = None,
    upload: str | None = None,
    report_to: Sequence[str] = (),
) -> RunResult:
    """Run a study's graph, or continue it, show results as they come, and write the report.

    Args:
        build: gives the graph.
        about: title, settings and rows, for the report; the other arguments are those of :func:`run_experiment`.
    """
    # Notices from one library about another's names say nothing to the person who runs an experiment.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # the same for worker processes
    output_dir, steps = expanded(output_dir), build()
    from madpo.study.estimates import first_words

    if dry_run:
        return run(steps, output_dir, only=only, dry_run=True)
    store = Upload(upload) if upload else None
    if executor is None and (words := first_words(run(steps, output_dir, only=only, dry_run=True))):
        say(words)
    with store or nullcontext(), reporting_to(report_to):
        with executor or Inline() as place:
            live = LiveReport(output_dir)
            result = run(steps, output_dir, place, only=only, about=about, upload=store, on_finished=live)
        if any(finished(step, output_dir) is not None for step in steps):
            say("Writing the report with its tables and figures.")
            rebuild_report(output_dir)  # of the whole run, whichever part of it this call worked on
        if store is not None:
            parts = [*output_dir.glob("*"), *output_dir.glob("tables/*"), *output_dir.glob("figures/*")]
            store.files("report", [path for path in parts if path.is_file() and path.name[0] != "."], output_dir)
    if store is not None:
        result.not_uploaded = store.failed
    return result
