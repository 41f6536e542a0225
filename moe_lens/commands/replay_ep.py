"""`moe-lens replay --ep`: what a routing costs where experts are spread over ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moe_lens.errors import CommandError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.replay.ep.session import Replayed
    from moe_lens.replay.ep.world import World
    from moe_lens.replay.session import Progress
    from moe_lens.replay.settings import Settings

Bar = Callable[[], AbstractContextManager[Callable[["Progress"], None]]]

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Options:
    """What the command line says of the group; None or False: nothing."""

    ep: int | None
    placement: str | None
    replicas: int | None
    nodes: int | None
    dispatch_dtype: str | None
    dedup: bool
    all_to_all: str | None
    nproc: int | None
    timeout: float | None

    def check(self, *, stages: bool) -> None:
        """Refuse options without --ep, and those that it does not have.

        Raises:
            CommandError: With the option.
        """
        if self.ep is None:
            given = {
                "--placement": self.placement,
                "--replicas": self.replicas,
                "--nodes": self.nodes,
                "--dispatch-dtype": self.dispatch_dtype,
                "--no-dedup": None if self.dedup else True,
                "--all-to-all": self.all_to_all,
                "--nproc": self.nproc,
                "--timeout": self.timeout,
            }
            for option, value in given.items():
                if value is not None:
                    raise CommandError(f"{option} belongs to --ep, the number of ranks.")
            return
        if stages:
            raise CommandError("--stages is of one device, and --ep spreads a layer over several.")
        if self.nproc is not None and self.nproc != self.ep:
            raise CommandError(
                f"--nproc {self.nproc} starts as many processes, and --ep {self.ep} takes one for "
                "each rank: give the same number."
            )
        if Path(self.placement or "").suffix == ".json":
            for option, number in (("--replicas", self.replicas), ("--nodes", self.nodes)):
                if number is not None:
                    raise CommandError(f"{option} is in the plan {self.placement}: leave it out.")


def replay_ep(
    run: Path,
    options: Options,
    settings: Callable[[], Settings],
    bar: Bar,
    *,
    name: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Replay on the ranks: simulated, or as one of the processes, or by starting them.

    Args:
        run: The trace.
        options: Of the group.
        settings: Makes the settings; torch is imported for that.
        bar: Opens a progress bar.
        name: Of the result.
        out: Another file for it.
        as_json: Print JSON.
    """
    from moe_lens.replay.ep.launch import launch, started

    if options.nproc is not None and not started():
        try:
            code = launch(options.nproc, sys.argv[1:])
        except KeyboardInterrupt:
            where = out.parent if out is not None else run / "replay_ep"
            typer.echo(
                f"interrupted: what was measured so far, if anything, is in {where}, in a file "
                "whose name ends in -interrupted.parquet",
                err=True,
            )
            raise typer.Exit(130) from None
        if code:
            raise typer.Exit(code)
        return
    if not started():
        with bar() as on_progress:
            found = _run(run, options, settings(), None, name, out, on_progress)
        _print(found, as_json)
        if found.interrupted:
            typer.echo(f"interrupted: what was measured so far is in {found.path}", err=True)
            raise typer.Exit(130)
        return

    from moe_lens.replay.ep.world import OtherRankFailed, joined

    try:
        with joined(settings().device, options.timeout or TIMEOUT_S) as world:
            if world.rank:
                _run(run, options, settings(), world, name, out, lambda _: None)
                return
            with bar() as on_progress:
                found = _run(run, options, settings(), world, name, out, on_progress)
    except OtherRankFailed:
        raise typer.Exit(1) from None  # that rank has said why
    _print(found, as_json)


def _run(
    run: Path,
    options: Options,
    settings: Settings,
    world: World | None,
    name: str | None,
    out: Path | None,
    on_progress: Callable[[Progress], None],
) -> Replayed:
    from moe_lens.replay.ep.session import replay_ep as run_replay
    from moe_lens.replay.ep.settings import Parallel

    assert options.ep is not None
    parallel = Parallel(
        ranks=options.ep,
        placement=options.placement or "contiguous",
        replicas=options.replicas or 0,
        nodes=options.nodes or 1,
        dedup=options.dedup,
        dispatch_dtype=options.dispatch_dtype,
        all_to_all=options.all_to_all,
        timeout_s=options.timeout or TIMEOUT_S,
    )
    return run_replay(
        run, parallel, settings, name=name, out=out, world=world, on_progress=on_progress
    )


def _print(found: Replayed, as_json: bool) -> None:
    layers: list[dict[str, Any]] = found.by_layer()
    if as_json:
        said = {
            "result": str(found.path),
            "answers": found.answers(),
            "layers": layers,
            "about": found.about,
        }
        typer.echo(json.dumps(finite(said), ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from moe_lens.terminal.replayed_ep import print_replay_ep

    console = Console(highlight=False)
    print_replay_ep(console, found.about, layers, found.answers(), str(found.path))
