"""Counts and sums of one block against a plain Python loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.describe import Describer, Given
from moe_lens_hooks.following import Going
from moe_lens_hooks.reduce import reduce
from moe_lens_hooks.said import StepContext
from moe_lens_hooks.semantics import learn

E, K = 5, 2


def describe(B, S, tags, padding):
    describer = Describer(lambda tag: tag)
    batch, _ = describer.describe(
        (B, S),
        StepContext(tags=tags),
        Given(padding=padding),
        Going(),
        keeps=lambda sequences: np.ones(len(sequences), bool),
        device=torch.device("cpu"),
    )
    return batch


def reduced(seen, batch, meaning=None):
    """One layer alone: its counts, rows and problems, without the dimension of layers."""
    out = reduce([seen], batch, [meaning], E, logits=False)
    return tuple({k: v[0] for k, v in p.items()} for p in (out.counts, out.rows, out.problems))


@st.composite
def cases(draw):
    B, S = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(B * S, E, generator=generator)
    if draw(st.booleans()) and B * S:
        logits[0, 1] = math.nan
    ids = torch.rand(B * S, E, generator=generator).argsort(-1)[:, :K]
    weights = torch.rand(B * S, K, generator=generator)
    kept = torch.rand(B * S, K, generator=generator) > 0.3 if draw(st.booleans()) else None
    tags = draw(st.none() | st.lists(st.sampled_from("abc"), min_size=B, max_size=B))
    padding = torch.rand(B, S, generator=generator) > 0.6 if draw(st.booleans()) else None
    chosen = torch.rand(B * S, K, generator=generator) > 0.4 if draw(st.booleans()) else None
    present = torch.rand(B * S, generator=generator) > 0.4 if draw(st.booleans()) else None
    return B, S, logits, ids, weights, kept, tags, padding, chosen, present


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_count_equals_a_naive_loop(case):
    B, S, logits, ids, weights, kept, tags, padding, chosen, present = case
    batch = describe(B, S, tags, padding)
    at = torch.arange(B * S) if present is None else present.nonzero().flatten()
    part = {"kept_TK": kept, "chosen_TK": chosen}
    part = {name: None if x is None else x[at] for name, x in part.items()}
    seen = Observed(ids[at], weights[at], logits[at], router_ids_TK=ids[at].clone(), **part)
    if chosen is not None:
        seen.choices = chosen[at].sum()
    if present is not None:
        seen.token_T = at
        seen = seen.laid_out(B * S)
    meaning = learn(Observed(ids, weights, torch.randn(len(ids), E)), None, E)
    counts, rows, problems = reduced(seen, batch, meaning)
    G = len(batch.tags)
    naive = {
        n: np.zeros((G, E), int)
        for n in ("routed", "processed", "overflowed", "dropped", "padding")
    }
    weight_sum, tokens = np.zeros((G, E)), np.zeros(G, int)
    unserved, nonfinite = np.zeros(G, int), np.zeros(G, int)
    for t in range(B * S):
        g = batch.tags.index(tags[t // S]) if tags else 0
        pad = padding is not None and bool(padding[t // S, t % S])
        if present is not None and not present[t]:
            continue
        tokens[g] += not pad
        ran = 0
        for slot in range(K):
            if chosen is not None and not chosen[t, slot]:
                continue
            e = int(ids[t, slot])
            fits = kept is None or bool(kept[t, slot])
            ran += fits
            if pad:
                naive["padding"][g, e] += 1
                continue
            naive["routed"][g, e] += 1
            naive["processed" if fits else "overflowed"][g, e] += 1
            naive["dropped"][g, e] += not fits
            weight_sum[g, e] += float(weights[t, slot]) * fits
        unserved[g] += not pad and ran == 0
        nonfinite[g] += not pad and bool(logits[t].isnan().any())
    seen_G = batch.tokens_G if present is None else counts["tokens_G"]
    assert seen_G.tolist() == tokens.tolist()
    for name in ("routed", "processed"):
        assert counts[f"{name}_GE"].tolist() == naive[name].tolist()
    assert counts["weight_sum_GE"].numpy() == pytest.approx(weight_sum, abs=1e-5)
    if kept is not None:
        assert counts["overflowed_GE"].tolist() == naive["overflowed"].tolist()
        assert counts["dropped_GE"].tolist() == naive["dropped"].tolist()
    if kept is not None or chosen is not None or present is not None:
        assert counts["unserved_G"].tolist() == unserved.tolist()
    if chosen is not None:
        total = counts["routed_GE"].sum() + counts.get("padding_GE", torch.zeros(1)).sum()
        assert int(counts["choices"]) == int(total)
    if padding is not None:
        assert counts["padding_GE"].tolist() == naive["padding"].tolist()
    if meaning is not None:
        found = counts.get("nonfinite_G", torch.zeros(G))  # left out where there is none
        assert found.tolist() == nonfinite.tolist()
        assert counts["zloss_sum_G"].isfinite().all()
    assert not any(int(n) for n in problems.values())
    if batch.rows_N is not None:
        here = torch.ones(B * S, K, dtype=torch.bool) if chosen is None else chosen
        here = here if present is None else here & present[:, None]
        assert torch.equal(rows["expert_ids_NK"][here], ids.int()[here])
        assert chosen is None or torch.equal(rows["chosen_NK"][at], chosen[at])
        assert present is None or torch.equal(rows["present_N"], present)


def test_ids_out_of_range_are_counted_and_not_trusted():
    ids = torch.tensor([[0, 7], [-1, 2]])
    seen = Observed(ids, torch.ones(2, 2))
    counts, rows, problems = reduced(seen, describe(1, 2, None, None))
    assert int(problems["expert ids out of range"]) == 2
    assert int(counts["routed_GE"].sum()) == 4  # clamped, so that the breach is the only damage
    assert rows["expert_ids_NK"].tolist() == ids.tolist()  # as seen


def test_nan_weights_show_in_their_sum_where_the_writer_finds_them():
    seen = Observed(torch.tensor([[0, 1]]), torch.tensor([[math.nan, 1.0]]))
    counts, _, _ = reduced(seen, describe(1, 1, None, None))
    assert counts["weight_sum_GE"].isnan().tolist() == [[True, False, False, False, False]]


def test_router_that_says_other_ids_than_the_experts_got_shows_in_routed():
    own, executed = torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    seen = Observed(executed, torch.ones(1, 2), router_ids_TK=own)
    counts, _, _ = reduced(seen, describe(1, 1, None, None))
    assert counts["routed_GE"].tolist() == [[1, 1, 0, 0, 0]]
    assert counts["processed_GE"].tolist() == [[1, 0, 1, 0, 0]]


def test_sigmoid_router_entropy_is_of_the_normalised_sigmoids():
    torch.manual_seed(0)
    z = torch.randn(64, E)
    s = z.sigmoid()
    weights, ids = s.topk(K)
    seen = Observed(ids, weights * 2.5, z)
    meaning = learn(seen, None, E)
    assert meaning is not None
    assert (meaning.score, meaning.selection, meaning.normalised) == ("sigmoid", "logits", False)
    counts, _, _ = reduced(seen, describe(1, 64, None, None), meaning)
    p = (s / s.sum(-1, keepdim=True)).double().numpy()
    assert float(counts["entropy_sum_G"]) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("handed", [False, True])
def test_a_bias_that_moved_after_it_was_held_gives_no_margin(handed, layers):
    torch.manual_seed(0)
    z, router = torch.randn(64, E), nn.Module()
    router.register_buffer("e_score_correction_bias", torch.linspace(-0.4, 0.4, E))
    bias = router.e_score_correction_bias
    ids = (z.sigmoid() + bias).topk(K).indices
    seen = [Observed(ids, z.sigmoid().gather(1, ids), z) for _ in range(layers)]
    for x in seen:
        x.held["bias_E"] = (bias, bias._version)
        x.bias_E = bias if handed else None
    meaning = learn(seen[0], None if handed else router, E)
    assert meaning is not None
    assert meaning.selection == "sigmoid+bias"
    batch = describe(1, 64, None, None)

    def margins():
        both = reduce(seen, batch, [meaning] * layers, E, logits=False)
        return both.counts["margin_sum_G"], both.rows["margin_N"], both.counts["entropy_sum_G"]

    best = (z.sigmoid() + bias).sort(-1, descending=True).values
    want, entropy = float((best[:, K - 1] - best[:, K]).sum()), margins()[2]
    assert margins()[0].flatten().tolist() == pytest.approx([want] * layers, rel=1e-5)
    router.e_score_correction_bias = bias + 1  # another tensor: the one that was used is as it was
    assert margins()[0].flatten().tolist() == pytest.approx([want] * layers, rel=1e-5)
    bias.add_(0.01)
    assert margins()[0].isnan().all()
    assert margins()[1].isnan().all()
    assert torch.equal(margins()[2], entropy)


def test_a_bias_that_was_copied_is_the_one_that_was_used():
    torch.manual_seed(0)
    z, bias = torch.randn(64, E), torch.linspace(-0.4, 0.4, E)
    ids = (z.sigmoid() + bias).topk(K).indices
    seen = Observed(ids, z.sigmoid().gather(1, ids), z, bias_E=bias)
    meaning = learn(seen, None, E)
    want = reduced(seen, describe(1, 64, None, None), meaning)[0]["margin_sum_G"]
    seen.held["bias_E"] = (bias.clone(), -1)
    bias.add_(torch.randn(E))
    assert torch.equal(reduced(seen, describe(1, 64, None, None), meaning)[0]["margin_sum_G"], want)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(2, 4))
def test_layers_reduced_together_are_as_if_each_were_alone(case, layers):
    B, S, logits, ids, weights, kept, tags, padding, chosen, present = case
    batch = describe(B, S, tags, padding)
    seen = [
        Observed(
            *(ids.roll(i, 1), weights * (i + 1), logits.roll(i, 1), ids.roll(i, 0), kept),
            chosen_TK=None if chosen is None else chosen.roll(i, 0),
            choices=None if chosen is None else chosen.sum() + i,
            present_T=None if present is None else present.roll(i, 0),
            notes={"odd": i} if i else {},
        )
        for i in range(layers)
    ]
    meaning = learn(Observed(ids, weights, torch.randn(len(ids), E)), None, E)
    together = reduce(seen, batch, [meaning] * layers, E, logits=True)
    for i, one in enumerate(seen):
        alone = reduce([one], batch, [meaning], E, logits=True)
        for mine, whole in ((alone.counts, together.counts), (alone.rows, together.rows)):
            assert set(mine) <= set(whole)  # nonfinite_G is there if any layer has some
            for name, values in mine.items():
                torch.testing.assert_close(values[0], whole[name][i], equal_nan=True)
