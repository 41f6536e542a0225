"""How far is an imitation off? Beside two that learn nothing: zero, and the best affine map.

NMSE is the error over that of predicting zero, mean |y - f|^2 / mean |y|^2; FVU is the error over
that of predicting the mean, so the unexplained share of the variance. A teacher with biases has a
mean, so zero's own FVU is above 1.

Tensor names carry their shape: T tokens, D hidden, I inputs with a constant (D + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PART = 1_024
"""Tokens at a time: what lies between the layers of a wide student should stay in a cache."""


@dataclass(frozen=True)
class Target:
    """A sample to be judged on.

    Attributes:
        x_TD: Inputs.
        y_TD: What the teacher makes of them.
        power: Mean squared norm of y, float64: the error of predicting zero.
        variance: The same about y's mean: the error of predicting that.
    """

    x_TD: Tensor
    y_TD: Tensor
    power: float
    variance: float

    @classmethod
    def of(cls, x_TD: Tensor, y_TD: Tensor) -> Target:
        """The sample with its two yardsticks."""
        wide_TD = y_TD.double()
        return cls(x_TD, y_TD, _mean_square(wide_TD), _mean_square(wide_TD - wide_TD.mean(0)))

    def error(self, f: Callable[[Tensor], Tensor]) -> float:
        """Mean squared norm of y - f(x)."""
        parts = zip(torch.split(self.x_TD, _PART), torch.split(self.y_TD, _PART), strict=True)
        with torch.no_grad():
            sums = [(y_TD - f(x_TD)).double().square().sum() for x_TD, y_TD in parts]
        return torch.stack(sums).sum().item() / len(self.x_TD)


def affine_fit(x_TD: Tensor, y_TD: Tensor) -> Callable[[Tensor], Tensor]:
    """The affine map of least squares, by its normal equations in float64.

    Args:
        x_TD: Inputs; many more than D of them, of full rank (the normal equations square the
            condition number, which for normal inputs is near 1).
        y_TD: Outputs.
    """
    x_TI = _with_constant(x_TD.double())
    map_ID = torch.linalg.solve(x_TI.T @ x_TI, x_TI.T @ y_TD.double())
    return lambda new_TD: (_with_constant(new_TD.double()) @ map_ID).to(new_TD.dtype)


def _with_constant(x_TD: Tensor) -> Tensor:
    return torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], dim=1)


def _mean_square(y_TD: Tensor) -> float:
    return y_TD.square().sum(1).mean().item()
