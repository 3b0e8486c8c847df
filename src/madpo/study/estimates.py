"""How long a step takes and how much memory it needs, before it runs: for ``madpo run`` and its ``--dry-run``.

Time is counted in tokens over a machine's rates. They were measured on two cores with AVX-512 BF16 (docs/log.md, the
quickstart), and are carried over to another machine without a GPU by the rate of its matrix products, and to another
model by its parameters; or they are given as options. Steps that are finished in the folder correct the estimate of
the same kind of step. Memory follows from the model's shape. Both are orders of magnitude.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pydantic import BaseModel

from madpo.core.errors import ConfigError
from madpo.core.progress import LIBRARIES, duration, memory_text
from madpo.core.suggestions import did_you_mean
from madpo.models.packaged import cache_dir, cut_report
from madpo.operations.own_pairs import HeldoutStage, OwnPairsStage
from madpo.operations.study_auto import AutoStage
from madpo.operations.study_evaluation import EvaluationStage
from madpo.operations.study_margins import OutOfFoldStage, ProbeStage, score_margins, score_sides
from madpo.operations.study_pairs import ResponseStage
from madpo.operations.study_training import PairSFTStage, PolicyStage, ReferenceStage, SFTStage
from madpo.operations.trimming.trim import TrimStage
from madpo.rewards.oracles import OracleStage
from madpo.runner.run import Planned, RunResult, finished
from madpo.runner.step import Step
from madpo.training.settings import OnlineStage, RewardModelStage

if TYPE_CHECKING:
    import torch

# Tokens a second of Gemma-3-270M with LoRA on two cores with AVX-512 BF16. "sft" scores every token, "train" (a
# preference loss) only completion tokens, "reward" no token's word; "score" and "judge" are the passes of a language
# model and of a reward model without gradients.
TWO_CORES = {"sft": 120.0, "train": 250.0, "reward": 420.0, "score": 600.0, "judge": 1000.0, "generate": 240.0}
MACHINE = "two cores with AVX-512 BF16"
# Weight of a parameter of the output head next to one of the layers. A reward model has no such head; the head is the
# faster product, and most kinds of work give it only completions (docs/log.md, the quickstart without BF16).
_HEAD = {"sft": 1.0, "reward": 0.0, "judge": 0.0}
_HEAD_ELSEWHERE = 0.6
_PRODUCT = 400.0  # their rate at a large product in bfloat16, GFLOP/s
# Share of a training step's time there that its products would take at that rate (docs/performance.md).
_PRODUCTS = 0.52
_SIDE = 512  # of the matrices that are multiplied to know a machine
_CHARACTERS = 4  # of a token
_LONG = 512  # tokens of a pair's side of which nothing is known
_LOADING = 8.0  # seconds for a model and its libraries

C = TypeVar("C", bound=BaseModel)


class Shape(NamedTuple):
    """What memory depends on."""

    parameters: float
    layers: int
    hidden: int
    inner: int
    cached: int  # numbers a layer keeps per token: keys and values
    words: int

    def weight(self, kind: str) -> float:
        """Parameters that a token of this kind of work passes through."""
        head = self.words * self.hidden
        return self.parameters - head + _HEAD.get(kind, _HEAD_ELSEWHERE) * head


_GEMMA = Shape(268e6, 18, 640, 2048, 2 * 256, 262_144)
_TINY = Shape(2e5, 2, 64, 128, 2 * 32, 512)
_KNOWN = {
    **dict.fromkeys(("gemma-3-270m", "google/gemma-3-270m"), _GEMMA),
    "smollm2-135m-instruct": Shape(134.5e6, 30, 576, 1536, 2 * 192, 49_152),
}


class Work(NamedTuple):
    """Tokens by kind of work, models held at once, and tokens in memory at once."""

    tokens: dict[str, float]
    models: int = 1
    trained_at_once: float = 0
    cached_at_once: float = 0


class Estimated(NamedTuple):
    """A step's estimate: seconds, and bytes (None where the model's shape is not known)."""

    seconds: float
    memory: float | None


class Machine(NamedTuple):
    """Tokens a second of Gemma-3-270M by kind of work, and whose they are."""

    rates: Mapping[str, float]
    name: str


def this_machine() -> Machine:
    """The rates of the processor that this runs on, from a third of a second of matrix products.

    Of a step's time, the products' share follows their rate here, and the rest is taken to be what it was there. A GPU
    is not measured: small models leave it waiting, and its products say little.
    """
    import torch

    from madpo.models.load import compute_dtype

    dtype = compute_dtype()
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return Machine(TWO_CORES, f"{MACHINE}; this machine's accelerator is not measured, give its rates by --rate")
    threads = torch.get_num_threads()
    # The median of one thread's short products: what else the machine does just now interrupts few of them, and the
    # fastest is a burst (86 GFLOP/s where products that went on for seconds ran at 49 to 63; docs/log.md).
    torch.set_num_threads(1)
    try:
        times = product_times(_SIDE, dtype, seconds=0.3, least=10, most=200)
    finally:
        torch.set_num_threads(threads)
    rate = threads * 2 * _SIDE**3 / statistics.median(times) / 1e9
    factor = _PRODUCTS * _PRODUCT / rate + 1 - _PRODUCTS
    kind = "bfloat16" if dtype is torch.bfloat16 else "float32"
    rates = {name: value / factor for name, value in TWO_CORES.items()}
    return Machine(rates, f"this machine, whose matrix products run at {rate:.0f} GFLOP/s in {kind}")


def product_times(side: int, dtype: torch.dtype, *, seconds: float, least: int, most: int) -> list[float]:
    """Seconds of products of two square matrices, one after another, after a first one that is not counted."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    left @ right
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def machine_of(options: Sequence[str]) -> Machine:
    """This machine; or the one of which ``options`` ("train=9000") gives rates, the two cores' for the others.

    Raises:
        ConfigError: an option is not a rate.
    """
    rates = dict(TWO_CORES)
    for option in options:
        name, _, value = option.partition("=")
        if name not in rates:
            raise ConfigError(f"--rate {option!r}: {name!r} is no kind of work{did_you_mean(name, list(rates))}")
        try:
            rates[name] = float(value)
        except ValueError:
            rates[name] = 0.0
        if not 0 < rates[name] < float("inf"):
            raise ConfigError(f"--rate {option!r}: write tokens a second, as in --rate {name}=5000")
    return Machine(rates, "the rates given") if options else this_machine()


