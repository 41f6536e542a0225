"""Percentiles are over forwards, ratios of sums, and noise hides what it could have made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_lens.replay.floors import STAGES, Ceiling
from moe_lens.replay.summary import answers, beaten, by_layer, by_phase, differs
from moe_lens.trace.schema import REPLAY


def row(step: int, time: float, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "rank": 0,
        "layer": 0,
        "step": step,
        "forward": 0,
        "phase": "decode",
        "tokens": 10,
        "slots": 20,
        "dropped": 0,
        "rerouted": 0,
        "touched": 4,
        "rows_min": 1,
        "rows_median": 5.0,
        "rows_max": 9,
        "padded_rows": 60,
        "time_ns": time,
        "again_ns": time,
        "noise_ns": 0.01 * time,
        "balanced_ns": 100.0,
        "same_touched_ns": 100.0,
        "floor_ns": 50.0,
        "flop": 1000,
        "bytes": 500,
        **{f"{n}_ns": None for n in STAGES},
        **{f"{n}_floor_ns": 1.0 for n in STAGES},
    }
    assert set(base | more) == set(REPLAY.schema.names)
    return base | more


def test_a_row_for_each_phase_and_layer() -> None:
    rows = [row(s, 100.0 + s, layer=n, phase=p) for p in "ba" for n in (1, 0) for s in range(101)]
    found = by_layer(rows)
    assert [(r["phase"], r["layer"]) for r in found] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    first = found[0]
    assert (first["p50_ns"], first["p90_ns"], first["p99_ns"]) == (150, 190, 199)
    assert first["max_ns"] == 200
    assert first["over_balanced"] == pytest.approx(1.5)
    assert first["over_floor"] == pytest.approx(3)
    assert first["forwards"] == 101
    assert first["padded_share"] == pytest.approx(3)
    assert first["flop_per_s"] == pytest.approx(1e9 * 1000 / 150)
    assert first["stages_ns"] is None
    assert [r["forwards"] for r in by_phase(rows)] == [101, 101]
    assert by_phase(rows)[0]["layers"] == 2


@pytest.mark.parametrize(
    ("forwards", "p90", "p99"),
    [(9, False, False), (10, True, False), (99, True, False), (100, True, True)],
)
def test_a_percentile_takes_forwards_above_it(forwards: int, p90: bool, p99: bool) -> None:
    (found,) = by_layer([row(s, 100.0 + s) for s in range(forwards)])
    assert (found["p90_ns"] is not None, found["p99_ns"] is not None) == (p90, p99)
    assert found["max_ns"] == 99 + forwards
    assert found["p50_ns"] == 100 + (forwards - 1) / 2


def test_ceilings_that_forwards_went_beyond() -> None:
    # 1,000 operations and 500 bytes in 100 ns and in 50 ns.
    rows = [row(0, 100.0), row(1, 50.0)]
    assert beaten(rows, Ceiling(bytes_per_s=10e9, flop_per_s=20e9)) == []
    assert beaten(rows, Ceiling(bytes_per_s=8e9, flop_per_s=16e9)) == [
        {"what": "matmul", "forwards": 1, "by": pytest.approx(1.25)},
        {"what": "memory", "forwards": 1, "by": pytest.approx(1.25)},
    ]
    (memory,) = beaten(rows, Ceiling(bytes_per_s=2e9, flop_per_s=1e12))
    assert (memory["what"], memory["forwards"], memory["by"]) == ("memory", 2, pytest.approx(5))
    assert beaten([row(0, 0.0)], Ceiling(1.0, 1.0)) == []


def test_stages_that_were_measured() -> None:
    rows = [row(s, 100.0, plan_ns=1.0 + s, down_ns=5.0) for s in range(3)]
    assert by_layer(rows)[0]["stages_ns"] == {"plan": 2.0, "down": 5.0}


def test_noise_of_single_forwards_cancels_and_drift_does_not() -> None:
    independent = by_phase([row(s, 100.0, noise_ns=8.0) for s in range(16)])[0]
    assert independent["noise"] == pytest.approx(0.08 / 4)
    drifting = by_phase([row(s, 100.0, again_ns=105.0) for s in range(16)])[0]
    assert drifting["noise"] == pytest.approx(0.05)


def test_no_difference_is_said_below_the_noise() -> None:
    assert not differs(1.02, 0.03)
    assert differs(0.96, 0.03)
    (same,) = answers([row(s, 104.0, noise_ns=9.0) for s in range(3)])
    assert same.startswith("decode: this routing costs what a balanced one costs (3 forwards, 1 la")
    (more,) = answers([row(s, 107.0, noise_ns=1.0, same_touched_ns=107.0) for s in range(3)])
    assert "costs 7.0 % more than a balanced one" in more
    assert more.endswith(", and as much as a balanced one over the experts it touches.")
    (less,) = answers([row(s, 90.0, same_touched_ns=75.0, dropped=5) for s in range(3)])
    assert "costs 10.0 % less than a balanced one" in less
    assert "20.0 % more than a balanced one over the experts it touches" in less
    assert "25.0 % of the choices were dropped, and the balanced twin runs as few" in less


def test_one_or_two_forwards_make_no_verdict() -> None:
    (few,) = answers([row(s, 150.0) for s in range(2)])
    assert few == (
        "decode: 1.50× a balanced routing; too few to call it more or less "
        "(2 forwards, 1 layer; A/A noise 0.7 %)."
    )


def test_nothing_ran() -> None:
    nothing = row(0, 5.0, slots=0, touched=0, floor_ns=0.0, balanced_ns=0.0, flop=0)
    (found,) = by_layer([nothing])
    assert math.isnan(found["over_floor"])
    assert answers([nothing]) == ["decode: no expert computed anything (1 forward, 1 layer; "
                                  "A/A noise 1.0 %)."]  # fmt: skip
