"""What the paper claims in Section 5, claim by claim, against this run's numbers and their intervals.

A claim is read as comparisons of mean rewards, each of which must lie above a bound (0, or a small loss that counts as
none). It held if every required one does with its whole 95 % interval and in every training seed; it did not hold if
any lies below; otherwise this run does not separate the two sides. A claim of which a part was not run has no verdict,
unless the other part contradicts it. How a claim is read stands beside it, since words like "near-highest" leave room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from madpo.report import published
from madpo.report.families import (
    FEWEST,
    RIVALS,
    Choice,
    Comparison,
    base_beta,
    choose,
    chosen,
    family_of,
    less,
    more_on,
    settings_of,
)
from madpo.report.frontier import equal_kl
from madpo.results import Tier

HELD, BROKEN, OPEN, NOT_RUN = "held", "did not hold", "not separated", "not run"
NO_LOSS = 0.1  # of the oracle's reward: a loss up to this counts as none where the paper says "near" or "no loss"

MAIN, SENSITIVITY, ABLATION, BEYOND = (
    "Main result",
    "Sensitivity",
    "Ablation",
    "Beyond the paper: is it more than its rivals?",
)


_WITHOUT_MARGINS = {"dpo-drops-on-low", "beta-dpo-above-dpo", "beta-dpo-peaks-on-medium"}


@dataclass(frozen=True)
class Claim:
    """A claim and what speaks for or against it.

    Attributes:
        key: stable name for programs; section: where it belongs; text: the claim.
        reading: how it is tested; paper: the paper's own numbers for it, "" where it gives none.
        only: labels of the tiers that it was tested on, where it leaves others out.
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
        """The verdict with what it stands on: "held, on Low alone, with one training of each"."""
        words = [self.verdict]
        if self.only:
            words.append(f"on {' and '.join(self.only)} alone")
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
        made = [c.value is not None for c in self.comparisons]
        return any(made) and not all(made)

    @property
    def seeds(self) -> int:
        """Training seeds that each of its comparisons has at least; 0 where none was made."""
        return min((c.seeds for c in self.comparisons if c.value is not None), default=0)

    @property
    def reads_margins(self) -> bool:
        """Whether it speaks of methods whose weights come from a reward model."""
        return self.key not in _WITHOUT_MARGINS

    @property
    def too_few(self) -> bool:
        """Whether some comparison stands on too few prompts to be judged."""
        return any(c.value is not None and c.value.n < FEWEST for c in self.comparisons)


def claims(tiers: Sequence[Tier]) -> list[Claim]:
    """Every claim of the paper's Section 5 that a run can test, then what a careful reader asks beyond them."""
    study = _Study(tiers)
    return [*_main(study), *_sensitivity(study), *_ablation(study), *_beyond(study)]


class _Study:
    """Chosen settings by tier and method; tiers that the run lacks have none."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = {tier.name: tier for tier in tiers}
        self.beta = base_beta(tiers)
        self._known: dict[tuple[str, str], Choice | None] = {}

    def best(self, tier: str, family: str) -> Choice | None:
        """The family's chosen setting at the shared beta."""
        if (tier, family) not in self._known:
            given = self.tiers.get(tier)
            self._known[tier, family] = chosen(given, family, self.beta) if given else None
        return self._known[tier, family]

    def at(self, tier: str, family: str, tau: float, c: float) -> Choice | None:
        """One setting of MADPO or of a part of it; nothing is chosen here."""
        given = self.tiers.get(tier)
        rows = settings_of(given, family, self.beta) if given else []
        found = [row for row in rows if is_setting(row.loss, tau, c)]
        return choose(family, given, found[:1]) if given and found else None

    def label(self, tier: str) -> str:
        """For people."""
        return self.tiers[tier].label if tier in self.tiers else tier.capitalize()


def is_setting(loss: dict[str, object], tau: float, c: float) -> bool:
    """Whether a loss is MADPO's at tau and c with c_min = 1/c and lam = 1, as everywhere in the paper."""
    given = {name: loss.get(name) for name in ("tau", "c_max", "c_min", "lam")}
    low = given["c_min"]
    return (given["tau"], given["c_max"]) == (tau, c) and low in (None, 1 / c) and given["lam"] in (None, 1.0)


# The main result


def _main(study: _Study) -> list[Claim]:
    found = []
    for tier in published.TIERS:
        rivals = [name for name in published.METHODS if name != "MADPO"]
        found.append(
            Claim(
                f"madpo-first-{tier}",
                MAIN,
                f"MADPO has the highest mean reward on {study.label(tier)} pairs.",
                "MADPO lies above each of DPO, IPO and β-DPO.",
                _paper_row(tier),
                tuple(_between(study, tier, "MADPO", name) for name in rivals),
            )
        )
    return [*found, _gains(study), _stable(study), _drops(study), *_beta_dpo(study), _ipo(study)]


