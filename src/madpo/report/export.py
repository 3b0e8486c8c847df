"""A run as a few files that can be committed or sent, and that ``madpo report`` and ``madpo run`` still read.

``run.json`` and ``records.json`` hold what was run; three tables hold what the report draws of it: samples (their
numbers, and the texts of a few prompts), training curves and margins. So the page next to them is made from them, and
can be made again. Weights, vocabularies and most texts are left out, and so are names of hosts and places on their
disks. The same run gives the same bytes, whatever its folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from madpo.core.errors import DataError, StorageError
from madpo.core.progress import say
from madpo.core.storage import expanded, stays_inside, storage_errors, write_atomically
from madpo.report.build import rebuild_report
from madpo.report.pages import markdown
from madpo.report.sources import HELDOUT, MARGINS, MEASURES, SAMPLES, Sources
from madpo.report.tables import markdown_cell
from madpo.runner.record import EXPORTED, RECORD, RECORDS, Record, RunStatus, run_status

TEXTS = 12  # prompts that keep the texts of their samples
LIMIT = 16_000_000  # bytes of the folder
FILE_LIMIT = 4_000_000  # bytes of one file in it
LOGGED = ("step", "loss", "eval_loss", "rewards/margins")  # what training curves are drawn from
KINDS = {
    **dict.fromkeys(("folder", "prompt", "response"), pa.string()),
    **dict.fromkeys(("prompt_id", "sample", "text", "pair_id"), pa.int64()),
    "train": pa.bool_(),
}
"""Types of the columns of the tables; all others are numbers."""
NEXT_TO_PAGE = ("results.json", "results.md", "selection.json")  # what a report writes and an export leaves out
TABLES = ("samples.parquet", "curves.parquet", "margins.parquet")
READ = (RECORD, "error.txt", "samples.jsonl", "log.jsonl", "margins.parquet", "pairs.parquet")  # of a step's folder
OWN = ("run.json", RECORDS, *TABLES, "README.md", "report.html", "tables", "figures", *NEXT_TO_PAGE)
"""What an export holds, and what a report made in it adds."""


def export_report(root: Path, target: Path) -> Path:
    """Write the report of the run in ``root``, and what it is made from, into a small folder of its own.

    Args:
        root: the folder of a run, finished or not, or of an earlier export.
        target: where to; an earlier export there is replaced as a whole.

    Returns:
        The path of the page.

    Raises:
        ConfigError: ``root`` holds no run.
        StorageError: ``target`` holds something else, or cannot be written.
        DataError: a damaged file, or more than ``LIMIT`` bytes.
    """
    root, target = expanded(root).absolute(), expanded(target).absolute()
    _refuse_link(root / "run.json", root)
    status = run_status(root)
    _refuse(root, target)
    with storage_errors(target), _replacing(target) as staging:
        _write_run(root, staging, status)
        _write_tables(root, staging, {name: record for name, record in status.steps.items() if record is not None})
        rebuild_report(staging)
        (staging / "README.md").write_text(_readme(staging), encoding="utf-8")
        for path in (*(staging / name for name in NEXT_TO_PAGE), *(staging / "tables").glob("*")):
            if path.suffix != ".csv":
                path.unlink(missing_ok=True)
        size = _check_size(staging)
    say(f"{target}: {size / 1e6:.1f} MB in all; the texts of at most {TEXTS} prompts a tier, and no weights.")
    return target / "report.html"


def _refuse_link(path: Path, root: Path) -> None:
    """Refuse to carry into an export, which others will read, a file from outside the run."""
    if not stays_inside(path, root):
        raise StorageError(
            f"{path} leads out of the run's folder by a link; copy there what it points to, or remove it"
        )


def _refuse(root: Path, target: Path) -> None:
    if target == root or root in target.parents or target in root.parents:
        raise StorageError(f"{target} and the run's folder {root} lie in each other; choose another folder")
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file, not a folder; choose another folder")
    if target.is_dir() and any(target.iterdir()):
        if not _is_export(target):
            raise StorageError(f"{target} is not empty and holds no earlier export; choose another folder")
        if others := sorted(entry.name for entry in target.iterdir() if entry.name not in OWN):
            raise StorageError(
                f"{target} holds {others[0]} and an earlier export, which is replaced as a whole; move it away, or "
                "choose another folder"
            )


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / "run.json").read_bytes())["about"][EXPORTED] is not None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder next to ``target``, which takes its place if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same names each time: what a killed export left is removed by the next.
    staging, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for left in (staging, old):
        ours = not left.is_symlink() and left.is_dir() and (not any(left.iterdir()) or _is_export(left))
        if not ours and os.path.lexists(left):
            raise StorageError(f"{left} is in the way and holds no export of madpo; move it away")
    _clear(target, staging, old)
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            os.replace(target, old)
        os.replace(staging, target)
    finally:
        _clear(target, staging, old)


def _clear(target: Path, staging: Path, old: Path) -> None:
    """Remove what an export leaves next to its target, and put back what a kill between two renames moved away."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    for folder in (staging, old):
        if folder.exists():
            # The listing goes last: by it what a kill leaves is known as ours.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "run.json"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            folder.rmdir()


