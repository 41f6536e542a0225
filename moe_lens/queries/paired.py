"""`paired`: what changes in the routing of the same content when it stands in another order.

`pairing` says which sequences belong together, and which of their tokens. Asks `sequence_choices`
layer by layer and hands the answers to `moe_lens.metrics`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.errors import QueryError
from moe_lens.metrics.by_tag import tally
from moe_lens.metrics.by_token import of_ids
from moe_lens.metrics.drift import jsd, jsd_floor
from moe_lens.metrics.paired import (
    CHANGES,
    Routed,
    by_load,
    by_octave,
    changes,
    elsewhere,
    parts,
)
from moe_lens.metrics.specialisation import context_independence
from moe_lens.queries import along
from moe_lens.queries.evidence import MOST
from moe_lens.queries.memory import chosen_layers
from moe_lens.queries.pairing import (
    ALIGN,
    KEY,
    VARIANT,
    Align,
    aligned_positions,
    groups,
    named_pairs,
)
from moe_lens.queries.session import Trace, one_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_lens.metrics.chance import Ints
    from moe_lens.trace.meta import LayerInfo

PAIRS = 64
"""Pairs that are looked at."""


@dataclass(frozen=True)
class Paired:
    """What was found of pairs.

    Attributes:
        pairs: A row a pair: `pair`, `rank_a`, `sequence_a`, `rank_b`, `sequence_b`, `tokens_a`,
            `tokens_b`, `aligned` tokens, `blocks`, and whether it is the `same` sequence twice.
        left_out: Pairs beyond the number that was asked for.
        layers: A row a layer; columns as docs/context.md says.
        by_distance, by_position: By layer and octave: tokens since the block began (the first
            token after the cut is 0), and the position in the first sequence.
        tokens: A row a layer and aligned pair of tokens: `layer`, `pair`, `position`,
            `position_b`, `distance` (-1: nothing before it was moved), `same`, and the changes.
    """

    pairs: pd.DataFrame
    left_out: int
    layers: pd.DataFrame
    by_distance: pd.DataFrame
    by_position: pd.DataFrame
    tokens: pd.DataFrame


def paired(
    trace: Trace,
    *,
    key: str = KEY,
    variant: str = VARIANT,
    requests: Sequence[tuple[str, str]] = (),
    align: Align = "ids",
    phase: str | None = None,
    layers: Collection[int] | None = None,
    pairs: int = PAIRS,
    most: int | None = MOST,
) -> Paired:
    """Compare the routing of sequences of one trace that have the same content.

    Args:
        trace: One run.
        key: Column of `sequences` whose value the sequences of a pair share; of three or more each
            is compared with the first.
        variant: Column that orders them; where there is no `variant`, rank and number do.
        requests: Pairs of request ids, in place of the column.
        align: "ids": by token ids, as `metrics.alignment` says; "position": the same position;
            "end": the same distance from the end, of the same id where ids are known; or blocks of
            each pair (by its value, or `first=second`): [first position in a, first in b, tokens].
        phase: Compare only tokens of this phase. What is the same is asked of whole sequences.
        layers: Only these; None: all but those whose experts choose their tokens.
        pairs: How many to look at.
        most: Tokens of other sequences to look at; None: all.

    Raises:
        QueryError: The trace has no pairs, no rows or no token ids, or several runs.
        ValueError: `align` or `pairs` is not one of those above.
    """
    if isinstance(align, str) and align not in ALIGN:
        raise ValueError(f"align={align!r} must be one of {', '.join(ALIGN)}, or blocks by pair")
    if pairs < 1:
        raise ValueError(f"pairs={pairs} must be 1 or more")
    run = one_run(trace)
    infos = chosen_layers(run, layers)
    named = named_pairs(trace, run, key, variant, requests)
    taken = named.iloc[:pairs].reset_index(drop=True)
    members = {*zip(taken["rank_a"], taken["sequence_a"], strict=True),
               *zip(taken["rank_b"], taken["sequence_b"], strict=True)}  # fmt: skip
    of_pair = {m: n for n, m in groups(taken)}
    asked = {"phase": phase, "sequences": ",".join(f"{r}:{s}" for r, s in sorted(members))}
    aligned: dict[str, pd.DataFrame] = {}
    said: list[pd.DataFrame] = []
    tokens, found = [], []
    for info in infos:
        here = {"first_layer": info.layer, "last_layer": info.layer}
        own = trace.query("sequence_choices", **asked, **here, most=None).df()
        others = trace.query("sequence_choices", phase=phase, **here, most=most).df()
        if info.stream not in aligned:
            whole = own
            if phase is not None:
                whole = trace.query("sequence_choices", **asked | {"phase": None}, **here,
                                    most=None).df()  # fmt: skip
            aligned[info.stream], pairs_said = aligned_positions(run, taken, whole, align)
            said.append(pairs_said)
        layer, row = _compared(info, taken, aligned[info.stream], own, others, of_pair)
        tokens.append(layer)
        found.append(row)
    every = pd.concat(tokens, ignore_index=True)
    if every.empty:
        raise QueryError(
            "No token of a pair stands in both of its sequences. Aligned by token ids a block has "
            "4 tokens or more; declare another alignment: --align position, end, or blocks."
        )
    moved = every[~every["same"]]
    return Paired(
        said[0], len(named) - len(taken), pd.DataFrame(found),
        by_octave(moved, "distance"), by_octave(moved[moved["distance"] >= 0], "position"), every,
    )  # fmt: skip


def _compared(
    info: LayerInfo,
    named: pd.DataFrame,
    aligned: pd.DataFrame,
    own: pd.DataFrame,
    others: pd.DataFrame,
    of_pair: dict[tuple[int, int], int],
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A layer's aligned tokens and its row of numbers."""
    rows = pd.concat([own, others]).drop_duplicates(["rank", "sequence", "position"])
    rows = rows.reset_index(drop=True)
    ids_NK, weights_NK = along.choices(rows, info.experts)
    has_ids = bool(len(rows)) and bool(rows["token_id"].notna().all())
    where = list(zip(rows["rank"], rows["sequence"], strict=True))
    routed = Routed(
        ids_NK,
        weights_NK,
        along.ranked(rows),
        rows["token_id"].to_numpy(np.int64) if has_ids else None,
        np.array([of_pair.get(x, -1) for x in where], np.int64),
        info.experts,
    )
    place = rows[["rank", "sequence", "position"]].assign(row=np.arange(len(rows)))
    for side, at in (("a", "position"), ("b", "position_b")):
        keys = [f"rank_{side}", f"sequence_{side}", at]
        aligned = aligned.merge(
            place.set_axis([*keys, f"row_{side}"], axis=1), on=keys, validate="many_to_one"
        )
    a_P, b_P = aligned["row_a"].to_numpy(np.int64), aligned["row_b"].to_numpy(np.int64)
    kept = ["pair", "position", "position_b", "distance", "same"]
    found = pd.concat([aligned[kept], changes(routed, a_P, b_P)], axis=1)
    moved = ~aligned["same"].to_numpy(bool) & (aligned["distance"].to_numpy() >= 0)
    found.insert(0, "layer", info.layer)
    sequence_N = np.asarray(rows.groupby(["rank", "sequence"]).ngroup(), np.int64)
    return found, _row(info, found, routed, a_P[moved], b_P[moved], moved, sequence_N)


