"""What every test shares: what the markers `gpu` and `browser` mean, and a fair use of cores."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

# Others use the machine too: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# One thread a worker: several workers with a thread pool each fight over the same cores. Set before
# the first import of torch, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("browser") and not any(map(shutil.which, BROWSERS)):
        # CI sets the variable, so that a broken setup cannot pass as "nothing to test".
        if os.environ.get("MOE_LENS_REQUIRE_BROWSER"):
            pytest.fail("no Chromium on PATH: run `make chromium`", pytrace=False)
        pytest.skip("no Chromium on PATH")
