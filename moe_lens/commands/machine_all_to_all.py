"""`moe-lens machine --all-to-all`: how quick an all-to-all between processes is here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from moe_lens.replay.ep.calibrate import Errors, Fit

TIMEOUT_S = 60.0


def machine_all_to_all(device: str | None, nproc: int | None, *, as_json: bool) -> None:
    """Measure as one of the processes, or start them.

    Args:
        device: cpu or cuda; None: a GPU where there is one for each process.
        nproc: Start so many processes.
        as_json: Print JSON.
    """
    from moe_lens.replay.ep.launch import launch, started

    if not started():
        if nproc is None:
            raise CommandError(
                "--all-to-all takes two processes or more: give --nproc, or start this with "
                "torchrun."
            )
        if code := launch(nproc, sys.argv[1:]):
            raise typer.Exit(code)
        return

    from moe_lens.replay.ep.calibrate import keep, measure
    from moe_lens.replay.ep.world import joined

    with joined(device, TIMEOUT_S) as world:
        fit = measure(world)
        first = not world.rank
    if not first:
        return
    try:
        path = keep(fit)
    except OSError as e:
        raise CommandError(
            f"{e.filename or 'the cache'} cannot be written ({e.strerror or e}), so this fit is "
            "not kept. MOE_LENS_CACHE names another folder.",
            exit_code=1,
        ) from e
    if as_json:
        typer.echo(json.dumps({"stored": str(path), **asdict(fit)}, indent=1))
    else:
        _print(fit, path)


def _print(fit: Fit, path: Path) -> None:
    typer.echo(f"{fit.device_name}: {fit.ranks} ranks, {fit.backend}")
    typer.echo(f"  latency   {1e6 * fit.latency_s:,.1f} µs")
    typer.echo(f"  bandwidth {fit.bytes_per_s / 1e9:,.2f} GB/s a rank, one way")
    typer.echo(f"  balanced  {_off(fit.balanced)}, which were fitted")
    typer.echo(f"  skewed    {_off(fit.skewed)}, which were not")
    typer.echo(f"  {fit.note}")
    typer.echo(f"kept in {path}")


def _off(errors: Errors) -> str:
    return (
        f"off by {100 * errors.median:.0f} % (median), {100 * errors.worst:.0f} % (worst) "
        f"of {errors.count} all-to-alls"
    )
