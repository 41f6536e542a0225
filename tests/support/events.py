"""Forwards of a made-up model, token by token, and a naive count of them.

Everything starts from `Seen`: plain Python objects that say what each token did in each layer.
`event` turns that into the arrays that capture hands to the writer; `tally` counts the same objects
in dict loops, row by row of the format, and knows nothing of arrays or of the writer.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_lens.trace.events import Forward, LayerCounts, LayerRows, Losses, SequenceRow, TokenRows

Row = dict[str, Any]
Key = tuple[Any, ...]

START_NS = 1_790_000_000_000_000_000
TAGS = ("code", "prose", "maths")

ROW_KEYS: dict[str, tuple[str, ...]] = {
    "load": ("window", "layer", "tag", "expert"),
    "layers": ("window", "layer"),
    "routers": ("window", "layer", "tag"),
    "slices": ("window", "tag"),
    "steps": ("step", "forward"),
    "sequences": ("sequence",),
    "tokens": ("step", "forward", "stream", "token"),
    "routing": ("step", "forward", "layer", "token"),
    "outcomes": ("sequence", "position"),
    "logits": ("step", "forward", "layer", "token"),
}


@dataclass(frozen=True)
class Router:
    """A MoE layer of the made-up model."""

    layer: int
    experts: int
    top_k: int
    dynamic: bool = False
    """Tokens choose one to `top_k` experts."""
    capacity: int | None = None
    """What one expert takes in one capacity group; None: dropless."""
    grouped: bool = False
    """Each sequence is a capacity group of its own."""
    scores: bool = True
    """The router's distribution is known: probabilities, entropy, z-loss, logits."""
    margins: bool = True
    runners: int = 1
    logits: bool = False
    expert_groups: int | None = None
    """Equal groups of neighbouring experts."""


@dataclass
class Choice:
    """What one token did in one layer."""

    experts: list[int]
    weights: list[float]
    dropped: list[int] = field(default_factory=list)
    """Slots that found their expert full."""
    next_ids: list[int] | None = None
    next_weights: list[float] | None = None
    finite: bool = True
    probs: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    entropy: float = math.nan
    group_entropy: float = math.nan
    margin: float = math.nan


@dataclass(frozen=True)
class Token:
    tag: str
    sequence: int
    position: int
    padding: bool = False
    kept: bool = True
    """Its per-token rows are sampled."""


@dataclass
class Seen:
    """One forward: what each token did in each layer, and the losses given after it."""

    step: int
    forward: int
    phase: str
    tags: list[str]
    tokens: list[Token]
    layers: list[tuple[Router, list[Choice]]]
    losses: list[tuple[int, int, float]] | None = None
    """(sequence, position, loss)"""

    @property
    def valid(self) -> list[Token]:
        return [t for t in self.tokens if not t.padding]

    def tag_of(self, sequence: int) -> str:
        return next(t.tag for t in self.tokens if t.sequence == sequence)


def f32(x: float) -> float:
    return float(np.float32(x))


def _i32(x: Any) -> np.ndarray:
    return np.array(x, np.int32)


def seen(
    routers: list[Router],
    *,
    step: int = 0,
    forward: int = 0,
    phase: str = "eval",
    lengths: tuple[int, ...] = (4, 3),
    tags: tuple[str, ...] = TAGS[:2],
    first_sequence: int = 0,
    padding: float = 0.0,
    kept: float = 1.0,
    nonfinite: float = 0.0,
    losses: bool = False,
    seed: int = 0,
) -> Seen:
    """A forward with sequences of these lengths, routed at random with a skew."""
    rng = random.Random(seed)
    tokens: list[Token] = []
    for i, length in enumerate(lengths):
        keep = rng.random() < kept
        tag = rng.choice(tags)
        pads = sum(rng.random() < padding for _ in range(length))
        tokens += [
            Token(tag, first_sequence + i, p, padding=p >= length - pads, kept=keep)
            for p in range(length)
        ]
    layers = [(r, _choices(rng, r, tokens, nonfinite)) for r in routers]
    out = Seen(step, forward, phase, list(tags), tokens, layers)
    if losses:
        out.losses = [(t.sequence, t.position, f32(rng.uniform(0, 5))) for t in out.valid]
    return out


