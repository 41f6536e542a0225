"""The catalogue of routing metrics: what each one is, and the function that computes it.

A metric is a pure function in the module of its group (`GROUPS`). Its parameters name what it
reads, as fields of `Evidence`; what it is stands once, in its decorator and docstring, and
docs/metrics.md is made from that (`python -m moe_lens.metrics.page`). Functions of counts take any
leading axes before E, so that their null is the same function on draws of a uniform router.

A further metric is a function with this decorator. What it reads that is not there yet is a field
of `Evidence`, a line of `evidence.DATA`, and a reader in `moe_lens.queries.evidence`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from moe_lens.metrics.chance import Chance, of_draws
from moe_lens.metrics.evidence import DATA, Evidence

GROUPS = (
    "balance",
    "confidence",
    "losses",
    "capacity",
    "quality",
    "transitions",
    "configurations",
    "specialisation",
    "coactivation",
    "locality",
)
"""Each a module of metrics."""

_DRAWN = {
    "counts_E": "draws_RE",
    "counts_FE": "draws_RFE",
    "sets_M": "set_draws_RM",
    "counts_GE": "draws_RGE",
    "tagged_GE": "moved_RGE",
    "placed_BE": "turned_RBE",
}
"""What stands for counts in a null."""
_BEHIND = {
    "draws_RE": ("counts_E", "tokens"),
    "draws_RFE": ("counts_FE", "tokens_F"),
    "moves": ("ids_NK", "ranked", "before_NK"),
    "prefetched": ("ids_NK", "before_NK", "sequence_N", "top_k"),
    "reachable_sets": ("group_limit", "top_k"),
    "sets_M": ("ids_NK",),
    "set_draws_RM": ("ids_NK", "group_limit"),
    "draws_RGE": ("counts_GE", "tokens_G"),
    "tagged_GE": ("ids_NK", "tag_N", "tags"),
    "moved_RGE": ("ids_NK", "tag_N", "tags", "sequence_N"),
    "placed_BE": ("ids_NK", "position_N"),
    "turned_RBE": ("ids_NK", "position_N", "sequence_N"),
    "of_ids": ("ids_NK", "token_id_N", "sequence_N"),
    "ranked_ids": ("ids_NK", "ranked", "token_id_N", "sequence_N"),
    "ranked_sequences": ("ids_NK", "ranked", "position_N", "sequence_N"),
    "given_ids_R": ("ids_NK", "token_id_N", "sequence_N", "tag_N", "tags"),
}
"""What draws are made of."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a layer.

    Attributes:
        name: As on the command line.
        group: One of `GROUPS`.
        formula: Plain text.
        range: What it can be.
        unit: Empty: a ratio.
        diagnoses: What its value tells.
        source: Paper or tool that defines it; empty: plain statistics.
        null: What chance gives, in words.
        function: Of fields of `Evidence`; NaN or None: there is no such number.
        drawn: The null is the function on draws of a uniform router.
        chance: Or else the null; None: there is none.
    """

    name: str
    group: str
    formula: str
    range: str
    unit: str
    diagnoses: str
    source: str
    null: str
    function: Callable[..., Any]
    drawn: bool = False
    chance: Callable[..., Chance] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of `Evidence` that its value needs."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def needs(self) -> frozenset[str]:
        """The fields that its value and its null are made of."""
        of_null = _parameters(self.chance) if self.chance is not None else ()
        names = {*self.reads, *of_null}
        names |= {_DRAWN[name] for name in self.reads if self.drawn and name in _DRAWN}
        return frozenset(names.union(*(_BEHIND.get(name, ()) for name in names)))

    @property
    def level(self) -> str:
        """Codes of the data it needs, as `LEVELS` says; C stands only by itself."""
        codes = {DATA[name].level for name in self.reads} - {"C"}
        return "".join(sorted(codes)) or "C"

    def value(self, evidence: Evidence) -> float:
        """Of a layer; NaN where there is no such number.

        Raises:
            KeyError: Something that it reads was not recorded: the field's name.
        """
        return _number(self.function(**_read(self.reads, evidence)))

    def by_chance(self, evidence: Evidence) -> Chance | None:
        """What chance gives there; None where that is not known."""
        try:
            if self.drawn:
                names = {name: _DRAWN.get(name, name) for name in self.reads}
                read = _read(tuple(names.values()), evidence)
                return of_draws(self.function(**{n: read[d] for n, d in names.items()}))
            if self.chance is not None:
                return self.chance(**_read(_parameters(self.chance), evidence))
        except KeyError:
            return None
        return None


METRICS: dict[str, Metric] = {}
"""By name; filled when the modules of metrics are imported: `metrics()`."""


def metric(
    *,
    group: str,
    formula: str,
    range: str,
    null: str,
    unit: str = "",
    source: str = "",
    drawn: bool = False,
    chance: Callable[..., Chance] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function into the catalogue, and leave it as it is.

    Its name is the metric's; its docstring says what the metric tells.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = Metric(
            name=function.__name__, group=group, formula=formula, range=range, unit=unit,
            diagnoses=_told(function),
            source=source, null=null, function=function, drawn=drawn, chance=chance,
        )  # fmt: skip
        assert made.name not in METRICS, made
        assert made.needs <= set(DATA), made
        METRICS[made.name] = made
        return function

    return register


def metrics() -> Mapping[str, Metric]:
    """The whole catalogue, group by group."""
    for group in GROUPS:
        import_module(f"moe_lens.metrics.{group}")  # its metrics register themselves
    return {m.name: m for group in GROUPS for m in METRICS.values() if m.group == group}


@dataclass(frozen=True)
class Measured:
    """A metric of a layer: its value beside chance, or what is lacking."""

    metric: Metric
    value: float
    chance: Chance | None = None
    lacks: str = ""

    @property
    def beyond(self) -> str:
        """`high` or `low`: beyond what chance gives; else nothing."""
        return "" if self.chance is None or self.lacks else self.chance.beyond(self.value)


def measure(asked: Metric, evidence: Evidence) -> Measured:
    """A metric of a layer."""
    try:
        value = asked.value(evidence)
    except KeyError as e:
        return Measured(asked, math.nan, lacks=_reason(str(e.args[0]), evidence))
    if math.isnan(value):
        return Measured(asked, value, lacks=_undefined(asked, evidence))
    return Measured(asked, value, asked.by_chance(evidence))


def _reason(name: str, evidence: Evidence) -> str:
    """Why it is null: of what it is made of, the first that is."""
    null = [each for each in _BEHIND.get(name, ()) if getattr(evidence, each) is None]
    return evidence.reason(null[0] if null else name)


def _undefined(asked: Metric, evidence: Evidence) -> str:
    return evidence.why.get(asked.name, "the formula has no value for these numbers")


def _read(names: tuple[str, ...], evidence: Evidence) -> dict[str, Any]:
    read = {name: getattr(evidence, name) for name in names}
    for name, value in read.items():
        if value is None:
            raise KeyError(name)
    return read


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _told(function: Callable[..., Any]) -> str:
    """The docstring on one line, without the paragraph that says where the metric is computed."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return " ".join(" ".join(p.split()) for p in paragraphs if not p.startswith("Home: "))


def _number(value: Any) -> float:
    return math.nan if value is None else float(np.asarray(value))
