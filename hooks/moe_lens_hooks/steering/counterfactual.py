"""`counterfactual`: what a model's routing costs and gains, measured on the model; into a run.

Legend: B sequences, S positions, K choices per token, A alternatives, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens.trace.counterfactual import Counterfactual
from moe_lens.trace.measured import Result, result_path
from moe_lens.trace.reader import open_run
from moe_lens.trace.schema import COUNTERFACTUAL
from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.steering.alternatives import alternatives
from moe_lens_hooks.steering.change import Base, Change, Layer
from moe_lens_hooks.steering.edits import Force
from moe_lens_hooks.steering.interventions import (
    TOKENS_AT_ONCE,
    Intervention,
    Interventions,
    intervene,
)
from moe_lens_hooks.steering.matching import match, warn_of_another_class
from moe_lens_hooks.steering.token_losses import Batch, Loss, next_token_loss, shape_of, take

TOKENS, REGRET_TOKENS, ALTERNATIVES = 4096, 256, 8

Progress = Callable[[int, int, str], None]
"""(parts done, parts in all, what is measured now)"""


@dataclass(frozen=True)
class Wanted:
    """What is measured, and on how much, as `counterfactual` was asked."""

    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    tokens: int
    regret_tokens: int
    alternatives: int
    seed: int


def counterfactual(
    model: nn.Module,
    batches: Iterable[Batch],
    run: str | Path,
    *,
    loss: Loss = next_token_loss,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    tokens: int = TOKENS,
    regret_tokens: int = REGRET_TOKENS,
    alternatives: int = ALTERNATIVES,
    seed: int = 0,
    name: str = "counterfactual",
    tokens_at_once: int = TOKENS_AT_ONCE,
    adapters: Sequence[Adapter] = (),
    on_progress: Progress | None = None,
) -> Counterfactual:
    """Measure what each expert is worth, and whether other routes would have served better.

    Layer by layer: each expert knocked out, each forced in, the last choice swapped for the
    runner-up, every top-k from 1 to 2 K; all tokens at once. And for some tokens, one at a time,
    the loss under other sets of as many experts, drawn alike: a change of one token reaches its
    own prediction by that token's route alone.

    Args:
        model: The model that was recorded, or a copy of it.
        batches: As `Interventions.measure` takes them.
        run: Folder of its trace. The result is written into it, and replaces one of that name.
        loss: As in `intervene`.
        layers: Numbers in call order; None: all whose choice can be changed.
        experts: Of each layer, to knock out and to force in; None: all.
        tokens: Whole sequences are taken until these are so many.
        regret_tokens: Of these, drawn at random, for other routes.
        alternatives: Other routes of each.
        seed: Of what is drawn.
        name: Of the result.
        tokens_at_once: As in `intervene`.
        adapters: As in `intervene`.
        on_progress: Called before each part.

    Raises:
        NoMoELayers, UnsupportedRouter: As `intervene` and `measure`.
        SteeringError: The model is not the one that was recorded, or nothing can be measured.
        TraceError: `run` is no trace.
    """
    for what, value in (("tokens", tokens), ("alternatives", alternatives)):
        if value < 1:
            raise ValueError(f"{what}={value} must be at least 1")
    wanted = Wanted(
        None if layers is None else tuple(layers),
        None if experts is None else tuple(experts),
        *(tokens, regret_tokens, alternatives, seed),
    )
    path = result_path(Path(run), COUNTERFACTUAL, name)
    meta = open_run(run).meta
    session = intervene(model, loss=loss, tokens_at_once=tokens_at_once, adapters=adapters)
    match(meta, str(run), session.passes.layers)
    warn_of_another_class(meta, str(run), model)
    about = asdict(wanted) | {"model": type(model).__name__, "tokens_at_once": tokens_at_once}
    with Result(path, about, COUNTERFACTUAL) as result:
        bases = measure_all(session, batches, wanted.tokens)
        chosen = _chosen(bases[0], wanted)
        refused: dict[str, str] = {}
        about["refused"] = refused
        about["moe_layers"] = [asdict(bases[0].layers[n].info) for n in chosen]
        about["sequences"] = sum(len(b.tags_B) for b in bases)
        about["measured_tokens"] = sum(int(b.tokens.sum()) for b in bases)
        parts = list(chain.from_iterable(_parts(session, bases, n, wanted) for n in chosen))
        for done, part in enumerate(parts):
            if on_progress is not None:
                on_progress(done, len(parts), part.says)
            try:
                result.add(part.measure())
            except UnsupportedRouter as e:  # some blocks have no place for another top-k
                refused[part.says] = str(e)
        if len(refused) == len(parts):
            raise UnsupportedRouter(next(iter(refused.values())))
        if on_progress is not None:
            on_progress(len(parts), len(parts), "")
    return Counterfactual(result.path, about, result.interrupted)


@dataclass(frozen=True)
class _Part:
    """One change at one layer: rows of the result."""

    says: str
    measure: Callable[[], dict[str, Any]]


def measure_all(session: Interventions, batches: Iterable[Batch], tokens: int) -> list[Base]:
    """Batches, measured as they are, until there are tokens enough.

    Raises:
        SteeringError: None has a loss; and as `Interventions.measure`.
    """
    bases: list[Base] = []
    left = tokens
    for batch in batches:
        B, S = shape_of(batch)
        most = left // S if bases else max(1, left // S)
        if most < 1:
            break
        rows = torch.arange(min(B, most))
        part = batch if len(rows) == B else take(batch, rows)
        if not isinstance(part, torch.Tensor) and part.get("tags") is not None and len(rows) < B:
            part = {**part, "tags": list(part["tags"])[: len(rows)]}
        bases.append(session.measure(part))
        left -= len(rows) * S
    if not any(base.tokens.any() for base in bases):
        raise SteeringError("the batches hold no token that has a loss: there is nothing to ask.")
    return bases


def _chosen(base: Base, wanted: Wanted) -> list[int]:
    """Layers that are measured: those asked for; else those whose choice can be changed.

    Raises:
        SteeringError: There are none.
        UnsupportedRouter: One that was asked for routes other tokens than those that have losses.
    """
    if wanted.layers is not None:
        if bad := [n for n in wanted.layers if not 0 <= n < len(base.layers)]:
            raise SteeringError(f"there is no layer {bad[0]}: the model has {len(base.layers)}.")
        for n in wanted.layers:
            if not base.layers[n].aligned:
                raise UnsupportedRouter(
                    f"layer {n} ({base.layers[n].info.path}) does not route the tokens that have "
                    "losses."
                )
        return sorted(set(wanted.layers))
    able = [n for n, x in enumerate(base.layers) if x.aligned and x.why_not is None]
    if not able:
        first = base.layers[0]
        raise SteeringError(
            first.why_not or f"{first.info.path} does not route the tokens that have losses."
        )
    return able


def _parts(session: Interventions, bases: list[Base], n: int, wanted: Wanted) -> Iterator[_Part]:
    """All that is measured at a layer."""
    info = bases[0].layers[n].info
    E = info.experts + info.zero_experts
    K = bases[0].layers[n].expert_ids_BSK.shape[-1]
    if wanted.experts is not None and (bad := [e for e in wanted.experts if not 0 <= e < E]):
        raise SteeringError(f"layer {n} has experts 0 to {E - 1}, not {bad[0]}.")
    experts = range(E) if wanted.experts is None else sorted(set(wanted.experts))
    changes: list[tuple[str, int, Intervention]] = []
    for e in experts:
        changes += [("knock_out", e, session.knock_out(n, e))] if E > K else []
        changes.append(("force_in", e, session.force_in(n, e)))
    changes += [("runner_up", 0, session.runner_up(n))] if E > K else []
    changes += [("top_k", k, session.top_k(n, k)) for k in range(1, _most(bases, n, K, E) + 1)]
    first = 0
    for base in bases:
        for kind, number, change in changes:
            yield _Part(
                f"layer {n}: {kind} {number}",
                lambda a=(base, first, n, kind, number, change): _rows(*a),  # type: ignore[misc]
            )
        first += len(base.tags_B)
    yield from _regret_parts(session, bases, n, E, wanted)


def _most(bases: list[Base], n: int, K: int, E: int) -> int:
    """The largest top-k that is asked: 2 K, or what the layer has, in the groups of a token."""
    info = bases[0].layers[n].info
    if info.groups and info.top_groups:
        E = info.experts // info.groups * info.top_groups
    return min(2 * K, E)


def _rows(
    base: Base, first: int, n: int, kind: str, number: int, change: Intervention
) -> dict[str, Any]:
    return _columns(change(base), base.layers[n], first, n, kind, number)


def _columns(
    found: Change, layer: Layer, first: int, n: int, kind: str, number: int
) -> dict[str, Any]:
    at = (found.sequence_N, found.position_N)
    N = len(found.base_N)
    return {
        "layer": np.full(N, n),
        "intervention": [kind] * N,
        "number": np.full(N, number),
        "sequence": found.sequence_N + first,
        "position": found.position_N,
        "tag": found.tag_N.tolist(),
        "base_loss": found.base_N,
        "loss": found.loss_N,
        "affected": found.affected_N,
        "margin": layer.margin_BS[at],
        "entropy": layer.entropy_BS[at],
        "expert_ids": [None] * N,
    }


@dataclass(frozen=True)
class _Asked:
    """Some of the other routes of a token: from `first` on, as many as `routes`."""

    b: int
    s: int
    first: int
    routes: int


def _regret_parts(
    session: Interventions, bases: list[Base], n: int, experts: int, wanted: Wanted
) -> Iterator[_Part]:
    """Other routes of single tokens: the same tokens in every layer."""
    tokens = [(i, int(b), int(s)) for i, x in enumerate(bases) for b, s in np.argwhere(x.tokens)]
    drawn = np.random.default_rng(wanted.seed).permutation(len(tokens))[: wanted.regret_tokens]
    firsts = np.cumsum([0, *(len(x.tags_B) for x in bases)])
    A = min(wanted.alternatives, comb(experts, bases[0].layers[n].expert_ids_BSK.shape[-1]) - 1)
    for i, base in enumerate(bases):
        mine = [tokens[j][1:] for j in np.sort(drawn) if tokens[j][0] == i]
        rows = max(1, session.tokens_at_once // base.loss_BS.shape[1])
        most = min(A, max(1, rows - 1))  # of one token in one forward, beside its own route
        asked = [_Asked(b, s, at, most) for b, s in mine for at in range(0, A, max(1, most))]
        size = max(1, rows // (most + 1))
        for at in range(0, len(asked), size):
            given = (session, base, int(firsts[i]), n, experts, asked[at : at + size], wanted)
            yield _Part(
                f"layer {n}: other routes",
                lambda a=given: _other_routes(*a),  # type: ignore[misc]
            )


def _other_routes(
    session: Interventions,
    base: Base,
    first: int,
    n: int,
    experts: int,
    asked: list[_Asked],
    wanted: Wanted,
) -> dict[str, Any]:
    """Each token's sequence runs as it is, and once for each other route of that token alone.

    As it is: in the same forward, so that equal routes have equal bits. Where a forward has room
    for one sequence only, the batch was measured in such forwards.
    """
    layer = base.layers[n]
    alone = session.tokens_at_once // base.loss_BS.shape[1] < 2
    rows: list[int] = []
    places: list[tuple[int, int, Any]] = []
    for x in asked:
        rng = np.random.default_rng([wanted.seed, n, first + x.b, x.s])
        own_K = layer.expert_ids_BSK[x.b, x.s]
        routes = alternatives(own_K, experts, wanted.alternatives, rng)[x.first :][: x.routes]
        places.append((len(rows), len(rows) + (not alone), routes))
        rows += [x.b] * (len(routes) + (not alone))
    ids_BSK = np.full((len(rows), *layer.expert_ids_BSK.shape[1:]), -1)
    for x, (_, at, routes) in zip(asked, places, strict=True):
        ids_BSK[at : at + len(routes), x.s] = routes
    inputs = take(base.inputs, torch.tensor(rows))
    loss, _ = session.passes.changed(inputs, [Force(n, torch.from_numpy(ids_BSK))])
    loss_BS = loss.numpy()
    parts = []
    for x, (own, at, routes) in zip(asked, places, strict=True):
        A = len(routes)
        change = Change(
            np.full(A, x.b),
            np.full(A, x.s),
            base.tags_B[np.full(A, x.b)],
            np.full(A, base.loss_BS[x.b, x.s] if alone else loss_BS[own, x.s]),
            loss_BS[at : at + A, x.s],
            np.ones(A, bool),
        )
        columns = _columns(change, layer, first, n, "other_route", 0)
        numbers = np.arange(x.first, x.first + A)
        parts.append(columns | {"number": numbers, "expert_ids": routes.tolist()})
    return {name: _joined([p[name] for p in parts]) for name in parts[0]}


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], list):
        return [x for part in parts for x in part]
    return np.concatenate(parts)
