"""`moe-lens counterfactual` as a user meets it: its page, its JSON, its mistakes, Ctrl-C."""

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

    def forward(self, input_ids):
        return self.head(self.inner(input_ids))

def model():
    return Speaking().eval()

def batches():
    text = torch.arange(40).view(4, 10) % 32
    yield {"input_ids": text, "tags": ["code", "prose", "code", "prose"]}

def squared(model, batch):
    return model(**batch).square().mean(-1)

def broken():
    raise KeyError("weights")

def number():
    return 3

def stops(model, batch):
    stops.calls += 1
    if stops.calls == 8:
        raise KeyboardInterrupt
    return squared(model, batch)
stops.calls = 0
"""


def moe_lens(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    support = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": support, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "moe_lens", *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=env, timeout=180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, and the trace of its model."""
    path = tmp_path_factory.mktemp("lab")
    (path / "lab.py").write_text(LAB, encoding="utf-8")
    script = "import lab\nlab.model()(next(lab.batches())['input_ids'])"
    (path / "record.py").write_text(script, encoding="utf-8")
    done = moe_lens(path, "record", "--out", "traces", "record.py")
    assert done.returncode == 0, done.stderr
    (made,) = (path / "traces").iterdir()
    made.rename(path / "run")
    return path


@pytest.fixture(scope="module")
def measured(folder: Path) -> subprocess.CompletedProcess[str]:
    return moe_lens(
        folder, "counterfactual", "run", "--model", "lab:model", "--data", "lab:batches",
        "--regret-tokens", "12", "--alternatives", "3",
    )  # fmt: skip


def test_the_page(measured: subprocess.CompletedProcess[str]) -> None:
    assert measured.returncode == 0, measured.stderr
    page = measured.stdout
    assert "36 tokens of 4 sequences" in page  # the last of each has no loss
    for words in ("Route regret", "of a drawn", "beats", "prose", "entropy 4 of 4", "forced in"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 110
    assert "Traceback" not in measured.stderr


def test_the_result_is_printed_again(
    folder: Path, measured: subprocess.CompletedProcess[str]
) -> None:
    again = moe_lens(folder, "counterfactual", "run")
    assert again.returncode == 0, again.stderr
    assert again.stdout == measured.stdout
    said = json.loads(moe_lens(folder, "counterfactual", "run", "--json").stdout)
    assert len(said["experts"]) == 2 * 4
    assert sum(x["load"] for x in said["experts"] if x["layer"] == 0) == pytest.approx(2)
    assert {x["slice"] for x in said["regret_by_tag"]} == {"code", "prose"}
    assert [x["tokens"] for x in said["regret"]] == [12, 12]


def test_limits_and_a_loss_of_ones_own(folder: Path) -> None:
    done = moe_lens(
        folder, "counterfactual", "run", "--model", "lab.py:model", "--data", "lab.py:batches",
        "--loss", "lab:squared", "--layers", "1", "--experts", "0-1", "--tokens", "20",
        "--regret-tokens", "0", "--name", "few", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(x["layer"], x["expert"]) for x in said["experts"]] == [(1, 0), (1, 1)]
    assert said["about"]["measured_tokens"] == 20
    assert said["regret"] == []
    assert (folder / "run" / "counterfactual" / "few.parquet").exists()


def test_ctrl_c_keeps_what_was_measured(folder: Path) -> None:
    done = moe_lens(
        folder, "counterfactual", "run", "--model", "lab:model", "--data", "lab:batches",
        "--loss", "lab:stops", "--name", "cut",
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "(interrupted: partial)" in done.stdout
    assert "what was measured so far is in" in done.stderr
    assert moe_lens(folder, "counterfactual", "run", "--name", "cut").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "lab:model"], "belong together"),
        (
            ["--model", "lab", "--data", "lab:batches"],
            "takes module:name or file.py:name, got 'lab'",
        ),
        (["--model", "none:x", "--data", "lab:batches"], "No module named 'none'"),
        (["--model", "none.py:x", "--data", "lab:batches"], "no file none.py"),
        (["--model", "lab:nothing", "--data", "lab:batches"], "has no 'nothing'"),
        (["--model", "lab:broken", "--data", "lab:batches"], "KeyError: 'weights' ("),
        (["--model", "lab:number", "--data", "lab:batches"], "must return a torch.nn.Module"),
        (["--model", "lab:model", "--data", "lab:number"], "gave a int; it must give batches"),
        (["--model", "lab:model", "--data", "lab:batches", "--layers", "2"], "the model has 2"),
        (["--model", "lab:model", "--data", "lab:batches", "--experts", "x"], "--experts takes"),
        (["--name", "absent"], "has no result 'absent': measure one"),
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
    done = CliRunner().invoke(app, ["counterfactual", "run", *words])
    assert isinstance(done.exception, MoeLensError), done.exception
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_mistake_ends_without_a_traceback(folder: Path) -> None:
    done = moe_lens(folder, "counterfactual", "run", "--model", "lab:broken", "--data", "lab:x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model lab:broken: KeyError: 'weights' (")
    assert len(done.stderr.splitlines()) == 1
