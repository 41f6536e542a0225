"""A short demo, and a plain Python count of what its experts were given and its routers said."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import moe_lens
from moe_lens.demo.corpus import load_corpus
from moe_lens.demo.evaluate import evaluate
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens.demo.moe import Experts, TopKRouter
from moe_lens.demo.train import Recipe, train

EXPERTS = MoEConfig().num_experts


@dataclass
class Counted:
    """Choices and drops, one by one."""

    path: Path
    routed: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    """By phase, layer and expert."""
    dropped: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Choices by phase and layer."""
    entropies: list[float] = field(default_factory=list)
    """Of each token in each layer, over its maximum (0 to 1)."""
    tokens: Counter[str] = field(default_factory=Counter)
    """By phase, each once."""


def record_demo(path: Path, steps: int = 3) -> Counted:
    """Train and evaluate the demo's model a little, recorded and counted apart at once."""
    torch.manual_seed(0)
    model = MoELanguageModel(MoEConfig())
    out, run_experts, route = Counted(path), Experts.forward, TopKRouter.forward
    layer_of = {
        id(m): i for i, m in enumerate(m for m in model.modules() if isinstance(m, Experts))
    }

    def experts(self, x_TD, ids_TK, weights_TK, kept_TK=None):
        phase, layer = "train" if self.training else "eval", layer_of[id(self)]
        kept = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        for ids, keeps in zip(ids_TK.tolist(), kept.tolist(), strict=True):
            out.tokens[phase] += layer == 0
            for expert, keep in zip(ids, keeps, strict=True):
                out.routed[phase, layer, expert] += 1
                out.dropped[phase, layer] += not keep
        return run_experts(self, x_TD, ids_TK, weights_TK, kept_TK)

    def router(self, x_TD):
        logits_TE, weights_TK, ids_TK = route(self, x_TD)
        for logits in logits_TE.double().tolist():
            highest = max(logits)
            powers = [math.exp(x - highest) for x in logits]
            shares = [x / sum(powers) for x in powers]
            entropy = -sum(p * math.log(p) for p in shares if p)
            out.entropies.append(entropy / math.log(len(logits)))
        return logits_TE, weights_TK, ids_TK

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "forward", experts)
        patch.setattr(TopKRouter, "forward", router)
        with moe_lens.record(model, path, tokens=moe_lens.every(2)) as recorder:
            corpus = load_corpus()
            train(model, corpus, recorder, Recipe(steps=steps), lambda now: None)
            evaluate(model, corpus, recorder, length=128, windows=4)
    return out
