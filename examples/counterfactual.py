"""Train the demo's model for some seconds, and ask what its experts and its routes are worth.

    python examples/counterfactual.py [RUN]

An expert that carries much of the traffic need not be one that the loss would miss, nor the other
way round; and a router need not have chosen the best experts. Both are measured, by changing the
routing of the model and looking at its loss, token by token.
"""

import sys

import pandas as pd
import torch

import moe_lens
from moe_lens.demo.batches import held_out_batch
from moe_lens.demo.corpus import load_corpus
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens.demo.train import Recipe, train
from moe_lens.metrics.counterfactual import expert_importance, route_regret

run = sys.argv[1] if len(sys.argv) > 1 else "traces/counterfactual"
torch.manual_seed(0)
corpus = load_corpus()
model = MoELanguageModel(MoEConfig())
with moe_lens.record(model, run, tokens=moe_lens.every(10)) as recorder:
    train(model, corpus, recorder, Recipe(steps=12), lambda progress: None)
model.eval()


def loss(model, batch):
    return model(**batch).loss_BS


batch = held_out_batch(corpus, windows=4, length=64)  # input_ids, targets_BS, tags

# One question at a time: a change of the routing, and what it costs
with moe_lens.intervene(model, loss=loss) as iv:
    base = iv.measure(batch)  # forcing the model's own choices reproduces it bit for bit, or raises
    costs = {f"layer 1 without expert {e}": iv.knock_out(1, e)(base) for e in range(4)}
    costs["layer 1 with its runner-up"] = iv.runner_up(1)(base)
    costs["top-1 in layers 1 and 2"] = (iv.top_k(1, 1) + iv.top_k(2, 1))(base)
    costs["random experts in layer 3"] = iv.random(3)(base)
for name, cost in costs.items():
    by_tag = pd.DataFrame(cost.columns()).groupby("tag").delta.mean().round(4).to_dict()
    print(f"{name}: {cost.mean:+.4f} nats a token, {cost.affected_N.mean():.0%} affected {by_tag}")

# All of a layer, into the run; `moe-lens counterfactual RUN` prints it again
found = moe_lens.counterfactual(model, [batch], run, loss=loss, layers=[1], regret_tokens=48)
experts = expert_importance(found.columns(), found.about["moe_layers"])
shown = ["expert", "load", "knock_out", "knock_out_used", "force_in", "dormant_but_causal"]
print(experts.sort_values("knock_out", ascending=False)[shown].head(6).to_string(index=False))
regret = route_regret(found.columns(), "margin")
shown = ["slice", "tokens", "regret", "random_regret", "mean_route", "rank", "middle_rank", "beats"]
print(regret[shown].to_string(index=False))
