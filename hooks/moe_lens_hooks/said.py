"""What users say of a step, read into plain Python once, when the step begins.

One value, a value per sequence `[B]`, per token `[B, S]`, or cumulative lengths of packed rows.
Tensors on a device are read here, outside of any forward: the one place where that is waited for.

Legend: B sequences (rows), S positions, T = B S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.trace.schema import UNTAGGED
from moe_lens_hooks.staging import onto


class DoesNotFit(ValueError):
    """What the user said of a step does not fit a batch of it."""


@dataclass
class StepContext:
    """What the user said of a step; see `Recorder.step`. Lists, not tensors (`said`)."""

    tags: Any = None
    sequences: Any = None
    padding: Any = None
    phase: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


def said(
    tags: Any,
    sequences: Any,
    padding: Any,
    phase: str | None,
    keys: dict[str, Any] | None,
    declared: Sequence[str],
) -> StepContext:
    """What `rec.step` was given.

    Raises:
        ValueError: Keys that were not declared, or values that are ragged.
    """
    if unknown := set(keys or ()) - set(declared):
        raise ValueError(
            f"keys {sorted(unknown)} were not declared; declare them: record(..., keys=[...])"
        )
    return StepContext(
        tags=plain("tags", tags),
        sequences=plain("sequences", sequences),
        padding=padding if isinstance(padding, Tensor) else plain("padding", padding),
        phase=phase,
        keys={name: plain(f"keys[{name!r}]", values) for name, values in (keys or {}).items()},
    )


def last_positions(context: StepContext, S: int) -> StepContext:
    """The same for a stream that sees the last S positions of each row only."""

    def last(values: Any) -> Any:
        per_token = isinstance(values, list) and bool(values) and isinstance(values[0], list)
        return [row[-S:] for row in values] if per_token else values

    padding = context.padding
    if isinstance(padding, Tensor) and padding.ndim == 2:
        padding = padding[:, -S:]
    return replace(
        context,
        tags=last(context.tags),
        sequences=last(context.sequences),
        padding=last(padding),
    )


def plain(name: str, given: Any) -> Any:
    """One value, a list of values, or a list of equally long lists of values.

    Raises:
        ValueError: Rows of different lengths, or values and lists side by side.
    """
    if isinstance(given, Tensor | np.ndarray | np.generic):
        return given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return given
    values = [plain(name, x) for x in given]
    lengths = {len(x) if isinstance(x, list) else None for x in values}
    if len(lengths) > 1:
        got = [len(x) if isinstance(x, list) else repr(x) for x in values]
        raise DoesNotFit(
            f"{name} is ragged: its rows have {', '.join(map(str, got[:8]))} values. Give one "
            "value, one per sequence, or rows of one length [B, S]."
        )
    return values


def tags_of(values: Any, B: int, S: int, owners: int, unit: str, expand: int) -> list[Any]:
    """The tags as one value, `[owners]`, or `[B][S]`; None in them means untagged.

    Args:
        values: As `plain` gave them.
        B: Rows of the forward.
        S: Its positions.
        owners: Sequences in it: B, or how many are packed.
        unit: What they are called.
        expand: Rows that a generation makes of each of the user's.

    Raises:
        ValueError: They do not fit the batch.
    """
    if not isinstance(values, list):
        return [UNTAGGED if values is None else values]
    if values and isinstance(values[0], list):
        fits("tags", [len(values), len(values[0])], B, S)
        return [[UNTAGGED if v is None else v for v in row] for row in values]
    values = expanded(values, owners, expand)
    if len(values) != owners:
        raise DoesNotFit(
            f"tags has {len(values)} values, but this forward has {owners} {unit} "
            f"(batch {B} x {S} tokens). Give one value, one per sequence, or [B, S]."
        )
    return [UNTAGGED if v is None else v for v in values]


def keys_of(keys: dict[str, Any], rows: int, expand: int) -> dict[str, list[str | None]]:
    """The user's keys by name, one value for each row.

    Raises:
        ValueError: Another number of values than rows.
    """
    out: dict[str, list[str | None]] = {}
    for name, values in keys.items():
        each = [values] * rows if not isinstance(values, list) else expanded(values, rows, expand)
        if len(each) != rows:
            raise DoesNotFit(
                f"keys[{name!r}] has {len(each)} values, but this forward has {rows} sequences. "
                "Give one value, or one per sequence."
            )
        out[name] = [None if v is None else str(v) for v in each]
    return out


def expanded(values: list[Any], rows: int, expand: int) -> list[Any]:
    """Each value as often as a generation repeats its row (beams, returned sequences)."""
    if expand > 1 and len(values) * expand == rows:
        return [v for v in values for _ in range(expand)]
    return values


def cumulative(values: Any, B: int, T: int) -> NDArray[np.int64] | None:
    """The values as cumulative lengths, if that is what they are: 0, …, T, never falling.

    Raises:
        ValueError: They end elsewhere than at T.
    """
    if not isinstance(values, list) or len(values) == B or len(values) < 2:
        return None
    if not all(isinstance(v, int) for v in values):
        return None
    lengths = np.array(values, np.int64)
    if lengths[0] != 0 or (np.diff(lengths) < 0).any():
        return None
    if lengths[-1] != T:
        raise DoesNotFit(
            f"sequences looks like cumulative lengths that end at {lengths[-1]}, but this forward "
            f"has {T} tokens."
        )
    return lengths


def fits(name: str, got: list[int], B: int, S: int) -> None:
    """Refuse a shape that is neither `[B]` nor `[B, S]`.

    Raises:
        ValueError: It is neither.
    """
    if got not in ([B], [B, S]):
        raise DoesNotFit(
            f"{name} has shape {got}, but this forward is a batch of {B} x {S} tokens. Give one "
            f"value, one per sequence [{B}], one per token [{B}, {S}], or cumulative lengths."
        )


def padding_said(given: Any, B: int, S: int, expand: int, device: torch.device) -> Tensor | None:
    """Padding `[B, S]` (True: padding) as the user said it; None: there is none.

    Args:
        given: bool, valid lengths `[B]` (padding on the right), or bool `[B]` or `[B, S]`.
        B: Rows of the forward.
        S: Its positions.
        expand: Rows that a generation makes of each of the user's.
        device: Where the result is.

    Raises:
        ValueError: Another shape.
    """
    if isinstance(given, bool):
        return torch.ones((B, S), dtype=torch.bool, device=device) if given else None
    mask = (
        given
        if isinstance(given, Tensor)
        else torch.as_tensor(expanded(given, B, expand), device="cpu")
    )
    fits("padding", list(mask.shape), B, S)
    mask = onto(mask, device)
    if mask.ndim == 1 and mask.dtype != torch.bool:  # valid lengths, padding on the right
        return torch.arange(S, device=device)[None] >= mask[:, None]
    if mask.ndim == 1:
        mask = mask[:, None].expand(B, S)
    return mask.to(dtype=torch.bool, copy=True)
