"""torch.compile: hooks attached before it record in full, those attached after it are refused.

The truth is what the compiled model returns itself: the ids and weights its experts were given.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from support.tables import frame, read
from support.telling import BACKENDS, Telling, Told, assert_recorded, compiled
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens_hooks.capture import Capture
from moe_lens_hooks.intake import Intake
from moe_lens_hooks.reduce import reduce

IDS = torch.arange(12).reshape(3, 4)
LONGER = torch.arange(30).reshape(5, 6)


class BrokenExperts(nn.Module):
    """Leaves the graph in the middle of a block."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts, self.weight = experts.num_experts, experts.weight

    def forward(self, x_TD, top_k_index, top_k_weights):
        torch._dynamo.graph_break()
        y_TKD = torch.einsum("td,tkdf->tkf", x_TD, self.weight[top_k_index])
        return (y_TKD * top_k_weights.unsqueeze(-1)).sum(1)


class Wiping(Told):
    """Writes over the routing once its experts have run."""

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        _, weights_TK, ids_TK = self.gate(x_TD)
        said = ids_TK.clone(), weights_TK.clone()
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        ids_TK.zero_()
        weights_TK.zero_()
        return y_TD.view_as(x_BSD), *said


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def telling():
    torch.manual_seed(0)
    return Telling().eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_attached_before_compile_records_all_that_the_experts_were_given(
    telling, run, backend, in_place
):
    said = []
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        model = compiled(telling, in_place, backend=backend, fullgraph=True)
        for ids in (IDS, IDS + 5, LONGER, LONGER[:2]):  # the third makes the shapes dynamic
            with rec.step():
                said.append(model(ids)[1])
    assert_recorded(run, said)
    assert frame(run, "steps").tokens.tolist() == [12, 12, 30, 12]


def test_a_wrapper_is_recorded_like_its_model(telling, run):
    model = torch.compile(telling, backend="aot_eager", fullgraph=True)  # not called yet
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        said = []
        for _ in range(2):
            with rec.step():
                said.append(model(IDS)[1])
    assert_recorded(run, said)


def test_every_table_is_as_without_compile(telling, run, tmp_path):
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0

    def record(model, folder):
        with moe_lens.record(telling, folder, tokens=1.0, logits=True, token_ids=True) as rec:
            for _ in range(2):
                with torch.no_grad(), rec.step(tags=["a", "b", "a"]):
                    model(IDS, attention_mask=mask)

    record(telling, tmp_path / "eager")
    record(torch.compile(telling, backend="aot_eager", fullgraph=True), run)
    for table in (
        "load",
        "layers",
        "routers",
        "slices",
        "sequences",
        "tokens",
        "routing",
        "logits",
    ):
        eager, fast = read(tmp_path / "eager", table), read(run, table)
        assert fast.num_rows > 0
        assert fast.equals(eager), table


def _causal(kind):
    """A mask that hides the first two positions of the first row, and the one of the last."""
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, :2] = padding[2, 0] = True
    attended = torch.ones(4, 4, dtype=torch.bool).tril() & ~padding[:, None, None, :]
    additive = torch.where(attended, 0.0, torch.finfo(torch.float32).min)
    masks = {"[B, S]": (~padding).long(), "bool": attended, "additive": additive}
    masks["by kind of layer"] = {"sliding_attention": attended.clone(), "full_attention": attended}
    return padding, masks[kind]


@pytest.mark.parametrize("kind", ["[B, S]", "bool", "additive", "by kind of layer"])
def test_padding_is_marked_whatever_the_rank_of_the_mask(telling, run, kind):
    padding, mask = _causal(kind)
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0) as rec:
        model = compiled(telling, backend="eager", fullgraph=True)
        with rec.step():
            model(IDS, attention_mask=mask)
    assert frame(run, "tokens").sort_values("token").padding.tolist() == padding.flatten().tolist()
    assert frame(run, "steps").padding_tokens.tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_breaks_lose_nothing(run, backend):
    torch.manual_seed(0)
    model = Telling(breaks=True)
    for block in model.blocks:
        block.experts = BrokenExperts(block.experts)
    said = []
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(model, backend=backend)
        for ids in (IDS, IDS, LONGER):
            with rec.step():
                said.append(fast(ids)[1])
    assert_recorded(run, said)


