"""The CPU path of an MoE layer against transformers' default experts path, in CPU time.

64 experts, hidden 512, intermediate 256, 1,024 tokens, top-8, bfloat16: OLMoE's experts module of
transformers, with the implementation that a model gets when nobody asks for another (grouped_mm),
against `moe_lens.runtime` with the same weights, ids and gate weights. Routing is uniform, or
skewed: the n-th expert drawn in proportion to 1 / n^1.2. With one thread the median ratio of pairs
that took turns must be at most 0.9; with two it is printed. An A/A pair of the layer says what
noise there is. OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=passive): by default they
spin, and CPU time would count that.

    python benchmarks/cpu_layer.py [--quick]
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads OpenMP

import torch
from _common import Pairs, Report, interleaved, is_quick, progress, table
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_lens.runtime import reference
from moe_lens.runtime.layer import MoELayer

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 64, 512, 256, 1024, 8
ZIPF = 1.2
ROUTINGS = {"uniform": 0.0, "zipf 1.2": ZIPF}


def default_experts() -> OlmoeExperts:
    """The experts module of a model that was built with defaults."""
    config = OlmoeConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    experts = OlmoeForCausalLM(config).to(torch.bfloat16).eval().model.layers[0].mlp.experts
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.04)
    return experts


def routing(exponent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token, and gate weights that sum to one."""
    share = torch.arange(1, EXPERTS + 1, dtype=torch.float64) ** -exponent
    ids = torch.multinomial(share.expand(TOKENS, EXPERTS), TOP_K)
    return ids, torch.rand(TOKENS, TOP_K).softmax(1).to(torch.bfloat16)


def main() -> int:
    quick = is_quick(__doc__)
    rounds = 15 if quick else 61
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    experts = default_experts()
    implementation = experts.config._experts_implementation
    layer = MoELayer.from_experts(experts)
    setup = {
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "tokens": TOKENS,
        "top_k": TOP_K,
        "dtype": "bfloat16",
        "rounds": rounds,
        "seed": 0,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "their_implementation": implementation,
        "our_backend": layer.backend.name,
    }
    report = Report("cpu_layer", setup, ("torch", "transformers"))
    print(f"theirs: {type(experts).__name__}, {implementation}; ours: {layer.backend.name}")
    lines = []
    for name, exponent in ROUTINGS.items():
        x = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16)
        ids, weights = routing(exponent)
        ids32 = ids.to(torch.int32)

        def theirs(x: Any = x, ids: Any = ids, weights: Any = weights) -> torch.Tensor:
            return experts(x, ids, weights)

        def ours(x: Any = x, ids: Any = ids32, weights: Any = weights) -> torch.Tensor:
            return layer(x, ids, weights)

        with torch.inference_mode():
            found = compare(name, theirs, ours, rounds)
            wanted = reference.moe(
                x.double(), ids32, weights.double(), *(p.double() for p in experts.parameters())
            )
            errors = [float((y() - wanted).norm() / wanted.norm()) for y in (theirs, ours)]
        load = torch.bincount(ids.flatten(), minlength=EXPERTS)
        report.numbers[name] = {
            "largest_over_mean_load": round(float(load.max() / load.float().mean()), 2),
            "relative_error_theirs_ours": errors,
        } | {what: pairs.as_dict() for what, pairs in found.items()}
        for what, pairs in found.items():
            lines.append(
                [
                    f"{name}, {what}",
                    f"{min(pairs.first) * 1e3:.1f}",
                    f"{min(pairs.second) * 1e3:.1f}",
                    f"{pairs.ratio:.3f}",
                ]
            )
        report.gate(f"{name}: ours / theirs, 1 thread", found["1 thread"].ratio, at_most=0.9)
        report.gate(f"{name}: our error / theirs", errors[1] / errors[0], at_most=1.0)
    table(["routing", "theirs, best ms", "ours, best ms", "median ratio"], lines)
    return report.finish(keep=not quick)


def compare(name: str, theirs: Any, ours: Any, rounds: int) -> dict[str, Pairs]:
    """Pairs with one thread, the A/A pair, and pairs with two."""
    found = {}
    progress(f"{name}: one thread")
    torch.set_num_threads(1)
    found["1 thread"] = interleaved(theirs, ours, rounds, warm_up=3)
    found["1 thread, A/A"] = interleaved(ours, ours, rounds)
    progress(f"{name}: two threads")
    torch.set_num_threads(2)
    found["2 threads"] = interleaved(theirs, ours, rounds, warm_up=3)
    torch.set_num_threads(1)
    return found


if __name__ == "__main__":
    sys.exit(main())
