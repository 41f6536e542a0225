"""Which rank should hold which experts: placements judged by forwards they were not fitted to.

    python examples/place.py [RUN]

The run is a synthetic one whose routing is skewed: put one of your own in its place, recorded in
training or serving. Rows per token are needed only to say what tokens would send to each other's
ranks; the counts that every recording has are enough for the rest.
"""

import sys

from moe_lens.replay.placement.fit import Group
from moe_lens.replay.placement.study import Question, study
from moe_lens.trace import synthetic

run = sys.argv[1] if len(sys.argv) > 1 else "traces/place"
synthetic.generate(run, synthetic.stationary(layers=2, rows=True))

found = study(run, Question(Group(ranks=8, replicas=16, nodes=2), method="eplb", verdict=True))

print("             max/mean  slowest rank, p99  ranks a token is sent to")
for of in (found.now, *found.candidates):
    balance = of.balance["train"]
    sent = of.traffic.to_ranks.rows / of.traffic.token_layers
    name, even = of.placement.method, balance.max_over_mean
    print(f"{name:12} {even:8.3f} {balance.slowest_p99:18.1%} {sent:25.2f}")
print(f"\n{found.plan.method} {found.verdict.says}: {found.verdict.why}")
print(f"slots of rank 0 in layer 0: {found.plan.slots_LP[0, : found.plan.slots_per_rank].tolist()}")
