"""What an operation measures: numbers, words, and estimates with their intervals."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

from madpo.core.errors import ConfigError


class Estimate(NamedTuple):
    """A mean with its 95 % interval over ``n`` independent units."""

    mean: float
    low: float
    high: float
    n: int

    def __neg__(self) -> Estimate:
        """The same of the other sign."""
        return Estimate(-self.mean, -self.high, -self.low, self.n)


Metric = float | int | str | Estimate
Metrics = dict[str, Metric]


def plain_metrics(metrics: Metrics, name: str) -> Metrics:
    """Python numbers for whatever number types the step returned; NaN and infinity are a failed step."""
    found: Metrics = {}
    for key, value in metrics.items():
        place = f"{name}: metric {key}"
        if isinstance(value, Estimate):
            mean, low, high = (float(_number(part, place)) for part in value[:3])
            found[key] = Estimate(mean, low, high, int(value.n))
        else:
            found[key] = value if isinstance(value, str) else _number(value, place)
    return found


def _number(value: object, place: str) -> float:
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{place} is {value!r}: a step returns numbers, text and Estimates")
    if not math.isfinite(value):
        raise ConfigError(f"{place} is {float(value)}, so training diverged or nothing was measured; check its inputs")
    return float(value)
