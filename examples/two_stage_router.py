"""Record a router of two stages, scene first and then instance, with its groups.

    python examples/two_stage_router.py [RUN]

As in HI-MoE (arXiv 2604.04908): a scene router looks at a whole image and opens some groups of
experts; in these an instance router picks experts for each object. Together they give an expert
p(e) = p(g) p(e|g), so that log p(g) + log p(e|g) are logits over all experts. The adapter hands
those over and says what the groups are; the rest is as for any router. `selection` says how groups
compete, which a few scenes do not show; it is believed if it explains what was chosen. Questions
about groups then have answers: how open is the choice of the group, how open that inside it?
"""

import sys

import torch
from torch import nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks import MoELayer, Tap

run = sys.argv[1] if len(sys.argv) > 1 else "traces/two_stage_router"
torch.manual_seed(0)
WIDTH, GROUPS, EACH, TOP_GROUPS, TOP_K = 16, 4, 4, 2, 3
EXPERTS = GROUPS * EACH


class TwoStageRouter(nn.Module):
    """Gives (log p of every expert [B, S, E], weights and ids of the chosen [B, S, K])."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Linear(WIDTH, GROUPS)
        self.instance = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_group_BG = self.scene(x_BSD.mean(1)).log_softmax(-1)
        inside_BSGe = self.instance(x_BSD).unflatten(-1, (GROUPS, EACH)).log_softmax(-1)
        log_p_BSE = (log_group_BG[:, None, :, None] + inside_BSGe).flatten(2)

        closed_BG = torch.ones_like(log_group_BG, dtype=torch.bool)
        closed_BG.scatter_(1, log_group_BG.topk(TOP_GROUPS).indices, False)
        closed_BE = closed_BG.repeat_interleave(EACH, 1)
        open_BSE = log_p_BSE.masked_fill(closed_BE[:, None], -torch.inf)
        best_BSK, ids_BSK = open_BSE.topk(TOP_K)
        return log_p_BSE, best_BSK.softmax(-1), ids_BSK


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_EDD = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)

    def forward(self, x_BSD, weights_BSK, ids_BSK):
        return torch.einsum("bsd,bskdf,bsk->bsf", x_BSD, self.weight_EDD[ids_BSK], weights_BSK)


class TwoStageMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = TwoStageRouter(), Experts()

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        _, weights_BSK, ids_BSK = self.router(x_BSD)
        return x_BSD + self.experts(x_BSD, weights_BSK, ids_BSK)


class TwoStageAdapter:
    """Everything that capture has to know of TwoStageMoE."""

    name = "two-stage"

    def layer(self, path, module):
        if not isinstance(module, TwoStageMoE):
            return None

        def router(seen, args, kwargs, output):
            seen.logits_TE = output[0].flatten(0, 1)

        def experts(seen, args, kwargs, output):
            _, weights_BSK, ids_BSK = args
            seen.expert_ids_TK, seen.weights_TK = ids_BSK.flatten(0, 1), weights_BSK.flatten(0, 1)

        info = LayerInfo(
            layer=-1, path=path, experts=EXPERTS, top_k=TOP_K, adapter=self.name,
            groups=GROUPS, top_groups=TOP_GROUPS, selection="softmax, groups by their sum",
        )  # fmt: skip
        taps = [Tap(module.router, "output", router), Tap(module.experts, "input", experts)]
        return MoELayer(module, info, taps, module.router)


model = nn.Sequential(TwoStageMoE(), TwoStageMoE()).eval()
images = {"indoor": torch.randn(WIDTH), "outdoor": torch.randn(WIDTH)}
with (
    torch.no_grad(),
    moe_lens.record(model, run, tokens=1.0, adapters=[TwoStageAdapter()]) as rec,
):
    for _ in range(10):
        with rec.step(tags=list(images)):  # a row is an image, a token one object in it
            scenes_BSD = torch.stack(list(images.values()))[:, None]
            model(2 * scenes_BSD + torch.randn(len(images), 24, WIDTH))

trace = moe_lens.open(run)
print(trace.info())
print(trace.query("group_entropy"))
print(trace.query("group_load", tag="indoor"))
print(trace.query("expert_sets"))
