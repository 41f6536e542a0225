"""CSV of llama.cpp's `examples/moe-trace`, ggml-org/llama.cpp pull request 28544.

Its callback prints "%d,%d\\n" (layer, id) for each element of `ffn_moe_topk-<layer>`, by layers;
`main` decodes the prompt in chunks of n_ubatch, and then token by token. llama_batch_get_one asks
for the output of a batch's last token, and the graphs of models cut the last layer to outputs
before its feed-forward block (`inp_out_ids`). The tensor is a view of the first K of E columns
(`ggml_argsort_top_k`): the callback's first version reads `ggml_nelements` ids from its start.

Written from that source: llama.cpp's own binary does not run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Traced:
    """Forwards of a prompt and its continuation: `[L, T, E]` experts in order, best first."""

    blocks: tuple[int, ...]
    top_k: int
    forwards: list[NDArray[Any]]
    cut_last: bool = True

    def ids(self, forward: int, layer: int) -> NDArray[Any]:
        """`[tokens that ran, K]`: what one layer chose."""
        order_TE = self.forwards[forward][layer]
        if self.cut_last and layer == len(self.blocks) - 1:
            order_TE = order_TE[-1:]
        return order_TE[:, : self.top_k]


def traced(
    prompt: int = 12,
    generated: int = 3,
    *,
    ubatch: int = 512,
    blocks: tuple[int, ...] = (1, 2, 3),
    experts: int = 8,
    top_k: int = 2,
    cut_last: bool = True,
    seed: int = 0,
) -> Traced:
    """A prompt in chunks of `ubatch`, then so many tokens one by one."""
    rng = np.random.default_rng(seed)
    chunks = [min(ubatch, prompt - i) for i in range(0, prompt, ubatch)] + [1] * generated
    orders = [np.argsort(rng.random((len(blocks), T, experts)), axis=2) for T in chunks]
    return Traced(blocks, top_k, orders, cut_last)


def write_csv(path: Path, of: Traced, *, strided: bool = True) -> Path:
    """As the callback prints it.

    Args:
        strided: Read the view as one; else as its first version does, as if it were contiguous.
    """
    lines = []
    for f in range(len(of.forwards)):
        for i, block in enumerate(of.blocks):
            ids = of.ids(f, i)
            if not strided:
                rows = of.forwards[f][i][-len(ids) :]
                ids = rows.ravel()[: ids.size]
            lines += [f"{block},{expert}\n" for expert in ids.ravel().tolist()]
    path.write_text("".join(lines))
    return path
