"""Interventions against MoE layers written out as plain loops, in float64, by each family's papers.

The loop computes one token after the other, expert by expert: what the router scores, which experts
are left to it, what they weigh. It takes the place of the block in a forward without hooks of ours.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.models import VOCAB, build
from support.zoo import ZOO, batch
from support.zoo import build as build_zoo
from torch.nn.functional import silu

import moe_lens

FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss")
TOKENS = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
LAYER = 1


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, exact(build(request.param))


def exact(model):
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return model.double()


def blocks(model):
    return [m for m in model.modules() if hasattr(m, "experts")]


def expert(block, family, e, x_D):
    """One expert's output for one token."""
    own = block.experts
    if family == "gpt_oss":
        both = x_D @ own.gate_up_proj[e] + own.gate_up_proj_bias[e]
        gate, up = both[0::2].clamp(max=own.limit), both[1::2].clamp(-own.limit, own.limit)
        inner = (up + 1) * gate * torch.sigmoid(own.alpha * gate)
        return inner @ own.down_proj[e] + own.down_proj_bias[e]
    gate, up = (own.gate_up_proj[e] @ x_D).chunk(2)
    return own.down_proj[e] @ (silu(gate) * up)


def ranking(block, family, x_D):
    """What one token's experts are ranked by, -inf where a group is out; and the logits."""
    router = block.router if family == "gpt_oss" else block.gate
    if family == "deepseek_v3":  # its router computes in float32
        logits = router.weight.float() @ x_D.float()
        biased = (logits.sigmoid() + router.e_score_correction_bias.float()).tolist()
        size = len(biased) // router.num_group
        groups = [biased[i : i + size] for i in range(0, len(biased), size)]
        order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))
        keep = order[: router.topk_group]
        return [s if i // size in keep else -math.inf for i, s in enumerate(biased)], logits
    logits = router.weight @ x_D + (router.bias if family == "gpt_oss" else 0)
    return logits.tolist(), logits


def weights(block, family, logits, ids):
    """What the family's router gives these experts."""
    if family == "gpt_oss":  # softmax after top-k
        of = [math.exp(float(logits[e])) for e in ids]
        return [w / sum(of) for w in of]
    if family == "deepseek_v3":
        of = [1 / (1 + math.exp(-float(logits[e]))) for e in ids]
        return [w / sum(of) * block.gate.routed_scaling_factor for w in of]
    total = sum(math.exp(float(z)) for z in logits)
    of = [math.exp(float(logits[e])) / total for e in ids]
    return of if family == "olmoe" else [w / sum(of) for w in of]  # OLMoE does not normalise


def losses(model, family, decide):
    """Losses `[B, S - 1]` with a loop in place of a layer; `decide(own, ranked)` gives its experts.

    Args:
        decide: Of a token: its K experts, and all it may have, the best first.
    """
    block = blocks(model)[LAYER]
    k = model.config.num_experts_per_tok

    def looped(module, args, output):
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        rows = []
        for x_D in x_TD:
            scores, logits = ranking(block, family, x_D)
            ranked = sorted(
                (e for e, s in enumerate(scores) if s > -math.inf), key=lambda e: -scores[e]
            )
            ids = decide(ranked[:k], ranked)
            of = weights(block, family, logits, ids) if ids else []
            y_D = sum(
                (w * expert(block, family, e, x_D) for w, e in zip(of, ids, strict=True)), 0 * x_D
            )
            rows.append(
                y_D + block.shared_experts(x_D) if hasattr(block, "shared_experts") else y_D
            )
        y = torch.stack(rows).view_as(args[0])
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = block.register_forward_hook(looped)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    handle.remove()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none"
    )


