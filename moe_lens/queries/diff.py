"""`diff`: how two runs of the same tokens route differently.

Two engines, two precisions, two checkpoints. The numbers come from the stored questions
diff_tokens, diff_layers, diff_flips and diff_choices, over a session with both runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_lens.errors import TraceError
from moe_lens.lacking import not_there
from moe_lens.metrics.matching import Matched, match
from moe_lens.queries.along import padded
from moe_lens.queries.session import Trace, open_trace

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

By = Literal["token", "position"]


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        a, b: Names of the runs.
        by: How tokens were aligned.
        tokens: Valid tokens that were compared.
        layers: One row per layer; columns as the question diff_layers says.
        flips: The first decisions that differ, by sequence, position and layer; columns as the
            question diff_flips says.
        matched: Of each layer, how runs agree once experts are matched by the tokens that they
            serve; empty: that was not asked for. None: too few tokens.
        rounded: A run keeps gate weights rounded to bf16, so differences of up to 2^-8 relative may
            be of the storage.
        no_weights: Runs without gate weights, so that none can be compared: name, and why.
    """

    a: str
    b: str
    by: By
    tokens: int
    layers: pd.DataFrame
    flips: pd.DataFrame
    rounded: bool
    matched: dict[int, Matched | None] = field(default_factory=dict)
    no_weights: tuple[str, ...] = ()

    @property
    def flip_rate(self) -> float:
        """Share of token-layers whose set of experts differs."""
        return float(self.layers["flips"].sum() / max(self.layers["tokens"].sum(), 1))

    @property
    def overlap(self) -> float:
        """Mean of |A and B| / k over token-layers."""
        weighted = self.layers["overlap"] * self.layers["tokens"]
        return float(weighted.sum() / max(self.layers["tokens"].sum(), 1))

    @property
    def diverged_tokens(self) -> int:
        """Tokens that differ in some layer."""
        return int(self.layers["first_flips"].sum())

    def __repr__(self) -> str:
        return (
            f"<moe_lens.Difference {self.a} vs {self.b}: {self.flip_rate:.4%} of "
            f"{int(self.layers['tokens'].sum()):,} token-layers flipped>"
        )


def diff(
    a: str | Path,
    b: str | Path,
    *,
    by: By = "token",
    phase: str | None = None,
    flips: int = 20,
    match_experts: bool = False,
    skip_damaged: bool = False,
) -> Difference:
    """Compare the routing of two runs of the same tokens.

    Args:
        a: Folder of a trace with per-token rows.
        b: Folder of another.
        by: How tokens are aligned. "token": same rank, step, forward and place in it, as when one
            script ran twice. "position": same sequence (request id, where all have one) and
            position, as when one run decoded token by token and the other took whole sequences.
        phase: Only tokens of this phase.
        flips: How many of the first differing decisions to list.
        match_experts: Also match the experts of each layer by the tokens that they serve, as
            runs of other seeds need.
        skip_damaged: Leave out segments that cannot be read.

    Raises:
        TraceError: A run cannot be read, or they are not runs of the same tokens and experts.
        ValueError: `by` or `flips` is not one of those above.
    """
    if by not in ("token", "position"):
        raise ValueError(f'by={by!r} must be "token" or "position"')
    if flips < 0:
        raise ValueError(f"flips={flips} must be 0 or more")
    if Path(a).absolute() == Path(b).absolute():
        raise TraceError(f"{a} is compared with itself. Name two runs.")
    with open_trace([a, b], skip_damaged=skip_damaged) as trace:
        name_a, name_b = trace.runs
        _same_experts(trace, name_a, name_b)
        asked = {"a": name_a, "b": name_b, "by": by, "phase": phase}
        tokens = _same_tokens(trace, name_a, name_b, asked)
        layers = trace.query("diff_layers", **asked).df()
        if layers["unpaired"].any():
            row = layers[layers["unpaired"] > 0].to_dict("records")[0]
            raise TraceError(
                f"layer {row['layer']}: {row['unpaired']:,} tokens have a decision in one of "
                f"{name_a} and {name_b} only. Were rows lost (moe-lens info), or a layer skipped?"
            )
        listed = trace.query("diff_flips", **asked, top=flips).df()
        runs = trace.table("runs").df()
        rounded = bool((runs["weights"] == "bf16").any())
        unweighted = [info for info in trace.info().runs if info.weights == "none"]
        no_weights = tuple(f"{x.run}: {not_there(x, 'weights')}" for x in unweighted)
        matched = _matched(trace, asked) if match_experts else {}
        return Difference(name_a, name_b, by, tokens, layers, listed, rounded, matched, no_weights)


