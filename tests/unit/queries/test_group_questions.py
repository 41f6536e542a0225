"""Questions about groups, sets and identities, against loops and closed forms."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.reading import new_meta
from support.tables import frame

import moe_lens
from moe_lens.queries.about import reachable_bits
from moe_lens.trace.meta import LayerInfo, write_meta
from moe_lens.trace.reader import open_run
from moe_lens.trace.synthetic import Spec, generate
from moe_lens.trace.writer import TraceWriter

DEEPSEEK_V3 = LayerInfo(0, "mlp", 256, 8, groups=8, top_groups=4)


def told(run: Path, **said: object) -> None:
    """Let the run's meta file say this of every layer."""
    meta = open_run(run).meta
    meta.layers = [replace(x, **said) for x in meta.layers]
    write_meta(run, meta)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups") / "run"
    generate(path, Spec(experts=12, top_k=3, groups=4, layers=2, steps=70, popularity="zipf"))
    told(path, top_groups=2)
    return path


def test_sets_that_a_router_reaches() -> None:
    assert 2 ** reachable_bits(DEEPSEEK_V3) == pytest.approx(7.161e13, rel=1e-4)
    assert 2 ** reachable_bits(replace(DEEPSEEK_V3, groups=None, top_groups=None)) == (
        pytest.approx(math.comb(256, 8), rel=1e-12)
    )
    small = LayerInfo(0, "mlp", 9, 4, groups=3, top_groups=2)
    sets = [s for s in itertools.combinations(range(9), 4) if len({e // 3 for e in s}) <= 2]
    assert 2 ** reachable_bits(small) == pytest.approx(len(sets))


@pytest.mark.parametrize(
    "said",
    [
        {"top_k": None},
        {"zero_experts": 2},
        {"groups": 7},
        {"top_k": 300},
        {"top_groups": 1, "top_k": 33},  # 32 experts in a group
    ],
)
def test_where_nothing_can_be_said_it_is_null(said: dict[str, int | None]) -> None:
    assert reachable_bits(replace(DEEPSEEK_V3, **said)) is None


def test_load_of_groups_is_that_of_their_experts(run: Path) -> None:
    rows = frame(run, "load")
    with moe_lens.open(run) as trace:
        for asked in ({}, {"first_step": 3, "last_step": 40}, {"tag": rows.tag[0]}):
            here = rows
            if "tag" in asked:
                here = here[here.tag == asked["tag"]]
            elif asked:
                here = here[(here.step >= 3) & (here.step <= 40)]
            loads: Counter[tuple[int, int]] = Counter()
            for layer, expert, n in zip(here.layer, here.expert, here.routed, strict=True):
                loads[layer, expert] += n
            for r in trace.query("group_load", **asked).rows():
                layer, group = r["layer"], r["expert_group"]
                mine = [loads[layer, e] for e in range(3 * group, 3 * group + 3)]
                whole = sum(n for (at, _), n in loads.items() if at == layer)
                assert (r["first_expert"], r["experts"]) == (3 * group, 3)
                assert r["routed"] == sum(mine)
                assert r["share"] == pytest.approx(sum(mine) / whole)
                assert r["over_even"] == pytest.approx(4 * sum(mine) / whole)
                assert r["chosen"] == sum(n > 0 for n in mine)
                assert r["hottest_share"] == pytest.approx(max(mine) / sum(mine))


def test_entropies_of_load_follow_the_chain_rule(run: Path) -> None:
    rows = frame(run, "load")
    with moe_lens.open(run) as trace:
        for r in trace.query("group_entropy").rows():
            mine = rows[rows.layer == r["layer"]].groupby("expert").routed.sum()
            p = {e: n / mine.sum() for e, n in mine.items() if n}
            q: Counter[int] = Counter()
            for e, x in p.items():
                q[e // 3] += x
            assert r["load_entropy"] == pytest.approx(-sum(x * math.log(x) for x in p.values()))
            assert r["load_group"] == pytest.approx(-sum(x * math.log(x) for x in q.values()))
            within = -sum(x * math.log(x / q[e // 3]) for e, x in p.items())
            assert r["load_within"] == pytest.approx(within)
            assert r["token_within"] == pytest.approx(r["token_entropy"] - r["token_group"])
            assert 0 < r["token_group"] < math.log(4)


def test_sets_are_counted_whatever_their_order(run: Path) -> None:
    rows = frame(run, "routing")
    with moe_lens.open(run) as trace:
        for r in trace.query("expert_sets", most=10**9).rows():
            mine = rows[rows.layer == r["layer"]].expert_ids
            sets = Counter(frozenset(ids) for ids in mine)
            assert r["tokens"] == len(mine)
            assert r["distinct_sets"] == len(sets)
            assert r["singletons"] == sum(n == 1 for n in sets.values())
            assert r["coverage"] == pytest.approx(1 - r["singletons"] / len(mine))
            used = sum(n * len({e // 3 for e in s}) for s, n in sets.items())
            assert r["groups_used"] == pytest.approx(used / len(mine))
            reach = [
                s for s in itertools.combinations(range(12), 3) if len({e // 3 for e in s}) < 3
            ]
            assert r["reachable"] == len(reach)
        (thinned, _) = trace.query("expert_sets", most=300).rows()
        assert 150 < thinned["tokens"] < 600


def test_groups_that_cannot_be_are_no_groups(run: Path, tmp_path: Path) -> None:
    """Of a meta file that somebody else wrote: asked all the same, without a crash."""
    path = tmp_path / "run"
    generate(path, Spec(experts=12, top_k=3, layers=1, steps=2))
    told(path, groups=5, top_groups=2)
    with moe_lens.open(path) as trace:
        assert trace.query("group_load").rows() == trace.query("group_entropy").rows() == []
        (row,) = trace.query("expert_sets").rows()
        assert (row["reachable"], row["groups_used"]) == (None, None)
        assert trace.info().runs[0].grouped == ""


def test_a_run_without_identities_has_its_layers_own(run: Path) -> None:
    with moe_lens.open(run) as trace:
        (row,) = trace.sql("select count(*) n, count(distinct identity) d from moe_experts").rows()
        assert row == {"n": 24, "d": 24}
        loads = trace.query("expert_load").rows()
        found = {r["identity"]: r["routed"] for r in trace.query("identity_load").rows()}
        assert found == {f"{r['layer']}/{r['expert']}": r["routed"] for r in loads}


def test_an_empty_run_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "run"
    TraceWriter(path, new_meta(layers=[])).close()
    with moe_lens.open(path) as trace:
        for name in ("group_load", "group_entropy", "expert_sets", "identity_load"):
            assert trace.query(name).rows() == []
        assert trace.table("moe_experts").rows() == []


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    for name, n in (("a", 2), ("b", 3)):
        with moe_lens.record(None, tmp_path / name) as rec, rec.step():
            ids = torch.arange(4 * n).view(-1, 2) % 4
            rec.log("x", ids, torch.ones(2 * n, 2), experts=4, groups=2)
    with moe_lens.open([tmp_path / "a", tmp_path / "b"]) as trace:
        found = {
            (r["run"], r["expert_group"]): r["routed"] for r in trace.query("group_load").rows()
        }
        assert found == {("a", 0): 4, ("a", 1): 4, ("b", 0): 6, ("b", 1): 6}
        named = [r for r in trace.query("identity_load").rows() if r["identity"] == "0/0"]
        assert [(r["run"], r["routed"], r["places"]) for r in named] == [("a", 2, 1), ("b", 3, 1)]
