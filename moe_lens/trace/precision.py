"""The file that `precision` leaves, and its columns: `RUN/precision/<name>.parquet`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from moe_lens.trace.measured import Measured, read_measured
from moe_lens.trace.schema import F32, F64, I32, I64, LAYER, STR, Column, Table


def _number(name: str, doc: str, type_: pa.DataType = F64) -> Column:
    return Column(name, type_, doc, "split", nullable=True)


PRECISION = Table(
    "precision",
    "(format, part, mode, layer, sequence, position): what rounding weights to a format did to one "
    "token at one layer; or with mode weights (format, part, layer, expert): how far the weights "
    "themselves moved; what was measured stands in the file's metadata as JSON under `moe_lens`",
    (
        Column("format", STR, "what weights were rounded to: int8, int4, fp8, …"),
        Column("part", STR, "whose weights: router, experts, both"),
        Column(
            "mode",
            STR,
            "alone: this layer's, all others are as they were; free: those of all layers; forced: "
            "those of all layers, and each layer is given the experts it chose before; weights",
        ),
        LAYER,
        Column("expert", I32, "of mode weights: the expert; null: the router", nullable=True),
        Column("sequence", I64, "sequence of the batches, from 0", nullable=True),
        _number("position", "position of the token in its sequence", I32),
        Column("tag", STR, "the user's slice", nullable=True),
        _number("base_loss", "loss of the prediction made at this token, nothing rounded"),
        _number("loss", "the same in this mode: of all rounded layers at once but in alone"),
        _number("agreement", "share of the experts chosen before that its router chooses now", F32),
        _number("kl", "divergence of its router's distribution from that before, nats", F32),
        _number("margin", "its router's K-th minus K+1-th score, nothing rounded", F32),
        _number("error", "squared change of the weights by their squared size"),
        _number("outlier", "largest weight by standard deviation, of the worst matrix"),
        _number("usage", "share of the tokens that choose this expert, nothing rounded"),
    ),
    (),
)


@dataclass(frozen=True, repr=False)
class Precision(Measured):
    """What was measured: `RUN/precision/<name>.parquet`.

    A row a token and layer with rounded weights, and a row an expert's weights (`PRECISION`);
    `moe_lens.metrics.precision` makes tables of its `columns()`.
    """


def read_result(run: Path, name: str) -> Precision:
    """A result that lies in a run; what an interrupted measurement left, if there is no other.

    Raises:
        TraceError: There is none.
    """
    return Precision(*read_measured(run, PRECISION, name))
