"""Randomness by name.

Every random draw comes from a seed that the user passes and a name that says what it is for, so that adding a
stage cannot shift another stage's draws, and the order in which things are computed does not matter.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose that ``names`` spells out, such as ``derived_seed(0, "label", "high")``."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for the purpose that ``names`` spells out."""
    import numpy as np

    return np.random.default_rng(derived_seed(seed, *names))
