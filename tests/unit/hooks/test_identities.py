"""Experts shared between layers: known by where their weights lie, counted whatever the layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.models import TinyModel
from torch import nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import open_run
from moe_lens_hooks import MoELayer, Tap

IDS = torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))
WIDTH, E, K = 8, 4, 2


class Listed(nn.Module):
    """One module an expert; nobody described it."""

    def __init__(self, experts):
        super().__init__()
        self.pick, self.ffns = nn.Linear(WIDTH, len(experts)), nn.ModuleList(experts)

    def forward(self, x_BSD):
        gates, choice = self.pick(x_BSD).softmax(-1).topk(K)
        out_BSD = torch.zeros_like(x_BSD)
        for e, ffn in enumerate(self.ffns):
            rows, slot = torch.where((choice == e).view(-1, K))
            weighed = ffn(x_BSD.view(-1, WIDTH)[rows]) * gates.view(-1, K)[rows, slot, None]
            out_BSD.view(-1, WIDTH).index_add_(0, rows, weighed)
        return out_BSD


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, WIDTH), nn.ModuleList(blocks)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def experts(n=E):
    return [nn.Linear(WIDTH, WIDTH) for _ in range(n)]


CHOSEN = []
"""What every router chose, in the order of their calls: seen by hooks of the tests' own."""


def choices(module, args, output):
    ids = output[2] if isinstance(output, tuple) else output.topk(K).indices
    CHOSEN.append(ids.flatten().tolist())


def record(model, run, steps=2, **options):
    routers = (m for name, m in model.named_modules() if name.endswith(("gate", "pick")))
    hooks = [m.register_forward_hook(choices) for m in routers]
    with torch.no_grad(), moe_lens.record(model.eval(), run, tokens=1.0, **options) as rec:
        for _ in range(steps):
            with rec.step():
                CHOSEN.clear()  # each step is the same batch; in the first, blocks are tried
                model(IDS)
    for hook in hooks:
        hook.remove()
    return [x.identities for x in open_run(run).meta.layers]


def by_identity(named, steps=2):
    """Choices by identity, counted one by one."""
    layers = zip(CHOSEN, named, strict=True)
    return Counter(names[e] for ids, names in layers for e in ids for _ in range(steps))


def check_loads(run, named):
    """What the question says against a plain count of what each token was given."""
    counted, rows = by_identity(named), moe_lens.open(run).query("identity_load").rows()
    places = Counter(x for layer in named for x in layer)
    assert {r["identity"]: r["routed"] for r in rows if r["routed"]} == counted
    assert {r["identity"]: r["places"] for r in rows} == places
    assert {r["identity"] for r in rows if r["shared"]} == {x for x, n in places.items() if n > 1}
    per_layer = sum(counted.values()) / len(named)
    even = Counter()
    for layer in named:
        for x in layer:
            even[x] += per_layer / len(layer)
    for r in rows:
        assert r["even"] == pytest.approx(even[r["identity"]])
        assert r["over_even"] == pytest.approx(counted[r["identity"]] / even[r["identity"]])
        assert r["layers"] == sum(r["identity"] in layer for layer in named)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert sum(r["even"] for r in rows) == pytest.approx(sum(counted.values()))


def test_experts_of_each_layer_are_its_own(run):
    torch.manual_seed(0)
    assert record(TinyModel(), run) == [None, None]
    own = [[f"{layer}/{e}" for e in range(4)] for layer in range(2)]
    check_loads(run, own)
    trace = moe_lens.open(run)
    assert trace.query("identity_load", shared_only=True).rows() == []
    assert trace.info().runs[0].shared == ""