@torch._dynamo.config.patch(recompile_limit=1)  # then code runs as it is
def test_past_the_recompile_limit_hooks_run_as_they_are(run):
    torch.manual_seed(0)
    model = Telling(blocks=3, breaks=True)
    for block in model.blocks:
        block.experts = BrokenExperts(block.experts)
    said = []
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(model, backend="eager")
        for ids in (IDS, LONGER):
            with rec.step():
                said.append(fast(ids)[1])
    assert_recorded(run, said)
    for ours in (Capture.enter_block, Capture.look, Intake.over, reduce):
        assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(ours.__code__)


def test_blocks_compiled_one_by_one_share_their_code(run):
    torch.manual_seed(0)
    model = Telling(blocks=6)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    said = []
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for block in model.blocks:
            block.compile(backend=counted, fullgraph=True)
        for ids in (IDS, IDS):
            with rec.step():
                said.append(model(ids)[1])
    assert_recorded(run, said)
    assert len(graphs) <= 4  # hooks and block, whatever the number of blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_counts_once_and_changes_no_gradient(run, backend, checkpointed):
    def train(folder):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, said = Telling(checkpointed=checkpointed).train(), []

        def steps(around):
            fast = torch.compile(model, backend=backend, fullgraph=True)
            for _ in range(2):
                with around():
                    x, told = fast(IDS)
                    said.append(told)
                    x.square().sum().backward()

        if folder is None:
            steps(torch.enable_grad)
        else:
            with moe_lens.record(model, folder, tokens=1.0, weights="exact") as rec:
                steps(rec.step)
        return [p.grad for p in model.parameters()], said

    (bare, _), (recorded, said) = train(None), train(run)
    for a, b in zip(bare, recorded, strict=True):
        if backend == "inductor":  # fuses otherwise around what a tap reads: rounding may differ
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    assert_recorded(run, said)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_compiled_code_counts_once(telling, run, reentrant):
    with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(telling, backend="aot_eager", fullgraph=True)
        scale = torch.ones((), requires_grad=True)

        def scaled(ids, scale):
            x, said = fast(ids)
            return x * scale, said[0][0], said[0][1], said[1][0], said[1][1]

        with rec.step():
            x, *said = checkpoint(scaled, IDS, scale, use_reentrant=reentrant)
            x.sum().backward()
    assert scale.grad is not None
    assert_recorded(run, [[(said[0], said[1]), (said[2], said[3])]])


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_inference_mode_and_autocast(telling, run, mode):
    said = []
    with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(telling, backend="aot_eager", fullgraph=True)
        with mode():
            bare = telling(IDS)[0]
            for _ in range(2):
                with rec.step():
                    x, told = fast(IDS)
                    said.append(told)
    assert torch.equal(bare, x)
    rows = frame(run, "routing")
    assert set(rows.step) == {0, 1, 2}  # the bare call is a step of its own
    steps = frame(run, "steps")
    assert steps.fires_seen.tolist() == [2, 2, 2]
    last = rows[rows.step == 2].sort_values(["layer", "token"])
    assert (
        np.concatenate([ids for ids, _ in said[-1]]).tolist() == np.stack(last.expert_ids).tolist()
    )


def test_outputs_are_those_of_the_compiled_model_without_capture(telling, run):
    with torch.no_grad():
        bare = torch.compile(telling, backend="aot_eager", fullgraph=True)(IDS)[0]
        torch._dynamo.reset()
        with moe_lens.record(telling, run) as rec, rec.step():
            during = torch.compile(telling, backend="aot_eager", fullgraph=True)(IDS)[0]
    assert torch.equal(bare, during)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_over_later_was_taken_in_time(run, backend):
    torch.manual_seed(0)
    model = Telling()
    model.blocks = nn.ModuleList([Wiping(), Wiping()])
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(model, backend=backend, fullgraph=True)
        said = []
        for ids in (IDS, IDS + 7):
            with rec.step():
                said.append(fast(ids)[1])
    assert_recorded(run, said)


# -- attached late, detached, attached again -----------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("what", ["the model", "the wrapper"])
def test_attached_after_the_first_call_is_refused_with_the_remedy(telling, run, in_place, what):
    with torch.no_grad():
        model = compiled(telling, in_place, backend="eager")
        model(IDS)
        with pytest.raises(moe_lens.CaptureBreach, match=r"torch\._dynamo\.reset"):
            with moe_lens.record(telling if what == "the model" else model, run) as rec:
                with rec.step():
                    model(IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in telling.modules())