def _choices(rng: random.Random, r: Router, tokens: list[Token], nonfinite: float) -> list[Choice]:
    used: dict[tuple[int, int], int] = defaultdict(int)
    out = []
    for t in tokens:
        logits = [f32(rng.gauss(-0.2 * e, 1.0)) for e in range(r.experts)]
        total = math.fsum(map(math.exp, logits))
        probs = [math.exp(x) / total for x in logits]
        ranked = sorted(range(r.experts), key=lambda e: -logits[e])
        k = rng.randint(1, r.top_k) if r.dynamic else r.top_k
        c = Choice(ranked[:k], [f32(probs[e]) for e in ranked[:k]])
        c.finite = rng.random() >= nonfinite
        if r.scores and c.finite:
            c.probs, c.logits = probs, logits
            c.entropy = -math.fsum(p * math.log(p) for p in probs)
            if r.expert_groups is not None:
                of = r.experts // r.expert_groups
                sums = [math.fsum(probs[e : e + of]) for e in range(0, r.experts, of)]
                c.group_entropy = -math.fsum(p * math.log(p) for p in sums)
        if r.margins and c.finite and k < r.experts:
            c.margin = logits[ranked[k - 1]] - logits[ranked[k]]
        nexts = ranked[k : k + r.runners]
        if r.runners and len(nexts) == r.runners and rng.random() < 0.8:
            c.next_ids = nexts
            if rng.random() < 0.8:
                c.next_weights = [f32(probs[e]) for e in nexts]
        if r.capacity is not None:
            group = t.sequence if r.grouped else 0
            for slot, e in enumerate(c.experts):
                if used[group, e] >= r.capacity:
                    c.dropped.append(slot)
                else:
                    used[group, e] += 1
        out.append(c)
    return out


# ---- what capture hands over --------------------------------------------------------------------


def event(f: Seen, *, known: set[int] | None = None) -> Forward:
    """The forward as capture would hand it over; `known` are sequences that were seen before."""
    known = set() if known is None else known
    valid = f.valid
    at = {tag: g for g, tag in enumerate(f.tags)}
    kept = [i for i, t in enumerate(f.tokens) if t.kept]
    out = Forward(
        step=f.step,
        forward=f.forward,
        phase=f.phase,
        t_start_ns=START_NS + 1000 * f.step + f.forward,
        tags=list(f.tags),
        tokens_G=_by_tag(f, [t.tag for t in valid]),
        sequences_G=_by_tag(f, [f.tag_of(s) for s in dict.fromkeys(t.sequence for t in valid)]),
        padding_tokens=len(f.tokens) - len(valid),
        host_ns=1000 + f.step,
        device_ns=None if f.forward % 2 else 500,
        sampled=bool(kept),
        fires_expected=len(f.layers),
        fires_seen=len(f.layers),
    )
    out.layers = [_layer_event(f, r, choices, at, kept) for r, choices in f.layers]
    if kept:
        rows = [f.tokens[i] for i in kept]
        sequence_N = np.array([t.sequence for t in rows], np.int64)
        position_N = _i32([t.position for t in rows])
        padding_N = np.array([t.padding for t in rows], bool)
        tag_N = _i32([at[t.tag] for t in rows])
        main = TokenRows("main", _i32(kept), sequence_N, position_N, padding_N, tag_N)
        main.token_id_N = position_N + np.int32(1000) if f.step % 2 else None
        out.tokens = [main]
        for s in dict.fromkeys(t.sequence for t in rows):
            if s not in known:
                known.add(s)
                keys = {"prompt": f"p{s}"} if s % 2 else {}
                request = f"req-{s}" if s % 3 else None
                out.sequences.append(SequenceRow(s, f.tag_of(s), request, None, keys))
    return out


def losses_event(f: Seen) -> Losses:
    assert f.losses is not None
    sums = np.zeros(len(f.tags))
    for s, _, loss in f.losses:
        sums[f.tags.index(f.tag_of(s))] += loss
    given_G = _by_tag(f, [f.tag_of(s) for s, _, _ in f.losses])
    sequence_N = np.array([s for s, _, _ in f.losses], np.int64)
    loss_N = np.array([x for _, _, x in f.losses], np.float32)
    position_N = _i32([p for _, p, _ in f.losses])
    return Losses(f.step, f.forward, list(f.tags), sums, given_G, sequence_N, position_N, loss_N)


