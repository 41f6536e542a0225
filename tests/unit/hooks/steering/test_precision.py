"""`precision` against models that are quantised by hand, and on models whose answer is known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from support.inline_models import build as build_inline
from support.models import VOCAB, TinyModel, build
from support.steering import bare, record
from torch import nn

import moe_lens
from moe_lens.metrics.precision import flips_by_margin, loss_split, routing_agreement
from moe_lens.trace.precision import PRECISION, read_result
from moe_lens_hooks.steering.fake_quant import Format, format_of

TOKENS = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model, batch):
    """A number for each token that depends on all that the model does there."""
    out = model(batch)
    return (out.logits if hasattr(out, "logits") else out).square().mean(-1)


def tiny(**sizes):
    """Experts that multiply from the right: `[experts, inputs, outputs]`."""
    torch.manual_seed(0)
    model = TinyModel(**({"experts": 6, "top_k": 2} | sizes)).eval()
    for block in model.blocks:
        block.experts.is_transposed = True
    return model


def measure(model, path, batch=TOKENS, **options):
    if not (path / "run").exists():
        record(model, path / "run", [batch])
    found = moe_lens.precision(model, [batch], path / "run", **({"loss": loss_of} | options))
    return found, pd.DataFrame(found.columns())


def of(rows, **keys):
    """The rows with these values, in the order of the batch."""
    for name, value in keys.items():
        rows = rows[rows[name] == value]
    return rows.sort_values(["layer", "sequence", "position"])


def rounded(p, to, *, transposed=False):
    """A weight as the format holds it, matrix by matrix."""
    flat = p.detach().view(-1, *p.shape[-2:])
    parts = [to.rounded(m.T).T if transposed else to.rounded(m) for m in flat]
    return torch.stack(parts).view(p.shape)


# -- against a model with other weights ------------------------------------------------------------


def names_of(model, family, part):
    """Which parameters are the router's, and which the experts'."""
    found = {"router": [], "experts": []}
    for name, p in model.named_parameters():
        if ".gate.weight" in name or name.endswith("router.weight"):
            found["router"].append(name)
        elif ".experts." in name and p.ndim > 1 and "bias" not in name:
            found["experts"].append(name)
    return found["router"] + found["experts"] if part == "both" else found[part]


FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "list")


def family_model(family):
    return build_inline("softmax_topk") if family == "list" else build(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_a_model_with_rounded_weights(family, tmp_path):
    """Free and forced, whole and one layer, in a copy whose weights were replaced for good."""
    model = family_model(family)
    found, rows = measure(model, tmp_path, formats=["int4:16"], layers=[1])
    to = format_of("int4:16")
    layer = found.about["moe_layers"][0]
    own = moe_lens.intervene(model, loss=loss_of).measure(TOKENS).layers
    everywhere = {n: torch.from_numpy(layer.expert_ids_BSK) for n, layer in enumerate(own)}
    kept = own[1].expert_ids_BSK
    for part in ("router", "experts", "both"):
        other = copy.deepcopy(model)
        for name in names_of(other, family, part):
            if name.startswith(layer["path"] + "."):
                p = other.get_parameter(name)
                p.data = rounded(p, to, transposed=family == "gpt_oss" and ".experts." in name)
        base = moe_lens.intervene(other, loss=loss_of).measure(TOKENS)
        with moe_lens.force_routing(other, everywhere), torch.no_grad():
            forced = loss_of(other, TOKENS)
        alone, free = (of(rows, part=part, mode=m) for m in ("alone", "free"))
        assert (alone.loss.to_numpy() == base.loss_BS.reshape(-1)).all()
        assert (free.loss.to_numpy() == alone.loss.to_numpy()).all()  # there is but one layer
        got = of(rows, part=part, mode="forced")
        assert (got.loss.to_numpy() == forced.reshape(-1).numpy()).all()
        now = base.layers[1].expert_ids_BSK
        share = [
            len(set(a) & set(b)) / len(a)
            for a, b in zip(kept.reshape(-1, 2).tolist(), now.reshape(-1, 2).tolist(), strict=True)
        ]
        for some in (alone, free, got):  # a router sees the same, whatever its experts are given
            assert some.agreement.to_numpy() == pytest.approx(share)
        assert (alone.loss != alone.base_loss).any()


def test_a_routers_numbers_are_those_of_a_plain_loop(tmp_path):
    """Logits, sets, distributions and margins of the first layer, computed one by one."""
    model = tiny()
    _, rows = measure(model, tmp_path, formats=["int3"], parts=["router"], layers=[0])
    own = model.blocks[0].gate.weight.detach().double().numpy()
    top = 3
    scale = abs(own).max(1, keepdims=True) / top
    other = np.round(own / scale) * scale
    mine = of(rows, mode="alone")
    assert len(mine) == TOKENS.numel()
    for row in mine.itertuples():
        x = (
            model.embed.weight[TOKENS[int(row.sequence), int(row.position)]]
            .detach()
            .double()
            .numpy()
        )
        p, q = (np.exp(z) / np.exp(z).sum() for z in (own @ x, other @ x))
        a, b = set(np.argsort(-p)[:2]), set(np.argsort(-q)[:2])
        assert row.agreement == len(a & b) / 2
        assert row.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4, abs=1e-7)
        assert row.margin == pytest.approx(np.sort(p)[-2] - np.sort(p)[-3], rel=1e-4)
    assert (mine.agreement < 1).any()


def test_weights_rows_are_those_of_plain_loops(tmp_path):
    model = tiny()
    _, rows = measure(model, tmp_path, formats=["int4:4"], parts=["router", "experts"])
    base = moe_lens.intervene(model, loss=loss_of).measure(TOKENS)
    rows = of(rows, mode="weights")
    for n, block in enumerate(model.blocks):
        chosen = base.layers[n].expert_ids_BSK.reshape(-1, 2).tolist()
        for e in range(6):
            matrix = block.experts.weight[e].double().T.tolist()  # [outputs, inputs]
            off = size = 0.0
            flat = [w for row in matrix for w in row]
            for row in matrix:
                for at in range(0, 8, 4):
                    group = row[at : at + 4]
                    scale = max(map(abs, group)) / 7
                    off += sum((round(w / scale) * scale - w) ** 2 for w in group)
                    size += sum(w * w for w in group)
            (got,) = of(rows, layer=n, part="experts", expert=e).itertuples()
            assert got.error == pytest.approx(off / size, rel=1e-4)
            assert got.usage == sum(e in ids for ids in chosen) / len(chosen)
            mean = sum(flat) / len(flat)
            spread = (sum((w - mean) ** 2 for w in flat) / len(flat)) ** 0.5
            assert got.outlier == pytest.approx(max(map(abs, flat)) / spread)
        (router,) = of(rows, layer=n, part="router").itertuples()
        weight = block.gate.weight.detach()
        off = format_of("int4:4").rounded(weight).double() - weight.double()
        assert router.error == pytest.approx(
            float(off.square().sum() / weight.double().square().sum())
        )
        assert np.isnan(router.expert)
        assert np.isnan(router.usage)


# -- what has a known answer -----------------------------------------------------------------------


def test_rounding_to_what_weights_are_already_changes_nothing(tmp_path):
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            for p in (block.gate.weight, block.experts.weight):
                p.copy_(torch.randint(-127, 128, p.shape).float())
                p[..., 0, :] = 127.0  # in every output of both layouts
                p[..., :, 0] = 127.0
                p.mul_(2.0**-7)
    found, rows = measure(model, tmp_path, formats=["int8"])
    tokens = rows[rows["mode"] != "weights"]
    assert (tokens.loss == tokens.base_loss).all()  # bit for bit
    assert (tokens.agreement == 1).all()
    assert (tokens.kl == 0).all()
    assert (of(rows, mode="weights").error == 0).all()
    assert not loss_split(found.columns())[["total", "arithmetic", "routing"]].any(axis=None)


class Even(nn.Module):
    """Weighs its experts alike, whatever its logits are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.top_k, self.weight = inner, inner.top_k, inner.weight

    def forward(self, x_TD):
        logits_TE, weights_TK, ids_TK = self.inner(x_TD)
        return logits_TE, torch.full_like(weights_TK, 0.5), ids_TK


