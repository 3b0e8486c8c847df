"""Where the numbers come from: what is done, missing and failed, on which machine, and how the run differs from the
paper."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from madpo.core.progress import duration
from madpo.report.markup import details, note, nothing, table
from madpo.report.sources import folder_of
from madpo.runner.record import Record

_TIMES = 40  # failures spelled out


def state(records: Mapping[str, Record], unfinished: Mapping[str, str]) -> str:
    """How far the run is, in one sentence; empty where it is complete."""
    if not unfinished:
        return ""
    failed = sum(why.startswith("failed") for why in unfinished.values())
    waiting = len(unfinished) - failed
    parts = [f"{failed} failed"] * bool(failed)
    parts += [f"{waiting} {'is' if waiting == 1 else 'are'} still to run"] * bool(waiting)
    n = len(records)
    return (
        f"This run is not complete: of {n + len(unfinished)} steps {n} {'is' if n == 1 else 'are'} done, "
        f"{' and '.join(parts)}. What follows speaks of the finished ones."
    )


def provenance_html(root: Path, records: Mapping[str, Record], unfinished: Mapping[str, str]) -> str:
    """Steps, versions, machines, hours; what is missing and why."""
    missing = _missing(unfinished)
    if not records:
        return nothing("No step is finished yet.") + missing
    versions = {f"{k} {v}" for record in records.values() for k, v in record.libraries.items()}
    versions |= {f"madpo {record.provenance.get('madpo', '?')}" for record in records.values()}
    machines = Counter(_machine(record) for record in records.values())
    where = "; ".join(f"<bdi>{escape(name)}</bdi> ({n} steps)" for name, n in machines.most_common())
    total = duration(sum(record.seconds for record in records.values()))
    head = ("step", "time", "threads", "on disk", "host", "started", "identity")
    rows = [
        [
            escape(record.name),
            duration(record.seconds),
            str(record.threads),
            _size(folder_of(root, record)),
            escape(str(record.provenance.get("host", ""))),
            escape(str(record.provenance.get("started", ""))),
            f'<code title="{escape(record.identity)}">{escape(record.identity[:8])}</code>',
        ]
        for record in records.values()
    ]
    return (
        f"<p>{len(records)} steps, {total} of work in all. {escape(', '.join(sorted(versions)))}.</p><p>{where}.</p>"
        f"{_by_kind(records)}{missing}{details('Every step', table(head, rows, 'Steps', plain=True))}"
    )


def _machine(record: Record) -> str:
    given = record.provenance
    if not given.get("processor"):
        return f"host {given.get('host', 'unknown')}, hardware not recorded"
    parts = [str(given["processor"]), f"{given.get('cores') or 'unknown'} cores"]
    if isinstance(memory := given.get("memory"), int):
        parts.append(f"{memory / 2**30:.0f} GiB memory")
    if given.get("device") not in (None, "cpu"):
        parts.append(str(given["device"]))
    return ", ".join(parts)


def _by_kind(records: Mapping[str, Record]) -> str:
    seconds: dict[str, float] = {}
    steps: Counter[str] = Counter()
    for record in records.values():
        kind = record.name.split("/")[0].replace("_", " ")
        seconds[kind] = seconds.get(kind, 0.0) + record.seconds
        steps[kind] += 1
    rows = [
        [escape(kind), str(steps[kind]), duration(total)]
        for kind, total in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return table(("kind of step", "steps", "time in all"), rows, "Time by kind of step", plain=True)


def _missing(unfinished: Mapping[str, str]) -> str:
    if not unfinished:
        return ""
    failed = {name: why for name, why in unfinished.items() if why.startswith("failed")}
    parts = []
    if failed:
        rows = [[escape(name), escape(why.removeprefix("failed: "))] for name, why in list(failed.items())[:_TIMES]]
        parts.append(f"<h3>Failed</h3>{table(('step', 'why'), rows, 'Failed steps', plain=True)}")
    waiting = [name for name in unfinished if name not in failed]
    if waiting:
        names = "".join(f"<li>{escape(name)}</li>" for name in waiting)
        parts.append(details(f"{len(waiting)} steps still to run", f"<ul>{names}</ul>"))
    return "".join(parts)


def differences_html(experiment: Mapping[str, Any]) -> str:
    """Settings of the run that are not those of the packaged experiment ``paper``."""
    text = (files("madpo.study") / "experiments" / "paper.toml").read_text(encoding="utf-8")
    theirs = _flat({k: v for k, v in tomllib.loads(text).items() if k not in ("title", "method")})
    own = _flat(experiment)
    rows = [
        [escape(key.replace("_", " ").replace(".", ", ")), escape(str(own[key])), escape(str(value))]
        for key, value in theirs.items()
        if key in own and own[key] != value
    ]
    if not rows:
        return ""
    seeds = own.get("seeds")
    seeds_too = f"This run has the training seeds {seeds}; the paper has one run of each method. " if seeds else ""
    caption = (
        "The settings that the paper fixes, and the author's notebooks where it is silent, stand in the packaged "
        "experiment “paper”. This run differs from it in:"
    )
    return note(seeds_too + caption) + table(("setting", "this run", "paper"), rows, "Differences", plain=True)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(inner) if isinstance(inner, list | tuple) else inner
    return found


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
