"""The graph of a study on pairs that are there: an experiment's, or a user's in ``madpo compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from madpo.core.columns import MARGIN, SCORES
from madpo.core.config import part
from madpo.core.errors import ConfigError
from madpo.core.progress import say
from madpo.core.storage import expanded
from madpo.data.folds import prompt_key
from madpo.data.load import PairStream
from madpo.data.sources import look_at
from madpo.data.tokens import text_length
from madpo.losses import Custom
from madpo.operations.own_pairs import OwnPairsStage, Size, read_own_pairs
from madpo.operations.pair_scorer import load_pair_encoder, seen_pairs
from madpo.operations.preconditions import require_columns
from madpo.operations.running import digest
from madpo.operations.settings import PROBE, JudgedPairs, LimitedPairs, PairCorpus
from madpo.operations.study_margins import ProbeStage, fit_pairs_probe
from madpo.operations.study_training import PairSFTStage, train_sft_on_pairs
from madpo.report.methods import OWN, REFERENCE, method_of, settings_words, spread
from madpo.runner.step import Source, Step
from madpo.study.compare import AutoLoss, CompareSettings, known_loss
from madpo.study.graph import StudyGraph
from madpo.study.methods import Method
from madpo.training.settings import AutoSettings

if TYPE_CHECKING:
    from madpo.study.experiment import Experiment

BETA = 0.1  # at which losses compare at equal beta, where it is among the given ones; else the first


class PairsGraph(StudyGraph):
    """Pairs that are read, held-out ones among them, and perhaps a reward model that judges.

    Args:
        sft: fine-tuning on the chosen completions, which comes before everything else; None: the model as it is.
        more: what else the configuration of the pairs has.

    Raises:
        ConfigError: held-out pairs and those of a judge ``probe`` leave none to train on.
    """

    heldout = True

    def __init__(
        self,
        experiment: Experiment | CompareSettings,
        rows: Sequence[Method],
        pairs: JudgedPairs,
        data: str,
        eval_data: str | None,
        *,
        sft: PairSFTStage | None = None,
        **more: Any,
    ) -> None:
        super().__init__(experiment, rows)
        if (taken := (pairs.eval_share if eval_data is None else 0.0) + pairs.judge_part) >= 1:
            raise ConfigError(f"eval_share and judge_share take {taken:g} of the pairs, and leave none to train on")
        stage = OwnPairsStage(**dict(part(pairs, LimitedPairs)), judge_share=pairs.judge_part, **more)
        given: dict[str, Step | Source] = {"data": _source(data), "reference": _source(stage.model)}
        given |= {} if eval_data is None else {"eval_data": _source(eval_data)}
        read = self._pairs = self.add("pairs", read_own_pairs, stage, given, says="reading the pairs")
        self.sft = given["reference"]
        if sft is not None:
            says = "fine-tuning the base model on what was preferred"
            self.sft = self.add("sft", train_sft_on_pairs, sft, {"pairs": read}, says=says)
        self.judge = {}
        if pairs.judge == PROBE:
            says, probe = "the judge, a probe on pairs that no policy sees", ProbeStage(seed=stage.seed, part="judge")
            inputs = {"pairs": read, "reference": self.sft}
            self.judge = {"judge": self.add("judge", fit_pairs_probe, probe, inputs, says=says)}
        elif pairs.judge is not None:
            self.judge = {"judge": _source(pairs.judge)}

    def pairs(self, tier: str, seed: int) -> Step:
        """The same for all seeds, which decide trainings and responses only."""
        return self._pairs


def build(experiment: Experiment) -> list[Step]:
    """The steps of a study on pairs that are there, upstream steps first. It reads neither pairs nor judge, which may
    be on the hub.

    Raises:
        DataError: a file of the pairs is not there.
    """
    e, corpus = experiment, experiment.corpus
    assert isinstance(corpus, PairCorpus)
    for data in filter(None, (corpus.data, corpus.eval_data)):
        look_at(data)
    given: dict[str, Any] = {"model": e.model, "seed": e.seed}
    sft = PairSFTStage(**given, **dict(e.sft))
    given |= {"max_train": corpus.train, "max_heldout": corpus.heldout}
    return PairsGraph(e, e.rows(), corpus, corpus.data, corpus.eval_data, sft=sft, **given).build([OWN])


class OwnPairsGraph(PairsGraph):
    """The graph of ``madpo compare``.

    Attributes:
        judge_saw_pairs: how many of the pairs the judge was trained on, as far as its folder says.

    Raises:
        ConfigError, DataError: the pairs cannot be read, a loss reads a column that they lack, or the judge is none.
    """

    reference = REFERENCE

    def __init__(self, settings: CompareSettings, data: str, eval_data: str | None) -> None:
        size, numbers = _read(data, settings)
        rows = rows_of(settings, MARGIN in numbers)
        _tell_unused(numbers, rows)
        for row in rows:
            if row.loss is not None:
                require_columns([numbers], row.loss, data, probed=True)
        given = {name: getattr(settings, name) for name in ("model", "date", "strict")}
        super().__init__(settings, rows, settings, data, eval_data, seed=settings.split_seed, size=size, **given)
        self.judge_saw_pairs = 0
        if settings.judge not in (None, PROBE):
            load_pair_encoder(settings.judge)
            streams = [PairStream(place, settings.reading) for place in (data, eval_data) if place is not None]
            self.judge_saw_pairs = seen_pairs(settings.judge, chain.from_iterable(streams)) or 0


def rows_of(settings: CompareSettings, margins: bool) -> tuple[Method, ...]:
    """A row for every loss at the common beta, and one for each at the others and at other learning rates.

    Args:
        margins: whether the pairs have a column ``reward_margin``.

    Raises:
        ConfigError: two rows are the same.
    """
    losses = [known_loss(given) for given in settings.losses]
    if not any(loss.kind == "dpo" for loss in losses):
        losses = [known_loss("dpo"), *losses]
    # Margins have no word in these names.
    trainers = ["auto" if isinstance(loss, AutoLoss) else "offline" for loss in losses]
    named = zip(losses, trainers, strict=True)
    methods = [
        method_of(loss.kind, loss.kind, spread(loss.model_dump()), "all", "column", trainer) for loss, trainer in named
    ]
    betas = settings.betas or ((BETA,) if settings.judge is None else (0.03, BETA, 0.3))
    base = BETA if BETA in betas else betas[0]
    rows: list[Method] = []
    for name, loss in zip(methods, losses, strict=True):
        # A beta of the user's, or one of another scale, stays as it is.
        own = loss.loss if isinstance(loss, Custom) else loss
        default = getattr(type(own).model_fields.get("beta"), "default", None)
        tuned = default == BETA and "beta" not in own.model_fields_set
        words = settings_words(spread(loss.model_dump(exclude={"beta"} if tuned else None)))
        shown = f"{name}, {words}" if words and methods.count(name) > 1 else name
        if tuned:
            changes = {"parameters": {**loss.parameters, "beta": base}} if own is not loss else {"beta": base}
            loss = loss.model_copy(update=changes)
        if isinstance(loss, AutoLoss):
            auto = AutoSettings.model_validate(loss.model_dump(exclude={"kind"}))
            row = Method(name=shown, trainer="auto", auto=auto, margins="column" if margins else "probe")
        else:
            row = Method(name=shown, loss=loss, margins="column" if margins else "in_sample")
        others = {"beta": tuple(beta for beta in betas if beta != base and tuned)}
        curve = [row, *_swept(row, others)]
        rates = settings.other_learning_rates
        if rates is None:
            rates = (settings.optimisation.learning_rate / 2,) if name == "DPO" else ()
        rows += curve + [again for one in curve for again in _swept(one, {"learning_rate": rates})]
    for row in rows:
        if sum(other.key == row.key for other in rows) > 1:
            raise ConfigError(f"losses has {row.name} twice; give each once")
    return tuple(rows)


def _swept(row: Method, sweep: dict[str, tuple[float, ...]]) -> tuple[Method, ...]:
    """The row at every value, for the curve of its method; none where there are no values."""
    return row.model_copy(update={"group": "frontier", "sweep": sweep}).rows() if all(sweep.values()) else ()


def _tell_unused(numbers: Mapping[str, float], rows: Sequence[Method]) -> None:
    """Say which columns have no effect although they look as if they had one."""
    if "weight" in numbers:
        say("The column 'weight' is not used: all pairs count alike.")
    read = {column for row in rows if row.margins != "column" for column in row.reads}
    if SCORES[0] in numbers.keys() - read and MARGIN in read:
        remedy = f"madpo score DATA --score_columns {' '.join(SCORES)}"
        say(f"The scores of the pairs are not used: a probe gives the margins ({remedy} makes margins of the scores).")


def _source(path_or_name: str) -> Source:
    """What the user names: a file or folder by its content, else a name."""
    path = expanded(path_or_name)
    return Source(str(path.absolute()) if path.exists() else path_or_name, digest(path_or_name) or path_or_name)


def _read(data: str, settings: CompareSettings) -> tuple[Size, dict[str, float]]:
    """How many pairs there are and how long they are, and the numbers that they have; every row is checked."""
    stream = PairStream(data, settings.reading)
    count, characters, prompts, numbers = 0, 0, set(), dict[str, float]()
    for pair in stream:
        numbers = pair.numbers if not count else numbers
        count += 1
        prompts.add(prompt_key(pair.prompt))
        sides = text_length(pair.chosen) + text_length(pair.rejected)
        characters += text_length(pair.prompt) + sides // 2
    stream.refuse_no_pair(count)
    if len(prompts) < 3:
        raise ConfigError(f"{data} has {len(prompts)} different prompts, too few to hold some out; give more pairs")
    return Size(pairs=count, prompts=len(prompts), characters=characters // count), numbers
