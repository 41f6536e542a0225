"""`counterfactual` on a model whose right experts are known: its rows, its file, Ctrl-C."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from support.models import TinyModel
from support.steering import record
from torch import nn

import moe_lens
from moe_lens.metrics.counterfactual import route_regret, token_regret
from moe_lens.trace.counterfactual import read_result
from moe_lens.trace.schema import COUNTERFACTUAL
from moe_lens_hooks.steering.alternatives import alternatives
from moe_lens_hooks.steering.passes import Passes

E, VOCAB = 5, 15
SWAPPED = (3, 7, 11)
"""Tokens whose right expert the router ranks second."""


class Planted(TinyModel):
    """Token t is served by expert t mod 5; the loss is low there alone. No token sees another."""

    def __init__(self, top_k: int) -> None:
        super().__init__(experts=E, top_k=top_k, width=VOCAB, blocks=1)
        gate, experts = self.blocks[0].gate, self.blocks[0].experts
        with torch.no_grad():
            self.embed = nn.Embedding.from_pretrained(torch.eye(VOCAB))
            gate.weight.zero_()
            for t in range(VOCAB):
                order = [(t + i) % E for i in range(E)]
                if t in SWAPPED:  # the right expert changes rows with the one that is ranked K + 1
                    order[0], order[top_k] = order[top_k], order[0]
                gate.weight[order, t] = 0.04 * torch.arange(E - 1, -1, -1.0)
                for e in range(E):
                    experts.weight[e, t] = 0.0
                    experts.weight[e, t, 0] = (1.0, 0.5, 0.1, 0.05, 0.01)[(e - t) % E]


def loss_of(model, batch):
    """What is missing of the right expert's output, at each token."""
    tokens = batch["input_ids"]
    own = torch.nn.functional.one_hot(tokens, VOCAB)
    return 1 - (model(tokens) - own)[..., 0]


TOKENS = torch.arange(VOCAB).view(3, 5)
BATCHES = [
    {"input_ids": TOKENS[:2], "tags": ["a", "b"]},
    {"input_ids": TOKENS[2:], "tags": ["a"]},
]


def planted_run(path, top_k):
    model = Planted(top_k).eval()
    record(model, path, [TOKENS])
    return model


@pytest.mark.parametrize("top_k", [1, 2])
def test_regret_is_above_zero_exactly_where_the_right_expert_is_ranked_second(top_k, tmp_path):
    model = planted_run(tmp_path / "run", top_k)
    found = moe_lens.counterfactual(
        model, BATCHES, tmp_path / "run", loss=loss_of, alternatives=100
    )
    frame = token_regret(found.columns())
    token_N = frame.sequence * 5 + frame.position
    assert sorted(token_N) == list(range(VOCAB))  # fewer than were asked for: all of them
    assert (frame.routes == len(list(combinations(range(E), top_k))) - 1).all()
    assert sorted(token_N[frame.regret > 1e-6]) == list(SWAPPED)
    right = ~token_N.isin(SWAPPED)
    assert (frame["rank"][right] == 1).all()
    assert (frame.beats[right] == 1).all()
    assert (frame.random_regret > 0).all()
    by_tag = route_regret(found.columns(), "tag").set_index("slice")
    assert by_tag.loc["a", "positive"] == pytest.approx(2 / 10)  # tokens 3 and 11
    assert by_tag.loc["b", "positive"] == pytest.approx(1 / 5)  # token 7
    # the runner-up is right for the same tokens, and wrong for all others
    rows = pd.DataFrame(found.columns())
    swap = rows[rows.intervention == "runner_up"]
    better = swap.loss < swap.base_loss - 1e-6
    assert sorted((swap.sequence * 5 + swap.position)[better]) == list(SWAPPED)