def _by_tag(f: Seen, tags: list[str]) -> np.ndarray:
    return np.array([tags.count(tag) for tag in f.tags], np.int64)


def _layer_event(
    f: Seen, r: Router, choices: list[Choice], at: dict[str, int], kept: list[int]
) -> LayerCounts:
    g, e = len(f.tags), r.experts

    def count(which: list[tuple[int, int]], values: list[float] | None = None) -> np.ndarray:
        whole = np.zeros((g, e), np.int64 if values is None else np.float64)
        if which:
            np.add.at(whole, tuple(np.array(which).T), 1 if values is None else np.array(values))
        return whole

    slots = [
        (at[t.tag], e, t.padding, slot in c.dropped, c.weights[slot])
        for t, c in zip(f.tokens, choices, strict=True)
        for slot, e in enumerate(c.experts)
    ]
    valid = [(t, c) for t, c in zip(f.tokens, choices, strict=True) if not t.padding]
    lost = count([(t, e) for t, e, pad, full, _ in slots if full and not pad])
    done = [(t, e, w) for t, e, pad, full, w in slots if not full and not pad]
    x = LayerCounts(
        layer=r.layer,
        tokens=len(valid),
        padding_tokens=len(f.tokens) - len(valid),
        tokens_G=_by_tag(f, [t.tag for t, _ in valid]),
        routed_GE=count([(t, e) for t, e, pad, _, _ in slots if not pad]),
        processed_GE=count([(t, e) for t, e, _ in done]),
        weight_sum_GE=count([(t, e) for t, e, _ in done], [w for _, _, w in done]),
        capacity=r.capacity,
        capacity_groups=len({t.sequence for t in f.tokens}) if r.grouped else 1,
        top_k=None if r.dynamic else r.top_k,
        choices=sum(len(c.experts) for c in choices) if r.dynamic else None,
        nonfinite_G=_by_tag(f, [t.tag for t, c in valid if not c.finite]),
    )
    if any(t.padding for t in f.tokens):
        x.padding_GE = count([(t, e) for t, e, pad, _, _ in slots if pad])
    if r.capacity is not None:
        x.overflowed_GE, x.dropped_GE = lost, lost.copy()
        x.unserved_G = _by_tag(f, [t.tag for t, c in valid if len(c.dropped) == len(c.experts)])
    finite = [(t, c) for t, c in valid if c.finite]
    if r.scores:
        x.prob_sum_GE = count(
            [(at[t.tag], e) for t, _ in finite for e in range(r.experts)],
            [p for _, c in finite for p in c.probs],
        )
        x.entropy_sum_G = _sum_by_tag(f, [(t.tag, c.entropy) for t, c in finite])
        if r.expert_groups is not None:
            entropies = [(t.tag, c.group_entropy) for t, c in finite]
            x.group_entropy_sum_G = _sum_by_tag(f, entropies)
        x.top1_prob_sum_G = _sum_by_tag(f, [(t.tag, max(c.probs)) for t, c in finite])
        x.zloss_sum_G = _sum_by_tag(f, [(t.tag, _lse(c) ** 2) for t, c in finite])
    if r.margins and r.top_k < r.experts:
        x.margin_sum_G = _sum_by_tag(f, [(t.tag, c.margin) for t, c in finite])
    if kept:
        x.rows = _layer_rows(r, choices, kept)
    return x


def _lse(c: Choice) -> float:
    return math.log(math.fsum(map(math.exp, c.logits)))


def _sum_by_tag(f: Seen, values: list[tuple[str, float]]) -> np.ndarray:
    return np.array([math.fsum(v for t, v in values if t == tag) for tag in f.tags])