def _between(study: _Study, tier: str, one: str, other: str, **how: object) -> Comparison:
    what = f"{one} less {other}, {study.label(tier)}"
    return less(study.best(tier, one), study.best(tier, other), what, **how)


def _across(study: _Study, method: str, one: str, other: str, **how: object) -> Comparison:
    what = f"{method}: {study.label(one)} less {study.label(other)}"
    return less(study.best(one, method), study.best(other, method), what, **how)


def _paper_row(tier: str) -> str:
    return ", ".join(f"{name} {values[tier][0]:.2f}" for name, values in published.TABLE_1.items())


def _gains(study: _Study) -> Claim:
    pairs = {tier: (study.best(tier, "MADPO"), study.best(tier, "β-DPO")) for tier in published.TIERS}
    gain = "MADPO's gain over β-DPO"
    return Claim(
        "gains-largest-on-high",
        MAIN,
        "MADPO's gain over the next best method is largest on High and smallest on Low pairs.",
        "The gain in reward over β-DPO on High lies above that on Medium and on Low, and Medium's above Low's. Percent "
        "of a reward that can be negative say nothing, so gains are differences.",
        ", ".join(f"{study.label(tier)} +{gained:g} %" for tier, gained in published.GAINS.items()),
        tuple(
            more_on(pairs[one], pairs[other], f"{gain}: {study.label(one)} less {study.label(other)}")
            for one, other in (("high", "medium"), ("high", "low"), ("medium", "low"))
        ),
    )


def _stable(study: _Study) -> Claim:
    return Claim(
        "madpo-stable",
        MAIN,
        "MADPO does not get worse from High to Medium pairs.",
        f"Its reward on Medium less that on High; a loss up to {NO_LOSS:g} counts as none.",
        _paper_methods("MADPO"),
        (_across(study, "MADPO", "medium", "high", bound=-NO_LOSS),),
    )


def _drops(study: _Study) -> Claim:
    return Claim(
        "dpo-drops-on-low",
        MAIN,
        "DPO drops on Low pairs.",
        "Its reward on High and on Medium lies above that on Low.",
        _paper_methods("DPO"),
        tuple(_across(study, "DPO", tier, "low") for tier in ("high", "medium")),
    )


def _beta_dpo(study: _Study) -> list[Claim]:
    return [
        Claim(
            "beta-dpo-above-dpo",
            MAIN,
            "β-DPO improves on DPO on every tier.",
            "β-DPO lies above DPO on each tier.",
            _paper_methods("β-DPO", "DPO"),
            tuple(_between(study, tier, "β-DPO", "DPO") for tier in published.TIERS),
        ),
        Claim(
            "beta-dpo-peaks-on-medium",
            MAIN,
            "β-DPO is best on Medium pairs.",
            "Its reward on Medium lies above that on High and on Low.",
            _paper_methods("β-DPO"),
            tuple(_across(study, "β-DPO", "medium", tier) for tier in ("high", "low")),
        ),
    ]


def _ipo(study: _Study) -> Claim:
    others = [name for name in published.METHODS if name != "IPO"]
    return Claim(
        "ipo-weakest",
        MAIN,
        "IPO is the weakest method on every tier.",
        "Each other method lies above IPO (summed log-probabilities) on each tier.",
        _paper_methods("IPO"),
        tuple(_between(study, tier, name, "IPO") for tier in published.TIERS for name in others),
    )


def _paper_methods(*names: str) -> str:
    parts = []
    for name in names:
        values = ", ".join(f"{tier.capitalize()} {v[0]:.2f}" for tier, v in published.TABLE_1[name].items())
        parts.append(f"{name} {values}")
    return "; ".join(parts)


# Sensitivity


def _sensitivity(study: _Study) -> list[Claim]:
    tau = {tier: _line(study, tier, "τ", sorted(published.OVER_TAU[tier])) for tier in published.TIERS}
    found = [
        Claim(
            "tau-high-peaks-at-4",
            SENSITIVITY,
            "On High pairs the reward peaks at τ = 4 and then stays level.",
            f"At c = 2: τ = 4 lies above τ = 2, and neither 7 nor 10 lies more than {NO_LOSS:g} above it.",
            _curve(published.OVER_TAU["high"], "τ"),
            (
                _step(tau["high"], "τ", "High", 4.0, 2.0),
                _step(tau["high"], "τ", "High", 4.0, 7.0, bound=-NO_LOSS),
                _step(tau["high"], "τ", "High", 4.0, 10.0, bound=-NO_LOSS),
            ),
        )
    ]
    for tier in ("medium", "low"):
        text = f"On {study.label(tier)} pairs the reward grows with τ."
        paper = _curve(published.OVER_TAU[tier], "τ")
        found.append(_growing(f"tau-grows-{tier}", text, "c = 2", tau[tier], "τ", study.label(tier), paper))
    for tier in published.TIERS:
        line = _line(study, tier, "c", sorted(published.OVER_C[tier]))
        text = f"On {study.label(tier)} pairs the reward grows with c."
        paper = _curve(published.OVER_C[tier], "c")
        found.append(_growing(f"c-grows-{tier}", text, "τ = 7", line, "c", study.label(tier), paper))
    return [*found, _insensitive(study)]


