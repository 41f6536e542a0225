"""A placement as serving engines read it.

L layers, P slots.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.plan import Placement, to_json
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.whole import written_whole

FORMATS = ("moe-lens", "sglang", "vllm", "vllm-ascend")


def as_format(plan: Placement, name: str, infos: Sequence[LayerInfo]) -> dict[str, Any]:
    """A placement in one of `FORMATS`.

    Args:
        plan: The placement.
        name: Of the format. "moe-lens": what `plan.read_plan` reads. "sglang": the file of
            `--init-expert-location`, a row for each decoder block; a block without experts of its
            own has them in their order, as the engine starts. "vllm": `physical_to_logical_map` of
            the MoE layers, as vLLM's EplbModelState holds it; vLLM 0.33 has no option that reads
            it. "vllm-ascend": the file of its `expert_map_path`.
        infos: The layers, which know their decoder block.

    Raises:
        ReplayError: No such format, or one that needs decoder blocks, which the trace does not
            know.
    """
    if name == "moe-lens":
        return to_json(plan)
    if name == "sglang":
        return {"physical_to_logical_map": _by_block(plan, infos)}
    if name == "vllm":
        return {"physical_to_logical_map": plan.slots_LP.tolist()}
    if name == "vllm-ascend":
        return {
            "moe_layer_count": len(plan.layers),
            "layer_list": [
                {
                    "layer_id": i,
                    "device_count": plan.ranks,
                    "device_list": [
                        {"device_id": rank, "device_expert": slots}
                        for rank, slots in enumerate(slots_P.reshape(plan.ranks, -1).tolist())
                    ],
                }
                for i, slots_P in enumerate(plan.slots_LP)
            ],
        }
    raise ReplayError(f"no format is called {name!r}: it is one of {', '.join(FORMATS)}.")


def _by_block(plan: Placement, infos: Sequence[LayerInfo]) -> list[list[int]]:
    blocks = {info.layer: info.block for info in infos}
    if unknown := [layer for layer in plan.layers if blocks.get(layer) is None]:
        raise ReplayError(
            f"the trace does not know in which decoder block layer {unknown[0]} is, and SGLang "
            "numbers placements by decoder blocks. Take --format moe-lens, and number it yourself."
        )
    start = [slot % plan.experts for slot in range(plan.slots)]
    rows = [start] * (1 + max(b for b in blocks.values() if b is not None))
    for layer, slots_P in zip(plan.layers, plan.slots_LP.tolist(), strict=True):
        rows[blocks[layer] or 0] = slots_P
    return rows


def write_plan(path: Path, said: dict[str, Any]) -> None:
    """Write a placement, whole or not at all.

    Raises:
        ReplayError: It cannot be written there.
    """
    try:
        with written_whole(path) as part:
            part.write_text(json.dumps(said) + "\n", encoding="utf-8")
    except OSError as e:
        raise ReplayError(
            f"{path} cannot be written ({e.strerror or e}): name another with --out."
        ) from e
