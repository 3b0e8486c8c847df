"""Pages of ``madpo reward`` and ``madpo evaluate``: a reliability curve, and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo.core.storage import write_atomically
from madpo.report import table
from madpo.report.figures import Dot, scatter_figure
from madpo.report.pages import Section, card, cell, sections_page

if TYPE_CHECKING:
    from madpo.operations.evaluation import EvaluateReport
    from madpo.operations.reward_model import RewardReport

SAMPLES_SHOWN = 200


def write_reward_page(path: Path, report: RewardReport) -> None:
    """How sure the reward model is against how often it is right, with intervals."""
    dots = [
        Dot(b.predicted, b.observed, f"{b.pairs} pairs: says {b.predicted:.1%}, is right {b.observed.mean:.1%}", False)
        for b in report.reliability
    ]
    rows = [
        [cell(f"{b.low:.2f} to {b.high:.2f}"), cell(str(b.pairs)), cell(f"{b.predicted:.1%}"), cell(b.observed, ".1%")]
        for b in report.reliability
    ]
    figure = scatter_figure(
        dots,
        label="Reliability curve",
        x_label="how sure the reward model is, after the temperature",
        y_label="how often it is right",
        diagonal=True,
    )
    head = ("|margin| / temperature", "pairs", "the reward model says", "the labels agree")
    note = "Held-out pairs in bins of equal number; a calibrated model lies on the line. Bars are 95 % intervals."
    page = sections_page(
        "reward model",
        f"Reward model on {report.settings.model}",
        report.text().splitlines()[:4],
        [Section("Reliability", note, figure + table(head, rows, "Reliability"))],
    )
    write_atomically(path, page)


def write_samples_page(path: Path, report: EvaluateReport, samples: Sequence[Mapping[str, Any]]) -> None:
    """What policy and reference wrote to the same prompts, the largest differences of reward first."""
    order = sorted(samples, key=lambda s: -abs(s["reward"] - s["reference_reward"]))[:SAMPLES_SHOWN]
    cards = [
        card(
            _flat(s["prompt"]),
            [
                (f"policy, reward {s['reward']:.3f}", s["response"]),
                (f"reference, reward {s['reference_reward']:.3f}", s["reference_response"]),
            ],
        )
        for s in order
    ]
    note = "The same random numbers drew both. The largest differences of reward come first."
    if len(samples) > len(order):
        note += f" These are {len(order)} of {len(samples)}; all are in samples.jsonl."
    rows = [
        [cell("win rate"), cell(report.win_rate, ".1%"), cell("")],
        *(
            [
                cell(name),
                cell(getattr(report.policy_side, name), ".3f"),
                cell(getattr(report.reference_side, name), ".3f"),
            ]
            for name in ("reward", "length", "distinct_1", "distinct_2", "ended_share")
        ),
        [cell("KL, nats"), cell(report.kl, ".3f"), cell("0")],
    ]
    page = sections_page(
        "evaluation",
        f"{Path(report.policy).name} against {Path(report.reference).name}",
        report.text().splitlines()[:2],
        [
            Section("Measured", "95 % intervals over prompts.", table(("", "policy", "reference"), rows, "Measured")),
            Section("Samples", note, "".join(cards)),
        ],
    )
    write_atomically(path, page)


def _flat(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