def test_a_rounded_router_costs_no_arithmetic_where_its_weights_are_constant(tmp_path):
    """The same experts with the same weights: the forced difference is zero bit for bit."""
    model = tiny()
    for block in model.blocks:
        block.gate = Even(block.gate)
    found, rows = measure(model, tmp_path, formats=["int2"], parts=["router"])
    forced, free = of(rows, mode="forced"), of(rows, mode="free")
    assert (forced.loss == forced.base_loss).all()
    assert (free.loss != free.base_loss).any()
    (split,) = loss_split(found.columns()).to_dict("records")
    assert split["arithmetic"] == 0
    assert split["routing"] == split["total"] != 0


def test_rounded_experts_cost_no_routing_in_the_last_layer(tmp_path):
    found, rows = measure(tiny(blocks=1), tmp_path, formats=["int2"], parts=["experts"])
    forced, free = of(rows, mode="forced"), of(rows, mode="free")
    assert (forced.loss.to_numpy() == free.loss.to_numpy()).all()
    assert (free.agreement == 1).all()
    assert (free.loss != free.base_loss).all()
    (split,) = loss_split(found.columns()).to_dict("records")
    assert split["routing"] == 0 != split["arithmetic"]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_agreement_falls_with_bits_and_flips_sit_at_small_margins(family, tmp_path):
    tokens = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(2))
    formats = ["int8", "fp8", "int4", "int3", "int2"]
    found, _ = measure(build(family), tmp_path, tokens, formats=formats, parts=["both"])
    table = routing_agreement(found.columns())
    for mode in ("alone", "forced", "free"):
        means = table[table["mode"] == mode].groupby("format").agreement.mean()[formats].tolist()
        assert means == sorted(means, reverse=True)
        assert len(set(means)) == len(means), (mode, means)
    worse = table[table["mode"] == "free"].groupby("format").agreement.mean()
    assert (worse < table[table["mode"] == "alone"].groupby("format").agreement.mean()).all()
    flips = flips_by_margin(found.columns()).groupby(["format", "bucket"]).flipped.mean().unstack()
    assert (flips[1] > flips[4]).all()
    if family == "qwen3_moe":  # a margin is that to the experts of a token's own groups
        assert flips.loc["int4", 1] > 5 * flips.loc["int4", 4]
        assert flips.loc["int8", [2, 3, 4]].tolist() == [0, 0, 0]
    by_layer = table[(table["mode"] == "free") & (table.format == "int4")].sort_values("layer")
    assert by_layer.agreement.iloc[-1] < by_layer.agreement.iloc[0]  # errors add up


