"""What alarms are made of, read from a trace: against what was written. And what they refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import layer_info, write_run

from moe_lens.errors import QueryError
from moe_lens.queries.check import Checked, check, read
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.events import Forward, StepEnd
from moe_lens.trace.meta import Attempt, Meta
from moe_lens.trace.synthetic import Dead, Drift, Hot, Spec, events, generate
from moe_lens.trace.writer import TraceWriter

SPEC = Spec(
    layers=3, experts=16, top_k=2, steps=70, sequences=4, length=32, rows=False,
    phases=("train", "eval"), capacity_factor=1.25, popularity="zipf", skew=0.6,
    planted=(Hot(0, 0.6, layers=(1,)), Dead(3, layers=(2,))), drift=Drift((40,)),
)  # fmt: skip
SERVED = Spec(
    layers=2, experts=8, top_k=2, steps=40, sequences=2, length=16, decode=4, phases=("serve",),
    topics=16, topic_strength=1.0, stay=1.0, rows=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    generate(path / "run", SPEC)
    generate(path / "served", SERVED)
    write_run(path / "short", steps=2)
    return path


def fired(found: list[Checked]) -> set[tuple[str, str, int, int | None]]:
    return {
        (each.phase, v.alarm, f.layer, f.expert)
        for each in found
        for v in each.verdicts
        for f in v.fired
    }


def test_blocks_are_sums_of_what_was_written(runs: Path) -> None:
    forwards = [e for e in events(SPEC) if isinstance(e, Forward) and e.phase == "eval"]
    with open_trace(runs / "run") as trace:
        run = one_run(trace)
        layers = read(trace, run, "eval", run.layers)
    every = 3  # 70 steps in 32 blocks at most
    starts = sorted({f.step // every * every for f in forwards})
    assert [x.layer for x in layers] == [0, 1, 2]
    for x in layers:
        assert x.steps_C == tuple(f"step {s}" for s in starts)
        for c, start in enumerate(starts):
            here = [f.layers[x.layer] for f in forwards if f.step // every * every == start]
            tokens = sum(f.tokens_G.sum() for f in forwards if f.step // every * every == start)
            assert (x.counts_CE[c] == sum(y.routed_GE.sum(0) for y in here)).all()
            assert x.tokens_C[c] == tokens
            for series, name in ((x.z_loss_C, "zloss_sum_G"), (x.entropy_C, "entropy_sum_G")):
                assert series is not None
                total = sum(getattr(y, name).sum() for y in here)
                assert series[c] == pytest.approx(total / tokens, rel=1e-5)
        lost = [f.layers[x.layer].dropped_GE for f in forwards]
        dropped = sum(each.sum() for each in lost if each is not None)
        assert x.dropped == pytest.approx(dropped / x.counts_CE.sum())
        assert x.dropped_by_chance is not None
        assert x.dropped_by_chance.expected < 0.05


def test_planted_faults_fire_where_they_are(runs: Path) -> None:
    with open_trace(runs / "run") as trace:
        found = check(trace)
        assert [each.phase for each in found] == ["train", "eval"]
        seen = fired(found)
        for phase in ("train", "eval"):
            assert (phase, "dead", 2, 3) in seen
            assert (phase, "hot", 1, 0) in seen
            assert {(phase, "drift", layer, None) for layer in range(3)} <= seen
            assert {x for x in seen if x[1] == "dead"} == {
                (p, "dead", 2, 3) for p in ("train", "eval")
            }
        assert not {x[1] for x in seen} & {"z_loss", "entropy"}
        some = check(trace, phase="eval", layers=[1], only=["hot", "dead"])
        assert fired(some) == {("eval", "hot", 1, 0)}
        assert [v.alarm for v in some[0].verdicts] == ["dead", "hot"]
        assert some[0].fired == 1


def test_decoding_is_cut_where_batches_begin(runs: Path) -> None:
    with open_trace(runs / "served") as trace:
        run = one_run(trace)
        layers = read(trace, run, "decode", run.layers)
        assert layers[0].blocks == 20  # two batches each
        assert not fired(check(trace, phase="decode"))


def test_a_block_of_decoding_begins_with_a_prefill(tmp_path: Path) -> None:
    """Every forward is a step of its own here, as without `rec.step`; each has a window."""
    spec = replace(SERVED, sequences=4)
    meta = Meta("each", layers=[layer_info(i, 8, 2) for i in range(2)], attempts=[Attempt(0, 0)])
    writer = TraceWriter(tmp_path / "each", meta, queue_bytes=1 << 62)
    forwards = [e for e in events(spec) if isinstance(e, Forward)][:40]
    for step, each in enumerate(forwards):
        writer.put(replace(each, step=step, forward=0))
        writer.put(StepEnd(step))
    writer.close()
    with open_trace(tmp_path / "each") as trace:
        run = one_run(trace)
        (first, _) = read(trace, run, "decode", run.layers)
    # Buckets of two steps, of which some that follow each other hold one batch.
    begins = [step - step % 2 for step in range(5, 40, 5)]
    assert first.steps_C == ("step 0", *(f"step {step}" for step in begins))
    for c, (begin, end) in enumerate(itertools.pairwise([0, *begins, 99])):
        here = [f for step, f in enumerate(forwards) if begin <= step < end and f.phase == "decode"]
        assert (first.counts_CE[c] == sum(f.layers[0].routed_GE.sum(0) for f in here)).all()


def test_decoding_without_its_prefill_is_one_block(runs: Path, tmp_path: Path) -> None:
    with open_trace(runs / "served") as trace:
        run = one_run(trace)
        run.phases.remove("prefill")
        layers = read(trace, run, "decode", run.layers)
    assert [x.blocks for x in layers] == [1, 1]
    assert layers[0].counts_CE.sum() == 40 * 4 * 2 * 2


def test_against_another_run(runs: Path) -> None:
    with open_trace(runs / "run") as trace, open_trace(runs / "run") as same:
        alike = check(trace, only=["drift", "z_loss"], against=same)
        assert not fired(alike)
        assert all(v.judged for each in alike for v in each.verdicts)
    with open_trace(runs / "run") as trace, open_trace(runs / "served") as other:
        with pytest.raises(QueryError, match="16 experts in run; served has 8 experts there"):
            check(trace, against=other, layers=[0])
        with pytest.raises(QueryError, match="served has no such layer"):
            check(trace, against=other, layers=[2])


def test_runs_without_a_phase_in_common(runs: Path, tmp_path: Path) -> None:
    generate(tmp_path / "trained", Spec(layers=2, experts=8, steps=2, rows=False))
    with open_trace(runs / "served") as trace, open_trace(tmp_path / "trained") as other:
        with pytest.raises(
            QueryError, match="trained has phases train, served has prefill, decode"
        ):
            check(trace, against=other)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"phase": "test"}, "There is no phase 'test'; there are train, eval."),
        ({"layers": [0, 9]}, "There is no layer 9; there are 0, 1, 2."),
        ({"only": ["dead", "deaf"]}, "There is no alarm 'deaf'; there are dead, hot, "),
    ],
)
def test_what_is_not_there(runs: Path, how: dict[str, Any], message: str) -> None:
    with open_trace(runs / "run") as trace, pytest.raises(QueryError) as caught:
        check(trace, **how)
    assert message in str(caught.value)


def test_few_steps(runs: Path) -> None:
    with open_trace(runs / "short") as trace:
        for each in check(trace):
            lacking = {v.alarm for v in each.verdicts if v.lacks}
            assert {"drift", "z_loss", "entropy"} <= lacking
            assert each.blocks <= 2


def test_blocks_of_a_long_run() -> None:
    from moe_lens.queries.check import _every

    class Run:
        first_step, last_step = 0, 0

    for last in (0, 5, 31, 32, 500, 2000, 10_000, 1_000_000):
        Run.last_step = last
        every = _every(Run())  # type: ignore[arg-type]
        buckets = np.unique(np.arange(0, last + 1, max(1, last // 5000)) // every)
        assert len(buckets) <= 32
        assert every < 64 or every % 64 == 0
