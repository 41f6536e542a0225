"""What is raced: layers of published models, batches, and how their tokens are routed.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.replay.presets import preset

DTYPE = torch.bfloat16
TOKENS = {"prefill": 4096, "decode": 64}
TINY_TOKENS = {"prefill": 48, "decode": 4}
ROUTINGS = ("uniform", "zipf 1")
PRESETS = {
    "olmoe": "olmoe-1b-7b",
    "qwen3": "qwen3-30b-a3b",
    "mixtral": "mixtral-8x7b",
    "deepseek": "deepseek-v3",
}


@dataclass(frozen=True)
class Shape:
    """One MoE layer."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int


@dataclass
class Case:
    """A batch for a layer of one shape. Gate weights sum to one, in the dtype of the tokens."""

    shape: Shape
    phase: str
    routing: str
    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def key(self) -> str:
        return f"{self.shape.name} {self.phase}, {self.routing}"

    @cached_property
    def long_ids_TK(self) -> Tensor:
        """As a router of transformers gives them."""
        return self.ids_TK.long()

    @cached_property
    def rows_E(self) -> list[int]:
        """Rows of each expert."""
        flat = self.ids_TK.flatten().cpu()
        return torch.bincount(flat[flat >= 0], minlength=self.shape.experts).tolist()

    def counts(self) -> dict[str, Any]:
        """What floors are computed from, and how even the routing is."""
        rows_E = np.array(self.rows_E)
        touched = rows_E[rows_E > 0]
        return {
            "tokens": len(self.ids_TK),
            "rows": int(rows_E.sum()),
            "touched": len(touched),
            "rows_of_an_expert": [int(touched.min()), float(np.median(touched)), int(rows_E.max())],
        }


def shape_of(name: str, *, tiny: bool) -> Shape:
    """A published model's layer, or one of a size for trying the script."""
    model = preset(PRESETS[name])
    shape = Shape(name, model.experts, model.hidden, model.intermediate, model.top_k)
    if not tiny:
        return shape
    return replace(
        shape, experts=min(8, shape.experts), hidden=64, intermediate=32, top_k=min(2, shape.top_k)
    )


def routed(tokens: int, experts: int, top_k: int, routing: str, seed: int) -> np.ndarray[Any, Any]:
    """int32 ids [T, K], distinct for a token.

    Experts are drawn without replacement in proportion to their popularity (the largest of
    log-popularity plus Gumbel noise): equal, or of the n-th most popular 1 / n.
    """
    random = np.random.default_rng(seed)
    exponent = {"uniform": 0.0, "zipf 1": 1.0}[routing]
    log_share_E = -exponent * np.log(1.0 + random.permutation(experts))
    score_TE = log_share_E + random.gumbel(size=(tokens, experts))
    return np.argsort(-score_TE, axis=1)[:, :top_k].astype(np.int32)


def case(
    shape: Shape, phase: str, routing: str, ids_TK: np.ndarray[Any, Any], device: str, seed: int
) -> Case:
    """The batch of these ids, with random tokens."""
    torch.manual_seed(seed)
    tokens, top_k = ids_TK.shape
    return Case(
        shape,
        phase,
        routing,
        torch.randn(tokens, shape.hidden, device=device).to(DTYPE),
        torch.from_numpy(ids_TK).to(device),
        torch.randn(tokens, top_k, device=device).softmax(1).to(DTYPE),
    )


def recorded(run: str | Path, tokens: int) -> tuple[np.ndarray[Any, Any], int]:
    """Ids of the middle MoE layer of a trace, forward after forward, and how many experts it has.

    Tokens of which a slot did not run are left out.
    """
    from moe_lens.replay.choose import choose
    from moe_lens.replay.index import index_of
    from moe_lens.replay.routing import read
    from moe_lens.trace.reader import open_run

    files = open_run(Path(run))
    index = index_of(files)
    layers = sorted({layer for _, layer in index.infos})
    middle = layers[len(layers) // 2]
    index = index_of(files, layers=frozenset({middle}))
    found, have = [], 0
    # A chunk may hold many forwards: a small one, so that no more is read than is needed.
    for layer in read(index, {middle}, choose(index, None).forwards, chunk=4 * tokens):
        for each in layer:
            ids_TK = each.expert_ids_TK[(each.expert_ids_TK >= 0).all(axis=1)]
            if found and ids_TK.shape[1] != found[0].shape[1]:
                continue
            found.append(ids_TK)
            have += len(ids_TK)
        if have >= tokens:
            break
    experts = next(iter(index.infos.values())).experts
    return np.ascontiguousarray(np.concatenate(found)[:tokens]), experts


def recorded_shape(experts: int, top_k: int, *, tiny: bool) -> Shape:
    """The published layer with as many experts and choices; else OLMoE's widths with those."""
    for name in PRESETS:
        shape = shape_of(name, tiny=False)
        if (shape.experts, shape.top_k) == (experts, top_k):
            return shape
    like = shape_of("olmoe", tiny=tiny)
    return replace(like, name=f"{experts} experts top-{top_k}", experts=experts, top_k=top_k)
