"""Capture runs on a node where duckdb, streamlit and plotly cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"duckdb", "streamlit", "plotly"}:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""

CAPTURE = """
import moe_lens
import torch
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).eval()
with moe_lens.record(model, sys.argv[1], tokens=1.0) as rec:
    with rec.step(phase="eval"), torch.no_grad():
        model(input_ids=torch.randint(64, (2, 8)))
"""


def run_blocked(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter that cannot import the dashboard's libraries."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True
    )


def test_the_libraries_are_really_blocked() -> None:
    for library in ("duckdb", "streamlit", "plotly.graph_objects"):
        done = run_blocked(f"import {library}")
        assert "(blocked)" in done.stderr


def test_a_model_is_recorded_without_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_blocked(CAPTURE, str(run))
    assert done.returncode == 0, done.stderr
    tokens, top_k, layers = 16, 2, 2
    load = pq.read_table(run / "load")
    assert pc.sum(load["routed"]).as_py() == tokens * top_k * layers
    assert pq.read_table(run / "routing").num_rows == tokens * layers