def work(step: Step) -> Work:
    """What a step has to do, from its configuration and those of its upstream steps."""
    config, length, pairs = step.config, _length(step), _pairs(step)
    if isinstance(config, TrimStage):  # reading 25,000 reviews, then both models on some of them
        return Work({"score": 12_000 + 690 * config.eval_texts}, 2)
    if isinstance(config, SFTStage | PairSFTStage):
        if isinstance(config, SFTStage):
            length, texts = config.max_tokens, config.reviews
        else:
            texts = min(config.reviews, pairs.train)
        seen = texts * config.optimisation.epochs
        return Work({"sft": seen * length}, 1, config.optimisation.per_pass * length)
    if isinstance(config, ResponseStage):
        rows = min(config.batch_size, config.prompts)
        return Work({"generate": 2 * config.prompts * config.max_new_tokens}, 1, 0, rows * length)
    if isinstance(config, RewardModelStage):
        share = 1 - 1 / config.folds if config.folds else 1
        seen = pairs.train * share * config.optimisation.epochs
        stopping, reported = _held_out(config, pairs)
        looks = math.ceil(seen / config.optimisation.batch_size / config.eval_every)
        tokens = {"reward": 2 * seen * length, "judge": 2 * (looks * stopping + reported) * length}
        return Work(tokens, 1, 2 * config.optimisation.per_pass * length)
    if step.fn is score_margins:  # the pairs that measured the reward model were scored there
        trained = _config_of(step, RewardModelStage)
        known = _held_out(trained, pairs)[1] if trained is not None else 0
        return Work({"judge": 2 * (pairs.all - known) * length})
    if isinstance(config, OutOfFoldStage | ProbeStage) or step.fn is score_sides:
        return Work({"judge": 2 * pairs.all * length})
    if isinstance(config, ReferenceStage | HeldoutStage):
        count = pairs.train if getattr(config, "split", "heldout") == "train" else pairs.all - pairs.train
        return Work({"score": 2 * count * length})
    if isinstance(config, PolicyStage | AutoStage):
        models = 2 if isinstance(config, AutoStage) else 1
        seen = 2 * models * pairs.train * config.optimisation.epochs
        return Work({"train": seen * length}, models, 2 * config.optimisation.per_pass * length)
    if isinstance(config, OnlineStage):
        seen = pairs.train * config.settings.generations * config.optimisation.epochs
        tokens = {"generate": seen * config.max_new_tokens, "train": seen * length, "score": 2 * seen * length}
        tokens["judge"] = seen * length
        return Work(tokens, 2, config.optimisation.per_pass * length, config.optimisation.batch_size * length)
    if isinstance(config, EvaluationStage):
        count = heldout_prompts(step) * config.samples_per_prompt
        models = 2 if "policy" in step.inputs or config.best_of else 1
        passes = 1 if "policy" not in step.inputs else 3 if config.samples_per_prompt == 1 else 2
        tokens = {
            "generate": count * config.max_new_tokens * (config.best_of or 1) * (1 + len(config.temperatures)),
            "score": passes * count * length,
            "judge": count * length * (config.best_of or 0),
        }
        return Work(tokens, models, 0, min(config.batch_size, count) * length)
    return Work({})


