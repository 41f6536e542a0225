"""Into which regions does a router cut the plane? One region for each set of experts it chooses.

Exact, not by sampling. A set's region is where its k logits are above all others: an intersection
of half planes, so it is convex and in one piece, and counting regions is counting sets.

- On a line (or the circle, for a router without a bias) the set changes only where two experts
  meet; between two meetings one point tells.
- A region within a square is a polygon, and has corners. A corner is a point where three experts
  meet at the k-th place, or lies on the square's edge: a line again. Three experts meet in one
  point, so all corners can be looked at.

This takes routers in general position: no four experts meet in a point. Drawn or trained weights
are; made-up ones may not be.

Array names carry their shape: M experts, P points, K chosen experts, 2 the plane.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import LabError

Floats = NDArray[np.float64]
Set = frozenset[int]

HALF = 3.0
"""The square is [-HALF, HALF] on each side: of a normal variable nearly everything."""


def on_circle(gate_M2: Floats, top_k: int) -> list[tuple[float, float, Set]]:
    """The arcs of the unit circle, for a router without a bias.

    Args:
        gate_M2: Weights.
        top_k: k.

    Returns:
        (from, to, set) in radians, once around from the first change of the set above 0; the last
        goes on past 2 pi to where the first begins.
    """
    _check(gate_M2, top_k)
    i_P, j_P = _pairs(len(gate_M2))
    apart_P2 = gate_M2[i_P] - gate_M2[j_P]
    # Two experts meet where u is at right angles to their difference: at two opposite points.
    meet_P = np.arctan2(apart_P2[:, 0], -apart_P2[:, 1]) % np.pi
    angles_P = np.unique(np.concatenate([meet_P, meet_P + np.pi]))
    if not len(angles_P):
        return [(0.0, 2 * np.pi, _set_of(gate_M2[:, 0], top_k))]
    next_P = np.append(angles_P[1:], angles_P[0] + 2 * np.pi)
    middle_P = (angles_P + next_P) / 2
    ids_PK = _ids(np.stack([np.cos(middle_P), np.sin(middle_P)], 1) @ gate_M2.T, top_k)
    changed_P = (ids_PK != np.roll(ids_PK, 1, axis=0)).any(1)
    starts = np.flatnonzero(changed_P).tolist() or [0]
    around = len(angles_P)
    ends = [*starts[1:], starts[0] + around]
    return [
        (
            float(angles_P[s]),
            float(angles_P[e % around] + 2 * np.pi * (e // around)),
            frozenset(ids_PK[s].tolist()),
        )
        for s, e in zip(starts, ends, strict=True)
    ]


def in_square(gate_M2: Floats, bias_M: Floats, top_k: int, half: float = HALF) -> set[Set]:
    """The sets that a router chooses somewhere in [-half, half]^2.

    Args:
        gate_M2: Weights.
        bias_M: Biases.
        top_k: k.
        half: Of the square's side.
    """
    _check(gate_M2, top_k)
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) * half
    found: set[Set] = set()
    for start_2, end_2 in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        found |= _on_segment(gate_M2, bias_M, top_k, start_2, end_2)
    return found | _around_corners(gate_M2, bias_M, top_k, half)


def raster(gate_M2: Floats, bias_M: Floats, top_k: int, side: int) -> tuple[Floats, list[Set]]:
    """A picture: the set at the middles of side x side squares of [-HALF, HALF]^2.

    Returns:
        The middles along one side, and the sets row by row, the lowest row first.
    """
    at = (np.arange(side) + 0.5) / side * 2 * HALF - HALF
    x_P, y_P = (axis.ravel() for axis in np.meshgrid(at, at))
    return at, _chosen(np.stack([x_P, y_P], 1) @ gate_M2.T + bias_M, top_k)


def through(gate_MD: Floats, bias_M: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A router seen on a random plane through 0: its weights along two orthonormal directions."""
    axes_D2, _ = np.linalg.qr(rng.normal(size=(gate_MD.shape[1], 2)))
    return gate_MD @ axes_D2, bias_M


def _on_segment(
    gate_M2: Floats, bias_M: Floats, top_k: int, start_2: Floats, end_2: Floats
) -> set[Set]:
    """Sets along a straight piece: logits are a + b t for t from 0 to 1."""
    a_M = gate_M2 @ start_2 + bias_M
    b_M = gate_M2 @ (end_2 - start_2)
    i_P, j_P = _pairs(len(a_M))
    slope_P = b_M[i_P] - b_M[j_P]
    with np.errstate(divide="ignore", invalid="ignore"):
        t_P = (a_M[j_P] - a_M[i_P]) / slope_P
    inside = np.unique(t_P[np.isfinite(t_P) & (t_P > 0) & (t_P < 1)])
    edges = np.concatenate([[0.0], inside, [1.0]])
    middle_P = (edges[1:] + edges[:-1]) / 2
    return set(_chosen(a_M + middle_P[:, None] * b_M, top_k))


def _around_corners(gate_M2: Floats, bias_M: Floats, top_k: int, half: float) -> set[Set]:
    """Sets that touch a point where three experts meet at the k-th place."""
    found: set[Set] = set()
    for three in combinations(range(len(bias_M)), 3):
        i, j, l = three  # noqa: E741
        apart_22 = np.stack([gate_M2[i] - gate_M2[j], gate_M2[i] - gate_M2[l]])
        try:
            point_2 = np.linalg.solve(apart_22, [bias_M[j] - bias_M[i], bias_M[l] - bias_M[i]])
        except np.linalg.LinAlgError:  # they meet nowhere
            continue
        if np.abs(point_2).max() >= half:
            continue
        logit_M = gate_M2 @ point_2 + bias_M
        above = [e for e in np.flatnonzero(logit_M > logit_M[i]) if e not in three]
        open_ = top_k - len(above)
        if 0 < open_ < 3:
            found |= {frozenset([*map(int, above), *some]) for some in combinations(three, open_)}
    return found


def _chosen(logits_PM: Floats, top_k: int) -> list[Set]:
    return [frozenset(row) for row in _ids(logits_PM, top_k).tolist()]


def _ids(logits_PM: Floats, top_k: int) -> NDArray[np.intp]:
    """ids_PK of the largest logits, the lowest id first: one set, one row."""
    return np.sort(np.argpartition(-logits_PM, top_k - 1, axis=1)[:, :top_k], axis=1)


def _set_of(logits_M: Floats, top_k: int) -> Set:
    return _chosen(logits_M[None], top_k)[0]


def _pairs(experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    i_P, j_P = np.triu_indices(experts, 1)
    return i_P.astype(np.int64), j_P.astype(np.int64)


def _check(gate_M2: Floats, top_k: int) -> None:
    if gate_M2.ndim != 2 or gate_M2.shape[1] != 2:
        raise LabError(
            f"a router in the plane has weights [experts, 2], got {list(gate_M2.shape)}; "
            "through() sees one of more inputs on a plane."
        )
    if not 1 <= top_k <= len(gate_M2):
        raise LabError(f"a token uses 1 to {len(gate_M2)} of {len(gate_M2)} experts; got {top_k}.")
