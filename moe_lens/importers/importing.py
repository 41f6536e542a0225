"""`import_trace`: another recorder's file becomes a trace, whole or not at all."""

from __future__ import annotations

import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moe_lens.errors import ImportRefused, TraceLocked, TraceWriteError
from moe_lens.importers.batching import Batcher, Batching
from moe_lens.importers.checks import check_text
from moe_lens.importers.formats import format_named, format_of
from moe_lens.importers.source import Counted, Given, Item, Pass, Rank, Sequence, Source
from moe_lens.importers.writing import RankWriter
from moe_lens.trace.layout import ranks as ranks_of
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.schema import UNTAGGED

MOST_EXPERTS = 1 << 20
"""Of a layer: a number above is a damaged one, and counts of so many would fill the memory."""

_EXPORTED = ("index.json", "arrays")
"""What a folder holds that was exported as arrays."""


@dataclass
class Imported:
    """What was written.

    Attributes:
        run: The trace.
        format: Name of the format it was read in.
        passes: Forwards, of all ranks.
        tokens: Valid tokens, of all ranks.
        token_layers: Tokens times the layers that routed them.
        sequences: Sequences that were laid into made-up forwards; 0: the file knew forwards.
        steps: How steps were made; "": as they were recorded.
        lacks: What the format does not hold, and why.
        notes: What was taken note of, and how often.
    """

    run: Path
    format: str
    passes: int = 0
    tokens: int = 0
    token_layers: int = 0
    sequences: int = 0
    steps: str = ""
    lacks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


