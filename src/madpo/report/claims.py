"""What the paper claims in Section 5, claim by claim, against this run's numbers and their intervals.

``claims.toml`` is the table of the claims and of the differences of mean rewards that each asks for. A claim held if
every required difference lies above its bound with the whole 95 % interval and in every training seed; it did not hold
if any lies below; otherwise this run does not separate the two sides. A claim of which a part was not run has no
verdict, unless the other part contradicts it. How a claim is read is shown with it, since words like "near-highest"
leave room.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Any

from madpo.report import published
from madpo.report.compare import NOT_RUN, Choice, Comparison, base_beta, choose, chosen, difference, settings_of
from madpo.report.equal_kl import equal_kl, frontiers
from madpo.report.methods import RIVALS, is_setting
from madpo.report.results import Tier
from madpo.rewards.weight_counts import WeightParameters, coefficient_at_zero

HELD, BROKEN, OPEN = "held", "did not hold", "not separated"
EQUAL_KL = "At the same distance from the reference"
BEYOND = "Beyond the paper, at equal β: is it more than its rivals?"
OWN = (EQUAL_KL, BEYOND)
"""Sections of claims that are not the paper's."""
# Key of the table of claims -> the bound that the differences under it must lie above, and whether they are required.
ASKED = {"above": (0.0, True), "near": (-0.1, True), "optional": (0.0, False)}
_SIDE = re.compile(r"(?P<method>.+?)(?:\((?P<tau>[\d.]+),(?P<c>[\d.]+)\))?@(?P<tier>\w+)")
SAME_REACH = "DPO at β/c(0)"
_BOUNDED = ("Best of n",)  # whose KL is a bound
_WITHOUT_MARGINS = {"dpo-drops-on-low", "beta-dpo-above-dpo", "beta-dpo-peaks-on-medium"}


