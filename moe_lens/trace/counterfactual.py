"""The file that `counterfactual` leaves: `RUN/counterfactual/<name>.parquet`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_lens.trace.measured import Measured, read_measured
from moe_lens.trace.schema import COUNTERFACTUAL


@dataclass(frozen=True, repr=False)
class Counterfactual(Measured):
    """What was measured: `RUN/counterfactual/<name>.parquet`.

    A row a token and change (`moe_lens.trace.schema.COUNTERFACTUAL`);
    `moe_lens.metrics.counterfactual` makes tables of its `columns()`.
    """


def read_result(run: Path, name: str) -> Counterfactual:
    """A result that lies in a run; what an interrupted measurement left, if there is no other.

    Raises:
        TraceError: There is none.
    """
    return Counterfactual(*read_measured(run, COUNTERFACTUAL, name))