def estimate(step: Step, rates: Mapping[str, float]) -> Estimated:
    """Seconds and bytes of one step."""
    needed = work(step)
    if not needed.tokens:
        if not isinstance(step.config, OracleStage):
            return Estimated(1.0, None)
        reviews = getattr(step.config.oracle, "reviews", None) or 24_000  # which are left for it, about
        return Estimated(3.0 + 42.0 * min(1.0, reviews / 24_000), None)
    shape = _shape(step)
    seconds = sum(
        count / rates[kind] * (1.0 if shape is None else shape.weight(kind) / _GEMMA.weight(kind))
        for kind, count in needed.tokens.items()
    )
    size = 1.0 if shape is None else shape.parameters / _GEMMA.parameters
    seconds += needed.models * _LOADING * min(1.0, max(0.02, size))
    if shape is None:
        return Estimated(seconds, None)
    # bfloat16 weights; of a trained token, what the backward pass reads again in every layer; a cache of two bytes.
    kept = shape.layers * (24 * shape.hidden + 8 * shape.inner) * 2 * needed.trained_at_once
    cache = shape.layers * shape.cached * 2 * needed.cached_at_once
    return Estimated(seconds, LIBRARIES + needed.models * 2 * shape.parameters + kept + cache)


def estimates(
    plan: Iterable[Planned], rates: Mapping[str, float], root: Path, graph: Iterable[Step] = ()
) -> dict[str, Estimated]:
    """Estimates of the steps that are not done. Finished ones of the same function correct the time, by the median.

    Args:
        graph: further steps, whose finished ones count as well.
    """
    plan = list(plan)
    ratios: dict[str, list[float]] = {}
    for step in {step.name: step for step in (*graph, *(planned.step for planned in plan))}.values():
        record = finished(step, root)
        if record is not None and record.seconds > 0:
            ratios.setdefault(step.operation, []).append(record.seconds / estimate(step, rates).seconds)
    found = {}
    for planned in plan:
        if planned.status != "done":
            seconds, memory = estimate(planned.step, rates)
            factor = statistics.median(ratios.get(planned.step.operation, [1.0]))
            found[planned.step.name] = Estimated(seconds * factor, memory)
    return found


def first_words(result: RunResult) -> str | None:
    """How long a run will take on this machine, from its plan; None where it is a matter of a minute."""
    if all(planned.status == "done" for planned in result.plan):
        return None
    machine = this_machine()
    seconds = sum(guess.seconds for guess in estimates(result.plan, machine.rates, result.root, result.graph).values())
    if seconds < 60:
        return None
    return (
        f"About {duration(seconds)} for {machine.name}, when nothing else runs on it; finished steps are kept when the "
        "run is stopped."
    )


