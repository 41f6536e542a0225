"""Times of the all-to-alls of megatron-core and DeepSpeed, two ranks each holding half of the
experts; and that their two ranks open as one trace, which counts nobody twice."""

from __future__ import annotations

import json
import statistics

import pytest
from support.exchanged import NAP_S, STEPS
from support.ranks import run_ranks

import moe_lens

LATE = STEPS.index("rank 0 is late")


@pytest.fixture(scope="module", params=["megatron", "deepspeed"])
def folder(request, tmp_path_factory):
    """Of what two processes recorded, and of what a clock of their own told."""
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(f"{request.param}_exchange_rank.py", 2, folder)
    return folder


@pytest.fixture
def layers(folder):
    with moe_lens.open(folder / "run") as trace:
        rows = trace.sql("select rank, step, forwards, dispatch_ns, combine_ns from layers").rows()
    return {(row["rank"], row["step"]): row for row in rows}


def told(folder, rank):
    return json.loads((folder / f"{rank}.json").read_text())


def test_forward_and_only_forward_is_timed(folder, layers):
    """Neither the backward pass nor a recomputation, which exchange as often and as long."""
    assert sorted(layers) == [(rank, step) for rank in (0, 1) for step in range(len(STEPS))]
    for rank in (0, 1):
        clocks = told(folder, rank)["clock"]
        for i, name in enumerate(("dispatch_ns", "combine_ns")):
            got = [layers[rank, step][name] for step in range(len(STEPS))]
            want = [clock[i] for clock in clocks]
            assert all(0 < g <= w for g, w in zip(got, want, strict=True)), (got, want)
            # The middle one: a busy machine may hold a process between the two clocks, once.
            shares = [g / w for g, w in zip(got, want, strict=True)]
            assert statistics.median(shares) > 0.5, (got, want)


def test_the_time_of_a_rank_includes_its_waiting_for_the_slowest(layers):
    """The least over the ranks is the transfer."""
    slow, fast = (layers[rank, LATE]["dispatch_ns"] for rank in (0, 1))
    assert fast > 0.8 * NAP_S * 1e9
    assert slow < 0.5 * fast
    for rank in (0, 1):
        assert layers[rank, LATE]["combine_ns"] < 0.5 * fast


def test_the_ready_query_tells_of_both_ranks(folder, layers):
    with moe_lens.open(folder / "run") as trace:
        for rank in (0, 1):
            for row in trace.query("all_to_all", rank=rank).rows():
                want = layers[rank, row["step"]]
                assert row["dispatch_ms"] == pytest.approx(want["dispatch_ns"] / 1e6)
                assert row["combine_ms"] == pytest.approx(want["combine_ns"] / 1e6)


def test_two_ranks_open_as_one_trace(folder):
    """Against a plain count over the outputs of both routers."""
    with moe_lens.open(folder / "run") as trace:
        rows = trace.sql("select expert, sum(routed) n from load group by 1").rows()
        tokens = trace.sql("select sum(tokens) n from steps").rows()[0]["n"]
    got = {row["expert"]: row["n"] for row in rows}
    mine, others = (told(folder, rank)["choices_E"] for rank in (0, 1))
    assert mine != others
    assert [got.get(e, 0) for e in range(len(mine))] == [
        a + b for a, b in zip(mine, others, strict=True)
    ]
    assert tokens == 2 * len(STEPS) * 48


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory):
    """Folders of one process, and of two that route the same tokens."""
    folders = [tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)]
    for world, folder in enumerate(folders, 1):
        run_ranks("megatron_tp_rank.py", world, folder)
    return folders


@pytest.mark.parametrize("experts", ["split", "spread"])
def test_copies_under_tensor_parallelism_are_not_counted_twice(experts, tensor_parallel):
    """Two ranks of the same tokens tell what one process tells; rows of experts, which both ranks
    are given, are not told at all."""
    questions = [
        "select step, layer, tag, expert, routed, processed, padding from load order by all",
        "select step, layer, tokens, forwards, max_load, touched from layers order by all",
        "select step, tag, tokens, sequences from slices order by all",
        "select step, tokens from steps order by all",
    ]
    answers, received = [], []
    for folder in tensor_parallel:
        with moe_lens.open(folder / experts) as trace:
            answers.append([trace.sql(question).rows() for question in questions])
            received.append(trace.sql("select sum(received) n from load").rows()[0]["n"])
            kept = trace.sql("select distinct rank from routing order by 1").rows()
    assert answers[0] == answers[1]
    assert all(answers[0])
    assert received == [2 * 48 * 2, None]
    assert kept == [{"rank": 0}, {"rank": 1}]  # rows of tokens stay, and say whose they are
