"""NLLB-MoE and Switch Transformers: what their routers chose, what had room, and what ran."""

from __future__ import annotations

import unittest.mock
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.odd_models import ODD, batch_of
from support.odd_recorded import record, run, slots
from support.tables import frame

from moe_lens.errors import CaptureBreach
from moe_lens_hooks.adapters.nllb import OTHER as NLLB_NOTE


def test_nllb_runs_other_experts_than_it_chose_and_both_are_told(tmp_path):
    model = ODD["nllb_moe"].build(moe_eval_capacity_token_fraction=0.25)
    layers, meta = record(ODD["nllb_moe"], model, batch_of("nllb_moe"), tmp_path / "run")
    load = frame(tmp_path / "run", "load")
    tokens = frame(tmp_path / "run", "tokens")
    differ = dropped = 0
    for layer in layers:
        padding = tokens[tokens.stream == layer.info.stream].sort_values("token").padding
        assert not layer.info.faithful
        mask_TE, gates_TE = layer.args[1], layer.args[2]
        mine = load[load.layer == layer.info.layer].groupby("expert").sum(numeric_only=True)
        meant = np.zeros(4, int)
        ran = np.zeros(4, int)
        for row, pad, mask_E, gates_E in zip(
            layer.rows.itertuples(), padding, mask_TE, gates_TE, strict=True
        ):
            lost = [] if row.dropped is None else list(row.dropped)
            for slot, (e, wish) in enumerate(zip(row.expert_ids, row.router_ids, strict=True)):
                kept = slot not in lost
                assert kept == (gates_E[wish] > 0)
                assert e == (mask_E[wish] if kept else wish)
                differ += kept and e != wish
                dropped += not kept
                if not pad:
                    meant[wish] += 1
                    ran[e] += kept
        assert mine.routed.reindex(range(4), fill_value=0).tolist() == meant.tolist()
        assert mine.processed.reindex(range(4), fill_value=0).tolist() == ran.tolist()
        assert ran[2:].sum() == 0
    assert dropped > 0
    assert meta.warnings[NLLB_NOTE] == differ > 0


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("first", [True, False])
def test_nllb_policies_in_training_are_recorded_as_drawn(policy, first, tmp_path):
    """Against the masks that the router makes of its choices before it looks for room."""
    sizes = {"second_expert_policy": policy, "batch_prioritized_routing": not first}
    model = ODD["nllb_moe"].build(**sizes, expert_capacity=4).train()
    meant = []
    with spy_choices(model, meant):
        meta, routing, _ = run(model, batch_of("nllb_moe"), tmp_path / "run")
    kind = ("dynamic-k", None) if policy == "random" else ("token-choice", 2)
    assert [(x.router, x.top_k) for x in meta.layers] == [kind] * 2
    for info, (first_TE, second_TE) in zip(meta.layers, meant, strict=True):
        rows = routing[routing.layer == info.layer].sort_values("token")
        wish = [
            [*a.nonzero().flatten().tolist(), *b.nonzero().flatten().tolist()]
            for a, b in zip(first_TE, second_TE, strict=True)
        ]
        assert [list(ids) for ids in rows.router_ids] == wish
    assert routing.dropped.notna().any()


@contextmanager
def spy_choices(model, out):
    """(first, second) 0/1 masks `[T, E]` of each call, as they enter the two cumulative sums."""
    routers = [m for m in model.modules() if type(m).__name__ == "NllbMoeTop2Router"]
    cumsum, argsort = torch.cumsum, torch.Tensor.argsort
    seen, orders = [], []

    def spied(x, dim):
        seen.append(x)
        return cumsum(x, dim=dim)

    def ordered(x, *args, **kwargs):
        orders.append(argsort(x, *args, **kwargs))
        return orders[-1]

    def wrap(router):
        def route(*args, **kwargs):
            seen.clear(), orders.clear()
            with (
                unittest.mock.patch.object(torch, "cumsum", spied),
                unittest.mock.patch.object(torch.Tensor, "argsort", ordered),
            ):
                result = type(router).route_tokens(router, *args, **kwargs)
            if orders:  # sorted by importance: put them back
                out.append(tuple(torch.empty_like(x).index_copy_(0, orders[0], x) for x in seen))
            else:
                out.append(tuple(seen))
            return result

        return route

    for router in routers:
        router.route_tokens = wrap(router)
    yield
    for router in routers:
        del router.route_tokens


def test_nllb_that_runs_its_experts_as_chosen_is_noticed(tmp_path):
    model = ODD["nllb_moe"].build()
    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":

            def mended(x_TD, mask_TE, gates_TE, experts=module):
                y_TD = torch.zeros_like(x_TD)
                for t, e in (gates_TE > 0).nonzero().tolist():
                    expert = experts.get_submodule(f"expert_{e}")
                    y_TD[t] += gates_TE[t, e] * expert(x_TD[t : t + 1])[0]
                return y_TD

            module.forward = mended
    with pytest.raises(CaptureBreach, match="ran otherwise than this adapter knows"):
        run(model, batch_of("nllb_moe"), tmp_path / "run")


def test_switch_with_jitter_in_training(tmp_path):
    """What the experts were given is read beneath the hooks, since no two forwards agree."""
    model = ODD["switch_transformers"].build(router_jitter_noise=0.3).train()
    masks = {}
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            inner = module.forward

            def forward(x, mask, weights, inner=inner, path=path):
                masks[path.removesuffix(".experts")] = mask.clone()
                return inner(x, mask, weights)

            module.forward = forward
    meta, routing, _ = run(model, batch_of("switch_transformers"), tmp_path / "run")
    for info in meta.layers:
        mask_TE = masks[info.path].flatten(0, 1)
        rows = routing[routing.layer == info.layer].sort_values("token")
        assert [d is None for d in rows.dropped] == mask_TE.any(-1).tolist()
        ran = [[e for e, _ in s] for s in slots(rows)]
        assert ran == [m.nonzero().flatten().tolist() for m in mask_TE]