def dry_run_lines(result: RunResult, machine: Machine) -> list[str]:
    """What ``--dry-run`` prints: a line for every step, then the sum."""
    rates = machine.rates
    found = estimates(result.plan, rates, result.root, result.graph)
    rows = []
    for step, status in result.plan:
        guess = found.get(step.name)
        memory = "" if guess is None or guess.memory is None else memory_text(guess.memory)
        time = "" if guess is None else duration(guess.seconds)
        inputs = ", ".join(upstream.name for upstream in step.upstream.values())
        rows.append((step.name, status, time, memory, f"from {inputs}" if inputs else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(guess.seconds for guess in found.values())
    listed_rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items())
    counts = f"{len(found)} of {len(result.plan)} steps to run"
    lines.append(f"{counts}: about {duration(total)} one after another, on {machine.name}")
    lines.append(f"(tokens a second of Gemma-3-270M: {listed_rates})")
    if len(found) < len(result.plan):
        lines.append("Times are corrected by those of the finished steps of the same kind.")
    return lines


class _Pairs(NamedTuple):
    train: int
    all: int
    prompts: int
    """Prompts of the held-out pairs."""


def heldout_prompts(step: Step) -> int:
    """Prompts that an evaluation answers."""
    return getattr(step.config, "prompts", None) or _pairs(step).prompts


def _held_out(config: RewardModelStage, pairs: _Pairs) -> tuple[float, float]:
    """Held-out pairs that decide when a reward model's training stops, and those that measure it."""
    count = pairs.all - pairs.train
    stopping = count * config.stopping_share
    return stopping, count - stopping or count


def _upstream(step: Step) -> Iterable[Step]:
    yield step
    for other in step.upstream.values():
        yield from _upstream(other)


def _length(step: Step) -> int:
    if (own := _config_of(step, OwnPairsStage)) is not None:
        tokens = own.max_length or _LONG
        return tokens if own.size is None else min(math.ceil(own.size.characters / _CHARACTERS), tokens)
    config = _config_of(step, ResponseStage)
    return config.prompt_tokens + config.max_new_tokens if config is not None else 0


def _config_of(step: Step, kind: type[C]) -> C | None:
    """The configuration of this kind, of the step or of what it is made from."""
    return next((s.config for s in _upstream(step) if isinstance(s.config, kind)), None)


def _pairs(step: Step) -> _Pairs:
    own = _config_of(step, OwnPairsStage)
    if own is not None and own.max_train is not None and own.max_heldout is not None:
        return _Pairs(own.max_train, own.max_train + own.max_heldout, own.max_heldout)
    if own is not None and own.size is not None:
        train, heldout = 1 - own.eval_share - own.judge_share, own.eval_share
        count = own.size.pairs
        return _Pairs(round(train * count), round((train + heldout) * count), round(heldout * own.size.prompts))
    train = next((s.config.train for s in _upstream(step) if hasattr(s.config, "train")), 0)
    responses = _config_of(step, ResponseStage)
    whole = train if responses is None else responses.prompts
    return _Pairs(train, whole, whole - train)


def _shape(step: Step) -> Shape | None:
    found = (s.config for s in _upstream(step) if isinstance(s.config, SFTStage | TrimStage | OwnPairsStage))
    shape = _shape_of(getattr(next(found, None), "model", ""))
    trimmed = _config_of(step, TrimStage)
    if shape is None or trimmed is None or isinstance(step.config, TrimStage):
        return shape
    dropped = max(0, shape.words - trimmed.size)
    return shape._replace(parameters=shape.parameters - dropped * shape.hidden, words=trimmed.size)


def _shape_of(model: str) -> Shape | None:
    if (cut := cut_report(model)) is not None:
        return _GEMMA._replace(parameters=float(cut["parameters"]), words=int(cut["entries"]))
    if model in _KNOWN and not Path(model).is_dir():
        return _KNOWN[model]
    folder = cache_dir() / "models" / f"{model}-v1" if model.startswith("tiny-") else Path(model)
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        layers, hidden, inner = (int(raw[k]) for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        cached = 2 * int(raw["num_key_value_heads"]) * int(raw.get("head_dim") or hidden // raw["num_attention_heads"])
        words = int(raw["vocab_size"])
    except (OSError, ValueError, KeyError):
        return _TINY if model.startswith("tiny-") else None  # which is made when it is first needed
    parameters = words * hidden + layers * (4 * hidden + 3 * inner) * hidden
    return Shape(parameters, layers, hidden, inner, cached, words)
