"""Tables of rounded weights, against plain loops over made-up rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from support.precisions import FORMATS, token_rows, weight_rows

from moe_lens.metrics.precision import (
    flips_by_margin,
    layer_errors,
    loss_split,
    routing_agreement,
    weight_errors,
)

ROWS = [*weight_rows(), *token_rows()]


def columns(rows=ROWS):
    return {name: x.to_numpy() for name, x in pd.DataFrame(rows).items()}


def having(**keys):
    return [r for r in ROWS if all(r[k] == v for k, v in keys.items())]


def test_agreement_by_layer():
    found = routing_agreement(columns())
    assert len(found) == 2 * 2 * 3 * 2
    assert list(found.format.unique()) == list(FORMATS)  # in the order of the measurement
    for row in found.to_dict("records"):
        rows = having(**{k: row[k] for k in ("format", "part", "mode", "layer")})
        assert row["tokens"] == len(rows) == 24
        assert row["agreement"] == pytest.approx(sum(r["agreement"] for r in rows) / 24)
        assert row["flipped"] == pytest.approx(sum(r["agreement"] < 1 for r in rows) / 24)
        assert row["kl"] == pytest.approx(sum(r["kl"] for r in rows) / 24)
        sums = [sum(r["agreement"] for r in rows if r["sequence"] == s) for s in range(3)]
        spread = sum((x - sum(sums) / 3) ** 2 for x in sums)  # of sequences of one length
        assert row["agreement_error"] == pytest.approx((3 / 2 * spread) ** 0.5 / 24)


def test_the_cost_is_arithmetic_and_routing():
    found = loss_split(columns())
    assert len(found) == 4
    for row in found.to_dict("records"):
        keys = {"format": row["format"], "part": row["part"], "layer": 0}
        forced, free = (having(**keys, mode=m) for m in ("forced", "free"))
        arithmetic = [r["loss"] - r["base_loss"] for r in forced]
        routing = [b["loss"] - a["loss"] for a, b in zip(forced, free, strict=True)]
        assert row["tokens"] == 24  # each once, whatever the layers
        assert row["arithmetic"] == pytest.approx(sum(arithmetic) / 24)
        assert row["routing"] == pytest.approx(sum(routing) / 24)
        assert row["total"] == pytest.approx(row["arithmetic"] + row["routing"])


def test_after_ctrl_c_tokens_count_that_were_measured_both_ways():
    rows = [r for r in ROWS if r["mode"] != "free" or r["sequence"] == 0]
    found = loss_split(columns(rows))
    assert found.tokens.tolist() == [8] * 4
    assert found.total_error.isna().all()  # of one sequence nothing is known
    assert loss_split(columns([r for r in ROWS if r["mode"] != "free"])).empty


@pytest.mark.parametrize("buckets", [1, 3, 4])
def test_flips_by_quantiles_of_each_layers_margins(buckets):
    found = flips_by_margin(columns(), buckets=buckets, mode="free")
    assert len(found) == 4 * buckets
    for row in found.to_dict("records"):
        part = []
        for layer in range(2):
            rows = having(format=row["format"], part=row["part"], mode="free", layer=layer)
            rows.sort(key=lambda r: r["margin"])
            size = 24 // buckets
            part += rows[(row["bucket"] - 1) * size : row["bucket"] * size]
        assert row["tokens"] == len(part)
        assert row["flipped"] == pytest.approx(np.mean([r["agreement"] < 1 for r in part]))
        assert row["agreement"] == pytest.approx(np.mean([r["agreement"] for r in part]))
        margins = [r["margin"] for r in part]
        assert (row["least"], row["most"]) == (min(margins), max(margins))


def test_what_is_not_known_is_left_out():
    rows = [r | {"agreement": np.nan} if r["layer"] == 1 else r for r in ROWS]
    table = routing_agreement(columns(rows)).set_index("layer")
    assert table.loc[1, ["agreement", "flipped"]].isna().all(axis=None)
    assert table.loc[0].agreement.notna().all()
    assert set(flips_by_margin(columns(rows)).tokens) == {6}


def test_errors_of_weights():
    found = weight_errors(columns())
    assert len(found) == 16
    for row, mine in zip(weight_rows(), found.to_dict("records"), strict=True):
        assert mine["weighted"] == pytest.approx(row["error"] * row["usage"], nan_ok=True)
    for row in layer_errors(columns()).to_dict("records"):
        rows = having(mode="weights", part="experts", format=row["format"], layer=row["layer"])
        usage = sum(r["usage"] for r in rows)
        assert row["error"] == pytest.approx(sum(r["error"] for r in rows) / 3)
        assert row["used_error"] == pytest.approx(
            sum(r["error"] * r["usage"] for r in rows) / usage
        )
        assert row["worst"] == max(rows, key=lambda r: r["error"] * r["usage"])["expert"]
        assert row["outlier"] == max(r["outlier"] for r in rows)


def test_no_rows_are_empty_tables():
    nothing = {name: x[:0] for name, x in columns().items()}
    for table in (routing_agreement, loss_split, flips_by_margin, weight_errors, layer_errors):
        assert table(nothing).empty
        assert len(table(nothing).columns) > 4