def test_rows_are_those_of_the_interventions_themselves(tmp_path):
    torch.manual_seed(0)
    model = TinyModel(experts=5, top_k=2).eval()
    record(model, tmp_path / "run", [TOKENS])

    def loss(m, b):
        return m(b).sum(-1)

    said = []
    found = moe_lens.counterfactual(
        model, [TOKENS[:2], TOKENS[2:]], tmp_path / "run", loss=loss, regret_tokens=4,
        alternatives=3, experts=[4, 1], on_progress=lambda *x: said.append(x),
    )  # fmt: skip
    table = pq.read_table(found.path)
    assert table.schema.equals(COUNTERFACTUAL.schema)
    assert found.path == tmp_path / "run" / "counterfactual" / "counterfactual.parquet"
    assert said[0][0] == 0
    assert said[-1][0] == said[-1][1] == len(said) - 1
    rows = table.to_pandas()
    kinds = rows.groupby("intervention").number.unique().map(sorted).to_dict()
    assert kinds == {
        "knock_out": [1, 4], "force_in": [1, 4], "runner_up": [0], "top_k": [1, 2, 3, 4],
        "other_route": [0, 1, 2],
    }  # fmt: skip
    with moe_lens.intervene(model, loss=loss) as iv:
        base = iv.measure(TOKENS)
        for n in (0, 1):
            for kind, number, change in (
                ("knock_out", 4, iv.knock_out(n, 4)),
                ("force_in", 1, iv.force_in(n, 1)),
                ("runner_up", 0, iv.runner_up(n)),
                ("top_k", 3, iv.top_k(n, 3)),
            ):
                cost = change(base)
                mine = rows[(rows.layer == n) & (rows.intervention == kind)]
                mine = mine[mine.number == number].sort_values(["sequence", "position"])
                np.testing.assert_allclose(mine.loss, cost.loss_N, rtol=1e-6)
                assert (mine.affected.to_numpy() == cost.affected_N).all()
                assert (mine.sequence.to_numpy() == cost.sequence_N).all()
                margin = base.layers[n].margin_BS.ravel()
                np.testing.assert_allclose(mine.margin, margin, rtol=1e-6)
        routes = rows[rows.intervention == "other_route"]
        assert len(routes) == 2 * 4 * 3
        assert routes.groupby(["sequence", "position"]).layer.nunique().eq(2).all()  # the same ones
        for row in routes.itertuples():
            ids = torch.full((3, 5, 2), -1)
            ids[row.sequence, row.position] = torch.tensor(row.expert_ids)
            own = base.layers[row.layer].expert_ids_BSK[row.sequence, row.position]
            assert set(own) != set(row.expert_ids)
            one = iv.force(row.layer, ids)(base)
            at = row.sequence * 5 + row.position
            assert row.loss == pytest.approx(one.loss_N[at], rel=1e-6)
            assert row.base_loss == pytest.approx(one.base_N[at], rel=1e-6)


def test_a_token_takes_other_routes_alone(tmp_path):
    """In a model whose tokens see earlier ones, those keep their routes meanwhile."""

    class Summing(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + block(x.cumsum(1))
            return x.cumsum(1)

    torch.manual_seed(0)
    model = Summing(experts=4, top_k=1).eval()
    record(model, tmp_path / "run", [TOKENS])
    found = moe_lens.counterfactual(
        model, [TOKENS], tmp_path / "run", loss=lambda m, b: m(b).sum(-1), layers=[0],
        tokens_at_once=5,
    )  # fmt: skip
    routes = pq.read_table(found.path).to_pandas().query("intervention == 'other_route'")
    assert len(routes) == 15 * 3
    for row in routes.sample(6, random_state=0).itertuples():
        ids = torch.full((15, 1), -1)
        ids[row.sequence * 5 + row.position] = torch.tensor(row.expert_ids)
        with moe_lens.force_routing(model, {0: ids}), torch.no_grad():
            alone = model(TOKENS).sum(-1)[row.sequence, row.position]
        assert row.loss == pytest.approx(float(alone), rel=1e-5)


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    model = planted_run(tmp_path / "run", 2)
    run, calls = Passes.changed, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Passes, "changed", interrupted)
    found = moe_lens.counterfactual(model, BATCHES[:1], tmp_path / "run", loss=loss_of)
    assert found.interrupted
    assert found.path.name == "counterfactual-interrupted.parquet"
    assert len(found.columns()["loss"]) == 3 * 10
    assert read_result(tmp_path / "run", "counterfactual") == found
    monkeypatch.undo()
    whole = moe_lens.counterfactual(model, BATCHES[:1], tmp_path / "run", loss=loss_of)
    assert not whole.interrupted
    again = read_result(tmp_path / "run", "counterfactual")
    assert again.path == whole.path
    assert again.about == json.loads(json.dumps(whole.about))
    assert [p.name for p in whole.path.parent.iterdir()] == ["counterfactual.parquet"]


def test_tokens_bound_what_is_measured(tmp_path):
    model = planted_run(tmp_path / "run", 1)
    found = moe_lens.counterfactual(
        model, BATCHES, tmp_path / "run", loss=loss_of, tokens=6, regret_tokens=0, layers=[0]
    )
    columns = found.columns()
    assert set(columns["sequence"]) == {0}  # whole sequences, as many as fit
    assert found.about["measured_tokens"] == 5
    assert "other_route" not in set(columns["intervention"])


