"""Alarms: what sets each of them off, what does not, and what cannot be judged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_lens.metrics import alarms, levels
from moe_lens.metrics.alarms import ALARMS, check
from moe_lens.metrics.balance import max_vio
from moe_lens.metrics.chance import Chance, uniform_counts
from moe_lens.metrics.watched import Fired, Watched

E, K, T, C = 16, 2, 400, 24


def quiet(seed: int = 0, layer: int = 0, blocks: int = C, **changes: Any) -> Watched:
    """A layer in which nothing is wrong."""
    rng = np.random.default_rng([seed, layer])
    made = Watched(
        layer=layer,
        top_k=K,
        counts_CE=uniform_counts(np.full(blocks, T), K * T, E, rng),
        z_loss_C=8 + 0.1 * rng.normal(size=blocks),
        entropy_C=2 + 0.05 * rng.normal(size=blocks),
        dropped=0.01,
        dropped_by_chance=Chance(0.01, 0.005, 0.015),
    )
    return replace(made, **changes)


def with_share(share: float, expert: int = 3) -> Watched:
    """One expert is chosen by this share of tokens, the others by as many as are left."""
    counts_CE = np.full((C, E), round((K - share) * T / (E - 1)))
    counts_CE[:, expert] = round(share * T)
    return quiet(counts_CE=counts_CE)


def fired(*layers: Watched) -> dict[str, tuple[Fired, ...]]:
    return {v.alarm: v.fired for v in check(layers) if v.fired}


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"), [(64, 8, 83), (128, 8, 183), (256, 8, 393)]
)
def test_tokens_that_a_dead_expert_takes(experts: int, top_k: int, tokens: int) -> None:
    assert levels.tokens_for_dead(experts, top_k, 1e-3) == tokens
    missed = experts * (1 - top_k / experts) ** tokens
    assert missed <= 1e-3 < missed / (1 - top_k / experts)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "golden"),
    [(8, 2, 2048, 0.055), (64, 8, 2048, 0.135), (64, 8, 16384, 0.049), (128, 8, 4096, 0.165),
     (256, 8, 4096, 0.257), (256, 8, 65536, 0.059)],
)  # fmt: skip
def test_noise_floors(experts: int, top_k: int, tokens: int, golden: float) -> None:
    rng = np.random.default_rng(0)
    draws = uniform_counts(np.full(20, tokens), tokens * top_k, experts, rng)
    seen = max_vio(draws)
    assert abs(seen.mean() - golden) < 3 * seen.std(ddof=1) / math.sqrt(20) + 0.0005
    layer = Watched(
        layer=0, top_k=top_k, counts_CE=np.full((2, experts), tokens * top_k // experts // 2)
    )
    assert golden < levels.noise_floor(layer) < 1.6 * golden  # the formula is from above


@pytest.mark.parametrize("tokens", [5, 40, 300])
@pytest.mark.parametrize("chance", [0.03, 0.25, 0.5])
def test_the_bound_is_above_the_tail(tokens: int, chance: float) -> None:
    at = [
        math.comb(tokens, n) * chance**n * (1 - chance) ** (tokens - n) for n in range(tokens + 1)
    ]
    assert levels.beyond_uniform(0, chance, tokens) == pytest.approx(at[0])
    assert levels.beyond_uniform(1, chance, tokens) == pytest.approx(at[-1])
    for n in range(tokens + 1):
        tail = sum(at[n:]) if n >= chance * tokens else sum(at[: n + 1])
        assert levels.beyond_uniform(n / tokens, chance, tokens) >= tail * (1 - 1e-9)
    assert levels.beyond_uniform(chance, chance, tokens) == 1
    assert levels.beyond_uniform(0.5, 1.0, tokens) == 0


def test_nothing_fires_where_nothing_is_wrong() -> None:
    # At most 1 % of windows may: 3 of 20 would be a chance of 0.1 %.
    assert sum(bool(fired(quiet(s, 0), quiet(s, 1), quiet(s, 2))) for s in range(20)) < 3


def test_a_dead_expert() -> None:
    layer = quiet()
    layer.counts_CE[:, 5] = 0
    (found,) = fired(quiet(layer=1), layer)["dead"]
    assert (found.layer, found.expert, found.value) == (0, 5, 0)
    assert "expert 5" in found.message
    few = quiet(counts_CE=layer.counts_CE[:2] // 20)  # 40 tokens: any expert may be missed
    assert "dead" not in fired(few)


@pytest.mark.parametrize(
    ("share", "names"),
    [(0.2, set()), (0.3, {"imbalance"}), (0.49, {"imbalance"}), (0.55, {"imbalance", "hot"})],
)
def test_a_hot_expert(share: float, names: set[str]) -> None:
    found = fired(with_share(share), quiet(layer=1))
    assert set(found) == names
    for name in names:
        (one,) = found[name]
        assert (one.layer, one.expert) == (0, 3)
        assert one.value > one.threshold
    if "hot" in names:
        assert found["hot"][0].value == pytest.approx(share, abs=0.01)


def test_no_expert_is_hot_where_half_is_its_part() -> None:
    counts_CE = np.tile([T, T, 0, 0], (C, 1))  # k = 2 of 4: two do everything
    found = fired(quiet(counts_CE=counts_CE))
    assert "hot" not in found
    assert {f.expert for f in found["dead"]} == {2, 3}


def test_more_layers_take_more_tokens() -> None:
    """Each layer has its part of the false alarms."""
    counts_CE = np.full((2, E), 9)  # 67 tokens in both blocks together, more alike than chance
    counts_CE[:, 5] = 0
    layers = [quiet(layer=n, counts_CE=counts_CE) for n in range(60)]
    tokens = layers[0].effective_tokens
    level = alarms.FALSE_ALARMS / len(ALARMS)
    assert levels.tokens_for_dead(E, K, level) == 70
    assert tokens == 135
    assert levels.tokens_for_dead(E, K, level / 60) <= tokens
    few = [replace(x, counts_CE=x.counts_CE * 5 // 9) for x in layers]  # 75 tokens
    assert "dead" in fired(*few[:1])
    assert "dead" not in fired(*few)


def test_correlated_tokens_count_as_fewer() -> None:
    """One document of 400 like tokens a block: 24 independent ones, too few to call any dead."""
    rng = np.random.default_rng(1)
    one_each = uniform_counts(np.full(C, 1), K, E, rng)
    one_each[:, 7] = 0
    layer = quiet(counts_CE=one_each * T)
    assert layer.effective_tokens < 40
    assert "dead" not in fired(layer)
    independent = uniform_counts(np.full(C, T), K * T, E, rng) * (np.arange(E) != 7)
    assert "dead" in fired(quiet(counts_CE=independent))


def test_drift() -> None:
    layer = quiet()
    layer.counts_CE[14:, 0] += 200  # of 800 choices in a block
    (found,) = fired(layer, quiet(layer=1))["drift"]
    assert found.layer == 0
    assert "from block 14 on" in found.message
    assert "expert 0 moved most" in found.message
    small = quiet()
    small.counts_CE[14:, 0] += 30  # beyond chance, and too small to matter
    assert "drift" not in fired(small)
    named = replace(layer, steps_C=tuple(f"step {10 * c}" for c in range(C)))
    assert "from step 140 on" in fired(named)["drift"][0].message


@pytest.mark.parametrize(("factor", "fires"), [(1.8, False), (2.5, True)])
def test_growing_z_loss(factor: float, fires: bool) -> None:
    z_loss_C = 8 * np.linspace(1, factor, C) * np.random.default_rng(0).uniform(0.98, 1.02, C)
    assert ("z_loss" in fired(quiet(z_loss_C=z_loss_C))) == fires
    assert "z_loss" not in fired(quiet(z_loss_C=z_loss_C[::-1]))  # it fell


@pytest.mark.parametrize(("factor", "fires"), [(0.6, False), (0.35, True)])
def test_collapsing_entropy(factor: float, fires: bool) -> None:
    noise_C = np.random.default_rng(0).uniform(0.98, 1.02, C)
    entropy_C = 2 * noise_C * np.where(np.arange(C) < 10, 1, factor)
    assert ("entropy" in fired(quiet(entropy_C=entropy_C))) == fires
    assert "entropy" not in fired(quiet(entropy_C=entropy_C[::-1]))  # it rose


def test_drops() -> None:
    assert "drops" in fired(quiet(dropped=0.07))
    assert "drops" not in fired(quiet(dropped=0.05))
    noisy = Chance(0.01, 0.0, 0.2)  # forwards of few tokens lose as much by bad luck
    assert "drops" not in fired(quiet(dropped=0.07, dropped_by_chance=noisy))


def test_against_another_run() -> None:
    before = quiet(1)
    assert not fired(quiet(2, against=before))
    changed = quiet(2, against=before)
    changed.counts_CE[:, 0] += 300
    noise_C = np.random.default_rng(0).uniform(0.98, 1.02, C)
    changed = replace(changed, z_loss_C=24 * noise_C, entropy_C=0.6 * noise_C)
    found = fired(changed)
    assert set(found) >= {"drift", "z_loss", "entropy"}
    assert all("against the other run" in found[n][0].message for n in ("drift", "z_loss"))
    assert found["z_loss"][0].value == pytest.approx(3, rel=0.02)
    verdicts = {v.alarm: v for v in check([quiet(2, against=quiet(1, blocks=7))])}
    assert verdicts["drift"].lacks == {"fewer than 8 blocks of steps of either run": (0,)}


def test_what_cannot_be_judged_is_said() -> None:
    bare = quiet(z_loss_C=None, entropy_C=np.full(C, np.nan), dropped=None)
    verdicts = {v.alarm: v for v in check([bare, quiet(layer=1)])}
    assert verdicts["z_loss"].lacks == {"no z-loss": (0,)}
    assert verdicts["entropy"].lacks == {"no token entropy": (0,)}
    assert verdicts["drops"].lacks == {"no capacity: the layer is dropless": (0,)}
    assert all(v.judged == ((0, 1) if v.alarm in ("dead", "hot", "imbalance", "drift") else (1,))
               for v in verdicts.values())  # fmt: skip
    short = {v.alarm: v for v in check([quiet(blocks=15)])}
    assert list(short["drift"].lacks) == [
        "fewer than 16 blocks of steps: too few orders of them to call a change rare"
    ]
    one = {v.alarm: v for v in check([quiet(blocks=1)])}
    assert not one["dead"].judged
    chosen = {v.alarm: v for v in check([quiet(experts_choose=True)])}
    assert not any(chosen[name].judged for name in ("dead", "hot", "imbalance", "drift"))
    unknown = {v.alarm: v for v in check([quiet(dropped_by_chance=None)])}
    assert not unknown["drops"].judged
    assert [v.judged for v in check([])] == [()] * len(ALARMS)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (2, 1)])
def test_few_experts(experts: int, top_k: int) -> None:
    counts_CE = np.full((C, experts), T * top_k // experts)
    assert not fired(quiet(counts_CE=counts_CE, top_k=top_k))


def test_only_some() -> None:
    assert [v.alarm for v in check([quiet()], ["drift", "dead"])] == ["dead", "drift"]
    assert alarms.FALSE_ALARMS / len(ALARMS) > 1 / 1000  # else no order of blocks is rare enough