@dataclass(frozen=True)
class Claim:
    """A claim and what supports or contradicts it.

    Attributes:
        key: stable name for programs; section: where it belongs; text: the claim.
        reading: how it is tested; paper: the paper's own numbers for it, "" where it gives none.
        only: labels of the tiers that it was tested on, where others are left out.
    """

    key: str
    section: str
    text: str
    reading: str
    paper: str
    comparisons: tuple[Comparison, ...]
    only: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One of ``held``, ``did not hold``, ``not separated``, ``not run``.

        One comparison against it is enough for ``did not hold``; the others need every comparison that the claim
        asks for, so that a part of a study does not speak for the whole.
        """
        if any(c.below for c in self.comparisons):
            return BROKEN
        needed = [c for c in self.comparisons if c.required]
        if any(c.value is None for c in needed):
            return NOT_RUN
        return HELD if all(c.above for c in needed) else OPEN

    @property
    def shown(self) -> str:
        """The verdict with what it rests on: "held, on Low only, with one training of each"."""
        words = [self.verdict]
        if self.only:
            words.append(f"on {' and '.join(self.only)} only")
        if self.seeds == 1 and self.verdict not in (OPEN, NOT_RUN):
            words.append("with one training of each")
        if self.partly:
            missing = sum(c.value is None for c in self.comparisons)
            words.append(f"{missing} of {len(self.comparisons)} comparisons are missing")
            words[0] = "not run in full" if self.verdict == NOT_RUN else words[0]
        return ", ".join(words)

    @property
    def partly(self) -> bool:
        """Whether some of its comparisons could be made, and others not."""
        return 0 < len(self.made) < len(self.comparisons)

    @property
    def made(self) -> list[Comparison]:
        """The comparisons that could be made."""
        return [c for c in self.comparisons if c.value is not None]

    @property
    def seeds(self) -> int:
        """Training seeds that each of its comparisons has at least; 0 where none was made."""
        return min((c.seeds for c in self.made), default=0)

    @property
    def reads_margins(self) -> bool:
        """Whether it is about methods that take weights from a reward model."""
        without = {f"{_slug(name)}-at-equal-kl" for name in ("IPO", "β-DPO", "rDPO", "RE-DPO", "cDPO")}
        return self.key not in _WITHOUT_MARGINS | without


def claims(tiers: Sequence[Tier]) -> list[Claim]:
    """What methods earn at equal KL; then, at equal beta, every claim of the paper's Section 5 that a run can test, and
    what a careful reader asks beyond them."""
    study = _Study(tiers)
    table = tomllib.loads((files("madpo.report") / "claims.toml").read_text(encoding="utf-8"))
    own = (claim for line in table["claim"] for claim in study.paper(line))
    return [*study.at_equal_kl(), *own, *study.beyond()]


class _Study:
    """Looks up sides in the tiers of a run."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = {tier.name: tier for tier in tiers}
        self.beta = base_beta(tiers)
        self._found: dict[str, Choice | None] = {}

    def paper(self, line: Mapping[str, Any]) -> Iterator[Claim]:
        """The claims that a line of the table makes."""
        each = line.get("each", {})
        own = {name: values for name, values in each.items() if f"{{{name}}}" in line["key"]}
        others = {name: values for name, values in each.items() if name not in own}
        for named in _combinations(own):
            comparisons = [
                self.answer(_filled(asked, {**named, **more}), bound=bound, required=required)
                for kind, (bound, required) in ASKED.items()
                for more in _combinations(others)
                for asked in line.get(kind, ())
            ]
            paper = line["paper"] if isinstance(line["paper"], str) else line["paper"][named["tier"]]
            key, section, text, reading = (_filled(line[n], named) for n in ("key", "section", "text", "reading"))
            yield Claim(key, section, text, reading, paper, tuple(comparisons or self.every_setting()))

    def find(self, side: str) -> Choice | None:
        """The setting of a side such as "MADPO@low"; None where it was not run."""
        if side not in self._found:
            method, tau, c, name = _parts(side)
            tier = self.tiers.get(name)
            rows = settings_of(tier, method, self.beta) if tier else []
            if tau is not None:
                rows = [row for row in rows if is_setting(row.loss, float(tau), float(c))][:1]
            self._found[side] = choose(method, tier, rows) if tier else None
        return self._found[side]

    def answer(self, difference_text: str, *, bound: float, required: bool) -> Comparison:
        """A difference of the table."""
        sides = re.split(r" [-+] ", difference_text)
        return difference(_words(sides), [self.find(side) for side in sides], bound=bound, required=required)

    def every_setting(self) -> list[Comparison]:
        """Each setting of MADPO minus DPO, in every tier; one setting shows no sensitivity."""
        found = []
        for name in published.TIERS:
            tier, dpo = self.tiers.get(name), self.find(f"DPO@{name}")
            rows = settings_of(tier, "MADPO", self.beta) if tier else []
            if tier is None or len(rows) < 2:
                what = f"MADPO's settings minus DPO, {name.capitalize()}"
                found.append(Comparison(what, missing="fewer than two settings were run"))
                continue
            found += [difference(f"{r.name} minus DPO, {tier.label}", [choose(r.name, tier, [r]), dpo]) for r in rows]
        return found

    def at_equal_kl(self) -> list[Claim]:
        """Every method with a curve or a point of reward against KL, against DPO's curve and against MADPO's."""
        lines = {name: frontiers(tier, self.beta) for name, tier in self.tiers.items()}
        methods = dict.fromkeys(["MADPO", *(method for found in lines.values() for method in found)])
        pairs = [(method, "DPO") for method in methods] + [(method, "MADPO") for method in methods]
        found = []
        for method, base in pairs:
            if method in ("DPO", base, *_BOUNDED):
                continue
            by_tier = []
            for name, tier in self.tiers.items():
                line = lines[name].get(method, [])
                choice = choose(method, tier, line[:1]) if len(line) > 1 else self.find(f"{method}@{name}")
                what = f"{method} minus {base} at equal KL, {tier.label}"
                line = line if len(line) > 1 else []
                by_tier.append((tier.label, equal_kl(what, tier, choice, base=base, line=line)))
            if all(c.value is None for _, c in by_tier) and (method, base) != pairs[0]:
                continue
            text = f"{method} earns more than {base} at the same distance from the reference."
            reading = (
                f"{method}'s curve of reward against the root of KL, over its betas, minus that of {base}, which "
                "begins at the reference: the mean over the distances that both reach, on each tier that was run. With "
                "one beta, the difference at its distance. Of several curves of the base, one for each learning rate, "
                "the one that leaves the least counts."
            )
            key = f"{_slug(method)}-at-equal-kl" if base == "DPO" else f"{_slug(method)}-above-madpo-at-equal-kl"
            found.append(_of_tiers(key, text, reading, f"{method} minus {base} at equal KL", by_tier, EQUAL_KL))
        return found

    def beyond(self) -> list[Claim]:
        """Rivals of MADPO at the same beta."""
        run = {row.method for tier in self.tiers.values() for row in tier.rows}
        found = [self._rival("DPO at its best β", "dpo-best-beta")]
        if any(self._same_reach(tier) is not None for tier in self.tiers.values()):
            found.append(self._rival(SAME_REACH, "dpo-same-reach"))
        return found + [self._rival(name, _slug(name)) for name in RIVALS if name in RIVALS[:4] or name in run]

    def _same_reach(self, tier: Tier) -> Choice | None:
        """DPO at beta / c(0), which MADPO is where every margin is far below tau (Proposition 4.1)."""
        ours = self.find(f"MADPO@{tier.name}")
        if ours is None or not {"tau", "c_max"} <= ours.row.loss.keys():
            return None
        given = {n: v for n in WeightParameters._fields if (v := ours.row.loss.get(n)) is not None}
        beta = self.beta / coefficient_at_zero(WeightParameters(**given))
        near = [row for row in settings_of(tier, "DPO", None) if row.beta and abs(row.beta / beta - 1) < 0.02]
        return choose(SAME_REACH, tier, near[:1])

    def _rival(self, name: str, key: str) -> Claim:
        by_tier = []
        for tier_name, tier in self.tiers.items():
            if name == "DPO at its best β":
                rows = settings_of(tier, "DPO", None)
                rival = choose(name, tier, rows) if len({row.beta for row in rows}) > 1 else None
            elif name == SAME_REACH:
                rival = self._same_reach(tier)
            else:
                rival = chosen(tier, name, self.beta)
            made = difference(f"MADPO minus {name}, {tier.label}", [self.find(f"MADPO@{tier_name}"), rival])
            by_tier.append((tier.label, made))
        reading = f"MADPO lies above {name} on each tier that was run."
        return _of_tiers(f"madpo-above-{key}", f"MADPO beats {name}.", reading, f"MADPO minus {name}", by_tier)


