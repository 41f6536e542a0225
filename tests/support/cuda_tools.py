"""Tools that the tests of the CUDA kernels need, and what it means that one is missing."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")


def missing(what: str) -> NoReturn:
    """Skip the test; under CI, which has everything, fail it."""
    if os.environ.get("MOE_LENS_REQUIRE_BROWSER"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need_nvrtc() -> None:
    from moe_lens.errors import RuntimeUnavailable
    from moe_lens.runtime.cuda import compiler

    try:
        compiler.versions()
    except RuntimeUnavailable as e:
        missing(str(e))


def compiler_of_cpp() -> str:
    found = shutil.which("g++")
    if found is None:
        missing("no g++ on PATH: the kernels cannot be run on the CPU")
    return found


def cuobjdump() -> str:
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    missing("no cuobjdump: pip install triton")
