"""Who may import whom: the contracts in pyproject.toml hold, cover everything, and bite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.api import read_configuration

PACKAGES = ("moe_lens", "hooks/moe_lens_hooks", "dashboards/moe_lens_dashboards")

# These may import anything, where it is needed.
FREE = {"moe_lens.__init__", "moe_lens.__main__", "moe_lens.cli", "moe_lens.commands"}

# One forbidden import for every row of the table: a file to add, and what it imports.
PLANTED = [
    ("moe_lens/trace/planted.py", "duckdb"),
    ("moe_lens/trace/planted.py", "torch"),
    ("moe_lens/trace/planted.py", "moe_lens"),
    ("moe_lens/trace/planted.py", "moe_lens.queries"),
    ("moe_lens/importers/planted.py", "duckdb"),
    ("moe_lens/importers/planted.py", "moe_lens.queries"),
    ("moe_lens/queries/planted.py", "torch"),
    ("moe_lens/queries/planted.py", "plotly"),
    ("moe_lens/metrics/planted.py", "torch"),
    ("moe_lens/metrics/planted.py", "duckdb"),
    ("moe_lens/metrics/planted.py", "moe_lens.trace"),
    ("moe_lens/figures/planted.py", "duckdb"),
    ("moe_lens/figures/planted.py", "moe_lens.queries"),
    ("moe_lens/figures/planted.py", "moe_lens.trace"),
    ("moe_lens/report/planted.py", "rich"),
    ("moe_lens/terminal/planted.py", "plotly"),
    ("moe_lens/demo/planted.py", "moe_lens_hooks"),
    ("moe_lens/demo/planted.py", "moe_lens.trace"),
    ("moe_lens/granularity/planted.py", "moe_lens_hooks"),
    ("moe_lens/granularity/planted.py", "moe_lens.trace"),
    ("moe_lens/granularity/planted.py", "pyarrow"),
    ("hooks/moe_lens_hooks/planted.py", "moe_lens.queries"),
    ("hooks/moe_lens_hooks/planted.py", "moe_lens.commands"),
    ("hooks/moe_lens_hooks/planted.py", "duckdb"),
    ("hooks/moe_lens_hooks/planted.py", "transformers"),
    ("hooks/moe_lens_hooks/planted.py", "moe_lens_dashboards"),
    ("dashboards/moe_lens_dashboards/planted.py", "moe_lens_hooks"),
    ("dashboards/moe_lens_dashboards/planted.py", "torch"),
    ("dashboards/moe_lens_dashboards/planted.py", "pyarrow"),
]


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the three packages of `tree`, whatever else is installed."""
    path = os.pathsep.join(str((tree / package).parent) for package in PACKAGES)
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def module_name(file: str) -> str:
    """`hooks/moe_lens_hooks/planted.py` as `moe_lens_hooks.planted`."""
    return (
        file.removesuffix(".py")
        .removeprefix("hooks/")
        .removeprefix("dashboards/")
        .replace("/", ".")
    )


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the packages and their contracts, to break."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def test_the_tree_keeps_its_contracts(root: Path) -> None:
    done = lint(root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_stands_in_a_contract(root: Path) -> None:
    contracts = read_configuration(str(root / "pyproject.toml"))["contracts_options"]
    covered = {name for contract in contracts for name in contract.get("source_modules", ())}
    core = {
        f"moe_lens.{path.stem}"
        for path in (root / "moe_lens").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert core > FREE
    assert core | {"moe_lens_hooks", "moe_lens_dashboards"} <= covered | FREE


def test_a_new_subpackage_without_a_layer_is_caught(copy: Path) -> None:
    (copy / "moe_lens/novelty").mkdir()
    (copy / "moe_lens/novelty/__init__.py").touch()
    done = lint(copy)
    assert done.returncode == 1
    assert "novelty" in done.stdout


def test_forbidden_imports_are_caught_inside_functions(copy: Path) -> None:
    for file, imported in PLANTED:
        with (copy / file).open("a") as source:
            source.write(f"def load_{imported.replace('.', '_')}():\n    import {imported}\n\n\n")
    done = lint(copy)
    assert done.returncode == 1
    for file, imported in PLANTED:
        assert f"{module_name(file)} -> {imported} (" in done.stdout


def test_allowed_imports_are_not(copy: Path) -> None:
    adapter = copy / "hooks/moe_lens_hooks/adapters/planted.py"
    adapter.write_text("def load():\n    import transformers\n")
    typed = copy / "moe_lens/trace/planted.py"
    typed.write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import torch\n")
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
