"""What is a layer of the laboratory? A router, and experts that are all computed and then mixed.

The setup of arXiv 2505.06839: y = sum over the k largest logits of softmax(those logits)_j E_j(x),
with E_j a vector, or two linear maps with biases, with a ReLU between them or without. (The theory
has an unweighted sum; through that no gradient reaches the router.)

Every expert runs on every token: the experts stand side by side in two matrices, and the gate
weight of an expert, 0 where it is not chosen, multiplies its hidden neurons.

Tensor names carry their shape:

    T tokens, K top-k, E experts, D hidden, F width of an expert, H = E * F
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lens.granularity.shapes import Kind, Shape


class MoE(nn.Module):
    """A Mixture-of-Experts layer with dense compute.

    Args:
        shape: Experts, choices of a token, width. Constant experts have no width.
        hidden: D, of input and output.
        kind: What an expert computes.
        generator: Draws the weights, as torch.nn.Linear does by default: uniform within
            1 / sqrt(fan-in). Constant experts are normal, of mean squared norm 1.
        gate_bias: The router's logits are affine.
    """

    def __init__(
        self,
        shape: Shape,
        hidden: int,
        kind: Kind,
        generator: torch.Generator,
        *,
        gate_bias: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.hidden, self.kind = shape, hidden, kind
        E, D, H = shape.experts, hidden, shape.experts * shape.width

        def uniform(fan_in: int, *size: int) -> nn.Parameter:
            drawn = torch.rand(*size, generator=generator)
            return nn.Parameter((2 * drawn - 1) / math.sqrt(fan_in))

        self.gate_ED = uniform(D, E, D)
        self.gate_E = uniform(D, E) if gate_bias else None
        if kind == "constant":
            drawn_ED = torch.randn(E, D, generator=generator)
            self.out_ED = nn.Parameter(drawn_ED / math.sqrt(D))
            return
        self.in_DH = uniform(D, D, H)
        self.in_H = uniform(D, H)
        self.out_HD = uniform(shape.width, H, D)
        self.out_ED = uniform(shape.width, E, D)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits_TE, weights_TK and expert_ids_TK, the largest logit first."""
        logits_TE = F.linear(x_TD, self.gate_ED, self.gate_E)
        chosen_TK, expert_ids_TK = logits_TE.topk(self.shape.top_k, dim=-1)
        return logits_TE, chosen_TK.softmax(dim=-1), expert_ids_TK

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return y_TD."""
        logits_TE, weights_TK, expert_ids_TK = self.route(x_TD)
        gate_TE = torch.zeros_like(logits_TE).scatter(1, expert_ids_TK, weights_TK)
        y_TD = gate_TE @ self.out_ED
        if self.kind == "constant":
            return y_TD
        h_TH = torch.addmm(self.in_H, x_TD, self.in_DH)
        if self.kind == "relu":
            h_TH = h_TH.relu()
        h_TEF = h_TH.view(-1, self.shape.experts, self.shape.width) * gate_TE.unsqueeze(-1)
        return torch.addmm(y_TD, h_TEF.flatten(1), self.out_HD)
