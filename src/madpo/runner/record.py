"""What a finished step leaves behind: metrics, where they come from, and how to read them back."""

import os
import platform
import sys
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_serializer

from madpo.core.errors import ConfigError
from madpo.core.locks import holder
from madpo.core.metrics import Estimate, Metric
from madpo.core.progress import say

LIBRARIES = ("torch", "transformers", "trl", "peft")
ALSO_INSTALLED = ("accelerate", "datasets", "numpy", "pandas", "safetensors", "scikit-learn", "scipy", "tokenizers")
"""Libraries that last digits may depend on; their versions are recorded and are no part of an identity."""
NAME = r"^[A-Za-z0-9_.+=-]+(/[A-Za-z0-9_.+=-]+)*$"
"""Names of steps, which are paths inside the run's folder; "." and ".." are refused as well."""
RECORD = "record.json"
"""The file that makes a result exist."""
RECORDS = "records.json"
"""Records of an export by the folders of their steps, which are left out of it."""
EXPORTED = "exported"  # of a run's ``about`` and of a record's ``provenance``: most files stayed behind


def _inside(name: str) -> str:
    if {".", ".."} & set(name.split("/")):
        raise ValueError("the name of a step lies inside its run's folder")
    return name


StepName = Annotated[str, Field(pattern=NAME), AfterValidator(_inside)]


class Record(BaseModel):
    """What a finished step leaves behind. Equal identity and threads give equal records outside ``provenance``, on
    processors with one instruction set and with equal versions of the libraries listed there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StepName
    identity: str = Field(pattern="^[0-9a-f]{64}$")
    operation: str
    config: dict[str, Any]
    inputs: dict[str, str]
    metrics: dict[str, Metric]
    libraries: dict[str, str]
    threads: int
    provenance: dict[str, Any]

    @field_serializer("metrics")
    def _readable(self, metrics: dict[str, Metric]) -> dict[str, Any]:
        return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in metrics.items()}

    @property
    def stripped(self) -> bool:
        """The record lies in an export, without most of the files that the step wrote."""
        return self.provenance.get(EXPORTED) is True

    @property
    def files(self) -> dict[str, str] | None:
        """Relative path -> SHA-256 of every file of the result; None in records of before these were listed."""
        found = self.provenance.get("files")
        return dict(found) if isinstance(found, dict) else None

    @property
    def seconds(self) -> float:
        """Wall time of the step's function."""
        seconds = self.provenance.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else 0.0


def libraries() -> dict[str, str]:
    """Versions that enter the identity. The build after "+" (cpu, cu128) is a matter of where it runs."""
    return {name: (installed(name) or "absent").split("+")[0] for name in LIBRARIES}


@cache
def installed(name: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def conditions() -> dict[str, Any]:
    """What the bytes of a result depend on, with its identity and the threads; for ``provenance``.

    ``instruction_set`` is what torch's kernels use ("AVX512"), and None where nothing has loaded torch.
    """
    torch = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_initialized() else None
    return {
        "instruction_set": None if torch is None else torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        **_hardware(),
        "device": device or "cpu",
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in ALSO_INSTALLED}},
    }


