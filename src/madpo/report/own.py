"""What a comparison on a user's own pairs found: does preference training help on them, and which loss?

Losses are compared with DPO at the same distance from the reference, where a judge and several betas give a curve of
reward against KL; else by the log loss of held-out pairs, from which a temperature has taken beta's scale. Reward at
equal beta is no criterion, since what moves farther from the reference earns more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from madpo.core.metrics import Estimate
from madpo.report.charts import Chart, figure, levels
from madpo.report.compare import FEWEST, Comparison, base_beta, choose, difference, least_difference
from madpo.report.equal_kl import equal_kl, frontiers
from madpo.report.numbers import count, format_list, short, side
from madpo.report.pages import Cell, Table, cell, limit_of
from madpo.report.results import Row, Tier, paired
from madpo.report.summary import Verdict
from madpo.runner.record import Record

HEAD = {
    "heldout_accuracy": ("held-out pairs right", "share"),
    "log_loss_difference": ("log loss gained over DPO, nats", "signed"),
    "oracle_reward": ("reward by the judge", "number"),
    "kl": ("KL, nats", "number"),
}

TRAIN_MORE = "so give more --epochs or a higher --learning_rate"

NEAR = 0.1
"""KL to the reference in nats, below which a policy can have changed little: a mean reward by at most
sqrt(2 KL) = 0.45 of its standard deviations (Donsker and Varadhan's bound for a normal reward)."""


def own_opening(tier: Tier) -> str:
    """What was compared, on what."""
    methods = format_list(list(dict.fromkeys(row.family for row in tier.policies)))
    rates = dict[str, list[float]]()
    for row in tier.policies:
        if row.learning_rate is not None and row.learning_rate not in rates.setdefault(row.family, []):
            rates[row.family].append(row.learning_rate)
    also = "".join(
        f", {name} also at the learning rate {format_list([f'{r:g}' for r in own])}" for name, own in rates.items()
    )
    betas = {row.beta for row in tier.policies if row.beta is not None}
    prompts = {
        name: max((value.n for row in tier.policies if isinstance(value := row[name], Estimate)), default=0)
        for name in ("heldout_log_loss", "oracle_reward")
    }
    several = ", those of differences also over training seeds" if len(tier.seeds) > 1 else ""
    measured = [f"held-out pairs of {count(n, 'prompt')}"] if (n := prompts["heldout_log_loss"]) else []
    measured += [f"the judge's reward on {count(n, 'prompt')}"] if (n := prompts["oracle_reward"]) else []
    return (
        f"{methods} at {count(len(betas), 'value')} of β, {count(len(tier.seeds), 'training seed')} each{also}: "
        f"{format_list(measured)}, with 95 % intervals over prompts{several}."
    )


def comparisons(tier: Tier) -> dict[str, Comparison]:
    """Method -> how far it is above DPO: in reward at equal KL, else in held-out log loss (DPO's minus its own)."""
    if tier.baseline is None:
        return {}
    lines = frontiers(tier, base_beta([tier]))
    judged = len(lines.get("DPO", ())) > 1
    found = {}
    for method in dict.fromkeys(row.method for row in tier.policies if row.method != tier.baseline.method):
        at_equal_kl = None
        if judged and (line := lines.get(method)):
            choice = choose(method, tier, line[:1])
            what = f"{method} minus DPO at equal KL"
            at_equal_kl = equal_kl(what, tier, choice, line=line if len(line) > 1 else [])
        if at_equal_kl is not None and at_equal_kl.value is not None:
            found[method] = at_equal_kl
        else:
            on_pairs = _on_pairs(tier, tier.baseline, method)
            found[method] = on_pairs if on_pairs.value is not None else at_equal_kl or on_pairs
    return found


def _on_pairs(tier: Tier, baseline: Row, method: str) -> Comparison:
    """How much less the method's held-out log loss is than that of DPO at any of its learning rates."""
    rows = [row for row in tier.policies if row.method == method]
    row = next((row for row in rows if row.beta == base_beta([tier])), rows[0])
    ours = choose(method, tier, [row])
    return least_difference(
        [
            difference(
                f"{row.name}, held-out log loss", [choose("DPO", tier, [base]), ours], "log_loss", against=base.method
            )
            for base in tier.policies
            if (base.family, base.beta) == (baseline.family, baseline.beta) and base.method != method
        ]
    )


def own_verdict(tier: Tier) -> Verdict:
    """Whether DPO helps, and whether some loss is clearly better; then every difference to DPO."""
    helps, kind = _helps(tier)
    compared = comparisons(tier)
    made = {method: c for method, c in compared.items() if c.value is not None}
    clear = {method: c.value.mean for method, c in made.items() if c.above and c.value is not None}
    fewest = min((c.value.n for c in made.values() if c.value is not None), default=FEWEST)
    if not made:
        why = "; ".join(dict.fromkeys(c.missing for c in compared.values()))
        which = f"No other loss can be compared with DPO yet{f' ({why})' if why else ''}."
    elif fewest < FEWEST:
        which = f"{count(fewest, 'held-out prompt').capitalize()} cannot tell losses apart."
    elif clear:
        best = max(clear, key=lambda method: clear[method])
        which, kind = f"Clearly better than DPO: {format_list(list(clear))}. Take {best}.", "above"
        if made[best].seeds == 1:
            which = f"Better than DPO in one training of each is {best}; give --seeds 0 1, since another can turn that."
    else:
        worse = [method for method, c in made.items() if c.below]
        rest = f"; {format_list(worse)} {'is' if len(worse) == 1 else 'are'} clearly worse." if worse else None
        which = f"No loss is clearly better than DPO{rest or ': these data do not tell them apart.'}"
    remarks = []
    for column, digits, unit in (("reward", 2, "reward at the same KL"), ("log_loss", 3, "held-out log loss, nats")):
        values = [f"{name} {short(c.value, 'signed', digits)}" for name, c in made.items() if c.column == column]
        remarks += [f"Gained over DPO in {unit}: {'; '.join(values)}."] if values else []
    return Verdict("", f"{helps}. {which}", kind=kind, left=" ".join(remarks))


def _helps(tier: Tier) -> tuple[str, str]:
    """What DPO changes, in words, and on which side it is."""
    dpo, start = tier.baseline, tier.sft
    if dpo is None:
        return "There is no plain DPO to compare with yet", "open"
    right = dpo["heldout_accuracy"]
    if isinstance(right, Estimate) and right.low == right.high == 0.5:
        return f"DPO left its policy where it was, {TRAIN_MORE}", "open"
    judged = None if start is None else paired([tier.cells(dpo), tier.cells(start)], alike=tier.others([dpo]))
    if judged is not None:
        found, level = judged.value, 0.0
        words = f"DPO changes the judge's reward by {short(found, 'signed')}"
    elif isinstance(right, Estimate):
        found, level = right, 0.5
        words = f"DPO orders {short(right, 'share')} of the held-out pairs as labelled"
    else:
        return "DPO has not been measured yet", "open"
    kind = "open" if found.n < FEWEST else side(found, level)
    kl = dpo["kl"]
    if kind == "open" and isinstance(kl, Estimate) and kl.mean < NEAR:
        words += f"; its policy is only {kl.mean:.2g} nats from the reference, {TRAIN_MORE}"
    return f"{_HELPS[kind]} on these pairs: {words}", kind


_HELPS = {
    "above": "Preference training helps",
    "below": "Preference training does not help",
    "open": "It is not clear that preference training helps",
}


def own_table(tier: Tier) -> Table:
    """Every policy by what it is compared by."""
    names = [name for name in HEAD if any(row[name] is not None for row in tier.rows)]
    limit = limit_of(row["log_loss_difference"] for row in tier.rows)

    def shown(row: Row, name: str) -> Cell:
        value, how = row[name], HEAD[name][1]
        if how == "signed":
            return cell(None if value is None else -value, how, limit, 3)
        return cell(value, how)

    rows = [[cell(row.name), *(shown(row, name) for name in names)] for row in tier.rows]
    return Table(tier.label, ["policy", *(HEAD[name][0] for name in names)], rows)


def own_chart(tier: Tier, colours: Mapping[str, int]) -> Chart | None:
    """What every policy gains over DPO in held-out log loss; before there is any, how often DPO is right."""
    gained = [(row, gap) for row in tier.policies if isinstance(gap := row["log_loss_difference"], Estimate)]
    right = [(row, share) for row in tier.policies if isinstance(share := row["heldout_accuracy"], Estimate)]
    if gained:
        label, line = "log loss gained over DPO, nats", ("DPO", 0.0)
        values = [(row, -gap) for row, gap in gained]
    else:
        label, line, values = "held-out pairs ordered as labelled", ("chance", 0.5), right
    lines = [(row.name, colours[row.method], value, None) for row, value in values]
    return figure("own", "Held-out pairs", [levels(tier.label, label, lines, line)] if lines else [])


def own_notes(experiment: Mapping[str, Any], records: Mapping[str, Record]) -> list[str]:
    """What to know of the held-out pairs, and of the judge."""
    pairs = records["pairs"].metrics if "pairs" in records else {}
    leaked, of = (pairs.get(name) for name in ("leaked_pairs", "heldout_pairs"))
    note = f"{leaked} of {of} held-out pairs have a prompt that policies or the judge were trained on, which flatters."
    return [*([note] if leaked else []), *_judge_notes(experiment, records)]


def _judge_notes(experiment: Mapping[str, Any], records: Mapping[str, Record]) -> list[str]:
    if seen := experiment.get("judge_saw_pairs"):
        return [f"The judge was trained on {seen} of these pairs: it may know the labels of held-out ones."]
    if experiment.get("judge") == "probe":
        right = records["judge"].metrics.get("heldout_accuracy") if "judge" in records else None
        known = (
            f"It orders {short(right, 'share')} of held-out pairs as labelled." if isinstance(right, Estimate) else ""
        )
        return [
            "The judge is a probe of the reference's hidden states, fitted to pairs that no policy has seen. Margins "
            f"from a probe may share its mistakes. {known}".strip()
        ]
    return []
