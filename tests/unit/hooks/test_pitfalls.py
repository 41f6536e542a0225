"""What other tools get wrong in silence when they count routing, each planted here.

The numbers are those of the checklist that the other tests marked "Pitfall" follow too.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import TinyBlock, TinyModel
from support.tables import frame
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lens

IDS = torch.arange(24).reshape(3, 8) % 32


def chosen(run, layer=0):
    """Ids `[T, K]` in the trace."""
    rows = frame(run, "routing").query("layer == @layer").sort_values(["step", "forward", "token"])
    return np.stack(rows.expert_ids)


class Seen(TinyModel):
    """Remembers what each call of its blocks' experts was given."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.given = [[] for _ in self.blocks]
        for block, given in zip(self.blocks, self.given, strict=True):
            block.experts.register_forward_pre_hook(
                lambda _, args, given=given: given.append(args[1].numpy().copy())
            )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_that_routes_otherwise_is_not_what_ran(reentrant, run):
    """Pitfall 2: noise, or a kernel that rounds otherwise, sends tokens elsewhere the second time.

    The decision is the one of the forward; the second counts nowhere, and replaces nothing.
    """

    class Noisy(Seen):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + checkpoint(
                    lambda x, block=block: block(x + torch.randn_like(x)),
                    x,
                    use_reentrant=reentrant,
                    preserve_rng_state=False,
                )
            return x

    torch.manual_seed(0)
    model = Noisy().train()
    with moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS).sum().backward()
    for layer, (first, again) in enumerate(model.given):
        assert (first != again).any()
        assert (chosen(run, layer) == first).all()
        load = frame(run, "load").query("layer == @layer").groupby("expert").routed.sum()
        wanted = np.bincount(first.ravel(), minlength=4)
        assert load.reindex(range(4), fill_value=0).tolist() == wanted.tolist()


def test_layers_are_numbered_among_moe_layers_and_say_their_block(run):
    """Pitfall 11: in a hybrid model layer 1 is not block 1."""

    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 8)
            kinds = (nn.Linear(8, 8), TinyBlock(4), nn.Linear(8, 8), nn.Identity(), TinyBlock(6))
            self.layers = nn.ModuleList(kinds)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model = Hybrid().eval()
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        model(IDS)
    with moe_lens.open(run) as trace:
        rows = trace.sql("select layer, block, path, experts from moe_layers order by layer").rows()
        assert rows == [
            {"layer": 0, "block": 1, "path": "layers.1", "experts": 4},
            {"layer": 1, "block": 4, "path": "layers.4", "experts": 6},
        ]
        assert trace.sql("select distinct layer from load order by 1").df().layer.tolist() == [0, 1]


class Level(nn.Module):
    """A router to which all experts are alike; which of them it takes is up to it."""

    def __init__(self, ids):
        super().__init__()
        self.ids = torch.tensor(ids)

    def forward(self, x_TD):
        logits_TE = x_TD.new_zeros(len(x_TD), 4)
        ids_TK = self.ids.expand(len(x_TD), -1)
        return logits_TE, x_TD.new_full(ids_TK.shape, 0.25), ids_TK


@pytest.mark.parametrize("ids", [[0, 1], [3, 2], [1, 3]])
def test_ties_are_those_that_ran(ids, run):
    """Pitfall 13: which of equal experts a top-k takes differs between devices and versions.

    Nothing is chosen again here: the trace has what the experts were given, and a margin of 0.
    """
    model = TinyModel().eval()
    for block in model.blocks:
        block.gate = Level(ids)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, logits=True) as rec, rec.step():
        model(IDS)
    assert (chosen(run) == ids).all()
    assert (frame(run, "routing").margin == 0).all()
    with moe_lens.open(run) as trace:
        row = trace.query("expert_load", first_layer=0, last_layer=0).df().set_index("expert")
    assert {e for e in range(4) if row.routed[e]} == set(ids)


class Close(nn.Module):
    """A router whose second and third best are closer than bfloat16 can tell."""

    def forward(self, x_TD):
        logits_TE = torch.tensor([1.0, 2.0, 2.001, 3.0]).expand(len(x_TD), -1)
        prob_TK, ids_TK = logits_TE.softmax(-1).topk(2)
        return logits_TE, prob_TK, ids_TK


def test_choices_and_margins_are_not_of_the_rounded_logits(run):
    """Pitfall 14: logits are kept in bfloat16, where these two are equal."""
    model = TinyModel().eval()
    for block in model.blocks:
        block.gate = Close()
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, logits=True) as rec, rec.step():
        model(IDS)
    logits = np.stack(frame(run, "logits").logits)
    assert (logits[:, 1] == logits[:, 2]).all()
    assert {frozenset(ids) for ids in chosen(run).tolist()} == {frozenset({2, 3})}
    margin = frame(run, "routing").margin  # of logits; kept with 7 bits of its own mantissa
    assert margin.to_numpy() == pytest.approx(np.full(len(margin), 0.001), rel=2**-7)


def test_a_chunk_of_several_texts_is_one_sequence_unless_somebody_says_so(run):
    """Pitfall 16: texts that are concatenated into chunks are not seen in the ids.

    What goes along sequences then takes the first token of a text for the successor of the last
    one of another. Lengths (here said; also the model's own, and positions that start again) cut.
    """
    texts = torch.cat([torch.full((5,), 3), torch.full((3,), 9)])[None]
    model = TinyModel(blocks=1).eval()
    with torch.no_grad():  # the first text is for experts 0 and 1, the second one for 2 and 3
        model.blocks[0].gate.weight.copy_(torch.tensor([[2.0], [1], [-1], [-2]]).expand(4, 8))
        model.embed.weight[3], model.embed.weight[9] = 1.0, -1.0
    sequences, repeated = {}, {}
    for name, said in (("unsaid", {}), ("said", {"sequences": [0, 5, 8]})):
        path = run / name
        with torch.no_grad(), moe_lens.record(model, path, tokens=1.0) as rec, rec.step(**said):
            model(texts)
        assert [set(ids) for ids in chosen(path).tolist()] == [{0, 1}] * 5 + [{2, 3}] * 3
        sequences[name] = frame(path, "tokens").sort_values("token").sequence.tolist()
        with moe_lens.open(path) as trace:
            (repeated[name],) = trace.query("repetition").rows()
    assert sequences == {"unsaid": [0] * 8, "said": [0] * 5 + [1] * 3}
    # Of seven pairs one crosses, and repeats nothing; of six none crosses.
    assert (repeated["unsaid"]["pairs"], repeated["said"]["pairs"]) == (7, 6)
    assert repeated["unsaid"]["repeated_share"] == pytest.approx(6 / 7)
    assert repeated["said"]["repeated_share"] == 1
