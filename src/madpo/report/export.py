"""A run as a small folder that can be committed or sent, and that ``madpo report`` still reads.

The folder has the layout of a run: ``run.json``, and per step its record and what the report draws of it. Weights,
vocabularies and responses stay behind; of the samples their numbers come along, and the texts of a few prompts. So the
page that stands in it is made from it, and can be made again. Names of hosts and places on their disks stay behind
too. The same run gives the same bytes wherever it lies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from madpo.core.errors import DataError, StorageError
from madpo.core.progress import say
from madpo.core.storage import expanded, stays_inside, storage_errors, write_atomically
from madpo.report.build import rebuild_report
from madpo.report.sources import RESPONSE_DIGEST, response_digest
from madpo.report.tables import markdown_cell
from madpo.runner.record import EXPORTED, RECORD, RunStatus, run_status

TEXTS = 12  # prompts whose samples keep their texts
LIMIT = 16_000_000  # bytes of the folder
FILE_LIMIT = 4_000_000  # bytes of one file in it
OWN = (
    *("run.json", "README.md", "report.html", "results.json", "results.md", "selection.json"),
    *("tables", "figures"),
)
"""What an export holds beside the folders of its steps."""
LOGGED = ("step", "loss", "eval_loss", "rewards/margins")  # what training curves are drawn from


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
    with storage_errors(target), _replacing(target) as place:
        _copy(root, place, status)
        rebuild_report(place)
        (place / "README.md").write_text(_readme(place), encoding="utf-8")
        size = _check_size(place)
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
        known = _names(target)
        if known is None:
            raise StorageError(f"{target} is not empty and holds no earlier export; choose another folder")
        if others := sorted(entry.name for entry in target.iterdir() if entry.name not in known):
            raise StorageError(
                f"{target} holds {others[0]} beside an earlier export, which is replaced as a whole; move it away, or "
                "choose another folder"
            )


def _names(folder: Path) -> set[str] | None:
    """Names of what the export in a folder holds; None where there is no export."""
    try:
        earlier = json.loads((folder / "run.json").read_bytes())
        if earlier["about"][EXPORTED] is None:
            return None
        return {*OWN, *(Path(step["folder"]).parts[0] for step in earlier["steps"].values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, which takes its place if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same names each time: what a killed export left is removed by the next.
    place, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for left in (place, old):
        ours = not left.is_symlink() and left.is_dir() and (not any(left.iterdir()) or _names(left) is not None)
        if not ours and os.path.lexists(left):
            raise StorageError(f"{left} is in the way and holds no export of madpo; move it away")
    _clear(target, place, old)
    place.mkdir()
    try:
        yield place
        if target.exists():
            os.replace(target, old)
        os.replace(place, target)
    finally:
        _clear(target, place, old)


def _clear(target: Path, place: Path, old: Path) -> None:
    """Remove what an export leaves beside its target, which gets back what it was if it stopped between two renames."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    for folder in (place, old):
        if folder.exists():
            # The listing goes last: by it what a kill leaves is known as ours.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "run.json"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            folder.rmdir()


def _copy(root: Path, place: Path, status: RunStatus) -> None:
    listing = json.loads((root / "run.json").read_bytes())
    listing["about"][EXPORTED] = {"texts": TEXTS}
    write_atomically(place / "run.json", json.dumps(listing, indent=1, ensure_ascii=False) + "\n")
    hosts: dict[str, str] = {}
    for name, record in status.steps.items():
        folder = listing["steps"][name]["folder"]
        source, own = root / folder, place / folder
        for file in (RECORD, "error.txt", *KEPT):
            _refuse_link(source / file, root)
        if record is None:
            if (why := status.unfinished[name]).startswith("failed: "):
                own.mkdir(parents=True)
                (own / "error.txt").write_text(_placeless(why.removeprefix("failed: "), root) + "\n", encoding="utf-8")
            continue
        own.mkdir(parents=True)
        given = {key: value for key, value in record.provenance.items() if key not in ("argv", "files")} | {
            EXPORTED: True
        }
        if host := given.get("host"):
            given["host"] = hosts.setdefault(str(host), _host(str(host), len(hosts)))
        text = record.model_copy(update={"provenance": given}).model_dump_json(indent=1)
        (own / "record.json").write_text(text + "\n", encoding="utf-8")
        for file, keep in KEPT.items():
            if (source / file).is_file():
                keep(source / file, own / file)


