"""The results of a run in words and as plain tables: sentences, Markdown, JSON, CSV.

The sentences are made from the numbers and claim no more than they carry: an interval that includes 0 is said to
tell nothing apart, few seeds are named, and a reward won at a larger distance from the reference is called that.
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from madpo.records import Estimate
from madpo.results import SFT, Row, Tier, Value

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

UNEVEN = (
    "Rows have unlike training seeds. A difference is over the seeds that a row shares with DPO, so it need not be the "
    "difference of the two means; means of unlike seeds differ by what the seeds differ in."
)
NOUGHT = 1e-9  # what rounding leaves of a difference that is none
NAMED = 6  # methods that the opening lists; of more, those of the core

# Column of the table -> (heading, how it is written).
COLUMNS = {
    "oracle_reward": ("oracle reward", "number"),
    "difference": ("difference to DPO", "signed"),
    "win_rate": ("wins against SFT", "share"),
    "kl": ("KL to reference, nats", "number"),
    "length": ("length, tokens", "number"),
    "distinct_2": ("distinct-2", "number"),
    "ended": ("ended by itself", "share"),
}


def headline(tiers: Sequence[Tier]) -> list[str]:
    """What was done and what came of it, one plain paragraph per entry."""
    judged = [tier for tier in tiers if tier.policies]
    if not judged:
        return ["No trained policy has been evaluated yet; what is finished so far is shown below."]
    policies = [row for tier in judged for row in tier.policies]
    methods = sorted({row.name for row in policies})
    labels = listed([tier.label for tier in judged])
    seeds = [len(row.seeds) for row in policies]
    prompts = max((row.oracle_reward.n for row in policies if isinstance(row.oracle_reward, Estimate)), default=0)
    core = sorted({row.name for row in policies if row.group == "core"})
    named = listed(methods) if len(methods) <= NAMED or not core else f"at the core {listed(core)}"
    noun = "method" if len(methods) <= NAMED else "setting"
    sizes = [len(tier.policies) for tier in judged]
    unlike = "" if len(set(sizes)) == 1 else f" ({_by_size(judged, sizes)})"
    fewer = sum(n < max(seeds) for n in seeds)
    opening = (
        f"{_count(len(methods), noun).capitalize()} of preference training ({named}) "
        f"on {labels} pairs{unlike}, {_count(max(seeds), 'training seed')} each"
        f"{f' ({fewer} of {len(seeds)} trainings have fewer)' if fewer else ''}"
        f"{f', judged on {prompts} held-out prompts' if prompts else ''}."
    )
    texts = [opening, *(_verdict(tier) for tier in judged)]
    cautions = []
    if max(seeds) < 3:
        alone = "One training seed" if max(seeds) == 1 else "Two training seeds"
        cautions.append(
            f"{alone} cannot show how much the order changes from training to training; the intervals speak of the "
            "prompts alone."
        )
    ranked = [len(_ranked(tier)) for tier in judged]
    if max(ranked) > 2:
        most = f"{min(ranked)}" if min(ranked) == max(ranked) else f"{min(ranked)} to {max(ranked)}"
        cautions.append(
            f"The best of {most} {noun}s is picked on the same prompts that it is reported on, which flatters it a "
            "little."
        )
    return [*texts, " ".join(cautions)] if cautions else texts


def _by_size(tiers: Sequence[Tier], sizes: Sequence[int]) -> str:
    """ "4 on High and Medium, 20 on Low": how many settings each tier has."""
    places: dict[int, list[str]] = {}
    for tier, size in zip(tiers, sizes, strict=True):
        places.setdefault(size, []).append(tier.label)
    return ", ".join(f"{size} on {listed(labels)}" for size, labels in places.items())


def _ranked(tier: Tier) -> list[Row]:
    """Policies with all seeds of the baseline: the mean of fewer seeds would be ranked by what the seeds differ in."""
    wanted = set(tier.baseline.seeds if tier.baseline is not None else ())
    return [row for row in tier.policies if wanted <= set(row.seeds)]


def _verdict(tier: Tier) -> str:
    rows = _ranked(tier)
    left = len(tier.policies) - len(rows)
    text = _best(tier, rows)
    if left:
        verb = "is" if left == 1 else "are"
        text += f" {_count(left, 'setting').capitalize()} of fewer seeds {verb} not ranked here."
    return text


def _best(tier: Tier, rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: _mean(row.oracle_reward))
    baseline = tier.baseline
    sft = next((row for row in tier.rows if row.name == SFT), None)
    text = f"{tier.label}: {best.name} has the highest mean oracle reward, {write(best.oracle_reward)}"
    if sft is not None:
        text += f", where the SFT model has {write(sft.oracle_reward)}"
        if _mean(best.oracle_reward) <= _mean(sft.oracle_reward):
            return (
                f"{tier.label}: no method has a mean reward above that of the SFT model, {write(sft.oracle_reward)}; "
                f"the best, {best.name}, has {write(best.oracle_reward)}."
            )
    text += "."
    if baseline is None:
        return f"{text} There is no plain DPO to compare with."
    if best is not baseline:
        return text + _against(best, baseline)
    others = [row for row in rows if row.difference is not None]
    if not others:
        return text
    next_best = max(others, key=lambda row: _mean(row.oracle_reward))
    gap = next_best.difference
    assert gap is not None
    clear = "which excludes 0" if _excludes(gap) else "which includes 0, so this run does not tell the two apart"
    return f"{text} The next, {next_best.name}, differs from it by {write(gap, 'signed')} on the same prompts, {clear}."


def _against(best: Row, baseline: Row) -> str:
    gap = best.difference
    if gap is None:
        return f" {baseline.name} has {write(baseline.oracle_reward)}; there are no paired samples to compare them on."
    clear = (
        "an interval that excludes 0"
        if _excludes(gap)
        else "an interval that includes 0, so this run does not tell the two apart"
    )
    text = f" Its paired difference to {baseline.name} on the same prompts is {write(gap, 'signed')}, {clear}."
    near, far = _mean(baseline.kl), _mean(best.kl)
    if gap.low > 0 and far > 1.1 * near:
        text += (
            f" It also moved further from the reference (KL {far:.1f} against {near:.1f} nats), and distance alone can "
            "raise the reward."
        )
    return text


def _excludes(gap: Estimate) -> bool:
    return gap.low > 0 or gap.high < 0


def write(value: Value, how: str = "number", digits: int = 2) -> str:
    """``2.53 (95 % interval 2.41 to 2.65)``; ``how``: "number", "signed" or "share" (percent)."""
    if value is None:
        return DASH
    if not isinstance(value, Estimate):
        return one(value, how, digits)
    return f"{one(value.mean, how, digits)} (95 % interval {interval(value, how, digits)})"


def interval(value: Estimate, how: str = "number", digits: int = 2) -> str:
    """``2.41 to 2.65``."""
    return f"{one(value.low, how, digits)} to {one(value.high, how, digits)}"


def one(value: float, how: str = "number", digits: int = 2) -> str:
    """One number as a person reads it, with a true minus sign."""
    if not math.isfinite(value):
        return DASH
    if how == "share":
        return f"{100 * value:.0f} %"
    if abs(value) < NOUGHT:
        value = 0.0
    if 0 < abs(value) < 0.5 * 10.0**-digits:
        return (f"{value:+.1g}" if how == "signed" else f"{value:.1g}").replace("-", MINUS)
    text = f"{value:+.{digits}f}" if how == "signed" else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def report_markdown_table(tier: Tier) -> str:
    """The tier's table in Markdown; with a column of seeds where they are unlike."""
    columns = shown_columns(tier)
    uneven = tier.uneven
    head = ["method", *(["seeds"] if uneven else []), *(COLUMNS[c][0] for c in columns)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in tier.rows:
        seeds = [markdown_cell(", ".join(row.seeds))] if uneven else []
        cells = [_markdown(getattr(row, c), COLUMNS[c][1]) for c in columns]
        lines.append(f"| {' | '.join([markdown_cell(row.name), *seeds, *cells])} |")
    return "\n".join([*lines, *(["", UNEVEN] if uneven else [])]) + "\n"


def shown_columns(tier: Tier) -> list[str]:
    """Columns for which some row has a value."""
    return [c for c in COLUMNS if any(getattr(row, c) is not None for row in tier.rows)]


def results_json(tiers: Sequence[Tier], title: str, experiment: dict[str, Any]) -> dict[str, Any]:
    """Every number of the page, for programs. Independent of times and machines."""
    return {
        "title": title,
        "summary": headline(tiers),
        "experiment": experiment,
        "tiers": {
            tier.name: {
                "methods": [
                    {
                        "key": row.key,
                        "name": row.name,
                        "loss": row.loss,
                        "seeds": list(row.seeds),
                        "oracle_reward_per_seed": {k: _finite(v) for k, v in row.per_seed.items()},
                        **{c: _plain(getattr(row, c)) for c in COLUMNS},
                    }
                    for row in tier.rows
                ],
                "reward_models": {
                    seed or "seed": {k: v._asdict() if isinstance(v, Estimate) else v for k, v in model.metrics.items()}
                    for seed, model in tier.reward_models.items()
                },
                "training_margins": len(tier.margins),
            }
            for tier in tiers
        },
    }


def results_csv(tiers: Sequence[Tier]) -> str:
    """One line per tier, method and quantity: tier, method, quantity, mean, low, high, n."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["tier", "method", "quantity", "mean", "low", "high", "n"])
    for tier in tiers:
        for row in tier.rows:
            for column in COLUMNS:
                value = getattr(row, column)
                if isinstance(value, Estimate):
                    writer.writerow([no_formula(tier.name), no_formula(row.name), column, *value])
                elif value is not None:
                    writer.writerow([no_formula(tier.name), no_formula(row.name), column, value, "", "", ""])
    return out.getvalue()


def no_formula(text: str) -> str:
    # A spreadsheet would run a name that begins like a formula.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _markdown(value: Value, how: str) -> str:
    if isinstance(value, Estimate):
        return f"{one(value.mean, how)} ({interval(value, how)})"
    return write(value, how)


def markdown_cell(text: str) -> str:
    """Text on one line in which Markdown finds neither a table's bar nor a tag."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _plain(value: Value) -> Any:
    return value._asdict() if isinstance(value, Estimate) else _finite(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean(value: Value) -> float:
    if value is None:
        return float("-inf")
    mean = value.mean if isinstance(value, Estimate) else value
    return mean if math.isfinite(mean) else float("-inf")


def _count(n: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[n] if n < len(words) else n} {noun}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """ "High, Medium and Low"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
