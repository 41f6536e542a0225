"""One layer in one forward: which floors its stages have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.replay import measure
from moe_lens.replay.floors import STAGES, Ceiling, Shape, stages
from moe_lens.replay.policies import Work
from moe_lens.replay.routing import Routed
from moe_lens.runtime.backend import Backend
from moe_lens.runtime.layer import MoELayer


@pytest.mark.parametrize(("backend", "gathers"), [("cuda+triton", True), ("cpu", False)])
def test_stages_have_the_floors_of_what_the_backend_does_in_them(
    backend: str, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(works: dict[str, Any], repeats: int, device: object, **_: object) -> Any:
        return {name: [1e-3] * repeats for name in works}

    monkeypatch.setattr(measure, "interleaved", timed)
    layer = MoELayer.random(4, 8, 6, dtype=torch.float32, device="cpu", seed=0)
    monkeypatch.setattr(layer, "backend_for", lambda slots: Backend(backend, "why"))
    ids_TK = np.array([[0, 1], [1, 2], [2, 1]], np.int32)
    ones_TK = np.ones((3, 2), np.float32)
    kept_TK = np.zeros((3, 2), bool)
    routed = Routed(0, 0, 0, 0, "eval", ids_TK, ones_TK, 0, kept_TK, None, None)
    shape, ceiling = Shape(4, 8, 6, "float32", 4), Ceiling(1e9, 1e9)
    work = Work(ids_TK, ones_TK, 6, 0, 0)
    row = measure.measured(layer, torch.randn(3, 8), routed, work, shape, ceiling, repeats=2)
    wanted = stages(3, 6, 3, shape, gathers=gathers)
    for name in STAGES:
        assert row[f"{name}_floor_ns"] == wanted[name].floor_ns(ceiling)
    assert (row["permute_floor_ns"] == 0) is gathers
