"""Trace format 1: the tables, their columns, and how each column is laid down in Parquet.

Counts and sums are stored, ratios are derived: sums merge across ranks and windows, means do not.
Only signed integers, floats, booleans, plain strings and lists of those, so that DuckDB, pandas,
Spark and Arrow read the files with no help from us.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

SCHEMA_VERSION = 1
"""Major version of the format. A reader refuses a trace whose version is above its own."""

UNTAGGED = "untagged"
"""The tag of tokens for which the user named none."""

OTHER = "other"
"""The tag that collects every tag after the first `MAX_TAGS` distinct ones."""

MAX_TAGS = 32

I32, I64, F32, F64 = pa.int32(), pa.int64(), pa.float32(), pa.float64()
STR, BOOL = pa.string(), pa.bool_()
IDS, FLOATS = pa.list_(I32), pa.list_(F32)


@dataclass(frozen=True)
class Column:
    """One column: `packing` is "dictionary" (keys, few values) or "split" (BYTE_STREAM_SPLIT)."""

    name: str
    type: pa.DataType
    doc: str
    packing: str = "dictionary"
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One table: what a row is, its columns, what a segment is sorted by (nothing: arrival)."""

    name: str
    row: str
    columns: tuple[Column, ...]
    sort: tuple[str, ...]
    per_token: bool = False
    """Sampled rows that a disk bound (`max_bytes`) may remove, oldest first."""

    @cached_property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])


def _key(name: str, type_: pa.DataType, doc: str) -> Column:
    return Column(name, type_, doc)


def _count(name: str, doc: str, *, nullable: bool = False) -> Column:
    return Column(name, I64, doc, "split", nullable)


def _total(name: str, doc: str, type_: pa.DataType = F64) -> Column:
    return Column(name, type_, doc, "split", nullable=True)


ATTEMPT = _key("attempt", I32, "0 for the first recording, one more for each resume")
STEP = _key("step", I64, "what the user calls a step; in a table of windows, the window's first")
FORWARD = _key("forward", I32, "forward of the root module inside the step, from 0")
WINDOW = _key(
    "window", I64, "forwards of one phase that share rows of counts (a SQL keyword: quote it)"
)
PHASE = _key("phase", STR, "train, eval, prefill or decode, or what the user said")
LAYER = _key("layer", I32, "number among MoE layers, in call order (meta: layers)")
TAG = _key("tag", STR, f"the user's slice; at most {MAX_TAGS} and '{OTHER}'")
TOKEN = Column("token", I32, "flat index of the token in the forward's stream", "split")

