"""The rules of "Look at first", and the numbers above them: rows in, findings out."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lens.queries.info import RunInfo
from moe_lens_dashboards.findings import DATA, MODEL, NOTE, Answers, Finding, look_first
from moe_lens_dashboards.tiles import tiles

NAN = float("nan")


def info(**changes: Any) -> RunInfo:
    base: dict[str, Any] = dict.fromkeys(
        ("steps", "forwards", "tokens", "padding_tokens", "token_rows", "lost_rows", "breaches",
         "fires_expected", "fires_seen"), 0,
    )  # fmt: skip
    base |= {
        "run": "r", "path": "r", "model": "M", "ranks": [0], "missing_ranks": [], "layers": [],
        "phases": [], "first_step": 0, "last_step": 9, "sampling": "", "weights": "bf16",
        "attempts": 1, "ending": "closed", "unfinished": False, "last_write_seconds": None,
    }  # fmt: skip
    return RunInfo(**(base | changes))


def balance(layer: int, ratio: float, floor: float = 1.1) -> dict[str, Any]:
    return {"layer": layer, "max_over_mean": ratio, "max_over_mean_floor": floor}


def dropped(layer: int, rate: float, unserved: float = 0.0) -> dict[str, Any]:
    return {
        "layer": layer, "routed": 1000, "overflowed": 2000 * rate, "dropped": 1000 * rate,
        "dropped_rate": rate, "unserved_rate": unserved,
    }  # fmt: skip


def router(layer: int, entropy: float, tokens: int = 100, nonfinite: int = 0) -> dict[str, Any]:
    return {
        "layer": layer,
        "entropy_norm": entropy,
        "tokens": tokens,
        "nonfinite_tokens": nonfinite,
    }


def tag(name: str, loss: float, tokens: int = 100) -> dict[str, Any]:
    return {"tag": name, "loss": loss, "loss_tokens": tokens, "tokens": tokens}


def health(**changes: int) -> dict[str, Any]:
    return {"breaches": 0, "lost_rows": 0, "fires_expected": 8, "fires_seen": 8} | changes


def answers(**rows: list[dict[str, Any]]) -> Answers:
    quiet: dict[str, list[dict[str, Any]]] = {
        "layer_balance": [balance(0, 1.05)],
        "dropped_tokens": [dropped(0, 0.0)],
        "router_confidence": [router(0, 0.6)],
        "dead_experts": [],
        "quality_by_tag": [tag("a", 2.0), tag("b", 2.05)],
        "capture_health": [health()],
    }
    return Answers(**(quiet | rows))


def found(**rows: list[dict[str, Any]]) -> list[Finding]:
    return look_first(info(), answers(**rows))


def test_a_healthy_run_has_no_findings() -> None:
    assert found() == []
    nothing = {name: [] for name in Answers.__dataclass_fields__}
    assert look_first(info(), Answers(**nothing)) == []


@pytest.mark.parametrize(
    ("rows", "kind", "page", "link", "words"),
    [
        ({"capture_health": [health(breaches=2), health(breaches=1)]}, DATA, "live", {}, ["3 inv"]),
        ({"capture_health": [health(lost_rows=1234)]}, DATA, "live", {}, ["1,234 rows"]),
        ({"capture_health": [health(fires_seen=5)]}, DATA, "live", {}, ["of 3 MoE blocks"]),
        (
            {"dead_experts": [{"layer": 4, "expert": 7, "state": "dead"}]},
            MODEL, "experts", {"first_layer": 4, "last_layer": 4}, ["1 expert is", "expert 7"],
        ),
        (
            {"dead_experts": [{"layer": n, "expert": 7, "state": "dead"} for n in (1, 4, 4)]},
            MODEL, "experts", {"first_layer": 4, "last_layer": 4}, ["3 experts are", "2 of them"],
        ),
        (
            {"dropped_tokens": [dropped(0, 0.02), dropped(1, 0.123), dropped(2, NAN)]},
            MODEL, "capacity", {"first_layer": 1, "last_layer": 1},
            ["Layer 1 drops 12.3 %", "2 layers"],
        ),
        (
            {"dropped_tokens": [dropped(3, 0.0, unserved=0.002)]},
            MODEL, "capacity", {"first_layer": 3, "last_layer": 3}, ["0.20 %", "layer 3"],
        ),
        (
            {"layer_balance": [balance(0, 1.5), balance(2, 4.1)]},
            MODEL, "experts", {"first_layer": 2, "last_layer": 2}, ["4.1×", "1.10×"],
        ),
        (
            {"layer_balance": [balance(2, 1.5)]},
            NOTE, "experts", {"first_layer": 2, "last_layer": 2}, ["1.5×"],
        ),
        (
            {"router_confidence": [router(0, 0.6), router(5, 0.01)]},
            MODEL, "router", {"first_layer": 5, "last_layer": 5}, ["layer 5", "1.00 %"],
        ),
        (
            {"router_confidence": [router(0, 0.6), router(5, 0.999)]},
            NOTE, "router", {"first_layer": 5, "last_layer": 5}, ["layer 5", "99.9 %"],
        ),
        ({"router_confidence": [router(0, 0.6, nonfinite=3)]}, MODEL, "router", {}, ["3 tokens"]),
        (
            {"quality_by_tag": [tag("a", 1.0, 300), tag("<b>", 2.0, 100)]},
            NOTE, "requests", {"tag": "<b>"}, ["<b>", "2.00", "1.25"],
        ),
    ],
)  # fmt: skip
def test_each_rule_speaks_alone(
    rows: dict[str, Any], kind: int, page: str, link: dict[str, Any], words: list[str]
) -> None:
    (only,) = found(**rows)
    assert (only.kind, only.page, only.link) == (kind, page, link)
    for word in words:
        assert word in only.sentence


@pytest.mark.parametrize(
    "rows",
    [
        # Few tokens make any router look uneven: the floor is as high.
        {"layer_balance": [balance(0, 2.2, floor=2.0)]},
        {"layer_balance": [balance(0, NAN, NAN)]},
        {"layer_balance": [{"layer": 0, "max_over_mean": None, "max_over_mean_floor": None}]},
        {"dead_experts": [{"layer": 0, "expert": 1, "state": "dormant"}]},
        {"router_confidence": [router(0, NAN)]},
        {"quality_by_tag": [tag("a", 9.0)]},
        {"quality_by_tag": [tag("a", NAN), tag("b", 2.0)]},
        {"quality_by_tag": [tag("a", NAN, 0), tag("b", NAN, 0)]},
        {"dropped_tokens": [dropped(0, 0.009)]},
    ],
)
def test_what_chance_or_nothing_explains_is_no_finding(rows: dict[str, Any]) -> None:
    assert found(**rows) == []


def test_what_is_not_whole_comes_before_what_is_bad_before_what_is_notable() -> None:
    all_of_them = look_first(
        info(missing_ranks=[1, 2], damaged={"x": "cut"}, error="boom"),
        answers(
            capture_health=[health(breaches=1, lost_rows=1)],
            dropped_tokens=[dropped(0, 0.5, unserved=0.1)],
            quality_by_tag=[tag("a", 1.0), tag("b", 3.0)],
        ),
    )
    kinds = [f.kind for f in all_of_them]
    assert kinds == sorted(kinds)
    assert all_of_them[0].sentence.startswith("1 invariants")
    assert [f.page for f in all_of_them[-3:]] == ["capacity", "capacity", "requests"]
    assert "boom" in " ".join(f.sentence for f in all_of_them)


def test_tiles() -> None:
    rows = answers(
        dropped_tokens=[dropped(0, 0.1), dropped(1, 0.3)],
        layer_balance=[balance(0, 1.2), balance(1, 2.5, 1.3), balance(2, NAN)],
        router_confidence=[router(0, 0.5, 300), router(1, 0.9, 100), router(2, NAN, 50)],
        capture_health=[health(lost_rows=2), health(breaches=3)],
    )
    a2a = [
        {"dispatch_ms": 2.0, "combine_ms": NAN, "forwards": 1},
        {"dispatch_ms": 4.0, "combine_ms": 1.0, "forwards": 3},
    ]
    shown = tiles(rows, a2a)
    assert shown.tokens == 200
    assert shown.overflow_rate == pytest.approx(0.4)
    assert shown.dropped_rate == pytest.approx(0.2)
    assert shown.entropy_norm == pytest.approx(0.6)
    assert (shown.worst_layer, shown.max_over_mean, shown.floor) == (1, 2.5, 1.3)
    assert shown.all_to_all_ms == pytest.approx(3.5 + 1.0)
    assert (shown.lost_rows, shown.breaches) == (2, 3)


def test_tiles_of_nothing() -> None:
    shown = tiles(Answers(**{name: [] for name in Answers.__dataclass_fields__}), [])
    assert shown.tokens == 0
    assert shown.dropped_rate is None
    assert shown.max_over_mean is None
    assert shown.entropy_norm is None
    assert shown.all_to_all_ms is None
