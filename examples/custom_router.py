"""Record a router that no adapter knows: hand its choices to rec.log.

    python examples/custom_router.py [RUN]

For a module of your own that you cannot change, write an adapter instead: docs/hooks.md.
"""

import sys

import torch

import moe_lens

run = sys.argv[1] if len(sys.argv) > 1 else "traces/custom_router"
torch.manual_seed(0)
EXPERTS, TOP_K, CAPACITY = 6, 2, 14
router = torch.nn.Linear(16, EXPERTS)

with moe_lens.record(None, run, tokens=1.0) as rec:
    for _ in range(5):
        with rec.step(tags=["even", "odd"], phase="train"):
            x_BSD = torch.randn(2, 16, 16)
            logits = router(x_BSD)
            weights, expert_ids = logits.softmax(-1).topk(TOP_K)
            # How many choices of this expert came before this one: at most CAPACITY are computed.
            onehot = torch.nn.functional.one_hot(expert_ids.reshape(-1), EXPERTS)
            place = (onehot.cumsum(0) * onehot).sum(-1).view_as(expert_ids)
            rec.log(
                "router", expert_ids, weights, logits, kept=place <= CAPACITY, capacity=CAPACITY
            )

print(moe_lens.open(run).query("dropped_tokens"))
