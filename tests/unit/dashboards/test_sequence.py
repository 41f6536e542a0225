"""A sequence as a table with a row a token."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_lens_dashboards.sequence import LOST, token_table


def row(position: int, layer: int, experts: list[int], dropped: list[int] | None) -> dict:
    return {
        "position": position, "token_id": 7, "layer": layer, "expert_ids": np.array(experts),
        "dropped": None if dropped is None else np.array(dropped), "loss": 0.5,
    }  # fmt: skip


def test_experts_by_layer_with_what_was_dropped() -> None:
    rows = [row(0, 0, [3, 5], None), row(0, 4, [1, 0], [0, 1]), row(2, 0, [5, 2], [1])]
    table = token_table(pd.DataFrame(rows), 10)
    assert list(table.columns) == ["position", "token_id", "loss", "dropped", "layer 0", "layer 4"]
    assert table.to_numpy().tolist() == [
        [0, 7, 0.5, 2, "3, 5", f"1{LOST}, 0{LOST}"],
        [2, 7, 0.5, 1, f"5, 2{LOST}", ""],
    ]


def test_a_position_that_was_routed_again_has_a_row_for_each_time() -> None:
    rows = [row(0, 0, [1], None), row(0, 0, [2], None), row(0, 1, [3], None), row(0, 1, [4], None)]
    table = token_table(pd.DataFrame(rows), 10)
    assert table[["layer 0", "layer 1"]].to_numpy().tolist() == [["1", "3"], ["2", "4"]]


def test_at_most_so_many_tokens_and_whole_ones() -> None:
    rows = [row(position, layer, [1], None) for position in range(9) for layer in (0, 1)]
    table = token_table(pd.DataFrame(rows), 4)
    assert list(table["position"]) == [0, 1, 2, 3]
    assert set(table["layer 1"]) == {"1"}
