"""What ``madpo score`` reports."""

from __future__ import annotations

from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.rewards.probe import ProbeReport


class ScoreReport(Report):
    """What :func:`score` did."""

    file: str
    pairs: int
    accuracy: Estimate
    """Share of pairs with a margin above 0."""
    mean_margin: float
    log_loss: float
    temperature: float
    """With score_columns, what the margins were divided by; else what would make them log-odds on these labels."""
    temperature_reason: str
    calibrated_log_loss: float
    heldout: bool
    """True if no margin comes from a model that was trained on its pair (known for ``folds`` and ``probe`` only)."""
    data_digest: str | None = None
    reward_model_digest: str | None = None
    """SHA-256 of what was scored, and by what; None for what is on the hub."""
    ties: int = 0
    """Margins of exactly 0: of a reward model that has learned nothing, or scores that are equal."""
    trained_on: bool = False
    """True if the reward model was trained on more than 5 % of these pairs, so that nothing here is calibrated."""
    seen: int | None = None
    """Pairs, in either order, that the reward model was trained on; None where it does not say."""
    probe: ProbeReport | None = None
    """With ``probe``: what it is, and how good out of fold."""

    def text(self) -> str:
        """The report for a person."""
        a = self.accuracy
        lines = [
            f"{self.pairs} pairs scored: mean margin {self.mean_margin:.3f}, above 0 for {a.mean:.1%} "
            f"(95 % interval {a.low:.1%} to {a.high:.1%})",
            f"log loss {self.log_loss:.3f}, {self.calibrated_log_loss:.3f} at temperature {self.temperature:.3g} "
            f"(a coin: 0.693); the temperature was {self.temperature_reason}",
        ]
        if self.ties:
            lines.append(
                f"{self.ties} margins are exactly 0: equal scores, or a reward model that has learned nothing (no look "
                "at its held-out pairs was better than a coin; give more pairs, more epochs or a larger patience)"
            )
        if self.probe is not None:
            lines += self.probe.text().splitlines()
        if self.seen:
            lines.append(
                f"the reward model was trained on {self.seen} of these pairs: all of this flatters it; --probe and "
                "--folds do not"
            )
        elif self.seen is None and not self.heldout:
            lines.append("if the reward model was trained on these pairs, all of this flatters it; --folds does not")
        return "\n".join(lines)
