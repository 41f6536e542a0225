"""Floors are those that were computed by hand for published layers on one GPU's ceilings.

The rows: tokens, experts touched, then microseconds of permute, gate and up, SwiGLU, down, combine,
of all together unfused, and of a fused layer, at 4.3e12 B/s and 788e12 FLOP/s in bf16.
"""

from __future__ import annotations

import pytest

from moe_lens.replay.floors import Ceiling, Shape, Work, fused, padded_rows, stages

H200 = Ceiling(4.3e12, 788e12)
MIXTRAL = Shape(8, 4096, 14336, "bfloat16", 2), 2
OLMOE = Shape(64, 2048, 1024, "bfloat16", 2), 8
QWEN3 = Shape(128, 2048, 768, "bfloat16", 2), 8
DEEPSEEK = Shape(256, 7168, 2048, "bfloat16", 2), 8
ROWS = [
    (MIXTRAL, 4096, 8, (23.4, 2442, 164, 1221, 23.4), 3873, 3663),
    (MIXTRAL, 64, 8, (0.4, 439, 2.6, 220, 0.4), 662, 656),
    (OLMOE, 4096, 64, (35.2, 349, 47, 174, 35.2), 640, 523),
    (OLMOE, 64, 64, (0.5, 126, 0.7, 63, 0.5), 191, 187),
    (QWEN3, 4096, 128, (35.2, 262, 35, 137, 35.2), 504, 392),
    (QWEN3, 64, 126, (0.5, 185, 0.5, 93, 0.5), 280, 277),
    (DEEPSEEK, 4096, 256, (123, 3668, 94, 1888, 123), 5896, 5271),
    (DEEPSEEK, 64, 222, (1.9, 3040, 1.5, 1521, 1.9), 4567, 4557),
]


@pytest.mark.parametrize(("layer", "tokens", "touched", "each", "unfused", "whole"), ROWS)
def test_published_layers(
    layer: tuple[Shape, int],
    tokens: int,
    touched: int,
    each: tuple[float, ...],
    unfused: float,
    whole: float,
) -> None:
    shape, top_k = layer
    found = {
        n: w.floor_ns(H200) / 1e3 for n, w in stages(tokens, tokens * top_k, touched, shape).items()
    }
    assert list(found) == ["plan", "permute", "gate_up", "act", "down", "combine"]
    assert found["plan"] < 1
    for us, expected in zip(list(found.values())[1:], each, strict=True):
        assert us == pytest.approx(expected, rel=0.01, abs=0.05)
    assert sum(found.values()) - found["plan"] == pytest.approx(unfused, rel=0.005)
    least = fused(tokens, tokens * top_k, touched, shape).floor_ns(H200) / 1e3
    assert least == pytest.approx(whole, rel=0.005)


def test_a_floor_is_the_slower_of_the_two() -> None:
    ceiling = Ceiling(bytes_per_s=2e9, flop_per_s=1e9)
    assert Work(flop=3, bytes=2).floor_ns(ceiling) == 3
    assert Work(flop=3, bytes=8).floor_ns(ceiling) == 4


def test_nothing_runs() -> None:
    shape = OLMOE[0]
    assert fused(0, 0, 0, shape) == Work(0, 0)
    assert fused(3, 0, 0, shape).bytes == 2 * 3 * 2048 * 2
    assert set(stages(0, 0, 0, shape).values()) == {Work(0, 0)}


def test_a_product_that_gathers_and_gates_has_their_work_and_no_rows_between() -> None:
    shape, tokens, rows, touched = OLMOE[0], 64, 512, 60
    whole, apart = (stages(tokens, rows, touched, shape, gathers=g) for g in (True, False))
    assert list(whole) == list(apart)
    assert whole["permute"] == whole["act"] == Work(0, 0)
    assert whole["gate_up"].flop == apart["gate_up"].flop
    wide, inner, weights = 2048 * 2, 1024 * 2, 60 * 2 * 2048 * 1024 * 2
    assert whole["gate_up"].bytes == tokens * wide + 4 * rows + weights + rows * inner
    for name in ("plan", "down", "combine"):
        assert whole[name] == apart[name]


def test_padding_fills_whole_tiles() -> None:
    assert padded_rows([0, 1, 128, 129], 128) == 127 + 127
    assert padded_rows([512] * 64, 128) == 0
    assert padded_rows([]) == 0
