"""What a router's logits mean is learned from numbers; where nothing fits, it stays unknown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.semantics import learn

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
