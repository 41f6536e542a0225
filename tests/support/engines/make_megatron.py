"""Writes `tests/data/engines/megatron/` with megatron-core 0.19.0's own tracer, on a CPU.

    python tests/support/engines/make_megatron.py FOLDER-OF-THE-UNPACKED-WHEEL OUT

`megatron/core/transformer/moe/router_trace.py` runs as it is, by itself: it needs only torch. Its
hooks are on routers that choose the largest logits and return a mask, as `TopKRouter` does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NAMES = (
    "decoder.layers.1.mlp.router",
    "decoder.layers.3.mlp.router",
    "mtp.layers.0.mtp_model_layer.layers.1.mlp.router",
)
EXPERTS, TOP_K, HIDDEN = 8, 2, 4
STEPS, MICRO, POSITIONS, SEQUENCES = (7, 8), 2, 3, 2


class Router(nn.Module):
    """What the tracer asks of a `TopKRouter`: weight, expert_bias, topk, config, gating."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.expert_bias = None
        self.topk = TOP_K
        self.config = SimpleNamespace(moe_router_score_function="softmax")

    def gating(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16) @ self.weight.to(torch.bfloat16).T

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, Tensor]:
        prob_TE = self.gating(x_SBD.reshape(-1, HIDDEN)).float().softmax(-1)
        chosen_TE = torch.zeros_like(prob_TE, dtype=torch.bool)
        chosen_TE.scatter_(1, prob_TE.topk(TOP_K).indices, True)
        return prob_TE * chosen_TE, chosen_TE


def write(tracer_module: Any, out: Path, *, rank: int, again: bool) -> None:
    """One rank's training: micro-batches of [positions, sequences]; again: with recomputation."""
    torch.manual_seed(rank)
    tracer = tracer_module.RouterTracer(
        str(out), 100, rank, training_mode=True, capture_logits=True, dump_router_weights=True
    )
    routers = [Router() for _ in NAMES]
    for router, name in zip(routers, NAMES, strict=True):
        router.register_forward_hook(tracer.make_hook(name))
    # A build of torch without CUDA has no stream to ask.
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
        for step in STEPS:
            for _ in range(MICRO):
                ran = [(r, torch.randn(POSITIONS, SEQUENCES, HIDDEN)) for r in routers]
                for router, x in ran + (ran[::-1] if again else []):
                    router(x)
            tracer.advance_step(step)
    tracer.flush()


def main(wheel: Path, out: Path) -> None:
    source = wheel / "megatron/core/transformer/moe/router_trace.py"
    spec = importlib.util.spec_from_file_location("router_trace", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for rank in (0, 1):
        write(module, out / "ranks", rank=rank, again=False)
    write(module, out / "recomputed", rank=0, again=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