# -- the model afterwards --------------------------------------------------------------------------


def state(model):
    """Addresses and bits of all weights."""
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def unchanged(model, before):
    after = {name: (p.data_ptr(), p.detach()) for name, p in model.named_parameters()}
    same = all(torch.equal(before[n][1], p) and before[n][0] == at for n, (at, p) in after.items())
    return same and before.keys() == after.keys() and bare(model)


def test_the_model_is_as_it_was(tmp_path):
    model = tiny()
    before = state(model)
    measure(model, tmp_path)
    assert unchanged(model, before)


def stops(model, error, after):
    """Its second layer's experts raise in this of their forwards, with rounded weights in place."""
    calls = []

    def stop(module, args):
        calls.append(module.weight.detach().clone())
        if len(calls) == after:
            raise error

    return model.blocks[1].experts.register_forward_pre_hook(stop), calls


def test_ctrl_c_in_a_forward_gives_the_weights_back_and_keeps_what_was_measured(tmp_path):
    model = tiny()
    before = state(model)
    record(model, tmp_path / "run", [TOKENS])
    hook, calls = stops(model, KeyboardInterrupt(), 9)
    found = moe_lens.precision(
        model, [TOKENS], tmp_path / "run", loss=loss_of, formats=["int2"], parts=["both"]
    )
    hook.remove()
    assert not torch.equal(calls[-1], before["blocks.1.experts.weight"][1])  # in the very middle
    assert found.interrupted
    assert found.path.name == "precision-interrupted.parquet"
    assert set(found.columns()["mode"]) == {"weights", "alone", "forced"}
    assert unchanged(model, before)
    assert read_result(tmp_path / "run", "precision") == found
    whole = moe_lens.precision(model, [TOKENS], tmp_path / "run", loss=loss_of)
    assert not whole.interrupted
    again = read_result(tmp_path / "run", "precision")
    assert again.path == whole.path
    assert again.about == json.loads(json.dumps(whole.about))
    assert [p.name for p in whole.path.parent.iterdir()] == ["precision.parquet"]


def test_an_error_in_a_forward_gives_the_weights_back(tmp_path):
    model = tiny()
    before = state(model)
    record(model, tmp_path / "run", [TOKENS])
    hook, _ = stops(model, RuntimeError("no memory"), 8)
    with pytest.raises(RuntimeError, match="no memory"):
        moe_lens.precision(model, [TOKENS], tmp_path / "run", loss=loss_of)
    hook.remove()
    assert unchanged(model, before)
    assert not list((tmp_path / "run" / "precision").iterdir())


