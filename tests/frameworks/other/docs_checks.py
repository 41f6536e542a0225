"""Every Python block of docs/frameworks.md runs, on a small model in the place of the reader's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "frameworks.md"
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

BEFORE = {
    "torchtitan": """
import torch
import moe_lens
from support.torchtitan_moe import make
model, batches = make(), [torch.randn(2, 8, 16)]
""",
    "megatron-core": """
import support.megatron_on_cpu as megatron
import torch
import moe_lens
megatron.join(0, 1, "{store}")
mask = torch.triu(torch.ones(1, 1, 8, 8, dtype=torch.bool), 1)
model = megatron.gpt(moe_expert_capacity_factor=1.0)
batches = [(torch.randint(0, 64, (2, 8)), torch.arange(8).expand(2, 8), mask)]
""",
    "DeepSpeed": """
import torch
import moe_lens
from support import deepspeed_on_cpu
deepspeed_on_cpu.join("{store}")
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = deepspeed_on_cpu.layer(groups=False, k=2)
    def forward(self, x):
        return self.moe(x)[0]
config = {"train_micro_batch_size_per_gpu": 2}
engine, *_ = deepspeed_on_cpu.deepspeed.initialize(model=Model(), config=config)
batches = [torch.randn(2, 16, 16)]
""",
    "mixture-of-experts and st-moe-pytorch": "",
}


@pytest.mark.parametrize("section", BEFORE)
def test_the_blocks_of_a_section_run(section, tmp_path):
    blocks = BLOCK.findall(dict(SECTION.findall(PAGE.read_text("utf-8")))[section])
    assert blocks
    text = BEFORE[section].replace("{store}", str(tmp_path / "store")) + "\n".join(blocks)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    (run,) = (tmp_path / "traces").iterdir()
    assert list((run / "load" / "rank=0").glob("*.parquet"))


def test_every_section_with_code_is_run():
    found = {name for name, text in SECTION.findall(PAGE.read_text("utf-8")) if BLOCK.search(text)}
    assert found == set(BEFORE)