def _host(name: str, number: int) -> str:
    return name if name.startswith("host ") else f"host {number + 1}"


def _placeless(text: str, root: Path) -> str:
    for place, short in ((str(root), "."), (str(Path.home()), "~")):
        text = text.replace(place, short) if len(place) > 1 else text
    return text


def _samples(source: Path, target: Path) -> None:
    """The numbers of all samples, the texts of the first prompts."""
    rows = [row for _, row in _rows(source)]
    try:
        shown = set(sorted({int(row["prompt_id"]) for row in rows})[:TEXTS])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: prompt_id must be there; delete the step's folder and run again") from error
    lines = []
    for row in rows:
        if int(row["prompt_id"]) not in shown:
            digest = {RESPONSE_DIGEST: response_digest(row)} if "response" in row else {}
            row = {key: value for key, value in row.items() if not isinstance(value, str | list | dict)} | {
                **({RESPONSE_DIGEST: row[RESPONSE_DIGEST]} if RESPONSE_DIGEST in row else {}),
                **digest,
            }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    target.write_text("".join(lines), encoding="utf-8")


def _log(source: Path, target: Path) -> None:
    rows = ({key: row[key] for key in LOGGED if key in row} for _, row in _rows(source))
    target.write_text("".join(json.dumps(row) + "\n" for row in rows if len(row) > 1), encoding="utf-8")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
            except ValueError as error:
                raise DataError(f"{path} row {number}: {error}; delete the step's folder and run again") from None
            yield number, row


def _columns(*names: str) -> Callable[[Path, Path], None]:
    def keep(source: Path, target: Path) -> None:
        try:
            table = pq.read_table(source)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{source} is damaged; delete the step's folder and run again") from error
        found = [name for name in names if name in table.column_names]
        if found:
            pq.write_table(table.select(found).replace_schema_metadata(None), target)

    return keep


KEPT: Mapping[str, Callable[[Path, Path], None]] = {
    "samples.jsonl": _samples,
    "log.jsonl": _log,
    "margins.parquet": _columns("pair_id", "reward_margin"),
    "pairs.parquet": _columns("pair_id", "split"),
}


def _check_size(place: Path) -> int:
    sizes = {path: path.stat().st_size for path in sorted(place.rglob("*")) if path.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=lambda path: sizes[path])
    if total > LIMIT or sizes[largest] > FILE_LIMIT:
        raise DataError(
            f"the export would take {total / 1e6:.1f} MB (limit {LIMIT / 1e6:g}), its largest file "
            f"{largest.relative_to(place)} {sizes[largest] / 1e6:.1f} MB (limit {FILE_LIMIT / 1e6:g}); nothing was "
            "written. Export a run of fewer rows or prompts, or commit its tables/ and figures/ alone"
        )
    return total


def _readme(place: Path) -> str:
    data = json.loads((place / "results.json").read_bytes())
    lines = [f"# {markdown_cell(data['title'])}", ""]
    for text in data["summary"]:
        lines += [markdown_cell(text), ""]
    if (place / "figures" / "figure1_main.svg").exists():
        lines += ["![Mean oracle reward of every method in every tier](figures/figure1_main.svg)", ""]
    lines += [(place / "results.md").read_text(encoding="utf-8")]
    lines += ["## Claims", "", "| section | claim | verdict |", "| --- | --- | --- |"]
    columns = ("section", "text", "shown")
    lines += ["| " + " | ".join(markdown_cell(claim[key]) for key in columns) + " |" for claim in data["claims"]]
    lines += [
        "",
        "What goes beyond the paper is not among the paper's claims that are counted above.",
        "",
        "`report.html` is the whole report, `tables/` and `figures/` are its parts, and `madpo report` makes it again "
        "from the records here. Weights and most texts are left out.",
    ]
    return "\n".join(lines) + "\n"