def import_trace(
    path: Path | str,
    out: Path | str,
    *,
    format: str | None = None,
    given: Given | None = None,
    batching: Batching | None = None,
    force: bool = False,
    on_progress: Callable[[Imported], None] = lambda _: None,
) -> Imported:
    """Read what another tool recorded and write it as a trace.

    It is written beside `out` and renamed when all is well: a file that is refused, a full disk or
    a kill leave no half of a trace behind.

    Args:
        path: A file, or the folder of a dump's files.
        out: Folder of the trace.
        format: A name of `moe_lens.importers.formats.FORMATS`; None: found out.
        given: What the file does not say itself.
        batching: The forwards that are made for sequences that know of none; see `Batching`.
        force: Replace a trace that is there.
        on_progress: Called after each pass with what was done so far.

    Raises:
        ImportRefused: The file is damaged, ambiguous, or a fact is missing that it does not hold;
            or something lies at `out`.
        TraceLocked: A living process writes `out`.
        TraceWriteError: The disk refuses.
    """
    path, out = Path(path), Path(out)
    given = given or Given()
    check_text(given.tag, "tag", "--tag")
    check_out(out, force=force)
    if not path.exists():
        raise ImportRefused(f"{path} does not exist.")
    if path.resolve().is_relative_to(out.resolve()):
        raise ImportRefused(f"{path} lies in {out}, which would be replaced: name another folder.")
    if (path / _EXPORTED[0]).is_file() and (path / _EXPORTED[1]).is_dir():
        raise ImportRefused(
            f"{path} is what moe-lens export --format npy writes: its routing is in "
            f"{path / _EXPORTED[1]}. Import that folder, and say --experts."
        )
    name = format or format_of(path)
    source = format_named(name).open_source(path, given)
    _check_source(source, path)
    source.layers = [_told(info, given) for info in source.layers]
    part = _place_beside(out)
    done = Imported(out, name, lacks=dict(source.lacks), notes=dict(source.notes))
    run_id = uuid.uuid4().hex
    try:
        for rank in source.ranks:
            meta = _meta(source, rank, name, path, run_id, given)
            _import_rank(part, meta, rank, batching or Batching(), given, done, on_progress)
        if not done.passes:
            raise ImportRefused(f"{path} holds no token.")
        _put_in_place(part, out)
    except OSError as e:
        raise TraceWriteError(f"cannot write the trace {out}: {e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone already, where all went well
    return done


def _put_in_place(part: Path, out: Path) -> None:
    """Rename; a trace that is there goes only when the new one stands in its place."""
    before = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(before, ignore_errors=True)  # of an import that was killed just here
    if out.exists():
        out.rename(before)
    try:
        part.rename(out)
    except OSError:
        if before.exists():
            before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse a place where something lies that must stay.

    Raises:
        ImportRefused: Something is there, and `force` is off or it is no trace.
        TraceLocked: A living process writes it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ranks = ranks_of(out) if out.is_dir() and not out.is_symlink() else []
    if not ranks:
        raise ImportRefused(f"{out} exists and is not a trace: name another folder.")
    if not force:
        raise ImportRefused(
            f"{out} holds a trace already: replace it with --force, or name another folder."
        )
    for rank in ranks:
        RankLock(out, rank).release()


def _place_beside(out: Path) -> Path:
    """An empty folder on the same disk; what an import that was killed left there goes."""
    part = out.with_name(f".{out.name}.importing")
    try:
        if part.exists():
            for rank in ranks_of(part):
                RankLock(part, rank).release()
            shutil.rmtree(part)
        part.mkdir(parents=True)
    except TraceLocked as e:
        raise TraceLocked(f"another process imports into {out} just now.") from e
    except OSError as e:
        raise TraceWriteError(f"cannot write the trace {out}: {e}") from e
    return part


def _check_source(source: Source, path: Path) -> None:
    if not source.layers:
        raise ImportRefused(f"{path} has no layer with experts.")
    if [x.layer for x in source.layers] != list(range(len(source.layers))):
        raise AssertionError("a reader numbers its layers 0, 1, …")
    for info in source.layers:
        most = info.experts + info.zero_experts
        if not 1 <= (most if info.top_k is None else info.top_k) <= most <= MOST_EXPERTS:
            k = "any number" if info.top_k is None else f"top-{info.top_k}"
            raise ImportRefused(f"{path}: {info.path}: {k} of {most} experts.")
    numbers = [x.rank for x in source.ranks]
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        raise ImportRefused(f"{path}: two files are of rank {twice[0]}.")


def _told(info: LayerInfo, given: Given) -> LayerInfo:
    """A layer with what the user says and the file does not."""
    said = {n: getattr(given, n) for n in ("hidden_size", "intermediate_size", "score")}
    return replace(info, **{n: v for n, v in said.items() if getattr(info, n) is None})


def _meta(source: Source, rank: Rank, name: str, path: Path, run_id: str, given: Given) -> Meta:
    return Meta(
        run_id=run_id,
        rank=rank.rank,
        world=max(len(source.ranks), 1 + max(x.rank for x in source.ranks)),
        counts="copy" if rank.copy else "own",
        model=source.model or given.model or "",
        layers=source.layers,
        weights="exact",
        attempts=[Attempt(0, time.time_ns())],
        warnings=dict(source.notes) if rank is source.ranks[0] else {},
        versions={"python": platform.python_version(), "numpy": np.__version__},
        imported=f"{name}: {path.name}",
        lacks=dict(source.lacks),
    )


def _import_rank(
    part: Path,
    meta: Meta,
    rank: Rank,
    batching: Batching,
    given: Given,
    done: Imported,
    on_progress: Callable[[Imported], None],
) -> None:
    tag = given.tag or UNTAGGED
    writer = RankWriter(part, meta, str(rank.path), tag=tag)
    error: BaseException | None = None
    before = (done.passes, done.tokens, done.token_layers)
    try:
        for item in _passes(rank.items(), meta, batching, given, done):
            writer.put(item)
            done.passes = before[0] + writer.passes
            if not rank.copy:
                done.tokens = before[1] + writer.tokens
                done.token_layers = before[2] + writer.token_layers
            on_progress(done)

        def end(meta: Meta) -> None:
            meta.sampling = "every sequence" if writer.rows else "none"
            meta.steps = done.steps

        writer.edit(end)
    except BaseException as e:
        error = e
        raise
    finally:
        writer.close(error)


def _passes(
    items: Iterator[Item], meta: Meta, batching: Batching, given: Given, done: Imported
) -> Iterator[Pass | Counted]:
    """Items as passes; sequences are laid into made-up ones."""
    batcher: Batcher | None = None
    for item in items:
        if isinstance(item, Sequence):
            if batcher is None:
                batcher = Batcher(
                    batching, [x.layer for x in meta.layers], untagged=given.tag or UNTAGGED
                )
                done.steps = str(batching)
            done.sequences += 1
            passes: Iterator[Pass | Counted] = batcher.add(item)
        else:
            passes = iter((item,))
        for each in passes:
            yield _phased(each, given)
    if batcher is not None:
        for each in batcher.rest():
            yield _phased(each, given)


def _phased(item: Pass | Counted, given: Given) -> Pass | Counted:
    if given.phase is not None:
        item.phase = given.phase
    return item
