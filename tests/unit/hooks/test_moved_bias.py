"""A selection bias that the model moves inside its own forward."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.tables import frame
from torch import nn

import moe_lens

IDS = torch.arange(12).view(3, 4)


class Balancing(nn.Module):
    """Chooses by sigmoid and bias, and moves the bias when it has chosen."""

    def __init__(self):
        super().__init__()
        self.top_k, self.moves = 2, ""
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("e_score_correction_bias", torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def forward(self, x):
        logits = x @ self.weight.T
        scores = logits.sigmoid() + self.e_score_correction_bias
        best = scores.sort(-1, descending=True).values
        self.margin = float((best[:, 1] - best[:, 2]).sum())
        ids = scores.topk(2).indices
        weights = logits.sigmoid().gather(1, ids)
        step = torch.tensor([0.5, 0, 0, -0.5])
        if self.moves == "in place":
            self.e_score_correction_bias.add_(step)
        if self.moves == "another":
            self.e_score_correction_bias = self.e_score_correction_bias + step
        return logits, weights / weights.sum(-1, keepdim=True), ids


@pytest.mark.parametrize("moves", ["", "in place", "another"])
def test_margins_are_those_of_the_choice_or_null(moves, tmp_path):
    torch.manual_seed(0)
    model = TinyModel(blocks=1).eval()
    model.blocks[0].gate = router = Balancing()
    margins = []
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec:
        for step in range(3):
            router.moves = moves if step else ""
            with rec.step():
                model(IDS)
            margins.append(router.margin)
    sums = frame(tmp_path / "run", "routers").sort_values("step").margin_sum
    rows = frame(tmp_path / "run", "routing").groupby("step").margin
    assert sums.iloc[0] == pytest.approx(margins[0], rel=1e-2)
    if moves == "in place":
        assert sums.iloc[1:].isna().all()
        assert rows.count().tolist() == [12, 0, 0]
    else:
        assert sums.tolist() == pytest.approx(margins, rel=1e-2)
        assert rows.count().tolist() == [12, 12, 12]
