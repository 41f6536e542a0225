"""A model that says itself what its experts were given: the truth about compiled code and GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TinyBlock, TinyModel
from support.tables import frame
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Said = list[tuple[Tensor, Tensor]]
"""Of each layer, in order, the ids and weights that its experts were given, `[T, K]` each."""

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Told(TinyBlock):
    """A block that returns what its experts were given, too."""

    def forward(self, x_BSD: Tensor) -> Any:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x_BSD), ids_TK, weights_TK


class Telling(TinyModel):
    """Returns its output and what it `Said`.

    Args:
        blocks: How many MoE layers.
        checkpointed: Each block is recomputed in the backward pass.
        breaks: Each block begins with a graph break.
        options: Of `TinyModel`.
    """

    def __init__(
        self, blocks: int = 2, *, checkpointed: bool = False, breaks: bool = False, **options: int
    ) -> None:
        super().__init__(blocks=0, **options)
        self.blocks = nn.ModuleList(Told(**options) for _ in range(blocks))
        self.checkpointed, self.breaks = checkpointed, breaks

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x, said = self.embed(input_ids), []
        for block in self.blocks:
            if self.breaks:
                torch._dynamo.graph_break()
            if self.checkpointed:
                y, ids_TK, weights_TK = checkpoint(block, x, use_reentrant=False)
            else:
                y, ids_TK, weights_TK = block(x)
            x = x + y
            said.append((ids_TK, weights_TK))
        return x, said


def kept(said: Said) -> Said:
    """A copy, where the model uses its buffers again."""
    return [(ids_TK.clone(), weights_TK.clone()) for ids_TK, weights_TK in said]


def assert_recorded(run: Path, said_of_steps: list[Said], *, first: int = 0) -> None:
    """The rows of every step are what the model said it routed, bit for bit, each once.

    Args:
        run: Recorded with `tokens=1.0, weights="exact"`.
        said_of_steps: In order, one forward a step.
        first: Steps before them, of which nothing is known here.
    """
    rows = frame(run, "routing").sort_values(["step", "layer", "token"])
    rows = rows[rows.step >= first]
    assert len(rows) == sum(len(ids) for said in said_of_steps for ids, _ in said)
    for step, said in enumerate(said_of_steps, first):
        for layer, (ids_TK, weights_TK) in enumerate(said):
            mine = rows[(rows.step == step) & (rows.layer == layer)]
            assert np.stack(mine.expert_ids).tolist() == ids_TK.tolist()
            weights = np.stack(mine.weights).astype(np.float32)
            assert weights.tobytes() == weights_TK.detach().float().cpu().numpy().tobytes()
    steps = frame(run, "steps")
    assert (steps.fires_seen == steps.fires_expected).all()
    assert not steps.breaches.any()


def compiled(model, in_place=False, **options):
    if in_place:
        model.compile(**options)
        return model
    return torch.compile(model, **options)
