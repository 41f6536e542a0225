"""What a router's logits mean is learned from numbers; where nothing fits, it stays unknown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.semantics import learn, probabilities, selection_bias

T, E, K = 200, 8, 3


@pytest.fixture
def z():
    torch.manual_seed(0)
    return torch.randn(T, E)


def pick(score, k=K):
    return score.topk(k, sorted=False).indices


def learned(z, ids, weights, router=None, bias=None):
    meaning = learn(Observed(ids, weights, z, bias_E=bias), router, E)
    assert meaning is not None
    return meaning


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_softmax_weights_are_told_whatever_their_scale(z, scale):
    p = z.softmax(-1)
    ids = pick(p)
    meaning = learned(z, ids, scale * p.gather(1, ids))
    assert (meaning.score, meaning.selection, meaning.proportional) == ("softmax", "logits", True)


def test_renormalised_weights_are_told(z):
    p = z.softmax(-1)
    ids = pick(p)
    w = p.gather(1, ids)
    assert learned(z, ids, w / w.sum(-1, keepdim=True)).normalised
    assert not learned(z, ids, w).normalised


def test_bias_of_the_router_and_bias_handed_to_it_are_found(z):
    bias = torch.linspace(-0.4, 0.4, E)
    s = z.sigmoid()
    ids = pick(s + bias)
    router = nn.Module()
    router.register_buffer("e_score_correction_bias", bias)
    assert learned(z, ids, s.gather(1, ids), router).selection == "sigmoid+bias"
    assert learned(z, ids, s.gather(1, ids), None, bias).selection == "sigmoid+bias"


@pytest.mark.parametrize("best", [1, 2])
def test_groups_are_found(z, best):
    s = z.softmax(-1) if best == 1 else z.sigmoid()
    groups = s.view(T, 4, 2).topk(best, -1).values.sum(-1).topk(2, -1).indices
    allowed = torch.zeros(T, 4).scatter_(1, groups, 1.0).bool().repeat_interleave(2, 1)
    ids = pick(s.masked_fill(~allowed, -1.0))
    router = nn.Module()
    router.num_group, router.topk_group = 4, 2
    meaning = learned(z, ids, s.gather(1, ids), router)
    assert meaning.selection is not None
    assert meaning.selection.endswith(f"groups by top-{best}")


def test_choices_that_no_score_explains_leave_selection_unknown(z):
    ids = torch.rand(T, E).argsort(-1)[:, :K]
    meaning = learned(z, ids, z.softmax(-1).gather(1, ids))
    assert (meaning.selection, meaning.rank) == (None, None)
    assert meaning.score == "softmax"


def test_weights_proportional_to_nothing_give_no_weight_to_runners_up(z):
    ids = pick(z)
    meaning = learned(z, ids, torch.rand(T, K))
    assert not meaning.proportional
    assert meaning.score is None


def test_no_logits_or_no_usable_token_teach_nothing(z):
    ids = pick(z)
    assert learn(Observed(ids, torch.rand(T, K)), None, E) is None
    assert learn(Observed(ids, torch.rand(T, K), torch.full((T, E), torch.nan)), None, E) is None
    assert learn(Observed(ids[:0], torch.rand(0, K), z[:0]), None, E) is None


def test_top_1_is_told_by_its_weight(z):
    ids = pick(z, 1)
    assert learned(z, ids, z.softmax(-1).gather(1, ids)).score == "softmax"
    assert learned(z, ids, z.sigmoid().gather(1, ids)).score == "sigmoid"
    assert learned(z, ids, torch.ones(T, 1)).score is None  # normalised top-1 tells nothing


def test_square_root_of_softplus_is_told(z):
    s = torch.nn.functional.softplus(z).sqrt()
    bias = torch.linspace(-0.4, 0.4, E)
    ids = pick(s + bias)
    meaning = learned(z, ids, s.gather(1, ids), None, bias)
    assert (meaning.score, meaning.selection) == ("sqrtsoftplus", "sqrtsoftplus+bias")
    p = probabilities(z, "sqrtsoftplus")
    assert torch.allclose(p, s / s.sum(-1, keepdim=True))


def test_a_bias_on_the_logits_is_told_from_one_on_the_scores(z):
    bias = torch.linspace(-2, 2, E)
    ids = pick(z + bias)
    assert learned(z, ids, z.sigmoid().gather(1, ids), None, bias).selection == "logits+bias"


@pytest.mark.parametrize("shape", [(E,), (1, E)])
def test_bias_is_looked_up_anew_and_may_lie_deeper_and_flat(z, shape):
    router, statics = nn.Module(), nn.Module()
    first = torch.linspace(-0.1, 0.1, E)
    statics.e_score_correction_bias = nn.Parameter(first.reshape(shape))
    router.moe_statics = statics
    p = z.softmax(-1)
    ids = pick(p + first)
    meaning = learned(z, ids, p.gather(1, ids), router)
    assert meaning.selection == "softmax+bias"
    statics.e_score_correction_bias = nn.Parameter(torch.full(shape, 3.0))
    assert meaning.bias.tolist() == [3.0] * E


def test_a_plain_bias_is_a_part_of_the_logits_and_none_of_selection(z):
    router = nn.Module()
    router.bias = nn.Parameter(torch.linspace(-2, 2, E))
    ids = pick(z)
    meaning = learned(z, ids, z.softmax(-1).gather(1, ids), router)
    assert (meaning.selection, meaning.bias) == ("logits", None)


def test_choices_of_weight_zero_do_not_hide_what_the_others_mean(z):
    p = z.softmax(-1)
    ids = pick(p, 2)
    weights = p.gather(1, ids)
    weights[: T // 2, 1] = 0  # dropped
    meaning = learned(z, ids, weights)
    assert (meaning.score, meaning.proportional) == ("softmax", True)
    assert not meaning.normalised


def test_what_the_router_chose_is_explained_whatever_ran(z):
    p = z.softmax(-1)
    ids = pick(p, 2)
    seen = Observed(torch.zeros_like(ids), p.gather(1, ids), z, router_ids_TK=ids)
    meaning = learn(seen, None, E)
    assert (meaning.score, meaning.selection, meaning.proportional) == ("softmax", "logits", True)


def test_tokens_without_a_choice_teach_nothing(z):
    p = z.softmax(-1)
    ids = pick(p, 2)
    weights = p.gather(1, ids)
    chosen = torch.ones(T, 2, dtype=torch.bool)
    chosen[::2] = False
    ids[::2], weights[::2] = 0, 0.5  # what stands in empty slots means nothing
    seen = Observed(ids, weights, z, chosen_TK=chosen)
    assert learn(seen, None, E).selection == "logits"
    seen.chosen_TK = torch.zeros_like(chosen)
    assert learn(seen, None, E) is None


def test_masked_logits_are_legal(z):
    z = torch.nn.functional.pad(z, (0, 2), value=-torch.inf)
    ids = pick(z)
    weights = z.softmax(-1).gather(1, ids)
    meaning = learn(Observed(ids, weights, z), None, E + 2)
    assert (meaning.score, meaning.selection) == ("softmax", "logits")


def helper(z):
    return z.softmax(-1)


class SaysItElsewhere(nn.Module):
    def forward(self, z):
        return helper(z)


class SaysItByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.score_fn = nn.Sigmoid()


def test_source_of_functions_and_names_of_activations_are_hints(z):
    ids, one = pick(z, 1), torch.ones(T, 1)  # a normalised top-1 weight tells nothing
    assert learned(z, ids, one, SaysItElsewhere()).score == "softmax"
    assert learned(z, ids, one, SaysItByName()).score == "sigmoid"


def test_groups_that_a_greedy_router_has_but_does_not_use(z):
    router = nn.Module()
    router.num_group, router.topk_group, router.topk_method = 4, 2, "greedy"
    few = z[:2] * 0 + torch.tensor([9.0, 8, 7, 0, 0, 0, 0, 0])  # would fit groups too
    ids = pick(few, 2)
    assert learned(few, ids, few.softmax(-1).gather(1, ids), router).selection == "logits"


def test_a_router_that_ranks_in_half_precision_is_explained_as_far_as_it_rounds():
    torch.manual_seed(1)
    z = torch.randn(4000, E).bfloat16()
    s = torch.nn.functional.softplus(z).sqrt()  # rounded to eight bits
    bias = torch.linspace(-0.4, 0.4, E).bfloat16()
    ids = pick(s + bias)
    meaning = learned(z, ids, s.gather(1, ids), None, bias)
    assert meaning.selection == "sqrtsoftplus+bias"
    exact = meaning.rank(z.float(), bias.float())
    missed = exact.gather(1, ids).amin(-1) < exact.scatter(1, ids, -torch.inf).amax(-1)
    assert 10 < missed.sum() < 200  # it would not be explained without room
    assert learned(z.float(), ids, s.float().gather(1, ids), None, bias).selection is None


def test_the_selection_bias_of_a_router_is_its_own_tensor():
    router = nn.Module()
    assert selection_bias(None, E) is None
    assert selection_bias(router, E) is None
    router = nn.Module()
    router.register_buffer("e_score_correction_bias", torch.zeros(E))
    for _ in range(2):
        assert selection_bias(router, E) is router.e_score_correction_bias
        router.e_score_correction_bias = torch.ones(E)
    router = nn.Module()
    router.e_score_correction_bias = nn.Parameter(torch.zeros(E))
    assert selection_bias(router, E) is None
