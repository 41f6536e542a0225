"""One forward of a model as it is, as it chose before, or with some layers' routing changed.

Legend: B sequences, S positions, T tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.edits import Choosing, Edit, Giving, TopK
from moe_lens_hooks.steering.forced import Forced
from moe_lens_hooks.steering.looked import Looked, Looking
from moe_lens_hooks.steering.planned import Planned
from moe_lens_hooks.steering.source import Wanted
from moe_lens_hooks.steering.token_losses import Batch, Loss, per_token, shape_of


class Passes:
    """Runs a model on a batch, and takes the loss of each token.

    Args:
        model: The model.
        layers: Its MoE layers.
        loss: The loss of each token.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer], loss: Loss) -> None:
        self.layers = layers
        self._model, self._loss = model, loss

    def free(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Losses `[B, S]` and outputs of the model with nothing attached."""
        with torch.no_grad(), _memory_for(batch), self._outputs() as outputs:
            loss = per_token(self._loss(self._model, batch), shape_of(batch))
        return loss, outputs

    def looked(
        self, batch: Batch, looking: Looking | None = None
    ) -> tuple[Tensor, list[Tensor], list[Looked]]:
        """The same, and what each layer did."""
        looking = Looking() if looking is None else looking
        with self._outputs() as outputs:
            loss = self._run(batch, Planned(looking.make, lambda ran: None))
        return loss, outputs, looking.layers

    def repeated(self, batch: Batch, layers: list[Looked]) -> tuple[Tensor, list[Tensor]]:
        """The same with each layer forced to what it chose."""

        def make(number: int, layer: MoELayer, token_T: Tensor | None) -> Wanted | None:
            return Wanted(layers[number].ids_TK)

        with self._outputs() as outputs:
            loss = self._run(batch, Planned(make, lambda ran: None))
        return loss, outputs

    def changed(self, batch: Batch, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
        """Losses `[B, S]` with these edits, and bool `[T]`: tokens that an edit concerned.

        Raises:
            UnsupportedRouter: A layer's choice cannot be changed.
            SteeringError: There is no such layer, or an edit does not fit.
        """
        by_layer = {edit.layer: edit for edit in edits}
        affected: dict[int, Tensor] = {}

        def make(number: int, layer: MoELayer, token_T: Tensor | None) -> Wanted | None:
            edit = by_layer.get(number)
            return None if edit is None else _wanted(edit, number, affected)

        def end(ran: int) -> None:
            for number in by_layer.keys() - affected.keys():
                if number >= ran:
                    raise SteeringError(f"there is no layer {number}: {ran} MoE layers ran.")
                raise UnsupportedRouter(
                    f"layer {number} made its choice by none of torch.topk, argmax or max over the "
                    "scores of all experts, so that it cannot be changed."
                )

        try:
            loss = self._run(batch, Planned(make, end))
        except (IndexError, RuntimeError, ValueError) as e:
            other = [x for x in edits if isinstance(x, TopK)]
            if not other:
                raise
            raise UnsupportedRouter(
                f"layer {other[0].layer} cannot take {other[0].k} experts of a token: the model "
                f"fails with another top-k than its own ({type(e).__name__}: {e})"
            ) from e
        return loss, torch.stack(list(affected.values())).any(0)

    def _run(self, batch: Batch, source: Planned) -> Tensor:
        forced = Forced(self._model, self.layers, source, True)
        with torch.no_grad(), _memory_for(batch), forced:
            loss = self._loss(self._model, batch)
            if forced.forwards != 1:
                raise SteeringError(
                    f"the loss ran the model {forced.forwards} times: it must call it once."
                )
        return per_token(loss, shape_of(batch))

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        """The tensors that the model returns."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.extend(_tensors(output))

        handle = self._model.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()


@contextmanager
def _memory_for(batch: Batch) -> Iterator[None]:
    """Inside, a forward of this batch; where memory ends, the error says what fits better.

    Raises:
        SteeringError: Memory ended, the host's or a device's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e).lower()
        host = "can't allocate memory" in text or "not enough memory" in text
        if not host and not isinstance(e, MemoryError | torch.OutOfMemoryError):
            raise
        B, S = shape_of(batch)
        less = (
            f"Take fewer at once: tokens_at_once={B // 2 * S} (--tokens-at-once)."
            if B > 1
            else "One sequence is the least: give shorter ones."
        )
        raise SteeringError(
            f"a forward of {B} x {S} tokens needs more memory than there is. {less}"
        ) from e


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal bit for bit, NaN included."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and _bits_equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def _bits_equal(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def _wanted(edit: Edit, number: int, affected: dict[int, Tensor]) -> Wanted:
    """What the edit's layer is to do; `affected` gets bool `[T]` when it was done."""

    def choose(scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        assert isinstance(edit, Choosing)
        new_TK = edit.choose(scores_TE, allowed_TE, own_TK)
        if new_TK.shape != own_TK.shape:
            affected[number] = torch.ones(len(own_TK), dtype=torch.bool)
        else:
            differ_TK = new_TK.sort(-1).values != own_TK.sort(-1).values
            affected[number] = differ_TK.any(-1).cpu()
        return new_TK

    def give(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(edit, Giving)
        new_TK, gates_TK = edit.give(ids_TK, weights_TK)
        affected[number] = ((new_TK != ids_TK) | (gates_TK != weights_TK)).any(-1).cpu()
        return new_TK, gates_TK

    return Wanted(None, edit=choose) if isinstance(edit, Choosing) else Wanted(None, give=give)


def _tensors(x: Any) -> Iterator[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(x, Tensor):
        yield x.detach()
        return
    if isinstance(x, dict):
        parts: Any = x.values()
    elif isinstance(x, list | tuple):
        parts = x
    elif hasattr(x, "__dataclass_fields__"):
        parts = [getattr(x, name) for name in x.__dataclass_fields__]
    else:
        return
    for part in parts:
        yield from _tensors(part)