def test_layers_that_share_their_experts_are_rounded_one_at_a_time(tmp_path):
    model = tiny()
    model.blocks[1].experts = model.blocks[0].experts
    found, rows = measure(model, tmp_path, formats=["int2"], parts=["experts"])
    other = copy.deepcopy(model)
    other.blocks[0].experts = copy.deepcopy(model.blocks[1].experts)
    with torch.no_grad():
        p = other.blocks[0].experts.weight
        p.copy_(rounded(p, Format("int2", 2, 128), transposed=True))
        alone = loss_of(other, TOKENS)
    assert (of(rows, mode="alone", layer=0).loss.to_numpy() == alone.reshape(-1).numpy()).all()
    assert len(found.about["moe_layers"]) == 2


def test_pieces_and_limits(tmp_path):
    model = tiny()
    said = []
    whole, rows = measure(model, tmp_path, formats=["int4"], parts=["both"], name="whole")
    found, parts = measure(
        model, tmp_path, formats=["int4"], parts=["both"], tokens_at_once=24, name="parts",
        on_progress=lambda *x: said.append(x),
    )  # fmt: skip
    assert pq.read_table(found.path).schema.equals(PRECISION.schema)
    assert found.path == tmp_path / "run" / "precision" / "parts.parquet"
    keys = ["mode", "layer", "sequence", "position"]
    a, b = (x[x["mode"] != "weights"].sort_values(keys) for x in (rows, parts))
    assert a.agreement.tolist() == b.agreement.tolist()
    assert a.loss.to_numpy() == pytest.approx(b.loss.to_numpy(), rel=1e-5)
    assert said[0][:2] == (0, 1 + 2 * (2 + 2))
    assert said[-1][0] == said[-1][1] == len(said) - 1
    two = moe_lens.precision(
        model, [TOKENS[:1], TOKENS[1:]], tmp_path / "run", loss=loss_of, formats=["int4"],
        parts=["both"], name="two",
    )  # fmt: skip
    columns = pd.DataFrame(two.columns())
    split = columns[columns["mode"] != "weights"].sort_values(keys)
    assert split[keys].to_numpy().tolist() == a[keys].to_numpy().tolist()
    assert split.loss.to_numpy() == pytest.approx(a.loss.to_numpy(), rel=1e-5)
    few, rows = measure(model, tmp_path, tokens=13, formats=["int4"], layers=[1], name="few")
    assert set(rows.sequence.dropna()) == {0}
    assert set(rows.layer) == {1}
    assert few.about["measured_tokens"] == 12
    assert whole.about["formats"] == ["int4"]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [2, 4, 5])
def test_a_model_that_is_not_the_same_twice_is_refused(forward, tmp_path):
    """Measured, looked at, forced; then looked at once more, and held to that."""
    model = tiny()
    record(model, tmp_path / "run", [TOKENS])
    calls = []

    def drifts(module, args, output):
        calls.append(1)
        return output + 1e-6 * (len(calls) >= forward)

    model.blocks[1].register_forward_hook(drifts)
    with pytest.raises(moe_lens.UnsupportedRouter, match="does not reproduce its output bit for"):
        moe_lens.precision(model, [TOKENS], tmp_path / "run", loss=loss_of)
    assert len(calls) == (3 if forward < 4 else 5)


class Copying(nn.Module):
    """Experts that compute with a copy of their weights, as packed kernels do."""

    def __init__(self, inner):
        super().__init__()
        self.num_experts, self.weight, self.is_transposed = inner.num_experts, inner.weight, True
        self.packed = inner.weight.detach().clone()

    def forward(self, x_TD, top_k_index, top_k_weights):
        y = torch.einsum("td,tkdf->tkf", x_TD, self.packed[top_k_index])
        return (y * top_k_weights.unsqueeze(-1)).sum(1)


def test_weights_that_are_not_computed_with_are_refused(tmp_path):
    model = tiny()
    model.blocks[1].experts = Copying(model.blocks[1].experts)
    with pytest.raises(moe_lens.UnsupportedRouter, match=r"layer 1 .* computes with copies"):
        measure(model, tmp_path, formats=["int4"])
    found, _ = measure(model, tmp_path, formats=["int4"], parts=["router"])
    assert found.about["refused"] == {}


