"""Every page of tables at 80 and at 60 columns: nothing is cut, and every number is there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console, ConsoleDimensions
from support.counterfactuals import made_up, said
from support.paired_prompts import by_id, by_last, write_prompts
from support.precisions import token_rows, weight_rows
from support.traces import write_run
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.terminal.counterfactual import print_counterfactual
from moe_lens.terminal.precision import print_precision
from moe_lens.trace import synthetic

PAGES = {
    "report": "report {served}",
    "check": "check {served}",
    "place": "place {served} --ranks 4",
    "diff": "diff {written} {other}",
    "cache": "cache {served}",
    "analyze": "analyze {served}",
    "analyze of two layers": "analyze {written} --only balance,confidence",
    "context": "context {served}",
    "context of pairs": "context {pairs} --prefix 4,50% --after 4",
}
CHOSEN_BY_WIDTH = {"report", "analyze of two layers"}
"""They show less where there is less room."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("traces")
    spec = synthetic.Spec(layers=6, experts=16, phases=("serve",), length=48, steps=2)
    synthetic.generate(folder / "served", spec)
    write_run(folder / "written", seed=0)
    write_run(folder / "other", seed=1)
    first, second = list(range(10, 22)), list(range(40, 50))
    prompts = [("p", "a", first + second), ("p", "b", second + first), ("q", "a", first)]
    write_prompts(folder / "pairs", [*prompts, ("q", "a", first)], [by_id, by_last])
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives every page so many columns, whatever its command asks for."""

    def of(columns: int) -> None:
        size = property(lambda self: ConsoleDimensions(columns, 25), lambda self, asked: None)
        monkeypatch.setattr(Console, "size", size)
        monkeypatch.setattr(
            Console, "width", property(lambda self: columns, lambda self, asked: None)
        )

    return of


def assert_whole(page: Callable[[int], str], width: int, *, all_of_it: bool = True) -> None:
    text = without_paths(page(width))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert tables(text) > 0
    if all_of_it:
        assert not numbers(without_paths(page(120))) - numbers(text)


def without_paths(text: str) -> str:
    """A path stays one line, to be copied."""
    kept = (line for line in text.splitlines() if not re.search(r"\.(parquet|json)$", line))
    return "\n".join(kept)


def tables(text: str) -> int:
    return len(re.findall(r"^ *─+$", text, re.M))


def numbers(text: str) -> set[str]:
    return set(re.findall(r"[-+]?\d[\d.,]*", text))


def columns_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {str(name): x.to_numpy() for name, x in pd.DataFrame(rows).items()}


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("page", PAGES)
def test_pages_of_commands(
    runs: dict[str, Path], wide: Callable[[int], None], page: str, width: int
) -> None:
    words = PAGES[page].format(**runs).split()

    def at(columns: int) -> str:
        wide(columns)
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.exception
        return done.stdout

    assert_whole(at, width, all_of_it=page not in CHOSEN_BY_WIDTH)


@pytest.mark.parametrize(
    "page", ["report", "cache", "context --prefix 4 --after 4", "place --ranks 2"]
)
def test_one_of_a_thing_is_no_plural(tmp_path: Path, page: str) -> None:
    spec = synthetic.Spec(steps=1, sequences=1, length=40, layers=1, experts=8)
    synthetic.generate(tmp_path / "run", spec)
    command, *options = page.split()
    text = CliRunner().invoke(app, [command, str(tmp_path / "run"), *options]).stdout
    assert re.search(r"\b1 (step|forward|sequence)\b", text)
    assert not re.search(r"(?<![\d.,])1 [a-z]+s\b", text)


@pytest.mark.parametrize("width", [80, 60])
def test_counterfactual(width: int) -> None:
    rows = made_up()

    def at(columns: int) -> str:
        out = io.StringIO()
        console = Console(file=out, width=columns, highlight=False)
        print_counterfactual(console, said(rows), columns_of(rows), "a.parquet")
        return out.getvalue()

    assert_whole(at, width)


@pytest.mark.parametrize("width", [80, 60])
def test_precision(width: int) -> None:
    rows = [*weight_rows(), *token_rows()]
    about = {
        "model": "Tiny", "measured_tokens": 24, "sequences": 3, "interrupted": False, "refused": {},
    }  # fmt: skip

    def at(columns: int) -> str:
        out = io.StringIO()
        console = Console(file=out, width=columns, highlight=False)
        print_precision(console, about, columns_of(rows), "a.parquet")
        return out.getvalue()

    assert_whole(at, width)