def _combinations(each: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(each, values, strict=True)) for values in product(*each.values())]


def _filled(text: str, names: dict[str, str]) -> str:
    """The text with its names in braces; a value may hold other names."""
    for name, value in reversed(names.items()):
        text = text.replace(f"{{{name}}}", value).replace(f"{{{name.capitalize()}}}", value.capitalize())
    return text


def _parts(side: str) -> tuple[str, Any, Any, str]:
    """Method, tau and c (None for the chosen setting) and tier of a side."""
    found = _SIDE.fullmatch(side)
    assert found is not None, side
    return found["method"], found["tau"], found["c"], found["tier"]


def _words(sides: Sequence[str]) -> str:
    """A difference for people: "MADPO minus DPO, High", "DPO: High minus Low"."""
    names, tiers = [], []
    for method, tau, c, tier in map(_parts, sides):
        names.append(method if tau is None else f"{method} τ={tau} c={c}")
        tiers.append(tier.capitalize())
    if len(sides) == 4:
        return f"{names[0]} minus {names[1]}: {tiers[0]} minus {tiers[2]}"
    if tiers[0] == tiers[1]:
        return f"{names[0]} minus {names[1]}, {tiers[0]}"
    return f"{names[0]}: {' minus '.join(tiers)}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("β", "beta")).strip("-")


def _of_tiers(
    key: str, text: str, reading: str, what: str, by_tier: Sequence[tuple[str, Comparison]], section: str = BEYOND
) -> Claim:
    """A claim on the tiers that both sides were run on, of one comparison per tier."""
    made = [label for label, c in by_tier if c.value is not None]
    comparisons = [c for _, c in by_tier if not c.missing.startswith(NOT_RUN)] or [c for _, c in by_tier]
    only = tuple(made) if len(made) < len(by_tier) else ()
    return Claim(key, section, text, reading, "", tuple(comparisons) or (Comparison(what, missing=NOT_RUN),), only)


def ties(found: Sequence[Claim]) -> list[str]:
    """One sentence per rival that MADPO does not clearly beat."""
    texts = []
    for claim in found:
        if claim.section != BEYOND and claim.key != "madpo-at-equal-kl":
            continue
        rival = claim.text.removeprefix("MADPO beats ").rstrip(".")
        rival = "DPO at equal KL" if claim.key == "madpo-at-equal-kl" else rival
        same = [c.what.rsplit(", ", 1)[1] for c in claim.made if not c.above and not c.below]
        worse = [c.what.rsplit(", ", 1)[1] for c in claim.made if c.below]
        if same:
            texts.append(f"MADPO ties with {rival} on {', '.join(same)}: this run does not tell them apart.")
        if worse:
            texts.append(f"MADPO is behind {rival} on {', '.join(worse)}.")
    return texts


def counts(found: Sequence[Claim]) -> str:
    """How the paper's claims fared, in one sentence."""
    own = [claim.verdict for claim in found if claim.section not in OWN]
    n = {verdict: own.count(verdict) for verdict in (HELD, BROKEN, OPEN, NOT_RUN)}
    if n[NOT_RUN] == len(own):
        return f"None of the {len(own)} claims of the paper's Section 5 was put to the test by this run."
    return (
        f"Of {len(own)} claims of the paper's Section 5, {n[HELD]} held, {n[BROKEN]} did not hold, {n[OPEN]} were not "
        f"separated by this run, and {n[NOT_RUN]} were not run."
    )
