"""What of a trace is exported."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc

from moe_lens.errors import ExportRefused
from moe_lens.replay import tables
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles


@dataclass(frozen=True)
class Selection:
    """None: all of it.

    Attributes:
        layers: Only these; otherwise all of the main stream.
        phase: Only forwards of this one.
        steps: Only forwards of these.
        tag: Only tokens of this one.
    """

    layers: frozenset[int] | None = None
    phase: str | None = None
    steps: range | None = None
    tag: str | None = None

    def rows(self) -> pc.Expression:
        """Rows of this phase, of these steps."""
        only = pc.scalar(True)
        if self.phase is not None:
            only = pc.field("phase") == self.phase
        if self.steps is not None:
            only = only & (pc.field("step") >= self.steps.start)
            only = only & (pc.field("step") < self.steps.stop)
        return only

    def said(self, files: RunFiles) -> str:
        """What was asked for, and what there is, after a noun."""
        words = [f"of phase {self.phase!r}"] if self.phase is not None else []
        if self.steps is not None:
            words.append(f"of steps {self.steps.start} to {self.steps.stop - 1}")
        if self.tag is not None:
            words.append(f"of tag {self.tag!r}")
        phases: set[str] = set()
        for rank in tables.ranks(files):
            found = tables.rows(files, "steps", rank, ("phase",))
            phases.update(found["phase"].unique().to_pylist())
        tags = sorted({tag for meta in files.metas.values() for tag in meta.tags})
        there = f"; its phases are {', '.join(sorted(phases))}" if phases else ""
        asked = "".join(f" {word}" for word in words)
        return asked + there + (f", its tags {', '.join(tags)}" if tags else "")


def layers_of(files: RunFiles, selection: Selection) -> list[LayerInfo]:
    """The layers that are exported, in their order.

    Raises:
        ExportRefused: There are none, or no such layer.
    """
    found = {info.layer: info for rank in tables.ranks(files) for info in files.metas[rank].layers}
    if selection.layers is None:
        main = [n for n, info in found.items() if info.stream == "main"]
        wanted = set(main or found)
    else:
        wanted = set(selection.layers)
    if unknown := wanted - set(found):
        raise ExportRefused(
            f"{files.path} has no layer {min(unknown)}: its layers go up to "
            f"{max(found, default=-1)}."
        )
    if not wanted:
        raise ExportRefused(f"{files.path} has no MoE layers.")
    return [found[n] for n in sorted(wanted)]


def blocks_of(infos: list[LayerInfo], blocks: int | None, path: object) -> tuple[list[int], int]:
    """The decoder block of each layer, and how many blocks engines' arrays have.

    Args:
        infos: The layers.
        blocks: Of the model; None: up to the last with experts.
        path: Of the trace, for errors.

    Raises:
        ExportRefused: A block is not known, or is beyond the model's.
    """
    of = [info.block for info in infos]
    unknown = [info.layer for info in infos if info.block is None]
    known = [block for block in of if block is not None]
    if unknown or len(set(known)) < len(infos):
        raise ExportRefused(
            f"{path}: the trace does not know in which decoder block each layer is (layer "
            f"{unknown[0] if unknown else infos[-1].layer}), and engines number them by decoder "
            "blocks: export --format eplb or npy, and lay them out yourself."
        )
    count = 1 + max(known) if blocks is None else blocks
    if count <= max(known):
        raise ExportRefused(
            f"{path}: a layer is in decoder block {max(known)}, but --blocks says {count} of them."
        )
    return known, count
