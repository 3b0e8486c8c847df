"""From the records of a run to its report: one page, and its tables and figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError, MadpoError, first_line
from madpo.core.storage import storage_errors, write_atomically
from madpo.report.claims import counts, ties
from madpo.report.drawing import save_charts
from madpo.report.own import own_notes
from madpo.report.study import Study
from madpo.report.study_page import study_page
from madpo.report.summary import cautions, idle_parts, trimmed_base, unfinished_run, weights_from
from madpo.report.tables import claim_json, report_markdown_table, results_json, save_tables, study_tables
from madpo.runner.record import Record, run_status


def build_report(
    root: Path,
    records: Mapping[str, Record],
    title: str,
    experiment: dict[str, Any],
    unfinished: Mapping[str, str] | None = None,
    *,
    figures: bool = True,
) -> Path:
    """Write ``report.html``, ``results.json``, ``results.md``, ``selection.json``, ``tables/`` and ``figures/``.

    Args:
        root: the folder of the run; the records' samples, margins and logs are read from their steps' folders.
        records: finished records by step name. The page names what is missing.
        title: of the page.
        experiment: the resolved experiment, which knows the methods that were planned.
        unfinished: step without a record -> "to run", "begun" or "failed: ...".
        figures: whether the page's figures are also written as files.

    Returns:
        The path of the page.

    Raises:
        DataError: a damaged samples or log file, with its row.
        StorageError: the folder cannot be written.
    """
    unfinished = unfinished or {}
    study = Study.of(root, records, experiment)
    tiers = study.tiers
    notes = _notes(study, records)
    state = unfinished_run(records, unfinished)
    summary = [*([state] if state else []), *study.summary, *notes]
    data = {
        **results_json(tiers, title, summary, study.experiment),
        "claims": [claim_json(claim) for claim in study.claims],
    }
    tables = "\n".join(f"## {tier.label}\n\n{report_markdown_table(tier)}" for tier in tiers if tier.rows)
    text = study_page(root, study, records, unfinished, title, notes)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "results.json", json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_atomically(root / "results.md", tables)
        if experiment.get("selection"):
            write_atomically(root / "selection.json", json.dumps(study.selection, indent=1) + "\n")
        tables_of = study_tables(tiers, study.choices, study.claims, study.beta, study.selections)
        save_tables(tables_of, root / "tables")
        if figures:
            save_charts(study.charts, root / "figures")
        write_atomically(root / "report.html", text)
    return root / "report.html"


_OF_OTHERS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError, OSError)


def rebuild_report(root: Path, *, figures: bool = True) -> Path:
    """Write the report of the run in ``root`` again, from what is finished there; see :func:`build_report`."""
    status = run_status(root)
    records = {name: record for name, record in status.steps.items() if record is not None}
    title = str(status.about.get("title", root.name))
    try:
        experiment = {**status.about.get("experiment", {})}
        if rows := status.about.get("rows"):
            experiment["rows"] = rows
        return build_report(root, records, title, experiment, status.unfinished, figures=figures)
    except MadpoError:
        raise
    except _OF_OTHERS as error:  # the folder may be anybody's, and its files hold anything
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; that of a damaged Parquet file has no number
        raise DataError(
            f"{root} holds something that no run of madpo writes ({type(error).__name__}: {first_line(error, 160)}); "
            "delete the folder of the step and run it again"
        ) from error


def _notes(study: Study, records: Mapping[str, Record]) -> list[str]:
    """What a reader of the verdicts must also know."""
    texts = [cautions(study.judged)] if study.judged else []
    texts += trimmed_base(records, str(study.experiment.get("model", "")))
    if any(claim.made for claim in study.claims):
        texts += [*weights_from(study.tiers)[1:], *idle_parts(study.tiers)]
        texts += [counts(study.claims), *ties(study.claims)] if study.paper else []
    return [text for text in [*texts, *own_notes(study.experiment, records)] if text]
