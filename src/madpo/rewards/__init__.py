"""Oracles, reward models and what their margins look like."""
