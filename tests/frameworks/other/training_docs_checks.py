"""The callbacks of docs/training.md run, on a small model in the place of the reader's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

MODEL = """
import torch
from support.models import build
model = build("mixtral").train()
rows = torch.randint(1, 96, (40, 8))
"""
BEFORE = {
    "The Trainer of transformers": MODEL
    + """
dataset = [{"input_ids": r, "labels": r} for r in rows]
""",
    "Lightning": MODEL
    + """
import lightning.pytorch as pl

class LitModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, ids, batch_idx):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

lightning_module = LitModel()
loader = torch.utils.data.DataLoader(rows, batch_size=2)
""",
}


@pytest.mark.parametrize("section", BEFORE)
def test_the_blocks_of_a_section_run(section, tmp_path):
    (block,) = BLOCK.findall(dict(SECTION.findall(PAGE.read_text("utf-8")))[section])
    done = subprocess.run(
        [sys.executable, "-c", BEFORE[section] + block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "traces").iterdir()
    assert list((run / "routing" / "rank=0").glob("*.parquet"))


def test_every_section_with_code_is_run():
    found = {name for name, text in SECTION.findall(PAGE.read_text("utf-8")) if BLOCK.search(text)}
    assert found == {"Any script", *BEFORE}
