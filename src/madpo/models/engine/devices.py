"""The kind of device that the engine computes for: tiles, products and attention are chosen by it."""

from torch import Tensor


def kind(tensor: Tensor) -> str:
    """``cpu``, ``cuda``, ``xpu``, ``mps``. A count on paper says another one here."""
    return tensor.device.type
