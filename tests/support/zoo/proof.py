"""Compares what was captured of a model with what its experts do, layer by layer.

A model is recorded once. Then it runs again without moe_lens, and the inputs of each MoE block and
of its experts are kept. With the same input the experts (or the block, where the experts cannot be
called alone) are run again, once for each expert with that expert silenced: the tokens whose output
changes are those that it served, whatever any code says about it. And the output is built again
from the captured weights, every expert run with the weight one.

Legend: T tokens that the layer sees, K choices per token, E experts, D width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from support.tables import read
from support.zoo.ablation import silenced
from support.zoo.rebuild import rebuild
from torch import Tensor, nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import open_run


@dataclass
class Captured:
    """What the trace says of one layer; tensors `[T, K]`, rows in the order of the tokens."""

    info: LayerInfo
    ids: Tensor
    weights: Tensor
    kept: Tensor
    tokens: Tensor
    """`[T]`, places in the batch; most layers see all of it."""
    nulls: str
    """What this router has no number for, in words."""


@dataclass
class Proof:
    """What became of one layer's comparison."""

    info: LayerInfo
    tokens: int
    checked: int
    """(token, expert) pairs looked at."""
    served: int
    """Of these, where silencing the expert changes the token."""
    wrong: int
    """Of these, where the ablation and the captured ids disagree."""
    weight_error: float | None
    """Largest difference between the experts' output and the one built from captured weights, as a
    share of the sum of absolute contributions; None: this family has no such form."""


@dataclass
class Call:
    """One call of a module: what it was given and what it gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def again(self) -> Any:
        """The module's output for the same input."""
        with torch.no_grad():
            return self.module.forward(*copied(self.args), **copied(self.kwargs))

    def again_rows(self, T: int) -> Tensor:
        """As `again`, `[T, D]`."""
        return _rows(self.again(), T)

    def output_rows(self, T: int) -> Tensor:
        """What it gave in the forward, `[T, D]`."""
        return _rows(self.output, T)

    def has_rows(self, T: int) -> bool:
        """Its output holds one row for each of the tokens."""
        shape = _first(self.output).shape
        return shape[:-1].numel() == T or (len(shape) == 1 and shape[0] % T == 0)


NULLABLE = {
    "entropy": "entropy",
    "margin": "margin",
    "next_ids": "runner-up",
    "next_weights": "its weight",
}
"""Columns of `routing` that are null where a router has no such number, and what to call them."""


def record(model: nn.Module, inputs: dict[str, Any], run: Path) -> list[Captured]:
    """Record one forward with everything kept, and read back what the trace holds."""
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        with rec.step():
            model(**inputs)
    table = read(run, "routing").to_pandas().sort_values("token")
    return [_captured(info, table[table.layer == info.layer]) for info in open_run(run).meta.layers]


def _captured(info: LayerInfo, table: pd.DataFrame) -> Captured:
    shape = len(table), max(map(len, table.expert_ids))
    ids, weights = np.full(shape, -1), np.zeros(shape, np.float32)
    kept = np.zeros(shape, bool)
    for t, row in enumerate(table.itertuples()):
        n = len(row.expert_ids)  # fewer than K where the router chose fewer
        ids[t, :n], weights[t, :n], kept[t, :n] = row.expert_ids, row.weights, True
        kept[t, [] if row.dropped is None else list(row.dropped)] = False
    nulls = [name for column, name in NULLABLE.items() if table[column].isna().all()]
    return Captured(
        info,
        torch.from_numpy(ids),
        torch.from_numpy(weights),
        torch.from_numpy(kept),
        torch.tensor(table.token.tolist()),
        ", ".join(nulls),
    )


def prove(model: nn.Module, inputs: dict[str, Any], captured: list[Captured]) -> list[Proof]:
    """Compare each layer with the model itself; the model is as it was afterwards."""
    blocks = [model.get_submodule(c.info.path) for c in captured]
    with watched([*blocks, *(m for b in blocks for m in b.children())]) as calls, torch.no_grad():
        model(**inputs)
    return [_prove(block, calls, c) for block, c in zip(blocks, captured, strict=True)]


def _prove(block: nn.Module, calls: dict[int, list[Call]], captured: Captured) -> Proof:
    ids, T, E = captured.ids, len(captured.ids), captured.info.experts
    (call,) = calls[id(block)]  # a layer runs once in a forward
    of_experts = calls.get(id(getattr(block, "experts", None)), [])
    if len(of_experts) == 1 and of_experts[0].has_rows(T):
        call = of_experts[0]
    base_TD = call.again_rows(T)
    assert torch.equal(base_TD, call.output_rows(T))  # running it alone is the forward itself
    served = wrong = 0
    for expert in range(E):
        with silenced(block, expert, E):
            changed_T = (call.again_rows(T) != base_TD).any(-1)
        served += int(changed_T.sum())
        wrong += int((changed_T != ((ids == expert) & captured.kept).any(-1)).sum())
    return Proof(captured.info, T, T * E, served, wrong, rebuild(block, call, captured))


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[dict[int, list[Call]]]:
    """Every call of these modules, by `id`; below all hooks, with copies of what was passed."""
    calls: dict[int, list[Call]] = {}

    def wrapped(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            given = copied(args), copied(kwargs)
            output = forward(*args, **kwargs)
            calls.setdefault(id(module), []).append(Call(module, *given, copied(output)))
            return output

        return inner

    for module in modules:
        module.forward = wrapped(module, module.forward)
    try:
        yield calls
    finally:
        for module in modules:
            del module.forward


def copied(x: Any) -> Any:
    """The same, with every tensor in it copied."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {k: copied(v) for k, v in x.items()}
    return type(x)(copied(v) for v in x) if type(x) in (tuple, list) else x


def _first(x: Any) -> Tensor:
    while not isinstance(x, Tensor):
        x = x[0]
    return x


def _rows(x: Any, T: int) -> Tensor:
    return _first(x).reshape(T, -1)
