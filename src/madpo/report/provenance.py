"""Where the numbers come from: what is done, missing and failed, on which machine, and how the run differs from the
paper."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from madpo.core.progress import duration, memory_text
from madpo.report.numbers import DASH
from madpo.report.pages import Cell, Table, cell
from madpo.report.sources import folder_of
from madpo.runner.record import Record

FAILURES = 40  # spelled out


def provenance(root: Path, records: Mapping[str, Record], unfinished: Mapping[str, str]) -> dict[str, Any]:
    """Steps, versions, machines, hours; what is missing and why."""
    versions = {f"{k} {v}" for record in records.values() for k, v in record.libraries.items()}
    versions |= {f"madpo {record.provenance.get('madpo', '?')}" for record in records.values()}
    machines = Counter(_machine(record) for record in records.values())
    total = duration(sum(record.seconds for record in records.values()))
    seconds: dict[str, list[float]] = {}
    for record in records.values():
        seconds.setdefault(record.name.split("/")[0].replace("_", " "), []).append(record.seconds)
    kinds = [
        [Cell(kind), cell(str(len(times))), cell(duration(sum(times)))]
        for kind, times in sorted(seconds.items(), key=lambda item: -sum(item[1]))
    ]
    rows = []
    for record in records.values():
        given = [str(record.provenance.get(name, "")) for name in ("host", "started")]
        texts = [duration(record.seconds), str(record.threads), _size(folder_of(root, record)), *given]
        rows.append([Cell(record.name), *map(cell, [*texts, record.identity[:8]])])
    head = ["step", "time", "threads", "on disk", "host", "started", "identity"]
    failed = [
        [Cell(name), cell(why.removeprefix("failed: "))] for name, why in unfinished.items() if why.startswith("failed")
    ]
    steps = f"{len(records)} steps, {total} of work in all. {', '.join(sorted(versions))}." if records else ""
    return {
        "steps": steps,
        "machines": [f"{name} ({n} steps)" for name, n in machines.most_common()],
        "kinds": Table("Time by kind of step", ["kind of step", "steps", "time in all"], kinds, plain=True),
        "every": Table("Steps", head, rows, plain=True),
        "failed": Table("Failed steps", ["step", "why"], failed[:FAILURES], plain=True) if failed else None,
        "waiting": [name for name, why in unfinished.items() if not why.startswith("failed")],
    }


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


def differences(experiment: Mapping[str, Any]) -> tuple[str, Table] | None:
    """Settings of the run that are not those of the packaged experiment ``paper``, and a sentence on its seeds."""
    text = (files("madpo.study") / "experiments" / "paper.toml").read_text(encoding="utf-8")
    theirs = _flat({k: v for k, v in tomllib.loads(text).items() if k not in ("title", "method")})
    own = _flat(experiment)
    rows = [
        [Cell(key.replace("_", " ").replace(".", ", ")), cell(_words(own[key])), cell(_words(value))]
        for key, value in theirs.items()
        if key in own and own[key] != value
    ]
    seeds = (
        f"This run has the training seeds {_words(own['seeds'])}; the paper has one run of each method. "
        if "seeds" in own
        else ""
    )
    return (seeds, Table("Differences", ["setting", "this run", "paper"], rows, plain=True)) if rows else None


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(inner) if isinstance(inner, list | tuple) else inner
    return found


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return DASH
    return memory_text(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
