"""Record a router that no adapter knows: a hand-written block as it is, and by hand with rec.log.

    python examples/custom_router.py [RUN]

A block that looks like an MoE proves on its first forward which tensors in it are its routing, by
putting experts out of action. One that drops tokens in a way that its ids do not tell is refused;
then hand over what you know, as in the second half. To describe a module of your own in full,
write an adapter: docs/hooks.md.
"""

import sys

import torch
from torch import nn

import moe_lens

run = sys.argv[1] if len(sys.argv) > 1 else "traces/custom_router"
torch.manual_seed(0)
WIDTH, EXPERTS, TOP_K, CAPACITY = 16, 6, 2, 14


class MyMoE(nn.Module):
    """No base class, no hook point, top-k in the middle of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(WIDTH, EXPERTS)
        self.ffns = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        gates, choice = self.pick(x_BSD).topk(TOP_K)
        gates, out_BSD = gates.softmax(-1), torch.zeros_like(x_BSD)
        for e, ffn in enumerate(self.ffns):
            rows, slot = torch.where((choice == e).view(-1, TOP_K))
            weighed = ffn(x_BSD.view(-1, WIDTH)[rows]) * gates.view(-1, TOP_K)[rows, slot, None]
            out_BSD.view(-1, WIDTH).index_add_(0, rows, weighed)
        return out_BSD


model = nn.Sequential(MyMoE(), nn.LayerNorm(WIDTH), MyMoE()).eval()
with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
    for _ in range(5):
        with rec.step(tags=["even", "odd"]):
            model(torch.randn(2, 16, WIDTH))
print(moe_lens.open(run).sql("select layer, expert, sum(routed) n from load group by all"))

router = nn.Linear(WIDTH, EXPERTS)
with moe_lens.record(None, f"{run}_by_hand", tokens=1.0) as rec:
    for _ in range(5):
        with rec.step(tags=["even", "odd"], phase="train"):
            logits = router(torch.randn(2, 16, WIDTH))
            weights, expert_ids = logits.softmax(-1).topk(TOP_K)
            # How many choices of this expert came before this one: at most CAPACITY are computed.
            onehot = torch.nn.functional.one_hot(expert_ids.reshape(-1), EXPERTS)
            place = (onehot.cumsum(0) * onehot).sum(-1).view_as(expert_ids)
            kept = place <= CAPACITY
            rec.log("router", expert_ids, weights, logits, kept=kept, capacity=CAPACITY)

print(moe_lens.open(f"{run}_by_hand").query("dropped_tokens"))
