"""Errors of loading a model, an adapter or a tokenizer, each turned into one sentence with a remedy.

The libraries raise whatever a file makes them stumble over: OSError and ValueError, but also bare Exception
(tokenizers), SafetensorError, ImportError (quantised weights), KeyError, and Rust panics, which are no Exception.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from madpo.core.errors import ConfigError, MadpoError, MemoryShortage, first_line, is_shortage
from madpo.core.storage import disk_error, expanded, json_object
from madpo.core.suggestions import did_you_mean
from madpo.models.packaged import PACKAGED

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
# Errors that say little without their type: KeyError: 'added_tokens'.
_TERSE = (LookupError, TypeError, AttributeError, AssertionError, NotImplementedError)


@contextmanager
def loading(name: str | Path, what: str = "model") -> Iterator[None]:
    """Turn every error of loading ``name``, a folder or a hub id, into one sentence. Put only calls of libraries into
    it.

    Raises ConfigError, StorageError, MemoryShortage: in place of the library's error.
    """
    try:
        yield
    except MadpoError:
        raise
    except BaseException as error:
        # PyO3 raises a Rust panic as a BaseException of a class that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise cannot_load(str(name), error, what) from error


def cannot_load(name: str, error: BaseException, what: str = "model") -> MadpoError:
    """The error for a model, an adapter or a tokenizer that a library could not load, with the remedy for its cause.

    What the disk refuses is a StorageError, a lack of memory a MemoryShortage, everything else a ConfigError.
    """
    said, reason = str(error), _reason(error)
    causes: list[BaseException] = []  # the error, and those that it was raised from
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = following.__cause__ or following.__context__
    names = {type(cause).__name__ for cause in causes}
    subject = f"the {what} {name!r}"
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _DISK and (sentence := disk_error(cause, name)) is not None:
            return sentence
        if isinstance(cause, PermissionError) and cause.filename:
            return ConfigError(f"{subject} cannot be loaded: make {cause.filename} readable for you")
    if any(is_shortage(cause) for cause in causes):
        return MemoryShortage(f"{subject} does not fit into the memory ({reason}); give a smaller one")
    if "GatedRepoError" in names or "gated repo" in said:
        return ConfigError(
            f"{subject} is gated: ask for access on its page of the hub, log in on this machine with "
            "hf auth login, and run the same command again"
        )
    if "trust_remote_code" in said:
        return ConfigError(
            f"{subject} needs Python code that comes with it, which is never run here; give a model whose "
            "architecture transformers has itself"
        )
    if "does not recognize this architecture" in said or "Unrecognized model in" in said:
        return ConfigError(
            f"{subject} has an architecture that transformers {version('transformers')} does not know "
            f"({reason}); install a newer transformers, or give another model"
        )
    if "automatic conversion of the weights" in said:  # whose details are only in a log
        reason = "the weights of its experts are incomplete, or have other shapes than its config.json asks for"
    folder = expanded(name)
    if not os.path.exists(folder) and (isinstance(error, OSError) or "HFValidationError" in names):
        return no_such_model(name, reason)
    method = None  # by which the weights are quantised
    with suppress(MadpoError, LookupError, TypeError):
        method = json_object(folder / "config.json", "")["quantization_config"]["quant_method"]
    if method is not None and not isinstance(error, OSError):
        return ConfigError(
            f"{subject} has weights that are quantised by {method}, which cannot be read here ({reason}); install "
            "the package that it names, or give the model with plain weights"
        )
    if any(isinstance(cause, ImportError) for cause in causes):
        return ConfigError(f"{subject} needs a package that is missing here ({reason}); install it")
    if damaged := _damaged_file(folder):
        return ConfigError(f"{subject} cannot be loaded: {damaged}; copy or download this file again")
    if isinstance(error, OSError):
        return ConfigError(f"{subject} cannot be loaded ({reason}); give a folder with safetensors or a hub id")
    return ConfigError(
        f"{subject} cannot be loaded ({reason}); its files are damaged or do not belong together: copy or download "
        "them again"
    )


def no_such_model(name: str, reason: str) -> ConfigError:
    """The error for a name that is neither a folder nor a model of the hub, with what may have been meant."""
    around = [
        entry.parent.as_posix()
        for file in ("config.json", "reward_model.json")
        for entry in Path(name).parent.glob(f"*/{file}")
    ]
    return ConfigError(
        f"there is no folder {name!r}, and no model of that name could be loaded from the hub ({reason})"
        + (did_you_mean(name, [*PACKAGED, *around]) or "; check the path or the hub id")
    )


def _reason(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line."""
    said = first_line(error)
    if said.rstrip().endswith(":"):  # a headline, such as "Validation error for field 'hidden_size':"
        said = " ".join(str(error).split())
    if isinstance(error, _TERSE):
        said = f"{type(error).__name__}: {said}"
    return said[:length].strip(" .;")


def _damaged_file(folder: Path) -> str | None:
    """The first file of a folder that cannot be read by itself, with the reason.

    safetensors says that a file is too short, but not which of a model's thirty files it is.
    """
    from safetensors import SafetensorError, safe_open

    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return None
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="numpy"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            return f"{file} is damaged ({_reason(error, 120)})"
    return None
