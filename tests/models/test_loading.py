"""A model that cannot be loaded: the sentence and its remedy by cause."""

import errno
import json

import pytest
import transformers
from transformers import AutoConfig

from madpo.core.errors import ConfigError, StorageError
from madpo.models.loading import cannot_load, loading
from refusals import names, refused


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
    ("error", "kind", "named"),
    [
        (raised_from(GatedRepoError("401")), ConfigError, ["'a/b'", "hf auth login"]),
        (OSError("You are trying to access a gated repo."), ConfigError, ["'a/b'", "hf auth login"]),
        (raised_from(OSError(errno.ENOSPC, "No space left", "/cache/blob")), StorageError, ["/cache/blob"]),
        (raised_from(PermissionError(errno.EACCES, "denied", "/m/config.json")), ConfigError, ["/m/config.json"]),
        (raised_from(PermissionError(errno.EPERM, "not permitted")), ConfigError, ["'a/b'", "hub id"]),
        (OSError("nothing of that name"), ConfigError, ["'a/b'", "hub id"]),
    ],
)
def test_the_remedy_fits_the_cause_of_a_failed_load(error, kind, named):
    found = cannot_load("a/b", error)
    assert type(found) is kind
    names(str(found), *named)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "foo", "auto_map": {"AutoConfig": "configuration_foo.FooConfig"}}, "Python"),
        ({"model_type": "foo"}, f"transformers {transformers.__version__}"),
        ({"a": 1}, f"transformers {transformers.__version__}"),
    ],
)
def test_a_model_of_another_architecture_is_told_as_such(tmp_path, config, named):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_foo.py").write_text("raise AssertionError('code of the model was run')")
    with refused(ConfigError, tmp_path, named), loading(tmp_path):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