def _write_run(root: Path, staging: Path, status: RunStatus) -> None:
    """``run.json``, with what went wrong in steps that failed, and ``records.json``; a line per step."""
    listing = json.loads((root / "run.json").read_bytes())
    about = {**listing["about"], EXPORTED: {"texts": TEXTS}}
    steps: dict[str, Any] = {}
    records: dict[str, Any] = {}
    hosts: dict[str, str] = {}
    for file in (RECORDS, *TABLES):
        _refuse_link(root / file, root)
    for name, record in status.steps.items():
        for file in READ:
            _refuse_link(root / listing["steps"][name]["folder"] / file, root)
        steps[name] = {key: value for key, value in listing["steps"][name].items() if key != "failed"}
        if record is not None:
            given = {key: value for key, value in record.provenance.items() if key not in ("argv", "files")}
            if host := given.get("host"):
                host = str(host)
                given["host"] = hosts.setdefault(host, host if host.startswith("host ") else f"host {len(hosts) + 1}")
            text = record.model_copy(update={"provenance": {**given, EXPORTED: True}}).model_dump_json()
            records[steps[name]["folder"]] = json.loads(text)
        elif (why := status.unfinished[name]).startswith("failed: "):
            failed = why.removeprefix("failed: ")
            for folder, short in ((str(root), "."), (os.path.expanduser("~"), "~")):
                failed = failed.replace(folder, short) if len(folder) > 1 else failed
            steps[name]["failed"] = failed
    run = f'{{"about": {_dumps(about)},\n"steps": {_lines(steps)}}}\n'
    write_atomically(staging / "run.json", run)
    (staging / RECORDS).write_text(_lines(records) + "\n", encoding="utf-8")


def _lines(entries: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"\n{_dumps(name)}: {_dumps(entry)}" for name, entry in entries.items()) + "\n}"


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_tables(root: Path, staging: Path, records: Mapping[str, Record]) -> None:
    sources = Sources(root)
    tables: dict[str, list[pd.DataFrame]] = {"samples": [], "curves": [], "margins": []}
    for name, record in records.items():
        kind = name.split("/")[0]
        found = {
            "samples": sources.samples([record]) if name.startswith(MEASURES) else pd.DataFrame(),
            "curves": sources.log(record),
            "margins": sources.margins(record, records) if kind in ("margins", "reward_model") else pd.DataFrame(),
        }
        if len(samples := found["samples"]):  # the numbers of all, the texts of the first prompts
            first = samples["prompt_id"].isin(sorted(samples["prompt_id"].unique())[:TEXTS])
            texts = samples[["prompt", "response"]].where(first & samples["temperature"].isna(), None)
            found["samples"] = samples.assign(prompt=texts["prompt"], response=texts["response"])
        logged = found["curves"][[name for name in LOGGED if name in found["curves"]]]
        found["curves"] = logged.dropna(how="all", subset=[name for name in logged if name != "step"])
        for table, frame in found.items():
            if len(frame):
                tables[table].append(frame.assign(folder=f"{record.name}-{record.identity[:8]}"))
    columns = {"samples": (*SAMPLES, *HELDOUT), "curves": LOGGED, "margins": MARGINS}
    for table, frames in tables.items():
        if frames:
            names = ["folder", *columns[table]]
            whole = pd.concat(frames, ignore_index=True).reindex(columns=names)
            if table == "samples":
                names = [n for n in names if n not in ("temperature", *HELDOUT) or whole[n].notna().any()]
            if table == "margins" and (whole["prompt_id"] == whole["pair_id"]).all():
                names.remove("prompt_id")
            schema = pa.schema([(name, KINDS.get(name, pa.float64())) for name in names])
            written = pa.Table.from_pandas(whole, schema=schema, preserve_index=False).replace_schema_metadata(None)
            pq.write_table(written, staging / f"{table}.parquet", compression="zstd")


def _check_size(staging: Path) -> int:
    sizes = {path: path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=lambda path: sizes[path])
    if total > LIMIT or sizes[largest] > FILE_LIMIT:
        raise DataError(
            f"the export would take {total / 1e6:.1f} MB (limit {LIMIT / 1e6:g}), its largest file "
            f"{largest.relative_to(staging)} {sizes[largest] / 1e6:.1f} MB (limit {FILE_LIMIT / 1e6:g}); nothing was "
            "written. Export a run of fewer rows or prompts, or commit only its tables/ and figures/"
        )
    return total


def _readme(staging: Path) -> str:
    data = json.loads((staging / "results.json").read_bytes())
    figure = (staging / "figures" / "figure1_main.svg").exists()
    results = (staging / "results.md").read_text(encoding="utf-8")
    return markdown("export.md", **data, figure=figure, results=results, cell=markdown_cell)