def test_experts_that_were_compiled_and_called_before_are_seen(telling, run):
    with torch.no_grad():  # torch compiles what is inside a module, and calls its hooks as they are
        telling.blocks[1].experts.compile(backend="aot_eager", fullgraph=True)
        telling(IDS)
        with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec, rec.step():
            said = [telling(IDS)[1]]
    assert_recorded(run, said)


def test_a_block_inside_what_was_compiled_and_called_before_is_told(telling, run):
    telling.blocks[1] = nn.Sequential(telling.blocks[1])
    with torch.no_grad():
        telling.blocks[1].compile(backend="eager")
        telling(IDS)
        with pytest.raises(
            moe_lens.CaptureBreach, match=r"blocks\.1\.0 ran, but its .* saw no ids"
        ):
            with moe_lens.record(telling, run) as rec, rec.step():
                telling(IDS)


def test_reset_is_the_remedy(telling, run):
    model = torch.compile(telling, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(IDS)
        with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec, rec.step():
            torch._dynamo.reset()
            said = [model(IDS)[1]]
    assert_recorded(run, said)


def test_detached_the_compiled_model_is_compiled_again_without_us(telling, run):
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph

    def calls(graph):
        return sum(node.target is torch.ops.moe_lens.tap for node in graph.graph.nodes)

    with torch.no_grad():
        fast = torch.compile(telling, backend=kept, fullgraph=True)
        with moe_lens.record(telling, run) as rec, rec.step():
            during = fast(IDS)[0]
        with_us = len(graphs)
        after = fast(IDS)[0]
    assert torch.equal(during, after)
    # root and blocks are entered and left, with two taps in each block
    assert sum(map(calls, graphs[:with_us])) == 2 + 2 * 4
    assert len(graphs) > with_us
    assert sum(map(calls, graphs[with_us:])) == 0


def test_code_that_outlives_the_recorder_is_heard_by_nobody(telling, run):
    kept = []

    def keep(graph, inputs):
        kept.append((graph, inputs))
        return graph

    with torch.no_grad():
        with moe_lens.record(telling, run, tokens=1.0) as rec, rec.step():
            before = torch.compile(telling, backend=keep, fullgraph=True)(IDS)[0]
        del rec
        gc.collect()
        outputs = [x for graph, inputs in kept for x in graph(*inputs)]
    assert any(torch.equal(before, x) for x in outputs)
    assert set(frame(run, "routing").step) == {0}


def test_a_second_recorder_records_or_refuses(telling, run, tmp_path):
    fast = torch.compile(telling, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for folder in (tmp_path / "a", tmp_path / "b"):  # nothing ran in between
            with moe_lens.record(telling, folder, tokens=1.0, weights="exact") as rec, rec.step():
                said = fast(IDS)[1]
            assert_recorded(folder, [said])
        fast(IDS)  # compiled once more, without hooks
        with pytest.raises(moe_lens.CaptureBreach, match=r"torch\._dynamo\.reset"):
            with moe_lens.record(telling, run) as rec, rec.step():
                fast(IDS)


def test_an_exception_in_compiled_code_does_not_leak_into_the_next_forward(telling, run):
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(telling, backend="aot_eager", fullgraph=True)
        with pytest.raises(IndexError), rec.step():
            fast(IDS + 90)
        with rec.step():
            said = [fast(IDS)[1]]
    assert_recorded(run, said)


def test_hooks_that_others_attach_later_run_before_ours(telling, run):
    def shift(module, args):
        x_TD, ids_TK, weights_TK = args
        return x_TD, (ids_TK + 1) % 4, weights_TK

    with torch.no_grad(), pytest.warns(UserWarning, match="was chosen .* times, but computed"):
        with moe_lens.record(telling, run, tokens=1.0, on_breach="warn") as rec:
            handle = telling.blocks[0].experts.register_forward_pre_hook(shift)
            with rec.step():
                said = torch.compile(telling, backend="aot_eager", fullgraph=True)(IDS)[1]
            handle.remove()
    rows = frame(run, "routing").query("layer == 0").sort_values("token")
    assert np.stack(rows.expert_ids).tolist() == ((said[0][0] + 1) % 4).tolist()
