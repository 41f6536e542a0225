"""Tables of the laboratory on the page Granularity, against those of the laboratory itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.laboratories import made_up

from moe_lens.granularity import findings
from moe_lens.queries.laboratory import laboratory
from moe_lens_dashboards.laboratory import gap, region_table, sweeps


def same(got: pd.DataFrame, expected: list[dict[str, Any]]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got.to_dict("records"), expected, strict=True):
        assert set(theirs) == set(mine)
        for name, value in theirs.items():
            found = mine[name]
            if value is None:
                assert found is None or math.isnan(found), name
            else:
                assert found == pytest.approx(value), name


@pytest.mark.parametrize("preset", ["quick", "relu", "constant", "paper"])
@pytest.mark.parametrize("finished", [None, 0, 5])
def test_they_are_what_the_laboratory_prints(
    tmp_path: Path, preset: str, finished: int | None
) -> None:
    plan, rows = made_up(tmp_path, preset, finished=finished, seed=1)
    found = laboratory(tmp_path)
    same(gap(found), findings.gap(plan, rows))
    same(sweeps(found), findings.sweeps(plan, rows))
    if preset == "paper" and finished is None:
        assert gap(found)["published"].notna().sum() == 64
        assert sweeps(found)["published"].notna().sum() == 20
    else:
        assert gap(found)["published"].isna().all() or finished


def test_students_of_another_number_of_experts(tmp_path: Path) -> None:
    for place, students in enumerate([[(16, 2)], [(4, 2), (16, 2), (4, 4)], [(8, 4), (4, 4)]]):
        plan, rows = made_up(tmp_path / str(place), students=students)
        found = laboratory(tmp_path / str(place))
        same(gap(found), findings.gap(plan, rows))
        same(sweeps(found), findings.sweeps(plan, rows))
        assert len(gap(found)) > 0


def test_regions_of_several_drawn_routers_are_a_span(tmp_path: Path) -> None:
    made_up(tmp_path)
    found = region_table(laboratory(tmp_path).table("regions")).to_dict("records")
    assert [r["regions"] for r in found] == ["18–26", "22"]
    assert [r["router"] for r in found] == ["3 random", "teacher 16e8a"]
    assert [r["median"] for r in found] == [24, 22]
    assert found[0]["possible"] == pytest.approx(math.comb(16, 8))
