"""What the catalogue is given of one layer of a synthetic trace."""

from __future__ import annotations

from pathlib import Path

from moe_lens.metrics.catalogue import metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.queries.evidence import evidence
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.synthetic import Spec, generate


def layer_of(spec: Spec, path: Path, group: str, layer: int = 0) -> Evidence:
    """Written to `path`, and read as the metrics of a group need it."""
    generate(path, spec)
    asked = [m for m in metrics().values() if m.group == group]
    with open_trace(path) as trace:
        run = one_run(trace)
        return evidence(trace, run, run.layers[layer], spec.phases[0], asked)
