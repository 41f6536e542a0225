"""What the laboratory prints: its numbers, the author's where they belong, the width kept."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from moe_lens.granularity.published import SOURCE
from moe_lens.terminal.granularity import print_lab

ABOUT = {"preset": "quick", "kind": "linear", "hidden": 32, "seed": 4, "steps": 4_000, "batch": 512}
STUDENT = {
    "teacher": "16e8a", "teacher_top_k": 8, "student": "4e2a", "experts": 4, "top_k": 2,
    "width": 20, "nmse": 0.25199, "fvu": 0.31111, "affine_nmse": 0.36222, "affine_fvu": 0.44,
    "zero_fvu": 1.2, "sets_used": 6, "sets_tokens": 32_768, "possible": 6.0,
    "learning_rate": 0.01, "seconds": 12.34, "published": None,
}  # fmt: skip
TABLES: dict[str, list[dict[str, Any]]] = {
    "gap": [
        STUDENT | {"student": "16e8a", "top_k": 8, "nmse": 0.00015, "possible": 12_870.0},
        STUDENT,
    ],
    "sweeps": [STUDENT | {"swept": "width", "factor": 16.0, "nmse": 0.24777, "width": 320}],
    "regions": [
        {"where": "circle", "router": "random", "experts": 64, "top_k": 8, "draw": draw,
         "regions": regions, "possible_bits": 32.0433}
        for draw, regions in enumerate([46, 52, 44])
    ] + [{"where": "plane", "router": "teacher 16e8a", "experts": 16, "top_k": 8, "draw": 0,
          "regions": 23, "possible_bits": 13.6517}],
    "configurations": [{"hidden": 4, "experts": 16, "top_k": 8, "tokens": 200_000, "used": 428,
                        "coverage": 0.99991, "at_least": 431.2, "possible": 12_870}],
}  # fmt: skip


def printed(tables: dict[str, list[dict[str, Any]]], source: str = "", width: int = 100) -> str:
    out = io.StringIO()
    print_lab(Console(file=out, width=width, highlight=False), tables, ABOUT, source)
    return out.getvalue()


def cells(text: str, *words: str) -> list[str]:
    """The one line that begins with these words."""
    (found,) = [line for line in text.splitlines() if line.split()[: len(words)] == list(words)]
    return found.split()[len(words) :]


def test_each_table_has_its_numbers() -> None:
    text = printed(TABLES)
    assert "linear experts, hidden size 32, seed 4, 4,000 steps of 512 new tokens" in text
    assert cells(text, "16e8a", "16e8a") == [
        "20", "0.00015", "0.362", "1", "0.311", "6", "12,870", "12.3",
    ]  # fmt: skip
    assert cells(text, "16e8a", "4e2a")[1] == "0.252"
    assert cells(text, "width", "4e2a")[:3] == ["16", "320", "0.248"]
    assert cells(text, "circle", "3", "random") == ["64", "8", "44–52", "46", "4.4e+09"]
    assert cells(text, "plane", "teacher", "16e8a") == ["16", "8", "23", "23", "12,870"]
    assert cells(text, "16e8a", "4", "428") == ["431", "0.9999", "12,870"]
    assert "author" not in text


def test_the_authors_numbers_stand_beside_ours_with_their_source() -> None:
    gap = [TABLES["gap"][0] | {"published": 4.4e-5}, TABLES["gap"][1]]
    text = printed(TABLES | {"gap": gap}, SOURCE)
    assert cells(text, "16e8a", "16e8a")[-1] == "4.4e-05"
    assert cells(text, "16e8a", "4e2a")[-1] == "–"
    assert "eboix/secret_moe" in text


def test_a_training_that_diverged() -> None:
    text = printed(TABLES | {"gap": [STUDENT | {"nmse": float("inf"), "fvu": float("nan")}]})
    row = cells(text, "16e8a", "4e2a")
    assert (row[1], row[4]) == ("inf", "nan")


def test_without_sweeps_there_is_no_heading_of_them() -> None:
    assert "larger layers" in printed(TABLES)
    assert "larger layers" not in printed(TABLES | {"sweeps": []})


@pytest.mark.parametrize("width", [70, 100, 200])
def test_lines_keep_to_the_width(width: int) -> None:
    lines = printed(TABLES, SOURCE, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
