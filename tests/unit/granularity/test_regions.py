"""Tables of experiments 3 and 4, and the routing that is recorded, each counted once more."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moe_lens.granularity import regions
from moe_lens.granularity.presets import Plan
from moe_lens.granularity.recorder import record_routing
from moe_lens.granularity.runs import Row, routed_inputs


def test_regions_are_of_random_routers_and_of_trained_ones(planned: Plan, rows: list[Row]) -> None:
    found = regions.region_counts(planned, rows)
    drawn = [r for r in found if r["router"] == "random"]
    assert len(drawn) == 5 * (len(regions.CIRCLE) + len(regions.SQUARE))
    small = [r["regions"] for r in drawn if (r["where"], r["experts"]) == ("circle", 4)]
    assert set(small) <= {4, 6}  # two lines through 0 more or less: an even number
    trained = [r for r in found if r["where"] == "plane"]
    assert [r["router"] for r in trained] == ["teacher 4e2a", "student 4e2a", "student 2e1a"]
    assert trained[2]["regions"] == 2  # two experts, no bias: one line
    assert all(r["regions"] <= 2 ** r["possible_bits"] + 1e-9 for r in found)


def test_layers_that_were_scaled_are_on_no_plane(planned: Plan, rows: list[Row]) -> None:
    for scaled in ({"width_factor": 4}, {"experts_factor": 4}, {"gate_bias": True}):
        changed = [rows[0], replace(rows[1], **scaled)]
        trained = [r for r in regions.region_counts(planned, changed) if r["where"] == "plane"]
        assert [r["router"] for r in trained] == ["teacher 4e2a", "student 4e2a"]


def test_a_picture_shows_what_was_counted(planned: Plan, rows: list[Row]) -> None:
    counted = {r["router"]: r["regions"] for r in regions.region_counts(planned, rows)}
    points = regions.pictures(planned, rows)
    names = list(dict.fromkeys(point["picture"] for point in points))
    assert names[:2] == ["random 16e8a, no bias", "random 16e8a"]
    for name in names[2:]:
        of = [point for point in points if point["picture"] == name]
        assert len(of) == regions.SIDE**2
        assert len({p["chosen"] for p in of}) == len({p["region"] for p in of}) <= counted[name]
    (one,) = {len(p["chosen"].split()) for p in points if p["picture"] == "student 2e1a"}
    assert one == 1


def test_more_dimensions_reach_more_sets() -> None:
    found = regions.realised_sets(0, tokens=2_000)
    assert [r["hidden"] for r in found] == list(regions.DIMENSIONS)
    used = [r["used"] for r in found]
    assert used[:4] == sorted(used[:4])
    assert all(r["used"] <= r["at_least"] and r["used"] <= 2_000 for r in found)
    assert {r["possible"] for r in found} == {12_870}


class Noting:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.steps = 0
        self.said: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {}

    def step(self, *, phase: str) -> nullcontext[None]:
        assert phase == "eval"
        self.steps += 1
        return nullcontext()

    def log(self, layer: str, ids: Tensor, weights: Tensor, logits: Tensor | None = None) -> None:
        self.said.setdefault(layer, []).append((ids, weights, logits))


def test_the_trained_routers_are_recorded_on_the_tokens_of_the_row(
    planned: Plan, rows: list[Row]
) -> None:
    noting = Noting()
    record_routing(noting, planned, reversed(rows))
    assert list(noting.said) == ["teacher 4e2a", *(run.name for run in planned.runs)]
    x_TD = routed_inputs(planned.hidden, planned.seed).numpy()
    for row in rows:
        ids_TK, weights_TK, _ = map(torch.cat, zip(*noting.said[row.name], strict=True))
        logits_TE = x_TD @ np.array(row.gate, np.float32).reshape(row.experts, -1).T
        best_TK = np.argsort(-logits_TE, axis=1)[:, : row.top_k]
        assert (np.sort(ids_TK, axis=1) == np.sort(best_TK, axis=1)).mean() > 0.9999
        assert len({frozenset(ids) for ids in ids_TK.tolist()}) == row.sets_used
        torch.testing.assert_close(weights_TK.sum(1), torch.ones(len(x_TD)))
