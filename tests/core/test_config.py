"""Configuration files: what is read, and how mistakes are reported."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, ValidationError, field_validator

from madpo.core.config import Frozen, added, identity_settings, load_config
from madpo.core.errors import ConfigError
from refusals import refused


class Plain(Frozen):
    kind: Literal["plain"] = "plain"
    beta: PositiveFloat = 0.1


class Adaptive(Frozen):
    kind: Literal["adaptive"] = "adaptive"
    beta: PositiveFloat = 0.1
    tau: PositiveFloat


class Policy(Frozen):
    learning_rate: PositiveFloat = 1e-5
    epochs: int = Field(2, ge=1)
    note: str = ""

    @field_validator("note")
    @classmethod
    def _no_shouting(cls, note: str) -> str:
        if note.isupper():
            raise ConfigError("write it in lower case")
        return note


class Experiment(Frozen):
    title: str
    policy: Policy = Policy()
    methods: dict[str, Annotated[Plain | Adaptive, Field(discriminator="kind")]] = Field(default_factory=dict)
    sizes: tuple[int, ...] = ()


GOOD = """
title = "a study"
sizes = [1, 2]
[policy]
learning_rate = 3e-4
[methods.ours]
kind = "adaptive"
tau = 7
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_values_and_fills_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), Experiment)
    assert config.policy == Policy(learning_rate=3e-4, epochs=2)
    assert config.methods == {"ours": Adaptive(tau=7.0, beta=0.1)}
    assert config.sizes == (1, 2)
    with pytest.raises(ValidationError, match="frozen"):
        config.policy.epochs = 3  # type: ignore[misc]


def test_overrides_are_typed_and_reach_every_depth(tmp_path: Path) -> None:
    overrides = ["policy.learning_rate=1e-4", "methods.ours.tau=2", "title=plain words", "sizes.1=9", "policy.note=a=b"]
    config = load_config(write(tmp_path, GOOD), Experiment, overrides)
    assert config.policy.learning_rate == 1e-4
    assert config.methods["ours"] == Adaptive(tau=2.0)
    assert config.title == "plain words"
    assert config.sizes == (1, 9)
    assert config.policy.note == "a=b"
    assert load_config(write(tmp_path, GOOD), Experiment, {"policy.epochs": 5}).policy.epochs == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (GOOD.replace("learning_rate", "learning_rat"), ["'policy.learning_rat'", "'learning_rate'"]),
        (GOOD.replace("tau = 7", "tau = 7\ntua = 3"), ["'methods.ours.tua'", "'tau'"]),
        (GOOD.replace("tau = 7", "tau = -7"), [("methods.ours.tau", "-7", "0")]),
        (GOOD.replace("3e-4", "nan"), [("policy.learning_rate", "nan"), "finite"]),
        (GOOD.replace("tau = 7", ""), ["'methods.ours.tau'"]),
        (GOOD.replace('"adaptive"', '"adaptve"'), [("methods.ours.kind", "'adaptve'"), "'adaptive'"]),
        (GOOD.replace('kind = "adaptive"', ""), [("methods.ours", "'kind'")]),
        (GOOD.replace("3e-4", "3e-4\nepochs = 0\nnote = 'LOUD'"), [("policy.epochs", "0"), "1 more"]),
        (GOOD.replace("3e-4", "3e-4\nnote = 'LOUD'"), [("policy.note", "'LOUD'")]),
        (GOOD.replace("[1, 2]", "[1, 'two']"), [("sizes.1", "'two'"), "integer"]),
        ("title = 1x\nother = 2", ["TOML", "line 1"]),
        ("", ["'title'"]),
    ],
)
def test_a_mistake_is_one_sentence_with_file_key_and_remedy(tmp_path: Path, change: str, named: list[Any]) -> None:
    path = write(tmp_path, change)
    with refused(ConfigError, *named) as caught:
        load_config(path, Experiment)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("policy.epochs=none", ["--set policy.epochs", "'none'"]),
        ("policy.epochs", ["'policy.epochs'", "key=value"]),
        ("title.deep=1", [("title", "'a study'")]),
        ("sizes.7=1", [("'7'", "0", "1")]),
        ("policy.epoch=3", ["policy.epoch", "'epochs'"]),
    ],
)
def test_a_bad_override_names_itself(tmp_path: Path, override: str, named: list[Any]) -> None:
    with refused(ConfigError, *named):
        load_config(write(tmp_path, GOOD), Experiment, [override])


def test_unreadable_files(tmp_path: Path) -> None:
    with refused(ConfigError, "absent.toml"):
        load_config(tmp_path / "absent.toml", Experiment)
    with refused(ConfigError, tmp_path):
        load_config(tmp_path, Experiment)
    (tmp_path / "latin.toml").write_bytes(b'title = "caf\xe9"')
    with refused(ConfigError, "latin.toml", "UTF-8"):
        load_config(tmp_path / "latin.toml", Experiment)


@given(text=st.text(max_size=60))
def test_any_text_as_an_override_is_a_value_or_a_clear_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, GOOD)
    try:
        config = load_config(path, Experiment, [f"policy.note={text}"])
    except ConfigError:
        return
    # Nothing but the named key may change, whatever line breaks and quotes the text holds.
    assert config.model_copy(update={"policy": Policy(learning_rate=3e-4)}) == load_config(path, Experiment)
    assert config.policy.learning_rate == 3e-4


class Inner(Frozen):
    beta: float = 0.1
    later: int | None = added(None, ge=1)


class Outer(Frozen):
    inner: Inner = Inner()
    rows: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = Field(default_factory=dict)
    where: str = Field("here", exclude=True)
    fold: int = added(0)


def test_an_added_field_enters_an_identity_only_where_it_differs_from_its_default() -> None:
    config = Outer(rows=(Inner(), Inner(later=3)), by_name={"a": Inner()})
    assert identity_settings(config) == {
        "inner": {"beta": 0.1},
        "rows": [{"beta": 0.1}, {"beta": 0.1, "later": 3}],
        "by_name": {"a": {"beta": 0.1}},
    }
    assert identity_settings(Outer(fold=1))["fold"] == 1
    assert config.model_dump(mode="json")["fold"] == 0, "a resolved configuration shows everything"
    with refused(ConfigError, ("later", "1")):
        Inner(later=0)
