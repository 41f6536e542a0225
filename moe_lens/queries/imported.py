"""What an imported trace does not tell, where its tables hold zeros or nothing.

`reasons` says why, for the fields of `Evidence`; `no_drops` takes zeros out of answers: other
recorders keep what routers chose, not what became of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.lacking import not_there

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.queries.info import RunInfo

_OF_ROUTERS = ("router_confidence", "token_entropy", "top1_prob", "margin", "z_loss")
_MISSING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no sums of router probabilities": (("entropy",), ("prob_V",)),
    "no router probabilities of single forwards": (("entropy",), ("prob_FV",)),
    "no sums of entropy, margin and z-loss": (("entropy",), _OF_ROUTERS),
    "no router logits of single tokens": (("logits", "entropy"), ("logits_TV", "prob_TV")),
    "no margins of single tokens": (("entropy",), ("margin_N",)),
    "no sums of gate weights": (("weights",), ("gate_E",)),
    "no gate weights": (("weights",), ("weight_TV", "weights_NK")),
    "no gate weights, which would tell a token's first choice": (("weights",), ("ranked",)),
    "no drops": (
        ("drops",),
        ("dropped_tokens", "overflowed_FE", "capacity_F", "dropped_TV", "dropped_N"),
    ),
    "no token ids": (("token ids",), ("token_id_N",)),
    "no losses of single tokens": (("losses",), ("loss_N",)),
}
"""What is missing: keys of `lacks` that say why, and fields, or metrics, that it concerns."""


def reasons(run: RunInfo) -> dict[str, str]:
    """By field of `Evidence`, and by metric where a field is there and its number is not.

    Empty for a trace that was recorded: what could have been recorded, the metrics say themselves.
    """
    if not run.imported:
        return {}
    found = {
        name: f"{missing}: {not_there(run, *keys)}"
        for missing, (keys, names) in _MISSING.items()
        for name in names
    }
    if run.no_rows:
        of_tokens = ("logits_TV", "prob_TV", "margin_N", "weight_TV", "weights_NK", "ranked",
                     "dropped_TV", "dropped_N", "token_id_N", "loss_N")  # fmt: skip
        found |= dict.fromkeys(of_tokens, run.no_rows)
    return found


_OF_DROPS = frozenset(
    ("overflowed", "dropped", "unserved", "unserved_tokens", "rerouted_in", "overflow_rate",
     "dropped_rate", "unserved_rate")
)  # fmt: skip


def no_drops(table: pd.DataFrame, run: RunInfo) -> pd.DataFrame:
    """The answer of a stored question, with null where the run does not tell what was dropped."""
    if run.knows_drops or table.empty:
        return table
    # Numbers alone: `dropped` is also a list of slots, and what some answers are grouped by.
    there = [x for x in table.columns if x in _OF_DROPS and table[x].dtype.kind in "if"]
    return table.assign(**dict.fromkeys(there, float("nan")))
