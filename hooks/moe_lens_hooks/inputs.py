"""What the root module's arguments tell of a forward: its batch, cache, packed sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_BATCHES = ("input_ids", "inputs_embeds", "tokens")
_DECODER_BATCHES = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_CACHES = ("past_key_values", "cache_params")
_LENGTHS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


def batch_shape(
    inputs: dict[str, Any],
    stream: str,
    block: tuple[int, int] | None,
    tokens: int | None,
    layout: str,
) -> tuple[int, int]:
    """(B, S) of a stream.

    The first that makes `tokens` tokens: the MoE block's own `[B, S, D]` input, unless that is one
    row of what the root module was given as several; then the root module's arguments; else one
    row of all of them.

    Args:
        inputs: The root module's arguments by name.
        stream: main, encoder, decoder or mtp.
        block: First two sizes of the block's input; None where it is `[T, D]`.
        tokens: Tokens that were routed; None where the layer saw a part of them.
        layout: "bs", or "sb": then the block's input is `[S, B, D]`.
    """
    said = None
    for name in _DECODER_BATCHES if stream == "decoder" else _BATCHES:
        x = inputs.get(name)
        if isinstance(x, Tensor) and x.ndim >= 2:
            said = (x.shape[0], x.shape[1])
            break
    if block is not None and layout == "sb":
        block = (block[1], block[0])
    if said is not None and tokens not in (None, said[0] * said[1]):
        said = None
    flat = block is not None and said is not None and block == (1, said[0] * said[1])
    if block is not None and not flat and tokens in (None, block[0] * block[1]):
        return block
    return said or (1, tokens or 0)


def positions_of(inputs: dict[str, Any]) -> int | None:
    """S of the root module's own arguments; None where they do not tell."""
    given = (inputs.get(name) for name in (*_DECODER_BATCHES, *_BATCHES))
    return next((x.shape[1] for x in given if isinstance(x, Tensor) and x.ndim >= 2), None)


def token_ids(inputs: dict[str, Any], layout: str) -> dict[str, Tensor]:
    """Vocabulary ids `[T]` by stream, in the order in which the model flattens its batch."""
    out: dict[str, Tensor] = {}
    for name, streams in (
        ("input_ids", ("main", "encoder")),
        ("tokens", ("main",)),
        ("decoder_input_ids", ("decoder",)),
    ):
        ids = inputs.get(name)
        if isinstance(ids, Tensor):
            flat = ids.T if layout == "sb" and ids.ndim == 2 else ids
            out |= {stream: flat.reshape(-1) for stream in streams}
    return out


def cache_of(inputs: dict[str, Any]) -> Any:
    """The key-value cache that a forward goes on with; None without one."""
    return next((c for name in _CACHES if (c := inputs.get(name)) is not None), None)


def returned_cache(output: Any) -> Any:
    """The cache in what a model returned; None without one."""
    for name in _CACHES:
        if (cache := getattr(output, name, None)) is not None:
            return cache
    parts = output if isinstance(output, tuple) else ()
    return next((p for p in parts if callable(getattr(p, "get_seq_length", None))), None)


def cached_length(cache: Any) -> int | Tensor | None:
    """Positions that a cache holds; a tensor where only a device knows; None where nothing tells.

    Static caches count on their device: reading that number would make the model wait.
    """
    n = said_length(cache)
    if isinstance(n, Tensor):
        return n.detach().clone() if n.device.type != "cpu" else int(n)
    return n if n is None else int(n)


def said_length(cache: Any) -> int | Tensor | None:
    """Positions that a cache holds, as it says it itself; a tensor may change as the model runs."""
    length = getattr(cache, "get_seq_length", None)
    if not callable(length):
        return _legacy_length(cache)
    try:
        n: int | Tensor = length()
    except ValueError:  # linear attention only: it keeps a state, not positions
        return None
    return n


def cached_positions(inputs: dict[str, Any]) -> int:
    """Positions that the forward's cache holds, read on the host; 0 without a cache."""
    length = cached_length(cache_of(inputs))
    return 0 if length is None else int(length)


def packed_lengths(inputs: dict[str, Any], stream: str) -> Tensor | list[int] | None:
    """Cumulative lengths of packed sequences, as FlashAttention takes them; None: not packed."""
    if stream != "main":
        return None
    for name in _LENGTHS:
        x = inputs.get(name)
        if isinstance(x, Tensor) and x.numel() > 1:
            return x.reshape(-1).detach()
        if isinstance(x, list | tuple) and len(x) > 1:
            return [int(v) for v in x]
    return None


def _legacy_length(cache: Any) -> int | None:
    """Of a tuple of layers of (keys, values) `[B, H, positions, D]`, as models before 4.36 had."""
    while isinstance(cache, tuple | list) and cache:
        cache = cache[0]
    return cache.shape[-2] if isinstance(cache, Tensor) and cache.ndim == 4 else None
