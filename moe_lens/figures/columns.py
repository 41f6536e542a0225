"""From a table to arrays: numbers with NaN for null, one run, experts and layers as a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def one_run(table: pd.DataFrame) -> pd.DataFrame:
    """The table, if it is of one run.

    Raises:
        ValueError: It is of several, which would lie on top of each other.
    """
    names = list(table["run"].unique()) if "run" in table else []
    if len(names) > 1:
        listed = ", ".join(map(repr, names))
        raise ValueError(
            f"A figure shows one run; this table has {len(names)}: {listed}. "
            f"Take one of them: table[table.run == {names[0]!r}]."
        )
    return table


def numbers(table: pd.DataFrame, column: str) -> Floats:
    """A column as floats; null, and a column that is not there, as NaN."""
    if column not in table:
        return np.full(len(table), np.nan)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)


def known(table: pd.DataFrame, column: str) -> bool:
    """Some row has a number there."""
    return bool(np.isfinite(numbers(table, column)).any())


def matrix(table: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """A value by two whole numbers; NaN where the table has no row.

    Returns:
        Rows from the lowest to the highest of the table; columns from 0 to the highest.
    """
    row, column = (numbers(table, name).astype(int) for name in (rows, columns))
    out = np.full((row.max() - row.min() + 1, column.max() + 1), np.nan)
    out[row - row.min(), column] = numbers(table, value)
    return pd.DataFrame(out, range(row.min(), row.max() + 1), range(column.max() + 1))


def counts(cells: pd.DataFrame) -> NDArray[np.int64]:
    """A matrix of counts as whole numbers, 0 where there is none."""
    whole: NDArray[np.int64] = np.nan_to_num(cells.to_numpy(np.float64)).astype(np.int64)
    return whole


def mean(values: Floats, weights: Floats) -> float:
    """Weighted mean over what is known; NaN where nothing is."""
    seen = np.isfinite(values) & np.isfinite(weights)
    total = weights[seen].sum()
    return float((values[seen] * weights[seen]).sum() / total) if total > 0 else float("nan")


def means(table: pd.DataFrame, by: str, value: str, weight: str) -> pd.Series[float]:
    """`mean` of each group, by its key in ascending order."""
    values, weights = numbers(table, value), numbers(table, weight)
    seen = np.isfinite(values) & np.isfinite(weights)
    parts = pd.DataFrame(
        {
            "key": table[by].to_numpy(),
            "sum": np.where(seen, values, 0) * np.where(seen, weights, 0),
            "weight": np.where(seen, weights, 0),
        }
    )
    sums = parts.groupby("key").sum()
    return sums["sum"] / sums["weight"].where(sums["weight"] > 0)


def top(table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The first row with the largest value of a column that has some."""
    return table.iloc[int(np.nanargmax(numbers(table, column)))]
