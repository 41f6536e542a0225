"""A small hand-written model and a place for its trace."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel().eval()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"