@cache
def _hardware() -> dict[str, Any]:
    """Processor, its cores, and memory in bytes; None for what the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        name = None
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    return {"processor": name or platform.processor() or None, "cores": os.cpu_count(), "memory": memory}


def load_record(folder: Path) -> Record | None:
    """The record in ``folder``; None if there is none that can be read."""
    try:
        return Record.model_validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, OSError):
        say(f"{folder / RECORD} is damaged and counts as missing.")
        return None


def exported_records(root: Path) -> dict[str, Record]:
    """Folder in ``root`` -> record of a step whose folder an export leaves out; empty where ``root`` is no export."""
    path = root / RECORDS
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _records_in(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _records_in(path: Path, changed: int, size: int) -> dict[str, Record]:
    try:
        return TypeAdapter(dict[str, Record]).validate_json(path.read_bytes())
    except (ValidationError, OSError):
        say(f"{path} is damaged, and its records count as missing.")
        return {}


def find_record(folder: Path, root: Path) -> Record | None:
    """The record of a step in ``folder``, also where ``root`` is an export; None if there is none that can be read."""
    return load_record(folder) or exported_records(root).get(folder.relative_to(root).as_posix())


class RunStatus(NamedTuple):
    """How far a run has come.

    Attributes:
        about: what the run was started with (title, experiment).
        steps: every step of the run with its record, None while it has none.
        unfinished: step without a record -> "to run", "begun" or "failed: ...".
        holder: the process that holds the folder, if one does.
    """

    about: dict[str, Any]
    steps: dict[str, Record | None]
    unfinished: dict[str, str]
    holder: str | None


def run_status(root: Path) -> RunStatus:
    """Read a run's folder without its experiment. Raises ConfigError: the folder holds no run."""
    try:
        listing = _Listing.model_validate_json((root / "run.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{root} holds no run (no run.json); give the --output_dir of madpo run or madpo compare"
        ) from None
    except (OSError, ValueError):
        raise ConfigError(f"{root / 'run.json'} is damaged; the same madpo run command writes it again") from None
    steps: dict[str, Record | None] = {}
    unfinished = {}
    for name, entry in listing.steps.items():
        folder = root / entry.folder
        record = find_record(folder, root)
        steps[name] = record if record is not None and record.identity == entry.identity else None
        if steps[name] is None:
            try:
                lines = (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                unfinished[name] = f"failed: {lines[-1] if lines else 'no message'}"
            except (FileNotFoundError, NotADirectoryError):
                failed = f"failed: {entry.failed}" if entry.failed else "to run"
                unfinished[name] = "begun" if folder.is_dir() else failed
    return RunStatus(listing.about, steps, unfinished, holder(root))


def evaluations_by(root: Path, key: str) -> list[tuple[str, str, Record]]:
    """Finished evaluations in a run's folder, of whichever settings, with the value that ``key`` had in each.

    One folder holds the results of several values of a setting, although ``run.json`` lists only the last.

    Args:
        key: as in ``--set``; its first part names the kind of step ("policy.optimisation.learning_rate").

    Returns:
        (value, or "" where the setting does not bear on the evaluation; name of the step; record), by value and name.

    Raises ConfigError: no evaluation is finished, or the setting bears on none of them.
    """
    records = [found for path in sorted(root.rglob(f"*-*/{RECORD}")) if (found := load_record(path.parent)) is not None]
    by_identity = {record.identity: record for record in [*exported_records(root).values(), *records]}
    evaluations = [record for record in by_identity.values() if record.name.startswith("evaluation/")]
    rows = [(_setting(record, key, by_identity), record.name, record) for record in evaluations]
    if not any(value is not None for value, _, _ in rows):
        why = f"{key} bears on none of its {len(rows)} finished evaluations" if rows else "no evaluation is finished"
        raise ConfigError(f"{root}: {why}; a key is that of --set, such as policy.optimisation.learning_rate")
    rows.sort(key=lambda row: (row[0] is not None, row[0] if isinstance(row[0], int | float) else 0, str(row[:2])))
    return [("" if value is None else str(value), name, record) for value, name, record in rows]


def _setting(record: Record, key: str, by_identity: dict[str, Record]) -> Any:
    """The setting in the record or in what it was made from; None where it is in neither."""
    kind, _, rest = key.partition(".")
    if record.name.split("/")[0] == kind:
        value: Any = record.config
        for part in rest.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    for identity in record.inputs.values():
        upstream = by_identity.get(identity)
        if upstream is not None and (found := _setting(upstream, key, by_identity)) is not None:
            return found
    return None


class _Entry(BaseModel):
    folder: StepName
    identity: str
    failed: str = ""
    """What went wrong, in an export."""


class _Listing(BaseModel):
    """``run.json``: what a run is, and its steps' folders, which lie inside its own."""

    about: dict[str, Any]
    steps: dict[str, _Entry]
