"""What does the laboratory need of a recorder? It is handed one and never imports it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from moe_lens.granularity.layer import MoE
from moe_lens.granularity.runs import Row, Run, routed_inputs, teacher_of

if TYPE_CHECKING:
    from moe_lens.granularity.presets import Plan

_FORWARD = 4_096


class Recorder(Protocol):
    """The part of ``moe_lens.record``'s recorder that is called."""

    def step(self, *, phase: Literal["eval"]) -> AbstractContextManager[Any]:
        """Enter one step."""
        ...

    def log(
        self, layer: str, expert_ids: Tensor, weights: Tensor, logits: Tensor | None = None, /
    ) -> Any:
        """Say how one layer routed."""
        ...


def record_routing(recorder: Recorder, plan: Plan, rows: Iterable[Row]) -> None:
    """Route the same tokens through all teachers and trained students, a layer each.

    Args:
        recorder: Sees them; one that keeps every token's row can tell the sets that each used.
        plan: Whose runs they are.
        rows: What became of the runs; those of other plans have other names and are left out.
    """
    by_name = {row.name: row for row in rows}
    layers = {f"teacher {run.teacher.name}": teacher_of(run) for run in plan.runs}
    layers |= {run.name: _trained(run, by_name[run.name]) for run in plan.runs}
    x_TD = routed_inputs(plan.hidden, plan.seed)
    with torch.no_grad():
        for part_TD in torch.split(x_TD, _FORWARD):
            with recorder.step(phase="eval"):
                for name, layer in layers.items():
                    logits_TE, weights_TK, ids_TK = layer.route(part_TD)
                    recorder.log(name, ids_TK, weights_TK, logits_TE)


def _trained(run: Run, row: Row) -> MoE:
    """A layer with the router that training ended in; its experts are new and not to be used."""
    shape = run.student
    layer = MoE(shape, run.hidden, "constant", torch.Generator(), gate_bias=run.gate_bias)
    layer.gate_ED.data = torch.tensor(row.gate).view(shape.experts, run.hidden)
    if layer.gate_E is not None:
        layer.gate_E.data = torch.tensor(row.gate_bias_values)
    return layer