_BY = ("phase", "layer", "tag", "expert")
"""What rows of `load` are summed by, windows apart."""

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table(
            "load",
            "(window, layer, tag, expert), non-zero only",
            (
                ATTEMPT,
                WINDOW,
                STEP,
                PHASE,
                LAYER,
                TAG,
                _key("expert", I32, "expert id; ids from meta's `experts` upward compute nothing"),
                _count("routed", "choices of this expert by valid tokens, as the router made them"),
                _count("processed", "choices the expert computed for valid tokens"),
                _count("overflowed", "choices that found the expert full"),
                _count("dropped", "overflowed choices that no expert computed"),
                _count("rerouted_in", "choices moved here from a full expert"),
                _count("padding", "choices made by padding, or by tokens that were routed again"),
                _total("prob_sum", "sum of the router's probability of this expert", F32),
                _total("weight_sum", "sum of the gate weights with which it was computed", F32),
                _count("received", "rows the expert's own rank saw, where visible", nullable=True),
            ),
            ("layer", "window"),
        ),
        Table(
            "layers",
            "(window, layer)",
            (
                ATTEMPT,
                WINDOW,
                STEP,
                PHASE,
                LAYER,
                _count("forwards", "forwards in the window in which this layer ran"),
                _count("tokens", "valid tokens routed: no padding, each token once"),
                _count("padding_tokens", "padding routed, and tokens routed again: in no count"),
                _count("capacity", "choices one expert takes per capacity group", nullable=True),
                _count(
                    "capacity_groups",
                    "groups of tokens that each have this capacity (1: the whole forward)",
                    nullable=True,
                ),
                _count("max_load", "largest `processed` of one expert in one forward"),
                _key("max_load_expert", I32, "the expert that had it"),
                _count("touched", "experts that computed something, summed over forwards"),
                _count(
                    "dispatch_ns",
                    "time in dispatch all-to-alls, waiting included, ns",
                    nullable=True,
                ),
                _count(
                    "combine_ns", "time in combine all-to-alls, waiting included, ns", nullable=True
                ),
            ),
            ("layer", "window"),
        ),
        Table(
            "routers",
            "(window, layer, tag)",
            (
                ATTEMPT,
                WINDOW,
                STEP,
                PHASE,
                LAYER,
                TAG,
                _count("tokens", "valid tokens"),
                _count("unserved_tokens", "valid tokens for which no expert ran"),
                _count("nonfinite_tokens", "valid tokens with NaN or infinite logits: in no sum"),
                _total("entropy_sum", "entropy of the router's full distribution, nats"),
                _total("margin_sum", "k-th minus next selection score (meta: selection)"),
                _total("top1_prob_sum", "largest router probability"),
                _total("zloss_sum", "squared logsumexp of the logits, nats squared"),
                _total(
                    "group_entropy_sum",
                    "entropy of that distribution summed over groups of experts (meta: groups), "
                    "nats; null: no groups",
                ),
            ),
            ("layer", "window"),
        ),
        Table(
            "slices",
            "(window, tag)",
            (
                ATTEMPT,
                WINDOW,
                STEP,
                PHASE,
                TAG,
                _count("tokens", "valid tokens"),
                _count("sequences", "sequences with a valid token in the window, per forward"),
                _total("loss_sum", "sum of the losses given to rec.loss, in the user's unit"),
                _count("loss_tokens", "tokens behind loss_sum"),
            ),
            ("window",),
        ),
        Table(
            "steps",
            "(step, forward)",
            (
                ATTEMPT,
                STEP,
                FORWARD,
                PHASE,
                WINDOW,
                _count("t_start_ns", "start of the forward, ns since the epoch", nullable=True),
                _count("host_ns", "wall time of the forward on the host, ns", nullable=True),
                _count("device_ns", "time of the forward on the device, ns", nullable=True),
                _count("tokens", "valid tokens"),
                _count(
                    "padding_tokens",
                    "padding, and tokens routed again (generation without a cache)",
                ),
                _key("sampled", BOOL, "per-token rows were asked for"),
                _count("lost_rows", "per-token rows lost because the writer fell behind"),
                _count("fires_expected", "MoE blocks entered"),
                _count("fires_seen", "MoE blocks whose routing was seen"),
                _count("breaches", "invariants that failed in this forward"),
            ),
            ("step", "forward"),
        ),
        Table(
            "sequences",
            "a sequence of which per-token rows are kept; the user's key columns come last",
            (
                ATTEMPT,
                _key("sequence", I64, "number of the sequence on this rank"),
                STEP,
                FORWARD,
                TAG,
                Column("request", STR, "the user's request id", nullable=True),
                Column(
                    "parent",
                    I64,
                    "sequence that it forked from (beams): it has the positions before its own",
                    nullable=True,
                ),
            ),
            (),
        ),
        Table(
            "tokens",
            "(step, forward, stream, token), sampled",
            (
                ATTEMPT,
                STEP,
                FORWARD,
                _key("stream", STR, "main; encoder, decoder; mtp0, …: each numbers its tokens"),
                TOKEN,
                _key("sequence", I64, "number of the sequence on this rank"),
                Column("position", I32, "position in the sequence, from 0", "split"),
                _key("padding", BOOL, "a padding token: routed by the model, in no count of load"),
                TAG,
                Column("token_id", I32, "vocabulary id, if asked for", "split", nullable=True),
            ),
            ("step", "forward", "stream", "token"),
            per_token=True,
        ),
        Table(
            "routing",
            "(step, forward, layer, token), sampled",
            (
                ATTEMPT,
                STEP,
                FORWARD,
                LAYER,
                TOKEN,
                Column("expert_ids", IDS, "choices, in the experts' order", "split"),
                Column(
                    "weights", FLOATS, "gate weights, same order (meta)", "split", nullable=True
                ),
                Column("next_ids", IDS, "runners-up by selection score", "split", nullable=True),
                Column(
                    "next_weights",
                    FLOATS,
                    "the gate weight each would have had if its router "
                    "score stood in the place of a chosen one",
                    "split",
                    nullable=True,
                ),
                Column("entropy", F32, "nats", "split", nullable=True),
                Column("margin", F32, "k-th minus next selection score", "split", nullable=True),
                Column("dropped", IDS, "slots that no expert computed; null: none", nullable=True),
                Column(
                    "router_ids",
                    IDS,
                    "the router's choices, where the library runs other experts (meta: faithful)",
                    "split",
                    nullable=True,
                ),
                Column(
                    "group_entropy",
                    F32,
                    "of the router's distribution over groups of experts (meta: groups), nats; "
                    "null: no groups",
                    "split",
                    nullable=True,
                ),
            ),
            ("layer", "step", "forward", "token"),
            per_token=True,
        ),
        Table(
            "outcomes",
            "what became of a token (step, forward, sequence, position); append-only",
            (
                ATTEMPT,
                _key("step", I64, "of the forward that routed it"),
                _key("forward", I32, "of the forward that routed it"),
                _key("sequence", I64, "number of the sequence on this rank"),
                Column("position", I32, "null: the whole sequence", "split", nullable=True),
                Column(
                    "kept",
                    BOOL,
                    "false: a rejected draft or superseded beam, not in the sequence that was "
                    "generated; another forward may have routed the position again",
                    nullable=True,
                ),
                Column("loss", F32, "loss of the prediction made here", "split", nullable=True),
            ),
            (),
            per_token=True,
        ),
        Table(
            "logits",
            "(step, forward, layer, token), opt-in, sampled",
            (
                ATTEMPT,
                STEP,
                FORWARD,
                LAYER,
                TOKEN,
                Column("logits", FLOATS, "router logits, rounded to bf16", "split"),
            ),
            ("layer", "step", "forward", "token"),
            per_token=True,
        ),
    )
}

