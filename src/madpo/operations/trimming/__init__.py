"""A smaller vocabulary for a model."""
