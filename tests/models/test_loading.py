"""A model that cannot be loaded: the sentence and its remedy by cause."""

import errno
import json

import pytest
import transformers
from transformers import AutoConfig

from madpo.core.errors import ConfigError, StorageError
from madpo.models.loading import cannot_load, loading


def raised_from(cause: BaseException, said: str = "could not load") -> OSError:
    """As transformers raises: the cause is beneath an OSError of its own."""
    try:
        try:
            raise cause
        except BaseException as beneath:
            raise OSError(said) from beneath
    except OSError as error:
        return error


class GatedRepoError(OSError):
    """By its name only: the hub's own takes a response of the network."""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (raised_from(GatedRepoError("401")), ConfigError, "'a/b' is gated: ask for access on its page of the hub"),
        (OSError("You are trying to access a gated repo."), ConfigError, "hf auth login"),
        (
            raised_from(OSError(errno.ENOSPC, "No space left on device", "/cache/blob")),
            StorageError,
            "/cache/blob: the disk is full",
        ),
        (
            raised_from(PermissionError(errno.EACCES, "Permission denied", "/models/m/config.json")),
            ConfigError,
            "cannot be loaded: make /models/m/config.json readable for you",
        ),
        (raised_from(PermissionError(errno.EPERM, "not permitted")), ConfigError, "no model of that name could be had"),
        (OSError("nothing of that name"), ConfigError, "there is no folder 'a/b', and no model of that name"),
    ],
)
def test_the_remedy_fits_the_cause_of_a_failed_load(error, kind, words):
    found = cannot_load("a/b", error)
    assert type(found) is kind
    assert words in str(found)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "foo", "auto_map": {"AutoConfig": "configuration_foo.FooConfig"}},
            "needs Python code that comes with it, which is never run here",
        ),
        ({"model_type": "foo"}, f"architecture that transformers {transformers.__version__} does not know"),
        ({"a": 1}, f"architecture that transformers {transformers.__version__} does not know"),
    ],
)
def test_a_model_of_another_architecture_is_told_as_such(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_foo.py").write_text("raise AssertionError('code of the model was run')")
    with pytest.raises(ConfigError, match=words), loading(tmp_path):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
