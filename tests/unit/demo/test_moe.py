"""The MoE layer against a loop over tokens and choices, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.demo.moe import MoE, load_balancing_loss, router_z_loss, within_capacity


def make_layer(capacity_factor: float = 1.0, top_k: int = 2) -> MoE:
    torch.manual_seed(0)
    layer = MoE(
        hidden_size=8,
        intermediate_size=12,
        num_experts=4,
        top_k=top_k,
        capacity_factor=capacity_factor,
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def kept_by_counting(expert_ids: list[list[int]], experts: int, capacity: int) -> list[list[bool]]:
    taken = [0] * experts
    kept = [[False] * len(ids) for ids in expert_ids]
    for slot in range(len(expert_ids[0]) if expert_ids else 0):
        for token, ids in enumerate(expert_ids):
            kept[token][slot] = taken[ids[slot]] < capacity
            taken[ids[slot]] += kept[token][slot]
    return kept


def loop_over_tokens(layer: MoE, x_TD: torch.Tensor, capacity: int | None) -> torch.Tensor:
    prob_TE = layer.router.gate(x_TD).softmax(-1)
    chosen = [sorted(range(4), key=lambda e: -p[e])[: layer.top_k] for p in prob_TE.tolist()]
    kept = kept_by_counting(chosen, 4, 10**9 if capacity is None else capacity)
    y_TD = torch.zeros_like(x_TD)
    for token, x_D in enumerate(x_TD):
        total = sum(prob_TE[token, e] for e in chosen[token])
        for slot, e in enumerate(chosen[token]):
            if kept[token][slot]:
                gate_up = layer.experts.gate_up_EGD[e] @ x_D
                hidden = F.silu(gate_up[:12]) * gate_up[12:]
                y_TD[token] += prob_TE[token, e] / total * (layer.experts.down_EDF[e] @ hidden)
    return y_TD


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_evaluation_equals_a_loop_and_drops_nothing(top_k: int) -> None:
    layer = make_layer(top_k=top_k).eval()
    x_BSD = torch.randn(3, 7, 8, dtype=torch.float64)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    y_BSD, _, _ = layer(x_BSD)
    torch.testing.assert_close(
        y_BSD.flatten(0, 1), loop_over_tokens(layer, x_BSD.flatten(0, 1), None)
    )
    assert layer.capacity is None
    _, expert_ids_TK, weights_TK, kept_TK = seen[0]
    assert kept_TK is None
    assert expert_ids_TK.shape == (21, top_k)
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(21, dtype=torch.float64))


@pytest.mark.parametrize("capacity_factor", [0.25, 0.6, 1.0, 100.0])
def test_training_equals_a_loop_with_counters(capacity_factor: float) -> None:
    layer = make_layer(capacity_factor).train()
    x_BSD = torch.randn(3, 7, 8, dtype=torch.float64)
    y_BSD, _, _ = layer(x_BSD)
    assert layer.capacity == math.ceil(capacity_factor * 21 * 2 / 4)
    expected_TD = loop_over_tokens(layer, x_BSD.flatten(0, 1), layer.capacity)
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD)


def test_a_token_of_which_every_choice_is_dropped_gets_zero() -> None:
    layer = make_layer()
    ids_TK = torch.tensor([[0, 1], [2, 3]])
    weights_TK = torch.full((2, 2), 0.5, dtype=torch.float64)
    x_TD = torch.randn(2, 8, dtype=torch.float64)
    y_TD = layer.experts(x_TD, ids_TK, weights_TK, torch.tensor([[False, False], [True, True]]))
    assert (y_TD[0] == 0).all()
    assert (y_TD[1] != 0).any()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_capacity_serves_in_order_and_is_never_exceeded(
    expert_ids: list[list[int]], capacity: int
) -> None:
    ids_TK = torch.tensor(expert_ids)
    kept_TK = within_capacity(ids_TK, 5, capacity)
    assert kept_TK.tolist() == kept_by_counting(expert_ids, 5, capacity)
    routed_E = ids_TK.flatten().bincount(minlength=5)
    served_E = ids_TK[kept_TK].bincount(minlength=5)
    assert served_E.tolist() == routed_E.clamp(max=capacity).tolist()


def test_zero_tokens() -> None:
    for layer in (make_layer().train(), make_layer().eval()):
        x_TD = torch.zeros(0, 8, dtype=torch.float64)
        y_TD = layer.experts(x_TD, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
        assert y_TD.shape == (0, 8)


def test_gradient_reaches_router_and_experts() -> None:
    layer = make_layer().train()
    layer(torch.randn(3, 7, 8, dtype=torch.float64))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_load_balancing_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    ids_TK = torch.arange(8).remainder(4).view(4, 2)
    assert load_balancing_loss(torch.zeros(4, 4), ids_TK).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[100.0, 0, 0, 0]]).repeat(4, 1)
    assert load_balancing_loss(collapsed, torch.zeros(4, 1, dtype=torch.long)) == pytest.approx(4)


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    assert router_z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)
