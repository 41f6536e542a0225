"""Which tensor in a block is its gate weights: the one that, set to zero, silences an expert.

Legend: T tokens, K choices per token, E experts, D everything the block gives back for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.errors import UnsupportedRouter
from moe_lens_hooks.inside.trial import Rows, Trials
from moe_lens_hooks.inside.watch import Found, Place, Run

_TRIED = 16
"""Tensors that are tried, at most."""


@dataclass
class Weights:
    """Where gate weights stand.

    Attributes:
        place: Of a tensor of the shape of the ids, or of one with a column for each expert.
        dense: It has a column for each expert.
        masked: Dense, and zero wherever an expert was not chosen.
    """

    place: Place
    dense: bool
    masked: bool = False

    def read(self, run: Run, ids: Found) -> Tensor | None:
        """`[T, K]`, or None where this run did not pass the place."""
        found = run.at(self.place)
        if found is None:
            return None
        if not self.dense:
            return found.rows
        return found.rows.gather(1, ids.rows.long().clamp(0, found.width - 1))


def find_weights(
    trials: Trials, clean: Run, output: Rows, ids: Found, *, by_call: bool
) -> Weights | None:
    """The weights of the choices `ids`; None: there are none, each choice counts whole.

    Args:
        trials: Runs the block again.
        clean: A run without changes.
        output: What it gave back.
        ids: The choices.
        by_call: The block calls its experts' modules.

    Raises:
        UnsupportedRouter: No tensor is proved to be the weights, but something weighs.
    """
    loads_E = torch.bincount(ids.rows.flatten().long(), minlength=clean.experts)
    busy = [int(e) for e in loads_E.argsort(descending=True) if loads_E[e]]
    asked = list(dict.fromkeys([busy[0], busy[-1]]))
    silent = {e: trials.run(trials.bank.without([e], by_call=by_call))[1] for e in asked}
    floats = [f for f in clean.latest() if f.floating]
    kinds = [(f, False) for f in floats if f.width == ids.width]
    kinds += [(f, True) for f in floats if f.width == clean.experts]
    order = {id(f): i for i, f in enumerate(floats)}
    kinds.sort(key=lambda kind: order[id(kind[0])])
    weighs = False
    for found, dense in kinds[:_TRIED]:
        effects = [_effect(trials, output, silent[e], found, ids, e, dense) for e in asked]
        if all(same for same, _ in effects):
            outside = found.rows.scatter(1, ids.rows.long(), 0.0) if dense else found.rows
            return Weights(found.place, dense, masked=dense and not bool(outside.any()))
        weighs = weighs or any(moved for _, moved in effects)
    if weighs or not by_call or not _whole(trials, output, ids, busy[0]):
        raise UnsupportedRouter(
            "which experts run is seen, but with what weights is not: setting no tensor in it to "
            "zero does what putting an expert out of action does"
        )
    return None


def _effect(
    trials: Trials, output: Rows, silent: Rows, found: Found, ids: Found, expert: int, dense: bool
) -> tuple[bool, bool]:
    """(a weight of zero silences the expert, it changes what the experts give at all)."""
    chosen_TK = ids.rows == expert

    def edit(x: Tensor) -> Tensor:
        if dense:
            here = torch.arange(x.shape[-1], device=x.device) == expert
        else:
            here = chosen_TK.reshape(x.shape)
        return torch.where(here, torch.zeros((), dtype=x.dtype, device=x.device), x)

    kept = ids.tensor.clone()
    edits = {found.place: edit, ids.place: lambda x: kept}  # whatever the weights, the same ids
    try:
        _, weightless = trials.run(edits=edits)
    except Exception:  # counts or offsets, without which the block does not run: no weights
        return False, False
    # only what experts change at all: a block may give back its logits too
    at_D = (output.x_TD != silent.x_TD).any(0)
    base, off, zero = (x.x_TD[:, at_D] for x in (output, silent, weightless))
    effect = float((base - off).abs().amax())
    rounding = 4 * output.eps * float(base.abs().amax())
    same = float((zero - off).abs().amax()) <= 0.01 * effect + rounding
    moved = float((zero - base).abs().amax()) > 0.01 * effect + rounding
    return same and moved, moved


def _whole(trials: Trials, output: Rows, ids: Found, expert: int) -> bool:
    """Without weights, a constant added to an expert's output comes out as it went in."""
    by = 8 * float(output.x_TD.abs().amax()) + 1
    _, moved = trials.run(trials.bank.shifted([expert], by, by_call=True))
    change_TD = (moved.x_TD - output.x_TD)[(ids.rows == expert).any(1)]
    tolerance = max(1e-4, 8 * output.eps) * by
    whole_TD = (change_TD - by).abs() <= tolerance
    return bool(whole_TD.any(1).all()) and bool((whole_TD | (change_TD.abs() <= tolerance)).all())
