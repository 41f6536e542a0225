"""What a rank says about its trace: `meta/rank=N.json`, written whole and renamed into place."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_lens.errors import TraceError
from moe_lens.trace.layout import meta_path
from moe_lens.trace.schema import SCHEMA_VERSION


@dataclass
class LayerInfo:
    """One MoE layer as its router is configured. None: not known, never guessed."""

    layer: int
    path: str
    """Module path of the MoE block in the model."""
    experts: int
    """Routed experts; expert ids from here upward compute nothing (zero experts)."""
    top_k: int | None
    """Choices per token; None for a dynamic k or for expert choice."""
    block: int | None = None
    """Decoder block the layer belongs to."""
    role: str = "mlp"
    stream: str = "main"
    router: str = "token-choice"
    """Kind of router: token-choice, expert-choice, hash (of the token's id), dynamic-k, or task
    (the caller names the expert)."""
    adapter: str = ""
    score: str | None = None
    """How logits become probabilities: softmax; or sigmoid, sqrtsoftplus divided by their sum."""
    selection: str | None = None
    """What the router ranks experts by: logits, sigmoid+bias, softmax+groups, …; unit of margin."""
    normalised: bool | None = None
    """The weights of a token sum to one."""
    selection_bias: bool = False
    groups: int | None = None
    """Equal groups of neighbouring experts, among which a router chooses first; None: no groups."""
    top_groups: int | None = None
    """How many of them a token's experts may come from; None: of all."""
    shared_experts: int | None = None
    zero_experts: int = 0
    hidden_size: int | None = None
    intermediate_size: int | None = None
    dispatch_width: int | None = None
    """Elements per token that an all-to-all moves, where it is not `hidden_size`."""
    faithful: bool = True
    """False: this implementation runs other experts than its router chooses; `routed` counts what
    was chosen, `processed` what ran, and `router_ids` of `routing` has the choices."""
    capacity_policy: str | None = None
    """None: dropless. Otherwise how overflow is treated: drop-by-position, …"""
    weights_on: str = "output"
    """What of an expert the gate weight multiplies: its output, or its input (Llama 4)."""
    output_scale: float | None = None
    """What the block multiplies the experts' weighted sum by (in evaluation), where it is known."""
    identities: list[int | str] | None = None
    """Whose weights each of the routed experts runs, by expert id: the same identity in two layers
    is the same weights. None: every expert is its layer's own, and named `layer/expert`."""

    @property
    def named(self) -> list[str]:
        """The identity of each routed expert."""
        if self.identities is None:
            return [f"{self.layer}/{e}" for e in range(self.experts)]
        return [str(x) for x in self.identities]

    @property
    def contradiction(self) -> str | None:
        """What cannot be, of what was declared of groups and identities; None: nothing."""
        E, groups, top_groups = self.experts, self.groups, self.top_groups
        if groups is not None and (groups < 1 or E % groups):
            return f"groups must divide its {E} experts into equal parts, got {groups}"
        if top_groups is not None and groups is None:
            return f"top_groups {top_groups} is declared without groups"
        if top_groups is not None and not 1 <= top_groups <= (groups or 1):
            return f"top_groups must be 1 to its {groups} groups, got {top_groups}"
        if self.identities is not None and len(self.identities) != E:
            return f"identities name one expert each: {E} are expected, got {len(self.identities)}"
        return None


@dataclass
class Attempt:
    """One recording into the trace. A later attempt supersedes steps from its first step on."""

    attempt: int
    started_ns: int
    first_step: int | None = None
    ended_ns: int | None = None
    end: str | None = None
    """closed, failed (an exception left the `with`), recovered (sealed for a dead writer), or None
    while it is being written."""
    error: str | None = None


@dataclass
class Meta:
    """The whole of `meta/rank=N.json`."""

    run_id: str
    rank: int = 0
    world: int = 1
    coordinates: dict[str, int] = field(default_factory=dict)
    """Index of this rank along dp, tp, cp, sp, ep, pp, as far as known."""
    counts: str = "own"
    """own, or copy: another rank has the same tokens, and readers leave these out of sums."""
    model: str = ""
    layers: list[LayerInfo] = field(default_factory=list)
    never_entered: list[str] = field(default_factory=list)
    """Paths of MoE blocks that were hooked and never ran."""
    sampling: str = "none"
    """Which sequences keep per-token rows, in words."""
    weights: str = "bf16"
    """bf16 (low mantissa bits cleared), exact, or none (a format that has no weights)."""
    keys: list[str] = field(default_factory=list)
    """The user's own columns of `sequences`."""
    tags: list[str] = field(default_factory=list)
    """Tags in the order they came; from the 33rd on they are counted as `other`."""
    attempts: list[Attempt] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    """What went wrong without stopping the recording, and how often."""
    pruned: dict[str, int] = field(default_factory=dict)
    """Rows removed from a table to keep within `max_bytes`."""
    versions: dict[str, str] = field(default_factory=dict)
    imported: str = ""
    """What it was imported from: the name of a format, and of the file. Empty: recorded here."""
    steps: str = ""
    """How steps were made, where the recorder knew of none. Empty: they are as they were run."""
    lacks: dict[str, str] = field(default_factory=dict)
    """What the recorder could not see, and why: "weights", "entropy", "times", "sequences", …"""
    schema_version: int = SCHEMA_VERSION


def write_meta(run: Path, meta: Meta) -> None:
    """Replace the rank's meta file; a reader sees the old one or the new one, never a part."""
    path = meta_path(run, meta.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(asdict(meta), f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_meta(path: Path) -> Meta:
    """Read one meta file.

    Raises:
        TraceError: It is not JSON of ours, or its format is newer than this reader.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError) as e:
        raise TraceError(f"{path} is not a moe_lens meta file ({type(e).__name__}: {e})") from e
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise TraceError(
            f"{path} has trace format {version}; this moe_lens reads up to {SCHEMA_VERSION}. "
            "Upgrade moe_lens to read it."
        )
    try:
        raw["layers"] = [LayerInfo(**_known(LayerInfo, x)) for x in raw.get("layers", [])]
        named = (x for x in raw["layers"] if x.identities is not None)
        if wrong := next((x for x in named if len(x.identities or ()) != x.experts), None):
            raise TypeError(f"layer {wrong.layer}: {wrong.contradiction}")
        raw["attempts"] = [Attempt(**_known(Attempt, x)) for x in raw.get("attempts", [])]
        return Meta(**_known(Meta, raw))
    except (TypeError, AttributeError) as e:
        raise TraceError(f"{path} is damaged: {e}") from e


def _known(cls: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Fields this version knows; a later minor version may have added others."""
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in raw.items() if k in names}
