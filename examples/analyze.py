"""What a router does that chance does not explain, metric by metric.

    python examples/analyze.py [RUN]

The run is a synthetic one in which things were planted, so that you see them found: a hot expert,
a dead one, one that code uses twice as often. Put a run of your own in its place; where that lacks
what a metric needs, it says what to record. docs/metrics.md defines every metric.
"""

import sys

import moe_lens
from moe_lens.metrics.catalogue import measure, metrics
from moe_lens.queries.evidence import Evidences
from moe_lens.trace.synthetic import Dead, Hot, Spec, Specialist, generate

run = sys.argv[1] if len(sys.argv) > 1 else "traces/analyze"
planted = (Hot(0, share=0.6), Dead(1), Specialist(2, "code", lift=2.0))
generate(run, Spec(layers=2, experts=16, top_k=4, steps=4, planted=planted, seed=7))

names = ("max_over_mean", "dead_experts", "token_entropy", "domain_lift", "overlap", "set_coverage")
wanted = [metrics()[name] for name in names]
with moe_lens.open(run) as trace:
    (info,) = trace.info().runs
    known = Evidences(trace, info, "train", wanted)
    print("layer  metric              value  by chance")
    for layer in info.layers:
        evidence = known.of(layer)
        for metric in wanted:
            found = measure(metric, evidence)
            if found.lacks:
                print(f"{layer.layer:5}  {metric.name:16} not computed: {found.lacks}")
                continue
            chance = found.chance.expected if found.chance else float("nan")
            numbers = f"{found.value:8.4f} {chance:10.4f}"
            print(f"{layer.layer:5}  {metric.name:16} {numbers}  {found.beyond}")
