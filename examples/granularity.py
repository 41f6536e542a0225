"""What does it cost to use fewer experts a token? A small laboratory, in seconds.

    python examples/granularity.py [RUN]

A teacher layer uses 4 of its 8 experts a token. Students of as many active parameters (and a
quarter more) use 4, 2 and 1; beside each, the best affine map, which learns no routing at all. The
routing of all layers goes into RUN, for moe-lens analyze and the dashboard.
"""

import sys

import pandas as pd
import torch

import moe_lens
from moe_lens import granularity

run = sys.argv[1] if len(sys.argv) > 1 else "traces/small-laboratory"
torch.set_num_threads(1)  # layers this small are slower on more
plan = granularity.plan(
    "quick", hidden=16, teacher=(8, 4), students=[(8, 4), (4, 2), (2, 1)], steps=500
)
rows = list(granularity.executed(plan.runs, plan.recipe))
with moe_lens.record(None, run, tokens=0.1) as recorder:
    granularity.record_routing(recorder, plan, rows)

found = pd.DataFrame(granularity.gap(plan, rows))
print(found[["student", "width", "nmse", "affine_nmse", "sets_used", "possible"]].round(4))
error = found.set_index("top_k").nmse
print(f"one expert a token in place of four: {error[1] / error[4]:.0f} times the error")
