"""Preference data of users: reading it, checking it, and rows for training. No torch.

A new format is a branch of ``sources.open_source``; a new layout, or a new name of a part of the prompt, an entry of
``layouts.toml``; a new name of a number, of ``core/columns.py``; a new warning, of ``findings.toml``.
"""

from madpo.data.check import CheckReport, check
from madpo.data.load import load_preferences

__all__ = ["CheckReport", "check", "load_preferences"]
