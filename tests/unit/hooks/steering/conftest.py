"""A small hand-written model whose routing is forced."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel(experts=6, top_k=2).eval()
