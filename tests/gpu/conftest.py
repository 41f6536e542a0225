"""Every test here needs a CUDA device, and is skipped without one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def no_waiting():
    """Makes torch raise for every call that would make the host wait for the device."""

    def set_mode(on: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mode being a prototype
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield set_mode
    torch.cuda.set_sync_debug_mode("default")