def check(change, model, family, decide):
    """The change's losses are the loop's."""
    wanted = losses(model, family, decide).reshape(-1)
    got = torch.from_numpy(change.loss_N)
    assert got.dtype == torch.float64
    # float32 inside DeepSeek's router, and libraries' softmax in float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_interventions_are_what_a_plain_loop_computes(family):
    name, model = family
    k = model.config.num_experts_per_tok
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        check(iv.top_k(LAYER, k)(base), model, name, lambda own, ranked: own)
        for e in range(3):
            cost = iv.knock_out(LAYER, e)(base)
            check(cost, model, name, lambda own, ranked, e=e: [x for x in ranked if x != e][:k])
            chose = (base.layers[LAYER].expert_ids_BSK == e).any(-1)[:, :-1].reshape(-1)
            assert (cost.affected_N == chose).all()
            gone = iv.knock_out(LAYER, e, refill=False)(base)
            check(gone, model, name, lambda own, ranked, e=e: [x for x in own if x != e])
        two = iv.knock_out(LAYER, 1, 4)(base)
        check(two, model, name, lambda own, ranked: [x for x in ranked if x not in (1, 4)][:k])
        swapped = iv.runner_up(LAYER)(base)
        check(swapped, model, name, lambda own, ranked: [*own[:-1], ranked[k]])
        for other in (1, 3):
            changed = iv.top_k(LAYER, other)(base)
            check(changed, model, name, lambda own, ranked, n=other: ranked[:n])
            assert changed.affected_N.all()
        forced = iv.force_in(LAYER, 2)(base)
        check(forced, model, name, lambda own, ranked: own if 2 in own else [*own[:-1], 2])


def test_the_same_top_k_is_the_base_bit_for_bit(family):
    _, model = family
    k = model.config.num_experts_per_tok
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        every = sum((iv.top_k(n, k) for n in range(1, len(base.layers))), iv.top_k(0, k))
        same = every(base)
    assert (same.loss_N == same.base_N).all()
    assert not same.affected_N.any()


def test_given_and_random_routes_are_what_a_plain_loop_computes(family):
    name, model = family
    k = model.config.num_experts_per_tok
    draw = torch.Generator().manual_seed(3)
    ids = torch.rand(*TOKENS.shape, 8, generator=draw).argsort(-1)[..., :k]
    ids[1] = -1
    rows = iter(ids.reshape(-1, k).tolist())
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        forced = iv.force(LAYER, ids)(base)
        own = base.layers[LAYER].expert_ids_BSK
        random = iv.random(LAYER, seed=5)(base)
        other = iv.random(LAYER, seed=6)(base)
    check(forced, model, name, lambda own, ranked: own if (r := next(rows))[0] < 0 else r)
    assert not forced.affected_N[forced.sequence_N == 1].any()
    assert (own >= 0).all()
    assert random.affected_N.all()
    assert (random.loss_N != other.loss_N).any()


def test_a_copy_of_an_expert_can_stand_for_it(family):
    """Costs nothing where `over` is a copy of `expert`, and something where it is not."""
    name, _ = family
    model = exact(build(name, seed=4))
    experts = blocks(model)[LAYER].experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[5] = parameter[2]
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        twin = iv.duplicate(LAYER, 2, over=5)(base)
        other = iv.duplicate(LAYER, 2, over=0)(base)
    assert twin.affected_N.any()
    assert abs(twin.delta_N).max() < 1e-12
    assert abs(other.delta_N).max() > 1e-4


def test_several_layers_at_once_are_not_the_sum_but_what_runs(family):
    """The second layer's router sees what the first, changed, hands on."""
    _, model = family
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        both = (iv.knock_out(0, 1) + iv.runner_up(1))(base)
        again = (iv.runner_up(1) + iv.knock_out(0, 1))(base)
        one = iv.knock_out(0, 1)(base)
    assert (both.loss_N == again.loss_N).all()
    assert (both.loss_N != one.loss_N).any()
    assert both.affected_N.all()
    assert not one.affected_N.all()


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_groups"])
def test_experts_outside_of_a_tokens_groups_are_not_to_be_had(name):
    """DeepSeek-V3 masks them with -inf, DeepSeek-V2 with a score of zero."""
    model = build(name) if name == "deepseek_v3" else build_zoo(ZOO[name])
    with moe_lens.intervene(model) as iv:
        base = iv.measure(TOKENS)
        info = base.layers[0].info
        there = info.experts // info.groups * info.top_groups
        assert iv.top_k(0, there)(base).affected_N.any()
        with pytest.raises(moe_lens.SteeringError, match=f"left with {there} experts"):
            iv.top_k(0, there + 1)(base)


