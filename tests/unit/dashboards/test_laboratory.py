"""Tables of the laboratory on the page Granularity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.laboratories import made_up

from moe_lens.queries.laboratory import laboratory
from moe_lens_dashboards.laboratory import region_table


def test_regions_of_several_drawn_routers_are_a_span(tmp_path: Path) -> None:
    made_up(tmp_path)
    found = region_table(laboratory(tmp_path).table("regions")).to_dict("records")
    assert [r["regions"] for r in found] == ["18–26", "22"]
    assert [r["router"] for r in found] == ["3 random", "teacher 16e8a"]
    assert [r["median"] for r in found] == [24, 22]
    assert found[0]["possible"] == pytest.approx(math.comb(16, 8))
