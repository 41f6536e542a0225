"""The wheel holds what git holds and works where the checkout cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGES = ("moe_lens/", "hooks/moe_lens_hooks/", "dashboards/moe_lens_dashboards/")

# One worker builds for all tests of this file.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


class Distribution(NamedTuple):
    sdist: Path
    wheel: Path


def run(command: list[str | Path], cwd: Path) -> str:
    """Run a command that knows of no checkout, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The sdist of the checkout, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: hatchling comes from this environment, not from a network.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Distribution(sdist, wheel)


@pytest.fixture(scope="module")
def clean_python(built: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and borrows its dependencies."""
    home = tmp_path_factory.mktemp("clean") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel], cwd=home)
    (site_packages,) = home.glob("lib/python*/site-packages")
    # The path files of a folder named in a path file are not read: the dependencies of this
    # environment come along, its editable install of the checkout does not.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_what_git_holds(built: Distribution, project_files: list[str]) -> None:
    tracked = {
        name.removeprefix("hooks/").removeprefix("dashboards/")
        for name in project_files
        if name.startswith(PACKAGES)
    }
    with zipfile.ZipFile(built.wheel) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == tracked
    assert {name.split("/")[0] for name in shipped} == {
        "moe_lens",
        "moe_lens_hooks",
        "moe_lens_dashboards",
    }
    assert {f"{name.split('/')[0]}/py.typed" for name in shipped} <= shipped


def test_the_sdist_can_be_tested(built: Distribution, project_files: list[str]) -> None:
    with tarfile.open(built.sdist) as sdist:
        shipped = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {name for name in project_files if name.startswith((*PACKAGES, "tests/"))}
    assert wanted | {"pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= shipped


def test_the_packages_come_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "import moe_lens, moe_lens_dashboards, moe_lens_hooks\n"
        "for module in (moe_lens, moe_lens_hooks, moe_lens_dashboards): print(module.__file__)"
    )
    files = run([clean_python, "-P", "-c", code], cwd=tmp_path).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(clean_python.parents[1]) for file in files)


def test_neither_hooks_nor_dashboards_is_importable(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\nprint(find_spec('hooks'), find_spec('dashboards'))"
    )
    assert run([clean_python, "-P", "-c", code], cwd=tmp_path).split() == ["None", "None"]


def test_the_command_line_runs_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    script = clean_python.with_name("moe-lens")
    assert "query" in run([script, "--help"], cwd=tmp_path)
    assert "0.1.0" in run([script, "--version"], cwd=tmp_path)
    assert "SQL" in run([clean_python, "-P", "-m", "moe_lens", "query", "--help"], cwd=tmp_path)