BUCKET = 64
"""Windows that a row of `load_coarse` sums at most."""

LOAD_COARSE = Table(
    "load_coarse",
    f"(up to {BUCKET} windows of one phase, layer, tag, expert): `load` summed, for long runs",
    (
        ATTEMPT,
        _key("first_window", I64, "number of the first window in it"),
        _key("last_window", I64, "number of the last"),
        _key("first_step", I64, "first step of the first window"),
        _key("last_step", I64, "first step of the last window"),
        *(c for c in TABLES["load"].columns if c.packing == "dictionary" and c.name in _BY),
        *(
            Column(c.name, F64 if c.type == F32 else c.type, c.doc, c.packing, c.nullable)
            for c in TABLES["load"].columns
            if c.packing == "split"
        ),
    ),
    ("layer", "first_window"),
)
"""Beside segments of `load`, under the same number; made from them, and nothing is lost without."""

_STAGES = {
    "plan": "sorting slots by expert",
    "permute": "gathering the tokens' rows",
    "gate_up": "the first matrix product",
    "act": "SwiGLU",
    "down": "the second matrix product",
    "combine": "the weighted sum over a token's experts",
}


def _ns(name: str, doc: str, *, nullable: bool = False) -> Column:
    return Column(name, F64, doc, "split", nullable)


REPLAY = Table(
    "replay",
    "(rank, layer, step, forward) that was replayed; what it ran on, and how, stands in the file's "
    "metadata as JSON under `moe_lens`",
    (
        _key("rank", I32, "the rank whose tokens these are"),
        LAYER,
        _key("step", I64, "of the forward in the trace"),
        _key("forward", I32, "forward of the root module inside the step, from 0"),
        PHASE,
        _count("tokens", "valid tokens that were replayed"),
        _count("slots", "choices of experts that compute, before the policy"),
        _count("dropped", "of those, choices that no expert computed under the policy"),
        _count("rerouted", "of those, choices that a runner-up computed"),
        _count("touched", "experts that computed something"),
        _count("rows_min", "rows of the touched expert that has the fewest; 0: none is touched"),
        _ns("rows_median", "median rows over touched experts"),
        _count("rows_max", "rows of the expert that has the most"),
        _count("padded_rows", "rows that tiles of metadata's `tile` rows add, expert by expert"),
        _ns("time_ns", "time of the layer, ns: median of the repeats (metadata: `clock`)"),
        _ns("again_ns", "time of the same work, measured once more beside it (A/A)"),
        _ns("noise_ns", "by how much two timings of this work differ: what is below is none"),
        _ns("balanced_ns", "time of the balanced twin: as many rows, over all experts"),
        _ns("same_touched_ns", "time of the twin that has as many rows over the touched experts"),
        _ns("floor_ns", "no fused layer can be faster on this machine's ceilings"),
        _count("flop", "floating-point operations of the two matrix products"),
        _count("bytes", "bytes that must move: touched weights once, tokens in and out"),
        *(
            _ns(f"{name}_ns", f"{doc}: its own time, where it was measured", nullable=True)
            for name, doc in _STAGES.items()
        ),
        *(
            _ns(f"{name}_floor_ns", f"{doc}: its floor; 0 where another stage does it too")
            for name, doc in _STAGES.items()
        ),
    ),
    ("rank", "layer", "step", "forward"),
)
"""`RUN/replay/<name>.parquet`: what `moe-lens replay` measured."""


