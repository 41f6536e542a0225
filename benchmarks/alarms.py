"""How often alarms are false, and how large a fault they find.

False: 1,000 windows of uniform routing (4 layers of 64 experts, top-8, 32 forwards of 256 tokens,
capacity factor 1.25); an alarm of any layer fires in at most 1 % of them. Then traffic that is not
independent but stays as it is: 64 sticky topics, in sequences of 64 tokens; and decoding, read from
written traces. Found: planted faults of stated sizes, beside sizes that are below the bounds.

A growing z-loss and a collapsing entropy are planted in the recorded means (times a ramp), all
other faults in the routing.

    python benchmarks/alarms.py [--quick]
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from _common import Report, is_quick, progress, scratch, table

from moe_lens.metrics.alarms import ALARMS, check
from moe_lens.metrics.capacity import overflow
from moe_lens.metrics.chance import draws_of_forwards, of_draws
from moe_lens.metrics.watched import Watched
from moe_lens.queries.check import check as check_trace
from moe_lens.queries.session import open_trace
from moe_lens.trace.events import Forward
from moe_lens.trace.synthetic import Dead, Drift, Hot, Spec, events, generate

BASE = Spec(
    layers=4, experts=64, top_k=8, steps=32, sequences=4, length=64, capacity_factor=1.25,
    rows=False,
)  # fmt: skip
STATIONARY: dict[str, dict[str, Any]] = {
    "uniform": {},
    "sticky topics": {"topics": 64, "topic_strength": 1.0, "stay": 0.9},
    "one topic a sequence": {"topics": 64, "topic_strength": 1.0, "stay": 1.0},
    "Zipf 0.3 and topics": {"topics": 64, "topic_strength": 0.5, "popularity": "zipf", "skew": 0.3},
}
"""What does not change."""
TRUE = {"one topic a sequence": {"drops"}, "Zipf 0.3 and topics": {"imbalance", "drops"}}
"""Alarms that are true there: forwards of four topics overflow, popular experts are popular."""

Plant = Callable[[Watched], Watched]


def ramp(name: str, factor: float) -> Plant:
    """Multiply a recorded mean by 1 in the first block, by `factor` in the last."""

    def plant(x: Watched) -> Watched:
        series = getattr(x, name)
        return replace(x, **{name: series * np.linspace(1, factor, len(series))})

    return plant


FAULTS: list[tuple[str, str, dict[str, Any], Plant | None, float | None]] = [
    ("hot: 60 % of tokens", "hot", {"planted": (Hot(0, 0.6),)}, None, 0.99),
    ("hot: 52 % of tokens", "hot", {"planted": (Hot(0, 0.52),)}, None, None),
    ("hot: 45 % of tokens (below)", "hot", {"planted": (Hot(0, 0.45),)}, None, None),
    ("3 times the mean load", "imbalance", {"planted": (Hot(0, 0.375),)}, None, 0.99),
    ("1.8 times the mean load (below)", "imbalance", {"planted": (Hot(0, 0.225),)}, None, None),
    ("one dead expert", "dead", {"planted": (Dead(0),)}, None, 0.99),
    ("one dead expert, sticky topics", "dead",
     {"planted": (Dead(0),), **STATIONARY["sticky topics"]}, None, 0.99),
    ("Zipf 0.5 dealt anew, half way", "drift",
     {"popularity": "zipf", "skew": 0.5, "drift": Drift((16,))}, None, 0.99),
    ("the same, sticky topics", "drift",
     {"popularity": "zipf", "skew": 0.5, "drift": Drift((16,)), **STATIONARY["sticky topics"]},
     None, 0.9),
    ("Zipf 0.5 dealt anew, at 5 of 6", "drift",
     {"popularity": "zipf", "skew": 0.5, "drift": Drift((27,))}, None, 0.9),
    ("Zipf 0.5 dealt anew, in a line", "drift",
     {"popularity": "zipf", "skew": 0.5, "drift": Drift((1, 31), linear=True)}, None, None),
    ("Zipf 0.25 dealt anew, half way", "drift",
     {"popularity": "zipf", "skew": 0.25, "drift": Drift((16,))}, None, None),
    ("Zipf 0.15 dealt anew (below)", "drift",
     {"popularity": "zipf", "skew": 0.15, "drift": Drift((16,))}, None, None),
    ("z-loss grows to 3 times", "z_loss", {}, ramp("z_loss_C", 3.0), 0.99),
    ("z-loss grows to 1.8 times (below)", "z_loss", {}, ramp("z_loss_C", 1.8), None),
    ("entropy falls to 0.3", "entropy", {}, ramp("entropy_C", 0.3), 0.99),
    ("entropy falls to 0.6 (below)", "entropy", {}, ramp("entropy_C", 0.6), None),
    ("Zipf 1 at capacity 1.25", "drops", {"popularity": "zipf", "skew": 1.0}, None, 0.99),
]  # fmt: skip


def watched(spec: Spec) -> list[Watched]:
    """A window as `moe-lens check` would read it from the trace, a block a forward."""
    forwards = [e for e in events(spec) if isinstance(e, Forward)]
    tokens_C = np.array([f.tokens_G.sum() for f in forwards])
    out = []
    for layer in range(spec.layers):
        seen = [f.layers[layer] for f in forwards]
        counts_CE = np.array([x.routed_GE.sum(0) for x in seen])
        capacity_C = np.array([x.capacity for x in seen])
        draws_RCE = draws_of_forwards(tokens_C, counts_CE.sum(1), spec.experts)
        sums = {
            n: np.array([getattr(x, f"{n}_sum_G").sum() for x in seen])
            for n in ("zloss", "entropy")
        }
        out.append(
            Watched(
                layer=layer,
                top_k=spec.top_k,
                counts_CE=counts_CE,
                z_loss_C=sums["zloss"] / tokens_C,
                entropy_C=sums["entropy"] / tokens_C,
                dropped=float(overflow(counts_CE, capacity_C)),
                dropped_by_chance=of_draws(overflow(draws_RCE, capacity_C)),
            )
        )
    return out


def fired(layers: list[Watched]) -> set[str]:
    return {v.alarm for v in check(layers) if v.fired}


def false_alarms(report: Report, uniform: int, others: int) -> None:
    """Windows of traffic that stays as it is in which an alarm fires."""
    rows = []
    for name, how in STATIONARY.items():
        progress(f"{name} …")
        counted: Counter[str] = Counter()
        effects, wrong = [], 0
        windows = others if how else uniform
        for seed in range(windows):
            layers = watched(replace(BASE, seed=seed, **how))
            found = fired(layers) - TRUE.get(name, set())
            counted.update(found)
            wrong += bool(found)
            effects.append(np.mean([x.design_effect for x in layers]))
        report.numbers[f"false alarms, {name}"] = {
            "windows": windows, "fired": wrong, "by alarm": dict(counted),
            "design effect": float(np.mean(effects)),
        }  # fmt: skip
        rows.append([name, f"{wrong} of {windows}", f"{np.mean(effects):.2f}",
                     ", ".join(f"{a} {n}" for a, n in counted.items()) or "none"])  # fmt: skip
        report.gate(f"false alarms, {name}", wrong / windows, at_most=0.01)
    table(["nothing changes", "windows with an alarm", "design effect", "which"], rows)


def decoding(report: Report, windows: int) -> None:
    """The same of written traces of decoding, with one topic a sequence."""
    progress("decoding …")
    wrong: Counter[str] = Counter()
    how = STATIONARY["one topic a sequence"] | {"phases": ("serve",), "capacity_factor": None}
    with scratch() as folder:
        for seed in range(windows):
            generate(folder / str(seed), replace(BASE, seed=seed, layers=2, **how))
            with open_trace(folder / str(seed)) as trace:
                (found,) = check_trace(trace, phase="decode")
            wrong.update(v.alarm for v in found.verdicts if v.fired)
    report.numbers["false alarms, decoding"] = {"windows": windows, "by alarm": dict(wrong)}
    print(f"\ndecoding, {windows} traces: {dict(wrong) or 'no alarm'}")


def power(report: Report, windows: int) -> None:
    """Windows with a planted fault in which its alarm fires."""
    rows = []
    for name, alarm, how, plant, at_least in FAULTS:
        progress(f"{name} …")
        found = 0
        for seed in range(windows):
            layers = watched(replace(BASE, seed=10_000 + seed, **how))
            found += alarm in fired([plant(x) for x in layers] if plant else layers)
        report.numbers[f"found, {name}"] = {"alarm": alarm, "windows": windows, "fired": found}
        rows.append([name, alarm, f"{found} of {windows}"])
        if at_least is not None:
            report.gate(f"found: {name}", found / windows, at_least=at_least)
    print()
    table(["planted", "alarm", "fired"], rows)


def main() -> int:
    quick = is_quick(__doc__)
    setup = {"layers": BASE.layers, "experts": BASE.experts, "top_k": BASE.top_k,
             "forwards": BASE.steps, "tokens": BASE.sequences * BASE.length,
             "seeds": "0 and up; of faults 10,000 and up", "alarms": list(ALARMS)}  # fmt: skip
    report = Report("alarms", setup, ("duckdb",))
    false_alarms(report, *((40, 10) if quick else (1000, 300)))
    decoding(report, 5 if quick else 40)
    power(report, 5 if quick else 50)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