def _row(
    info: LayerInfo,
    found: pd.DataFrame,
    routed: Routed,
    a_P: Ints,
    b_P: Ints,
    moved: NDArray[np.bool_],
    sequence_N: Ints,
) -> dict[str, Any]:
    elsewhere_P = elsewhere(routed, a_P, b_P)
    of_moved = found[moved].reset_index(drop=True)
    known = elsewhere_P["id_overlap"].notna()
    load_a, load_b = (_load(routed, x) for x in (a_P, b_P))
    top_k = float((routed.ids_NK >= 0).sum(1).mean()) if len(routed.ids_NK) else float("nan")
    random = by_load(routed.ids_NK, routed.experts)
    same = found[found["same"]]
    before = found[~found["same"] & (found["distance"] < 0)]
    return {
        "layer": info.layer,
        "experts": info.experts,
        "pairs": int(of_moved["pair"].nunique()),
        "tokens": len(of_moved),
        **{name: float(of_moved[name].mean()) for name in CHANGES},
        "id_known": float(known.mean()) if len(known) else float("nan"),
        **{name: float(elsewhere_P[name].mean()) for name in elsewhere_P},
        "random_overlap": random,
        "chance": top_k / info.experts,
        **parts(float(of_moved["overlap"][known].mean()), float(elsewhere_P["id_overlap"].mean()),
                random),
        "jsd": float(jsd(load_a, load_b)) if len(a_P) else float("nan"),
        "jsd_floor": float(jsd_floor(info.experts, load_a.sum(), load_b.sum()))
        if len(a_P) else float("nan"),
        "context_independence": _independence(routed, sequence_N),
        "before_tokens": len(before),
        "before_changed": float(before["set_changed"].mean()),
        "same_tokens": len(same),
        "same_changed": float(same["set_changed"].mean()),
        "same_weight_change": float(same["weight_change"].max()) if len(same) else float("nan"),
    }  # fmt: skip


def _load(routed: Routed, at_P: Ints) -> Ints:
    nobody = np.zeros(len(at_P), np.int64)
    return np.asarray(tally(nobody, routed.ids_NK[at_P], 1, routed.experts)[0], np.int64)


def _independence(routed: Routed, sequence_N: Ints) -> float:
    if routed.token_id_N is None or not len(sequence_N):
        return float("nan")
    order = np.argsort(sequence_N, kind="stable")
    # Whole sequences one after another, as its null needs.
    ids_N = routed.token_id_N[order]
    found = of_ids(routed.ids_NK[order], ids_N, sequence_N[order], routed.experts)
    return float(context_independence(found))
