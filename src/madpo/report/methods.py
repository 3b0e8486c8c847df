"""Names of methods: which method a loss, its pairs and its trainer make, and the settings that tell rows apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SFT = "SFT"
REFERENCE = "Reference"
"""How the model that policies start from is called where it is no SFT model of the study."""
OWN = "own"
"""The tier of a user's own pairs."""
AGREEING, REDRAWN = "DPO on agreeing pairs", "DPO on re-drawn labels"
_MARGINS = {"out_of_fold": "out-of-fold margins", "probe": "probe margins"}
AVERAGED = "DPO, two averaged"
RIVALS = (
    *(AGREEING, REDRAWN, "rDPO", "RE-DPO", "Soft labels", "Soft MADPO", "cDPO", AVERAGED),
    *("Auto", *(f"Auto, {words}" for words in _MARGINS.values())),
    *("RLOO", "GRPO", "Best of n"),
)

_ONLINE = {"rloo": "RLOO", "grpo": "GRPO", "best_of_n": "Best of n"}
_PARTS = {"full": "MADPO", "amplify": "Amp-Only", "dampen": "Reg-Only"}
# Kinds of losses that are not called as they are spelled; any other is, with "DPO" in capitals.
_KINDS = {
    **{"beta_dpo": "β-DPO", "rdpo": "rDPO", "re_dpo": "RE-DPO", "simpo": "SimPO"},
    **{"soft_dpo": "Soft labels", "soft_madpo": "Soft MADPO"},
}


def spread(loss: Mapping[str, Any]) -> dict[str, Any]:
    """A loss's settings; of one of the user's own, the parameters next to its kind and its target."""
    return {**loss.get("parameters", {}), **{k: v for k, v in loss.items() if k != "parameters"}}


def method_of(key: str, name: str, loss: Mapping[str, Any], pairs: str, margins: str, trainer: str) -> str:
    """The method that a row is a setting of; a row that none is known for is a method of its own.

    Args:
        key: of the row in the steps; name: as it is shown.
        loss: its settings, with ``kind``, as :func:`spread` gives them.
        pairs, margins, trainer: as in an experiment's rows.
    """
    kind = loss.get("kind", key)
    if trainer == "auto":
        return AVERAGED if loss.get("label_share") == 1 else ", ".join(["Auto", *filter(None, [_MARGINS.get(margins)])])
    if trainer != "offline":
        return _ONLINE.get(trainer, name)
    if pairs != "all":
        return {"agreeing": AGREEING, "redrawn": REDRAWN}.get(pairs, name) if kind == "dpo" else name
    if kind == "dpo":
        return "cDPO" if loss.get("label_smoothing") else "DPO"
    if kind == "ipo":
        return "IPO" if loss.get("reduction", "sum") == "sum" else "IPO, mean per token"
    if kind in ("madpo", "soft_madpo", "soft_dpo"):
        own = _PARTS.get(loss.get("part", "full"), name) if kind == "madpo" else _KINDS[kind]
        words = ["Mixed labels" if loss.get("label_share") else own]
        words += ["calibrated margins"] * (float(loss.get("margin_temperature", 1.0)) != 1.0)
        words += [_MARGINS[margins]] if margins in _MARGINS else []
        return ", ".join(words)
    if "kind" not in loss:
        return name
    if kind == "custom":
        file, _, own = str(loss["target"]).rpartition(":")
        return f"{own} ({PurePath(file).name})"  # of two files, or a packaged loss, may have the same name
    spelled = "-".join("DPO" if word == "dpo" else word for word in str(kind).split("_"))
    return _KINDS.get(str(kind), spelled if "-" in spelled else spelled.upper())


# A setting at a value that changes nothing is not worth a word.
_SILENT = {"lam": 1.0, "margin_temperature": 1.0, "label_smoothing": 0.0}
_SPOKEN = (
    *("beta", "tau", "c_max", "c_min", "lam", "margin_temperature", "batch_scale", "keep", "flip_rate", "alpha"),
    *("gamma", "gamma_beta_ratio", "eta", "label_smoothing", "reliability", "label_share"),
)


def rate_words(learning_rate: float | None) -> str:
    """What a method's name ends with where its rows have a learning rate of their own."""
    return "" if learning_rate is None else f", learning rate {learning_rate:g}"


def settings_words(loss: Mapping[str, Any]) -> str:
    """ "beta 0.1, tau 7, c max 4": the numbers that tell a row from others of its kind."""
    spoken = _SPOKEN if loss.get("kind") != "custom" else loss.keys()
    numbers = {name: value for name in spoken if isinstance(value := loss.get(name), int | float)}
    shown = {name: value for name, value in numbers.items() if _SILENT.get(name) != value}
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in shown.items())


def is_setting(loss: Mapping[str, Any], tau: float, c: float) -> bool:
    """Whether a loss is MADPO's at tau and c with c_min = 1/c and lam = 1, as everywhere in the paper."""
    low = loss.get("c_min")
    at = (loss.get("tau"), loss.get("c_max")) == (tau, c)
    return at and low in (None, 1 / c) and loss.get("lam") in (None, 1.0)
