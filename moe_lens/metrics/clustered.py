"""A mean over tokens, and its error: tokens of one sequence resemble each other."""

from __future__ import annotations

import numpy as np
import pandas as pd


def clustered_mean(values: pd.Series, sequences: pd.Series) -> tuple[float, float]:
    """Mean, and its standard error over whole sequences; NaN below two.

    Args:
        values: One a token; NaN are left out.
        sequences: The sequence of each.
    """
    values = values.dropna()
    if not len(values):
        return float("nan"), float("nan")
    mean = float(values.mean())
    sums = (values - mean).groupby(sequences).sum()
    S = len(sums)
    error = np.sqrt(S / (S - 1) * np.square(sums).sum()) / len(values) if S > 1 else np.nan
    return mean, float(error)
