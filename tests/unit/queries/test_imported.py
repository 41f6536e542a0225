"""What imported traces do not tell: zeros of drops become null, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd

from moe_lens.metrics.catalogue import metrics
from moe_lens.metrics.evidence import DATA
from moe_lens.queries.imported import no_drops, reasons

TABLE = pd.DataFrame(
    {"tag": ["a", "b"], "routed": [3, 4], "dropped": [0, 0], "dropped_rate": [0.0, 0.0]}
)


def run(imported: str = "x: f", no_rows: str = "", **lacks: str) -> Any:
    return SimpleNamespace(
        imported=imported, lacks=lacks, no_rows=no_rows, knows_drops=not imported
    )


def test_zeros_of_drops_are_taken_out() -> None:
    found = no_drops(TABLE, run())
    assert found[["dropped", "dropped_rate"]].isna().all().all()
    assert found["routed"].tolist() == [3, 4]
    assert TABLE["dropped"].tolist() == [0, 0]
    assert no_drops(TABLE, run(imported="")) is TABLE


def test_lists_and_groups_stay() -> None:
    slots = pd.DataFrame({"dropped": [[0], None]})
    groups = pd.DataFrame({"dropped": [True, False]})
    assert no_drops(slots, run())["dropped"].tolist() == [[0], None]
    assert no_drops(groups, run())["dropped"].tolist() == [True, False]


def test_reasons_are_of_fields_and_metrics_that_exist() -> None:
    found = reasons(run(entropy="no logits", weights="ids alone"))
    assert set(found) <= {*DATA, *metrics()}
    assert found["prob_V"].endswith("imported from x (no logits)")
    assert found["weight_TV"] == "no gate weights: imported from x (ids alone)"
    assert found["dropped_N"] == "no drops: imported from x, which does not hold that"
    assert reasons(run(imported="")) == {}


def test_where_no_rows_are_that_is_the_reason() -> None:
    found = reasons(run(no_rows="no per-token rows: counts"))
    assert found["logits_TV"] == found["ranked"] == "no per-token rows: counts"
    assert found["gate_E"].startswith("no sums of gate weights")
