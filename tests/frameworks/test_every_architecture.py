"""Every MoE architecture of the installed transformers: what is captured is what its experts did.

The zoo (tests/support/zoo) holds each one small and random. The proof is an ablation: silence one
expert and see which tokens change (support/zoo/proof.py).
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from support.zoo import ZOO, batch, build
from support.zoo.ablation import blocks, silenced
from support.zoo.catalog import NEVER_BUILT, NO_ROUTED_EXPERTS, REFUSED
from support.zoo.installed import built, parts, speaking_of_experts
from support.zoo.proof import Captured, prove, record, watched
from support.zoo.table import PAGE, committed, page, row, same

classes = cache(speaking_of_experts)


@pytest.mark.parametrize("name", ZOO)
def test_captured_equals_executed(name, tmp_path):
    entry = ZOO[name]
    model, inputs = build(entry), batch(entry)
    captured = record(model, inputs, tmp_path / "run")
    # Every group of experts in the model is a layer of the trace, and there is no other.
    assert {c.info.path for c in captured} == blocks(model)
    for layer in captured:
        check_meta(name, model, layer.info)
        if name != "ernie4_5_vl_moe":  # see test_the_zoo_has_what_is_special_in_a_family
            assert torch.equal(layer.tokens, torch.arange(len(layer.ids)))
    proofs = prove(model, inputs, captured)
    for proof in proofs:
        path = proof.info.path
        assert proof.served > 0, f"{path}: no token needs any expert"
        assert proof.wrong == 0, f"{path}: {proof.wrong} of {proof.checked} (token, expert) differ"
        assert proof.weight_error is not None, f"{path} was not built from its weights"
        assert proof.weight_error < 1e-6, f"{path}: {proof.weight_error:.1e}"
    found = row(entry, captured, proofs)
    assert same(found, committed().get(name, "")), f"make models; found: {found}"


BIASES = ("correction_bias", "expert_bias", "balancing_biases")


def check_meta(name, model, info):
    """What `meta` says of a layer, against the modules that it is made of."""
    block = model.get_submodule(info.path)
    tensors = [*block.named_parameters(), *block.named_buffers()]
    biased = any(bias in tensor for tensor, _ in tensors for bias in BIASES)
    assert info.selection_bias == biased
    assert ("bias" in (info.selection or "")) == biased
    by_scores = info.router not in ("hash", "task")
    assert (info.selection is not None, info.score is not None) == (by_scores, by_scores)
    assert (info.groups, info.top_groups) == _groups(model.config, block)
    assert ("groups" in (info.selection or "")) == (info.groups is not None)
    assert info.shared_experts == _shared(model, info.path, block)
    assert info.hidden_size == 64
    assert info.dispatch_width == (32 if name in ("nemotron_h", "muse_spark") else None)
    assert info.intermediate_size
    assert info.block == next(int(part) for part in info.path.split(".") if part.isdigit())


def _shared(model, path, block):
    """Experts for every token are named so, in the block or beside it; doge's have no name."""
    beside = model.get_submodule(path.rpartition(".")[0])
    named = ("shared_mlp", "shared_expert", "shared_experts", "gate_proj", "fc2")
    if not any(hasattr(module, name) for name in named for module in (block, beside)):
        return 0
    counts = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    return next((getattr(model.config, n) for n in counts if hasattr(model.config, n)), 1)


def _groups(config, block):
    used = any(hasattr(m, "n_group") or hasattr(m, "num_group") for m in block.modules())
    if not used or getattr(config, "topk_method", None) == "greedy":
        return None, None
    return config.n_group, config.topk_group


def test_the_page_lists_the_zoo_and_what_is_left_out():
    assert list(committed()) == list(ZOO)
    assert page(list(committed().values())) == PAGE.read_text(encoding="utf-8")
    assert all(float(line.split("|")[7]) < 1e-6 for line in committed().values())


def test_the_zoo_holds_every_package_that_speaks_of_experts():
    known = {entry.home for entry in ZOO.values()} | set(REFUSED) | set(NO_ROUTED_EXPERTS)
    unknown = sorted(set(classes()) - known)
    assert not unknown, f"neither in the zoo nor refused with a reason: {unknown}"
    gone = sorted(known - set(classes()))
    assert not gone, f"named in support/zoo/catalog.py, but not installed: {gone}"
    assert not {entry.home for entry in ZOO.values()} & (set(REFUSED) | set(NO_ROUTED_EXPERTS))


