"""Weights of some layers, rounded while their blocks run, and the model's own again right after.

The model's tensors are never written to: a parameter points to a rounded copy from the moment its
block is entered until it is left. So no second copy of the model is held, and layers that share
weights are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.fake_quant import Format
from moe_lens_hooks.steering.matrices import Weights

Plan = Mapping[int, Sequence[Weights]]
"""Number of a layer, in call order, to what is rounded in it."""


class Quantised:
    """A model some of whose layers have rounded weights; use it in a `with`, around one forward.

    Args:
        layers: All MoE layers of the model: their runs are counted.
        plan: What is rounded.
        to: The format.

    Attributes:
        differs: By number of a layer, whether rounding changed a weight.
        marks: By number of a layer, sums over what its block gave back in the last forward: equal
            if it gave the same.
    """

    def __init__(self, layers: Sequence[MoELayer], plan: Plan, to: Format | None) -> None:
        self._layers, self._plan, self._to = layers, plan, to
        self._ran = 0
        self._handles: list[Any] = []
        self._own: list[tuple[nn.Parameter, Tensor]] = []
        self._numbers: list[int] = []
        self.differs: dict[int, bool] = {}
        self.marks: dict[int, tuple[float, ...]] = {}

    def __enter__(self) -> Self:
        try:
            self._attach()
        except BaseException:
            self.close()
            raise
        return self

    def _attach(self) -> None:
        for layer in self._layers:
            enter = layer.block.register_forward_pre_hook(lambda m, args: self._round())
            look = layer.block.register_forward_hook(lambda m, args, out: self._mark(out))
            leave = layer.block.register_forward_hook(
                lambda m, args, out: self._give_back(), always_call=True
            )
            self._handles += [enter, look, leave]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Also after Ctrl-C, which runs no hook."""
        self.close()

    def close(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        self._give_back()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _round(self) -> None:
        number, self._ran = self._ran, self._ran + 1
        self._numbers.append(number)
        if self._to is None:
            return
        for weights in self._plan.get(number, ()):
            p = weights.parameter
            rounded = weights.rounded(self._to)
            changed = self.differs.get(number, False) or not torch.equal(rounded, p.data)
            self.differs[number] = changed
            self._own.append((p, p.data))
            p.data = rounded

    def _mark(self, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            exact = first.detach().double()
            self.marks[self._numbers[-1]] = (float(exact.sum()), float(exact.abs().sum()))

    def _give_back(self) -> None:
        while self._own:
            p, own = self._own[-1]
            p.data = own
            self._own.pop()  # after: Ctrl-C may come in between
        self._numbers.clear()
