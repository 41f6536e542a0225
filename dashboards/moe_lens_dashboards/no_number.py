"""Why a router has no entropy, margin, top-1 probability or z-loss. No Streamlit here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_lens_dashboards.findings import known

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo

_NAMES = {
    "entropy_norm": "entropy",
    "margin": "margin",
    "top1_prob": "top-1 probability",
    "zloss": "z-loss",
}


def without(
    layers: Iterable[LayerInfo], rows: Sequence[Mapping[str, Any]], imported: str = ""
) -> list[str]:
    """A sentence for each reason for which layers lack numbers.

    Args:
        layers: What the run's meta says of them.
        rows: Answer of `router_confidence`, one row a layer.
        imported: Why an imported trace has no logits, in place of why we did not see them.
    """
    infos = {x.layer: x for x in layers}
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if not row["tokens"] or row["layer"] not in infos:
            continue
        for column, name in _NAMES.items():
            if known(row[column]) is None:
                why = _why(infos[row["layer"]], column, imported)
                found.setdefault((why, name), []).append(row["layer"])
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (why, name), at in found.items():
        together.setdefault((why, tuple(at)), []).append(name)
    return [f"No {_list(names)} in {_layers(at)}: {why}." for (why, at), names in together.items()]


def _why(info: LayerInfo, column: str, imported: str) -> str:
    by_kind = {
        "hash": "experts are looked up by token id, without logits",
        "task": "the caller names the experts, without logits",
    }
    if info.router in by_kind:
        return by_kind[info.router]
    if info.router == "expert-choice" and column == "margin":
        return "experts choose tokens, so that a token has no k-th and next expert"
    if column == "entropy_norm" and info.experts + info.zero_experts < 2:
        return "one expert leaves nothing to decide"
    if column == "margin" and info.top_k is not None and info.top_k >= info.experts:
        return "every expert is chosen, so that there is no next one"
    if imported:
        return imported
    if column == "margin" and info.selection is None:
        return "what the router ranks experts by could not be found out from its choices"
    if column == "margin":
        return "some choice was not explained by the selection score, or there was no next expert"
    if info.score is None:
        return "its logits were not seen, or what they mean could not be found out"
    return "its logits were not seen in these steps"


def _layers(at: Sequence[int]) -> str:
    if len(at) == 1:
        return f"layer {at[0]}"
    if at[-1] - at[0] + 1 == len(at):
        return f"layers {at[0]} to {at[-1]}"
    return f"layers {', '.join(map(str, at))}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
