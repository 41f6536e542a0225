"""`moe-lens precision` as a user meets it: its page, its JSON, its mistakes, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import MoeLensError

LAB = """
import torch
from torch import nn
from support.models import TinyModel

class Speaking(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = TinyModel(experts=4, top_k=2), nn.Linear(8, 32)
        for block in self.inner.blocks:
            block.experts.is_transposed = True

    def forward(self, input_ids):
        return self.head(self.inner(input_ids))

def model():
    return Speaking().eval()

def unsaid():
    made = model()
    for block in made.inner.blocks:
        del block.experts.is_transposed
    return made

def batches():
    yield torch.arange(40).view(4, 10) % 32

def squared(model, batch):
    return model(batch).square().mean(-1)

def stops(model, batch):
    stops.calls += 1
    if stops.calls == 9:
        raise KeyboardInterrupt
    return squared(model, batch)
stops.calls = 0
"""


def moe_lens(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    support = str(Path(__file__).parents[2])
    path = os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "moe_lens", *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=env, timeout=180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, and the trace of its model."""
    path = tmp_path_factory.mktemp("lab")
    (path / "lab.py").write_text(LAB, encoding="utf-8")
    script = "import lab\nlab.model()(next(lab.batches()))"
    (path / "record.py").write_text(script, encoding="utf-8")
    done = moe_lens(path, "record", "--out", "traces", "record.py")
    assert done.returncode == 0, done.stderr
    (made,) = (path / "traces").iterdir()
    made.rename(path / "run")
    return path


@pytest.fixture(scope="module")
def measured(folder: Path) -> subprocess.CompletedProcess[str]:
    return moe_lens(
        folder, "precision", "run", "--model", "lab:model", "--data", "lab.py:batches",
        "--formats", "int8, int2",
    )  # fmt: skip


def test_the_page(measured: subprocess.CompletedProcess[str]) -> None:
    assert measured.returncode == 0, measured.stderr
    page = measured.stdout
    assert "36 tokens of 4 sequences" in page  # the last of each has no loss
    for words in ("arithmetic", "Routes by layer", "by the router's margin", "by usage", "int2"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 110
    assert "Traceback" not in measured.stderr
    assert "refused" not in page


def test_the_result_is_printed_again(
    folder: Path, measured: subprocess.CompletedProcess[str]
) -> None:
    again = moe_lens(folder, "precision", "run")
    assert again.returncode == 0, again.stderr
    assert again.stdout == measured.stdout
    said = json.loads(moe_lens(folder, "precision", "run", "--json").stdout)
    assert [(x["format"], x["part"]) for x in said["loss"]] == [
        (f, p) for f in ("int8", "int2") for p in ("router", "experts", "both")
    ]
    assert len(said["routes"]) == 2 * 3 * 3 * 2
    assert len(said["weights"]) == 2 * 2 * (1 + 4)
    assert {x["bucket"] for x in said["flips"]} == {1, 2, 3, 4}


def test_ctrl_c_keeps_what_was_measured(folder: Path) -> None:
    done = moe_lens(
        folder, "precision", "run", "--model", "lab:model", "--data", "lab:batches",
        "--loss", "lab:stops", "--name", "cut", "--layers", "1", "--parts", "router",
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "(interrupted: partial)" in done.stdout
    assert "what was measured so far is in" in done.stderr
    assert (folder / "run" / "precision" / "cut-interrupted.parquet").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "lab:batches"], "belong together"),
        (["--model", "lab:nothing", "--data", "lab:batches"], "has no 'nothing'"),
        (["--model", "lab:model", "--data", "lab:model"], "gave a Speaking; it must give batches"),
        (
            ["--model", "lab:model", "--data", "lab:batches", "--formats", "int5x"],
            "'int5x' is none",
        ),
        (["--model", "lab:model", "--data", "lab:batches", "--parts", "gates"], "'gates' is none"),
        (["--model", "lab:model", "--data", "lab:batches", "--parts", ","], "nothing to round"),
        (["--model", "lab:model", "--data", "lab:batches", "--layers", "2"], "the model has 2"),
        (["--model", "lab:unsaid", "--data", "lab:batches"], "is_transposed"),
        (["--name", "absent"], "has no result 'absent': measure one"),
        (["--name", "../x"], "name of a file"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setitem(sys.modules, "lab", None)
    monkeypatch.delitem(sys.modules, "lab")
    done = CliRunner().invoke(app, ["precision", "run", *words])
    assert isinstance(done.exception, MoeLensError), done.exception
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
