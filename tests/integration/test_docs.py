"""Every Python block and every moe-lens command in README and docs runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.dashboard import served

ROOT = Path(__file__).parents[2]
# Their libraries are installed apart: tests/frameworks/other runs them (and test_training_docs.py).
APART = {"frameworks.md", "training.md"}
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in APART),
]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def commands(page):
    """Lines `moe-lens …` of the page; `make` and what installs are covered by CI itself."""
    lines = [line.strip() for text in blocks(page, "sh") for line in text.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("moe-lens ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs_from_top_to_bottom(page, tmp_path, demo_trace):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "demo").symlink_to(demo_trace)
    for text in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    for command in commands(page):
        if command.startswith("moe-lens demo"):
            continue  # test_demo runs it, with fewer steps
        words = shlex.split(command)
        if words[1] == "dashboard":
            with served(*words[2:], cwd=tmp_path):
                continue  # it came up; tests/browser look at its pages
        argv = [sys.executable, "-m", "moe_lens", *words[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