def _matched(trace: Trace, asked: dict[str, str | None]) -> dict[int, Matched | None]:
    """Of each layer: its experts matched on half of the sequences, judged on the other half."""
    layers = trace.table("moe_layers").df()
    found = {}
    for row in layers[layers["run"] == asked["a"]].to_dict("records"):
        layer, experts = int(row["layer"]), int(row["experts"])
        one = {"first_layer": layer, "last_layer": layer}
        tokens = trace.query("diff_choices", **asked, **one).df()
        sequence_N = np.asarray(tokens.groupby(["rank", "sequence"]).ngroup(), np.int64)
        a_NK, b_NK = (_choices(tokens[name], experts) for name in ("ids_a", "ids_b"))
        found[layer] = match(a_NK, b_NK, experts, sequence_N)
    return found


def _choices(lists: pd.Series[Any], experts: int) -> NDArray[np.int64]:
    """`[N, K]`; -1: chose fewer, or an expert that computes nothing."""
    sizes_N = np.array([len(x) for x in lists], np.int64)
    ids_NK = padded(lists, sizes_N, -1).astype(np.int64)
    return np.where(ids_NK < experts, ids_NK, -1)


def _same_experts(trace: Trace, a: str, b: str) -> None:
    layers = trace.table("moe_layers").df().set_index(["run", "layer"])
    counts = [list(layers.loc[name].index) if name in layers.index else [] for name in (a, b)]
    if counts[0] != counts[1] or not counts[0]:
        raise TraceError(
            f"{a} has {len(counts[0])} MoE layers, {b} {len(counts[1])}: only runs of one "
            "architecture can be compared."
        )
    for layer in counts[0]:
        mine, other = layers.loc[(a, layer)], layers.loc[(b, layer)]
        for what in ("experts", "zero_experts", "stream"):
            if mine[what] != other[what]:
                raise TraceError(
                    f"layer {layer} has {what} {mine[what]} in {a}, {other[what]} in {b}: only "
                    "runs of one architecture can be compared."
                )


def _same_tokens(trace: Trace, a: str, b: str, asked: dict[str, str | None]) -> int:
    """Tokens of both.

    Raises:
        TraceError: They have not the same.
    """
    row = trace.query("diff_tokens", **asked).df().to_dict("records")[0]
    infos = {info.run: info for info in trace.info().runs}
    sampling = trace.table("runs").df().groupby("run")["sampling"].first()
    for name, tokens in ((a, row["tokens_a"]), (b, row["tokens_b"])):
        if not tokens:
            if infos[name].imported and infos[name].no_rows:
                raise TraceError(f"{name} holds {infos[name].no_rows}.")
            raise TraceError(
                f"{name} holds no per-token rows"
                + (f" of phase {asked['phase']!r}" if asked["phase"] else "")
                + f" (sampling: {sampling[name]}). Record both runs with record(..., tokens=1.0)."
            )
    parts = []
    for name, alone, first in (
        (a, row["only_a"], row["first_only_a"]),
        (b, row["only_b"], row["first_only_b"]),
    ):
        if alone:
            parts.append(f"{alone:,} tokens are in {name} alone (as {first})")
    if parts:
        advice = (
            "Runs that were cut into other forwards are aligned by sequence and position: "
            '--by position, in Python by="position".'
            if asked["by"] == "token"
            else "Give the same sequences the same request ids: rec.step(sequences=[...])."
        )
        raise TraceError(
            f"{a} ({sampling[a]}) and {b} ({sampling[b]}) are not of the same tokens: "
            f"{' and '.join(parts)}, {row['both']:,} in both. {advice}"
        )
    if row["other_text"]:
        raise TraceError(
            f"{a} and {b} are of other texts: {row['other_text']:,} of {row['both']:,} tokens have "
            "another vocabulary id."
        )
    return int(row["both"])
