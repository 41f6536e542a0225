"""A batch, taken apart by sequences, and the loss of each of its tokens.

Legend: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import SteeringError

Batch = Tensor | Mapping[str, Any]
"""Token ids `[B, S]`; or the model's arguments by name, and under `tags` a tag of each sequence."""

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch without its tags) to the loss of each token; it calls the model once."""

_IGNORED = -100
_HOW = (
    "Give loss=f, where f(model, batch) calls the model once and returns the loss of each token "
    "[B, S] or [B, S - 1], NaN where there is none"
)


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in nats `[B, S]` of the token that follows each; NaN where none does.

    What follows is `labels`, or the tokens themselves. There is no loss before a label of -100, nor
    at or before padding (by `attention_mask`): what padding predicts says nothing.

    Raises:
        SteeringError: The model returns no logits `[B, S, V]`, or the batch has no tokens.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    labels = inputs.pop("labels", None)
    output = model(**inputs) if isinstance(batch, Mapping) else model(batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    targets = inputs.get("input_ids") if labels is None else labels
    if logits is None or targets is None or logits.shape[:-1] != targets.shape:
        got = "no logits" if logits is None else f"logits {list(logits.shape)}"
        to = "no input_ids" if targets is None else f"tokens {list(targets.shape)}"
        raise SteeringError(f"no loss per token: {got} for {to}. {_HOW}.")
    targets = targets[:, 1:].to(logits.device)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        padding = mask.to(logits.device) == 0
        nothing = padding[:, :-1] | padding[:, 1:] if labels is None else padding[:, :-1]
        targets = targets.masked_fill(nothing, _IGNORED)
    kind = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].to(kind).transpose(1, 2),
        targets,
        ignore_index=_IGNORED,
        reduction="none",
    )
    return loss.masked_fill(targets == _IGNORED, torch.nan)


def split_tags(batch: Batch) -> tuple[Batch, list[str] | None]:
    """What the model is given, and the tag of each sequence.

    Raises:
        SteeringError: It is no batch.
    """
    if isinstance(batch, Tensor):
        return batch, None
    shape_of(batch)
    inputs = {name: x for name, x in batch.items() if name != "tags"}
    tags = batch.get("tags")
    sequences, _ = shape_of(inputs)
    if isinstance(tags, str):
        raise SteeringError(f"tags={tags!r}: give a list of one for each sequence.")
    if tags is not None and len(tags) != sequences:
        raise SteeringError(f"the batch has {sequences} sequences, but {len(tags)} tags.")
    return inputs, None if tags is None else [str(tag) for tag in tags]


def shape_of(batch: Batch) -> tuple[int, int]:
    """(B, S) of a batch: of its token ids or embeddings; else of the first tensor of two axes.

    Raises:
        SteeringError: There is none, or it is empty.
    """
    if not isinstance(batch, Tensor | Mapping):
        raise SteeringError(
            "a batch is token ids [B, S] or a dict of the model's arguments, got "
            f"{type(batch).__name__}."
        )
    named = {} if isinstance(batch, Tensor) else batch
    first = [named.get("input_ids"), named.get("inputs_embeds")]
    for x in [batch] if isinstance(batch, Tensor) else [*first, *batch.values()]:
        if isinstance(x, Tensor) and x.ndim >= 2:
            if 0 in x.shape[:2]:
                raise SteeringError(f"the batch is empty: {list(x.shape)}.")
            return x.shape[0], x.shape[1]
    raise SteeringError("the batch holds no tensor [B, S]: give token ids, or the model's inputs.")


def take(batch: Batch, rows: Tensor) -> Batch:
    """The batch of these sequences, in this order; one may be taken several times."""
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)]
    whole, _ = shape_of(batch)

    def of(x: Any) -> Any:
        return x[rows.to(x.device)] if isinstance(x, Tensor) and x.shape[:1] == (whole,) else x

    return {name: of(x) for name, x in batch.items()}


def per_token(loss: object, shape: tuple[int, int]) -> Tensor:
    """The losses `[B, S]` on the host, NaN where there is none.

    Raises:
        SteeringError: They are not one a token.
    """
    B, S = shape
    if not isinstance(loss, Tensor) or tuple(loss.shape) not in ((B, S), (B, S - 1)):
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise SteeringError(f"the loss of {B} x {S} tokens has {got}: not one a token. {_HOW}.")
    kind = torch.promote_types(loss.dtype, torch.float32)
    loss = loss.detach().to(kind).cpu()
    return torch.nn.functional.pad(loss, (0, S - loss.shape[1]), value=torch.nan)
