"""How alike the experts of a layer are: rows of the router, and what their cosines are by chance.

A row of the router's matrix is the direction that its expert answers to; two rows that point the
same way choose the same tokens, and only their lengths tell them apart. Directions drawn at random
have a cosine of mean 0 and standard deviation 1 / sqrt(D), but the largest of all E (E - 1) / 2 of
them is several of these, so that is what the largest is compared with.

`moe_lens_hooks` takes the arrays from a model: `router_rows`, `expert_cosines`.

Legend: E experts, D width of a row, R draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from moe_lens.metrics.chance import SEED, Chance, Floats, of_draws

DRAWS = 199


def norms(rows_ED: ArrayLike) -> Floats:
    """Length of each expert's row, `[E]`: a long one wins more often, and by more."""
    return np.asarray(np.linalg.norm(_rows(rows_ED), axis=1))


def cosines(rows_ED: ArrayLike) -> Floats:
    """Cosine of each pair of rows, `[E, E]`; NaN for a row of zeros.

    Raises:
        ValueError: It is no matrix.
    """
    rows_ED = _rows(rows_ED)
    length_E = norms(rows_ED)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_ED = rows_ED / length_E[:, None]
    return np.asarray(np.clip(unit_ED @ unit_ED.T, -1, 1))


def pairs(cosine_EE: ArrayLike, above: float) -> pd.DataFrame:
    """Pairs of experts whose cosine is above `above`, the most alike first.

    Args:
        cosine_EE: Of rows, or of whole experts.
        above: `by_chance(experts, width).high` for rows; close to 1 for copies.

    Returns:
        `expert`, `other` (the larger id), `cosine`.

    Raises:
        ValueError: The matrix is not square.
    """
    cosine_EE = np.asarray(cosine_EE, float)
    if cosine_EE.ndim != 2 or cosine_EE.shape[0] != cosine_EE.shape[1]:
        raise ValueError(f"cosines are [E, E]; got shape {cosine_EE.shape}")
    expert, other = np.nonzero(np.triu(cosine_EE > above, 1))
    found = pd.DataFrame({"expert": expert, "other": other, "cosine": cosine_EE[expert, other]})
    return found.sort_values(["cosine", "expert"], ascending=[False, True], ignore_index=True)


@lru_cache(maxsize=32)
def by_chance(experts: int, width: int) -> Chance:
    """The largest |cosine| among rows that are drawn from a normal distribution.

    The draws are exact, and cost the same at any width: the cosines of Gaussian rows are those of
    a lower triangular matrix of normal numbers with chi distributed ones, of D, D - 1, ... degrees
    of freedom, on its diagonal (Bartlett 1933).

    Args:
        experts: E.
        width: D.

    Returns:
        Mean, lowest and highest of 199 draws; NaN below two experts.

    Raises:
        ValueError: A size below 1.
    """
    if min(experts, width) < 1:
        raise ValueError(f"experts={experts} and width={width} must be 1 or more")
    if experts < 2:
        return Chance(float("nan"))
    rng = np.random.default_rng(SEED)
    inner = min(experts, width)
    largest_R = np.empty(DRAWS)
    for r in range(DRAWS):
        lower = np.tril(rng.standard_normal((experts, inner)), -1)
        np.fill_diagonal(lower, np.sqrt(rng.chisquare(width - np.arange(inner))))
        largest_R[r] = np.abs(np.triu(cosines(lower), 1)).max()
    return of_draws(largest_R)


def _rows(rows_ED: ArrayLike) -> Floats:
    rows = np.asarray(rows_ED, float)
    if rows.ndim != 2:
        raise ValueError(f"rows are [E, D]; got shape {rows.shape}")
    return rows
