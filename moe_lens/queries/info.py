"""What a trace holds, at a glance: the answer of `Trace.info()`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_lens.lacking import no_rows
from moe_lens.queries.about import reachable_bits
from moe_lens.trace.schema import BUCKET

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo
    from moe_lens.trace.reader import RunFiles


_POINTS = 240
"""Buckets over time that a line is drawn from at most."""

_COARSE_POINTS = 100
"""The same for whole runs that are drawn from `load_coarse`."""

_CELLS = 1_000_000
"""Steps x layers x experts above which whole runs are drawn from `load_coarse`."""


@dataclass
class RunInfo:
    """One run. Counts leave out ranks that are copies, and overtaken attempts."""

    run: str
    path: str
    model: str
    ranks: list[int]
    missing_ranks: list[int]
    layers: list[LayerInfo]
    phases: list[str]
    steps: int
    first_step: int | None
    last_step: int | None
    forwards: int
    """Forwards of the root module, summed over ranks."""
    tokens: int
    """Valid tokens, summed over ranks."""
    padding_tokens: int
    token_rows: int
    """Rows of `tokens`: those kept one by one."""
    sampling: str
    weights: str
    """Codec of the kept gate weights: bf16 or exact; none where there are none."""
    lost_rows: int
    breaches: int
    fires_expected: int
    fires_seen: int
    attempts: int
    ending: str | None
    """closed, failed, recovered; None while a writer is at it, or died."""
    unfinished: bool
    last_write_seconds: float | None
    """Age of the newest write to an open stream, seconds."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes on disk by table."""
    warnings: dict[str, int] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    """Rows removed by table, to keep within `max_bytes`."""
    never_entered: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Segments left out, and why."""
    error: str | None = None
    """The exception that ended the recording."""
    imported: str = ""
    """What it was imported from: format and file."""
    made_steps: str = ""
    """How steps were made, where the recorder knew of none."""
    lacks: dict[str, str] = field(default_factory=dict)
    """What the recorder could not see, and why."""

    @property
    def knows_drops(self) -> bool:
        """Whether it was seen what became of choices; other recorders keep what routers chose."""
        return not self.imported

    @property
    def no_rows(self) -> str:
        """Why nothing can be said of single tokens; empty: it can."""
        return "" if self.token_rows else no_rows(self, unowned=self._unowned)

    @property
    def _unowned(self) -> bool:
        """Routing of single tokens is there, but not whose tokens they are."""
        return self.token_rows == 0 and "routing" in self.bytes

    @property
    def kept(self) -> str:
        """Rows of single tokens, in words."""
        if self._unowned:
            return "choices of single tokens, of unknown sequences"
        if self.imported and not self.token_rows:
            return "no rows of single tokens"
        return f"{self.token_rows:,} kept one by one ({self.sampling})"

    @property
    def shape(self) -> str:
        """Layers x experts x top-k in words; several where layers differ."""
        kinds = Counter((x.experts, x.top_k) for x in self.layers)
        parts = []
        for (experts, top_k), n in kinds.items():
            choice = "no fixed k" if top_k is None else f"top-{top_k}"
            parts.append(f"{n} layer{'s' * (n != 1)} × {experts} experts × {choice}")
        return ", ".join(parts) or "no MoE layers known"

    @property
    def grouped(self) -> str:
        """The groups that routers choose among first, and what that leaves; empty: no groups."""
        kinds = Counter(map(_limit, self.layers))
        parts = (f"{n} layer{'s' * (n != 1)} × {text}" for text, n in kinds.items() if text)
        return ", ".join(parts)

    @property
    def shared(self) -> str:
        """How many experts there really are, where layers run the same weights; empty: they do not.

        Layers of unknown identities count as their own.
        """
        if all(x.identities is None for x in self.layers):
            return ""
        places = sum(x.experts for x in self.layers)
        experts = len({name for x in self.layers for name in x.named})
        return f"{experts:,} experts in {places:,} places of {len(self.layers)} layers"

    def every(self, first_step: int | None = None, last_step: int | None = None) -> int:
        """Steps per bucket of a line over time that is readable, and quick to ask for.

        1, 2 or 5 times a power of ten, so that bounds are round. Of a long run as a whole a
        multiple of what the coarse rollup has, and fewer buckets: summing its counts step by step
        would take seconds.

        Args:
            first_step: The first step that is asked for; None: the run's.
            last_step: The last; None: the run's.
        """
        whole = first_step is None and last_step is None
        first = self.first_step or 0 if first_step is None else first_step
        last = self.last_step or 0 if last_step is None else last_step
        steps, every = last - first + 1, 1
        cells = self.steps * sum(x.experts for x in self.layers)
        if whole and cells > _CELLS:
            every = BUCKET
            while steps / every > _COARSE_POINTS:
                every *= 2
            return every
        for factor in (2, 5, 10) * 7:
            if steps / every <= _POINTS:
                break
            every = factor * 10 ** (len(str(every)) - 1)
        return every

    @property
    def state(self) -> str:
        """Whether the recording has ended, and how."""
        if self.unfinished:
            age = self.last_write_seconds
            when = "" if age is None else f", last written {age:,.0f} s ago"
            return f"open{when} (if its writer died: moe-lens recover)"
        return f"{self.ending or 'not started'}{f' ({self.error})' if self.error else ''}"

    def lines(self) -> list[tuple[str, str]]:
        """Labelled facts for people, without those that are empty."""
        span = "" if self.first_step is None else f" ({self.first_step:,} to {self.last_step:,})"
        disk = ", ".join(f"{table} {size(n)}" for table, n in sorted(self.bytes.items()))
        lacks = enumerate(self.lacks.items())
        facts = [
            ("path", self.path),
            ("imported", self.imported),
            ("model", self.model),
            ("routers", self.shape),
            ("groups", self.grouped),
            ("shared weights", self.shared),
            ("state", self.state),
            ("attempts", f"{self.attempts:,}" if self.attempts > 1 else ""),
            ("ranks", f"{len(self.ranks):,}"),
            ("missing ranks", ", ".join(map(str, self.missing_ranks))),
            ("steps", f"{self.steps:,}{span}{f', {self.made_steps}' if self.made_steps else ''}"),
            ("forwards", f"{self.forwards:,}"),
            ("phases", ", ".join(self.phases)),
            ("tokens", self._tokens()),
            ("token rows", self._token_rows()),
            *(() if self.imported else self._capture()),
            ("disk", f"{size(sum(self.bytes.values()))}: {disk}" if disk else "0 bytes"),
            ("pruned rows", ", ".join(f"{t} {n:,}" for t, n in self.pruned.items())),
            ("never entered", ", ".join(self.never_entered)),
            ("warnings", "; ".join(f"{text} ({n:,}×)" for text, n in self.warnings.items())),
            ("damaged", "; ".join(f"{path}: {why}" for path, why in self.damaged.items())),
            *(("lacks" if i == 0 else "", f"{what}: {why}") for i, (what, why) in lacks),
        ]
        return [(label, text) for label, text in facts if text]

    def _tokens(self) -> str:
        if self.imported and not self.padding_tokens:
            return f"{self.tokens:,}"  # whether some were padding is not known
        return f"{self.tokens:,} (and {self.padding_tokens:,} of padding)"

    def _token_rows(self) -> str:
        weights = "no weights" if self.weights == "none" else f"{self.weights} weights"
        if self._unowned:
            return f"{self.kept} ({weights})"
        return f"{self.token_rows:,} (kept: {self.sampling}; {weights})"

    def _capture(self) -> tuple[tuple[str, str], ...]:
        """What a recorder of ours says of itself."""
        return (
            ("lost rows", f"{self.lost_rows:,}"),
            ("breaches", f"{self.breaches:,}"),
            ("fires", f"{self.fires_seen:,} seen of {self.fires_expected:,} expected"),
        )


@dataclass
class Info:
    """What `Trace.info()` returns; prints as a page."""

    runs: list[RunInfo]

    def __repr__(self) -> str:
        blocks = []
        for run in self.runs:
            lines = run.lines()
            width = max(len(label) for label, _ in lines)
            blocks.append("\n".join([run.run] + [f"  {a.ljust(width)}  {b}" for a, b in lines]))
        return "\n\n".join(blocks)


def run_info(name: str, files: RunFiles, totals: Mapping[str, Any]) -> RunInfo:
    """Put together what the files say and what the stored question `run_totals` counted."""
    metas = list(files.metas.values())
    last = files.meta.attempts[-1] if files.meta.attempts else None
    layers = {x.layer: x for m in reversed(metas) for x in m.layers}
    return RunInfo(
        run=name,
        path=str(files.path),
        model=files.meta.model,
        ranks=sorted(files.metas),
        missing_ranks=files.missing_ranks,
        layers=[layers[i] for i in sorted(layers)],
        phases=sorted(filter(None, (totals["phases"] or "").split("\n")), key=phase_order),
        first_step=totals["first_step"],
        last_step=totals["last_step"],
        sampling=files.meta.sampling,
        weights=files.meta.weights,
        attempts=max(len(m.attempts) for m in metas),
        ending=last.end if last else None,
        error=last.error if last else None,
        unfinished=files.unfinished,
        last_write_seconds=(
            time.time() - files.last_write_ns / 1e9 if files.last_write_ns else None
        ),
        bytes=dict(files.bytes),
        warnings=_total(m.warnings for m in metas),
        pruned=_total(m.pruned for m in metas),
        never_entered=list(dict.fromkeys(p for m in metas for p in m.never_entered)),
        damaged={str(p): why for p, why in files.damaged.items()},
        imported=files.meta.imported,
        made_steps=files.meta.steps,
        lacks={what: why for m in reversed(metas) for what, why in m.lacks.items()},
        **{name: int(totals[name] or 0) for name in _COUNTED},
    )


def _limit(layer: LayerInfo) -> str:
    """The groups of one layer in words; empty: there are none."""
    groups, experts, top_groups = layer.groups or 1, layer.experts, layer.top_groups
    if groups == 1 or layer.contradiction is not None:
        return ""
    limit = "" if top_groups in (None, groups) else f", a token's from {top_groups} of them"
    bits, text = reachable_bits(layer), f"{groups} groups of {experts // groups}{limit}"
    if bits is None or layer.top_k is None:
        return text
    free = math.log2(math.comb(experts, layer.top_k))
    return f"{text}: 2^{bits:.2f} sets of {layer.top_k} experts within reach, of 2^{free:.2f}"


_COUNTED = (
    "steps",
    "forwards",
    "tokens",
    "padding_tokens",
    "token_rows",
    "lost_rows",
    "breaches",
    "fires_expected",
    "fires_seen",
)


def phase_order(phase: str) -> tuple[int, str]:
    """Sort key: the four phases in the order of a model's life, then the user's own."""
    known = ("train", "eval", "prefill", "decode")
    return (known.index(phase) if phase in known else len(known), phase)


def size(n: float) -> str:
    """Bytes for people, in powers of 1,000."""
    if n < 1000:
        return f"{n:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 999.5:
            return f"{n:.3g} {unit}"
    return f"{n / 1000:,.3g} TB"


def _total(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
