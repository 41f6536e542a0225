"""Routers that choose among groups first: entropies by the chain rule, against float64 by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from support.models import build
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks import MoELayer, Tap
from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.semantics import groups_of, learn

GROUPS, EACH, TOP_GROUPS, K = 4, 3, 2, 2
E = GROUPS * EACH


def two_stage(tokens, seed=0):
    """A router of two stages in float64: p(g), p(e|g), and what it chooses."""
    g = torch.Generator().manual_seed(seed)
    group_TG = (2 * torch.randn(tokens, GROUPS, generator=g, dtype=torch.float64)).softmax(-1)
    inside_TGe = torch.randn(tokens, GROUPS, EACH, generator=g, dtype=torch.float64).softmax(-1)
    p_TE = (group_TG[..., None] * inside_TGe).flatten(1)
    open_TG = torch.zeros_like(group_TG).scatter_(1, group_TG.topk(TOP_GROUPS).indices, 1)
    best = (p_TE * open_TG.repeat_interleave(EACH, 1)).topk(K)
    return group_TG, inside_TGe, p_TE, best.indices, best.values / best.values.sum(-1, keepdim=True)


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def by_hand(group_TG, inside_TGe):
    """(H(g), H(e|g)) of each token, from the two stages."""
    of_group = [entropy(p_G) for p_G in group_TG.tolist()]
    within = [
        sum(p * entropy(q_e) for p, q_e in zip(p_G, q_Ge, strict=True))
        for p_G, q_Ge in zip(group_TG.tolist(), inside_TGe.tolist(), strict=True)
    ]
    return np.array(of_group), np.array(within)


def test_the_chain_rule_holds_of_what_is_recorded(run):
    B, S, steps = 3, 20, 4
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 15:] = True
    tags, hands = ["a", "b", "a"], []
    with moe_lens.record(None, run, tokens=1.0) as rec:
        for step in range(steps):
            group_TG, inside_TGe, p_TE, ids_TK, weights_TK = two_stage(B * S, step)
            logits_TE = p_TE.log().float() + 3.7  # a constant of the token changes nothing
            logits_TE[7] = math.nan  # in no sum
            with rec.step(tags=tags, padding=padding, phase="train"):
                shaped = (x.float().view(B, S, -1) for x in (weights_TK, logits_TE))
                ids_BSK = ids_TK.view(B, S, K)
                rec.log("x", ids_BSK, *shaped, groups=GROUPS, top_groups=TOP_GROUPS)
            hands.append(by_hand(group_TG, inside_TGe))
    valid_T = ~padding.flatten().numpy()
    valid_T[7] = False
    tag_T = np.repeat(tags, S)
    trace = moe_lens.open(run)
    for tag in ("a", "b"):
        at = valid_T & (tag_T == tag)
        of_group, within = (np.mean([h[i][at] for h in hands]) for i in (0, 1))
        (row,) = trace.query("group_entropy", tag=tag).rows()
        assert row["tokens"] == steps * at.sum()
        assert row["token_group"] == pytest.approx(of_group, abs=1e-6)
        assert row["token_within"] == pytest.approx(within, abs=1e-6)
        assert row["token_entropy"] == pytest.approx(of_group + within, abs=1e-6)
    rows = frame(run, "routing").sort_values(["step", "token"])
    one = rows[rows.step == 2].set_index("token").group_entropy
    assert math.isnan(one[7])
    kept = [t for t in one.index if t != 7]
    np.testing.assert_allclose(one[kept], hands[2][0][kept], rtol=2**-8)
    (info,) = trace.info().runs
    assert info.grouped.startswith("1 layer × 4 groups of 3, a token's from 2 of them: 2^")


def test_a_layer_without_groups_has_no_group_entropy(run, model, batch):
    with moe_lens.record(model, run, tokens=1.0), torch.no_grad():
        model(**batch)
    assert frame(run, "routing").group_entropy.isna().all()
    assert frame(run, "routing").entropy.notna().all()
    assert frame(run, "routers").group_entropy_sum.isna().all()
    trace = moe_lens.open(run)
    assert trace.query("group_entropy").rows() == trace.query("group_load").rows() == []
    assert trace.info().runs[0].grouped == ""


def test_layers_of_one_shape_have_groups_of_their_own(run):
    """Layers are reduced together where they are alike: the same logits, divided differently."""
    _, _, p_TE, ids_TK, weights_TK = two_stage(50)
    logits_TE, asked = p_TE.log().float(), [4, 3, None, 1]
    with moe_lens.record(None, run, tokens=1.0) as rec, rec.step(phase="train"):
        for layer, groups in enumerate(asked):
            rec.log(layer, ids_TK, weights_TK.float(), logits_TE, groups=groups)
    found = frame(run, "routers").sort_values("layer").group_entropy_sum
    for groups, value in zip(asked, found, strict=True):
        if groups in (None, 1):
            assert math.isnan(value)
            continue
        sums = p_TE.view(50, groups, -1).sum(-1).tolist()
        assert value == pytest.approx(sum(map(entropy, sums)), abs=1e-4)


def test_zero_experts_stand_in_no_group(run, model, batch):
    """A distribution over experts and what is no expert has no group for the latter."""
    said = Declared(groups=2, zero_experts=1)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, adapters=[said]):
        model(**batch)
    assert frame(run, "routers").entropy_sum.notna().all()
    assert frame(run, "routers").group_entropy_sum.isna().all()
    assert moe_lens.open(run).query("group_load").rows()[0]["experts"] == 2


def test_deepseek_v3_against_an_independent_wrap(run):
    """Group entropies, loads of groups and sets, from the gate's own input and the experts'."""
    model = build("deepseek_v3")
    gates, chosen = [], []
    blocks = [x.mlp for x in model.model.layers if hasattr(x.mlp, "experts")]
    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.gate.register_forward_pre_hook(
            lambda m, args, i=i: gates.append((i, args[0].detach().double(), m.weight.double()))
        ))  # fmt: skip
        hooks.append(block.experts.register_forward_pre_hook(
            lambda m, args, i=i: chosen.append((i, args[1].tolist()))
        ))  # fmt: skip
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        for seed in range(2):
            with rec.step():
                ids = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(seed))
                model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    trace = moe_lens.open(run)
    groups = 4
    for layer in range(len(blocks)):
        whole, of_group = [], []
        for at, x, weight in gates:
            if at == layer:
                for z in (x.reshape(-1, x.shape[-1]) @ weight.T).sigmoid().tolist():
                    p = [v / sum(z) for v in z]
                    whole.append(entropy(p))
                    of_group.append(entropy([p[i] + p[i + 1] for i in range(0, 8, 2)]))
        sets = Counter(frozenset(token) for at, tokens in chosen if at == layer for token in tokens)
        loads = Counter(e // 2 for s, n in sets.items() for e in s for _ in range(n))
        asked = {"first_layer": layer, "last_layer": layer}
        (row,) = trace.query("group_entropy", **asked).rows()
        assert row["token_entropy"] == pytest.approx(np.mean(whole), abs=1e-5)
        assert row["token_group"] == pytest.approx(np.mean(of_group), abs=1e-5)
        assert row["token_within"] == pytest.approx(np.mean(whole) - np.mean(of_group), abs=1e-5)
        of_load = Counter(e for s, n in sets.items() for e in s for _ in range(n))
        total = sum(of_load.values())
        assert row["load_entropy"] == pytest.approx(entropy(n / total for n in of_load.values()))
        assert row["load_group"] == pytest.approx(entropy(n / total for n in loads.values()))
        assert row["load_entropy"] == pytest.approx(row["load_group"] + row["load_within"])
        by_group = trace.query("group_load", **asked).rows()
        assert [r["routed"] for r in by_group] == [loads[g] for g in range(groups)]
        assert [r["first_expert"] for r in by_group] == [0, 2, 4, 6]
        assert sum(r["prob_share"] for r in by_group) == pytest.approx(1)
        (found,) = trace.query("expert_sets", **asked).rows()
        assert found["distinct_sets"] == len(sets)
        assert found["singletons"] == sum(n == 1 for n in sets.values())
        assert found["tokens"] == sum(sets.values()) == 120
        spread = sum(n * len({e // 2 for e in s}) for s, n in sets.items()) / 120
        assert found["groups_used"] == pytest.approx(spread)
        # 2 of 8 experts in 4 pairs, from at most 2 pairs: no limit
        assert found["reachable"] == 28


class Declared:
    """An adapter that says of TinyBlocks what a test wants it to."""

    name = "declared"

    def __init__(self, **said):
        self.said = said

    def layer(self, path, module):
        if type(module).__name__ != "TinyBlock":
            return None

        def experts(seen, args, kwargs, output):
            _, seen.expert_ids_TK, seen.weights_TK = args

        def router(seen, args, kwargs, output):
            more = torch.zeros(len(output[0]), info.zero_experts)
            seen.logits_TE = torch.cat([output[0], more], 1)

        info = LayerInfo(-1, path, 4, 2, adapter=self.name, **self.said)
        taps = [Tap(module.gate, "output", router), Tap(module.experts, "input", experts)]
        return MoELayer(module, info, taps, module.gate)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"groups": 3}, "groups must divide its 4 experts into equal parts, got 3"),
        ({"groups": 0}, "groups must divide its 4 experts into equal parts, got 0"),
        ({"groups": 2, "top_groups": 3}, "top_groups must be 1 to its 2 groups, got 3"),
        ({"groups": 2, "top_groups": 0}, "top_groups must be 1 to its 2 groups, got 0"),
        ({"top_groups": 2}, "top_groups 2 is declared without groups"),
        ({"identities": [1, 2, 3]}, "identities name one expert each: 4 are expected, got 3"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run, model, said, says):
    with pytest.raises(moe_lens.UnsupportedRouter, match=says) as caught:
        moe_lens.record(model, run, adapters=[Declared(**said)])
    assert str(caught.value).startswith("blocks.0 (TinyBlock): ")
    assert "\n" not in str(caught.value)
    assert not run.exists()
    if "identities" not in said:
        with moe_lens.record(None, run) as rec, rec.step():
            ids = torch.zeros(5, 2, dtype=torch.long)
            with pytest.raises(ValueError, match=f"rec.log of x: {says}"):
                rec.log("x", ids, torch.ones(5, 2), experts=4, **said)
            rec.log("x", ids, torch.ones(5, 2), experts=4)


def test_groups_that_a_router_cannot_use_are_none():
    router = nn.Module()
    router.n_group, router.topk_group = 4, 2
    assert groups_of(router, 8) == (4, 2)
    assert groups_of(router, 6) == (None, None)
    assert groups_of(None, 8) == (None, None)


def test_declared_groups_explain_what_the_router_does_not_say():
    _, _, p_TE, ids_TK, weights_TK = two_stage(2000)
    seen = Observed(ids_TK, weights_TK.float(), p_TE.log().float())
    by_sum = "softmax, groups by their sum"

    def selection(seen, **said):
        return learn(seen, None, E, LayerInfo(-1, "x", E, K, **said)).selection

    assert learn(seen, None, E).selection is None
    assert selection(seen, groups=GROUPS, top_groups=GROUPS) is None  # all may be used: no limit
    limit = {"groups": GROUPS, "top_groups": TOP_GROUPS}
    assert selection(seen, **limit) == by_sum
    one = Observed(ids_TK[:1], weights_TK[:1].float(), p_TE[:1].log().float())
    assert selection(one, **limit) != by_sum  # one token fits all of them
    assert selection(one, **limit, selection=by_sum) == by_sum
    wrong = "softmax, groups by top-1"
    assert selection(seen, **limit, selection=wrong) == by_sum  # said, and not so
