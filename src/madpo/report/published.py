"""The numbers of the paper (arXiv 2510.05342, Section 5), shown next to a run's own.

Mean oracle reward on 2,000 held-out prompts. Table 1 is printed with standard errors; Figures 2 and 3 are read off the
author's published images, so their last digit may be off by one. Gemma-3-270M, IMDB, 10,000 pairs a tier, one seed.
"""

from __future__ import annotations

TIERS = ("high", "medium", "low")
METHODS = ("DPO", "IPO", "β-DPO", "MADPO")

# Method -> tier -> (mean, standard error).
TABLE_1 = {
    "DPO": {"high": (1.62, 0.03), "medium": (1.71, 0.03), "low": (1.48, 0.04)},
    "IPO": {"high": (0.35, 0.05), "medium": (0.31, 0.05), "low": (0.10, 0.05)},
    "β-DPO": {"high": (1.67, 0.03), "medium": (1.84, 0.03), "low": (1.76, 0.03)},
    "MADPO": {"high": (2.23, 0.02), "medium": (2.23, 0.02), "low": (1.95, 0.03)},
}

# Figure 2: tier -> tau or c -> mean.
OVER_TAU = {
    "high": {2.0: 1.72, 4.0: 2.09, 7.0: 2.08, 10.0: 2.07},
    "medium": {2.0: 1.89, 4.0: 2.05, 7.0: 2.15, 10.0: 2.17},
    "low": {2.0: 1.56, 4.0: 1.72, 7.0: 1.75, 10.0: 1.80},
}
OVER_C = {
    "high": {2.0: 2.08, 3.0: 2.17, 4.0: 2.23},
    "medium": {2.0: 2.15, 3.0: 2.20, 4.0: 2.23},
    "low": {2.0: 1.75, 3.0: 1.89, 4.0: 1.95},
}
FIXED_C, FIXED_TAU = 2.0, 7.0  # c while tau varies, tau while c varies

# Figure 3: c (at tau 7) -> variant -> tier -> mean.
PARTS = ("DPO", "Amp-Only", "Reg-Only", "MADPO")
ABLATION = {
    2.0: {
        "DPO": {"high": 1.62, "medium": 1.71, "low": 1.48},
        "Amp-Only": {"high": 2.16, "medium": 2.11, "low": 1.81},
        "Reg-Only": {"high": 1.66, "medium": 1.78, "low": 1.50},
        "MADPO": {"high": 2.08, "medium": 2.15, "low": 1.75},
    },
    4.0: {
        "DPO": {"high": 1.62, "medium": 1.71, "low": 1.48},
        "Amp-Only": {"high": 2.20, "medium": 2.23, "low": 2.00},
        "Reg-Only": {"high": 1.71, "medium": 1.70, "low": 1.51},
        "MADPO": {"high": 2.23, "medium": 2.23, "low": 1.95},
    },
}