def _layer_rows(r: Router, choices: list[Choice], kept: list[int]) -> LayerRows:
    rows = [choices[i] for i in kept]
    m = r.runners
    # Slots without a choice lie in front for some tokens, behind for others.
    front = [(r.top_k - len(c.experts)) * (i % 2) for i, c in zip(kept, rows, strict=True)]

    def padded(values: list[list[Any]], blank: Any) -> list[list[Any]]:
        pairs = zip(front, values, strict=True)
        return [([blank] * f + v + [blank] * r.top_k)[: r.top_k] for f, v in pairs]

    ids_NK = _i32(padded([c.experts for c in rows], 0))
    weights_NK = np.array(padded([c.weights for c in rows], 0.0), np.float32)
    out = LayerRows(_i32(kept), ids_NK, weights_NK)
    if r.dynamic:
        out.chosen_NK = np.array(padded([[True] * len(c.experts) for c in rows], False))
    if m:
        out.next_ids_NM = _i32([c.next_ids or [-1] * m for c in rows])
        out.next_weights_NM = np.array([c.next_weights or [math.nan] * m for c in rows], np.float32)
    if r.scores:
        out.entropy_N = np.array([c.entropy for c in rows], np.float32)
        if r.expert_groups is not None:
            out.group_entropy_N = np.array([c.group_entropy for c in rows], np.float32)
    if r.margins:
        out.margin_N = np.array([c.margin for c in rows], np.float32)
    if r.capacity is not None:
        full = [[s in c.dropped for s in range(len(c.experts))] for c in rows]
        out.dropped_NK = np.array(padded(full, False), bool)
    if r.logits:
        none = [math.nan] * r.experts
        out.logits_NE = np.array([c.logits or none for c in rows], np.float32)
    return out


# ---- the naive count ----------------------------------------------------------------------------


def tally(entries: list[tuple[int, Seen]]) -> dict[str, dict[Key, Row]]:
    """Every table's rows by key, counted in loops over tokens.

    `max_load_expert` is the set of all experts that had the largest load.
    """
    out: dict[str, dict[Key, Row]] = {name: {} for name in ROW_KEYS}
    firsts: dict[int, int] = {}
    known: set[int] = set()
    for window, f in entries:
        step = firsts.setdefault(window, f.step)
        own = _row("attempt window step phase", 0, window, step, f.phase)
        for r, choices in f.layers:
            _tally_layer(out, own, f, r, choices)
        _tally_slices(out["slices"], own, f)
        _tally_step(out["steps"], window, f)
        _tally_tokens(out, f, known)
        for s, p, loss in f.losses or []:
            names = "attempt step forward sequence position kept loss"
            out["outcomes"][s, p] = _row(names, 0, f.step, f.forward, s, p, None, loss)
    return out


def _row(names: str, *values: Any) -> Row:
    return dict(zip(names.split(), values, strict=True))


def _tally_layer(
    out: dict[str, dict[Key, Row]], own: Row, f: Seen, r: Router, choices: list[Choice]
) -> None:
    own = {**own, "layer": r.layer}
    window = own["window"]
    sums = 0.0 if r.scores else None
    margins = 0.0 if r.margins and r.top_k < r.experts else None
    loads = "routed processed overflowed dropped rerouted_in padding weight_sum prob_sum received"
    routers = "tokens unserved_tokens nonfinite_tokens"
    routers += " entropy_sum top1_prob_sum zloss_sum margin_sum group_entropy_sum"
    of_groups = None if r.expert_groups is None else sums
    done: dict[int, int] = defaultdict(int)

    def load(tag: str, e: int) -> Row:
        blank = _row(loads, 0, 0, 0, 0, 0, 0, 0.0, sums, None)
        row = {**own, "tag": tag, "expert": e, **blank}
        return out["load"].setdefault((window, r.layer, tag, e), row)

    for t, c in zip(f.tokens, choices, strict=True):
        for slot, e in enumerate(c.experts):
            row = load(t.tag, e)
            row["padding" if t.padding else "routed"] += 1
            if not t.padding and slot in c.dropped:
                row["overflowed"] += 1
                row["dropped"] += 1
            elif not t.padding:
                row["processed"] += 1
                row["weight_sum"] += c.weights[slot]
                done[e] += 1
        if t.padding:
            continue
        blank = _row(routers, 0, 0, 0, sums, sums, sums, margins, of_groups)
        row = out["routers"].setdefault((window, r.layer, t.tag), {**own, "tag": t.tag, **blank})
        row["tokens"] += 1
        row["unserved_tokens"] += len(c.dropped) == len(c.experts)
        row["nonfinite_tokens"] += not c.finite
        if c.finite and r.scores:
            row["entropy_sum"] += c.entropy
            if of_groups is not None:
                row["group_entropy_sum"] += c.group_entropy
            row["top1_prob_sum"] += max(c.probs)
            row["zloss_sum"] += _lse(c) ** 2
            for e, p in enumerate(c.probs):
                load(t.tag, e)["prob_sum"] += p
        if c.finite and margins is not None:
            row["margin_sum"] += c.margin
    names = "forwards tokens padding_tokens capacity max_load touched dispatch_ns combine_ns"
    blank = _row(names, 0, 0, 0, r.capacity, -1, 0, None, None)
    groups = len({t.sequence for t in f.tokens}) if r.grouped else 1
    blank["capacity_groups"] = None if r.capacity is None else groups
    row = out["layers"].setdefault((window, r.layer), {**own, **blank})
    row["forwards"] += 1
    row["tokens"] += len(f.valid)
    row["padding_tokens"] += len(f.tokens) - len(f.valid)
    row["touched"] += len(done)
    top = max(done.values(), default=0)
    if top > row["max_load"]:
        row["max_load"] = top
        row["max_load_expert"] = {e for e in range(r.experts) if done.get(e, 0) == top}


