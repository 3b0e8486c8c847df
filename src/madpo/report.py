"""A run's report: one page that opens from disk, with its tables beside it as JSON, CSV and Markdown.

The page loads nothing from anywhere: styles, scripts and data stand inside, a content security policy allows those
and nothing else, and all text that comes from data is escaped. It says what it has to say without scripts too.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from madpo.figures import WeightParameters, count_weights, line_figure, point_figure, weight_figure
from madpo.progress import duration
from madpo.records import Estimate, Record, run_status
from madpo.results import Row, Tier, collect, folder_of
from madpo.storage import storage_errors, write_atomically
from madpo.summary import (
    COLUMNS,
    DASH,
    headline,
    interval,
    one,
    report_markdown_table,
    results_csv,
    results_json,
    shown_columns,
    write,
)

__all__ = ["build_report", "page", "page_part", "rebuild_report", "report_markdown_table"]

SAMPLES_SHOWN = 200  # prompts per tier on the page; all are in the steps' samples.jsonl
MARGINS_SHOWN = 50_000  # margins per tier on the page; above, evenly spaced quantiles stand for them


def build_report(root: Path, records: Mapping[str, Record], title: str, experiment: dict[str, Any]) -> Path:
    """Write ``report.html``, ``results.json``, ``results.csv`` and ``results.md`` into ``root``.

    Args:
        root: the folder of the run; the records' samples, margins and logs are read from their steps' folders.
        records: finished records by step name. What is missing is left out of the page.
        title: of the page.
        experiment: the resolved experiment, shown as it is.

    Returns:
        The path of the page.

    Raises:
        DataError: a damaged samples or log file, with its row.
        StorageError: the folder cannot be written.
    """
    tiers = collect(root, records)
    data = results_json(tiers, title, experiment)
    tables = "\n".join(f"## {tier.label}\n\n{report_markdown_table(tier)}" for tier in tiers if tier.rows)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "results.json", json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_atomically(root / "results.csv", results_csv(tiers))
        write_atomically(root / "results.md", tables)
        write_atomically(root / "report.html", _html(root, records, tiers, title, experiment))
    return root / "report.html"


def rebuild_report(root: Path) -> Path:
    """Write the report of the run in ``root`` again, from what is finished there."""
    status = run_status(root)
    records = {name: record for name, record in status.steps.items() if record is not None}
    return build_report(root, records, str(status.about.get("title", root.name)), status.about.get("experiment", {}))


def page_part(name: str) -> str:
    """A packaged part of a page: ``page.css``, ``weight.js``, ``page.js``, ``report.html``."""
    return (files("madpo") / "page" / name).read_text(encoding="utf-8")


def page(template: str, scripts: Sequence[str], data: object, **parts: str) -> str:
    """Fill a template: ``{{name}}`` becomes ``parts[name]``, which must be HTML already.

    ``{{style}}``, ``{{scripts}}``, ``{{data}}`` and ``{{policy}}`` are made here. Inserted text is not searched for
    further names, and the policy allows exactly the styles and scripts that stand in the page.
    """
    style, script = page_part("page.css"), "\n".join(page_part(name) for name in scripts)
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    made = {
        "style": f"<style>{style}</style>",
        "scripts": f"<script>{script}</script>",
        "data": f'<script type="application/json" id="data">{_json(data)}</script>',
        "policy": escape(policy),
        **parts,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: made[match[1]], page_part(template))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: object) -> str:
    # "</script>" and "<!--" inside the data must not end or hide the block.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _html(root: Path, records: Mapping[str, Record], tiers: list[Tier], title: str, experiment: dict[str, Any]) -> str:
    data = {
        "weights": {f"weight-{tier.name}": _weight_data(tier) for tier in tiers if len(tier.margins)},
        "samples": {tier.label: _sample_data(tier) for tier in tiers if any(row.samples for row in tier.rows)},
    }
    return page(
        "report.html",
        ["weight.js", "page.js"],
        data,
        title=escape(title),
        summary="".join(f'<p dir="auto">{escape(text)}</p>' for text in headline(tiers)),
        results="".join(_results(tier) for tier in tiers if tier.rows) or _nothing("No evaluation is finished yet."),
        weights="".join(_weights(tier) for tier in tiers if len(tier.margins)) or _nothing("There are no margins."),
        reward_models=_reward_models(tiers),
        training="".join(_curves(tier) for tier in tiers) or _nothing("No training log is there."),
        samples="".join(_static_samples(tier) for tier in tiers[:1]) or _nothing("There are no samples."),
        provenance=_provenance(root, records),
        experiment=escape(json.dumps(experiment, indent=2, ensure_ascii=False, default=str)),
    )


# Results


def _results(tier: Tier) -> str:
    columns = shown_columns(tier)
    head = "".join(f'<th scope="col">{escape(COLUMNS[c][0])}</th>' for c in columns)
    limit = max((max(abs(r.difference.low), abs(r.difference.high)) for r in tier.rows if r.difference), default=1.0)
    body = []
    for row in tier.rows:
        cells = "".join(f"<td>{_cell(getattr(row, c), COLUMNS[c][1], limit)}</td>" for c in columns)
        body.append(f'<tr><th scope="row" dir="auto">{escape(row.name)}{_settings(row)}</th>{cells}</tr>')
    return (
        f'<h3 dir="auto">{escape(tier.label)}</h3>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="Results, {escape(tier.label)}">'
        f'<table><thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f"{_per_seed(tier)}{_frontier(tier)}"
    )


def _settings(row: Row) -> str:
    numbers = {k: v for k, v in row.loss.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    shown = [f"{name.replace('_', ' ')} {value:g}" for name, value in numbers.items()]
    return f"<small>{escape(', '.join(shown))}</small>" if shown else ""


def _cell(value: Estimate | float | None, how: str, limit: float) -> str:
    if not isinstance(value, Estimate):
        return f"<b>{write(value, how)}</b>"
    whisker = _whisker(value, limit) if how == "signed" else ""
    return f"<b>{one(value.mean, how)}</b><small>{interval(value, how)}</small>{whisker}"


def _whisker(value: Estimate, limit: float) -> str:
    x = [60 + 54 * v / (limit or 1.0) for v in (value.low, value.mean, value.high)]
    kind = "above" if value.low > 0 else "below" if value.high < 0 else "open"
    return (
        f'<svg viewBox="0 0 120 14" class="whisker {kind}" aria-hidden="true"><line x1="60" x2="60" y1="0" y2="14" '
        f'class="axis"/><line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="7" y2="7"/>'
        f'<circle cx="{x[1]:.1f}" cy="7" r="3"/></svg>'
    )


def _names(tier: Tier) -> list[str]:
    return [row.name for row in tier.rows]


def _per_seed(tier: Tier) -> str:
    rows = [row for row in tier.rows if len(row.seeds) > 1]
    if not rows:
        return ""
    lines = "".join(
        f"<li><bdi>{escape(row.name)}</bdi>: "
        f"{escape(', '.join(f'{seed} {one(value)}' for seed, value in row.per_seed.items()))}</li>"
        for row in rows
    )
    return f"<details><summary>Mean reward of every training seed</summary><ul>{lines}</ul></details>"


def _frontier(tier: Tier) -> str:
    points = {
        row.name: (row.kl, row.oracle_reward)
        for row in tier.rows
        if isinstance(row.kl, Estimate) and isinstance(row.oracle_reward, Estimate)
    }
    if len(points) < 2:
        return ""
    figure = point_figure(
        points,
        label=f"Reward against KL, {tier.label}",
        x_label="KL to the reference, nats",
        y_label="oracle reward",
        order=_names(tier),
    )
    return (
        f"<figure>{figure}<figcaption>Reward against distance. A method that moves further from the reference usually "
        "earns more; to the left and above is better. Whiskers are 95 % intervals.</figcaption></figure>"
    )


# Margins and weights


def _weighting(tier: Tier) -> tuple[WeightParameters, np.ndarray]:
    """The weight that this run's MADPO used (its first, if there are several), else the paper's; and the training
    margins as it reads them, divided by its ``margin_temperature``."""
    losses = [row.loss for row in tier.rows if {"tau", "c_max"} <= row.loss.keys()]
    given = next((loss for loss in losses if loss.get("kind") == "madpo"), losses[0] if losses else {})
    parameters = WeightParameters(**{name: given[name] for name in WeightParameters._fields if name in given})
    return parameters, tier.margins / float(given.get("margin_temperature", 1.0))


def _weight_data(tier: Tier) -> dict[str, Any]:
    parameters, margins = _weighting(tier)
    margins = np.sort(margins)
    if len(margins) > MARGINS_SHOWN:
        margins = margins[np.linspace(0, len(margins) - 1, MARGINS_SHOWN).round().astype(int)]
    return {"margins": [float(h) for h in margins], "parameters": parameters._asdict()}


def _weights(tier: Tier) -> str:
    parameters, margins = _weighting(tier)
    counts = count_weights(margins, parameters)
    figure = weight_figure(margins, parameters, label=f"Weight curve and margins, {tier.label}")
    n = len(margins)
    settings = f"τ = {parameters.tau:g}, c_max = {parameters.c_max:g}, λ = {parameters.lam:g}"
    few = f" The figure shows {MARGINS_SHOWN} evenly spaced quantiles of them." if n > MARGINS_SHOWN else ""
    text = (
        f"With {settings}, of {n} training pairs {counts.amplified} are amplified, {counts.dampened} dampened, "
        f"{counts.turned_down} turned down since the reward model contradicts their label, and {counts.unchanged} left "
        f"as they are; mean weight {counts.mean:.3f}, effective sample size {counts.effective:.0f}.{few}"
    )
    return (
        f'<h3 dir="auto">{escape(tier.label)}</h3><p>{escape(text)}</p>'
        f'<div class="weight" id="weight-{escape(tier.name)}">{figure}</div>'
    )


def _reward_models(tiers: Iterable[Tier]) -> str:
    names = {
        "heldout_accuracy": ("accuracy on held-out pairs", "share"),
        "heldout_log_loss": ("log-loss, nats", "number"),
        "temperature": ("fitted temperature", "number"),
        "calibrated_log_loss": ("log-loss after calibration", "number"),
    }
    models = [
        (f"{tier.label} {seed}".strip(), model.metrics) for tier in tiers for seed, model in tier.reward_models.items()
    ]
    shown = [key for key in names if any(key in metrics for _, metrics in models)]
    if not shown:
        return _nothing("No reward model is finished yet.")
    head = "".join(f'<th scope="col">{names[key][0]}</th>' for key in shown)
    body = "".join(
        f'<tr><th scope="row" dir="auto">{escape(name)}</th>'
        + "".join(f"<td>{_metric(metrics.get(key), names[key][1])}</td>" for key in shown)
        + "</tr>"
        for name, metrics in models
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Reward models"><table><thead><tr>'
        f'<th scope="col">tier</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _metric(value: object, how: str) -> str:
    if isinstance(value, Estimate):
        return _cell(value, how, 1.0)
    return f"<b>{one(float(value), how)}</b>" if isinstance(value, int | float) else f"<b>{DASH}</b>"


def _curves(tier: Tier) -> str:
    figures = []
    for column, name in (("loss", "training loss"), ("rewards/margins", "implicit reward margin β·h, nats")):
        series = {
            method: [(row["step"], row[column]) for row in log if column in row and np.isfinite(row[column])]
            for method, log in tier.curves.items()
        }
        series = {method: line for method, line in series.items() if line}
        if series:
            label = f"{name}, {tier.label}"
            figure = line_figure(series, label=label, x_label="step", y_label=name, order=_names(tier))
            figures.append(f'<figure class="lines">{figure}</figure>')
    return f'<h3 dir="auto">{escape(tier.label)}</h3>{"".join(figures)}' if figures else ""


# Samples


def _sample_data(tier: Tier) -> dict[str, Any]:
    """Per prompt the first seed's response of every method, joined on prompt_id."""
    methods = [row for row in tier.rows if row.samples and row.samples[0]]
    shared = sorted(set.intersection(*(set(row.samples[0]) for row in methods))) if methods else []
    prompts = []
    for i in shared[:SAMPLES_SHOWN]:
        of_prompt = [row.samples[0][i] for row in methods]
        prompts.append(
            {
                "id": i,
                "prompt": str(of_prompt[0].get("prompt", "")),
                "responses": [str(sample.get("response", "")) for sample in of_prompt],
                "rewards": [round(float(sample["oracle_reward"]), 3) for sample in of_prompt],
            }
        )
    return {
        "methods": [row.name for row in methods],
        "baseline": _position(methods),
        "prompts": prompts,
        "of": len(shared),
    }