def test_a_package_that_is_new_is_found(tmp_path):
    for package, source in {
        "dense": "class Layer:\n    def forward(self, x):\n        return x  # no expert\n",
        "newmoe": "class Block:\n    def forward(self, x):\n        return self.experts(x)\n",
    }.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / f"modeling_{package}.py").write_text(source)
    assert speaking_of_experts(tmp_path) == {"newmoe": ["Block"]}


def test_the_zoo_builds_every_class_that_speaks_of_experts():
    made: dict[str, set[str]] = {}
    for entry in ZOO.values():
        made.setdefault(entry.home, set()).update(built(entry))
    for package, names in made.items():
        left = parts(package, classes()[package]) - names - NEVER_BUILT.keys()
        assert not left, f"{package}: no model of the zoo has a {sorted(left)}"
    every = {name for names in classes().values() for name in names}
    assert NEVER_BUILT.keys() <= every
    assert not NEVER_BUILT.keys() & {name for names in made.values() for name in names}


FAMILIES = (
    *("mixtral", "dbrx", "deepseek_v4", "doge", "ernie4_5_vl_moe", "gemma4", "jetmoe"),
    *("llama4_top2", "longcat_flash", "nllb_moe", "switch_transformers", "vitpose_backbone"),
    *("zaya",),
)
"""One architecture of each form of experts."""


@pytest.mark.parametrize("name", FAMILIES)
def test_running_the_whole_model_with_an_expert_silenced_agrees(name, tmp_path):
    """The ablation above runs experts alone; here nothing but the weights is touched."""
    entry = ZOO[name]
    model, inputs = build(entry), batch(entry)
    layer = record(model, inputs, tmp_path / "run")[0]
    block, T, E = model.get_submodule(layer.info.path), len(layer.ids), layer.info.experts

    def output():
        with torch.no_grad(), watched([block]) as calls:
            model(**inputs)
        return calls[id(block)][0].output_rows(T)

    base = output()
    for expert in range(E):
        with silenced(block, expert, E):
            changed = (output() != base).any(-1)
        assert torch.equal(changed, ((layer.ids == expert) & layer.kept).any(-1))
    assert torch.equal(output(), base)  # the weights came back


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request, tmp_path_factory):
    entry = ZOO[request.param]
    model, inputs = build(entry), batch(entry)
    run = tmp_path_factory.mktemp(request.param) / "run"
    return model, inputs, record(model, inputs, run)


class TestTheProof:
    """It sees a wrong id, a wrong weight and a wrong drop, in every form of experts."""

    @pytest.fixture
    def known(self, recorded):
        return deepcopy(recorded[2]), lambda captured: prove(*recorded[:2], captured)

    def test_ids_of_other_tokens(self, known):
        captured, proofs_of = known
        for layer in captured:
            layer.ids = layer.ids.roll(5, 0)
            layer.kept = layer.kept.roll(5, 0)
        assert any(proof.wrong for proof in proofs_of(captured))

    def test_weights_that_are_off_by_a_hundredth_of_a_percent(self, known):
        captured, proofs_of = known
        for layer in captured:
            layer.weights = layer.weights * (1 + 1e-4)
        for proof in proofs_of(captured):
            assert proof.weight_error is not None
            assert proof.weight_error > 1e-6

    def test_a_choice_that_is_called_dropped(self, known):
        captured, proofs_of = known
        first: Captured = captured[0]
        t, k = (first.kept & (first.ids < first.info.experts)).nonzero()[0].tolist()
        first.kept[t, k] = False
        assert proofs_of(captured)[0].wrong == 1


def test_the_zoo_has_what_is_special_in_a_family(tmp_path):
    """An ablation of a model in which nothing was dropped or skipped would prove little."""

    def captured(name):
        return record(build(ZOO[name]), batch(ZOO[name]), tmp_path / name)

    for name in ("switch_transformers", "nllb_moe"):
        assert any((~layer.kept & (layer.ids >= 0)).any() for layer in captured(name)), name
    for name in ("longcat_flash", "zaya"):  # ids that compute nothing
        assert any((layer.ids >= layer.info.experts).any() for layer in captured(name)), name
    hashed = captured("deepseek_v4")[0]
    table = build(ZOO["deepseek_v4"]).get_submodule(hashed.info.path).gate.tid2eid
    assert torch.equal(hashed.ids, table[batch(ZOO["deepseek_v4"])["input_ids"].flatten()])
    vision = batch(ZOO["ernie4_5_vl_moe"])["moe_mm_token_type_ids"].flatten().bool()
    for layer in captured("ernie4_5_vl_moe"):  # each kind of token has experts of its own
        of_kind = vision if "vision_moe" in layer.info.path else ~vision
        assert torch.equal(layer.tokens, of_kind.nonzero().flatten())
