"""What the steps of a run left behind, as tables: samples, logs and margins.

They are read from the steps' folders, or from the tables of an export (``samples.parquet`` and so on), in which the
column ``folder`` names the step's folder.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from madpo.core.errors import DataError
from madpo.runner.record import Record

MEASURES = ("evaluation/", "heldout/")  # steps that leave samples
SAMPLES = ("prompt_id", "sample", "reward", "kl", "tokens", "text", "prompt", "response", "temperature")
HELDOUT = ("right", "log_loss")  # of a held-out pair
NULLABLE = {"text": "Int64", "train": "boolean"}
MARGINS = ("pair_id", "reward_margin", "train", "prompt_id")
TEXTS = 200  # prompts of an evaluation that keep their first response as text
AGAIN = "delete the step's folder and run again"


def folder_of(root: Path, record: Record) -> Path:
    """Where a record's step worked."""
    return root / f"{record.name}-{record.identity[:8]}"


class Sources:
    """The files of a run's steps.

    Every method raises DataError for a damaged file, with its row.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._table = cache(lambda name: _parquet(path) if (path := root / f"{name}.parquet").exists() else None)

    def samples(self, records: Iterable[Record]) -> pd.DataFrame:
        """One line per response: the step's name as ``step``, and the columns ``SAMPLES``.

        ``reward`` is the oracle's; ``kl`` is summed nats; ``text`` numbers the different texts of one evaluation, NA
        where the text is not known; ``prompt`` and ``response`` are kept of the first samples of some prompts;
        ``temperature`` is that of a response at a further temperature, NaN for the others. ``HELDOUT`` are those of a
        line that is a held-out pair and no response.
        """
        frames = []
        for record in records:
            path = folder_of(self.root, record) / "samples.jsonl"
            frame = _evaluation(path, record) if path.exists() else self._kept("samples", record)
            if frame is not None:
                frames.append(frame.reindex(columns=[*SAMPLES, *HELDOUT]).assign(step=record.name))
        columns = {"step": object} | {
            name: object if name in ("prompt", "response") else float for name in (*SAMPLES, *HELDOUT)
        }
        empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})
        return pd.concat(frames, ignore_index=True) if frames else empty

    def log(self, record: Record) -> pd.DataFrame:
        """The numbers that a training logged, one line per entry; without columns where there is no log."""
        path = folder_of(self.root, record) / "log.jsonl"
        if not path.exists():
            kept = self._kept("curves", record)
            return pd.DataFrame() if kept is None else kept.dropna(axis=1, how="all").reset_index(drop=True)
        rows = json_lines(path, "step")
        return pd.DataFrame([{k: float(v) for k, v in row.items() if isinstance(v, int | float)} for row in rows])

    def margins(self, record: Record, records: Mapping[str, Record]) -> pd.DataFrame:
        """The reward margins that a step wrote: ``pair_id``, ``reward_margin`` (chosen minus rejected); ``train``,
        which is NA where nothing says which pairs are for training; and ``prompt_id``, which is that of the pair where
        a prompt has one pair.

        Args:
            record: of the step.
            records: all finished records.
        """
        path = folder_of(self.root, record) / "margins.parquet"
        if not path.exists():
            kept = self._kept("margins", record)
            if kept is None:
                return pd.DataFrame({name: [] for name in MARGINS})
            return kept if "prompt_id" in kept else kept.assign(prompt_id=kept["pair_id"])
        table = _parquet(path)
        table["train"], table["prompt_id"] = pd.NA, table["pair_id"]
        above = (other for other in records.values() if other.identity in record.inputs.values())
        places = (folder_of(self.root, other) / "pairs.parquet" for other in above)
        if read := next((place for place in places if place.exists()), None):
            pairs = _parquet(read, ("pair_id", "split", "prompt_id"))
            table["train"] = table["pair_id"].isin(pairs.loc[pairs["split"] == "train", "pair_id"])
            if "prompt_id" in pairs:
                table["prompt_id"] = table["pair_id"].map(pairs.set_index("pair_id")["prompt_id"])
        return table[[*MARGINS]].astype({"train": NULLABLE["train"]})

    def _kept(self, name: str, record: Record) -> pd.DataFrame | None:
        table = self._table(name)
        if table is None:
            return None
        own = table[table["folder"] == str(folder_of(Path(), record))]
        kinds = {column: kind for column, kind in NULLABLE.items() if column in own}
        return own.drop(columns="folder").astype(kinds) if len(own) else None


def _parquet(path: Path, columns: Container[str] | None = None) -> pd.DataFrame:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            table: pd.DataFrame = file.read(names).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); {AGAIN}") from error
    return table


def _evaluation(path: Path, record: Record) -> pd.DataFrame:
    rows = json_lines(path, "prompt_id", "log_loss" if record.name.startswith("heldout/") else "oracle_reward")
    same = ("prompt_id", "sample", "kl", "tokens", "temperature", *HELDOUT)
    numbers = {"reward": "oracle_reward"} | {name: name for name in same}
    frame = pd.DataFrame({name: [row.get(column) for row in rows] for name, column in numbers.items()})
    frame["sample"] = frame["sample"].fillna(0)
    for name in numbers:
        values = pd.to_numeric(frame[name], errors="coerce").astype(float)
        wrong = frame[name].notna() & ~np.isfinite(values)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(f"{path} row {row + 1}: {numbers[name]} is {frame[name][row]!r}, not a number; {AGAIN}")
        frame[name] = values
    frame = frame.astype({"prompt_id": np.int64, "sample": np.int64})
    for name in ("prompt", "response"):
        frame[name] = pd.Series([row.get(name) for row in rows], dtype=object)
    codes, _ = pd.factorize(frame["response"])
    frame["text"] = pd.Series(codes, dtype=NULLABLE["text"]).mask(codes < 0)
    frame = frame.sort_values(["prompt_id", "sample"], kind="stable", ignore_index=True)
    first = frame[frame["response"].notna() & frame["temperature"].isna()].drop_duplicates("prompt_id").index[:TEXTS]
    frame.loc[~frame.index.isin(first), ["prompt", "response"]] = None
    return frame


def json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: a row that is not an object or lacks a needed key, with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or any(name not in row for name in needed):
                raise ValueError(f"{', '.join(needed)} must be there")
        except ValueError as error:
            raise DataError(f"{path} row {number}: {error}; {AGAIN}") from None
        rows.append(row)
    return rows
