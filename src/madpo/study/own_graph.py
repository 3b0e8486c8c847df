"""The graph of ``madpo compare``: a user's own pairs in the place of a corpus, and the model as it is as reference."""

from __future__ import annotations

from typing import Any

from madpo.core.errors import ConfigError
from madpo.core.storage import expanded
from madpo.data.folds import prompt_key
from madpo.data.load import PairStream
from madpo.data.tokens import text_length
from madpo.operations.own_pairs import OwnPairsStage, Size, read_own_pairs
from madpo.operations.preconditions import require_columns
from madpo.operations.reward_model import load_pair_encoder, seen_pairs
from madpo.operations.running import digest
from madpo.operations.study_probe import ProbeStage, fit_pairs_probe
from madpo.report.methods import REFERENCE, method_of, settings_words
from madpo.runner.step import Source, Step
from madpo.study.compare import PROBE, AutoLoss, CompareSettings, known_loss
from madpo.study.graph import Trunk
from madpo.study.methods import Method
from madpo.training.settings import AutoSettings

BETA = 0.1  # at which losses compare at equal beta, where it is among the given ones; else the first


class OwnTrunk(Trunk):
    """The pairs, the model, and the judge.

    Attributes:
        judge_saw_pairs: how many of the pairs the judge was trained on, as far as its folder says.

    Raises:
        ConfigError, DataError: the pairs cannot be read, a loss reads a column that they lack, or the judge is none.
    """

    heldout = True
    reference = REFERENCE

    def __init__(self, settings: CompareSettings, data: str, eval_data: str | None) -> None:
        super().__init__(settings)
        self.settings, self.sft = settings, _source(settings.model)
        size, numbers = _read(data, settings)
        self._margins = "reward_margin" in numbers
        for row in self.rows():
            if row.loss is not None:
                require_columns([numbers], row.loss, data, probed=True)
        probed = settings.judge == PROBE
        stage = OwnPairsStage(
            **{name: getattr(settings, name) for name in ("columns", "layout", "model", "eval_share", "max_length")},
            **{name: getattr(settings, name) for name in ("truncation", "date", "strict")},
            judge_share=settings.judge_share if probed else 0.0,
            seed=settings.split_seed,
            size=size,
        )
        given: dict[str, Step | Source] = {"data": _source(data), "reference": self.sft}
        given |= {} if eval_data is None else {"eval_data": _source(eval_data)}
        self._pairs = self.add("pairs", read_own_pairs, stage, given, says=f"reading {size.pairs} pairs")
        self.judge, self.judge_saw_pairs = {}, 0
        if probed:
            says = "the judge, a probe on pairs that no policy sees"
            inputs: dict[str, Step | Source] = {"pairs": self._pairs, "reference": self.sft}
            probe = ProbeStage(seed=settings.split_seed, part="judge")
            self.judge = {"judge": self.add("judge", fit_pairs_probe, probe, inputs, says=says)}
        elif settings.judge is not None:
            load_pair_encoder(settings.judge)
            self.judge = {"judge": _source(settings.judge)}
            self.judge_saw_pairs = seen_pairs(settings.judge, PairStream(data, settings.reading)) or 0

    def rows(self) -> tuple[Method, ...]:
        """The losses at every beta."""
        return rows_of(self.settings, self._margins)

    def pairs(self, tier: str, seed: int) -> Step:
        """The same for all seeds, which decide trainings and responses only."""
        return self._pairs


def rows_of(settings: CompareSettings, margins: bool) -> tuple[Method, ...]:
    """A row for every loss at the common beta, and one for each at the others.

    Args:
        margins: whether the pairs have a column ``reward_margin``.

    Raises:
        ConfigError: two rows are the same.
    """
    losses = [known_loss(given) for given in settings.losses]
    if not any(loss.kind == "dpo" for loss in losses):
        losses = [known_loss("dpo"), *losses]
    methods = [_name(loss) for loss in losses]
    betas = settings.betas or ((BETA,) if settings.judge is None else (0.03, BETA, 0.3))
    base = BETA if BETA in betas else betas[0]
    rows: list[Method] = []
    for name, loss in zip(methods, losses, strict=True):
        # A beta of the user's, or one of another scale, stays as it is.
        default = getattr(type(loss).model_fields.get("beta"), "default", None)
        tuned = default == BETA and "beta" not in loss.model_fields_set
        words = settings_words(loss.model_dump(exclude={"beta"} if tuned else None))
        shown = f"{name}, {words}" if words and methods.count(name) > 1 else name
        row = _row(shown, loss.model_copy(update={"beta": base}) if tuned else loss, margins)
        rows.append(row)
        if tuned and (others := tuple(beta for beta in betas if beta != base)):
            rows += row.model_copy(update={"group": "frontier", "sweep": {"beta": others}}).rows()
    for row in rows:
        if sum(other.key == row.key for other in rows) > 1:
            raise ConfigError(f"losses has {row.name} twice; give each once")
    return tuple(rows)


def _name(loss: Any) -> str:
    """The method's, as the report has it; margins have no word in it."""
    trainer = "auto" if isinstance(loss, AutoLoss) else "offline"
    return method_of(loss.kind, loss.kind, loss.model_dump(), "all", "column", trainer)


def _row(name: str, loss: Any, margins: bool) -> Method:
    if isinstance(loss, AutoLoss):
        auto = AutoSettings.model_validate(loss.model_dump(exclude={"kind"}))
        return Method(name=name, trainer="auto", auto=auto, margins="column" if margins else "probe")
    return Method(name=name, loss=loss, margins="column" if margins else "in_sample")


def _source(place: str) -> Source:
    """What the user names: a file or folder by its content, else a name."""
    path = expanded(place)
    return Source(str(path.absolute()) if path.exists() else place, digest(place) or place)


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
