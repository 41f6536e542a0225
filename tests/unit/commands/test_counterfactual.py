"""`moe-lens counterfactual` as a user meets it: its page, its JSON, its mistakes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_lens.cli import app
from moe_lens.errors import CommandError, MoeLensError
from moe_lens_hooks.steering import passes

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

class Other(Speaking):
    pass

def other():
    return Other().eval()

def late():
    yield torch.arange(10).view(1, 10)
    raise OSError("the disk\\nis gone")

def beyond():
    return [torch.full((2, 10), 99)]

def words():
    return ["hello"]

def empty():
    return [torch.zeros(2, 0, dtype=torch.long)]

def undefined(model, batch):
    return squared(model, batch) + unheard_of

def full(model, batch):
    raise torch.OutOfMemoryError("CUDA out of memory")

def leaves():
    raise SystemExit("no weights")

def cut(*given):
    raise KeyboardInterrupt

def stops(model, batch):
    stops.calls += 1
    if stops.calls == 8:
        raise KeyboardInterrupt
    return squared(model, batch)
stops.calls = 0
"""

PARSES = """
import argparse, sys

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=8)
assert parser.parse_args().width == 8
from lab import Speaking

def model():
    assert sys.argv == ["parses.py"]
    return Speaking().eval()
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
    (path / "parses.py").write_text(PARSES, encoding="utf-8")
    (path / "wrong.py").write_text("x = 1\ndef y(:\n", encoding="utf-8")
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


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder, in this process; its modules are read anew."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("lab", "parses"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


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
        (
            ["--model", "lab:squared", "--data", "lab:batches"],
            "is called as squared(): missing a required argument: 'model'",
        ),
        (["--model", "wrong:y", "--data", "lab:batches"], "wrong.py, line 2)"),
        (["--model", "lab:leaves", "--data", "lab:batches"], "(sys.exit('no weights') in "),
        (["--model", "lab:model", "--data", "lab:late"], "OSError: the disk is gone ("),
        (["--model", "lab:model", "--data", "lab:beyond"], "IndexError: index out of range"),
        (["--model", "lab:model", "--data", "lab:words"], "arguments, got str"),
        (["--model", "lab:model", "--data", "lab:empty"], "the batch is empty: [2, 0]"),
        (
            ["--model", "lab:model", "--data", "lab:batches", "--loss", "lab:number"],
            "--loss lab:number is called as number(model, batch): too many positional",
        ),
        (
            ["--model", "lab:model", "--data", "lab:batches", "--loss", "lab:torch"],
            "--loss lab:torch is a module, not a function",
        ),
        (
            ["--model", "lab:model", "--data", "lab:batches", "--loss", "lab:undefined"],
            "'unheard_of' is not defined (",
        ),
        (
            ["--model", "lab:model", "--data", "lab:batches", "--loss", "lab:full"],
            "tokens_at_once=20 (--tokens-at-once)",
        ),
    ],
)
def test_a_mistake_is_one_line(here: None, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["counterfactual", "run", *words])
    assert isinstance(done.exception, MoeLensError), done.exception
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_mistake_ends_without_a_traceback(folder: Path) -> None:
    done = moe_lens(folder, "counterfactual", "run", "--model", "lab:broken", "--data", "lab:x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model lab:broken: KeyError: 'weights' (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "lab:late"], "raise OSError("),
        (["--data", "lab:batches", "--loss", "lab:undefined"], "unheard_of"),
        (["--data", "lab:beyond"], "x = self.embed(input_ids)"),  # of a module that lab imports
    ],
)
def test_the_line_that_failed_is_named(here: None, words: list[str], line: str) -> None:
    done = CliRunner().invoke(app, ["counterfactual", "run", "--model", "lab:model", *words])
    assert isinstance(done.exception, CommandError), done.exception
    where = re.search(r"\((\S+), line (\d+)\)$", str(done.exception))
    assert where is not None, done.exception
    assert line in Path(where[1]).read_text(encoding="utf-8").splitlines()[int(where[2]) - 1]


def test_an_error_of_ours_keeps_its_traceback(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile("def broken(*args):\n    raise RuntimeError('ours')", passes.__file__, "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setattr(passes.Passes, "changed", names["broken"])
    done = CliRunner().invoke(
        app, ["counterfactual", "run", "--model", "lab:model", "--data", "lab:batches"]
    )
    assert isinstance(done.exception, RuntimeError), done.exception


@pytest.mark.parametrize("command", ["counterfactual", "precision"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothere"], "nothere does not exist"),
        (["run", "--name", "../x"], "--name is the name of a file"),
    ],
)
def test_the_run_is_looked_at_before_the_model(
    here: None, command: str, words: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, [command, *words, "--model", "no:model", "--data", "no:data"])
    assert isinstance(done.exception, MoeLensError), done.exception
    assert message in str(done.exception)


@pytest.mark.parametrize("words", [["--model", "lab:cut"], ["--loss", "lab:cut"]])
def test_ctrl_c_before_anything_is_measured_says_so(here: None, words: list[str]) -> None:
    """While the model is loaded, and in the self-test."""
    given = ["--model", "lab:model", "--data", "lab:batches", "--name", "none", *words]
    done = CliRunner().invoke(app, ["counterfactual", "run", *given])
    assert done.exit_code == 130
    assert done.output == "interrupted: nothing was measured.\n"
    assert not list(Path("run").glob("counterfactual/none*"))


def test_a_module_that_reads_the_command_line_finds_its_own(here: None) -> None:
    words = ["--data", "lab:batches", "--layers", "1", "--experts", "0", "--regret-tokens", "0"]
    before = sys.argv
    done = CliRunner().invoke(
        app, ["counterfactual", "run", "--model", "parses.py:model", *words, "--name", "parsed"]
    )
    assert done.exit_code == 0, done.exception
    assert sys.argv is before


def test_a_model_of_another_class_is_warned_of(here: None) -> None:
    words = ["--data", "lab:batches", "--layers", "1", "--experts", "0", "--regret-tokens", "0"]
    with pytest.warns(UserWarning, match="recorded from a Speaking, this is a Other"):
        done = CliRunner().invoke(
            app, ["counterfactual", "run", "--model", "lab:other", *words, "--name", "other"]
        )
    assert done.exit_code == 0, done.exception
