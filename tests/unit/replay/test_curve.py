"""The curve of one expert, and the time attributed by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.replay import curve as curve_module
from moe_lens.replay.curve import Attributed, Curve, Ledger, measure_curve, points
from moe_lens.runtime.layer import MoELayer


def test_points_double_up_to_the_last() -> None:
    assert points(0) == []
    assert points(1) == [1]
    assert points(8) == [1, 2, 4, 8]
    assert points(11) == [1, 2, 4, 8, 11]


def test_between_points_it_is_a_line_and_no_rows_take_no_time() -> None:
    curve = Curve([1, 2, 4], [10.0, 12.0, 20.0], base_ns=3.0)
    assert curve.at(np.array([0, 1, 3, 4])).tolist() == [0.0, 10.0, 16.0, 20.0]


def test_beyond_the_last_point_it_goes_on_as_before() -> None:
    curve = Curve([1, 2, 4], [10.0, 12.0, 20.0], base_ns=3.0)
    assert curve.at(np.array([6, 8])).tolist() == [28.0, 36.0]
    assert Curve([1], [10.0], 0.0).at(np.array([3])).tolist() == [30.0]


def test_attributed_time_adds_up_to_what_was_measured() -> None:
    curve = Curve([1, 4], [10.0, 40.0], base_ns=0.0)
    ledger = Ledger()
    ledger.add(2, "train", np.array([4, 0, 1]), curve, 100.0)
    ledger.add(2, "train", np.array([2, 1, 0]), curve, 50.0)
    (found,) = ledger.of.values()
    hottest = found.hottest(9)
    assert [(e["expert"], e["rows"]) for e in hottest] == [(0, 6), (1, 1), (2, 1)]
    assert sum(e["attributed_ns"] for e in hottest) == pytest.approx(150)
    assert sum(e["share"] for e in hottest) == pytest.approx(1)
    assert hottest[0]["share"] == pytest.approx(60 / 80)


def test_experts_with_equal_rows_are_alike_and_in_order() -> None:
    curve = Curve([1, 7], [0.1, 0.7], base_ns=0.0)
    ledger = Ledger()
    # The same rows of experts 1, 2 and 4 in another order: float sums differ in the last digit.
    ledger.add(0, "train", np.array([1, 3, 1, 0, 2]), curve, 1.0)
    ledger.add(0, "train", np.array([0, 1, 2, 0, 3]), curve, 1.0)
    ledger.add(0, "train", np.array([0, 2, 3, 1, 1]), curve, 1.0)
    (found,) = ledger.of.values()
    assert len(set(found.curve_ns_E[[1, 2, 4]])) > 1  # or this tests nothing
    hottest = found.hottest(2)
    assert [(e["expert"], e["rows"], e["alike"]) for e in hottest] == [(1, 6, 2), (2, 6, 2)]
    assert hottest[0]["share"] == hottest[1]["share"]
    assert [(e["expert"], e["alike"]) for e in found.hottest(9)[3:]] == [(0, 1), (3, 1)]


def test_nothing_ran() -> None:
    nothing = Attributed(np.zeros(3, np.int64), np.zeros(3))
    assert nothing.hottest(5) == []


def test_the_curve_is_what_was_timed_less_what_takes_no_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(works: dict[str, Any], repeats: int, device: object, **_: object) -> Any:
        for work in works.values():
            work()
        taken = {n: 1e-3 + 1e-6 * float(n) for n in works if n != "layer"} | {"layer": 2e-3}
        return {name: [seconds] * repeats for name, seconds in taken.items()}

    monkeypatch.setattr(curve_module, "interleaved", timed)
    layer = MoELayer.random(4, 32, 32, dtype=torch.float32, device="cpu", seed=0)
    rows_E = np.array([40, 0, 4, 1])
    ids_TK = torch.repeat_interleave(torch.arange(4), torch.from_numpy(rows_E)).int()[:, None]
    x_TD, ones_TK = torch.randn(45, 32), torch.ones(45, 1)
    curve = measure_curve(
        layer, 300, repeats=2, seed=0, beside=lambda: layer(x_TD, ids_TK, ones_TK), rows_E=rows_E
    )
    assert curve.rows == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert curve.ns == pytest.approx([1e3 * n for n in curve.rows])
    assert curve.base_ns == pytest.approx(1e6)
    assert curve.layer_ns == pytest.approx(2e6)
    assert curve.sum_ns == pytest.approx(45e3)
