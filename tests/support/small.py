"""Small models of hand-written blocks, and what a refusal must leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.inline_models import (
    Model,
)
from support.tables import frame

import moe_lens
from moe_lens.trace.reader import open_run

IDS = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(1))


def small(block, *more):
    """A model of such blocks, with weights wide enough to route unevenly."""
    torch.manual_seed(0)
    model = Model(*(b() for b in (block, *more)))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    return model.eval()


def ids_of(run, layer=0, step=0):
    rows = frame(run, "routing").query("layer == @layer and step == @step").sort_values("token")
    return np.stack(rows.expert_ids)


def refused(block, run, match):
    """The first step refuses by name; nothing of the block is recorded, then or later."""
    model = small(block) if isinstance(block, type) else block
    with torch.no_grad(), pytest.raises(moe_lens.UnsupportedRouter, match=match) as caught:
        with moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
            model(IDS)
    assert "blocks.0" in str(caught.value)
    assert "rec.log" in str(caught.value) or "not recorded" in str(caught.value)
    for table in ("load", "routing", "layers"):
        assert len(frame(run, table)) == 0
    assert open_run(run).meta.layers == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