def test_models_that_cannot_be_rounded_are_refused_in_one_line(tmp_path):
    record(tiny(), tmp_path / "run", [TOKENS])

    def ask(model, **options):
        options = {"loss": loss_of} | options
        with pytest.raises((moe_lens.UnsupportedRouter, moe_lens.SteeringError)) as error:
            moe_lens.precision(model, [TOKENS], tmp_path / "run", **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    square = tiny()
    for block in square.blocks:
        del block.experts.is_transposed
    assert "is_transposed = True for [experts, inputs, outputs]" in ask(square)
    assert "is compiled" in ask(torch.compile(tiny()))
    eight = tiny()
    for block in eight.blocks:
        weight = block.experts.weight.detach().to(torch.int8)
        block.experts.weight = nn.Parameter(weight, requires_grad=False)
        block.experts.forward = lambda x, i, w: x
    assert "torch.int8" in ask(eight)
    assert "quantised already" in ask(eight)
    inference = tiny()
    with torch.inference_mode():
        for block in inference.blocks:
            block.gate.weight = nn.Parameter(block.gate.weight.clone(), requires_grad=False)
    assert "torch.inference_mode" in ask(inference)
    model = tiny()
    assert "is none of fp8, int8" in ask(model, formats=["int4", "int1"])
    assert "part 'gate' is none of router, experts, both" in ask(model, parts=["gate"])
    assert "nothing to round" in ask(model, formats=[])
    assert "the model has 2" in ask(model, layers=[2])
    assert "has 5" in ask(tiny(experts=5))
    with pytest.raises(moe_lens.TraceError, match="name of a file"):
        moe_lens.precision(model, [TOKENS], tmp_path / "run", name="a/b")
    with pytest.raises(ValueError, match="tokens=0"):
        moe_lens.precision(model, [TOKENS], tmp_path / "run", tokens=0)
    assert not list((tmp_path / "run" / "precision").glob("*"))


def test_an_expert_with_a_weight_that_is_no_number_is_refused_though_nobody_chose_it(tmp_path):
    model = tiny(experts=32, top_k=1)
    base = moe_lens.intervene(model, loss=loss_of).measure(TOKENS)
    idle = min(set(range(32)) - set(base.layers[1].expert_ids_BSK.reshape(-1).tolist()))
    with torch.no_grad():
        model.blocks[1].experts.weight[idle, 0, 0] = torch.nan
    with pytest.raises(moe_lens.SteeringError, match=r"layer 1 \(blocks.1\): a weight is NaN"):
        measure(model, tmp_path)


def test_a_layer_whose_weights_are_unknown_is_left_out_by_name(tmp_path):
    """Unless it was asked for."""
    model = tiny()
    del model.blocks[0].experts.is_transposed
    found, rows = measure(model, tmp_path, formats=["int4"])
    assert set(rows.layer) == {1}
    assert list(found.about["refused"]) == ["blocks.0"]
    assert "is_transposed" in found.about["refused"]["blocks.0"]
    with pytest.raises(moe_lens.UnsupportedRouter, match="is_transposed"):
        measure(model, tmp_path, layers=[0])


def test_what_is_returned_says_in_a_line_what_was_measured(tmp_path):
    found, _ = measure(tiny(), tmp_path, formats=["int8"])
    assert repr(found) == f"Precision({found.path}, 48 tokens)"


def test_a_model_of_another_class_is_warned_of(tmp_path):
    model = tiny()
    record(model, tmp_path / "run", [TOKENS])
    model.__class__ = type("Other", (TinyModel,), {})
    with pytest.warns(UserWarning, match="recorded from a TinyModel, this is a Other"):
        measure(model, tmp_path, formats=["int8"])


def test_usage_is_of_the_tokens_that_have_a_loss(tmp_path):
    def of_some(model, batch):
        every_BS = loss_of(model, batch)
        every_BS[:, ::3] = torch.nan
        return every_BS

    model = tiny()
    _, rows = measure(model, tmp_path, formats=["int8"], parts=["experts"], loss=of_some)
    with moe_lens.intervene(model, loss=of_some) as iv:
        base = iv.measure(TOKENS)
    for layer in rows.layer.unique():
        ids_NK = base.layers[layer].expert_ids_BSK[:, np.arange(12) % 3 > 0].reshape(-1, 2)
        found = rows[(rows["mode"] == "weights") & (rows.layer == layer)].set_index("expert").usage
        for expert in range(6):
            assert found[expert] == (ids_NK == expert).any(1).mean()
