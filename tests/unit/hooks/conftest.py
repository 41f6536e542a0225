"""A small hand-written model and a place for its trace."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from torch import nn

from moe_lens_hooks.autorecord import Watcher

GETSTATE = nn.Module.__getstate__


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel().eval()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def watch(tmp_path):
    """Makes a watcher that records into `tmp_path / "auto"`; stops what a test left running."""
    made = []

    def make(**options):
        said = []
        given = {"tokens": 1.0, "weights": "exact", "on_breach": "warn", "on_write_error": "warn"}
        watcher = Watcher(tmp_path / "auto", said.append, **given | options)
        watcher.said = said
        watcher.watch()
        made.append(watcher)
        return watcher

    yield make
    for watcher in made:
        watcher.finish()
    assert nn.Module.__getstate__ is GETSTATE


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.randint(0, 32, (2, 6)), "attention_mask": mask}