def test_a_tap_that_repeats_the_routers_arithmetic_is_not_its_choice():
    """Llama 4's adapter takes the ids from the scores once more, which must see what was forced."""
    model = build_zoo(ZOO["llama4_top2"])
    router = next(m for n, m in model.named_modules() if n.endswith("router"))
    seen = []
    handle = router.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with moe_lens.intervene(model, loss=of_each_token) as iv:
        base = iv.measure(batch(ZOO["llama4_top2"]))
        handle.remove()
        swapped = iv.runner_up(0)(base)
    logits = torch.nn.functional.linear(seen[0].reshape(-1, router.in_features), router.weight)
    best = logits.detach().sort(-1, descending=True).values
    margin = torch.from_numpy(base.layers[0].margin_BS).reshape(-1)
    torch.testing.assert_close(margin, best[:, 1] - best[:, 2], rtol=1e-4, atol=1e-5)
    assert swapped.affected_N.all()


# -- every architecture ----------------------------------------------------------------------------

REFUSED = {
    "diffusion_gemma_canvas": "the batch holds a cache",
    "dots3_note_vision": "its batch is pixels, its output pooled",
    "ernie4_5_vl_moe": "its layers see text or vision tokens only",
    "nllb_moe": "encoder and decoder have other lengths",
    "phimoe": "its router chooses one expert after the other",
    "switch_transformers": "encoder and decoder have other lengths",
    "vitpose_backbone": "the caller names the expert",
}
"""Architectures of transformers for which interventions are refused, and why."""

ONE_TOP_K = {"inkling", "jetmoe", "longcat_flash", "zaya"}
"""Architectures with blocks that have no place for another top-k."""


def of_each_token(model, inputs):
    """A number for each token, of whatever the model returns."""
    with_it = outputs(model(**copy.deepcopy(inputs)))
    first = next(t for t in with_it if t.is_floating_point() and t.ndim == 3)
    return first.float().mean(-1)


def outputs(x):
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return [t for part in parts for t in outputs(part)]


@pytest.mark.parametrize("name", [n for n in ZOO if n not in REFUSED])
def test_an_architecture_is_changed_as_told(name):
    model = build_zoo(ZOO[name])
    with moe_lens.intervene(model, loss=of_each_token) as iv:
        base = iv.measure(batch(ZOO[name]))
        n = next(i for i, x in enumerate(base.layers) if x.aligned and x.why_not is None)
        own = base.layers[n].expert_ids_BSK
        k, e = own.shape[-1], int(own[0, 0, 0])
        same = iv.top_k(n, k)(base)
        out = iv.knock_out(n, e)(base)
        next_one = iv.runner_up(n)(base)
        assert (same.loss_N == same.base_N).all()
        assert (out.affected_N == (own == e).any(-1)[base.tokens]).all()
        assert next_one.affected_N.all()
        assert (next_one.delta_N != 0).any()
        more = [iv.top_k(n, other) for other in ({1, k + 1} - {k})]
        if name in ONE_TOP_K:
            with pytest.raises(moe_lens.UnsupportedRouter, match="another top-k than its own"):
                for change in more:
                    change(base)
        elif base.layers[n].info.adapter != "switch":
            assert all(change(base).affected_N.all() for change in more)


@pytest.mark.parametrize(
    "name", sorted(REFUSED.keys() - {"diffusion_gemma_canvas", "dots3_note_vision"})
)
def test_what_cannot_be_asked_is_refused_by_name(name):
    model = build_zoo(ZOO[name])
    refusals = (moe_lens.UnsupportedRouter, moe_lens.SteeringError)
    with moe_lens.intervene(model, loss=of_each_token) as iv:
        with pytest.raises(refusals, match=r"not one a token|does not route|does not choose"):
            iv.knock_out(0, 0)(iv.measure(batch(ZOO[name])))
