"""What the root module's arguments tell of a forward: its batch, its phase, its past."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_BATCHES = ("input_ids", "inputs_embeds", "tokens")
_DECODER_BATCHES = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def batch_shape(
    inputs: dict[str, Any],
    stream: str,
    block: tuple[int, int] | None,
    tokens: int | None,
    layout: str,
) -> tuple[int, int]:
    """(B, S) of a stream.

    The first that makes `tokens` tokens: the MoE block's own `[B, S, D]` input, then the root
    module's arguments; else one row of all of them.

    Args:
        inputs: The root module's arguments by name.
        stream: main, encoder or decoder.
        block: First two sizes of the block's input; None where it is `[T, D]`.
        tokens: Tokens that were routed; None where the layer saw a part of them.
        layout: "bs", or "sb": then the block's input is `[S, B, D]`.
    """
    if block is not None and tokens in (None, block[0] * block[1]):
        return block if layout == "bs" else (block[1], block[0])
    for name in _DECODER_BATCHES if stream == "decoder" else _BATCHES:
        x = inputs.get(name)
        if not isinstance(x, Tensor) or x.ndim < 2:
            continue
        if tokens in (None, x.shape[0] * x.shape[1]):
            return x.shape[0], x.shape[1]
    return 1, tokens or 0


def cached_positions(inputs: dict[str, Any]) -> int:
    """Positions that the key-value cache holds already; 0 without one."""
    length = getattr(inputs.get("past_key_values"), "get_seq_length", None)
    return int(length()) if callable(length) else 0


def phase_of(model: nn.Module | None, inputs: dict[str, Any]) -> str:
    """train, or with a cache prefill (it is empty) and decode (it is not), or eval."""
    if model is not None and model.training:
        return "train"
    if inputs.get("past_key_values") is None:
        return "eval"
    return "decode" if cached_positions(inputs) else "prefill"