def test_what_cannot_be_measured_is_refused(tmp_path):
    model = planted_run(tmp_path / "run", 2)

    def ask(**more):
        options = {"loss": loss_of} | more
        model_ = options.pop("model", model)
        batches = options.pop("batches", BATCHES)
        return moe_lens.counterfactual(
            model_, batches, options.pop("run", tmp_path / "run"), **options
        )

    with pytest.raises(moe_lens.TraceError):
        ask(run=tmp_path / "none")
    with pytest.raises(moe_lens.SteeringError, match="the model has 1"):
        ask(layers=[1])
    with pytest.raises(moe_lens.SteeringError, match="experts 0 to 4, not 9"):
        ask(experts=[9])
    with pytest.raises(moe_lens.SteeringError, match="2 sequences, but 3 tags"):
        ask(batches=[{"input_ids": TOKENS[:2], "tags": ["a", "b", "c"]}])
    with pytest.raises(moe_lens.TraceError, match="name of a file"):
        ask(name="../x")
    with pytest.raises(moe_lens.SteeringError, match="nothing to ask"):
        ask(batches=[])
    with pytest.raises(moe_lens.SteeringError, match="has 5"):
        ask(model=TinyModel(experts=4, blocks=1))
    with pytest.raises(ValueError, match="alternatives=0"):
        ask(alternatives=0)
    assert not list((tmp_path / "run" / "counterfactual").glob("*"))


def test_alternatives_are_drawn_alike_and_are_others():
    rng = np.random.default_rng(0)
    own = np.array([5, 2])
    drawn = [frozenset(s) for _ in range(900) for s in alternatives(own, 6, 5, rng).tolist()]
    others = [frozenset(s) for s in combinations(range(6), 2) if set(s) != {2, 5}]
    counts = pd.Series(drawn).value_counts()
    assert set(counts.index) == set(others)
    assert abs(counts / (900 * 5 / 14) - 1).max() < 0.25  # 321 expected, a deviation of 17
    few = alternatives(own, 6, 100, rng)
    assert {frozenset(s) for s in few.tolist()} == set(others)
    assert len(few) == 14
    one = alternatives(np.arange(3), 3, 4, rng)
    assert one.shape == (0, 3)
    many = alternatives(np.arange(8), 64, 50, rng)
    assert len({frozenset(s) for s in many.tolist()}) == 50
    assert all(len(set(s)) == 8 for s in many.tolist())


@pytest.mark.parametrize("at_once", [5, 10, 20, 35])
def test_no_forward_is_larger_than_was_asked(at_once, tmp_path):
    """Routes of one token go in several forwards, and come out as in one."""
    torch.manual_seed(0)
    model = TinyModel(experts=6, top_k=2).eval()
    record(model, tmp_path / "run", [TOKENS])
    sizes = []

    def loss(m, b):
        sizes.append(b.numel())
        return m(b).sum(-1)

    def rows(**more):
        found = moe_lens.counterfactual(
            model, [TOKENS], tmp_path / "run", loss=loss, regret_tokens=4, alternatives=5, **more
        )
        table = pq.read_table(found.path).to_pandas().query("intervention == 'other_route'")
        return table.sort_values(["layer", "sequence", "position", "number"], ignore_index=True)

    whole = rows()
    sizes.clear()
    parts = rows(tokens_at_once=at_once)
    assert max(sizes) <= at_once
    assert len(parts) == 2 * 4 * 5
    same = ["layer", "sequence", "position", "number"]
    pd.testing.assert_frame_equal(parts[same], whole[same])
    assert [list(x) for x in parts.expert_ids] == [list(x) for x in whole.expert_ids]
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(parts.base_loss, whole.base_loss, rtol=1e-5)


def test_a_layer_that_sees_other_tokens_is_refused_by_name(tmp_path):
    class Partly(TinyModel):
        """Its second block sees the last two tokens of each sequence."""

        def forward(self, input_ids):
            x = self.embed(input_ids)
            x = x + self.blocks[0](x)
            return torch.cat([x[:, :-2], x[:, -2:] + self.blocks[1](x[:, -2:])], 1)

    torch.manual_seed(0)
    model = Partly(experts=4, top_k=2).eval()
    record(TinyModel(experts=4, top_k=2), tmp_path / "run", [TOKENS])

    def ask(**more):
        return moe_lens.counterfactual(
            model, [TOKENS], tmp_path / "run", loss=lambda m, b: m(b).sum(-1), **more
        )

    says = r"layer 1 \(blocks.1\) does not route the tokens that have losses"
    with pytest.warns(
        UserWarning, match="from a TinyModel, this is a Partly: its layers are alike"
    ):
        with pytest.raises(moe_lens.UnsupportedRouter, match=says):
            ask(layers=[0, 1])
        assert [x["layer"] for x in ask().about["moe_layers"]] == [0]
