"""Log-probabilities, KL and sampling: the fast, exact engine."""