def _line(study: _Study, tier: str, name: str, values: Sequence[float]) -> dict[float, Choice | None]:
    if name == "τ":
        return {value: study.at(tier, "MADPO", value, published.FIXED_C) for value in values}
    return {value: study.at(tier, "MADPO", published.FIXED_TAU, value) for value in values}


def _step(line: dict[float, Choice | None], name: str, tier: str, a: float, b: float, **how: object) -> Comparison:
    return less(line[a], line[b], f"{name} = {a:g} less {name} = {b:g}, {tier}", **how)


def _growing(
    key: str, text: str, fixed: str, line: dict[float, Choice | None], name: str, tier: str, paper: str
) -> Claim:
    values = list(line)
    ends = _step(line, name, tier, values[-1], values[0])
    steps = [_step(line, name, tier, b, a, required=False) for a, b in pairwise(values)]
    reading = f"At {fixed}: the largest {name} lies above the smallest, and no step between lies clearly below 0."
    return Claim(key, SENSITIVITY, text, reading, paper, (ends, *steps))


def _curve(values: dict[float, float], name: str) -> str:
    return ", ".join(f"{name} = {x:g}: {y:.2f}" for x, y in values.items())


def _insensitive(study: _Study) -> Claim:
    comparisons = []
    for tier in published.TIERS:
        given, dpo = study.tiers.get(tier), study.best(tier, "DPO")
        rows = settings_of(given, "MADPO", study.beta) if given else []
        alone = [choose(row.name, given, [row]) for row in rows] if given and len(rows) > 1 else []
        comparisons += [
            less(one, dpo, f"{one.name} less DPO, {study.label(tier)}") for one in alone if one is not None
        ] or [Comparison(f"MADPO's settings less DPO, {study.label(tier)}", missing="fewer than two settings were run")]
    return Claim(
        "madpo-not-sensitive",
        SENSITIVITY,
        "MADPO is not overly sensitive to its parameters.",
        "Every setting of MADPO that was run lies above DPO, on each tier.",
        "its lowest setting is 0.10 above DPO on High, 0.18 on Medium, 0.08 on Low",
        tuple(comparisons),
    )


# Ablation


def _ablation(study: _Study) -> list[Claim]:
    return [
        _parts(
            study,
            "amp-only-near-best",
            "Amp-Only has the highest or nearly the highest reward everywhere.",
            f"It lies no more than {NO_LOSS:g} below DPO, Reg-Only and MADPO, on each tier at both settings.",
            lambda tier, c: [
                _part(study, tier, c, "Amp-Only", other, bound=-NO_LOSS) for other in ("DPO", "Reg-Only", "MADPO")
            ],
        ),
        _parts(
            study,
            "amplification-drives",
            "Amplification is the main source of the gain.",
            "Amp-Only lies above Reg-Only, on each tier at both settings.",
            lambda tier, c: [_part(study, tier, c, "Amp-Only", "Reg-Only")],
        ),
        Claim(
            "reg-only-above-dpo",
            ABLATION,
            "Reg-Only, properly tuned, improves on DPO on every tier.",
            "Its better setting, chosen on one half of the prompts, lies above DPO on the other half. It changes "
            "weights of margins beyond τ = 7 alone, and at c = 2 those by half a percent at most.",
            "; ".join(f"c = {c:g}: {_values(part['Reg-Only'])}" for c, part in published.ABLATION.items()),
            tuple(_between(study, tier, "Reg-Only", "DPO") for tier in published.TIERS),
        ),
        _parts(
            study,
            "madpo-near-amp-only",
            "The full MADPO is about as good as Amp-Only.",
            f"It lies no more than {NO_LOSS:g} below Amp-Only, on each tier at both settings.",
            lambda tier, c: [_part(study, tier, c, "MADPO", "Amp-Only", bound=-NO_LOSS)],
        ),
    ]


def _parts(
    study: _Study, key: str, text: str, reading: str, compare: Callable[[str, float], list[Comparison]]
) -> Claim:
    comparisons = [found for c in published.ABLATION for tier in published.TIERS for found in compare(tier, c)]
    paper = "; ".join(
        f"c = {c:g}: " + ", ".join(f"{name} {_values(values)}" for name, values in part.items() if name != "DPO")
        for c, part in published.ABLATION.items()
    )
    return Claim(key, ABLATION, text, reading, paper, tuple(comparisons))