def test_modules_of_a_neighbour_are_found_one_by_one(run):
    """ReXMoE: each layer chooses among its own experts and some of the layer before."""
    torch.manual_seed(0)
    banks = [experts(), experts(), experts()]
    pools = [banks[0], [*banks[1], *banks[0][:2]], [*banks[2], *banks[1][2:]]]
    found = record(Model([Listed(pool) for pool in pools]), run)
    named = [
        ["0/0", "0/1", "0/2", "0/3"],
        ["1/0", "1/1", "1/2", "1/3", "0/0", "0/1"],
        ["2/0", "2/1", "2/2", "2/3", "1/2", "1/3"],
    ]
    assert found == [None, *named[1:]]
    check_loads(run, named)
    trace = moe_lens.open(run)
    assert trace.info().runs[0].shared == "12 experts in 16 places of 3 layers"
    shared = trace.query("identity_load", shared_only=True).rows()
    assert [r["identity"] for r in shared] == ["0/0", "0/1", "1/2", "1/3"]
    assert [r["layers"] for r in shared] == [2, 2, 2, 2]


@pytest.mark.parametrize("how", ["module", "parameter", "view"])
def test_a_fused_bank_is_found_whole(run, how):
    torch.manual_seed(0)
    model = TinyModel(blocks=3)
    first, _, last = model.blocks
    if how == "module":
        last.experts = first.experts
    elif how == "parameter":
        last.experts.weight = first.experts.weight
    else:  # FSDP and the like keep parameters as parts of one flat tensor
        both = torch.randn(6, 8, 8) / 3
        first.experts.weight = nn.Parameter(both[:4])
        last.experts.weight = nn.Parameter(both[2:])
    named = [[f"{layer}/{e}" for e in range(4)] for layer in range(3)]
    named[2] = named[0] if how != "view" else ["0/2", "0/3", "2/2", "2/3"]
    assert record(model, run) == [None, None, named[2]]
    check_loads(run, named)


def test_equal_weights_elsewhere_are_not_the_same(run):
    model = TinyModel()
    with torch.no_grad():
        model.blocks[1].experts.weight.copy_(model.blocks[0].experts.weight)
    assert record(model, run) == [None, None]


def test_a_block_that_runs_twice_runs_the_same_experts(run):
    torch.manual_seed(0)
    model = TinyModel(blocks=1)
    model.blocks.append(model.blocks[0])
    same = [f"0/{e}" for e in range(4)]
    assert record(model, run) == [None, same]
    check_loads(run, [same, same])


def test_a_resumed_run_names_them_as_before(run):
    torch.manual_seed(0)
    model = TinyModel(blocks=2)
    model.blocks[1].experts = model.blocks[0].experts
    first = record(model, run)
    assert record(model, run, resume=True) == first == [None, ["0/0", "0/1", "0/2", "0/3"]]


class Declared:
    """An adapter that names experts, as for weights that it rebuilds in every layer."""

    name = "declared"

    def __init__(self, names):
        self.names = names

    def layer(self, path, module):
        if type(module).__name__ != "TinyBlock":
            return None

        def read(seen, args, kwargs, output):
            _, seen.expert_ids_TK, seen.weights_TK = args

        info = LayerInfo(-1, path, 4, 2, identities=self.names[int(path[-1])])
        return MoELayer(module, info, [Tap(module.experts, "input", read)], module.gate)


def test_an_adapter_may_declare_them(run):
    torch.manual_seed(0)
    names = [[7, 8, 9, 10], ["7", "own", 8, 7]]
    assert record(TinyModel(), run, adapters=[Declared(names)]) == names
    check_loads(run, [[str(x) for x in layer] for layer in names])


def test_a_meta_file_with_too_few_is_damaged(run):
    from moe_lens.trace.layout import meta_path
    from moe_lens.trace.meta import write_meta

    record(TinyModel(), run)
    meta = open_run(run).meta
    meta.layers[1] = replace(meta.layers[1], identities=[1, 2])
    write_meta(run, meta)
    says = "layer 1: identities name one expert each: 4 are expected, got 2"
    with pytest.raises(moe_lens.TraceError, match=f"{meta_path(run, 0)} is damaged: {says}"):
        moe_lens.open(run)
