"""Traces with known truth: routing in which everything that metrics look for was planted.

`Spec` says what is planted, `generate` writes it as a trace through the project's own writer and
returns the `Truth`, `counts` gives the same choices per expert without writing anything, `events`
what a writer is handed.
"""

from moe_lens.trace.synthetic.expected import Expected
from moe_lens.trace.synthetic.plants import Committee, Dead, Hot, Pair, Specialist
from moe_lens.trace.synthetic.presets import balanced, bursty, drifting, everything, stationary
from moe_lens.trace.synthetic.run import counts, events, generate
from moe_lens.trace.synthetic.spec import Burst, Domain, Drift, Spec
from moe_lens.trace.synthetic.truth import Truth

__all__ = [
    "Burst",
    "Committee",
    "Dead",
    "Domain",
    "Drift",
    "Expected",
    "Hot",
    "Pair",
    "Spec",
    "Specialist",
    "Truth",
    "balanced",
    "bursty",
    "counts",
    "drifting",
    "events",
    "everything",
    "generate",
    "stationary",
]