REPLAY_EP = Table(
    "replay_ep",
    "(placement, layer, step, forward, ep_rank): what one rank of an expert-parallel group had to "
    "do; what it ran on, and how, stands in the file's metadata as JSON under `moe_lens`",
    (
        _key("placement", STR, "contiguous, lpt, eplb, affinity, or the name of a plan's file"),
        LAYER,
        _key("step", I64, "of the forward in the trace"),
        _key("forward", I32, "forward of the root module inside the step, from 0"),
        PHASE,
        _key("ep_rank", I32, "rank of the group, from 0"),
        _key("ep_ranks", I32, "ranks of the group"),
        _key("mode", STR, "simulated: ranks timed one by one on one device; real: side by side"),
        _count("tokens", "valid tokens of the whole forward"),
        _count("rows", "rows that this rank's experts computed"),
        _count(
            "arrived",
            "tokens that reached this rank, its own too (metadata `dedup` false: "
            "one for each choice)",
        ),
        _count("touched", "slots of this rank that computed something"),
        _count("sent_rows", "rows that this rank sent to others in dispatch"),
        _count("sent_bytes", "of those, bytes"),
        _count("received_rows", "rows that this rank received from others in dispatch"),
        _count("received_bytes", "of those, bytes"),
        _ns(
            "busy_ns", "time of this rank's experts, ns: median of the repeats (metadata: `clock`)"
        ),
        _ns("wait_ns", "time that it waits for the slowest rank's experts"),
        _ns(
            "noise_ns", "by how much two timings of the slowest rank differ: what is below is none"
        ),
        _ns("dispatch_ns", "time of dispatch (metadata `exchange`: modelled, or measured)"),
        _ns("combine_ns", "time of combine, the same way"),
    ),
    ("placement", "layer", "step", "forward", "ep_rank"),
)
"""`RUN/replay_ep/<name>.parquet`: what `moe-lens replay --ep` measured."""


COUNTERFACTUAL = Table(
    "counterfactual",
    "(layer, intervention, number, sequence, position): the loss of one token under one change of "
    "one layer's routing; what was measured stands in the file's metadata as JSON under `moe_lens`",
    (
        LAYER,
        _key(
            "intervention",
            STR,
            "knock_out, force_in, runner_up, top_k: of all tokens at once; other_route: of this "
            "token alone",
        ),
        _key(
            "number",
            I32,
            "the expert of knock_out and force_in, k of top_k, which other_route; 0 of runner_up",
        ),
        _key("sequence", I64, "sequence of the batches that were measured, from 0"),
        Column("position", I32, "position of the token in its sequence", "split"),
        TAG,
        Column("base_loss", F64, "loss of the prediction made at this token, unchanged", "split"),
        Column("loss", F64, "the same under the change", "split"),
        _key("affected", BOOL, "the change gave this token itself other experts, or more or fewer"),
        Column("margin", F32, "its router's K-th minus K+1-th score, unchanged", "split", True),
        Column("entropy", F32, "of its router's distribution, nats, unchanged", "split", True),
        Column("expert_ids", IDS, "of other_route: the experts that were forced", "split", True),
    ),
    (),
)
"""`RUN/counterfactual/<name>.parquet`: what `moe-lens counterfactual` measured."""


def with_keys(keys: tuple[str, ...]) -> dict[str, Table]:
    """The tables, with the user's declared keys as string columns of `sequences`."""
    if not keys:
        return TABLES
    base = TABLES["sequences"]
    extra = tuple(Column(k, STR, "declared by the user", nullable=True) for k in keys)
    return {**TABLES, "sequences": Table(base.name, base.row, base.columns + extra, base.sort)}