def _part(study: _Study, tier: str, c: float, one: str, other: str, **how: object) -> Comparison:
    def side(name: str) -> Choice | None:
        return study.best(tier, "DPO") if name == "DPO" else study.at(tier, name, published.FIXED_TAU, c)

    return less(side(one), side(other), f"{one} less {other}, {study.label(tier)}, c = {c:g}", **how)


def _values(by_tier: dict[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in by_tier.values())


# Beyond the paper


def _beyond(study: _Study) -> list[Claim]:
    found = [_rival(study, "DPO at its best β", "dpo-best-beta", lambda tier: _tuned(study, tier))]
    for name in RIVALS:
        if name in RIVALS[:4] or any(family_of(row) == name for t in study.tiers.values() for row in t.rows):
            found.append(_rival(study, name, name.lower().replace(" ", "-"), partial(study.best, family=name)))
    comparisons = [
        equal_kl(tier, study.best(name, "MADPO"), f"MADPO less DPO at MADPO's KL, {tier.label}")
        for name, tier in study.tiers.items()
    ]
    found.append(
        Claim(
            "madpo-at-equal-kl",
            BEYOND,
            "MADPO earns more than DPO at the same distance from the reference.",
            "MADPO's reward less what DPO's curve of reward against KL, drawn over β, has at MADPO's KL, on each tier "
            "that was run.",
            "",
            _run_ones(comparisons) or (Comparison("MADPO less DPO at MADPO's KL", missing="not run"),),
            _only(study, comparisons),
        )
    )
    return found


def _run_ones(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Those of tiers that both sides were run on; all if there is none."""
    return tuple(c for c in comparisons if not c.missing.startswith(NOT_RUN)) or tuple(comparisons)


def _only(study: _Study, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Labels of the tiers with a value, one comparison a tier; none where all have one, or no one."""
    labels = [study.label(name) for name in study.tiers]
    made = [label for label, c in zip(labels, comparisons, strict=True) if c.value is not None]
    return tuple(made) if len(made) < len(labels) else ()


def _tuned(study: _Study, tier: str) -> Choice | None:
    given = study.tiers[tier]
    rows = settings_of(given, "DPO", None)
    return choose("DPO at its best β", given, rows) if len({row.loss.get("beta") for row in rows}) > 1 else None


def _rival(study: _Study, name: str, key: str, of: Callable[[str], Choice | None]) -> Claim:
    comparisons = [
        less(study.best(tier, "MADPO"), of(tier), f"MADPO less {name}, {study.label(tier)}") for tier in study.tiers
    ]
    return Claim(
        f"madpo-above-{key}",
        BEYOND,
        f"MADPO beats {name}.",
        f"MADPO lies above {name} on each tier that was run.",
        "",
        _run_ones(comparisons) or (Comparison(f"MADPO less {name}", missing="not run"),),
        _only(study, comparisons),
    )


def ties(found: Sequence[Claim]) -> list[str]:
    """One sentence per rival that MADPO does not clearly beat."""
    texts = []
    for claim in found:
        if claim.section != BEYOND:
            continue
        same = [c.what for c in claim.comparisons if c.value is not None and not c.above and not c.below]
        worse = [c.what for c in claim.comparisons if c.below]
        rival = claim.text.removeprefix("MADPO beats ").rstrip(".")
        if claim.key == "madpo-at-equal-kl":
            rival = "DPO at equal KL"
        places = [", ".join(what.rsplit(", ", 1)[1] for what in group) for group in (same, worse)]
        if same:
            texts.append(f"MADPO ties with {rival} on {places[0]}: this run does not tell them apart.")
        if worse:
            texts.append(f"MADPO is behind {rival} on {places[1]}.")
    return texts


def counts(found: Sequence[Claim]) -> str:
    """How the paper's claims fared, in one sentence."""
    own = [claim for claim in found if claim.section != BEYOND]
    n = {verdict: sum(claim.verdict == verdict for claim in own) for verdict in (HELD, BROKEN, OPEN, NOT_RUN)}
    if n[NOT_RUN] == len(own):
        return f"None of the {len(own)} claims of the paper's Section 5 was put to the test by this run."
    return (
        f"Of {len(own)} claims of the paper's Section 5, {n[HELD]} held, {n[BROKEN]} did not hold, {n[OPEN]} were not "
        f"separated by this run, and {n[NOT_RUN]} were not run."
    )


def tested(found: Sequence[Claim]) -> int:
    """Comparisons that were made."""
    return int(np.sum([c.value is not None for claim in found for c in claim.comparisons]))