def _tally_slices(rows: dict[Key, Row], own: Row, f: Seen) -> None:
    for tag in f.tags:
        mine = [t for t in f.valid if t.tag == tag]
        loss = [x for s, _, x in f.losses or [] if f.tag_of(s) == tag]
        if not mine and not loss:
            continue
        blank = _row("tag tokens sequences loss_sum loss_tokens", tag, 0, 0, None, 0)
        row = rows.setdefault((own["window"], tag), {**own, **blank})
        row["tokens"] += len(mine)
        row["sequences"] += len({t.sequence for t in mine})
        row["loss_tokens"] += len(loss)
        if loss:
            row["loss_sum"] = (row["loss_sum"] or 0.0) + math.fsum(loss)


def _tally_step(rows: dict[Key, Row], window: int, f: Seen) -> None:
    n, pads = len(f.valid), len(f.tokens) - len(f.valid)
    start, device = START_NS + 1000 * f.step + f.forward, None if f.forward % 2 else 500
    names = "attempt step forward phase window t_start_ns host_ns device_ns tokens padding_tokens"
    row = _row(names, 0, f.step, f.forward, f.phase, window, start, 1000 + f.step, device, n, pads)
    names = "sampled lost_rows fires_expected fires_seen breaches"
    row |= _row(names, any(t.kept for t in f.tokens), 0, len(f.layers), len(f.layers), 0)
    rows[f.step, f.forward] = row


def _tally_tokens(out: dict[str, dict[Key, Row]], f: Seen, known: set[int]) -> None:
    at = _row("attempt step forward", 0, f.step, f.forward)
    for i, t in enumerate(f.tokens):
        if not t.kept:
            continue
        names = "stream token sequence position padding tag token_id"
        token_id = 1000 + t.position if f.step % 2 else None
        row = _row(names, "main", i, t.sequence, t.position, t.padding, t.tag, token_id)
        out["tokens"][f.step, f.forward, "main", i] = at | row
        if (s := t.sequence) not in known:
            known.add(s)
            request, prompt = f"req-{s}" if s % 3 else None, f"p{s}" if s % 2 else None
            row = _row("sequence tag request parent prompt", s, t.tag, request, None, prompt)
            out["sequences"][(s,)] = at | row
        for r, choices in f.layers:
            c = choices[i]
            entropy = None if math.isnan(c.entropy) else c.entropy
            margin = None if math.isnan(c.margin) else c.margin
            row = _row("layer token expert_ids weights", r.layer, i, c.experts, c.weights)
            row |= _row("next_ids next_weights", c.next_ids, c.next_weights)
            row |= _row("entropy margin dropped", entropy, margin, c.dropped or None)
            of_groups = None if math.isnan(c.group_entropy) else c.group_entropy
            row |= _row("router_ids group_entropy", None, of_groups)
            key = (f.step, f.forward, r.layer, i)
            out["routing"][key] = at | row
            if r.logits:
                logits = c.logits or [math.nan] * r.experts
                out["logits"][key] = at | _row("layer token logits", r.layer, i, logits)
