"""The paths in `moe-lens analyze`: below a phase's tables, where transitions are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.traces import write_run
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.queries.paths import paths
from moe_lens.queries.session import open_trace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    write_run(path, layers=3)
    return path


def invoked(*words: object) -> str:
    done = CliRunner().invoke(app, ["analyze", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def said(*words: object) -> list[dict[str, Any]]:
    phases: list[dict[str, Any]] = json.loads(invoked("--json", *words))
    return phases


def test_one_answer_a_phase(run: Path) -> None:
    for phase in said(run, "--only", "transitions"):
        with open_trace(run) as trace:
            wanted = paths(trace, phase["phase"])["main"]
        (found,) = phase["paths"]
        assert (found["stream"], found["layers"]) == ("main", 3)
        assert found["tokens"] == wanted.tokens > 0
        assert found["answer"].startswith(f"{wanted.tokens} tokens take ")
        for name, value in wanted.values.items():
            cell = found["measures"][name]
            assert cell["value"] == pytest.approx(value, nan_ok=True) or cell["value"] is None
            assert cell["beyond"] == wanted.chance[name].beyond(value)
    page = " ".join(invoked(run, "--only", "transitions", "--phase", "eval").split())
    assert f"paths main: {said(run, '--phase', 'eval')[0]['paths'][0]['answer']}" in page


def test_layers_that_are_asked_for(run: Path) -> None:
    (phase,) = said(run, "--only", "transitions", "--phase", "eval", "--layers", "0-1")
    assert phase["paths"][0]["layers"] == 2
    (phase,) = said(run, "--only", "transitions", "--phase", "eval", "--layers", "1")
    assert phase["paths"] == []


@pytest.mark.parametrize("only", ["balance", "affinity"])
def test_other_questions_read_no_paths(run: Path, only: str) -> None:
    assert [phase["paths"] for phase in said(run, "--only", only)] == [[], []]
    assert "paths" not in invoked(run, "--only", only).split()


def test_counts_alone_have_no_paths(tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False)
    page = " ".join(invoked(tmp_path / "run", "--only", "transitions").split())
    assert "paths" not in page.split()
    assert "no per-token rows: record with tokens=1.0" in page
