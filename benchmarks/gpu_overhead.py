"""What recording costs a model on a GPU: time of a recorded step over that of a bare one.

transformers' Qwen3-MoE, random bf16 weights, eval mode, no gradients. Prefill: 4 x 1,024 tokens, 16
layers, 64 experts, top-8. Decode: 64 sequences of one token each, without a cache, as a CUDA graph
that is captured once and replayed. Gates: at most 1.03 of the bare step with counts alone and 1.05
with every token's row (prefill), 1.05 and 1.10 (decode).

A figure is wall time of a run of steps with the device idle before and after, since that is what a
GPU's user waits for: it has the hooks' Python, their kernels and whatever the model waits for. The
ratio is the median of pairs that took turns; an A/A pair (the bare step twice) stands beside it.

Without a CUDA device it says so, writes nothing, and returns 0: there is nothing to gate.

    python benchmarks/gpu_overhead.py [--quick]
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Pairs, Report, is_quick, progress, scratch, table
from torch import Tensor, nn

from moe_lens_hooks.recorder import Recorder

SEED = 2026
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
PREFILL, DECODE = (4, 1024), (64, 1)
BOUNDS = {"prefill": (1.03, 1.05), "decode": (1.05, 1.10)}

Step = Callable[[], Any]


def seconds(step: Step, steps: int) -> float:
    """Wall time of one step, in a run of them."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - before) / steps


def turns(first: Step, second: Step, rounds: int, steps: int) -> Pairs:
    """Both in turns; who begins changes from round to round."""
    pairs = Pairs([], [])
    for work in (first, second):
        seconds(work, steps)
    for i in range(rounds):
        both = [(first, pairs.first), (second, pairs.second)]
        for work, taken in both if i % 2 == 0 else reversed(both):
            taken.append(seconds(work, steps))
    return pairs


def captured(model: nn.Module, ids: Tensor) -> torch.cuda.CUDAGraph:
    """A forward as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, use_cache=False)
    return graph


def step_of(kind: str, model: nn.Module, ids: Tensor) -> Step:
    if kind == "decode":
        return captured(model, ids).replay
    return lambda: model(ids, use_cache=False)


def measure(
    kind: str, models: tuple[nn.Module, nn.Module], run: Path, tokens: float | None, rounds: int
) -> Pairs:
    """A step of the first model, and a recorded one of its twin; `tokens=None`: bare too (A/A)."""
    ids = torch.randint(CONFIG["vocab_size"], PREFILL if kind == "prefill" else DECODE).cuda()
    steps = 4 if kind == "prefill" else 32
    bare = step_of(kind, models[0], ids)
    if tokens is None:
        return turns(bare, step_of(kind, models[1], ids), rounds, steps)
    with Recorder(models[1], run, tokens=tokens) as recorder:
        inner = step_of(kind, models[1], ids)

        def recorded() -> None:
            with recorder.step():
                inner()

        pairs = turns(bare, recorded, rounds, steps)
        recorder.flush()
        if recorder._writer.lost_rows:
            raise SystemExit(f"{recorder._writer.lost_rows} rows were lost")
    return pairs


def main() -> int:
    quick = is_quick(__doc__)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured, and no result is written")
        return 0
    import transformers

    rounds = 3 if quick else 15
    torch.set_grad_enabled(False)
    torch.manual_seed(SEED)
    config = transformers.Qwen3MoeConfig(**CONFIG)
    with torch.device("cuda"):
        model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    models = (model, copy.deepcopy(model))
    setup = {
        "model": "transformers.Qwen3MoeForCausalLM, random bf16 weights, grouped_mm experts",
        "config": CONFIG,
        "prefill": PREFILL,
        "decode": DECODE,
        "seed": SEED,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
    }
    report = Report("gpu_overhead", setup, ("torch", "transformers"))
    modes = {"not recorded": None, "counts (tokens=0)": 0.0, "every row (tokens=1.0)": 1.0}
    lines = []
    with scratch() as folder:
        for kind, bounds in BOUNDS.items():
            for number, (name, tokens) in enumerate(modes.items()):
                pairs = measure(kind, models, folder / f"{kind}{number}", tokens, rounds)
                first, second = statistics.median(pairs.first), statistics.median(pairs.second)
                report.numbers[f"{kind}, {name}"] = {
                    "median_ratio": pairs.ratio,
                    "ratios": [round(r, 4) for r in pairs.ratios],
                    "bare_s": first,
                    "other_s": second,
                }
                cells = [f"{1e3 * first:.2f} ms", f"{1e3 * second:.2f} ms", f"{pairs.ratio:.3f}"]
                lines.append([f"{kind}, {name}", *cells])
                if tokens is not None:
                    bound = bounds[number - 1]
                    report.gate(f"{kind} step on a GPU, {name}", pairs.ratio, at_most=bound)
                progress(f"{kind}, {name}")
    table(["wall time of a step", "bare", "other", "ratio"], lines)
    print("(not recorded: the A/A pair)")
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
