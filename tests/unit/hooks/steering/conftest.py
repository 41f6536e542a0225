"""A small hand-written model whose routing is forced."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.steering import of_output

import moe_lens


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel(experts=6, top_k=2).eval()


@pytest.fixture
def iv(model):
    with moe_lens.intervene(model, loss=of_output) as session:
        yield session
