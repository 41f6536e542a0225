"""Libraries other than transformers, each in a process of its own.

They change global state when they are imported, ask for packages that this project does not need,
and are therefore installed apart (`make frameworks`). Each `*_checks.py` here is a file of tests
that runs there.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CHECKS = sorted(path.name for path in HERE.glob("*_checks.py"))

# These libraries warn of much among themselves; what moe_lens warns of stays an error.
WARNINGS = "filterwarnings=ignore\nerror:::moe_lens.*"


@pytest.fixture
def python() -> Path:
    """The interpreter that has these libraries."""
    path = ROOT / ".venv-frameworks" / "bin" / "python"
    if not (path.parent.parent / ".installed").exists():
        # CI sets the variable, so that a broken setup cannot pass as "nothing to test".
        if os.environ.get("MOE_LENS_REQUIRE_FRAMEWORKS"):
            pytest.fail("the model libraries are not installed: run `make frameworks`", False)
        pytest.skip("the model libraries are not installed: `make frameworks`")
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checks", CHECKS)
def test_captured_equals_executed(checks: str, python: Path) -> None:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-q", "-o", WARNINGS]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*command, str(HERE / checks)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed in .*", summary), summary  # none was skipped
    print(f"{checks}: {summary}")


def test_there_are_checks() -> None:
    assert {"torchtitan_checks.py", "megatron_checks.py", "deepspeed_checks.py"} <= set(CHECKS)