def _position(methods: Sequence[Row]) -> list[int]:
    """Which two methods face each other at first: MADPO and DPO where both are there."""
    kinds = [row.loss.get("kind", row.key) for row in methods]
    last = len(kinds) - 1
    first = kinds.index("madpo") if "madpo" in kinds else last
    second = kinds.index("dpo") if "dpo" in kinds else 0
    return [first, second if second != first else (0 if first else last)]


def _static_samples(tier: Tier) -> str:
    data = _sample_data(tier)
    cards = []
    for prompt in data["prompts"][:3]:
        answers = "".join(
            f'<div class="answer"><h4 dir="auto">{escape(name)} <span>{one(reward)}</span></h4>'
            f'<p dir="auto">{escape(response)}</p></div>'
            for name, response, reward in zip(data["methods"], prompt["responses"], prompt["rewards"], strict=True)
        )
        cards.append(
            f'<article class="card"><p class="prompt" dir="auto">{escape(prompt["prompt"])}</p>{answers}</article>'
        )
    return "".join(cards)


# Provenance


def _provenance(root: Path, records: Mapping[str, Record]) -> str:
    if not records:
        return _nothing("No step is finished yet.")
    rows = "".join(
        f'<tr><th scope="row">{escape(record.name)}</th><td>{duration(record.seconds)}</td><td>{record.threads}</td>'
        f"<td>{_size(folder_of(root, record))}</td><td>{escape(str(record.provenance.get('host', '')))}</td>"
        f"<td>{escape(str(record.provenance.get('started', '')))}</td>"
        f'<td><code title="{escape(record.identity)}">{escape(record.identity[:8])}</code></td></tr>'
        for record in records.values()
    )
    versions = {f"{k} {v}" for record in records.values() for k, v in record.libraries.items()}
    versions |= {f"madpo {record.provenance.get('madpo', '?')}" for record in records.values()}
    total = duration(sum(record.seconds for record in records.values()))
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("step", "time", "threads", "on disk", "host", "started", "identity")
    )
    return (
        f"<p>{len(records)} steps, {total} of work in all. {escape(', '.join(sorted(versions)))}.</p>"
        '<div class="scroll" role="region" tabindex="0" aria-label="Steps"><table class="plain"><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _nothing(text: str) -> str:
    return f'<p class="nothing">{escape(text)}</p>'
