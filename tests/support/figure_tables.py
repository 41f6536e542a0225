"""Answers of every question that has a figure, made by hand: any size, any tags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

TAGS = ("code", "prose")
STEPS = (0, 10, 20)


def answers(
    layers: int = 3, experts: int = 4, tags: tuple[str, ...] = TAGS
) -> dict[str, pd.DataFrame]:
    """A data frame a question, with the columns that the question has."""
    rng = np.random.default_rng(7)
    made: dict[str, list[dict[str, Any]]] = {}

    def add(question: str, **row: Any) -> None:
        made.setdefault(question, []).append({"run": "run1", **row})

    for size in range(min(2, experts), experts + 1):
        rate = size / experts
        policies = {"lru": 0.4, "lfu": 0.6, "static": 0.8, "static_hindsight": 0.5, "optimum": 0.3}
        add(
            "hit_rates", size=size, **{p: rate**power for p, power in policies.items()}, chance=rate
        )
    for size in range(1, experts + 1):
        add(
            "recall",
            size=size,
            popularity=(size / experts) ** 0.8,
            prefix=(size / experts) ** 0.6,
            last_layer=(size / experts) ** 0.4,
            chance=size / experts,
        )
    for place in (16, 32, 64):
        add(
            "beginnings",
            tokens=place,
            size=max(1, experts // 2),
            prefix=0.5 + place / 200,
            popularity=0.4 + place / 400,
            oracle=0.9,
            chance=0.5,
        )
    for bucket in (1, 2, 3, 4):
        for name, share in (("int8", 0.05), ("int4", 0.5)):
            add("flips", format=name, part="router", bucket=bucket, flipped=share / bucket**2)
    for tau in (1, 2, 4, 7):
        add(
            "growth",
            tokens=tau,
            sequences=9 - tau,
            touched=1.0 + tau / 10,
            low=1,
            high=2,
            chance=1.2 + tau / 10,
        )
    for i, tag in enumerate(("all tags", *tags)):
        add(
            "groups",
            tag=tag,
            sequences=20 + i,
            batch=8,
            grouped=3.0 + i / 10,
            mixed=3.5,
            ratio=(3.0 + i / 10) / 3.5,
            ratio_se=0.01,
            chance=3.9,
            null_low=None if i else 0.98,
            null_high=None if i else 1.02,
        )
    for rank in range(experts):
        for forward in range(3):
            add(
                "rank_load",
                placement="eplb",
                layer=0,
                forward=forward,
                step=10 * forward,
                rank=rank,
                load=0.5 + rank + forward / 4,
            )
        for other in range(experts):
            add(
                "rank_traffic",
                placement="eplb",
                source=rank,
                destination=other,
                rows=100.0 + rank - other,
            )
    for step in STEPS:
        for name in ("contiguous", "eplb"):
            add("rank_slowest", placement=name, step=step, slowest=1.5 + step / 100)
    for window in (1, 2, 3):
        add("placement_gains", window=window, gain=window / 10, least=0.15)
    for layer in range(layers):
        add(
            "replay_layers",
            result="drop",
            phase="train",
            layer=layer,
            forwards=5,
            p50_ms=2.0 + layer,
            balanced_ms=1.5 + layer,
            same_touched_ms=1.4 + layer,
            floor_ms=0.25,
            over_balanced=1.3 - 0.1 * layer,
            noise=0.05,
        )
        for e in range(experts if layer == 0 else 0):
            add(
                "expert_importance",
                layer=layer,
                expert=e,
                load=(e + 1) / (10 * experts),
                fair=0.25,
                knock_out=0.01 * e - 0.005,
                knock_out_error=0.002,
                knock_out_used=0.1 * e,
                force_in=-0.01,
                dormant=e in (0, 2),
                dormant_but_causal=e == 2,
            )
        add("route_changes", layer=layer, intervention="runner_up", number=0, own=2, cost=0.1)
        for k in (1, 2, 3, 4):
            add(
                "route_changes",
                layer=layer,
                intervention="top_k",
                number=k,
                own=2,
                cost=(k - 2) ** 2 / 10 - 0.01 * layer,
                cost_error=0.004,
            )
        add(
            "sets_by_layer",
            layer=layer,
            tokens=500,
            used=100 - layer,
            at_least=120.5,
            chance=110.25,
            possible=2.0 ** min(10 * experts, 1000),
        )
        for i, tag in enumerate(tags):
            if layer == 0:
                add(
                    "route_regret",
                    layer=-1,
                    slice=tag,
                    tokens=50 + i,
                    regret=0.1 + i,
                    regret_error=0.02,
                    random_regret=0.2,
                    mean_route=-0.05,
                )
            for e in range(experts if layer == 0 else 0):
                made_by = 200 + 10 * i + e
                add(
                    "tag_load",
                    layer=layer,
                    tag=tag,
                    expert=e,
                    tokens=500,
                    routed=made_by,
                    share=made_by / 500,
                    overall_share=0.4,
                    lift=made_by / 200,
                )
            for other in tags if layer == 0 else ():
                add("divergences", tag=tag, other=other, divergence=0.0 if tag == other else 0.1)
        for octave in range(4):
            add(
                "by_distance",
                layer=layer,
                first=2**octave // 2,
                last=2**octave - 1,
                tokens=10 * (octave + 1),
                set_changed=0.5 - 0.1 * octave + 0.01 * layer,
            )
        for name, kept in (("int8", 0.99), ("int4", 0.9)):
            for mode in ("alone", "forced", "free"):
                for part in ("router", "both"):
                    add(
                        "agreement",
                        format=name,
                        part=part,
                        mode=mode,
                        layer=layer,
                        agreement=kept ** (layer + 1 if mode == "free" else 1),
                    )
        add("beside_chance", layer=layer, value=0.1 * layer, chance=0.1, low=0.05, high=0.15)
        routed = rng.integers(1, 1000, experts)
        if experts > 2:
            routed[1] = 0
        for e in range(experts):
            share = routed[e] / routed.sum()
            add(
                "load_map",
                layer=layer,
                expert=e,
                routed=int(routed[e]),
                share=share,
                ratio=share * experts,
            )
            add("request_load", layer=layer, expert=e, chosen=int(routed[e]) % 7 + (e == 0))
        for step in STEPS:
            add(
                "load_over_time",
                step=step,
                layer=layer,
                assignments=100 + step,
                max_over_mean=1 + rng.random(),
                overflow_rate=0.2 + 0.01 * layer,
                dropped_rate=0.1 + 0.01 * layer,
            )
            for tag in tags:
                add(
                    "router_over_time",
                    step=step,
                    layer=layer,
                    tag=tag,
                    tokens=50 + layer,
                    entropy=rng.random(),
                    entropy_norm=rng.random(),
                    margin=rng.random(),
                    top1_prob=rng.random(),
                    zloss=9 * rng.random(),
                )
            add(
                "all_to_all",
                step=step,
                layer=layer,
                forwards=3,
                dispatch_ms=1.5 + layer,
                combine_ms=None,
            )
        for i, tag in enumerate(tags):
            add(
                "dropped_tokens",
                layer=layer,
                tag=tag,
                tokens=100,
                routed=200,
                processed=170 - layer,
                overflowed=30 + layer,
                dropped=20 + layer + i,
                rerouted_in=10 - i,
                unserved_tokens=5,
                overflow_rate=(30 + layer) / 200,
                dropped_rate=(20 + layer + i) / 200,
                unserved_rate=0.05,
            )
            add(
                "router_confidence",
                layer=layer,
                tag=tag,
                tokens=100 + i,
                nonfinite_tokens=0,
                entropy=rng.random(),
                entropy_norm=rng.random(),
                margin=rng.random(),
                top1_prob=rng.random(),
                zloss=rng.random(),
            )
        for factor in (0.5, 1.0, 2.0):
            add(
                "capacity_sweep",
                layer=layer,
                capacity_factor=factor,
                dropped_share=0.4 / factor**6 + 0.001 * layer,
                choices=100 * (layer + 1),
                source="counts",
                covered=1.0,
            )
        for position in (0, 16):
            add(
                "unserved_by_position",
                layer=layer,
                position=position,
                tokens=40,
                unserved=4,
                unserved_rate=0.1,
                dropped=20,
                dropped_rate=0.25 + position / 100,
            )
        for low, high, n in ((0.0, 10**-7.5, 1), (10**-3.5, 1e-3, 3), (1e-1, None, 4)):
            add("near_ties", layer=layer, low=low, high=high, tokens=n, share=n / 8)
        add(
            "repetition",
            layer=layer,
            pairs=10 * (layer + 1),
            repeated_share=0.4 + 0.01 * layer,
            chance=0.25,
            lift=1.6 + 0.04 * layer,
        )
    for step in STEPS:
        add(
            "expert_over_time",
            step=step,
            routed=100 + step,
            share=0.3,
            ratio=1.2 + step / 100,
            overflowed=20,
            dropped=10,
        )
        for phase in ("train", "eval"):
            add(
                "forwards_over_time",
                step=step,
                phase=phase,
                forwards=2,
                tokens=512,
                host_ms=20.0 + step,
                tokens_per_second=1e4 + step,
                lost_rows=0,
                breaches=0,
            )
    for i, tag in enumerate(tags):
        add(
            "expert_tags",
            tag=tag,
            routed=30 + i,
            share=(30 + i) / 61,
            overall_share=0.5,
            lift=(30 + i) / 30.5,
        )
        for place in (1, 2):
            add(
                "hottest_experts",
                tag=tag,
                place=place,
                layer=place % layers,
                expert=i % experts,
                routed=300 + i,
                share=0.3,
                overall_share=0.1,
                lift=3.0 + i - place,
            )
        for phase in ("train", "eval"):
            add(
                "loss_by_tag",
                phase=phase,
                tag=tag,
                tokens=100,
                sequences=4,
                loss_tokens=90,
                loss=2.0 + i,
            )
        add(
            "quality_by_tag",
            tag=tag,
            tokens=100,
            loss_tokens=90,
            loss=2.0 + i,
            dropped_rate=0.1 + i,
            unserved_rate=0.01,
            entropy_norm=0.8,
        )
        for dropped in (False, True):
            add(
                "quality_of_dropped",
                tag=tag,
                dropped=dropped,
                tokens=10 + 30 * i,
                loss=2.0 + dropped * (1 + i),
                loss_se=0.1,
            )
    for position in (0, 16, 32):
        add(
            "expert_serves",
            kind="position",
            value=position,
            tokens=16,
            chosen=4 + position // 16,
            share=(4 + position // 16) / 16,
        )
    add("expert_serves", kind="token id", value=9, tokens=20, chosen=15, share=0.75)
    for a in range(experts):
        add(
            "expert_companions",
            companion=a,
            together=50 - a,
            share=(50 - a) / 100,
            expected=25.0,
            lift=(50 - a) / 25,
        )
        for b in range(experts):
            add(
                "layer_transitions",
                expert=a,
                next_expert=b,
                tokens=a + b + 1,
                share=(a + b + 1) / sum(a + c + 1 for c in range(experts)),
            )
            if a != b:
                n = 0 if {a, b} == {0, 1} else 20 + min(a, b)
                add(
                    "co_activation",
                    expert=a,
                    other=b,
                    together=n,
                    share=n / 100,
                    expected=20.0,
                    lift=n / 20,
                )
    for top_k in range(1, experts + 1):  # students of the granularity laboratory
        of = {"teacher": f"{2 * experts}e{experts}a", "teacher_top_k": experts, "top_k": top_k}
        error = 0.4 * (1 - top_k / (experts + 1))
        add("gap", **of, nmse=error, affine_nmse=0.36, published=0.9 * error)
    for swept, gain in (("width", 0.9), ("experts", 0.8)):
        for power in range(layers + 1):
            add("sweeps", swept=swept, top_k=2, factor=2**power, nmse=0.3 * gain**power,
                affine_nmse=0.36, published=0.25)  # fmt: skip
    for place in range(experts * layers):
        x, y = place % experts, place // experts
        add("pictures", picture=tags[0], x=x - 1.5, y=y - 0.5, region=min(x, y),
            chosen=f"{min(x, y)} {min(x, y) + 1}")  # fmt: skip
    for power in range(1, layers + 1):
        add("realised", hidden=2**power, experts=16, top_k=8, tokens=1_000, used=20 * power,
            possible=12_870)  # fmt: skip
    return {question: pd.DataFrame(rows) for question, rows in made.items()}  # fmt: skip


PLACED = {"rank_load", "rank_slowest", "rank_traffic", "placement_gains"}
COMPUTED = {
    "agreement",
    "flips",
    "sets_by_layer",
    "beside_chance",
    "divergences",
    "hit_rates",
    "recall",
    "beginnings",
    "by_distance",
    "growth",
    "groups",
    "gap",
    "sweeps",
    "pictures",
    "realised",
    *PLACED,
}
"""Tables of `moe_lens.metrics` and of placements, not answers of stored questions."""

FIGURES = {
    "beside_chance": "beside_chance",
    "tag_divergence": "divergences",
    "tag_lift": "tag_load",
    "hit_rates": "hit_rates",
    "prefetch": "recall",
    "prefix_recall": "beginnings",
    "order_change": "by_distance",
    "working_set": "growth",
    "grouping": "groups",
    "rank_load": "rank_load",
    "rank_slowest": "rank_slowest",
    "rank_traffic": "rank_traffic",
    "placement_gains": "placement_gains",
    "replay_layers": "replay_layers",
    "agreement_by_layer": "agreement",
    "flips_by_margin": "flips",
    "knock_out_by_load": "expert_importance",
    "regret_by_slice": "route_regret",
    "top_k_sweep": "route_changes",
    "sets_by_layer": "sets_by_layer",
    "granularity_gap": "gap",
    "granularity_sweeps": "sweeps",
    "input_regions": "pictures",
    "realised_sets": "realised",
    "all_to_all": "all_to_all",
    "capacity_curve": "capacity_sweep",
    "co_activation": "co_activation",
    "drops_by_layer": "dropped_tokens",
    "drops_by_tag": "dropped_tokens",
    "drops_over_time": "load_over_time",
    "entropy_by_layer": "router_confidence",
    "expert_companions": "expert_companions",
    "expert_over_time": "expert_over_time",
    "expert_positions": "expert_serves",
    "expert_tags": "expert_tags",
    "forwards_over_time": "forwards_over_time",
    "hottest": "hottest_experts",
    "load_heatmap": "load_map",
    "load_over_time": "load_over_time",
    "loss_by_tag": "loss_by_tag",
    "near_ties": "near_ties",
    "quality_by_tag": "quality_by_tag",
    "quality_of_dropped": "quality_of_dropped",
    "repetition": "repetition",
    "request_load": "request_load",
    "router_over_time": "router_over_time",
    "transitions": "layer_transitions",
    "unserved_by_position": "unserved_by_position",
}
"""Figure to the question whose answer it takes."""
