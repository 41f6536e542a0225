"""Routing that the user hands over: what `rec.log` does."""

from __future__ import annotations

from torch import Tensor

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.capture import Capture
from moe_lens_hooks.forward import Block, recomputing
from moe_lens_hooks.pausing import SkippedForward


def log(
    capture: Capture,
    layer: int | str,
    expert_ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    experts: int | None,
    kept: Tensor | None,
    capacity: int | None,
    limit: tuple[int | None, int | None],
) -> None:
    """Put a layer into the forward that is running, or into one of its own; see `Recorder.log`.

    Raises:
        ValueError: Shapes that disagree, E unknown, groups that cannot be, or tags that do not fit
            the batch.
    """
    E = experts if experts is not None else (logits.shape[-1] if logits is not None else None)
    if E is None:
        raise ValueError("rec.log needs experts=E where no logits are given")
    if expert_ids.shape != weights.shape or expert_ids.ndim not in (2, 3):
        raise ValueError(
            f"expert_ids {list(expert_ids.shape)} and weights {list(weights.shape)} must both "
            "be [T, K] or [B, S, K]"
        )
    K, policy = expert_ids.shape[-1], None if kept is None else "unknown"
    groups, top_groups = limit
    info = LayerInfo(
        *(-1, str(layer), E, K),
        adapter="rec.log",
        capacity_policy=policy,
        groups=groups,
        top_groups=top_groups,
    )
    if info.contradiction is not None:
        raise ValueError(f"rec.log of {layer}: {info.contradiction}")
    shape = (expert_ids.shape[0], expert_ids.shape[1]) if expert_ids.ndim == 3 else None
    if recomputing():
        return
    name = hash(("log", layer))
    forward = capture.current
    if forward is not None and forward.implicit and name in forward.entered:
        capture.end_implicit()
    forward = capture.implicit()
    if isinstance(forward, SkippedForward):
        forward.entered[name] = 1
        return
    forward.expected += 1
    times = forward.entered.get(name, 0)  # inside a forward of the model, again is another
    forward.entered[name] = times + 1
    seen = Observed(
        expert_ids.reshape(-1, K),
        weights.reshape(-1, K),
        None if logits is None else logits.reshape(-1, E),
        kept_TK=None if kept is None else kept.reshape(-1, K),
        capacity=capacity,
    )
    seen.hold()
    info.path = f"{layer} #{times}" if times else str(layer)
    capture.add(Block((("log", layer), times), info, None, shape, seen))
